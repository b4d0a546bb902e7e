"""How far a figure can be trusted: bootstrap intervals, and paired tests of two models on the same sources.

    bootstrap_intervals({"chrf": statistics})         {"chrf": (39.1, 43.3)}: 41.2 on these sources, and on others
    paired_tests({"chrf": ours}, {"chrf": theirs})    {"chrf": Paired(a=41.2, b=42.0, low=-0.3, high=1.9, p=0.16)}

What is drawn is sources, each with all that was counted on it (`Statistics` of metrics.py, N sources × K numbers), so
that corpus metrics are computed anew for each draw and not averaged over sentences. The interval is the percentile
bootstrap's (Efron 1979; for BLEU Koehn 2004, https://aclanthology.org/W04-3250). The p-value is that of approximate
randomisation (Noreen 1989; Riezler and Maxwell 2005, https://aclanthology.org/W05-0908), two-sided: how often the
outputs of two equal models, exchanged source by source at random, differ as much as these do. Both tell of other
sources from where these came from; neither tells of another seed of training.

Seeded, and on one thread: the same figures in, the same digits out. 300 sources with six metrics take 0.15 s
for the intervals, and 4 s for the tests.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from diptych.finetune.evaluating.metrics import Statistics

LEVEL_PERCENT = 95
RESAMPLES = 1000
TRIALS = 10_000
_ROUNDING = 1e-9
"""Differences that are equal but for rounding count as equal: with few sources many exchanges give the very same."""


class Paired(NamedTuple):
    """One figure of two models on the same sources."""

    a: float
    b: float
    low: float
    """The interval of b − a."""
    high: float
    p: float
    """Two-sided."""


def bootstrap_intervals(
    statistics: Mapping[str, Statistics], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Low and high of each figure; none at all where there are fewer than two sources, which have no spread."""
    if not statistics or _sources(statistics) < 2:
        return {}
    drawn = [_figures(statistics, weights) for weights in _resamples(_sources(statistics), resamples, seed)]
    return {name: _middle([figures[name] for figures in drawn]) for name in drawn[0]}


def paired_tests(
    a: Mapping[str, Statistics], b: Mapping[str, Statistics], trials: int = TRIALS, seed: int = 0
) -> dict[str, Paired]:
    """Every figure of two models; row n of all statistics is source n. None with fewer than two sources."""
    assert a.keys() == b.keys() and _sources(a) == _sources(b), "what is paired must be of the same sources"
    sources = _sources(a)
    if sources < 2:
        return {}
    ones = np.ones(sources)
    ours, theirs = _figures(a, ones), _figures(b, ones)
    spread = {name: [] for name in ours}
    for weights in _resamples(sources, RESAMPLES, seed):
        _collect(spread, _figures(a, weights), _figures(b, weights))
    exchanged = {name: [] for name in ours}
    random = np.random.default_rng(seed)
    for _ in range(trials):
        mask = random.integers(2, size=sources).astype(np.float64)
        swapped = {name: _exchange(a[name], b[name], mask) for name in a}
        _collect(exchanged, *(_merge(swapped, place) for place in (0, 1)))
    tests = {}
    for name in ours:
        observed = abs(theirs[name] - ours[name])
        as_large = sum(abs(np.array(exchanged[name])) >= observed * (1 - _ROUNDING) - _ROUNDING)
        # + 1: what was observed is one of the ways to exchange, without which p could be 0.
        tests[name] = Paired(ours[name], theirs[name], *_middle(spread[name]), float(as_large + 1) / (trials + 1))
    return tests


def _sources(statistics: Mapping[str, Statistics]) -> int:
    (sources,) = {len(each.counts) for each in statistics.values()}
    return sources


def _resamples(sources: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each source was drawn, (N,), in each of so many draws of N with replacement."""
    random = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.bincount(random.integers(sources, size=sources), minlength=sources).astype(np.float64)


def _weighted(counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """weights @ counts, by a sum whose order does not depend on the number of threads, as BLAS's does."""
    return np.einsum("n,nk->k", weights, counts)


def _figures(statistics: Mapping[str, Statistics], weights: np.ndarray) -> dict[str, float]:
    figures = {}
    for each in statistics.values():
        figures |= each.figures_of(_weighted(each.counts, weights))
    return figures


def _exchange(a: Statistics, b: Statistics, mask: np.ndarray) -> tuple[dict[str, float], dict[str, float]]:
    """The figures of both where the sources of the mask have changed sides."""
    kept = 1 - mask
    return tuple(
        each.figures_of(_weighted(each.counts, kept) + _weighted(other.counts, mask))
        for each, other in ((a, b), (b, a))
    )


def _merge(swapped: Mapping[str, tuple[dict[str, float], dict[str, float]]], side: int) -> dict[str, float]:
    return {name: value for pair in swapped.values() for name, value in pair[side].items()}


def _collect(differences: dict[str, list[float]], a: Mapping[str, float], b: Mapping[str, float]) -> None:
    for name, values in differences.items():
        values.append(b[name] - a[name])


def _middle(values: list[float]) -> tuple[float, float]:
    """What leaves out as much above as below."""
    outside = (100 - LEVEL_PERCENT) / 2
    low, high = np.percentile(values, [outside, 100 - outside])
    return float(low), float(high)
