"""Translation memories (TMX): a row for each translation unit.

<tu><tuv xml:lang="en"><seg>Go.</seg></tuv><tuv xml:lang="ko"><seg>가.</seg></tuv></tu>
→ Row({"translation": {"en": "Go.", "ko": "가."}}, Origin("memory.tmx", 1), raw)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from xml.parsers import expat

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.reading.chunks import Chunk, Rows, bad_byte, in_chunks, too_large
from diptych.data_prep.reading.files import LONG_ROW_CHARACTERS_KEPT, Content, File, Limits
from diptych.data_prep.rows.records import CUT_OFF, Origin, Reject, Row

NEXT_UNIT = re.compile(rb"<tu(?=[\s>])")
OPEN_TAGS = b"<tmx><body>"
AT_THE_END = (expat.errors.XML_ERROR_NO_ELEMENTS, expat.errors.XML_ERROR_UNCLOSED_TOKEN)
CODE_TAGS = frozenset(("bpt", "ept", "it", "ph", "ut"))


class _NewUnit(Exception):
    """A <tu> begins inside another one, whose end is missing."""


@dataclass
class _Unit:
    """A <tu> while it is read. `start` is its byte in the file."""

    start: int
    line: int
    texts: dict[str, str] = field(default_factory=dict)
    language: str = ""
    pieces: list[str] | None = None
    codes: int = 0
    head: bytes | None = None
    """The beginning of a unit that is too large to be kept."""

    fault: tuple[str, str, str | None] | None = None


class TmxRows:
    """The units of a TMX file, which is read in pieces. After broken XML, reading starts anew at the next <tu>.

    Text in <bpt>, <ept>, <it>, <ph> and <ut> is code of a document format and left out; text in <hi> is kept. A DTD is
    not fetched, and one that declares entities is refused. XML says itself in which encoding it is.
    """

    def __init__(self, name: str, limits: Limits) -> None:
        self.name, self.limits, self.row, self.encoding = name, limits, 0, "utf-8"
        self._data, self._base = b"", 0
        """What is still needed of the bytes read, and where in the file it begins."""
        self._lines_before = 0
        self._unit: _Unit | None = None
        self._done: list[Row | Reject] = []
        self._parser: Any = None

    def rows(self, content: Content) -> Rows:
        if content.peek(2) in (b"\xff\xfe", b"\xfe\xff"):
            self.encoding = "utf-16"
        self._begin(b"")
        is_end = False
        while not is_end:
            block = content.read(self.limits.block_bytes)
            is_end = not block
            self._data += block
            yield from self._feed(block, is_end)

    def _begin(self, opening: bytes) -> None:
        """A parser for what comes from `self._base` on, after the tags that are open there."""
        self._parser = parser = expat.ParserCreate(self.encoding) if opening else expat.ParserCreate()
        self._opening, self._first_byte, self._depth, self._unit = len(opening), self._base, 0, None
        parser.StartElementHandler, parser.EndElementHandler = self._start, self._end
        parser.CharacterDataHandler, parser.XmlDeclHandler = self._text, self._declared
        parser.EntityDeclHandler, parser.SkippedEntityHandler = self._entity_declared, self._entity_skipped
        parser.buffer_text = True
        parser.Parse(opening, False)

    def _byte(self) -> int:
        return self._first_byte + max(0, self._parser.CurrentByteIndex - self._opening)

    def _line(self) -> int:
        return self._lines_before + self._parser.CurrentLineNumber

    def _forget(self, until: int) -> None:
        """Bytes of the file before `until` are needed no more."""
        self._data, self._base = self._data[max(0, until - self._base) :], max(until, self._base)

    def _feed(self, block: bytes, is_end: bool) -> Rows:
        while True:
            if self._parser is None:
                found = NEXT_UNIT.search(self._data)
                until = self._base + (found.start() if found else max(0, len(self._data) - 8))
                self._lines_before += self._data[: until - self._base].count(b"\n")
                self._forget(until)
                if found is None:
                    return
                self._begin(OPEN_TAGS)
                block = self._data
            try:
                self._parser.Parse(block, is_end)
            except (expat.ExpatError, _NewUnit) as error:
                yield from self._take_done()
                yield self._recover(error)
            except UserError:
                raise
            except (ValueError, LookupError) as error:
                raise UserError(f"{self.name}: its encoding cannot be read ({error}). Convert it to UTF-8.") from None
            else:
                yield from self._take_done()
                self._let_go()
                return

    def _take_done(self) -> list[Row | Reject]:
        done, self._done = self._done, []
        return done

    def _let_go(self) -> None:
        here, most = self._byte(), self.limits.max_row_bytes
        if self._base + len(self._data) - here > most:
            raise UserError(f"{self.name}, line {self._line()}: a tag has more than {most:,} bytes. It is no TMX.")
        unit = self._unit
        if unit and unit.head is None and here - unit.start > most:
            unit.head = self._data[unit.start - self._base :][:LONG_ROW_CHARACTERS_KEPT]
            unit.pieces, unit.texts = None, {}
        self._forget(unit.start if unit and unit.head is None else here)

    def _recover(self, error: Exception) -> Reject:
        """What was read of the broken unit is a reject; the next one begins with the next <tu>."""
        unit, is_new_unit = self._unit, isinstance(error, _NewUnit)
        if is_new_unit:
            what, (here, line, column) = "a <tu> begins inside another one", error.args
        else:
            what, here, line = expat.ErrorString(error.code), self._byte(), self._line()
            column = self._parser.CurrentColumnNumber + 1
        fault = f"broken XML: {what}, line {line}, column {column}."
        if self.encoding == "utf-16" or (unit is None and self.row == 0):
            raise UserError(f"{self.name} cannot be read as TMX: {fault} Mend it there.")
        begin = unit.start if unit else here
        found = NEXT_UNIT.search(self._data, max(0, here - self._base) + (not is_new_unit))
        head = unit.head if unit and unit.head is not None else self._data[begin - self._base :]
        raw = head[: found.start() - (begin - self._base)] if found else head[:LONG_ROW_CHARACTERS_KEPT]
        if found is None and not is_new_unit and expat.errors.messages[error.code] in AT_THE_END:
            fault = f"the file ends before </tmx>, line {line}, column {column}."
            reject = Reject(self._next_origin(), None, CUT_OFF, fault, raw.decode(self.encoding, "replace"))
        else:
            reject = self._broken(raw, begin, here, fault)
        until = here if is_new_unit else here + 1
        self._lines_before = line - 1
        self._forget(until)
        self._parser = self._unit = None
        return reject

    def _broken(self, raw: bytes, begin: int, here: int, fault: str) -> Reject:
        """Expat calls a byte that is no UTF-8 an invalid token."""
        origin, text = self._next_origin(), raw.decode(self.encoding, "replace")
        if self.encoding == "utf-8":
            bad = bad_byte(self._data[here - self._base : here - self._base + 1], here)
            token = self._data[here - self._base : here - self._base + 4]
            if bad and not any(_is_utf8(token[:length]) for length in range(1, 5)):
                return Reject(origin, None, "invalid UTF-8", bad, text)
        return Reject(origin, None, "broken XML", fault, text)

    def _next_origin(self) -> Origin:
        self.row += 1
        return Origin(self.name, self.row)

    def _declared(self, version: str, encoding: str | None, standalone: int) -> None:
        if encoding and self.encoding == "utf-8":
            self.encoding = encoding.lower()

    def _entity_declared(self, name: str, *_: Any) -> None:
        raise UserError(
            f"{self.name}, line {self._line()}: it declares the entity '{name}', which is how XML is made to unpack"
            " without end or to read other files. Entities are not read: write their text in their place."
        )

    def _entity_skipped(self, name: str, is_parameter: bool) -> None:
        if self._unit and not is_parameter:
            reason = f"&{name}; at line {self._line()} is an entity that is not known; write its text in its place."
            self._unit.fault = ("unknown entity", reason, None)

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        if self._depth == 1 and tag != "tmx":
            raise UserError(f"{self.name}, line {self._line()}: it begins with <{tag[:40]}>, and <tmx> is due.")
        unit = self._unit
        if tag == "tu":
            if unit:
                raise _NewUnit(self._byte(), self._line(), self._parser.CurrentColumnNumber + 1)
            self._unit = _Unit(self._byte(), self._line())
        elif unit is None:
            return
        elif self._depth > self.limits.max_depth:
            unit.fault = ("nested too deeply", f"tags are nested deeper than {self.limits.max_depth}.", None)
        elif tag == "tuv":
            unit.language = attributes.get("xml:lang") or attributes.get("lang") or ""
        elif tag == "seg":
            unit.pieces = []
        elif tag in CODE_TAGS:
            unit.codes += 1

    def _text(self, text: str) -> None:
        unit = self._unit
        if unit and unit.pieces is not None and unit.head is None and not unit.codes:
            unit.pieces.append(text)

    def _end(self, tag: str) -> None:
        self._depth -= 1
        unit = self._unit
        if unit is None:
            return
        if tag == "seg" and unit.pieces is not None:
            language = unit.language
            if not language or language in unit.texts:
                what = f"has two <tuv> of '{language}'" if language else "has a <tuv> without xml:lang"
                unit.fault = unit.fault or ("unclear languages", f"the unit {what}.", language or None)
            unit.texts[language], unit.pieces = "".join(unit.pieces), None
        elif tag in CODE_TAGS:
            unit.codes -= 1
        elif tag == "tu":
            self._unit = None
            self._done.append(self._finish(unit))

    def _finish(self, unit: _Unit) -> Row | Reject:
        """Called at `</tu>`."""
        end = self._data.find(b">", self._byte() - self._base) + self._base + (2 if self.encoding == "utf-16" else 1)
        origin = self._next_origin()
        raw = self._data[unit.start - self._base : end - self._base] if unit.head is None else unit.head
        text = raw.decode(self.encoding, "replace")
        if unit.head is not None or len(raw) > self.limits.max_row_bytes:
            return too_large(origin, text, None, self.limits)
        if unit.fault:
            kind, reason, field = unit.fault
            return Reject(origin, field, kind, f"{reason} (line {unit.line})", text)
        return Row({"translation": unit.texts}, origin, text)


def _is_utf8(token: bytes) -> bool:
    try:
        token.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def tmx_chunks(file: File, limits: Limits) -> Iterator[Chunk]:
    with file.open(limits) as content:
        yield from in_chunks(TmxRows(file.name, limits).rows(content), lambda: content.position)
