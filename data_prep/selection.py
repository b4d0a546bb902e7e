"""Which examples stay, and in which split: what can only be known of all of them at once. Integers in, integers out.

    exact duplicates ─ near duplicates ─▶ conflicts ─▶ train, validation, test; then the mixture of train

Works on columns of keys, (rows,) each; a text is looked at only to show it. Removed rows are given to `rejects`, with
the row that says the same.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import pyarrow.compute

from diptych.data_prep.deduplicate import Shingles, compared_text, conflicts, exact_duplicates, near_duplicates
from diptych.data_prep.encode import from_marked
from diptych.data_prep.gather import Gathered
from diptych.data_prep.mixture import Mixture, mix
from diptych.data_prep.records import Record, Reject, Rejects
from diptych.data_prep.settings import PrepareSettings
from diptych.data_prep.splits import SPLITS, Split, split_rows
from diptych.data_prep.stages import origin_of

EXAMPLES_SHOWN = 5
SHOWN_CHARACTERS = 1_000
REMOVED = -1


@dataclass(frozen=True)
class Selection:
    """What was decided of each row."""

    split_of_row: numpy.ndarray
    """(rows,) int8: the place in SPLITS, or REMOVED."""
    groups: int
    """Of rows that share a text."""
    duplicates: dict[str, Any]
    """What the report says of them."""
    conflicting: list[list[int]]
    """Groups of rows with one source and different targets."""
    warnings: list[str]

    @property
    def kept(self) -> int:
        return int((self.split_of_row != REMOVED).sum())

    def places(self) -> dict[str, numpy.ndarray]:
        """Of the rows of each split that has any, in order."""
        places = {name: numpy.flatnonzero(self.split_of_row == place) for place, name in enumerate(SPLITS)}
        return {name: rows for name, rows in places.items() if len(rows)}


def select(gathered: Gathered, settings: PrepareSettings, rejects: Rejects) -> Selection:
    keys = numpy.stack([gathered.column("source_key"), gathered.column("target_key")], axis=1)
    stays = numpy.ones(len(keys), dtype=bool)
    facts: dict[str, Any] = {"exact": 0, "near": 0, "threshold": settings.near_duplicates, "examples": []}
    if settings.deduplicate:
        _remove(gathered, stays, exact_duplicates(keys), "exact", "the same source and target as", facts, rejects)
    if settings.near_duplicates is not None:
        considered = stays & _has_text(gathered)
        compared = functools.partial(_compared, gathered)
        alike = near_duplicates(
            gathered.signatures, settings.near_duplicates, considered, compared, shingles_of(settings)
        )
        why = f"at least {settings.near_duplicates:.0%} like".replace("%", " %")
        _remove(gathered, stays, alike, "near", why, facts, rejects)
    rows = numpy.flatnonzero(stays)
    conflicting = [rows[group].tolist() for group in conflicts(*keys[rows].T)]
    split = _split(gathered, rows, settings)
    split_of_row = numpy.full(len(keys), REMOVED, dtype=numpy.int8)
    split_of_row[rows] = split.of_row
    return Selection(split_of_row, split.groups, facts, conflicting, split.warnings)


def shingles_of(settings: PrepareSettings) -> Shingles:
    return Shingles(settings.shingle, settings.shingle_size)


def mixed_train(
    gathered: Gathered, train: numpy.ndarray, source_names: Sequence[str], mixture: Mixture, seed: int
) -> numpy.ndarray:
    """The places of train as the mixture has them, in order, repeated ones side by side. `source_names` are, for each
    source number, the name that the mixture knows it by: several files of a folder are one source."""
    number_of = {name: number for number, name in enumerate(dict.fromkeys(source_names))}
    source = numpy.array([number_of[name] for name in source_names])[gathered.column("source_number")[train]]
    return mix(mixture, {name: train[source == number] for name, number in number_of.items()}, seed)


def conflict_rows(gathered: Gathered, group: Sequence[int]) -> dict[str, Any]:
    """One source with its different targets, and where they stand."""
    origins = gathered.examples["origin"]
    rows = [{"origin": origins[row].as_py(), "target": _side(gathered, "target", row)} for row in group]
    return {"source": _side(gathered, "source", group[0]), "rows": rows}


def _remove(
    gathered: Gathered,
    stays: numpy.ndarray,
    repeats: numpy.ndarray,
    what: str,
    why: str,
    facts: dict[str, Any],
    rejects: Rejects,
) -> None:
    """`repeats[row]` is the row that says the same, or -1."""
    table = gathered.examples
    for row in numpy.flatnonzero(repeats >= 0).tolist():
        kept = table["origin"][int(repeats[row])].as_py()
        reject = Reject(
            origin_of(table, row), None, f"{what} duplicate", f"{why} {kept}, which stays.", table["raw"][row].as_py()
        )
        rejects.add(reject)
        if facts[what] < EXAMPLES_SHOWN:
            texts = {"kept_text": _text(gathered, int(repeats[row])), "removed_text": _text(gathered, row)}
            facts["examples"].append({"kept": kept, "removed": str(reject.origin), **texts})
        facts[what] += 1
        stays[row] = False


def _text(gathered: Gathered, row: int) -> str:
    return f"{_side(gathered, 'source', row)} → {_side(gathered, 'target', row)}"[:SHOWN_CHARACTERS]


def _side(gathered: Gathered, side: str, row: int) -> str:
    """As a person reads it: what is not encoded yet still has the template's marks."""
    return str(from_marked(gathered.examples[side][row].as_py()))


def _has_text(gathered: Gathered) -> numpy.ndarray:
    """Rows that came as token ids have none, by which all would be alike."""
    return pyarrow.compute.not_equal(gathered.examples["instruction"], "").to_numpy()


def _compared(gathered: Gathered, row: int) -> str:
    example = gathered.examples.slice(row, 1)
    instruction, text = (example[name][0].as_py() for name in ("instruction", "input"))
    target = _side(gathered, "target", row)
    return compared_text(
        Record(instruction=instruction, input=text, output=target, origin=origin_of(gathered.examples, row))
    )


def _split(gathered: Gathered, rows: numpy.ndarray, settings: PrepareSettings) -> Split:
    def shown(row: int, side: str) -> str:
        example = gathered.examples.slice(int(rows[row]), 1)
        if side == "output":
            return _side(gathered, side="target", row=int(rows[row]))
        return example["input"][0].as_py() or example["instruction"][0].as_py()

    keys = (gathered.column("input_key")[rows], gathered.column("output_key")[rows])
    fractions = (settings.validation_fraction, settings.test_fraction)
    return split_rows(*keys, *fractions, settings.seed, settings.split_by, shown)
