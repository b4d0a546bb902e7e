"""Which examples stay, and in which split: what can only be known of all of them at once. Integers in, integers out.

    also held out ─ exact duplicates ─ near duplicates ─▶ conflicts ─▶ train, validation, test ─▶ mixture of train

Only train rows go. A validation or test set of the user's own keeps all its rows, in their order, repeated ones too.
Works on columns of keys, (rows,) each; a text is looked at only to show it. Removed rows are given to `rejects`, with
the row that says the same.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import pyarrow.compute

from diptych.data_prep.cleaning.duplicates import Shingles, compared_text, conflicts, exact_duplicates, near_duplicates
from diptych.data_prep.cleaning.mixture import Mixture, mix
from diptych.data_prep.cleaning.splits import Split, found_in, row_keys, split_rows
from diptych.data_prep.command_line.errors import UserError, counted
from diptych.data_prep.pipeline.gather import Gathered
from diptych.data_prep.pipeline.prepare_settings import PrepareSettings, fraction_of
from diptych.data_prep.pipeline.row_stages import origin_of
from diptych.data_prep.rows.named_splits import HELD_OUT, KINDS, kind_of, splits_of
from diptych.data_prep.rows.records import Record, Reject, Rejects
from diptych.data_prep.text_to_ids.rendered_text import from_marked

ALSO_HELD_OUT = "also held out"
EXAMPLES_SHOWN = 5
SHOWN_CHARACTERS = 1_000
REMOVED = -1


@dataclass(frozen=True)
class Selection:
    """What was decided of each row."""

    split_of_row: numpy.ndarray
    """(rows,) int16: the place in `names`, or REMOVED."""
    names: list[str]
    """Of the splits that there may be, train first."""
    groups: int | None
    """Of rows that share a text, which are never divided; None where nothing was held out by fractions."""
    duplicates: dict[str, Any]
    """What the report says of them."""
    conflicting: list[list[int]]
    """Groups of rows with one source and different targets."""
    warnings: list[str]
    own_sets: dict[str, Any] | None
    """What the report says of the user's own validation and test sets; None where there are none."""

    @property
    def kept(self) -> int:
        return int((self.split_of_row != REMOVED).sum())

    def of_rows(self, gathered: Gathered) -> Selection:
        """The same for rows of which some were left out since; their column `place` says where they stood before."""
        return replace(self, split_of_row=self.split_of_row[gathered.column("place")])

    def places(self) -> dict[str, numpy.ndarray]:
        """Of the rows of each split that has any, in order."""
        places = {name: numpy.flatnonzero(self.split_of_row == place) for place, name in enumerate(self.names)}
        return {name: rows for name, rows in places.items() if len(rows)}


def select(gathered: Gathered, splits: Sequence[str], settings: PrepareSettings, rejects: Rejects) -> Selection:
    """`splits` are those of the sources. UserError where train rows are held out too, and that is to be an error."""
    keys = numpy.stack([gathered.column("source_key"), gathered.column("target_key")], axis=1)
    own = list(dict.fromkeys(split for split in splits if kind_of(split) in HELD_OUT))
    names = [KINDS[0], *(split for kind in HELD_OUT for split in splits_of(kind, own) or [kind])]
    split_of_row = numpy.array([names.index(split) for split in splits], numpy.int16)[gathered.column("source_number")]
    is_train = split_of_row == 0
    stays = is_train.copy()
    own_sets = None
    if own:
        also, own_sets = _own_sets(gathered, names, split_of_row, settings)
        if settings.on_both_sides == "drop":
            split_of = {row: names[split_of_row[other]] for row, other in enumerate(also.tolist()) if other >= 0}
            _remove_also_held_out(gathered, stays, also, split_of, settings, rejects)
    facts: dict[str, Any] = {"exact": 0, "near": 0, "threshold": settings.near_duplicates, "examples": []}
    if settings.deduplicate:
        rows = numpy.flatnonzero(stays)
        repeats = numpy.full(len(keys), -1, dtype=numpy.int64)
        found = exact_duplicates(keys[rows])
        repeats[rows[found >= 0]] = rows[found[found >= 0]]
        _remove(gathered, stays, repeats, "exact", "the same source and target as", facts, rejects)
    if settings.near_duplicates is not None:
        held_out = ~is_train if own and settings.on_both_sides == "drop" else numpy.zeros(len(keys), dtype=bool)
        considered = (stays | held_out) & _has_text(gathered)
        compared = functools.partial(_compared, gathered)
        alike = near_duplicates(
            gathered.signatures, settings.near_duplicates, considered, compared, shingles_of(settings), held_out
        )
        why = f"at least {settings.near_duplicates:.0%} like".replace("%", " %")
        _remove(gathered, stays, alike, "near", why, facts, rejects)
    rows = numpy.flatnonzero(stays)
    conflicting = [rows[group].tolist() for group in conflicts(*keys[rows].T)]
    fractions = [fraction_of(settings, kind, has_own_sets=bool(own)) for kind in HELD_OUT]
    split_of_row[is_train & ~stays] = REMOVED
    groups, warnings = None, []
    if len(rows) and (any(fractions) or not own):
        split = _split(gathered, rows, fractions, settings)
        groups, warnings = split.groups, split.warnings
        place_of_kind = numpy.array([names.index(kind) if kind in names else 0 for kind in KINDS])
        split_of_row[rows] = place_of_kind[split.of_row]
    return Selection(split_of_row, names, groups, facts, conflicting, warnings, own_sets)


