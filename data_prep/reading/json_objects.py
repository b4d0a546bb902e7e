"""One JSON object that is a whole file: which part of it is the rows.

    {"version": 1, "data": [{…}, {…}]}                      the rows in `data`, one at a time in memory
    {"instruction": "a", "output": "b"}                     one row; so are {"messages": […]} and a task of
    {"Definition": […], "Instances": […]}                   Super-NaturalInstructions, up to `max_object_bytes`

Any other object is refused, with its keys and a command for each thing that may be meant.
"""

import functools
import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.reading.find_files import BLOCK_BYTES, Content, File, Limits, shell_command
from diptych.data_prep.reading.json_rows import JSON_STRING, LENIENT_JSON, ArrayRows, skip_value
from diptych.data_prep.reading.row_chunks import KNOWN_COLUMNS, Chunk, Finished, Rows, in_chunks
from diptych.data_prep.reading.text_window import SPACE, Window
from diptych.data_prep.rows.records import RAW_CHARACTERS_KEPT
from diptych.data_prep.rows.valid_text import listed

TASK_KEYS = frozenset(("Definition", "Instances"))
TURN_KEYS = frozenset(("messages", "conversations"))
LONGEST_KEY = 4 * BLOCK_BYTES
VALUE_END = re.compile(r"[,\]}\s]")
JQ_COLUMNS = (
    "with_entries(select(.value | arrays, objects))"
    " | [(to_entries[0].value | keys_unsorted[]) as $key | map_values(.[$key])]"
)
"""For jq: an object of columns, which are lists or objects, as a list of rows."""


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
