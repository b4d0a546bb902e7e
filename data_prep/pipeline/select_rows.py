"""Which examples stay, and in which split: decided on all rows at once, from columns of integer keys.

    also held out ─ exact duplicates ─ near duplicates ─▶ conflicts ─▶ train, validation, test ─▶ mixture of train

Only train rows are removed. A validation or test set of the user's own keeps all its rows, in their order, repeated
ones too. Texts are read only for near duplicates and for messages. Removed rows become rejects, which name the row
that says the same.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import pyarrow.compute

from diptych.data_prep.cleaning.duplicates import compared_text, conflicts, exact_duplicates, near_duplicates
from diptych.data_prep.cleaning.mixture import Mixture, mix
from diptych.data_prep.cleaning.splits import found_in, row_keys, split_rows
from diptych.data_prep.command_line.errors import UserError, counted
from diptych.data_prep.pipeline.gather_rows import Gathered
from diptych.data_prep.pipeline.prepare_settings import PrepareSettings, fraction_of
from diptych.data_prep.pipeline.row_stages import origin_of
from diptych.data_prep.rows.named_splits import HELD_OUT, KINDS, kind_of, splits_of
from diptych.data_prep.rows.records import Record, Reject, Rejects
from diptych.data_prep.text_to_ids.rendered_text import from_marked

ALSO_HELD_OUT = "also held out"
EXAMPLES_SHOWN = 5
SHOWN_CHARACTERS = 1_000
REMOVED = -1
SCATTER = numpy.uint64(0x9E3779B97F4A7C15)

SIDES_SHOWN = {"input": ("input", "instruction"), "output": ("target",), "rejected": ("rejected",)}
"""Which columns tell a person what splits.py compares, the first that has a text."""


@dataclass(frozen=True)
class Selection:
    """The decision for each row."""

    split_of_row: numpy.ndarray
    """(rows,) int16: the place in `names`, or REMOVED."""
    names: list[str]
    """The names of the splits, train first."""
    groups: int | None
    """How many groups of rows share no text with each other; None where nothing was held out by fractions."""
    duplicates: dict[str, Any]
    """Counts and examples for the report."""
    conflicting: list[list[int]]
    """Groups of rows with one source and different targets; in data of preferences, of rows that contradict each
    other: one answer is preferred to another and the other way round, or liked and not liked."""
    warnings: list[str]
    own_sets: dict[str, Any] | None
    """Counts and examples of the user's own validation and test sets; None where there are none."""

    @property
    def kept(self) -> int:
        return int((self.split_of_row != REMOVED).sum())

    def of_rows(self, gathered: Gathered) -> "Selection":
        """The selection of the rows that are left; their column `place` tells where they stood before."""
        return replace(self, split_of_row=self.split_of_row[gathered.column("place")])

    def places(self) -> dict[str, numpy.ndarray]:
        """The places of the rows of each split that has any, in order."""
        places = {name: numpy.flatnonzero(self.split_of_row == place) for place, name in enumerate(self.names)}
        return {name: rows for name, rows in places.items() if len(rows)}


def select(gathered: Gathered, splits: Sequence[str], settings: PrepareSettings, rejects: Rejects) -> Selection:
    """`splits` has the split of each source. Raises UserError where train rows are also held out, if `on_both_sides`
    is error."""
    own = list(dict.fromkeys(split for split in splits if kind_of(split) in HELD_OUT))
    names = [KINDS[0], *(split for kind in HELD_OUT for split in splits_of(kind, own) or [kind])]
    split_of_row = numpy.array([names.index(split) for split in splits], numpy.int16)[gathered.column("source_number")]
    train = _Train(gathered, settings, rejects, split_of_row == 0)
    own_sets = train.remove_held_out(names, split_of_row) if own else None
    duplicates = train.remove_duplicates(has_own_sets=bool(own))
    rows = numpy.flatnonzero(train.stays)
    conflicting = [rows[group].tolist() for group in conflicts(*_judged_keys(gathered, rows))]
    duplicates["conflicts"] = len(conflicting)
    duplicates["conflict_examples"] = []
    for example in (_conflict(gathered, group) for group in conflicting[:EXAMPLES_SHOWN]):
        targets = [row["target"][:SHOWN_CHARACTERS] for row in example["rows"]]
        duplicates["conflict_examples"].append({"source": example["source"][:SHOWN_CHARACTERS], "targets": targets})
    fractions = [fraction_of(settings, kind, has_own_sets=bool(own)) for kind in HELD_OUT]
    split_of_row[train.is_train & ~train.stays] = REMOVED
    groups, warnings = None, []
    if len(rows) and (any(fractions) or not own):

        def shown(row: int, side: str) -> str:
            texts = (_side(gathered, name, int(rows[row])) for name in SIDES_SHOWN[side])
            return next(filter(None, texts), "")

        keys = (gathered.column("input_key")[rows], gathered.column("output_key")[rows])
        rejected = _rejected_keys(gathered)
        rejected = None if rejected is None else rejected[rows]
        split = split_rows(*keys, *fractions, settings.seed, settings.split_by or "both", shown, rejected)
        groups, warnings = split.groups, split.warnings
        place_of_kind = numpy.array([names.index(kind) if kind in names else 0 for kind in KINDS])
        split_of_row[rows] = place_of_kind[split.of_row]
    return Selection(split_of_row, names, groups, duplicates, conflicting, warnings, own_sets)


