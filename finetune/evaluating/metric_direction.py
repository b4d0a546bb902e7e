"""Which figure of an evaluation decides which checkpoint is the best one, and whether a value is an improvement."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from diptych.data_prep.rows.named_splits import name_in
from diptych.finetune.evaluating.metrics import score_texts

LOWER_IS_BETTER = frozenset({"loss", "unfinished", "token_error_rate"})


def selectable_figures(metrics: Sequence[str]) -> list[str]:
    """The figures that an evaluation with these metrics has and a checkpoint can be selected by."""
    if not metrics:
        return ["loss"]
    return ["loss", *score_texts(metrics, ["a"], [["a"]])[0], "exact_match_rows", "unfinished"]


def selected_figure(best_metric: str, figures: Mapping[str, Mapping[str, float]]) -> float:
    """The value of `best_metric` in the figures of each validation split: `medical/chrf` is that of
    validation/medical, `chrf` is the mean over the splits."""
    name, _, figure = best_metric.rpartition("/")
    return fmean(of_split[figure] for split, of_split in figures.items() if not name or name_in(split) == name)


def is_improvement(figure: str, value: float, best: float | None) -> bool:
    """Whether `value` is better than the best so far. NaN never is."""
    if math.isnan(value):
        return False
    return best is None or (value < best if figure.rpartition("/")[2] in LOWER_IS_BETTER else value > best)
