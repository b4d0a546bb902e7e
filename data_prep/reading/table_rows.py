"""Tables as text, parallel text and plain text: csv and tsv, pairs of sentences in one file or in two, a text a line.

    instruction,output                             a header, then records
    "two                                           → Row({"instruction": "two\nlines", "output": "b"}), row 2
    lines",b
    sep=;                                          Excel's word on what separates columns: not a row
    a;b                                            without a header: Row({"1": "a", "2": "b"}), row 2
    Go.\t가.\tCC-BY                                → Row({"first": "Go.", "second": "가.", "column 3": "CC-BY"})
    source\ttarget                                 a tsv has no quoting, with a header or without one
    "Go.\t가.                                      → Row({"source": '"Go.', "target": "가."})
    a.en: Go.   a.ko: 가.                           → Row({"first": "Go.", "second": "가."})

A quote that is never closed, or a line with other columns, costs its own line.
"""

from __future__ import annotations

import csv
import io
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.reading.chunks import (
    NOT_UTF8,
    Chunk,
    Finished,
    Rows,
    bad_byte,
    in_chunks,
    long_line,
    size_if_too_large,
    too_large,
    unreadable,
)
from diptych.data_prep.reading.files import UTF8_MARK, Content, File, Limits, Lines, LongLine, line_blocks
from diptych.data_prep.rows.records import Origin, Reject, Row

MARK = UTF8_MARK.decode()
"""A byte order mark. At the beginning of a line, as in files that were joined, it is no part of the text."""

SEPARATOR_LINE = re.compile(r'"?sep=([^\w\s"]|\t)"?\r?\n', re.IGNORECASE)


@dataclass(frozen=True)
class Header:
    """What the columns of a table are called, and how the cells of a line become fields."""

    names: tuple[str, ...]
    width: int
    """Cells that the header has, and most lines have. Those behind the last name have none."""

    line: int | None
    """Where it stands in the file; None where the file has none."""

    @classmethod
    def of_cells(cls, cells: Sequence[str], line: int) -> Header:
        """Spreadsheets write empty cells after the last name: these are no columns. A place without a name between
        names is called by its number, `column 2`."""
        names = [cell.strip() for cell in cells]
        while names and not names[-1]:
            names.pop()
        return cls(tuple(name or f"column {place}" for place, name in enumerate(names, 1)), len(cells), line)

    @classmethod
    def numbered(cls, width: int) -> Header:
        """For a table without one: columns "1", "2" and so on."""
        return cls(tuple(str(place) for place in range(1, width + 1)), width, None)

    @classmethod
    def of_pairs(cls, width: int) -> Header:
        """For parallel text without one: two columns are a pair, further ones (an attribution) come along."""
        return cls(("first", "second", *(f"column {place}" for place in range(3, width + 1))), width, None)

    def row(self, cells: Sequence[str], origin: Origin, text: str) -> Row | Reject:
        """Empty cells behind the last name are dropped; others there are called `column 3`, if the header has a place
        for them."""
        names = self.names
        if len(cells) == len(names):
            if self.line is not None and names == tuple(cell.strip() for cell in cells):
                reason = "the header stands here once more, as in files that were joined. Take it out."
                return Reject(origin, None, "repeated header", reason, text)
            return Row(dict(zip(names, cells, strict=True)), origin, text)
        if len(cells) < len(names) or any(cell.strip() for cell in cells[self.width :]):
            others = f"this table has {self.width}" if self.line is None else f"the header has {self.width}"
            return unreadable(origin, text, None, f"wrong number of columns: {len(cells)}, and {others}.")
        further = {
            f"column {place}": cell for place, cell in enumerate(cells, 1) if place > len(names) and cell.strip()
        }
        return Row({**dict(zip(names, cells, strict=False)), **further}, origin, text)


@dataclass(frozen=True)
class TabLines:
    """Lines of a tsv as they stand in the file. Nothing is quoted: a quote mark is a character like any other."""

    name: str
    lines: Lines
    header: Header
    bytes_done: int
    limits: Limits

    def rows(self) -> Rows:
        for number, text, offset in _texts_of(self.lines):
            if not text.strip(" \t\r") or number == self.header.line:
                continue
            if number == 1 and SEPARATOR_LINE.fullmatch(text + "\n"):
                continue
            origin = Origin(self.name, number)
            if size := size_if_too_large(text, self.limits):
                yield too_large(origin, text, size, self.limits)
            elif offset is not None and NOT_UTF8.search(text):
                yield unreadable(origin, text, offset, "")
            else:
                yield self.header.row(text.removeprefix(MARK).split("\t"), origin, text)


