"""Training on answers that the model writes itself, scored by metrics: minimum risk training, and GRPO.

    rows = SampledRows(split, …, loaded=loaded, settings=settings)
    batch = rows.tensors([3, 9])            samples answers to both sources, scores them, and returns them as a batch
    OnlineObjective(model, "mrt", settings)(batch, Items(examples=2, chosen_tokens=31))

    mrt     Σ Q(y) · cost(y) over the different answers y to a source, Q = softmax(sharpness · log p(y))
            (Shen et al. 2016, arXiv 1512.02433: sharpness 0.005; the target is one of the answers)
    grpo    − advantage · log p(y), a mean over the answers; the advantage is the reward minus the mean reward of the
            answers to the same source, divided by its standard deviation (arXiv 2402.03300); `by_deviation: false`
            and `by_length: false` leave out this division and that by the answer's length (arXiv 2503.20783)
            kl_weight: of the divergence from the model as it started, by the estimator r − log r − 1

A step samples with the weights of that moment, and uses each answer once, so no ratio of probabilities has to be
clipped. The encoder runs once for sampling and once, with gradient, for training. Samples are drawn by torch's random
state of each rank, which checkpoints keep.

A answers, N target tokens, B sources.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from diptych.data_prep.packing.packed_row import MARKS_COLUMN
from diptych.data_prep.rows.records import IGNORE_INDEX
from diptych.finetune.batches.padded_rows import Items, PaddedRows, pad_sources, pad_targets
from diptych.finetune.evaluating.evaluate_rows import source_keys
from diptych.finetune.inference.generation import cut_at_stop, generate_outputs, in_eval_mode
from diptych.finetune.inference.target_tokens import given_tokens
from diptych.finetune.model.families import SOURCE_ROWS
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.preferences.objective import Batch, PreferenceObjective, TokenFigures
from diptych.finetune.preferences.scores import scores_of

REWARDS, FINISHED, DRAWS = "rewards", "finished", "draws"
"""Of a batch: reward of each answer, whether it ended, and how many samples are this answer, (A,)."""
LEAST_DEVIATION = 1e-4


@dataclass(frozen=True)
class SampledRows(PaddedRows):
    """Padded rows whose answers are sampled when they are read. The target is an answer, too, if the settings have a
    use for it; its mark is 1, that of samples 0. For mrt, equal answers are one, and `draws` counts its samples."""

    loaded: LoadedModel | None = None
    settings: Mapping[str, Any] | None = None
    metric_settings: Mapping[str, Any] | None = None
    max_new_tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    """What sampling and scoring took, of each batch since they were last taken away."""

    def tensors(self, rows: Sequence[int]) -> Batch:
        if not len(rows):
            nothing = torch.zeros(1, dtype=torch.long)
            batch = super().tensors(rows) | {SOURCE_ROWS: nothing, MARKS_COLUMN: nothing}
            return batch | {REWARDS: torch.zeros(1, dtype=torch.float64), FINISHED: nothing, DRAWS: nothing}
        started = time.perf_counter()
        columns, settings = self.split[rows], self.settings
        languages = [of_row for _, of_row in source_keys(self.split.select(rows))]
        given = [given_tokens(self.loaded, it if any(it) else None) for it in languages]
        drawn = {"do_sample": True, "temperature": float(settings["temperature"]), "top_k": 0, "top_p": 1.0}
        drawn |= {"num_return_sequences": settings["samples"], "num_beams": 1, "max_new_tokens": self.max_new_tokens}
        with torch.compiler.set_stance("force_eager"):  # rows have ever new shapes
            outputs = generate_outputs(self.loaded, columns["input_ids"], batch_size=len(rows), given=given, **drawn)
        answers = []
        for place, (start, *forced) in enumerate(given):
            samples = outputs[place * settings["samples"] : (place + 1) * settings["samples"]]
            found = [_Answer(place, start, forced, it.ids, it.text, it.finished, 0, 1) for it in samples]
            if settings.get("with_target") or settings["supervised_weight"]:
                own_start = columns["decoder_start"][place] if "decoder_start" in columns else start
                text = cut_at_stop(columns["target"][place], self.loaded.template)[0]
                labels = columns["labels"][place]
                chosen = labels[len(forced) :] if labels[: len(forced)] == forced else labels
                found.append(_Answer(place, own_start, labels[: -len(chosen)], tuple(chosen), text, True, 1, 0))
            answers += _different(found) if settings.get("with_target") is not None else found
        rewards = scores_of(
            [answer.text for answer in answers],
            [[cut_at_stop(columns["target"][answer.source], self.loaded.template)[0]] for answer in answers],
            [columns["source"][answer.source] for answer in answers],
            settings["reward"],
            settings["reward_weights"],
            self.metric_settings,
        )
        if settings["unfinished"] == "worst":
            for place, answer in enumerate(answers):
                of_source = [other for other, it in enumerate(answers) if it.source == answer.source]
                rewards[place] = rewards[place] if answer.finished else rewards[of_source].min()
        targets = pad_targets(
            [{"labels": [*it.forced, *it.ids], "decoder_start": it.start} for it in answers],
            self.pad_token_id,
            self.decoder_start_token_id,
        )
        for row, answer in enumerate(answers):
            targets["labels"][row, : len(answer.forced)] = IGNORE_INDEX
        self.seconds.append(time.perf_counter() - started)
        return {
            **pad_sources(columns["input_ids"], self.pad_token_id),
            **targets,
            SOURCE_ROWS: torch.tensor([answer.source for answer in answers]),
            MARKS_COLUMN: torch.tensor([answer.mark for answer in answers]),
            REWARDS: torch.from_numpy(rewards),
            FINISHED: torch.tensor([int(answer.finished) for answer in answers]),
            DRAWS: torch.tensor([answer.draws for answer in answers]),
        }


@dataclass(frozen=True)
class _Answer:
    source: int
    start: int
    forced: list[int]
    """Tokens after the start that the model did not choose: a language code, or a prefix of the template."""
    ids: tuple[int, ...]
    text: str
    finished: bool
    mark: int
    draws: int


def _different(answers: Sequence[_Answer]) -> list[_Answer]:
    """One of equal ones, with the draws of all; the target stays."""
    by_ids: dict[tuple[int, ...], _Answer] = {}
    for answer in sorted(answers, key=lambda it: it.mark):
        ids = (*answer.forced, *answer.ids)
        before = by_ids[ids].draws if ids in by_ids else 0
        by_ids[ids] = replace(answer, draws=answer.draws + before)
    return list(by_ids.values())


class OnlineObjective(PreferenceObjective):
    """A model with the loss of answers that it wrote itself."""

    figure_names = (
        "reward",
        "best_reward",
        "equal_rewards",
        "entropy",
        "output_tokens",
        "unfinished_share",
        "divergence",
    )
    needs_divergence = False

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        objective: str,
        settings: Mapping[str, Any],
        max_new_tokens: int,
        reference: PreTrainedModel | None = None,
        tokens_at_once: int | None = None,
    ):
        """`reference`: for kl_weight; without it, the model without its adapter."""
        super().__init__(model, None, tokens_at_once)
        self.objective, self.settings, self.max_new_tokens = objective, settings, max_new_tokens
        # in a tuple, so that it is not trained, sent to other ranks, or saved
        self._reference = () if reference is None else (reference.eval().requires_grad_(False),)

    def examples_in(self, batch: Batch, answer_of: torch.Tensor) -> int:
        return len(batch["input_ids"]) if len(answer_of) else 0

    def loss_of_tokens(self, tokens: TokenFigures, batch: Batch, items: Items) -> torch.Tensor:
        answers = self._answers(tokens, batch)
        is_sample, sources = batch[DRAWS] > 0, batch[SOURCE_ROWS]
        rewards = batch[REWARDS].to(answers.log_probabilities.dtype)
        self._add_online_figures(tokens, batch, answers.tokens)
        lengths = answers.tokens if self.settings.get("by_length", True) else float(self.max_new_tokens)
        if self.objective == "mrt":
            taken = is_sample | bool(self.settings["with_target"])
            scores = (self.settings["sharpness"] * answers.log_probabilities).masked_fill(~taken, -torch.inf)
            likely = _softmax_by(scores, sources)
            loss = -(likely * rewards / self.settings["reward_scale"])[taken].sum() / items.examples
        else:
            advantages = self._advantages(rewards, sources, is_sample)
            gains = advantages[tokens.answer_of] * torch.exp(
                tokens.log_probabilities - tokens.log_probabilities.detach()
            )
            if self.settings["kl_weight"]:
                ratio = self._by_reference(batch) - tokens.log_probabilities
                divergence = (torch.expm1(ratio) - ratio) * is_sample[tokens.answer_of]
                self._add("divergence", divergence[is_sample[tokens.answer_of]])
                gains = gains - self.settings["kl_weight"] * divergence
            per_answer = gains.new_zeros(len(rewards)).index_add(0, tokens.answer_of, gains) / lengths
            loss = -per_answer.sum() / (items.examples * self.settings["samples"])
        if self.settings["supervised_weight"]:
            of_targets = answers.log_probabilities[answers.marks > 0].sum()
            loss = loss - self.settings["supervised_weight"] * of_targets / items.chosen_tokens
        return loss

    def _advantages(self, rewards: torch.Tensor, sources: torch.Tensor, is_sample: torch.Tensor) -> torch.Tensor:
        """(A,), 0 for targets."""
        advantages = torch.zeros_like(rewards)
        for source in sources.unique():
            own = (sources == source) & is_sample
            centred = rewards[own] - rewards[own].mean()
            if self.settings["by_deviation"]:
                advantages[own] = centred / (rewards[own].std() + LEAST_DEVIATION)
            else:
                advantages[own] = centred / self.settings["reward_scale"]
        return advantages

    def _by_reference(self, batch: Batch) -> torch.Tensor:
        """Log-probabilities of the target tokens, (N,)."""
        model = self._reference[0] if self._reference else self.model
        other = PreferenceObjective(model, None, self.tokens_at_once)
        with torch.no_grad(), nullcontext() if self._reference else in_eval_mode(model), without_own_adapter(model):
            states, labels, head, _ = other._states_labels_and_head(self._inputs(batch))
            return other._token_figures(batch, states, labels, head).log_probabilities

    def _add_online_figures(self, tokens: TokenFigures, batch: Batch, lengths: torch.Tensor) -> None:
        """Over all samples: an answer that was drawn three times counts three times."""
        draws, sources = batch[DRAWS], batch[SOURCE_ROWS]
        rewards, drawn_for = batch[REWARDS].repeat_interleave(draws), sources.repeat_interleave(draws)
        groups = [rewards[drawn_for == source] for source in sources.unique()]
        self._add("reward", rewards)
        self._add("best_reward", torch.stack([group.max() for group in groups]))
        self._add("equal_rewards", torch.stack([(group == group[0]).all() for group in groups]))
        self._add("entropy", tokens.entropies.repeat_interleave(draws[tokens.answer_of][:: tokens.every]))
        self._add("output_tokens", lengths.repeat_interleave(draws))
        self._add("unfinished_share", 1.0 - batch[FINISHED].repeat_interleave(draws).double())


def without_own_adapter(model: PreTrainedModel | PeftModel) -> AbstractContextManager[None]:
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()


def _softmax_by(scores: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """(A,) scores, softmax over those of the same group."""
    count = int(groups.max()) + 1
    largest = scores.detach().new_full((count,), -torch.inf).scatter_reduce(0, groups, scores.detach(), "amax")
    exponents = torch.exp(scores - largest[groups])
    return exponents / exponents.new_zeros(count).index_add(0, groups, exponents)[groups]
