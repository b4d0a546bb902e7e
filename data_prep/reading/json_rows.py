"""JSON in files of any size: one object a line, an array of objects, or one object as a whole file.

    {"instruction": "Add.", "output": "2"}          a line → Row({"instruction": "Add.", "output": "2"}, …)
    {"instruction": "Add." "output": "2"}           → Reject "broken JSON: Expecting ',' delimiter, line 2, column 22."
    {"output": "2", "output": "3"}                  → Reject "'output' occurs twice in one object; …", field "output"
    [{…}, {"a": b}, {…}]                            → Row, Reject, Row: rows 1, 2 and 3
    {"version": 1, "data": [{…}, {…}]}              a whole file: the rows in `data`, one at a time in memory
    {"instruction": "a", "output": "b"}             a whole file: one row; so are {"messages": […]} and a task of
                                                    Super-NaturalInstructions, up to `max_object_bytes`

An array is read through a window that holds one row and some 256 kB. After a broken row, reading goes on at the next
object that begins with the same key as other rows. (ijson would stop at the first broken row, and gives neither the
row's own text nor keys that occur twice; orjson has no way to find such keys, and reads a file as a whole.)
"""

import functools
import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from diptych.data_prep.command_line.errors import UserError, excerpt
from diptych.data_prep.reading.find_files import BLOCK_BYTES, Content, File, Limits, shell_command
from diptych.data_prep.reading.lines import BYTE_ORDER_MARK
from diptych.data_prep.reading.row_chunks import (
    KNOWN_COLUMNS,
    LONG_ROW_CHARACTERS_KEPT,
    Chunk,
    Finished,
    Rows,
    in_chunks,
    size_if_too_large,
    too_large,
    unreadable,
)
from diptych.data_prep.reading.text_encoding import NOT_UTF8
from diptych.data_prep.reading.text_window import SPACE, Window
from diptych.data_prep.rows.records import CUT_OFF, RAW_CHARACTERS_KEPT, Origin, Reject, Row
from diptych.data_prep.rows.valid_text import JSON_TYPE_NAMES, listed

JSON_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"')
OBJECT_START = re.compile(rf"\{{(?=\s*({JSON_STRING.pattern}))")
LONGEST_START = 4096
"""Characters: the `{` of a row and its first key, which may lie on both sides of a window's end."""

MARKS_OUTSIDE_STRINGS = re.compile(r'["{}\[\]]')
MARKS_INSIDE_STRINGS = re.compile(r'["\\]')
MOST_FIRST_KEYS = 1000

TASK_KEYS = frozenset(("Definition", "Instances"))
TURN_KEYS = frozenset(("messages", "conversations"))
LONGEST_KEY = 4 * BLOCK_BYTES
VALUE_END = re.compile(r"[,\]}\s]")
JQ_COLUMNS = (
    "with_entries(select(.value | arrays, objects))"
    " | [(to_entries[0].value | keys_unsorted[]) as $key | map_values(.[$key])]"
)
"""For jq: an object of columns, which are lists or objects, as a list of rows."""


class JsonFault(ValueError):
    """JSON whose form is right and whose meaning is not."""

    def __init__(self, kind: str, reason: str, field: str | None = None) -> None:
        super().__init__(reason)
        self.kind, self.field = kind, field


def unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Plain JSON readers silently keep the last of two values for one key."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise JsonFault("repeated field", f"'{twice}' occurs twice in one object; keep the right one", twice)
    return fields


def _no_number(name: str) -> None:
    raise JsonFault("NaN or Infinity", f"{name} is no JSON; write null, a number, or a string")


STRICT_JSON = json.JSONDecoder(object_pairs_hook=unrepeated, parse_constant=_no_number)
LENIENT_JSON = json.JSONDecoder(parse_int=str)
"""Finds the end of what STRICT_JSON refuses for its meaning."""

Fault = tuple[str, str, str | None]
"""Kind, reason and field."""


