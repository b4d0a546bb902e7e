"""How much of each source the train split gets, and which rows these are.

    a.jsonl has 9,000 rows, b.jsonl 1,000        rows taken of each
    temperature 1, no cap (proportional)         9,000 + 1,000      every row once
    temperature 2                                3,000 + 1,000      rates as the square roots, 3 : 1
    cap 2,000                                    2,000 + 1,000
    weights {b.jsonl: 3}                         3,000 + 1,000
    temperature 2, rows 8,000                    6,000 + 2,000      b.jsonl twice

A source's rate is its weight × min(rows, cap) ** (1 / temperature), as in T5 (Raffel et al. 2020, §3.5.2). Without
`rows` the mixture is as large as it can be without repeating a row. Which rows are left out is drawn from the seed; a
source that is taken more than once is taken whole as often as it goes, and the rest is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import xxhash

from diptych.data_prep.command_line.arguments import check_numbers
from diptych.data_prep.command_line.errors import UserError, nearest

if TYPE_CHECKING:
    import numpy


@dataclass(frozen=True)
class Mixture:
    """How several sources are mixed in the train split. Validation and test are never mixed."""

    temperature: float = 1.0
    """1: shares in proportion to the rows of each source. A higher value gives small sources a larger share."""
    cap: int | None = None
    """Maximum number of rows of a source when the shares are computed: with 1000, sources of 9,000 and 1,000 rows have
    equal shares. It does not limit how many rows are taken."""

    weights: dict[str, float] = field(default_factory=dict)
    """Source, with its name in data → factor of its share; 1 if it is not given, 0 leaves the source out."""

    rows: int | None = None
    """Rows of the mixed train split; rows of small sources may be repeated. Default: as many as possible without."""

    def __post_init__(self) -> None:
        ranges = {
            "above 0": (lambda value: value > 0, "temperature"),
            "1 or more": (lambda value: value >= 1, "cap rows"),
        }
        check_numbers(self, ranges, "mixture.")


def check_mixture(mixture: Mixture, sources: Sequence[str]) -> None:
    """`sources` are the names that weights may use."""
    for name, weight in mixture.weights.items():
        if name not in sources:
            near = nearest(name, sources)
            hint = f"Did you mean '{near}'?" if near else f"The sources are {', '.join(sources)}."
            raise UserError(f"mixture.weights names '{name}', which is no source. {hint}")
        if weight < 0:
            raise UserError(f"mixture.weights gives '{name}' {weight}; a weight is 0 or more.")
    if not any(mixture.weights.get(name, 1.0) for name in sources):
        raise UserError("mixture.weights are all 0, which leaves no row. Give one source more.")


def mixed_counts(mixture: Mixture, rows_of: Mapping[str, int]) -> dict[str, int]:
    """How many rows of each source are taken, given how many there are."""
    import numpy  # here, because `prepare --help` imports this file

    names = [name for name, rows in rows_of.items() if rows and mixture.weights.get(name, 1.0)]
    sizes = numpy.array([rows_of[name] for name in names], dtype=float)
    weights = numpy.array([mixture.weights.get(name, 1.0) for name in names])
    rates = weights * numpy.minimum(sizes, mixture.cap or numpy.inf) ** (1 / mixture.temperature)
    rates /= rates.sum()
    total = mixture.rows if mixture.rows is not None else int((sizes / rates).min() + 1e-6)
    wanted = rates * total
    counts = numpy.floor(wanted + 1e-6).astype(int)
    left_over = numpy.argsort(counts - wanted, kind="stable")[: total - counts.sum()]  # the largest remainders
    counts[left_over] += 1
    return dict.fromkeys(rows_of, 0) | dict(zip(names, counts.tolist(), strict=True))


def mix(mixture: Mixture, places: Mapping[str, numpy.ndarray], seed: int) -> numpy.ndarray:
    """The chosen ones of `places` (source name → (rows,) places in a table), in order; repeated ones side by side.
    What is chosen of a source depends on the seed, its name and its number of rows alone."""
    import numpy

    counts = mixed_counts(mixture, {name: len(there) for name, there in places.items()})
    chosen = []
    for name, there in places.items():
        if counts[name] == 0:
            continue
        whole, rest = divmod(counts[name], len(there))
        draw = numpy.random.default_rng([seed, xxhash.xxh3_64_intdigest(name.encode())])
        chosen += [there] * whole + [there[draw.permutation(len(there))[:rest]]]
    return numpy.sort(numpy.concatenate(chosen)) if chosen else numpy.zeros(0, dtype=numpy.int64)
