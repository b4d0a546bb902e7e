"""Tables as text, parallel text and plain text: csv and tsv, pairs of sentences in one file or in two, a text a line.

    instruction,output                             a header, then records
    "two                                           → Row({"instruction": "two\\nlines", "output": "b"}), row 2
    lines",b
    sep=;                                          Excel's line that names the separator: not a row
    a;b                                            without a header: Row({"1": "a", "2": "b"}), row 2
    Go.\\t가.\\tCC-BY                                → Row({"first": "Go.", "second": "가.", "column 3": "CC-BY"})
    source\\ttarget                                 a tsv has no quoting, with a header or without one
    "Go.\\t가.                                      → Row({"source": '"Go.', "target": "가."})
    a.en: Go.   a.ko: 가.                           → Row({"first": "Go.", "second": "가."})

A quote that is never closed, or a line with another number of columns, is one Reject. (pyarrow.csv gives neither the
line of a record nor its text, and stops at a quote that is never closed.)
"""

import csv
import io
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from diptych.data_prep.command_line.errors import UserError, excerpt
from diptych.data_prep.reading.find_files import Content, File, Limits
from diptych.data_prep.reading.lines import (
    BYTE_ORDER_MARK,
    Lines,
    LongLine,
    line_blocks,
    line_chunks,
    line_fault,
    long_line,
)
from diptych.data_prep.reading.row_chunks import Chunk, Rows, in_chunks, unreadable
from diptych.data_prep.reading.text_encoding import bad_byte
from diptych.data_prep.rows.records import Origin, Reject, Row

SEPARATOR_LINE = re.compile(r'"?sep=([^\w\s"]|\t)"?\r?\n', re.IGNORECASE)


@dataclass(frozen=True)
class Header:
    """What the columns of a table are called, and how the cells of a line become fields."""

    names: tuple[str, ...]
    width: int
    """Cells that the header has, and most lines have. Those behind the last name have none."""
    line: int | None
    """Where it stands in the file; None if the file has none."""

    @classmethod
    def of_cells(cls, cells: Sequence[str], line: int) -> "Header":
        """Spreadsheets write empty cells after the last name: these are no columns. A place without a name between
        names is called by its number, `column 2`."""
        names = [cell.strip() for cell in cells]
        while names and not names[-1]:
            names.pop()
        return cls(tuple(name or f"column {place}" for place, name in enumerate(names, 1)), len(cells), line)

    @classmethod
    def numbered(cls, width: int) -> "Header":
        """For a table without one: columns "1", "2" and so on."""
        return cls(tuple(str(place) for place in range(1, width + 1)), width, None)

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


def check_header(header: Header, text: str, name: str, offset: int | None) -> None:
    """UserError if two columns have one name, or the line `text` at byte `offset` is no UTF-8."""
    what = bad_byte(text.encode("utf-8", "surrogateescape"), offset or 0)
    if what is None and len(set(header.names)) < len(header.names):
        what = "it names a column twice"
    if what is not None:
        raise UserError(f"{name}: the header '{excerpt(text.strip())}' is wrong: {what.rstrip('.')}.")


# A row a line


def tsv_row(text: str, origin: Origin, limits: Limits, header: Header) -> Row | Reject | None:
    """Nothing is quoted: a quote mark is a character like any other."""
    if origin.row == header.line or (origin.row == 1 and SEPARATOR_LINE.fullmatch(text + "\n")):
        return None
    return header.row(text.removeprefix(BYTE_ORDER_MARK).split("\t"), origin, text)


def text_row(text: str, origin: Origin, limits: Limits) -> Row:
    """Of plain text, a text a line."""
    return Row({"text": text.removeprefix(BYTE_ORDER_MARK)}, origin, text)


def aligned_chunks(files: list[File], marks: list[int], limits: Limits) -> Iterator[Chunk]:
    """Line N of one file belongs to line N of the other; if one has more lines, nobody knows which pairs are right."""
    done, counts = [0, 0], [0, 0]

    def side(number: int) -> Rows:
        for chunk in line_chunks(files[number], limits, marks[number], text_row, keeps_blank_lines=True):
            done[number] = chunk.bytes_done
            for row in chunk.rows():
                counts[number] += 1
                yield row

    def rows() -> Rows:
        for first, second in zip_longest(side(0), side(1)):
            if counts[0] == counts[1]:
                fault = next((row for row in (first, second) if isinstance(row, Reject)), None)
                fields = {} if fault else {"first": first.fields["text"], "second": second.fields["text"]}
                yield fault or Row(fields, first.origin, f"{first.raw}\t{second.raw}")
        if counts[0] != counts[1]:
            raise UserError(
                f"{files[0].name} has {counts[0]:,} lines and {files[1].name} has {counts[1]:,}, so that line N no"
                " longer belongs to line N. Correct the files: a pair may be empty, a line may not be missing."
            )

    yield from in_chunks(rows(), lambda: sum(done))


