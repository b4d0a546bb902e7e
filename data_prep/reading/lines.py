"""Lines of a text file, in blocks of bounded size that a worker process turns into rows.

    line_blocks(content, …)              → Lines(b"a\\nb\\n", first_line=1, offset=0), …
    line_chunks(…, row_of=json_row)      → LineChunk(…), whose rows() are what json_row makes of each line

A line ends in \\n or \\r\\n. Blank lines are no rows. A line with bytes that are no UTF-8, or with more than
`max_row_bytes`, is one Reject.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from diptych.data_prep.reading.find_files import BLOCK_BYTES, Content, File, Limits
from diptych.data_prep.reading.row_chunks import (
    LONG_ROW_CHARACTERS_KEPT,
    Chunk,
    Finished,
    Rows,
    size_if_too_large,
    too_large,
    unreadable,
)
from diptych.data_prep.reading.text_encoding import NOT_UTF8
from diptych.data_prep.rows.records import Origin, Reject, Row

BYTE_ORDER_MARK = "\ufeff"
"""At the beginning of a line, as in files that were joined, it is no part of the text."""

BLANKS = " \t\r\ufeff"

RowOf = Callable[[str, Origin, Limits], Row | Reject | None]
"""Makes a row of the text of a line; None where the line is no row, such as a header. Picklable."""


@dataclass(frozen=True)
class Lines:
    """Whole lines as they stand in the file; `offset` is where they begin in the unpacked content."""

    data: bytes
    first_line: int
    offset: int

    def texts(self) -> Iterator[tuple[int, str, int | None]]:
        """Number, text without its end, and offset of each line; the offset only if some bytes here are no UTF-8."""
        data = self.data.removesuffix(b"\n")
        try:
            texts = data.decode("utf-8").split("\n")
        except UnicodeDecodeError:
            offset = self.offset
            for number, line in enumerate(data.split(b"\n"), self.first_line):
                yield number, line.decode("utf-8", "surrogateescape").removesuffix("\r"), offset
                offset += len(line) + 1
        else:
            for number, text in enumerate(texts, self.first_line):
                yield number, text.removesuffix("\r"), None


@dataclass(frozen=True)
class LongLine:
    """A line beyond the limit, of which only the beginning is kept."""

    head: bytes
    first_line: int
    bytes: int


def line_blocks(content: Content, mark: int, limits: Limits) -> Iterator[Lines | LongLine]:
    """All lines in blocks of about `block_bytes`. What stands after the last line end is a line too.

    A line may be longer than `max_row_bytes` by less than a block and still come as one of Lines.
    """
    content.read(mark)
    line, offset = 1, mark
    held, searched = bytearray(), 0
    while block := content.read(limits.block_bytes):
        held += block
        if end := held.rfind(b"\n", searched) + 1:
            data = bytes(held[:end])
            del held[:end]
            yield Lines(data, line, offset)
            line, offset = line + data.count(b"\n"), offset + end
        searched = len(held)
        if len(held) > limits.max_row_bytes:
            head, size, searched = bytes(held[:LONG_ROW_CHARACTERS_KEPT]), len(held), 0
            held.clear()
            while not held and (block := content.read(BLOCK_BYTES)):
                end = block.find(b"\n") + 1
                size += end or len(block)
                if end:
                    held += block[end:]
                    break
            yield LongLine(head, line, size)
            line, offset = line + 1, offset + size
    if held:
        yield Lines(bytes(held), line, offset)


@dataclass(frozen=True)
class LineChunk:
    """Lines as they stand in the file; `rows` is the worker's part."""

    name: str
    lines: Lines
    row_of: RowOf
    bytes_done: int
    limits: Limits
    keeps_blank_lines: bool = False

    def rows(self) -> Rows:
        large = self.limits.max_row_bytes // 4  # no character takes more than four bytes
        for number, text, offset in self.lines.texts():
            if text[:1] in BLANKS and not self.keeps_blank_lines and not text.strip(BLANKS):
                continue
            origin, row = Origin(self.name, number), None
            if offset is not None or len(text) > large:
                row = line_fault(text, origin, offset, self.limits)
            if row is None:
                row = self.row_of(text, origin, self.limits)
            if row is not None:
                yield row


def line_chunks(
    file: File, limits: Limits, mark: int, row_of: RowOf, keeps_blank_lines: bool = False
) -> Iterator[Chunk]:
    with Content(file, limits) as content:
        for lines in line_blocks(content, mark, limits):
            if isinstance(lines, LongLine):
                yield Finished((long_line(lines, file.name, limits),), content.position)
            else:
                yield LineChunk(file.name, lines, row_of, content.position, limits, keeps_blank_lines)


def line_fault(text: str, origin: Origin, offset: int | None, limits: Limits) -> Reject | None:
    """A Reject for a text that is too large, or has bytes that are no UTF-8; `offset` as `Lines.texts` gives it."""
    if size := size_if_too_large(text, limits):
        return too_large(origin, text, size, limits)
    if offset is not None and NOT_UTF8.search(text):
        return unreadable(origin, text, offset, "")
    return None


def long_line(line: LongLine, name: str, limits: Limits) -> Reject:
    return too_large(Origin(name, line.first_line), line.head.decode("utf-8", "replace"), line.bytes, limits)