class _Train:
    """The train rows that stay, while those that say the same as others are removed."""

    def __init__(
        self, gathered: Gathered, settings: PrepareSettings, rejects: Rejects, is_train: numpy.ndarray
    ) -> None:
        self.gathered, self.settings, self.rejects = gathered, settings, rejects
        self.is_train, self.stays = is_train, is_train.copy()
        self.exact_keys = numpy.stack([gathered.column("source_key"), gathered.column("target_key")], axis=1)

    def origin(self, row: int) -> str:
        return self.gathered.examples["origin"][int(row)].as_py()

    def remove(self, others: numpy.ndarray, kind: str, reason: Callable[[int], str]) -> list[int]:
        """Removes rows that say the same as another, `others[row]` (-1 for none), and returns them. `reason` is given
        that other row."""
        table, rows = self.gathered.examples, numpy.flatnonzero(others >= 0).tolist()
        for row in rows:
            raw = table["raw"][row].as_py()
            self.rejects.add(Reject(origin_of(table, row), None, kind, reason(int(others[row])), raw))
        self.stays[rows] = False
        return rows

    def remove_held_out(self, names: Sequence[str], split_of_row: numpy.ndarray) -> dict[str, Any]:
        """Counts and examples of the user's own sets. Train rows that are in them are removed, or an error, or stay,
        as `on_both_sides` says."""
        also, sets, shared = self._overlap(names, split_of_row)
        rows, way = numpy.flatnonzero(also >= 0), self.settings.on_both_sides
        if len(rows) and way == "error":
            other = also[rows[0]]
            raise UserError(
                f"{counted(len(rows), 'train row')} also held out, the first {self.origin(rows[0])}, which is"
                f" {self.origin(other)} ({names[split_of_row[other]]}). Take them out of one side, or let"
                " --on_both_sides drop take them out of train."
            )
        by = self.settings.split_by
        what = {None: "it is", "source": "its input is that of", "both": "it shares a text with"}[by]
        if way == "drop":
            self.remove(
                also,
                ALSO_HELD_OUT,
                lambda other: f"{what} {self.origin(other)}, which is held out ({names[split_of_row[other]]}).",
            )
        return {"on_both_sides": way, "compared": by or "rows", "sets": sets, "validation_in_test": shared}

    def _overlap(self, names: Sequence[str], split_of_row: numpy.ndarray) -> tuple[numpy.ndarray, dict[str, Any], int]:
        """(rows,) for each train row a held-out row that is the same, or -1; what is said of each set; and how many
        validation rows are in test."""
        columns = (self.gathered.column(f"{name}_key") for name in ("row", "input", "output"))
        keys = row_keys(*columns, self.settings.split_by, _rejected_keys(self.gathered))
        train, *held_out = (numpy.flatnonzero(split_of_row == place) for place in range(len(names)))

        def same(rows: numpy.ndarray, others: numpy.ndarray) -> numpy.ndarray:
            """(rows,) for each row the place in `others` of one that is the same, or -1."""
            return found_in(*([column[it] for column in keys] for it in (rows, others)))

        also, sets = numpy.full(len(split_of_row), -1, dtype=numpy.int64), {}
        for name, rows in zip(names[1:], held_out, strict=True):
            if not len(rows):
                continue
            found = same(train, rows)
            both = numpy.flatnonzero(found >= 0)
            is_new = both[also[train[both]] < 0]
            also[train[is_new]] = rows[found[is_new]]
            shown = both[:EXAMPLES_SHOWN]
            sets[name] = {
                "rows": len(rows),
                "in_train": int((same(rows, train) >= 0).sum()) if len(train) else 0,
                "train_rows": len(both),
                "examples": [[self.origin(train[it]), self.origin(rows[found[it]])] for it in shown],
                "repeated": int((exact_duplicates(self.exact_keys[rows]) >= 0).sum()),
            }
        validation, test = (
            numpy.concatenate([rows for name, rows in zip(names[1:], held_out, strict=True) if kind_of(name) == kind])
            for kind in HELD_OUT
        )
        shared = int((same(validation, test) >= 0).sum()) if len(validation) and len(test) else 0
        return also, sets, shared

    def remove_duplicates(self, has_own_sets: bool) -> dict[str, Any]:
        """Counts and examples of duplicates."""
        settings, texts = self.settings, self.gathered.examples["source"]
        facts: dict[str, Any] = {"exact": 0, "near": 0, "threshold": settings.near_duplicates, "examples": []}
        if settings.deduplicate:
            rows = numpy.flatnonzero(self.stays)
            repeats = numpy.full(len(self.stays), -1, dtype=numpy.int64)
            found = exact_duplicates(self.exact_keys[rows])
            repeats[rows[found >= 0]] = rows[found[found >= 0]]
            what = "target" if _rejected_keys(self.gathered) is None else "answers"
            self._remove_repeats(repeats, "exact", f"the same source and {what} as", facts)
        if settings.near_duplicates is not None:
            held_out = ~self.is_train & (has_own_sets and settings.on_both_sides == "drop")
            # Rows that came as token ids have no text, by which all would be alike.
            considered = (self.stays | held_out) & pyarrow.compute.not_equal(texts, "").to_numpy()
            arguments = (self._compared_text, settings.shingle_size, considered, held_out)
            repeats = near_duplicates(self.gathered.signatures, settings.near_duplicates, *arguments)
            why = f"at least {settings.near_duplicates:.0%} like".replace("%", " %")
            self._remove_repeats(repeats, "near", why, facts)
        return facts

    def _remove_repeats(self, repeats: numpy.ndarray, what: str, why: str, facts: dict[str, Any]) -> None:
        kind = f"{what} duplicate"
        rows = self.remove(repeats, kind, lambda other: f"{why} {self.origin(other)}, which stays.")
        facts[what] = len(rows)
        for row in rows[:EXAMPLES_SHOWN]:
            example = {}
            for name, it in {"kept": int(repeats[row]), "removed": row}.items():
                both = " → ".join(_side(self.gathered, side, it) for side in ("source", "target"))
                example |= {name: self.origin(it), f"{name}_text": both[:SHOWN_CHARACTERS]}
            facts["examples"].append(example)

    def _compared_text(self, row: int) -> str:
        fields = {"instruction": "instruction", "input": "input", "output": "target"}
        fields |= {"rejected": "rejected"} if self.gathered.preferences == "pairs" else {}
        texts = {name: _side(self.gathered, side, row) for name, side in fields.items()}
        return compared_text(Record(**texts, origin=origin_of(self.gathered.examples, row)))


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
                file.write(json.dumps(_conflict(gathered, group), ensure_ascii=False) + "\n")