# Records of a csv, which may go over several lines


Line = tuple[int, str, int | None]
"""Number, text with its end, and offset; the offset only if some bytes of the block are no UTF-8."""


class _RecordTooLarge(Exception):
    """A csv record has grown beyond max_row_bytes, most likely by a quote that is never closed."""


class _CsvLines:
    """Lines for csv.reader, which takes as many as a record has. Those that it took can be given back."""

    def __init__(self, blocks: Iterator[Lines | LongLine], most: int) -> None:
        self._lines, self._most, self.waiting = _each_line(blocks), most, deque()
        self.taken: list[Line] = []
        self.characters = 0
        """Of the record at hand, like `taken`."""

    def __iter__(self) -> "_CsvLines":
        return self

    def __next__(self) -> str:
        line = self.waiting.popleft() if self.waiting else next(self._lines)
        if isinstance(line, LongLine) or (self.taken and self.characters + len(line[1]) > self._most):
            self.waiting.appendleft(line)
            raise _RecordTooLarge
        self.characters += len(line[1])
        self.taken.append(line)
        return line[1].removeprefix(BYTE_ORDER_MARK)


def _each_line(blocks: Iterator[Lines | LongLine]) -> Iterator[Line | LongLine]:
    """A line of a csv ends in \\n or \\r\\n, or in a \\r alone, which some old files have."""
    number = 1
    for block in blocks:
        if isinstance(block, LongLine):
            yield LongLine(block.head, number, block.bytes)
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


def csv_chunks(file: File, limits: Limits, mark: int, delimiter: str, numbered: bool = False) -> Iterator[Chunk]:
    """A header, then records. A record's row is the line that it starts on. With `numbered` there is no header: the
    columns are "1", "2" and so on, as many as the first record has."""
    csv.field_size_limit(2**31 - 1)  # the default of 131,072 characters is less than some documents have

    def rows(lines: _CsvLines, name: str) -> Rows:
        header: Header | None = None
        for record in _csv_records(lines, name, limits, delimiter):
            if isinstance(record, Reject):
                if header is None and not numbered:
                    raise UserError(f"{name}: the header '{excerpt(record.raw.strip())}' is wrong: {record.reason}")
                yield record
                continue
            values, number, text, offset = record
            is_blank = not any(value.strip(" \t\r\n") for value in values)
            if is_blank or (number == 1 and SEPARATOR_LINE.fullmatch(text)):  # Excel's
                continue
            if header is None and not numbered:
                header = Header.of_cells(values, number)
                check_header(header, text, name, offset)
                continue
            header = header or Header.numbered(len(values))
            origin = Origin(name, number)
            yield line_fault(text, origin, offset, limits) or header.row(values, origin, text)

    with Content(file, limits) as content:
        lines = _CsvLines(line_blocks(content, mark, limits), limits.max_row_bytes)
        yield from in_chunks(rows(lines, file.name), lambda: content.position)


def _csv_records(
    lines: _CsvLines, name: str, limits: Limits, delimiter: str
) -> Iterator[tuple[list[str], int, str, int | None] | Reject]:
    """Values, first line, text and, if bytes may be no UTF-8, offset of each record.

    A quote that is never closed would take all that follows, so after a broken record reading starts anew one line on.
    """
    reader = csv.reader(lines, strict=True, delimiter=delimiter)
    while True:
        lines.taken, lines.characters = [], 0
        try:
            values = next(reader)
        except StopIteration:
            return
        except (csv.Error, _RecordTooLarge) as error:
            reader = csv.reader(lines, strict=True, delimiter=delimiter)
            if not lines.taken and lines.waiting and isinstance(lines.waiting[0], LongLine):
                yield long_line(lines.waiting.popleft(), name, limits)
                continue
            is_open = isinstance(error, _RecordTooLarge) or "unexpected end" in str(error)
            fault = f"broken csv: {'a quote is never closed' if is_open else error}."
            (number, text, offset), *others = lines.taken
            lines.waiting.extendleft(reversed(others))
            yield unreadable(Origin(name, number), text, offset, fault)
        else:
            text = "".join(line for _, line, _ in lines.taken)
            yield values, lines.taken[0][0], text, _offset_of_first(lines.taken)


def _offset_of_first(taken: list[Line]) -> int | None:
    """Lines of one record may come from two blocks, of which only one has bytes that are no UTF-8."""
    before = 0
    for _, text, offset in taken:
        if offset is not None:
            return offset - before
        before += len(text.encode("utf-8"))
    return None
