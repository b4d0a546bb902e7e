"""The values that flow through data_prep: a row as read, a record that is valid, a reject with its reason.

    Row({"instruction": "Add.", "input": "1 + 1", "output": "2"}, Origin("sums.jsonl", 3), raw)      from a reader
    → Record(instruction="Add.", input="1 + 1", output="2", origin=Origin("sums.jsonl", 3))          or, if not valid,
    → Reject(Origin("sums.jsonl", 3), "output", "empty output", "'output' is empty: …", raw)

Every row that a reader yields ends as exactly one Record or one Reject: kept + rejected = rows read.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

IGNORE_INDEX = -100
"""The label that the loss leaves out (torch's own default for `ignore_index`)."""

RAW_CHARACTERS_KEPT = 4000
"""Raw text longer than this is shortened in rejects.jsonl: one unclosed quote can make a whole file one bad row."""


class UserError(ValueError):
    """A mistake that a person can mend: its message says what, got, allowed, next. The command exits with 2."""


@dataclass(frozen=True)
class Origin:
    """Where a row stands: its line in line formats (jsonl, csv, tsv, aligned text), else its row, from 1 on."""

    file: str
    row: int
    instance: int = 0
    """1-based part of a row that gives several examples (instances, turns, directions); 0 where a row is one."""

    def __str__(self) -> str:
        return f"{self.file}:{self.row}" + (f".{self.instance}" if self.instance else "")


@dataclass(frozen=True)
class Row:
    """What a reader found, before anything is known about its values."""

    fields: Mapping[str, Any]
    origin: Origin
    raw: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """One valid example. `history` holds earlier (instruction, output) turns, oldest first; `system` is what a chat's
    system prompt says, `category` what the data calls this kind of task."""

    instruction: str
    input: str
    output: str
    history: tuple[tuple[str, str], ...] = ()
    system: str = ""
    category: str = ""
    origin: Origin


@dataclass(frozen=True, kw_only=True)
class Tokenised:
    """One example that came as token ids: neither template nor tokenizer has anything to do with it."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    origin: Origin


@dataclass(frozen=True)
class Reject:
    """One row that was not kept. `kind` is the same for all rows with this fault; `reason` tells of this row alone."""

    origin: Origin
    field: str | None
    kind: str
    reason: str
    raw: str

    def as_json(self) -> dict[str, Any]:
        raw = self.raw if len(self.raw) <= RAW_CHARACTERS_KEPT else self.raw[:RAW_CHARACTERS_KEPT] + " …"
        return {
            "file": self.origin.file,
            "row": self.origin.row,
            "instance": self.origin.instance,
            "field": self.field,
            "kind": self.kind,
            "reason": self.reason,
            "raw": raw.encode("utf-8", "backslashreplace").decode("utf-8"),  # bytes that are no UTF-8 stay readable
        }


@dataclass
class Rejects:
    """The rows that were not kept so far; with `strict`, the first one ends the run."""

    strict: bool
    rows: list[Reject] = field(default_factory=list)

    def add(self, reject: Reject) -> None:
        if self.strict:
            raise UserError(f"{reject.origin}: {reject.reason} (--strict stops at the first row that cannot be kept.)")
        self.rows.append(reject)

    def add_record(self, record: Record, kind: str, reason: str) -> None:
        """A record that turned out later to be of no use."""
        values = {"instruction": record.instruction, "input": record.input, "output": record.output}
        self.add(Reject(record.origin, None, kind, reason, json.dumps(values, ensure_ascii=False)))

    def by_kind(self) -> dict[str, int]:
        """How many rows have which fault, the most frequent first."""
        return dict(Counter(reject.kind for reject in self.rows).most_common())


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most like `name`, case and outer blanks aside: "Instrution" is nearest to "instruction"."""
    spelled = {candidate.strip().casefold(): candidate for candidate in known}
    matches = difflib.get_close_matches(name.strip().casefold(), spelled, n=1, cutoff=cutoff)
    return spelled[matches[0]] if matches else None
