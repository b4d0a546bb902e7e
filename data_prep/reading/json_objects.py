"""One JSON object that is a whole file: which part of it is the rows, and how they are read.

    {"version": 1, "data": [{…}, {…}]}                      the rows in `data`, one at a time in memory
    {"instruction": ["a", "b"], "output": ["c", "d"]}       columns: a row for each place
    {"instruction": {"0": "a", "1": "b"}, "output": {…}}    the same, as pandas writes it
    {"columns": ["instruction", …], "data": [["a", …]]}     the same, with pandas' orient="split"
    {"q1": {"instruction": "a", "output": "c"}, "q2": {…}}  a row for each key
    {"instruction": "a", "output": "b"}                     one row; so are {"messages": […]} and a task of
    {"Definition": […], "Instances": […]}                   Super-NaturalInstructions

A note says what an object was taken for. If that cannot be told, it is refused with a command for each possible
meaning. All but the first are in memory as a whole, up to `max_object_bytes`.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.reading.chunks import (
    KNOWN_COLUMNS,
    Chunk,
    Finished,
    Rows,
    in_chunks,
    size_if_too_large,
    too_large,
)
from diptych.data_prep.reading.files import BLOCK_BYTES, File, Limits
from diptych.data_prep.reading.json_rows import (
    JSON_STRING,
    LENIENT_JSON,
    STRICT_JSON,
    ArrayRows,
    checked_row,
    json_fault,
    skip_value,
)
from diptych.data_prep.reading.text_encoding import bad_byte
from diptych.data_prep.reading.text_window import SPACE, Window
from diptych.data_prep.rows.records import RAW_CHARACTERS_KEPT, Origin, Reject, Row
from diptych.data_prep.rows.valid_text import listed

TASK_KEYS = frozenset(("Definition", "Instances"))
TURN_KEYS = frozenset(("messages", "conversations"))
SPLIT_KEYS = frozenset(("columns", "data"))
COMMANDS_SHOWN = 3
LOOKED_AT = 4 * BLOCK_BYTES
"""Characters of a key, or of the beginning of a value, that are looked at."""

VALUE_END = re.compile(r"[,\]}\s]")
JQ_COLUMNS = "[(to_entries[0].value | keys_unsorted[]) as $key | map_values(.[$key])]"
"""For jq: an object of columns, which are lists or objects, as a list of rows."""

RowsOfObject = Callable[[dict[str, Any]], Iterator[dict[str, Any]]]


@dataclass(frozen=True)
class _Member:
    """What stands under one key of the object, as far as its beginning says."""

    kind: str
    """rows (a list whose first value is an object), list (that holds anything else), object or value."""
    names: frozenset[str] = frozenset()
    """The keys of the object, or of the first row; in lower case, like the names that data sets give to columns."""


def object_reader(file: File, limits: Limits, mark: int) -> tuple[Callable[..., Iterator[Chunk]], list[str]]:
    """What reads the file as the other readers do, and the notes on it. The file is read through once, to see what it
    has."""
    with file.open(limits) as content:
        window = Window(content, mark, limits.block_bytes)
        members = {key: _member(window) for key in _members(window, file.name)}
        if window.next_character():
            raise UserError(
                f"{file.name}, {window.place(window.at)}: text after the end of the object. If the file has one object"
                " a line, name it .jsonl; if it has several objects, write them into one array: jq -s ."
            )
    if TASK_KEYS & members.keys():
        return one_row_chunks, []
    if _is_one_row(members):
        return one_row_chunks, ["read as one row"]
    if (key := _rows_key(members)) is not None:
        others = [name for name, member in members.items() if member.kind == "rows" and name != key]
        notes = [f"its rows are those in '{key}', and not those in {listed(others)}"] if others else []
        return functools.partial(member_chunks, key=key), notes
    if (table := _table(members)) is None:
        raise UserError(_cannot_tell(file, members))
    rows_of, what = table
    return functools.partial(table_chunks, rows_of=rows_of), [f"read as {what}"]


def _is_one_row(members: Mapping[str, _Member]) -> bool:
    """A conversation, or only values, with names that data sets give to columns."""
    is_known = len(KNOWN_COLUMNS & {key.casefold() for key in members}) > 1
    are_values = all(member.kind == "value" for member in members.values())
    return (is_known and are_values) or any(members[key].kind == "rows" for key in TURN_KEYS & members.keys())


def _rows_key(members: Mapping[str, _Member]) -> str | None:
    """The one list of rows; of several, the one whose rows have known names of columns."""
    if len(_columns(members, KNOWN_COLUMNS)) > 1:  # a list of objects is a column like the others
        return None
    rows = [key for key, member in members.items() if member.kind == "rows"]
    with_names = [key for key in rows if members[key].names & KNOWN_COLUMNS]
    return next((found[0] for found in (rows, with_names) if len(found) == 1), None)


def _columns(members: Mapping[str, _Member], known: frozenset[str] | None = None) -> list[str]:
    """The keys of lists, if one of these is no list of objects: they are columns. With `known`, only those in it."""
    keys = [key for key, member in members.items() if member.kind in ("list", "rows")]
    if all(members[key].kind == "rows" for key in keys):
        return []
    return [key for key in keys if known is None or key.casefold() in known]


def _table(members: Mapping[str, _Member]) -> tuple[RowsOfObject, str] | None:
    """How rows are made of an object without a list of them, and what that is in words."""
    kinds = {member.kind for member in members.values()}
    if members.keys() >= SPLIT_KEYS and all(members[key].kind == "list" for key in SPLIT_KEYS):
        return _rows_of_split, "a table of 'columns' and 'data'"
    columns = _columns(members)
    if len(columns) > 1 or _columns(members, KNOWN_COLUMNS) or (columns and "object" not in kinds):
        others = [key for key in members if key not in columns]
        unused = f"; {listed(others)} is not used" if others else ""
        return functools.partial(_rows_of_columns, columns=columns), f"columns: {listed(columns)}{unused}"
    if kinds != {"object"}:
        return None
    inner = frozenset().union(*(member.names for member in members.values()))
    outer = frozenset(key.casefold() for key in members)
    are_columns = bool(outer & KNOWN_COLUMNS) or (bool(inner) and all(name.isdecimal() for name in inner))
    are_rows = bool(inner & KNOWN_COLUMNS) or all(key.isdecimal() for key in outer)
    if are_columns and not are_rows:
        return functools.partial(_rows_of_columns, columns=list(members)), f"columns: {listed(members)}"
    if are_rows and not are_columns:
        keys = listed(list(members)[:2])
        return dict.values, f"a row for each key; the keys themselves ({keys} …) are not used"
    return None


def _cannot_tell(file: File, members: Mapping[str, _Member]) -> str:
    head = f"{file.name}, line 1, column 1: a JSON object stands here, and a list of rows is due: [{{…}}, {{…}}]."
    if not members:
        return f"{head} It is empty."
    kinds = {member.kind for member in members.values()}
    if kinds == {"object"}:
        as_rows, as_columns = _command(file, "[.[]]"), _command(file, JQ_COLUMNS)
        return f"{head} Is each of its members a row? Then {as_rows}. If each is a column, {as_columns}."
    if kinds == {"value"}:
        return f"{head} This one has no list of rows: {listed(members)}. If it is one row: {_command(file, '[.]')}."
    lists = [key for key, member in members.items() if member.kind == "rows"]
    parts = lists or [key for key, member in members.items() if member.kind != "value"]
    what = f"several lists of rows: {listed(lists)}" if lists else f"no list of rows: {listed(members)}"
    commands = ", or ".join(_command(file, f".[{json.dumps(key)}]", key) for key in parts[:COMMANDS_SHOWN])
    return f"{head} An object may hold one such list; this one has {what}. Take out what is meant: {commands}."


def _command(file: File, program: str, key: str = "rows") -> str:
    """For the shell: what `program` makes of the file, in a file beside it that is called after the key."""
    stem = Path(file.name).with_suffix("") if file.packed else Path(file.name)
    beside = re.sub(r"[^\w-]", "_", key)[:40]
    result = shlex.quote(str(stem.with_suffix(f".{beside}.json")))
    name, jq = shlex.quote(file.name), f"jq {shlex.quote(program)}"
    return f"{file.packed} -dc {name} | {jq} > {result}" if file.packed else f"{jq} {name} > {result}"


# Rows of a member, one at a time


def member_chunks(file: File, limits: Limits, mark: int, key: str) -> Iterator[Chunk]:
    """The list of rows under one key."""
    with file.open(limits) as content:
        window = Window(content, mark, limits.block_bytes)
        yield from in_chunks(_rows_of_member(window, key, file.name, limits), lambda: content.position)


def _rows_of_member(window: Window, wanted: str, name: str, limits: Limits) -> Rows:
    array = ArrayRows(window, name, limits, is_whole_file=False)
    for key in _members(window, name):
        if key == wanted:
            window.at += 1
            yield from array.rows()
    while window.more():  # to the end, where the file is checked for changes
        window.forget(len(window.text))


def _members(window: Window, name: str) -> Iterator[str]:
    """The keys of the object. At each, the window stands at its value, which the caller may read; else it is skipped.

    Raises:
        UserError: the object is broken outside of the values that the caller reads.
    """

    def expect(characters: str) -> str:
        found = window.next_character()
        if not found or found not in characters:
            shown = repr(found) if found else "the end of the file"
            due = " or ".join(repr(character) for character in characters)
            raise UserError(
                f"{name}: broken JSON, {window.place(window.at)}: {shown} stands where {due} is due, outside of any"
                " row, so that the file cannot be read. Mend it there."
            )
        return found

    expect("{")
    window.at += 1
    while expect('"}') == '"':
        while JSON_STRING.match(window.text, window.at) is None and len(window.text) - window.at < LOOKED_AT:
            if not window.more():
                break
        try:
            key, window.at = LENIENT_JSON.raw_decode(window.text, window.at)
        except json.JSONDecodeError as error:
            raise UserError(f"{name}: broken JSON: {error.msg}, {window.place(error.pos)}. Mend it there.") from None
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


def _member(window: Window) -> _Member:
    """What the value where the window stands is, by its beginning."""
    start = window.text[window.at]
    if start == "{":
        return _Member("object", _names(window, 0))
    if start != "[":
        return _Member("value")
    while (place := SPACE.match(window.text, window.at + 1).end()) == len(window.text):
        if len(window.text) - window.at > LOOKED_AT or not window.more():
            return _Member("list")
    if window.text[place] == "{":
        return _Member("rows", _names(window, place - window.at))
    return _Member("value" if window.text[place] == "]" else "list")


def _names(window: Window, ahead: int) -> frozenset[str]:
    """The keys of the object that begins `ahead` characters on; none if it is broken or very long."""
    while True:
        try:
            value, _ = LENIENT_JSON.raw_decode(window.text, window.at + ahead)
            return frozenset(key.casefold() for key in value)
        except (ValueError, RecursionError):
            if len(window.text) - window.at > LOOKED_AT or not window.more():
                return frozenset()


# Objects that are in memory as a whole


def table_chunks(file: File, limits: Limits, mark: int, rows_of: RowsOfObject) -> Iterator[Chunk]:
    """The rows that `rows_of` makes of the object, numbered from 1."""
    found = _decoded(file, limits, mark)
    if isinstance(found, Reject):
        raise UserError(f"{file.name}: {found.reason} Mend it there.")
    try:
        fields = list(rows_of(found[0]))
    except ValueError as error:
        raise UserError(f"{file.name}: {error}") from None
    rows = (_table_row(row, Origin(file.name, number), limits) for number, row in enumerate(fields, start=1))
    yield from in_chunks(rows, lambda: file.bytes)


def one_row_chunks(file: File, limits: Limits, mark: int) -> Iterator[Chunk]:
    """The object as one row."""
    row = _decoded(file, limits, mark)
    if not isinstance(row, Reject):
        value, text = row
        row = checked_row(value, text, Origin(file.name, 1), limits)
        row = Row(row.fields, row.origin, text[:RAW_CHARACTERS_KEPT]) if isinstance(row, Row) else row
    yield Finished((row,), file.bytes)


def _decoded(file: File, limits: Limits, mark: int) -> tuple[Any, str] | Reject:
    """The object and its text, or what is wrong with it."""
    with file.open(limits) as content:
        content.read(mark)
        blocks, size = [], 0
        while block := content.read(LOOKED_AT):
            blocks.append(block)
            size += len(block)
            if size > limits.max_object_bytes:
                raise UserError(
                    f"{file.name} is one object of more than {limits.max_object_bytes:,} bytes (max_object_bytes), and"
                    " is read as a whole. Split it over several files, or write a row a line (.jsonl)."
                )
    data = b"".join(blocks)
    text = data.decode("utf-8", "surrogateescape")
    if bad := bad_byte(data, mark):
        return Reject(Origin(file.name, 1), None, "invalid UTF-8", bad, text[:RAW_CHARACTERS_KEPT])
    try:
        return STRICT_JSON.decode(text), text
    except (ValueError, RecursionError) as error:
        kind, reason, field = json_fault(error, lambda at: _line_and_column(text, at), 0)
        return Reject(Origin(file.name, 1), field, kind, reason, text[:RAW_CHARACTERS_KEPT])


def _line_and_column(text: str, position: int) -> str:
    return f"line {text.count(chr(10), 0, position) + 1}, column {position - text.rfind(chr(10), 0, position)}"


def _table_row(fields: Any, origin: Origin, limits: Limits) -> Row | Reject:
    raw = json.dumps(fields, ensure_ascii=False)
    if size := size_if_too_large(raw, limits):
        return too_large(origin, raw, size, limits)
    return checked_row(fields, raw, origin, limits)


def _rows_of_columns(table: dict[str, Any], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """ValueError if the columns are not of one length, or do not have the same keys."""
    first = table[columns[0]]
    places = range(len(first)) if isinstance(first, list) else list(first)
    for name in columns:
        column = table[name]
        if isinstance(column, list) and len(column) != len(places):
            raise ValueError(
                f"the columns '{columns[0]}' and '{name}' have {len(places):,} and {len(column):,} values. Mend them:"
                " a value may be null, none may be missing."
            )
        if isinstance(column, dict) and column.keys() != first.keys():
            place = next(iter(column.keys() ^ first.keys()))
            raise ValueError(f"of the columns '{columns[0]}' and '{name}', only one has the row '{place}'. Mend them.")
    return ({name: table[name][place] for name in columns} for place in places)


def _rows_of_split(table: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """ValueError if a row has no value for each column."""
    names, rows = [str(name) for name in table["columns"]], table["data"]
    if len(set(names)) != len(names):
        raise ValueError("'columns' names a column twice. Rename one.")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, list) or len(row) != len(names):
            raise ValueError(f"row {number:,} in 'data' has no value for each name in 'columns'. Mend it.")
    return (dict(zip(names, row, strict=True)) for row in rows)