def json_fault(error: Exception, place: Callable[[int], str], start: int) -> Fault:
    """What is wrong with a row that starts at `start`; `place` names a position in words."""
    if isinstance(error, json.JSONDecodeError):
        return "broken JSON", f"broken JSON: {error.msg}, {place(error.pos)}.", None
    if isinstance(error, JsonFault):
        return error.kind, f"{error}, in the row at {place(start)}.", error.field
    if isinstance(error, RecursionError):
        return "nested too deeply", f"lists and objects nested too deeply, in the row at {place(start)}.", None
    return "number too long", f"a number has too many digits to be one, in the row at {place(start)}.", None


def is_too_deep(value: Any, text: str, limits: Limits) -> bool:
    """Whether a value, decoded from `text`, has lists and objects inside one another beyond the limit."""
    if text.count("{") + text.count("[") <= limits.max_depth:
        return False
    level = [value]
    for _ in range(limits.max_depth):
        parts = [part for outer in level for part in (outer.values() if isinstance(outer, dict) else outer)]
        level = [part for part in parts if isinstance(part, dict | list)]
    return bool(level)


def checked_row(value: Any, raw: str, origin: Origin, limits: Limits) -> Row | Reject:
    """A decoded value as a row, if it is an object that is not nested too deeply."""
    if not isinstance(value, dict):
        what = JSON_TYPE_NAMES.get(type(value), type(value).__name__)
        reason = f"the row is {what} ({excerpt(raw, 60)}); an object {{…}} is due."
        return Reject(origin, None, "not an object", reason, raw)
    if is_too_deep(value, raw, limits):
        reason = f"lists and objects are nested deeper than {limits.max_depth}."
        return Reject(origin, None, "nested too deeply", reason, raw)
    return Row(value, origin, raw)


def json_row(text: str, origin: Origin, limits: Limits) -> Row | Reject:
    """The row of a line of JSON."""
    try:
        value, end = STRICT_JSON.scan_once(text, 0)  # faster than decode, which passes over blanks
        if end == len(text):
            return checked_row(value, text, origin, limits)
    except (StopIteration, ValueError, RecursionError):
        pass
    try:
        value = STRICT_JSON.decode(text.removeprefix(BYTE_ORDER_MARK))
    except (ValueError, RecursionError) as error:
        kind, reason, field = json_fault(error, lambda at: f"line {origin.row}, column {at + 1}", 0)
        return Reject(origin, field, kind, reason, text)
    return checked_row(value, text, origin, limits)


def skip_value(window: Window) -> bool:
    """Go past a list, object or string by its brackets and quotes alone; False if it is never closed.

    Nothing of it is kept, so it may be of any size.
    """
    depth, is_string, position = 0, False, window.at
    while True:
        marks = MARKS_INSIDE_STRINGS if is_string else MARKS_OUTSIDE_STRINGS
        found = marks.search(window.text, position)
        if found is None or (found.group() == "\\" and found.end() == len(window.text) and not window.ended):
            window.at = len(window.text) if found is None else found.start()
            window.trim()
            position = window.at
            if not window.more():
                window.at = len(window.text)
                return False
            continue
        position, mark = found.end(), found.group()
        if mark == "\\":
            position += 1
        elif mark == '"':
            is_string = not is_string
        else:
            depth += 1 if mark in "[{" else -1
        if depth <= 0 and not is_string:
            window.at = position
            return True


class _TooLarge(Exception):
    """The row at hand is beyond max_row_bytes."""