def _texts_of(lines: Lines) -> Iterator[tuple[int, str, int | None]]:
    """Number, text without its end, and offset of each line; the offset only where some bytes are no UTF-8."""
    data = lines.data.removesuffix(b"\n")
    try:
        texts = data.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        offset = lines.offset
        for number, line in enumerate(data.split(b"\n"), start=lines.first_line):
            yield number, line.decode("utf-8", "surrogateescape").removesuffix("\r"), offset
            offset += len(line) + 1
    else:
        for number, text in enumerate(texts, start=lines.first_line):
            yield number, text.removesuffix("\r"), None


def tsv_chunks(file: File, limits: Limits, mark: int, header: Header) -> Iterator[Chunk]:
    with file.open(limits) as content:
        for lines in line_blocks(content, mark, limits):
            if isinstance(lines, LongLine):
                yield Finished((long_line(lines, file.name, limits),), content.position)
            else:
                yield TabLines(file.name, lines, header, content.position, limits)


class _RecordTooLarge(Exception):
    """A csv record has grown beyond max_row_bytes, most likely by a quote that is never closed."""


class _Lines:
    """Lines for csv.reader, which takes as many as a record has. Those it took can be given back."""

    def __init__(self, blocks: Iterator[Lines | LongLine], most: int) -> None:
        self._lines, self._most, self._waiting = self._each_line(blocks), most, deque()
        self.taken: list[tuple[int, str, int | None]] = []
        self._characters = 0

    @staticmethod
    def _each_line(blocks: Iterator[Lines | LongLine]) -> Iterator[tuple[int, str, int | None] | LongLine]:
        """A line ends in \\n or \\r\\n, or in a \\r alone, which some old files have."""
        number = 1
        for block in blocks:
            if isinstance(block, LongLine):
                yield replace(block, first_line=number)
                number += 1
                continue
            try:
                for text in io.StringIO(block.data.decode("utf-8"), newline=""):
                    yield number, text, None
                    number += 1
            except UnicodeDecodeError:
                offset = block.offset
                for line in block.data.splitlines(keepends=True):
                    yield number, line.decode("utf-8", "surrogateescape"), offset
                    number, offset = number + 1, offset + len(line)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._waiting.popleft() if self._waiting else next(self._lines)
        self._characters += 0 if isinstance(line, LongLine) else len(line[1])
        if isinstance(line, LongLine) or (self._characters > self._most and self.taken):
            self._waiting.appendleft(line)
            raise _RecordTooLarge
        self.taken.append(line)
        return line[1].removeprefix(MARK)

    def begin(self) -> None:
        self.taken, self._characters = [], 0

    def long_line(self) -> LongLine | None:
        """What stopped a record before it began, taken away."""
        if not self.taken and self._waiting and isinstance(self._waiting[0], LongLine):
            return self._waiting.popleft()
        return None

    def give_back_all_but_first(self) -> None:
        self._waiting.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]


def csv_chunks(file: File, limits: Limits, mark: int, delimiter: str, numbered: bool = False) -> Iterator[Chunk]:
    """A header, then records, which may span lines inside quotes. A record's row is the line that it starts on. With
    `numbered` there is no header: the columns are "1", "2" and so on, as many as the first record has."""
    with file.open(limits) as content:
        lines = _Lines(line_blocks(content, mark, limits), limits.max_row_bytes)
        yield from in_chunks(_csv_rows(lines, file.name, limits, delimiter, numbered), lambda: content.position)


def _csv_rows(lines: _Lines, name: str, limits: Limits, delimiter: str, numbered: bool) -> Rows:
    csv.field_size_limit(2**31 - 1)  # the default of 131,072 characters is less than some documents have
    header: Header | None = None
    for record in _csv_records(lines, name, limits, delimiter):
        if isinstance(record, Reject):
            if header is None and not numbered:
                raise UserError(f"{name}: the header {record.raw.strip()[:200]!r} is wrong: {record.reason}")
            yield record
            continue
        values, number, text, offset = record
        is_blank = not any(value.strip(" \t\r\n") for value in values)
        if is_blank or (number == 1 and SEPARATOR_LINE.fullmatch(text)):  # Excel's
            continue
        if header is None and numbered:
            header = Header.numbered(len(values))
        if header is None:
            header = Header.of_cells(values, number)
            check_header(header, text, name, offset)
            continue
        origin = Origin(name, number)
        if size := size_if_too_large(text, limits):
            yield too_large(origin, text, size, limits)
        elif offset is not None and NOT_UTF8.search(text):
            yield unreadable(origin, text, offset, "")
        else:
            yield header.row(values, origin, text)


