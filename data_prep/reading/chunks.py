"""What readers hand on: rows in chunks of bounded size, and what is said of a row that could not be read.

    in_chunks(rows, …)                 → Finished((Row(…), Reject(…), …), bytes_done=1_048_576), …
    bad_byte(b"caf\xe9", 100)          → "invalid UTF-8: byte 0xe9 at byte offset 103 of the file. In Windows-1252 …"

A chunk can be pickled, so that a worker process does what `rows()` takes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.reading.files import HEAD_BYTES, Limits, conversion
from diptych.data_prep.rows.records import Origin, Reject, Row

LONG_ROW_CHARACTERS_KEPT = 1_000
"""Of a row beyond `max_row_bytes`, in its Reject."""

ROWS_IN_CHUNK = 2_000
CHARACTERS_IN_CHUNK = 1 << 20

KNOWN_COLUMNS = frozenset(
    "instruction input output prompt completion context response source target text summary question answer answers"
    " system category id title document article dialogue query reply translation reference messages conversations"
    " instances history label language source_language target_language highlights src tgt chosen rejected score"
    " input_ids labels attention_mask domain license attribution".split()
)
"""Names that data sets give to columns, by which a header, and what holds the rows of a JSON object, are told."""

NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""What "surrogateescape" makes of a byte that is no UTF-8. Such bytes cost only their own row."""

LETTERS = re.compile(rb"[A-Za-z\x80-\xff]+")
_SIGNS = "‘’‚“”„‹›«»–—…•·¡¿€£¥§©®™°±²³¹½¼¾×÷´\u00a0\u00ad"
_WORD = "[A-Za-zÀ-ÖØ-öø-þŠšŽžŒœƒªº]+"
WESTERN = re.compile(f"[{_SIGNS}]*(?:{_WORD}(?:[’\u00ad–—…«»\u00a0]+{_WORD})*[{_SIGNS}]*)?")
"""A word of Western Europe in Windows-1252: signs stand around it, few inside. Polish in 1250 would be 'za¿ó³æ'."""

Rows = Iterator[Row | Reject]


class Chunk(Protocol):
    """A part of a source that one worker turns into rows. Picklable."""

    bytes_done: int
    """Of the source's own bytes, those read by the end of this chunk: for progress."""

    def rows(self) -> Rows: ...


@dataclass(frozen=True)
class Finished:
    """Rows that were read already, in formats where finding a row's end is most of the work."""

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


def bad_byte(text: bytes, offset: int) -> str | None:
    """Which byte of a text that begins `offset` bytes into the file is no UTF-8, and what the text is instead."""
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte 0x{text[error.start]:02x} at byte offset {offset + error.start} of the file"
        other = ""
        if _is_cp949(text, 2, 0.5):
            other = " Read as CP949 (EUC-KR) it is Korean: iconv -f CP949 -t UTF-8."
        elif words := _windows_1252_words(text):
            other = f" In Windows-1252 it is '{words[0][:12]}': iconv -f WINDOWS-1252 -t UTF-8."
        return f"invalid UTF-8: {where}.{other}"
    return None


def _is_cp949(text: bytes, least: int, share: float) -> bool:
    try:
        others = [character for character in text.decode("cp949") if not character.isascii()]
    except UnicodeDecodeError:
        return False
    hangul = sum("\uac00" <= character <= "\ud7a3" for character in others)
    return hangul >= least and hangul >= share * len(others)


def _windows_1252_words(text: bytes) -> list[str]:
    """The words with other letters than ASCII's, if the text is Windows-1252 (or Latin-1, a part of it): "café".

    Such letters are the lesser part of such words; where they are more, it is Greek or Russian in an encoding of its
    own. Where there is UTF-8 as well ("É»" may look so by chance), no encoding is right for the whole.
    """
    runs = [run for run in LETTERS.findall(text) if not run.isascii()]
    utf8 = sum(not character.isascii() for character in text.decode("utf-8", "ignore"))
    try:
        words = [run.decode("cp1252") for run in runs]
    except UnicodeDecodeError:
        return []
    letters = [character for word in words for character in word if character.isalpha()]
    is_western = 2 * sum(letter.isascii() for letter in letters) >= len(letters) and all(map(WESTERN.fullmatch, words))
    return words if is_western and 20 * utf8 <= len(words) else []


def check_encoding(head: bytes, name: str) -> None:
    """A file that is in another encoding from beginning to end is one error, not a reject a row. Western texts are
    ASCII for the most part: theirs is one where a tenth of the lines would be lost."""
    whole = head[: head.rfind(b"\n") + 1] if len(head) >= HEAD_BYTES else head
    try:
        whole.decode("utf-8")
    except UnicodeDecodeError as error:
        if _is_cp949(whole, 4, 0.8):
            raise UserError(
                f"{name} is CP949 (EUC-KR), and UTF-8 is due (first at byte offset {error.start}). Convert it:"
                f" {conversion(name, 'CP949')}"
            ) from None
        lines = whole.splitlines()
        if 10 * sum(not line.isascii() for line in lines) < len(lines):
            return
        if len(words := _windows_1252_words(whole)) >= 4:
            shown = ", ".join(repr(word[:40]) for word in list(dict.fromkeys(words))[:3])
            raise UserError(
                f"{name} is not UTF-8 (byte 0x{whole[error.start]:02x} at byte offset {error.start}). Read"
                f" as Windows-1252 (or Latin-1) its words are {shown} …: if that is right, convert it:"
                f" {conversion(name, 'WINDOWS-1252')}"
            ) from None


def unreadable(origin: Origin, text: str, offset: int | None, fault: str) -> Reject:
    """A row that could not be read. Where bytes are no UTF-8, they are the fault to mend first."""
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
