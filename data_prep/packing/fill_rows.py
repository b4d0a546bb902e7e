"""Several examples to a row: which examples stand together, and the row as arrays of one shape. Plain integers.

    input_ids             12  7  9  1 |  5  8  1 |  0      labels               31 40  1 | 22  1 | -100
    segment_ids            1  1  1  1 |  2  2  2 |  0      decoder_input_ids     0 31 40 |  0 22 |    0
    position_ids           0  1  2  3 |  0  1  2 |  0      decoder_segment_ids   1  1  1 |  2  2 |    0
                                                           decoder_position_ids  0  1  2 |  0  1 |    0

Segment 0 is padding, and padding is a tail. Decoder segment k reads encoder segment k. `decoder_input_ids` begin anew
in every segment: a plain shift to the right would put the last label of one example before the first of the next.
Where sources are shared, equal `input_ids` stand once, and `cross_segment_ids` say which of them a target reads:

    input_ids             12  7  9  1 |  0  0  0  0      labels               31 40  1 | 22  1 | -100
    segment_ids            1  1  1  1 |  0  0  0  0      decoder_segment_ids   1  1  1 |  2  2 |    0
                                                         cross_segment_ids     1  1  1 |  1  1 |    0

Rows have two budgets, for source and for target tokens. `choose_budget` finds both and their ratio in the lengths,
`pack` fills rows by best fit, the largest example first: 1,813 CodeAlpaca examples fill 99 % of either side, a million
pairs like them take 4 s on one core. Names as in seqio; masks from them are the business of whoever runs a model.

S source tokens, T target tokens of a row.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.records import IGNORE_INDEX

PACKED_COLUMNS = (
    "input_ids",
    "segment_ids",
    "position_ids",
    "labels",
    "decoder_input_ids",
    "decoder_segment_ids",
    "decoder_position_ids",
)
"""The first three are (S,), the others (T,)."""

SHARED_COLUMN = "cross_segment_ids"
"""(T,), one column more where sources are shared."""

UNITS_AT_MOST = 2048
"""Longer rows are measured in units of 2, 3 … tokens, an example's length rounded up, so that tables stay small."""

CLOSING_EXAMPLES = 3
"""Where no more space is left than this many average examples take, the row is closed by looking one further ahead."""

CLOSING_CELLS = 40_000
"""The most (source, target) lengths among which that search goes on: 50 µs."""

SAMPLE_FOR_BUDGET = 2_000
"""Examples that are really packed to see what a budget is worth."""

BUDGETS_TRIED_IN_VAIN = 12
"""After so many that were no better, the best so far is taken; those that promise most are tried first."""

ATTENTION_TOKENS = 16_384
"""How long a row is whose attention costs as much as all else, if a mask skips most of what it may not read. It is the
price of long rows: from 512 + 512 tokens on, rows of twice that length have to save 4 % of all slots."""

EMPTY_SIDE = 0.1
"""What a row costs more whose one side is all empty."""


class Budget(NamedTuple):
    """What one row has room for."""

    source_tokens: int
    target_tokens: int


# Which examples stand together


