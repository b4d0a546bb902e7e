"""One JSON object that is a whole file: which part of it is the rows.

    {"version": 1, "data": [{…}, {…}]}                      the rows in `data`, one at a time in memory
    {"instruction": "a", "output": "b"}                     one row; so are {"messages": […]} and a task of
    {"Definition": […], "Instances": […]}                   Super-NaturalInstructions, up to `max_object_bytes`

Any other object is refused, with a command for each thing that may be meant: columns, as pandas and datasets write
them, a row under each key, or one of several lists of rows.
"""

import functools
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.reading.find_files import BLOCK_BYTES, File, Limits
from diptych.data_prep.reading.json_rows import (
    JSON_STRING,
    LENIENT_JSON,
    STRICT_JSON,
    ArrayRows,
    checked_row,
    json_fault,
    skip_value,
)
from diptych.data_prep.reading.row_chunks import (
    KNOWN_COLUMNS,
    Chunk,
    Finished,
    Rows,
    in_chunks,
)
from diptych.data_prep.reading.text_encoding import bad_byte
from diptych.data_prep.reading.text_window import SPACE, Window
from diptych.data_prep.rows.records import RAW_CHARACTERS_KEPT, Origin, Reject, Row
from diptych.data_prep.rows.valid_text import listed

TASK_KEYS = frozenset(("Definition", "Instances"))
TURN_KEYS = frozenset(("messages", "conversations"))
COMMANDS_SHOWN = 3
LOOKED_AT = 4 * BLOCK_BYTES
"""Characters of a key, or of the beginning of a value, that are looked at."""

VALUE_END = re.compile(r"[,\]}\s]")
JQ_COLUMNS = "[(to_entries[0].value | keys_unsorted[]) as $key | map_values(.[$key])]"
"""For jq: an object of columns, which are lists or objects, as a list of rows."""


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
    raise UserError(_cannot_tell(file, members))


def _is_one_row(members: Mapping[str, _Member]) -> bool:
    """A conversation, or only values, with names that data sets give to columns."""
    is_known = len(KNOWN_COLUMNS & {key.casefold() for key in members}) > 1
    are_values = all(member.kind == "value" for member in members.values())
    return (is_known and are_values) or any(members[key].kind == "rows" for key in TURN_KEYS & members.keys())


def _rows_key(members: Mapping[str, _Member]) -> str | None:
    """The one list of rows; of several, the one whose rows have known names of columns."""
    if len(KNOWN_COLUMNS & {key.casefold() for key in _lists(members)}) > 1 and not _are_rows(members):
        return None  # a list of objects is a column like the others
    rows = [key for key, member in members.items() if member.kind == "rows"]
    with_names = [key for key in rows if members[key].names & KNOWN_COLUMNS]
    return next((found[0] for found in (rows, with_names) if len(found) == 1), None)


def _lists(members: Mapping[str, _Member]) -> list[str]:
    return [key for key, member in members.items() if member.kind in ("list", "rows")]


def _are_rows(members: Mapping[str, _Member]) -> bool:
    """Whether all lists are lists of objects."""
    return all(members[key].kind == "rows" for key in _lists(members))


def _cannot_tell(file: File, members: Mapping[str, _Member]) -> str:
    head = f"{file.name}, line 1, column 1: a JSON object stands here, and a list of rows is due: [{{…}}, {{…}}]."
    if not members:
        return f"{head} It is empty."
    kinds = {member.kind for member in members.values()}
    if kinds == {"value"}:
        return f"{head} This one has no list of rows: {listed(members)}. If it is one row: {_command(file, '[.]')}."
    if kinds == {"object"}:
        known_inside = KNOWN_COLUMNS & frozenset().union(*(member.names for member in members.values()))
        known = KNOWN_COLUMNS & {key.casefold() for key in members}
        as_rows = f" Is each of its members a row? Then {_command(file, '[.[]]')}."
        as_columns = f" Is each of its members a column? Then {_command(file, JQ_COLUMNS)}."
        return head + as_rows * (not known or bool(known_inside)) + as_columns * (not known_inside or bool(known))
    columns = _lists(members)
    if columns and not _are_rows(members):
        alone = ", ".join(f"{json.dumps(name)}: .[{json.dumps(name)}]" for name in columns)
        as_rows = _command(file, f"{{{alone}}} | {JQ_COLUMNS}")
        return f"{head} It has lists of other values: {listed(columns)}. If these are columns: {as_rows}."
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


# One row


def one_row_chunks(file: File, limits: Limits, mark: int) -> Iterator[Chunk]:
    """The object as one row, which is in memory as a whole."""
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
    data, origin = b"".join(blocks), Origin(file.name, 1)
    text = data.decode("utf-8", "surrogateescape")
    raw = text[:RAW_CHARACTERS_KEPT]
    if bad := bad_byte(data, mark):
        row = Reject(origin, None, "invalid UTF-8", bad, raw)
    else:
        try:
            row = checked_row(STRICT_JSON.decode(text), text, origin, limits)
            row = Row(row.fields, origin, raw) if isinstance(row, Row) else row
        except (ValueError, RecursionError) as error:
            kind, reason, field = json_fault(error, lambda at: _line_and_column(text, at), 0)
            row = Reject(origin, field, kind, reason, raw)
    yield Finished((row,), file.bytes)


def _line_and_column(text: str, position: int) -> str:
    return f"line {text.count(chr(10), 0, position) + 1}, column {position - text.rfind(chr(10), 0, position)}"