class ArrayRows:
    """The rows of a JSON array, decoded one by one as the window moves over them."""

    def __init__(self, window: Window, name: str, limits: Limits, is_whole_file: bool) -> None:
        self.window, self.name, self.limits, self.is_whole_file = window, name, limits, is_whole_file
        self.row = 0
        self.first_keys: set[str] = set()
        """The keys that rows begin with. They tell the next row from an object inside a broken one."""

    def rows(self) -> Rows:
        """From after the `[` to after the `]`."""
        window, has_ended = self.window, False
        while True:
            window.trim()
            character = window.next_character()
            if character == "":
                if not has_ended:
                    fault = f"the file ends inside the array, {window.place(window.at)}."
                    yield Reject(self._next_origin(), None, CUT_OFF, fault, "")
                return
            if character != "]":
                yield self.next_row(character)
                continue
            window.at += 1
            follows = window.next_character()
            if follows == "" if self.is_whole_file else follows in (",", "}"):
                return
            has_ended = True
            fault = f"broken JSON: text after the end of the array, {window.place(window.at)}."
            yield self._broken(*self._skip_to_next_row(window.at + 1), fault)

    def _next_origin(self) -> Origin:
        self.row += 1
        return Origin(self.name, self.row)

    def _broken(self, raw: str, offset: int, fault: str) -> Reject:
        raw = raw.rstrip(" \t\r\n").removesuffix(",")  # which belongs to the array
        return unreadable(self._next_origin(), raw, offset if self.window.has_bad_bytes else None, fault)

    def next_row(self, character: str) -> Row | Reject:
        """The value that begins with `character`, where the window stands; the window goes on to what comes next."""
        window, fault = self.window, None
        try:
            try:
                value, raw = self._decode(STRICT_JSON)
            except json.JSONDecodeError:
                raise
            except (ValueError, RecursionError) as error:
                fault = json_fault(error, window.place, window.at)
                value, raw = self._decode(LENIENT_JSON)
        except json.JSONDecodeError as error:
            broken = f"broken JSON: {error.msg}, {window.place(error.pos)}."
            if character != ",":
                return self._broken(*self._skip_to_next_row(window.at + 1), broken)
            window.at += 1  # a comma too many
            return Reject(self._next_origin(), None, "broken JSON", broken, ",")
        except (_TooLarge, RecursionError):
            return self._skip_by_brackets(fault)
        has_bad_bytes = window.has_bad_bytes and NOT_UTF8.search(raw)
        offset = window.offset(window.at) if window.has_bad_bytes else 0
        window.at += len(raw)
        end = window.characters_read()
        if broken := self._fault_after_row():
            raw += " " * (window.characters_read() - end) + self._skip_to_next_row(window.at)[0]
            return self._broken(raw, offset, broken)
        if has_bad_bytes:
            return unreadable(self._next_origin(), raw, offset, "")
        if fault:
            kind, reason, field = fault
            return Reject(self._next_origin(), field, kind, reason, raw)
        if isinstance(value, dict) and value and len(self.first_keys) < MOST_FIRST_KEYS:
            self.first_keys.add(next(iter(value)))
        return checked_row(value, raw, self._next_origin(), self.limits)

    def _decode(self, decoder: json.JSONDecoder) -> tuple[Any, str]:
        """The value where the window stands, and its text. The window grows until the value fits, up to the limit."""
        window = self.window
        while True:
            start, size = window.at, len(window.text)
            try:
                value, end = decoder.raw_decode(window.text, start)
                if end < size or not window.more():  # at the very end of the window, a number may go on
                    break
            except json.JSONDecodeError as error:
                may_be_cut = error.pos > size - 16 or error.msg.startswith("Unterminated string")
                if may_be_cut and size - start > self.limits.max_row_bytes:
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

    def _skip_by_brackets(self, fault: Fault | None) -> Reject:
        """Go past a row that is too deep or too large to be decoded."""
        window = self.window
        head = window.text[window.at : window.at + LONG_ROW_CHARACTERS_KEPT]
        if key := self._first_key(window.at):
            self.first_keys.add(key)
        is_closed = head[0] in '[{"' and skip_value(window)
        if self._fault_after_row() or not is_closed:
            self._skip_to_next_row(window.at)
        if fault is None:
            return too_large(self._next_origin(), head, None, self.limits)
        kind, reason, field = fault
        return Reject(self._next_origin(), field, kind, reason, head)

    def _skip_to_next_row(self, search_from: int) -> tuple[str, int]:
        """Go to the next row, or to the end if there is none. Returns the text gone past, of which only the beginning
        is kept if it is too long, and its offset in the file."""
        window, offset = self.window, self.window.offset(self.window.at)
        begin, head, own_key = search_from, None, self._first_key(window.at)
        known = self.first_keys or {own_key} - {None}
        while True:
            seen, is_last = len(window.text), window.ended
            found = self._find_row(search_from, known)
            if found is None and not self.first_keys and (is_last or seen - window.at > BLOCK_BYTES):
                found = self._find_row(begin)  # nothing is known yet of how rows begin
            if found is not None or is_last:
                end = seen if found is None else found
                skipped, window.at = window.text[window.at : end], end
                return head or skipped, offset
            search_from = max(search_from, seen - LONGEST_START)
            if seen - window.at > self.limits.max_row_bytes:
                head = head or window.text[window.at : window.at + LONG_ROW_CHARACTERS_KEPT]
                window.forget(search_from)
                window.at = begin = search_from = 0
            window.more()

    def _find_row(self, search_from: int, known: set[str] | None = None) -> int | None:
        """Where the next object begins that is no value of a key, is not first in a list, and has a known first key;
        without `known`, one that can be decoded."""
        text = self.window.text
        for found in OBJECT_START.finditer(text, search_from):
            start = found.start()
            before = text[max(0, start - LONGEST_START) : start].rstrip()[-1:]
            if before in (":", "["):
                continue
            if _decoded(text, start) is not None if known is None else _decoded(found[1], 0) in known:
                return start
        return None

    def _first_key(self, position: int) -> str | None:
        while len(self.window.text) < position + LONGEST_START and self.window.more():
            pass
        found = OBJECT_START.match(self.window.text, position)
        return _decoded(found[1], 0) if found else None


