"""JSON in files of any size: one object a line, or an array of objects. read_json_object.py reads one object as rows.

    {"instruction": "Add.", "output": "2"}          a line → Row({"instruction": "Add.", "output": "2"}, …)
    {"instruction": "Add." "output": "2"}           → Reject "broken JSON: Expecting ',' delimiter, line 2, column 22."
    {"output": "2", "output": "3"}                  → Reject "'output' occurs twice in one object; …", field "output"
    [{…}, {"a": b}, {…}]                            → Row, Reject, Row: rows 1, 2 and 3

Lines go to the workers as they stand in the file. An array is passed over with a window that holds one row and some
256 kB, and goes on after a broken row with the next `}, {` that begins like the other rows.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from diptych.data_prep.reading.chunks import (
    NOT_UTF8,
    Chunk,
    Finished,
    Rows,
    in_chunks,
    long_line,
    size_if_too_large,
    too_large,
    unreadable,
)
from diptych.data_prep.reading.files import (
    BLOCK_BYTES,
    LONG_ROW_CHARACTERS_KEPT,
    Content,
    File,
    Limits,
    Lines,
    LongLine,
    line_blocks,
)
from diptych.data_prep.rows.records import CUT_OFF, Origin, Reject, Row

SPACE = re.compile(r"[ \t\r\n]*")
NEXT_ROW = re.compile(r"\}\s*,\s*(?=\{)")
NEXT_OBJECT = re.compile(r",\s*(?=\{)")
JSON_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"')
FIRST_KEY = re.compile(r'\{\s*("[^"\\]*(?:\\.[^"\\]*)*")')
BOUNDARY_CHARACTERS = 4096  # what stands between two rows may lie on both sides of a block's end
MARKS_OUTSIDE_STRINGS = re.compile(r'["{}\[\]]')
MARKS_INSIDE_STRINGS = re.compile(r'["\\]')
SCALAR_END = re.compile(r"[,\]}\s]")
JSON_TYPE_NAMES = {str: "a string", bool: "true or false", int: "a number", float: "a number", list: "a list"}


class _Fault(ValueError):
    """JSON whose form is right and whose meaning is not."""

    def __init__(self, kind: str, reason: str, field: str | None = None) -> None:
        super().__init__(reason)
        self.kind, self.field = kind, field


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Plain JSON readers silently keep the last of two values for one key."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Fault("repeated field", f"'{twice}' occurs twice in one object; keep the right one", twice)
    return fields


def _no_number(name: str) -> None:
    raise _Fault("NaN or Infinity", f"{name} is no JSON; write null, a number, or a string")


STRICT_JSON = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_number)
LENIENT_JSON = json.JSONDecoder(parse_int=str)  # finds the end of what STRICT_JSON refuses for its meaning
_scan = STRICT_JSON.scan_once


def json_fault(error: Exception, place: Callable[[int], str], start: int) -> tuple[str, str, str | None]:
    """Kind, reason and field of what is wrong with a row that starts at `start`; `place` names a position in words."""
    if isinstance(error, json.JSONDecodeError):
        return "broken JSON", f"broken JSON: {error.msg}, {place(error.pos)}.", None
    if isinstance(error, _Fault):
        return error.kind, f"{error}, in the row at {place(start)}.", error.field
    if isinstance(error, RecursionError):
        return "nested too deeply", f"lists and objects nested too deeply, in the row at {place(start)}.", None
    return "number too long", f"a number has too many digits to be one, in the row at {place(start)}.", None


def _is_too_deep(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def json_value(text: str, limits: Limits) -> Any:
    """A value that a column holds as JSON text. ValueError "kind: what is wrong" where it is none."""
    try:
        value = STRICT_JSON.decode(text)
        if text.count("{") + text.count("[") > limits.max_depth and _is_too_deep(value, limits.max_depth):
            raise RecursionError
        return value
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON: {error.msg}, character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError(f"nested too deeply: lists and objects, deeper than {limits.max_depth}") from None
    except ValueError as error:
        kind = error.kind if isinstance(error, _Fault) else "number too long"
        raise ValueError(f"{kind}: {error}") from None


def checked_row(value: Any, raw: str, origin: Origin, limits: Limits) -> Row | Reject:
    """A decoded value as a row, if it is an object of bearable depth."""
    if not isinstance(value, dict):
        what = "null" if value is None else JSON_TYPE_NAMES.get(type(value), type(value).__name__)
        return Reject(origin, None, "not an object", f"the row is {what} ({raw[:60]}); an object {{…}} is due.", raw)
    if raw.count("{") + raw.count("[") > limits.max_depth and _is_too_deep(value, limits.max_depth):
        reason = f"lists and objects are nested deeper than {limits.max_depth}."
        return Reject(origin, None, "nested too deeply", reason, raw)
    return Row(value, origin, raw)


@dataclass(frozen=True)
class JsonLines:
    """Lines as they stand in the file; to decode them is the worker's part."""

    name: str
    lines: Lines
    bytes_done: int
    limits: Limits

    def rows(self) -> Rows:
        number, offset = self.lines.first_line - 1, None
        try:
            texts = self.lines.data.decode("utf-8").split("\n")
        except UnicodeDecodeError:
            texts, offset = self.lines.data.decode("utf-8", "surrogateescape").split("\n"), self.lines.offset
        has_long_line = len(self.lines.data) > self.limits.max_row_bytes
        for text in texts:
            number += 1
            try:
                value, end = _scan(text, 0)
                is_sound = end == len(text) and offset is None and not has_long_line
            except (StopIteration, ValueError, RecursionError):
                is_sound = False
            if is_sound:
                yield checked_row(value, text, Origin(self.name, number), self.limits)
            elif text.strip(" \t\r\ufeff"):
                yield self._odd_row(text.removesuffix("\r"), Origin(self.name, number), offset)
            if offset is not None:
                offset += len(text.encode("utf-8", "surrogateescape")) + 1

    def _odd_row(self, text: str, origin: Origin, offset: int | None) -> Row | Reject:
        """A line with blanks or a byte order mark (of files that were joined) about it, a fault in it, or a neighbour
        that is no UTF-8."""
        if size := size_if_too_large(text, self.limits):
            return too_large(origin, text, size, self.limits)
        if offset is not None and NOT_UTF8.search(text):
            return unreadable(origin, text, offset, "")
        try:
            value = STRICT_JSON.decode(text.removeprefix("\ufeff"))
        except (ValueError, RecursionError) as error:
            kind, reason, field = json_fault(error, lambda at: f"line {origin.row}, column {at + 1}", 0)
            return Reject(origin, field, kind, reason, text)
        return checked_row(value, text, origin, self.limits)