def _own_sets(
    gathered: Gathered, names: Sequence[str], split_of_row: numpy.ndarray, settings: PrepareSettings
) -> tuple[numpy.ndarray, dict[str, Any]]:
    """(rows,) for each train row a held-out row that is the same, or -1; and what is said of it, set by set."""
    columns = (gathered.column(f"{name}_key") for name in ("row", "input", "output"))
    keys = row_keys(*columns, settings.split_by)
    rows_of = [numpy.flatnonzero(split_of_row == place) for place in range(len(names))]

    def of(rows: numpy.ndarray) -> list[numpy.ndarray]:
        return [column[rows] for column in keys]

    also, sets = numpy.full(len(split_of_row), -1, dtype=numpy.int64), {}
    train = rows_of[0]
    origins = gathered.examples["origin"]
    exact = numpy.stack([gathered.column("source_key"), gathered.column("target_key")], axis=1)
    for name, rows in zip(names[1:], rows_of[1:], strict=True):
        if not len(rows):
            continue
        found = found_in(of(train), of(rows))
        is_found = found >= 0
        is_new = is_found & (also[train] < 0)
        also[train[is_new]] = rows[found[is_new]]
        pairs = [[origins[int(row)].as_py() for row in pair] for pair in _pairs(train, rows, found)]
        sets[name] = {
            "rows": len(rows),
            "in_train": int((found_in(of(rows), of(train)) >= 0).sum()) if len(train) else 0,
            "train_rows": int(is_found.sum()),
            "examples": pairs,
            "repeated": int((exact_duplicates(exact[rows]) >= 0).sum()),
        }
    validation, test = (
        numpy.concatenate([rows for name, rows in zip(names, rows_of, strict=True) if kind_of(name) == kind])
        for kind in HELD_OUT
    )
    shared = int((found_in(of(validation), of(test)) >= 0).sum()) if len(validation) and len(test) else 0
    if (also >= 0).any() and settings.on_both_sides == "error":
        row = int(numpy.flatnonzero(also >= 0)[0])
        raise UserError(
            f"{counted(int((also >= 0).sum()), 'train row')} also held out, the first {origins[row].as_py()}, which is"
            f" {origins[int(also[row])].as_py()} ({names[split_of_row[also[row]]]}). Take them out of one side, or"
            " let --on_both_sides drop take them out of train."
        )
    return also, {
        "on_both_sides": settings.on_both_sides,
        "compared": settings.split_by or "rows",
        "sets": sets,
        "validation_in_test": shared,
    }


def _pairs(train: numpy.ndarray, rows: numpy.ndarray, found: numpy.ndarray) -> Iterator[tuple[int, int]]:
    """Some train rows, each with the held-out row that it is."""
    for place in numpy.flatnonzero(found >= 0)[:EXAMPLES_SHOWN].tolist():
        yield train[place], rows[found[place]]


def _remove_also_held_out(
    gathered: Gathered,
    stays: numpy.ndarray,
    also: numpy.ndarray,
    split_of: Mapping[int, str],
    settings: PrepareSettings,
    rejects: Rejects,
) -> None:
    table, what = gathered.examples, {None: "it is", "source": "its input is that of", "both": "it shares a text with"}
    for row, split in split_of.items():
        reason = f"{what[settings.split_by]} {table['origin'][int(also[row])].as_py()}, which is held out ({split})."
        rejects.add(Reject(origin_of(table, row), None, ALSO_HELD_OUT, reason, table["raw"][row].as_py()))
        stays[row] = False


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


def write_conflicts(path: Path, gathered: Gathered, selection: Selection) -> None:
    """A line for each source that has several targets; no file where there is none."""
    if selection.conflicting:
        with path.open("w", encoding="utf-8") as file:
            for group in selection.conflicting:
                file.write(json.dumps(conflict_rows(gathered, group), ensure_ascii=False) + "\n")


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
    return pyarrow.compute.not_equal(gathered.examples["source"], "").to_numpy()


def _compared(gathered: Gathered, row: int) -> str:
    example = gathered.examples.slice(row, 1)
    instruction, text = (example[name][0].as_py() for name in ("instruction", "input"))
    target = _side(gathered, "target", row)
    return compared_text(
        Record(instruction=instruction, input=text, output=target, origin=origin_of(gathered.examples, row))
    )


def _split(gathered: Gathered, rows: numpy.ndarray, fractions: Sequence[float], settings: PrepareSettings) -> Split:
    def shown(row: int, side: str) -> str:
        example = gathered.examples.slice(int(rows[row]), 1)
        if side == "output":
            return _side(gathered, side="target", row=int(rows[row]))
        return example["input"][0].as_py() or example["instruction"][0].as_py()

    keys = (gathered.column("input_key")[rows], gathered.column("output_key")[rows])
    return split_rows(*keys, *fractions, settings.seed, settings.split_by or "both", shown)