def check_header(header: Header, text: str, name: str, offset: int | None) -> None:
    """UserError where two columns have one name, or the line `text` at byte `offset` is no UTF-8."""
    what = bad_byte(text.encode("utf-8", "surrogateescape"), offset or 0)
    if what is None and len(set(header.names)) < len(header.names):
        what = "it names a column twice"
    if what is not None:
        raise UserError(f"{name}: the header {text.strip()[:200]!r} is wrong: {what.rstrip('.')}.")


def _csv_records(lines: _Lines, name: str, limits: Limits, delimiter: str) -> Iterator[tuple | Reject]:
    """Values, first line, text and, where bytes may be no UTF-8, offset of each record.

    A quote that is never closed swallows all that follows, so after a broken record reading starts anew one line on.
    """
    reader = csv.reader(lines, strict=True, delimiter=delimiter)
    while True:
        lines.begin()
        try:
            values = next(reader)
        except StopIteration:
            return
        except (csv.Error, _RecordTooLarge) as error:
            reader = csv.reader(lines, strict=True, delimiter=delimiter)
            if longest := lines.long_line():
                yield long_line(longest, name, limits)
                continue
            fault = f"broken csv: {error}." if isinstance(error, csv.Error) else "broken csv: a quote is never closed."
            lines.give_back_all_but_first()
            [(number, text, offset)] = lines.taken
            yield unreadable(Origin(name, number), text, offset, fault)
        else:
            text = "".join(line for _, line, _ in lines.taken)
            yield values, lines.taken[0][0], text, _offset_of_first(lines.taken)


def _offset_of_first(taken: list[tuple[int, str, int | None]]) -> int | None:
    """Lines of one record may come from two blocks, of which only one has bytes that are no UTF-8."""
    before = 0
    for _, text, offset in taken:
        if offset is not None:
            return offset - before
        before += len(text.encode("utf-8"))
    return None


def text_chunks(file: File, limits: Limits, mark: int) -> Iterator[Chunk]:
    """Plain text, a text a line; blank lines are none."""
    with file.open(limits) as content:
        lines = enumerate(_aligned_lines(content, mark, limits), start=1)
        rows = (_text_row(Origin(file.name, number), line, limits) for number, line in lines)
        yield from in_chunks((row for row in rows if row.raw.strip()), lambda: content.position)


def _text_row(origin: Origin, line: tuple[str, int | None] | LongLine, limits: Limits) -> Row | Reject:
    return _line_fault(origin, line, limits) or Row({"text": line[0].removeprefix(MARK)}, origin, line[0])


def aligned_chunks(files: list[File], marks: list[int], limits: Limits) -> Iterator[Chunk]:
    """Line N of one file belongs to line N of the other; if one has more lines, nobody knows which pairs are right."""
    with files[0].open(limits) as first, files[1].open(limits) as second:
        contents = (first, second)
        lines = [_aligned_lines(content, mark, limits) for content, mark in zip(contents, marks, strict=True)]
        yield from in_chunks(_aligned_rows(files, lines, limits), lambda: first.position + second.position)


def _aligned_lines(content: Content, mark: int, limits: Limits) -> Iterator[tuple[str, int | None] | LongLine]:
    for block in line_blocks(content, mark, limits):
        if isinstance(block, LongLine):
            yield block
            continue
        for _, text, offset in _texts_of(block):
            yield text, offset


def _aligned_rows(files: list[File], lines: list[Iterator], limits: Limits) -> Rows:
    number, pair = 0, [next(side, None) for side in lines]
    while None not in pair:
        number += 1
        yield _aligned_row(files, pair, number, limits)
        pair = [next(side, None) for side in lines]
    if pair != [None, None]:
        counts = [number + (line is not None) + sum(1 for _ in side) for line, side in zip(pair, lines, strict=True)]
        raise UserError(
            f"{files[0].name} has {counts[0]:,} lines and {files[1].name} has {counts[1]:,}, so that line N no longer"
            " belongs to line N. Mend the files: a pair may be empty, a line may not be missing."
        )


def _aligned_row(files: list[File], pair: list, number: int, limits: Limits) -> Row | Reject:
    for file, line in zip(files, pair, strict=True):
        if fault := _line_fault(Origin(file.name, number), line, limits):
            return fault
    first, second = (text for text, _ in pair)
    fields = {"first": first.removeprefix(MARK), "second": second.removeprefix(MARK)}
    return Row(fields, Origin(files[0].name, number), f"{first}\t{second}")


def _line_fault(origin: Origin, line: tuple[str, int | None] | LongLine, limits: Limits) -> Reject | None:
    if isinstance(line, LongLine):
        return too_large(origin, line.head.decode("utf-8", "replace"), line.length, limits)
    text, offset = line
    if size := size_if_too_large(text, limits):
        return too_large(origin, text, size, limits)
    if offset is not None and NOT_UTF8.search(text):
        return unreadable(origin, text, offset, "")
    return None
