"""Losses of preferences, as functions of the log-probabilities that a model gives to answers.

    loss = PreferenceLoss.of("dpo", {"beta": 0.2})
    loss.of_examples(answers)                    (P,): one for each pair, or for each marked answer
    loss.rewards(answers)                        (A,): what the method takes for the reward of an answer

    dpo     −log σ(β · ((π_c − ρ_c) − (π_r − ρ_r)))       arXiv 2305.18290; β = 0.1; ρ: the reference
            loss: hinge (arXiv 2305.10425), ipo (arXiv 2310.12036, of means per token), robust (arXiv 2403.00409)
    simpo   −log σ(β · (π_c/n_c − π_r/n_r) − γ)           arXiv 2405.14734; β = 2, γ = 1
    cpo     −log σ(β · (π_c − π_r)), and the chosen answers' cross-entropy        arXiv 2401.08417; β = 0.1
    orpo    −β · log σ(log odds_c − log odds_r), and the same    arXiv 2403.07691; β = 0.1; odds of means per token
    kto     liked 1 − σ(β · (π − ρ) − z), not liked 1 − σ(z − β · (π − ρ))        arXiv 2402.01306; β = 0.1
            z: β · the mean of π − ρ over answers to other sources, at least 0

π: the summed log-probability of an answer's n tokens by the model, ρ by the reference. Answers 2k and 2k + 1 have one
source: the chosen and the rejected one; with kto, the marked one and an answer to another source.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.functional import logsigmoid

from diptych.finetune.preferences.objective_settings import NEED_REFERENCE, checked_settings


class AnswerFigures(NamedTuple):
    """Each (A,)."""

    log_probabilities: torch.Tensor
    """Summed over the tokens of an answer, in nats."""
    tokens: torch.Tensor
    marks: torch.Tensor
    """1 for a chosen or liked answer, -1 for one that is not, 0 for an answer to another source (kto)."""
    reference: torch.Tensor | None = None
    """Log-probabilities by the reference."""

    @property
    def means(self) -> torch.Tensor:
        return self.log_probabilities / self.tokens

    @property
    def ratios(self) -> torch.Tensor:
        return self.log_probabilities - self.reference


@dataclass(frozen=True)
class PreferenceLoss:
    objective: str
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, objective: str, given: Mapping[str, Any]) -> "PreferenceLoss":
        """UserError for a setting that this objective does not have, or a value that it cannot have."""
        return cls(objective, checked_settings(objective, given))

    @property
    def needs_reference(self) -> bool:
        return self.objective in NEED_REFERENCE

    @property
    def is_marked(self) -> bool:
        """Whether answers are marked one by one, and do not come in pairs."""
        return self.objective == "kto"

    @property
    def supervised_weight(self) -> float:
        return self.settings["supervised_weight"]

    def of_examples(self, answers: AnswerFigures, divergence: torch.Tensor | float = 0.0) -> torch.Tensor:
        """(P,), without the supervised share. `divergence`: the mean of `ratios` over all unrelated answers."""
        return LOSSES[self.objective](answers, self.settings, divergence)

    def rewards(self, answers: AnswerFigures) -> torch.Tensor:
        """(A,)"""
        if self.needs_reference:
            found = answers.ratios
        else:
            found = answers.log_probabilities if self.objective == "cpo" else answers.means
        return self.settings["beta"] * found


def _smoothed(logits: torch.Tensor, share: float) -> torch.Tensor:
    return -(1 - share) * logsigmoid(logits) - share * logsigmoid(-logits)


def _dpo(answers: AnswerFigures, settings: Mapping[str, Any], _: Any) -> torch.Tensor:
    beta, share = settings["beta"], settings["label_smoothing"]
    ratios = answers.ratios / answers.tokens if settings["loss"] == "ipo" else answers.ratios
    margins = ratios[0::2] - ratios[1::2]
    if settings["loss"] == "hinge":
        return (1 - beta * margins).relu()
    if settings["loss"] == "ipo":
        return (margins - 1 / (2 * beta)).square()
    if settings["loss"] == "robust":
        logits = beta * margins
        return (share * logsigmoid(-logits) - (1 - share) * logsigmoid(logits)) / (1 - 2 * share)
    return _smoothed(beta * margins, share)


def _simpo(answers: AnswerFigures, settings: Mapping[str, Any], _: Any) -> torch.Tensor:
    margins = answers.means[0::2] - answers.means[1::2]
    return _smoothed(settings["beta"] * margins - settings["gamma"], settings["label_smoothing"])


def _cpo(answers: AnswerFigures, settings: Mapping[str, Any], _: Any) -> torch.Tensor:
    margins = answers.log_probabilities[0::2] - answers.log_probabilities[1::2]
    return _smoothed(settings["beta"] * margins, settings["label_smoothing"])


def _orpo(answers: AnswerFigures, settings: Mapping[str, Any], _: Any) -> torch.Tensor:
    means = answers.means
    certain = -torch.finfo(means.dtype).eps  # a probability of 1 has infinite odds
    log_odds = means - torch.log(-torch.expm1(means.clamp(max=certain)))
    return -settings["beta"] * logsigmoid(log_odds[0::2] - log_odds[1::2])


def _kto(answers: AnswerFigures, settings: Mapping[str, Any], divergence: torch.Tensor | float) -> torch.Tensor:
    beta, marks = settings["beta"], answers.marks[0::2]
    least = torch.as_tensor(divergence, dtype=answers.log_probabilities.dtype).clamp(min=0).detach()
    gains = marks * beta * (answers.ratios[0::2] - least.to(marks.device))
    weights = torch.where(marks > 0, settings["liked_weight"], settings["not_liked_weight"])
    return weights * (1 - gains.sigmoid())


LOSSES: dict[str, Callable[[AnswerFigures, Mapping[str, Any], Any], torch.Tensor]] = {
    "dpo": _dpo,
    "simpo": _simpo,
    "cpo": _cpo,
    "orpo": _orpo,
    "kto": _kto,
}
