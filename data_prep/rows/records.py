"""The values of data_prep: a row as it was read, a valid record, a reject with its reason.

    Row({"instruction": "Add.", "input": "1 + 1", "output": "2"}, Origin("sums.jsonl", 3), raw)      from a reader
    → Record(instruction="Add.", input="1 + 1", output="2", origin=Origin("sums.jsonl", 3))          or, if not valid,
    → Reject(Origin("sums.jsonl", 3), "output", "empty output", "'output' is empty: …", raw)

Every row that a reader yields ends as exactly one Record or one Reject: kept + rejected = rows read.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import IO, Any, Literal, NamedTuple

from diptych.data_prep.command_line.errors import UserError

IGNORE_INDEX = -100
"""The label that the loss leaves out (torch's own default for `ignore_index`)."""

RAW_CHARACTERS_KEPT = 100_000
"""Raw text longer than this is shortened in rejects.jsonl: one unclosed quote can make a whole file one bad row."""

EXAMPLES_KEPT = 3
"""Of each kind of reject, for the report."""


CUT_OFF = "file cut off"
"""The kind of a reject for a file that ends too early. What is missing behind it is in no other reject."""


Preferences = Literal["pairs", "marks"]
"""What data says of its answers: which of two is preferred, or whether one is liked."""


class Languages(NamedTuple):
    """The language codes of a direction or of a row; "" for one that is not known."""

    source: str = ""
    target: str = ""

    @property
    def direction(self) -> str:
        """`"eng_Latn-kor_Hang"`; "" if either is not known."""
        return f"{self.source}-{self.target}" if self.source and self.target else ""

    def swapped(self) -> "Languages":
        return Languages(self.target, self.source)

    def filled_from(self, others: "Languages") -> "Languages":
        """These codes, and those of `others` for what is not known here."""
        return Languages(self.source or others.source, self.target or others.target)


@dataclass(frozen=True)
class Origin:
    """The place of a row: its line in line formats (jsonl, csv, tsv, aligned text), else its number, from 1 on."""

    file: str
    row: int
    instance: int = 0
    """Number, from 1 on, of one of several examples of a row (instances, turns, directions); 0 if the row is one."""

    def __str__(self) -> str:
        return f"{self.file}:{self.row}" + (f".{self.instance}" if self.instance else "")


@dataclass(frozen=True)
class Row:
    """A row as a reader found it; its values are not checked."""

    fields: Mapping[str, Any]
    origin: Origin
    raw: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """One valid example. `history` holds earlier (instruction, output) turns, oldest first; `system` is the system
    prompt of a chat, `category` the data's name for this kind of task, `languages` the codes of both sides. In pairs,
    `output` was preferred to `rejected`; `mark` is 1 for an output that is liked, and -1 for one that is not."""

    instruction: str
    input: str
    output: str
    history: tuple[tuple[str, str], ...] = ()
    system: str = ""
    category: str = ""
    languages: Languages = Languages()
    rejected: str = ""
    mark: int = 0
    origin: Origin


@dataclass(frozen=True, kw_only=True)
class Tokenised:
    """One example that came as token ids; no template and no tokenizer is applied to it."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    languages: Languages = Languages()
    origin: Origin


@dataclass(frozen=True)
class Reject:
    """One row that was not kept. `kind` is the same for all rows with this fault; `reason` is about this row."""

    origin: Origin
    field: str | None
    kind: str
    reason: str
    raw: str

    def as_json(self) -> dict[str, Any]:
        return {
            "file": self.origin.file,
            "row": self.origin.row,
            "instance": self.origin.instance,
            "field": self.field,
            "kind": self.kind,
            "reason": self.reason,
            "raw": shortened_raw(self.raw),
        }


def shortened_raw(raw: str) -> str:
    """A row as rejects.jsonl has it: bytes that are no UTF-8, and halves of symbols, stay readable as escapes."""
    raw = raw if len(raw) <= RAW_CHARACTERS_KEPT else raw[:RAW_CHARACTERS_KEPT] + " …"
    return raw if raw.isascii() else raw.encode("utf-8", "backslashreplace").decode("utf-8")


class Rejects:
    """The rows that were not kept, written to a file as they come; counts and a few examples stay in memory.

    With `strict`, the first one ends the run; so does one whose kind is in `fatal`.
    """

    def __init__(self, file: IO[str] | None = None, strict: bool = False, fatal: Collection[str] = ()) -> None:
        self.file, self.strict, self.fatal = file, strict, fatal
        self.count = 0
        self.kinds: Counter[str] = Counter()
        self.examples: defaultdict[str, list[Reject]] = defaultdict(list)
        """A few of each kind, the first ones."""

    def add(self, reject: Reject) -> None:
        if self.strict or reject.kind in self.fatal:
            why = "--strict stops at the first row that cannot be kept." if self.strict else "Nothing was written."
            raise UserError(f"{reject.origin}: {reject.reason} ({why})")
        self.count += 1
        self.kinds[reject.kind] += 1
        if len(self.examples[reject.kind]) < EXAMPLES_KEPT:
            self.examples[reject.kind].append(reject)
        if self.file is not None:
            self.file.write(json.dumps(reject.as_json(), ensure_ascii=False) + "\n")


def character_at(value: str, position: int) -> str:
    return f"U+{ord(value[position]):04X} at character {position + 1}"


def broken_character(text: str) -> str:
    """The first character that cannot be encoded, with its place; "" if there is none. JSON may spell half of a
    surrogate pair (`"\\ud83d"`)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"{character_at(text, error.start)}: half of a broken symbol, or a byte that is no UTF-8."
    return ""