def _conflict(gathered: Gathered, group: Sequence[int]) -> dict[str, Any]:
    """One source with its different targets, and where they stand; or with the answers that are judged both ways."""
    columns = ["target", *{"pairs": ["rejected"], "marks": ["mark"]}.get(gathered.preferences, [])]
    origins = gathered.examples["origin"]
    rows = [
        {"origin": origins[row].as_py(), **{name: _side(gathered, name, row) for name in columns}} for row in group
    ]
    return {"source": _side(gathered, "source", group[0]), "rows": rows}


def _side(gathered: Gathered, side: str, row: int) -> str:
    """A text as a person reads it: sources and targets that are not encoded yet still have the template's marks."""
    text = gathered.examples[side][row].as_py()
    return str(from_marked(text)) if side in ("source", "target", "rejected") else text


def _rejected_keys(gathered: Gathered) -> numpy.ndarray | None:
    return gathered.column("rejected_key") if gathered.preferences == "pairs" else None


def _judged_keys(gathered: Gathered, rows: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Two keys of each of `rows`; those that agree in the first and not in the second contradict each other. Plain
    rows do so by source and target, pairs by source with both answers and the preferred one, marked answers by source
    with answer and the mark."""
    source, target, output = (gathered.column(f"{name}_key")[rows] for name in ("source", "target", "output"))
    if gathered.preferences == "pairs":
        _, both = row_keys(None, output, _rejected_keys(gathered)[rows], None)
        return source * SCATTER + both, output
    if gathered.preferences == "marks":
        return source * SCATTER + output, gathered.column("mark")[rows]
    return source, target