def _decoded(text: str, start: int) -> Any:
    """None for what is broken."""
    try:
        return LENIENT_JSON.raw_decode(text, start)[0]
    except (ValueError, RecursionError):
        return None


def array_chunks(file: File, limits: Limits, mark: int) -> Iterator[Chunk]:
    """The rows of an array, of which one at a time is in memory."""
    with Content(file, limits) as content:
        window = Window(content, mark, limits.block_bytes)
        window.next_character()
        window.at += 1
        rows = ArrayRows(window, file.name, limits, is_whole_file=True).rows()
        yield from in_chunks(rows, lambda: content.position)


# One object as a whole file: which part of it is the rows


def object_reader(file: File, limits: Limits, mark: int) -> tuple[Callable[..., Iterator[Chunk]], list[str]]:
    """What reads the file as the other readers do, and the notes on it. The file is read through once, to see what it
    has."""
    with Content(file, limits) as content:
        window = Window(content, mark, limits.block_bytes)
        kinds = {key: _kind(window) for key in _members(window, file.name)}
        if window.next_character():
            raise UserError(
                f"{file.name}, {window.place(window.at)}: text after the end of the object. If the file has one object"
                " a line, name it .jsonl; if it has several objects, write them into one array: jq -s ."
            )
    if TASK_KEYS & kinds.keys():
        return one_row_chunks, []
    has_names = len(KNOWN_COLUMNS & {key.casefold() for key in kinds}) > 1
    rows = [key for key, kind in kinds.items() if kind == "rows"]
    are_values = set(kinds.values()) <= {"value"}
    if TURN_KEYS.intersection(rows) or (has_names and are_values):
        return one_row_chunks, ["read as one row"]
    lists = {key.casefold() for key, kind in kinds.items() if kind in ("rows", "list")}
    if len(rows) == 1 and (len(KNOWN_COLUMNS & lists) < 2):  # else a list of objects is a column like the others
        return functools.partial(member_chunks, key=rows[0]), []
    meant = {"it is one row": "[.]"} if are_values else {"each key is a column": JQ_COLUMNS, "each is a row": "[.[]]"}
    meant |= {f"the rows are those in '{key}'": f".[{json.dumps(key)}]" for key in rows[:3]}
    commands = [
        f"{what}: {shell_command(f'jq {shlex.quote(program)}', file.name, 'rows.json')}"
        for what, program in meant.items()
    ]
    raise UserError(
        f"{file.name}, line 1, column 1: a JSON object stands here, and a list of rows is due: [{{…}}, {{…}}]. An"
        f" object may hold one such list; the keys of this one are {listed(kinds) or 'none'}. If "
        + "; if ".join(commands)
    )


