"""How far an output can be trusted: its probability of being right, and signs that something is wrong with it.

    calibration = read_calibration(folder, hash)           what `diptych evaluate --calibrate` stored, or None
    facts_of(output, calibration)
    -> {"probability": 0.83, "log_probability_per_token": -0.2, "lowest_log_probability": -1.9, "repetition": 0.0,
        "language": "ko", "unread": ["twice"]}

The probability of being right is a logistic function of the mean and the lowest log-probability of the output's tokens
and of whether it ended (Platt 1999; a temperature alone, as of Guo et al. 2017, arXiv 1706.04599, has one parameter of
these four). evaluating/calibration.py fits it.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.text_language import NO_LANGUAGE, language_of
from diptych.data_prep.text_to_ids.two_vocabularies import source_side
from diptych.finetune.inference.attention_weights import mean_weights, recompute
from diptych.finetune.inference.constraints import Grammar
from diptych.finetune.inference.outputs import Output
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.run_files.atomic_folders import read_json

CALIBRATION = "calibration.json"
"""Beside the weights."""
OF_ANOTHER_FORM = (
    f"the probability of being right is not computed: {CALIBRATION} was fitted to outputs of another --json_schema or"
    " --regex, or of none."
)
UNREAD_BELOW = 0.5
"""A source token is unread if no target token gives it this part of an even share of its attention."""
SURE_OF_LANGUAGE = 0.7
REPEATED = 4
"""Tokens of the sequences that count as repeated."""


class Calibration(NamedTuple):
    weights: tuple[float, float, float, float]
    """Of the mean and the lowest log-probability, of an output that did not end, and 1."""
    right: str
    """What counted as right: exact_match, or chrf:60 for a chrF of at least 60."""
    form: str = ""
    """The JSON schema or regular expression that the outputs had to fit."""

    def of_form(self, grammar: Grammar | None) -> "Calibration | None":
        """Itself, or None where outputs of this form have other log-probabilities than those that it was fitted to."""
        return self if self.form == (grammar.text if grammar else "") else None

    def probability(self, output: Output) -> float:
        return logistic(sum(a * b for a, b in zip(self.weights, features(output), strict=True)))


def features(output: Output) -> tuple[float, float, float, float]:
    """UserError for an output without log-probabilities."""
    if output.log_probability is None or output.lowest_log_probability is None:
        raise UserError("an output has no log-probabilities, from which its confidence is computed. Ask for scores.")
    mean = output.log_probability / max(1, len(output.ids))
    return mean, output.lowest_log_probability, float(not output.finished), 1.0


def logistic(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def read_calibration(folder: str, weights_sha256: Callable[[], str]) -> Calibration | None:
    """None where there is none; the weights are hashed only where there is one. UserError: it was fitted for other
    weights than these, or is broken."""
    file = Path(folder).expanduser() / CALIBRATION
    if not file.is_file():
        return None
    try:
        stored = read_json(file)
        found = Calibration(tuple(map(float, stored["weights"])), str(stored["right"]), stored.get("form", ""))
        fitted_for = stored["weights_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        found, fitted_for = None, None
    if found is None or len(found.weights) != 4 or not all(map(math.isfinite, found.weights)):
        raise UserError(f"{file} is broken. Remove it, or fit it anew: diptych evaluate --calibrate true.")
    if fitted_for != weights_sha256():
        raise UserError(
            f"{file} was fitted for other weights than those of {folder}. Fit it anew: diptych evaluate --confidence"
            f" {found.right} --calibrate true --split validation."
        )
    return found


def facts_of(output: Output, calibration: Calibration | None, threshold: float | None = None) -> dict[str, Any]:
    """What is said of an output, in JSON; with a threshold also whether it is left to a person. The language is None
    if it is not clear, or py3langid is not installed."""
    mean, lowest, *_ = features(output)
    probability = None if calibration is None else round(calibration.probability(output), 4)
    facts = {
        "probability": probability,
        "log_probability_per_token": round(mean, 6),
        "lowest_log_probability": round(lowest, 6),
        "repetition": round(repetition(output.ids), 4),
        "language": language_in(output.text),
        "unread": list(output.unread or ()),
    }
    return facts if threshold is None else facts | {"abstained": probability < threshold}


def repetition(ids: Sequence[int]) -> float:
    """The part of the sequences of REPEATED tokens that occurred before: 0 for none, near 1 for a loop."""
    sequences = [tuple(ids[start : start + REPEATED]) for start in range(len(ids) - REPEATED + 1)]
    return 1 - len(Counter(sequences)) / len(sequences) if sequences else 0.0


def language_in(text: str) -> str | None:
    try:
        language, confidence = language_of(text)
    except UserError:
        return None
    return language if confidence >= SURE_OF_LANGUAGE and language != NO_LANGUAGE else None


def unread_of(loaded: LoadedModel, source_ids: Sequence[int], given: Sequence[int], output: Output) -> tuple[str, ...]:
    """The parts of the source at which no token of the output looked, in the mean over heads and layers of
    cross-attention. () for an empty output. UserError: the model's attention is no map of tokens to tokens.

    It is a hint: a model may have read a token in its encoder, by way of the tokens beside it.
    """
    if not output.ids:
        return ()
    decoder_ids = torch.tensor([[*given, *output.ids[:-1]]])
    weights = mean_weights(recompute(loaded.model, torch.tensor([list(source_ids)]), decoder_ids).cross)
    weights = weights[len(given) - 1 :]
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-9)  # with a merged hinge, a part is the target's
    tokenizer = source_side(loaded.tokenizer)
    control = set(tokenizer.all_special_ids)
    is_text = torch.tensor([row not in control for row in source_ids])
    share = weights[:, is_text].sum(1, keepdim=True) / is_text.sum().clamp(min=1)
    is_unread = (weights < UNREAD_BELOW * share).all(0) & is_text
    parts: list[list[int]] = [[]]
    for row, is_open in zip(source_ids, is_unread.tolist(), strict=True):
        parts[-1].append(row) if is_open else parts.append([])
    texts = (tokenizer.decode(part, clean_up_tokenization_spaces=False).strip() for part in parts if part)
    return tuple(text for text in texts if text)


def check_abstaining(threshold: float | None, calibration: Calibration | None, model: str) -> None:
    """UserError where there is a threshold and nothing that it can be compared with."""
    if threshold is not None and calibration is None:
        raise UserError(
            f"abstain_below needs the probability that an output is right, and {model} has no {CALIBRATION} for"
            f" outputs of this form. Fit it on the validation split: diptych evaluate {model} --data PREPARED --split"
            " validation --confidence exact_match --calibrate true, with the same --json_schema or --regex, if any."
        )
