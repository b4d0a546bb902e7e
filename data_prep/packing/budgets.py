"""How many source and target tokens a row should have, found from the lengths of the examples.

    50 examples of 100 + 20 tokens and 50 of 30 + 60
    choose_budget(source_lengths, target_lengths)                       Budget(source_tokens=144, target_tokens=88)
    choose_budget(source_lengths, target_lengths, source_tokens=512)    Budget(source_tokens=512, target_tokens=304)

Candidates are a little to four times as long as the longest example, with the data's ratio of target to source tokens
and without it. Each is tried by packing a sample, those that promise most first; the cheapest is taken.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from diptych.data_prep.packing.fill_rows import check_lengths, pack
from diptych.data_prep.packing.packed_row import Budget

STRETCHES = (1, 1.125, 1.25, 1.5, 1.75, 2, 2.5, 3, 4)
"""How many times as long as the longest example a row may be."""
SAMPLE_FOR_BUDGET = 2_000
"""Examples that are packed to see what a budget costs."""
BUDGETS_TRIED_IN_VAIN = 12
"""After so many that were no better, the best so far is taken."""
ATTENTION_TOKENS = 16_384
"""The length of a row whose attention costs as much as all else, if a mask skips most of what it may not read. It is
the price of long rows: from 512 + 512 tokens on, rows of twice that length have to save 4 % of all slots."""
EMPTY_SIDE = 0.1
"""How much more a row costs if one side of it is empty."""


def choose_budget(
    source_lengths: Sequence[int],
    target_lengths: Sequence[int],
    source_tokens: int | None = None,
    target_tokens: int | None = None,
    groups: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> Budget:
    """The round budget with which these examples cost least. A side that is given stays, and the other is chosen to
    suit. UserError where an example is longer than what is given."""
    source_lengths, target_lengths = np.asarray(source_lengths, dtype=int), np.asarray(target_lengths, dtype=int)
    longest = Budget(int(source_lengths.max()), int(target_lengths.max()))
    check_lengths(
        source_lengths, target_lengths, Budget(source_tokens or longest[0], target_tokens or longest[1]), names
    )
    if source_tokens and target_tokens:
        return Budget(source_tokens, target_tokens)
    numbers = np.arange(len(source_lengths)) if groups is None else np.unique(groups, return_inverse=True)[1]
    firsts = np.unique(numbers, return_index=True)[1]
    ratio = target_lengths.sum() / source_lengths[firsts].sum()
    sample = _sample(source_lengths[firsts], target_lengths, numbers)
    sources, targets, numbers = source_lengths[sample], target_lengths[sample], numbers[sample]
    totals = Budget(int(sources[np.unique(numbers, return_index=True)[1]].sum()), int(targets.sum()))
    best, least, tried_in_vain = None, float("inf"), 0
    candidates = _candidates(longest, ratio, source_tokens, target_tokens)
    at_best = {
        budget: _cost(budget, max(-(-total // room) for total, room in zip(totals, budget, strict=True)), totals)
        for budget in candidates
    }
    for budget in sorted(candidates, key=lambda budget: (at_best[budget], budget)):
        if at_best[budget] >= least or tried_in_vain == BUDGETS_TRIED_IN_VAIN:
            break  # none that follows can be better, or none is likely to be
        rows = pack(sources, targets, budget, groups=None if groups is None else numbers)
        cost = _cost(budget, len(rows), totals)
        tried_in_vain += 1
        if cost < least:
            best, least, tried_in_vain = budget, cost, 0
    return best


def _candidates(longest: Budget, ratio: float, source_tokens: int | None, target_tokens: int | None) -> set[Budget]:
    """Rows of all STRETCHES, with `ratio` target tokens to a source token, and a few without."""
    sources = [longest.source_tokens * stretch for stretch in STRETCHES]
    targets = [longest.target_tokens * stretch for stretch in STRETCHES]
    if source_tokens:
        pairs = [(source_tokens, target) for target in [*targets, source_tokens * ratio]]
    elif target_tokens:
        pairs = [(source, target_tokens) for source in [*sources, target_tokens / ratio]]
    else:
        pairs = [(source, source * ratio) for source in sources] + [(target / ratio, target) for target in targets]
        pairs += itertools.product(sources[::4], targets[::4])
    found = set()
    for source, target in pairs:
        for up_source, up_target in itertools.product((False, True), repeat=2):
            found.add(
                Budget(
                    source_tokens or _round(max(source, longest.source_tokens), longest.source_tokens, up_source),
                    target_tokens or _round(max(target, longest.target_tokens), longest.target_tokens, up_target),
                )
            )
    return found


def _round(tokens: float, at_least: int, up: bool) -> int:
    """A multiple of 64 from 1,024 on; of less below, at least 4, so that a short side keeps its ratio."""
    step = min(64, max(4, 1 << int(np.log2(max(tokens / 16, 1)))))
    rounded = int(tokens // step + up) * step
    return rounded if rounded >= at_least else -(-at_least // step) * step


def _cost(budget: Budget, rows: int, totals: Budget) -> float:
    """The slots of all rows and their attention, times the share of the emptier side that is padding."""
    source, target = budget
    attention = (source**2 + target**2 + source * target) / ATTENTION_TOKENS
    emptiest = 1 - min(total / (rows * room) for total, room in zip(totals, budget, strict=True))
    return rows * (source + target + attention) * (1 + EMPTY_SIDE * emptiest)


def _sample(source_lengths: np.ndarray, target_lengths: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The numbers of examples, of whole groups: every n-th of all groups when these are sorted by their lengths."""
    target_totals = np.bincount(groups, weights=target_lengths)
    size = min(len(target_totals), max(1, SAMPLE_FOR_BUDGET * len(target_totals) // len(groups)))
    places = (np.arange(size) + 0.5) * len(target_totals) / size
    return np.flatnonzero(np.isin(groups, np.lexsort((source_lengths, target_totals))[places.astype(int)]))