def member_chunks(file: File, limits: Limits, mark: int, key: str) -> Iterator[Chunk]:
    """The list of rows under one key, one at a time."""
    with Content(file, limits) as content:
        window = Window(content, mark, limits.block_bytes)
        array = ArrayRows(window, file.name, limits, is_whole_file=False)

        def rows() -> Rows:
            for name in _members(window, file.name):
                if name == key:
                    window.at += 1
                    yield from array.rows()
            while window.more():  # to the end, where the file is checked for changes
                window.forget(len(window.text))

        yield from in_chunks(rows(), lambda: content.position)


def one_row_chunks(file: File, limits: Limits, mark: int) -> Iterator[Chunk]:
    """The object as one row, which is in memory as a whole."""
    with Content(file, limits) as content:
        window = Window(content, mark, limits.block_bytes)
        limits = replace(limits, max_row_bytes=limits.max_object_bytes)
        row = ArrayRows(window, file.name, limits, is_whole_file=True).next_row(window.next_character())
        yield Finished((replace(row, raw=row.raw[:RAW_CHARACTERS_KEPT]),), file.bytes)


def _members(window: Window, name: str) -> Iterator[str]:
    """The keys of the object. At each, the window stands at its value, which the caller may read; else it is skipped.
    UserError where the object is broken outside of the values that the caller reads."""

    def expect(characters: str) -> str:
        found = window.next_character()
        if not found or found not in characters:
            shown = repr(found) if found else "the end of the file"
            due = " or ".join(repr(character) for character in characters)
            raise UserError(
                f"{name}: broken JSON, {window.place(window.at)}: {shown} stands where {due} is due, outside of any"
                " row, so that the file cannot be read. Correct it there."
            )
        return found

    expect("{")
    window.at += 1
    while expect('"}') == '"':
        while JSON_STRING.match(window.text, window.at) is None and len(window.text) - window.at < LONGEST_KEY:
            if not window.more():
                break
        try:
            key, window.at = LENIENT_JSON.raw_decode(window.text, window.at)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{name}: broken JSON: {error.msg}, {window.place(error.pos)}. Correct it there."
            ) from None
        expect(":")
        window.at += 1
        first = window.next_character() or expect("{[")
        before = window.characters_read()
        yield key
        if window.characters_read() == before:
            skip_value(window) if first in '[{"' else _skip_scalar(window)
        if expect(",}") == ",":
            window.at += 1
    window.at += 1


def _skip_scalar(window: Window) -> None:
    while (end := VALUE_END.search(window.text, window.at)) is None:
        window.forget(len(window.text))
        if not window.more():
            return
    window.at = end.start()


def _kind(window: Window) -> str:
    """What begins where the window stands: rows (a list of objects), list (of anything else), object or value."""
    start = window.text[window.at]
    if start != "[":
        return "object" if start == "{" else "value"
    while (place := SPACE.match(window.text, window.at + 1).end()) == len(window.text):
        if len(window.text) - window.at > LONGEST_KEY or not window.more():
            break
    return {"{": "rows", "]": "value"}.get(window.text[place : place + 1], "list")
