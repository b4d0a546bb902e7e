"""What readers return: rows in chunks of bounded size, and a Reject for a row that could not be read.

    in_chunks(rows, …)                 → Finished((Row(…), Reject(…), …), bytes_done=1_048_576), …

A chunk can be pickled, so that a worker process does what `rows()` takes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from diptych.data_prep.reading.find_files import Limits
from diptych.data_prep.reading.text_encoding import bad_byte
from diptych.data_prep.rows.records import Origin, Reject, Row

LONG_ROW_CHARACTERS_KEPT = 1_000
"""Of a row beyond `max_row_bytes`, in its Reject."""

ROWS_IN_CHUNK = 2_000
CHARACTERS_IN_CHUNK = 1 << 20

KNOWN_COLUMNS = frozenset(
    "instruction input output prompt completion context response source target text summary question answer answers"
    " system category id title document article dialogue query reply translation reference messages conversations"
    " instances history label language source_language target_language highlights src tgt chosen rejected score"
    " input_ids labels attention_mask domain license attribution mt pe".split()
)
"""Names that data sets give to columns. A header, and the rows of a JSON object, are recognised by them."""

Rows = Iterator[Row | Reject]


class Chunk(Protocol):
    """A part of a source that one worker turns into rows. Picklable."""

    bytes_done: int
    """Of the source's own bytes, those read by the end of this chunk: for progress."""

    def rows(self) -> Rows: ...


@dataclass(frozen=True)
class Finished:
    """Rows that were read already, in formats in which most of the work is to find a row's end."""

    items: tuple[Row | Reject, ...]
    bytes_done: int

    def rows(self) -> Rows:
        return iter(self.items)


def in_chunks(rows: Rows, bytes_done: Callable[[], int]) -> Iterator[Finished]:
    """Rows in bunches, bounded in number and in size."""
    items, characters = [], 0
    for row in rows:
        items.append(row)
        characters += len(row.raw)
        if len(items) >= ROWS_IN_CHUNK or characters >= CHARACTERS_IN_CHUNK:
            yield Finished(tuple(items), bytes_done())
            items, characters = [], 0
    if items:
        yield Finished(tuple(items), bytes_done())


# What rejects say


def unreadable(origin: Origin, text: str, offset: int | None, fault: str) -> Reject:
    """A row that could not be read. Bytes that are no UTF-8 are the fault to mend first."""
    bad = None if offset is None else bad_byte(text.encode("utf-8", "surrogateescape"), offset)
    kind = "invalid UTF-8" if bad else fault.split(":")[0]
    return Reject(origin, None, kind, bad or fault, text)


def size_if_too_large(text: str, limits: Limits) -> int | None:
    """Its bytes, if it has more than a row may have. Most texts are too short to be counted."""
    if len(text) <= limits.max_row_bytes // 4:  # no character takes more than four bytes
        return None
    size = len(text.encode("utf-8", "surrogateescape"))
    return size if size > limits.max_row_bytes else None


def too_large(origin: Origin, head: str, size: int | None, limits: Limits) -> Reject:
    known = f"has {size:,} bytes" if size else "goes on"
    reason = (
        f"the row {known}, and max_row_bytes is {limits.max_row_bytes:,}. Is something not closed, or a line end lost?"
    )
    return Reject(origin, None, "row too large", reason, head[:LONG_ROW_CHARACTERS_KEPT])