def pack(
    source_lengths: Sequence[int],
    target_lengths: Sequence[int],
    budget: Budget,
    seed: int = 0,
    groups: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> list[np.ndarray]:
    """Rows as arrays of example numbers; every example stands in one row, whole. The k-th will be decoder segment k.

    Examples of the same two lengths are interchangeable: `seed` decides which of them goes where, and the order of the
    rows. `groups` (examples,) has equal numbers for examples with the same source, to be encoded once: it counts once,
    and a group whose targets are too many is divided. `names` are for the message that refuses what is too long.
    """
    source_lengths, target_lengths = np.asarray(source_lengths, dtype=int), np.asarray(target_lengths, dtype=int)
    _refuse_longer(source_lengths, target_lengths, budget, names)
    members = None if groups is None else _with_one_source(np.asarray(groups), target_lengths, budget.target_tokens)
    if members is not None:
        source_lengths = source_lengths[[together[0] for together in members]]
        target_lengths = np.array([target_lengths[together].sum() for together in members], dtype=np.int64)
    draw = np.random.default_rng(seed)
    rows = _pack_units(source_lengths, target_lengths, budget, draw)
    rows = [rows[place] for place in draw.permutation(len(rows))]
    return rows if members is None else [_next_to_each_other(row, members, groups) for row in rows]


def choose_budget(
    source_lengths: Sequence[int],
    target_lengths: Sequence[int],
    source_tokens: int | None = None,
    target_tokens: int | None = None,
    groups: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> Budget:
    """The budgets with which these examples cost least: slots of all rows, a long row's dearer than a short one's.

    Never smaller than the longest example, and round. A budget that is given stays, and the other is chosen to suit.
    """
    source_lengths, target_lengths = np.asarray(source_lengths, dtype=int), np.asarray(target_lengths, dtype=int)
    longest = Budget(int(source_lengths.max()), int(target_lengths.max()))
    _refuse_longer(
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
    at_best = {budget: _cost(budget, _fewest_rows(totals, budget), totals) for budget in candidates}
    for budget in sorted(candidates, key=lambda budget: (at_best[budget], budget)):
        if at_best[budget] >= least or tried_in_vain == BUDGETS_TRIED_IN_VAIN:
            break  # nor can any that follows be better, or is likely to be
        rows = pack(sources, targets, budget, groups=None if groups is None else numbers)
        cost = _cost(budget, len(rows), totals)
        tried_in_vain += 1
        if cost < least:
            best, least, tried_in_vain = budget, cost, 0
    return best


def repeated_start(
    first_labels: np.ndarray, decoder_start_token_id: int, language_starts: Collection[int] = ()
) -> np.ndarray:
    """Whose first label is the token that the decoder starts with anyway, and is to be left out: (examples,) of bool.

    Gemma's tokenizers put bos before every text, and T5Gemma's decoder starts with bos: trained on both, the model
    would learn to write it once more. As the tokenizer does it always or never, the first example decides. A row that
    begins with one of `language_starts` starts with that one, whatever the others start with (mBART-cc25).
    """
    first_labels = np.asarray(first_labels)
    repeats = first_labels == decoder_start_token_id
    return (repeats & repeats[:1]) | np.isin(first_labels, list(language_starts))


def _refuse_longer(
    source_lengths: np.ndarray, target_lengths: np.ndarray, budget: Budget, names: Sequence[str] | None
) -> None:
    for side, lengths, room in zip(("source", "target"), (source_lengths, target_lengths), budget, strict=True):
        too_long = np.flatnonzero(lengths > room)
        if not len(too_long):
            continue
        longest = int(lengths.argmax())
        name = f"example {longest}" if names is None else names[longest]
        others = (
            f" {len(too_long):,} of {len(lengths):,} examples have a longer {side} than that, this one the longest."
        )
        raise UserError(
            f"{name}: its {side} has {lengths[longest]:,} tokens, and a packed row has room for {room:,}."
            f"{others if len(too_long) > 1 else ''} Give packed_{side}_tokens >= {lengths[longest]}, or"
            f" max_{side}_tokens <= {room} to leave out what is longer."
        )


def _with_one_source(groups: np.ndarray, target_lengths: np.ndarray, room: int) -> list[np.ndarray]:
    """Examples of the same group, as many together as have room for their targets, in the order in which they came."""
    together: list[list[int]] = []
    last: dict[int, int] = {}
    filled: dict[int, int] = {}
    for example, (group, tokens) in enumerate(zip(groups.tolist(), target_lengths.tolist(), strict=True)):
        if group not in last or filled[group] + tokens > room:
            last[group], filled[group] = len(together), 0
            together.append([])
        together[last[group]].append(example)
        filled[group] += tokens
    return [np.array(examples) for examples in together]


def _next_to_each_other(row: np.ndarray, members: list[np.ndarray], groups: Sequence[int]) -> np.ndarray:
    """A row's examples; parts of a divided group that meet again stand together."""
    together: defaultdict[int, list[int]] = defaultdict(list)
    for unit in row:
        together[groups[members[unit][0]]].extend(members[unit])
    return np.array([example for examples in together.values() for example in examples])


# Best fit


def _units(budget: Budget) -> tuple[int, int]:
    source, target = (tokens // -(-tokens // UNITS_AT_MOST) for tokens in budget)
    return source, target


def _in_units(tokens: int, room: int, units: int) -> int:
    """No example takes less than one unit, and none more than a row has: one that needs it all stands alone there."""
    return min(max(-(-tokens // -(-room // UNITS_AT_MOST)), 1), units)


def _pack_units(
    source_lengths: np.ndarray, target_lengths: np.ndarray, budget: Budget, draw: np.random.Generator
) -> list[np.ndarray]:
    """The kinds of a row are sought once, and then taken again as often as the stock has them all."""
    room = _units(budget)
    kinds = np.empty((len(source_lengths), 2), dtype=np.int64)
    for side, (lengths, tokens) in enumerate(zip((source_lengths, target_lengths), budget, strict=True)):
        size_of = [_in_units(length, tokens, room[side]) for length in range(tokens + 1)]
        kinds[:, side] = np.array(size_of)[lengths]
    order = draw.permutation(len(kinds))
    order = order[np.lexsort((kinds[order, 1], kinds[order, 0]))]
    kinds, starts, counts = np.unique(kinds[order], axis=0, return_index=True, return_counts=True)
    keys = [tuple(kind) for kind in kinds.tolist()]
    stock = _Stock(room)
    for kind, count in zip(keys, counts.tolist(), strict=True):
        stock.add(*kind, count)
    unused = dict(zip(keys, starts.tolist(), strict=True))
    rows: list[np.ndarray] = []
    while stock.examples:
        row = stock.fill_row()
        times = 1 + stock.take_again(row)
        columns = []
        for kind, number in row.items():
            start = unused[kind]
            unused[kind] = start + number * times
            columns.append(order[start : start + number * times].reshape(times, number))
        rows.extend(np.concatenate(columns, axis=1))
    return rows


class _Stock:
    """How many examples of each (source, target) length are still to be placed, and the search for those that fit."""

    def __init__(self, room: tuple[int, int]) -> None:
        self.room = room
        self.counts = np.zeros((room[0] + 1, room[1] + 1), dtype=np.int32)
        self.longest_up_to = np.zeros((room[0] + 1, room[1] + 1), dtype=np.int16)
        """[s, t]: the longest target up to t that stands in stock with a source of s; 0 is none."""
        self.largest_first: list[tuple[float, float, int, int]] = []
        """A heap of all kinds in stock, and of some that were."""
        self.examples = self.source_total = self.target_total = 0
        self.changes_since_look = 0
        self.closing_room = (0, 0)
        self.waste = self.sizes = np.zeros((1, 1))

    def add(self, source: int, target: int, count: int) -> None:
        """All examples of a kind, once."""
        parts = (source / self.room[0], target / self.room[1])
        heapq.heappush(self.largest_first, (-max(parts), -sum(parts), source, target))
        longer = self.longest_up_to[source, target:]
        np.maximum(longer, target, out=longer)
        self._change(source, target, count)

    def fill_row(self) -> Counter[tuple[int, int]]:
        """One row's kinds, taken out of stock: the largest that there is, then what fits best while anything fits."""
        self._look_ahead()
        while not self.counts[self.largest_first[0][2:]]:
            heapq.heappop(self.largest_first)
        row: Counter[tuple[int, int]] = Counter()
        source_left, target_left = self.room
        kind: tuple[int, int] | None = self.largest_first[0][2:]
        while kind is not None:
            row[kind] += 1
            self.remove(*kind, 1)
            source_left, target_left = source_left - kind[0], target_left - kind[1]
            is_closing = source_left <= self.closing_room[0] and target_left <= self.closing_room[1]
            kind = (self._closing if is_closing else self._along)(source_left, target_left)
        return row

    def take_again(self, row: Counter[tuple[int, int]]) -> int:
        """The same row as often as there is everything for it; how often that was."""
        times = min(int(self.counts[kind]) // number for kind, number in row.items())
        if times:
            for kind, number in row.items():
                self.remove(*kind, number * times)
        return times

    def remove(self, source: int, target: int, count: int) -> None:
        self._change(source, target, -count)
        if not self.counts[source, target]:
            longer = self.longest_up_to[source, target:]
            longer[longer == target] = self.longest_up_to[source, target - 1]

    def _change(self, source: int, target: int, count: int) -> None:
        self.counts[source, target] += count
        self.examples += count
        self.source_total += source * count
        self.target_total += target * count
        self.changes_since_look += abs(count)

    def _along(self, source_left: int, target_left: int) -> tuple[int, int] | None:
        """What keeps the ratio of the space that is left, and of that the largest. To be ahead with one side is to end
        with nothing that fits the other: with the ratio kept, 2 to 3 % more of 100,000 rows is filled."""
        if not source_left or not target_left:
            return None
        sources = np.arange(1, source_left + 1)
        wanted = np.maximum((sources * (target_left / source_left)).astype(np.int64), 1)
        targets = self.longest_up_to[sources, wanted]
        if not targets.any():  # all that fit have longer targets
            targets = self.longest_up_to[1 : source_left + 1, target_left]
        unevenness = np.abs(sources / source_left - targets / target_left) - sources / self.room[0]
        best = int(np.where(targets > 0, unevenness, np.inf).argmin())
        return (best + 1, int(targets[best])) if targets[best] else None

    def _closing(self, source_left: int, target_left: int) -> tuple[int, int] | None:
        """What leaves a space that one more example fills, or none; among equals the largest."""
        if not source_left or not target_left:
            return None
        fitting = (slice(1, source_left + 1), slice(1, target_left + 1))
        there = self.counts[fitting] > 0
        wasted = self.waste[:source_left, :target_left][::-1, ::-1] - self.sizes[fitting]
        best = int(np.where(there, wasted, np.inf).argmin())
        source, target = divmod(best, target_left)
        return (source + 1, target + 1) if there[source, target] else None

    def _look_ahead(self) -> None:
        """waste[s, t]: what stays empty of a space (s, t) when the best single example is put there, as part of a row.

        It is renewed when a part of the stock has changed; that it is not quite up to date costs nothing but fill.
        """
        if self.changes_since_look <= max(self.examples / 256, min(32, self.examples / 32)):
            return
        self.changes_since_look = 0
        self.closing_room = self._closing_room()
        source, target = (room + 1 for room in self.closing_room)
        sizes = (np.arange(source)[:, None] / self.room[0] + np.arange(target) / self.room[1]).astype(np.float32)
        fits = np.where(self.counts[:source, :target] > 0, sizes, 0)
        np.maximum.accumulate(fits, axis=0, out=fits)
        np.maximum.accumulate(fits, axis=1, out=fits)
        self.waste, self.sizes = sizes - fits, sizes * 0.01  # so little that it decides among equals only

    def _closing_room(self) -> tuple[int, int]:
        parts = (self.source_total / self.room[0], self.target_total / self.room[1])
        part = min(1.0, CLOSING_EXAMPLES * max(parts) / self.examples)
        cells = (self.room[0] * part) * (self.room[1] * part)
        part *= min(1.0, (CLOSING_CELLS / cells) ** 0.5)
        return int(self.room[0] * part), int(self.room[1] * part)


# Which budget


def _candidates(longest: Budget, ratio: float, source_tokens: int | None, target_tokens: int | None) -> set[Budget]:
    """From the shortest rows to four times as long ones; with `ratio` target tokens to a source token, and without."""
    stretches = (1, 1.125, 1.25, 1.5, 1.75, 2, 2.5, 3, 4)
    sources = [longest.source_tokens * stretch for stretch in stretches]
    targets = [longest.target_tokens * stretch for stretch in stretches]
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


def _fewest_rows(totals: Budget, budget: Budget) -> int:
    return max(-(-total // room) for total, room in zip(totals, budget, strict=True))


def _cost(budget: Budget, rows: int, totals: Budget) -> float:
    """Slots with their attention; and a side that stays empty is worth something, also where it is the short one."""
    source, target = budget
    attention = (source**2 + target**2 + source * target) / ATTENTION_TOKENS
    emptiest = 1 - min(total / (rows * room) for total, room in zip(totals, budget, strict=True))
    return rows * (source + target + attention) * (1 + EMPTY_SIDE * emptiest)


def _sample(source_lengths: np.ndarray, target_lengths: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Example numbers, of whole groups: evenly from all that there are when sorted by their lengths."""
    target_totals = np.bincount(groups, weights=target_lengths)
    size = min(len(target_totals), max(1, SAMPLE_FOR_BUDGET * len(target_totals) // len(groups)))
    places = (np.arange(size) + 0.5) * len(target_totals) / size
    return np.flatnonzero(np.isin(groups, np.lexsort((source_lengths, target_totals))[places.astype(int)]))


# From examples to arrays


def assemble_row(
    examples: Sequence[Mapping[str, Any]],
    budget: Budget,
    pad_token_id: int,
    decoder_start_token_id: int,
    share_sources: bool = False,
) -> dict[str, np.ndarray]:
    """The examples of one row, each with `input_ids` and `labels`, as the int32 arrays shown above, (S,) and (T,). An
    example with a `decoder_start` of its own starts with that."""
    sources = [np.asarray(example["input_ids"], dtype=np.int32) for example in examples]
    targets = [np.asarray(example["labels"], dtype=np.int32) for example in examples]
    starts = np.array([example.get("decoder_start", decoder_start_token_id) for example in examples])
    reads = np.arange(1, len(sources) + 1)
    if share_sources:
        segment_of: dict[bytes, int] = {}
        reads = np.array([segment_of.setdefault(source.tobytes(), len(segment_of) + 1) for source in sources])
        sources = [np.frombuffer(source, dtype=np.int32) for source in segment_of]
        order = np.argsort(reads, kind="stable")  # targets of the same source stand next to each other
        targets, reads, starts = [targets[place] for place in order], reads[order], starts[order]
    source_lengths, target_lengths = [len(source) for source in sources], [len(target) for target in targets]
    assert sum(source_lengths) <= budget.source_tokens and sum(target_lengths) <= budget.target_tokens, budget

    labels = np.concatenate(targets)
    decoder_input_ids = np.concatenate([starts[:1], labels[:-1]])
    decoder_position_ids = _positions(target_lengths)
    decoder_input_ids[decoder_position_ids == 0] = starts
    columns = (
        _padded(np.concatenate(sources), budget.source_tokens, pad_token_id),
        _padded(np.repeat(np.arange(1, len(sources) + 1), source_lengths), budget.source_tokens, 0),
        _padded(_positions(source_lengths), budget.source_tokens, 0),
        _padded(labels, budget.target_tokens, IGNORE_INDEX),
        _padded(decoder_input_ids, budget.target_tokens, pad_token_id),
        _padded(np.repeat(np.arange(1, len(targets) + 1), target_lengths), budget.target_tokens, 0),
        _padded(decoder_position_ids, budget.target_tokens, 0),
    )
    row = dict(zip(PACKED_COLUMNS, columns, strict=True))
    if share_sources:
        row[SHARED_COLUMN] = _padded(np.repeat(reads, target_lengths), budget.target_tokens, 0)
    return row


def _positions(lengths: Sequence[int]) -> np.ndarray:
    """[4, 3] → 0 1 2 3 0 1 2"""
    starts = np.cumsum(lengths) - lengths
    return np.arange(sum(lengths)) - np.repeat(starts, lengths)


def _padded(values: np.ndarray, tokens: int, padding: int) -> np.ndarray:
    column = np.full(tokens, padding, dtype=np.int32)
    column[: len(values)] = values
    return column
