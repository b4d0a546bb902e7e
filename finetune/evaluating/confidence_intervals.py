"""Bootstrap intervals of figures, and paired tests of two models on the same sources.

    bootstrap_intervals({"chrf": statistics})         {"chrf": (39.1, 43.3)}: the interval of 41.2 over other sources
    paired_tests({"chrf": ours}, {"chrf": theirs})    {"chrf": Paired(a=41.2, b=42.0, low=-0.3, high=1.9, p=0.16)}

Sources are drawn with all their counts (`Statistics` of metrics.py, N sources × K numbers), so corpus metrics are
computed anew for each draw. The interval is that of the percentile bootstrap (Efron 1979; for BLEU Koehn 2004,
https://aclanthology.org/W04-3250). The p-value is that of approximate randomisation (Noreen 1989; Riezler and Maxwell
2005, https://aclanthology.org/W05-0908), two-sided: how often the outputs of two equal models, exchanged source by
source at random, differ as much as these do. Both are about other sources, and not about another training seed.

Seeded and on one thread, so equal figures give equal digits. 300 sources with six metrics take 0.15 s for the
intervals and 4 s for the tests.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from diptych.finetune.evaluating.metrics import Statistics

LEVEL_PERCENT = 95
RESAMPLES = 1000
TRIALS = 10_000
_ROUNDING = 1e-9
"""Differences that are equal except for rounding count as equal: with few sources many exchanges give equal ones."""


class Paired(NamedTuple):
    """One figure of two models on the same sources."""

    a: float
    b: float
    low: float
    """Interval of b − a."""
    high: float
    p: float
    """Two-sided."""


def bootstrap_intervals(
    statistics: Mapping[str, Statistics], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Low and high of each figure; {} for fewer than two sources, which have no spread."""
    if not statistics or _source_count(statistics) < 2:
        return {}
    drawn = [_figures(statistics, weights) for weights in _resamples(_source_count(statistics), resamples, seed)]
    return {name: _interval([figures[name] for figures in drawn]) for name in drawn[0]}


def paired_tests(
    a: Mapping[str, Statistics], b: Mapping[str, Statistics], trials: int = TRIALS, seed: int = 0
) -> dict[str, Paired]:
    """A test of each figure. Row n of all statistics is source n. {} for fewer than two sources."""
    assert a.keys() == b.keys() and _source_count(a) == _source_count(b), "paired statistics need the same sources"
    sources = _source_count(a)
    if sources < 2:
        return {}
    ours, theirs = (_figures(side, np.ones(sources)) for side in (a, b))
    resamples = _resamples(sources, RESAMPLES, seed)
    spread = [_difference(_figures(a, weights), _figures(b, weights)) for weights in resamples]
    random = np.random.default_rng(seed)
    exchanged = []
    for _ in range(trials):
        mask = random.integers(2, size=sources).astype(float)  # the sources that change sides, (N,)
        sides: tuple[dict[str, float], dict[str, float]] = ({}, {})
        for name in a:
            for side, own, other in zip(sides, (a[name], b[name]), (b[name], a[name]), strict=True):
                side |= own.figures_of(_weighted(own.counts, 1 - mask) + _weighted(other.counts, mask))
        exchanged.append(_difference(*sides))
    tests = {}
    for name in ours:
        observed = abs(theirs[name] - ours[name])
        differences = abs(np.array([difference[name] for difference in exchanged]))
        as_large = int((differences >= observed * (1 - _ROUNDING) - _ROUNDING).sum())
        # + 1, because what was observed is one of the possible exchanges; without it p could be 0
        interval = _interval([difference[name] for difference in spread])
        tests[name] = Paired(ours[name], theirs[name], *interval, (as_large + 1) / (trials + 1))
    return tests


def _source_count(statistics: Mapping[str, Statistics]) -> int:
    (sources,) = {len(each.counts) for each in statistics.values()}
    return sources


def _resamples(sources: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each source is drawn, (N,), in each of `resamples` draws of N with replacement."""
    random = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.bincount(random.integers(sources, size=sources), minlength=sources).astype(np.float64)


def _weighted(counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """weights @ counts, summed in an order that does not depend on the number of threads, unlike BLAS."""
    return np.einsum("n,nk->k", weights, counts)


def _figures(statistics: Mapping[str, Statistics], weights: np.ndarray) -> dict[str, float]:
    figures = {}
    for each in statistics.values():
        figures |= each.figures_of(_weighted(each.counts, weights))
    return figures


def _difference(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    return {name: b[name] - a[name] for name in a}


def _interval(values: list[float]) -> tuple[float, float]:
    outside = (100 - LEVEL_PERCENT) / 2
    low, high = np.percentile(values, [outside, 100 - outside])
    return float(low), float(high)
