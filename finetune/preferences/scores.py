"""Scores of answers by metrics: each answer alone, higher is better.

    scores_of(["가."], [["가."]], ["Go."], "chrf,token_f1", {"chrf": 1, "token_f1": 0.5}, {})     (texts,)

A metric with counts for each text is read there; another one is computed of one text at a time. Figures are added up
by weight; those of which lower is better count as negative.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diptych.data_prep.command_line.errors import UserError, excerpt
from diptych.finetune.commands.model_settings import split_names
from diptych.finetune.evaluating.metrics import check_pairs, find_metrics, lower_is_better


def scores_of(
    texts: Sequence[str],
    references: Sequence[Sequence[str]],
    sources: Sequence[str],
    by: str,
    weights: Mapping[str, float],
    metric_settings: Mapping[str, Any],
) -> np.ndarray:
    """`by`: names of metrics. UserError for a weight of no figure, and for scores that are no numbers."""
    names = split_names(by)
    known = {"bleu": {"effective_order": True}} if "bleu" in names else {}
    given = {name: dict(own) if isinstance(own, Mapping) else own for name, own in metric_settings.items()}
    metrics = find_metrics(names, known | given)
    check_pairs(texts, references)
    totals, unused = np.zeros(len(texts)), dict(weights)
    for name, count in metrics.items():
        counted = count(texts, references, sources)
        of_each = [counted.at(np.array([place])).figures() for place in range(len(texts))]
        figures = list(of_each[0])
        of_metric = {figure: unused.pop(figure) for figure in figures if figure in unused}
        if not of_metric and len(figures) > 1:
            raise UserError(
                f"{name} has the figures {', '.join(figures)}. Say which count, by weights: {{{figures[-1]}: 1}}."
            )
        for figure, weight in (of_metric or {figures[0]: 1.0}).items():
            values = np.array([found[figure] for found in of_each], dtype=float)
            if len(bad := np.flatnonzero(~np.isfinite(values))):
                raise UserError(
                    f"{name} gives the {figure} {values[bad[0]]} to {len(bad)} of {len(texts)} answers, first to"
                    f" {excerpt(texts[bad[0]], 60)!r}. Let it give a number to every text, also to an empty one."
                )
            totals += weight * (-1.0 if lower_is_better(figure, names) else 1.0) * values
    if unused:
        raise UserError(f"weights are given for {', '.join(unused)}, which is no figure of {', '.join(names)}.")
    return totals
