"""Settings of each objective, `objective_settings` of a recipe: what there is, and what is used where it is not given.

    checked_settings("dpo", {"beta": 0.2})      {"beta": 0.2, "loss": "sigmoid", "supervised_weight": 0.0, …}

Nothing heavy is imported here, so that mistakes in a recipe are answered at once.
"""

import math
from collections.abc import Mapping
from typing import Any

from diptych.data_prep.command_line.arguments import choose_from
from diptych.data_prep.command_line.errors import UserError

SHARED = {"supervised_weight": 0.0, "label_smoothing": 0.0, "dropout": False}
ONLINE = {
    "reward": "chrf",
    "reward_weights": {},
    "reward_scale": 100.0,
    "samples": 8,
    "temperature": 1.0,
    "unfinished": "worst",
    "supervised_weight": 0.0,
    "dropout": False,
}
"""`reward`: metrics, separated by commas. `reward_scale`: what rewards are divided by (metrics are percentages).
`unfinished`: an answer that the limit ended has the worst reward of its source's answers, or `scored`: its own."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.1, "loss": "sigmoid"} | SHARED,
    "simpo": {"beta": 2.0, "gamma": 1.0} | SHARED,
    "cpo": {"beta": 0.1} | SHARED | {"supervised_weight": 1.0},
    "orpo": {"beta": 0.1, "supervised_weight": 1.0, "dropout": False},
    "kto": {"beta": 0.1, "liked_weight": 1.0, "not_liked_weight": 1.0, "supervised_weight": 0.0, "dropout": False},
    "mrt": ONLINE | {"with_target": True, "sharpness": 0.005},
    "grpo": ONLINE | {"by_deviation": True, "by_length": True, "kl_weight": 0.0},
}
"""`supervised_weight`: of the cross-entropy of chosen or liked answers, a mean per token, in the loss.
`label_smoothing`: the share of pairs that may be the wrong way round (conservative DPO). `dropout`: whether the model
keeps its own, with which the probabilities that are compared would be those of ever other networks."""
KINDS = {bool: "true or false", str: "a text", dict: "a mapping, {figure: weight}"}
ABOVE_0 = ("beta", "temperature", "samples", "sharpness", "reward_scale")
CHOICES = {"loss": ("sigmoid", "hinge", "ipo", "robust"), "unfinished": ("worst", "scored")}
OF_SAMPLES = ("mrt", "grpo")
"""The model writes the answers itself."""
NEED_REFERENCE = ("dpo", "kto")
OF_PAIRS = ("loss", "reward_chosen", "reward_rejected", "accuracy", "margin", "nats_chosen", "nats_rejected")
"""Figures of an evaluation on pairs or marked answers."""
OF_VALIDATION = ["accuracy", "margin"]
"""Figures of preferences by which a checkpoint can be selected."""


def checked_settings(objective: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """UserError for a setting that this objective does not have, or a value that it cannot have."""
    defaults = DEFAULTS[objective]
    for name, value in given.items():
        where = f"objective_settings.{name}"
        if name not in defaults:
            raise UserError(f"{where}: {objective} has no such setting. {choose_from(name, list(defaults))}")
        kind = type(defaults[name])
        if name in CHOICES:
            if value not in CHOICES[name]:
                raise UserError(f"{where} is {value!r}. {choose_from(str(value), CHOICES[name])}")
        elif kind in KINDS:
            if not isinstance(value, kind):
                raise UserError(f"{where} is {value!r}; {KINDS[kind]} is due.")
        elif isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
            raise UserError(f"{where} is {value!r}; a {'whole ' if kind is int else ''}number is due.")
        elif not math.isfinite(value) or value < 0 or (value == 0 and name in ABOVE_0):
            raise UserError(f"{where} is {value!r}; it must be {'above 0' if value == 0 else '0 or more'}.")
        elif name == "samples" and value < 2:
            raise UserError(f"{where} is {value}; 2 or more answers to a source are compared.")
        elif name == "label_smoothing" and value >= 0.5:
            raise UserError(f"{where} is {value:g}; it must be below 0.5, half of the pairs.")
    settings = {**defaults, **given}
    if settings.get("label_smoothing") and settings.get("loss") in ("hinge", "ipo"):
        raise UserError(f"objective_settings.label_smoothing has no effect with loss {settings['loss']}. Drop it.")
    if settings.get("loss") == "robust" and not settings["label_smoothing"]:
        raise UserError("objective_settings.loss is robust, which needs label_smoothing, the share of wrong pairs.")
    return settings