def jsonl_chunks(file: File, limits: Limits, mark: int) -> Iterator[Chunk]:
    """One object a line; blank lines are no rows."""
    with file.open(limits) as content:
        for lines in line_blocks(content, mark, limits):
            if isinstance(lines, LongLine):
                yield Finished((long_line(lines, file.name, limits),), content.position)
            else:
                yield JsonLines(file.name, lines, content.position, limits)


class Window:
    """The stretch of a long text that is being looked at. `at` is where reading stands in it."""

    def __init__(self, content: Content, mark: int, block_bytes: int) -> None:
        content.read(mark)
        self.text, self.at, self.has_bad_bytes, self.ended = "", 0, False, False
        self._content, self._undecoded, self._block_bytes = content, b"", block_bytes
        self._bytes_before, self._lines_before, self._column_before = mark, 0, 0
        self._characters_before = 0

    def more(self) -> bool:
        """Grow by a block, or by as much again as is still needed of what there is; False at the end."""
        if self.ended:
            return False
        block = self._content.read(max(self._block_bytes, len(self.text) - self.at))
        self.ended = not block
        data = self._undecoded + block
        try:
            text, used = codecs.utf_8_decode(data, "strict", self.ended)
        except UnicodeDecodeError:
            text, used = codecs.utf_8_decode(data, "surrogateescape", self.ended)
            self.has_bad_bytes = True
        self._undecoded = data[used:]
        self.text += text
        return bool(text) or self.more()

    def let_go(self) -> None:
        """Forget what lies behind, if that is most of the window: then it pays."""
        if 2 * self.at > len(self.text) and self.at:
            self.forget(self.at)

    def forget(self, position: int) -> None:
        gone = self.text[:position]
        self._bytes_before += len(gone) if gone.isascii() else len(gone.encode("utf-8", "surrogateescape"))
        self._characters_before += position
        line_end = gone.rfind("\n")
        self._column_before = len(gone) - line_end - 1 if line_end >= 0 else self._column_before + len(gone)
        self._lines_before += gone.count("\n")
        self.text, self.at = self.text[position:], max(0, self.at - position)

    def passed(self) -> int:
        """Characters of the text that lie behind; grows whenever reading goes on."""
        return self._characters_before + self.at

    def next_character(self) -> str:
        """The first that is no blank, from where reading stands, and stand there; '' at the end."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            self.let_go()
            if not self.more():
                return ""

    def place(self, position: int) -> str:
        line = self._lines_before + self.text.count("\n", 0, position) + 1
        line_end = self.text.rfind("\n", 0, position)
        column = position - line_end if line_end >= 0 else self._column_before + position + 1
        return f"line {line}, column {column}"

    def offset(self, position: int) -> int:
        return self._bytes_before + len(self.text[:position].encode("utf-8", "surrogateescape"))


def skip_value(window: Window) -> int | None:
    """Go past a list, object or string by its brackets and quotes alone; None if it is never closed.

    Returns how many characters it has. Nothing of it is kept, so it may be of any size.
    """
    depth, is_string, length = 0, False, 0
    position = window.at
    while True:
        marks = MARKS_INSIDE_STRINGS if is_string else MARKS_OUTSIDE_STRINGS
        found = marks.search(window.text, position)
        if found is None or (found.group() == "\\" and found.end() == len(window.text) and not window.ended):
            end = len(window.text) if found is None else found.start()
            length += end - window.at
            window.at = position = end
            window.let_go()
            position = window.at
            if not window.more():
                window.at = len(window.text)
                return None
            continue
        position, mark = found.end(), found.group()
        if mark == "\\":
            position += 1
        elif mark == '"':
            is_string = not is_string
        else:
            depth += 1 if mark in "[{" else -1
        if depth <= 0 and not is_string:
            length += position - window.at
            window.at = position
            return length


class _TooLarge(Exception):
    """The row at hand is beyond max_row_bytes."""


class ArrayRows:
    """The rows of a JSON array, decoded one by one as the window passes over them."""

    def __init__(self, window: Window, name: str, limits: Limits, is_whole_file: bool) -> None:
        self.window, self.name, self.limits, self.is_whole_file = window, name, limits, is_whole_file
        self.row = 0
        self.is_over = False
        """A `]` was seen, whatever came after it."""

        self.first_keys: set[str] = set()
        """The keys that rows begin with: they tell the next row from an object inside a broken one."""

    def rows(self) -> Rows:
        """From after the `[` to after the `]`."""
        window = self.window
        while True:
            window.let_go()
            character = window.next_character()
            if character == "" and self.is_over:
                return
            if character == "":
                fault = f"the file ends inside the array, {window.place(window.at)}."
                yield Reject(self._next_origin(), None, CUT_OFF, fault, "")
                return
            if character == "]":
                window.at += 1
                if self._is_end():
                    return
                self.is_over = True
                fault = f"broken JSON: text after the end of the array, {window.place(window.at)}."
                yield self._broken(*self._skip_to_next_row(window.at + 1, NEXT_ROW), fault)
            else:
                yield self._row()

    def _is_end(self) -> bool:
        follows = self.window.next_character()
        return follows == "" if self.is_whole_file else follows in (",", "}")

    def _next_origin(self) -> Origin:
        self.row += 1
        return Origin(self.name, self.row)

    def _broken(self, raw: str, offset: int, fault: str) -> Reject:
        raw = raw.rstrip(" \t\r\n").removesuffix(",")  # which belongs to the array
        return unreadable(self._next_origin(), raw, offset if self.window.has_bad_bytes else None, fault)

    def _row(self) -> Row | Reject:
        window = self.window
        try:
            value, raw = self._decode(STRICT_JSON)
        except _TooLarge:
            return self._skip_large_row()
        except json.JSONDecodeError as error:
            return self._skip_broken_row(error)
        except (ValueError, RecursionError) as error:
            return self._skip_senseless_row(error)
        has_bad_bytes = window.has_bad_bytes and NOT_UTF8.search(raw)
        offset = window.offset(window.at) if has_bad_bytes else None
        window.at += len(raw)
        end = window.passed()
        if fault := self._fault_after_row():
            blanks = window.passed() - end
            skipped, offset = self._skip_to_next_row(window.at, NEXT_ROW)
            offset -= blanks + len(raw.encode("utf-8", "surrogateescape"))
            return self._broken(raw + " " * blanks + skipped, offset, fault)
        if has_bad_bytes:
            return unreadable(self._next_origin(), raw, offset, "")
        if isinstance(value, dict) and value and len(self.first_keys) < 1000:
            self.first_keys.add(next(iter(value)))
        return checked_row(value, raw, self._next_origin(), self.limits)

    def _decode(self, decoder: json.JSONDecoder) -> tuple[Any, str]:
        """The value where the window stands, and its text. The window grows until the value fits, up to the limit."""
        window, most = self.window, self.limits.max_row_bytes
        while True:
            start, size = window.at, len(window.text)
            try:
                value, end = decoder.raw_decode(window.text, start)
                if end < size or not window.more():  # at the very end of the window, a number may go on
                    break
            except json.JSONDecodeError as error:
                may_be_cut = error.pos > size - 16 or error.msg.startswith("Unterminated string")
                if may_be_cut and size - start > most:
                    raise _TooLarge from None
                if not may_be_cut or not window.more():
                    raise
        raw = window.text[start:end]
        if size_if_too_large(raw, self.limits):
            raise _TooLarge
        return value, raw

    def _fault_after_row(self) -> str | None:
        """After a row comes a comma, or the end of the array; the window goes on to what comes next."""
        window = self.window
        follows = window.next_character()
        if follows == ",":
            window.at += 1
        if follows in (",", "]", ""):
            return None
        return f"broken JSON: ',' or ']' expected after the row, {window.place(window.at)}."

    def _skip_broken_row(self, error: json.JSONDecodeError) -> Reject:
        window, start = self.window, self.window.at
        fault = f"broken JSON: {error.msg}, {window.place(error.pos)}."
        if window.text[start] == ",":  # a comma too many
            window.at += 1
            return Reject(self._next_origin(), None, "broken JSON", fault, ",")
        if error.pos > start and window.text.startswith("{", error.pos) and self._begins_a_row(error.pos):
            offset, window.at = window.offset(start), error.pos  # what closes this row is missing
            return self._broken(window.text[start : error.pos], offset, fault)
        pattern = NEXT_ROW if window.text[start] == "{" else NEXT_OBJECT
        return self._broken(*self._skip_to_next_row(start + 1, pattern), fault)

    def _skip_senseless_row(self, error: Exception) -> Reject:
        """Its form is right, so that its end can be found."""
        window, start = self.window, self.window.at
        kind, reason, field = json_fault(error, window.place, start)
        try:
            _, raw = self._decode(LENIENT_JSON)
            window.at += len(raw)
        except _TooLarge:
            return self._skip_large_row()
        except json.JSONDecodeError as broken:
            return self._skip_broken_row(broken)
        except RecursionError:
            raw = window.text[start : start + LONG_ROW_CHARACTERS_KEPT]
            skip_value(window)
        if self._fault_after_row():
            raw += self._skip_to_next_row(window.at, NEXT_ROW)[0]
        return Reject(self._next_origin(), field, kind, reason, raw)

    def _skip_large_row(self) -> Reject:
        window = self.window
        head = window.text[window.at : window.at + LONG_ROW_CHARACTERS_KEPT]
        if key := self._key_at(window.at):
            self.first_keys.add(key)
        is_closed = skip_value(window) if head[0] in '[{"' else None
        if self._fault_after_row() or not is_closed:
            self._skip_to_next_row(window.at, NEXT_ROW)
        return too_large(self._next_origin(), head, None, self.limits)

    def _skip_to_next_row(self, search_from: int, pattern: re.Pattern) -> tuple[str, int]:
        """Go to the next row, or to the end if there is none. Returns the text gone past, where it is not too long,
        and its offset in the file."""
        window, offset = self.window, self.window.offset(self.window.at)
        if search_from == window.at and self._begins_a_row(window.at):  # a comma is missing between two rows
            return "", offset
        own_key = self._key_at(window.at)
        begin, long_head, is_first, is_last = search_from, None, not self.first_keys, False
        while True:
            seen = len(window.text)  # to judge what is found, the window may grow: that is searched next time
            found = self._find_row(search_from, pattern, own_key)
            if found is None and is_first and (is_last or seen - window.at > BLOCK_BYTES):
                found = self._find_sound_row(begin, pattern)  # nothing is known yet of how rows begin
                is_first = False
            if found is not None or is_last:
                end = len(window.text) if found is None else found
                skipped, window.at = window.text[window.at : end], end
                return long_head or skipped, offset
            search_from = max(search_from, seen - BOUNDARY_CHARACTERS)
            if seen - window.at > self.limits.max_row_bytes:
                long_head = long_head or window.text[window.at : window.at + LONG_ROW_CHARACTERS_KEPT]
                window.forget(search_from)
                window.at = begin = search_from = 0
            is_last = not window.more()

    def _find_row(self, search_from: int, pattern: re.Pattern, own_key: str | None) -> int | None:
        for found in pattern.finditer(self.window.text, search_from):
            if self._begins_a_row(found.end(), own_key):
                return found.end()
        return None

    def _find_sound_row(self, search_from: int, pattern: re.Pattern) -> int | None:
        for found in pattern.finditer(self.window.text, search_from):
            try:
                STRICT_JSON.raw_decode(self.window.text, found.end())
            except (ValueError, RecursionError):
                continue
            return found.end()
        return None

    def _begins_a_row(self, position: int, own_key: str | None = None) -> bool:
        key, known = self._key_at(position), self.first_keys or ({own_key} if own_key else None)
        return self.window.text.startswith("{", position) and (known is None or key in known)

    def _key_at(self, position: int) -> str | None:
        while len(self.window.text) < position + BOUNDARY_CHARACTERS and self.window.more():
            pass
        found = FIRST_KEY.match(self.window.text, position)
        try:
            return found and LENIENT_JSON.decode(found.group(1))
        except ValueError:
            return None


def json_chunks(file: File, limits: Limits, mark: int) -> Iterator[Chunk]:
    """An array of objects, of which one at a time is in memory."""
    with file.open(limits) as content:
        window = Window(content, mark, limits.block_bytes)
        window.next_character()
        window.at += 1
        rows = ArrayRows(window, file.name, limits, is_whole_file=True).rows()
        yield from in_chunks(rows, lambda: content.position)
