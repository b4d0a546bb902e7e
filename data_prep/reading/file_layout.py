"""How a file is read: by its suffix and its beginning, with notes on what is unusual.

rows.jsonl      one object a line, or an array in spite of its name
rows.csv        commas, semicolons, tabs or bars between columns; the first line is a header
pairs.tsv       its first line names columns, or is a pair
"""

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.reading.column_rows import arrow_chunks, parquet_chunks
from diptych.data_prep.reading.find_files import HEAD_BYTES, Content, File, Limits, shell_command
from diptych.data_prep.reading.json_rows import array_chunks, json_row, object_reader
from diptych.data_prep.reading.lines import line_chunks
from diptych.data_prep.reading.row_chunks import KNOWN_COLUMNS, Chunk
from diptych.data_prep.reading.table_rows import SEPARATOR_LINE, Header, check_header, csv_chunks, tsv_row
from diptych.data_prep.reading.text_encoding import check_text
from diptych.data_prep.reading.text_window import SPACE
from diptych.data_prep.reading.tmx_rows import tmx_chunks
from diptych.data_prep.rows.language_names import names_language

NAME = re.compile(r"\w[\w:-]*(?:\.\w+)*")
QUOTED = re.compile(r'"(?:[^"]|"")*"')
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
WITHOUT_TEXT_CHECK = {".parquet": parquet_chunks, ".arrow": arrow_chunks, ".tmx": tmx_chunks}
FIRST_LINE_IS_DATA = "its first line is data, since --map names columns by number"

Read = Callable[..., Iterator[Chunk]]


def reader_of(file: File, limits: Limits, columns: Collection[str]) -> tuple[Read, list[str]]:
    """What reads the file, and notes. `columns` are those that --map names. UserError where it is empty, in another
    encoding, or its beginning is not what its name says."""
    if read := WITHOUT_TEXT_CHECK.get(file.suffix):
        return functools.partial(read, file, limits), []
    with Content(file, limits) as content:
        head = content.peek(HEAD_BYTES)
    mark = check_text(head, file.name, needs_line_feeds=file.suffix in (".tsv", ".jsonl", ".ndjson"))
    text = head[mark:].decode("utf-8", "surrogateescape")
    if file.suffix in (".tsv", ".csv"):
        read, notes = (_tsv if file.suffix == ".tsv" else _csv)(text, file.name, columns)
    else:
        read, notes = _json(text, file, limits, mark)
    return functools.partial(read, file, limits, mark), [f"{file.name}: {note}" for note in notes]


# Tables


def _csv(head: str, name: str, columns: Collection[str]) -> tuple[Read, list[str]]:
    delimiter, notes, numbered = _delimiter(head), [], _are_numbers(columns)
    if delimiter != ",":
        note = f"its columns are separated by {DELIMITERS.get(delimiter, repr(delimiter))}"
        if delimiter == "\t":
            note += "; text in quotes may go over tabs and lines. If nothing is quoted, name the file .tsv"
        notes.append(note)
    if numbered:
        _check_no_header(_first_cells(head, delimiter), name)
        notes.append(FIRST_LINE_IS_DATA)
    return functools.partial(csv_chunks, delimiter=delimiter, numbered=numbered), notes


def _delimiter(head: str) -> str:
    """The one that Excel's first line `sep=;` names, else the one that splits the header into most known names, then
    into most names; a comma if that decides nothing."""
    if named := SEPARATOR_LINE.match(head):
        return named[1]

    def score(delimiter: str) -> tuple[int, int, bool]:
        cells = _first_cells(head, delimiter)
        known = sum(cell in KNOWN_COLUMNS for cell in cells)
        return known, 1 if known else 0 if delimiter == "|" else len(cells), delimiter == ","

    return max(DELIMITERS, key=score)


def _first_cells(head: str, delimiter: str) -> list[str]:
    named = SEPARATOR_LINE.match(head)
    header = head[SPACE.match(head, named.end() if named else 0).end() :].split("\n", 1)[0]
    return [cell.strip().strip('"').strip().casefold() for cell in header.split(delimiter)]


def _are_numbers(columns: Collection[str]) -> bool:
    return bool(columns) and all(column.isdecimal() for column in columns)


def _check_no_header(cells: list[str], name: str) -> None:
    if all(cell in KNOWN_COLUMNS or names_language(cell) for cell in cells):
        raise UserError(
            f"{name}: --map names columns by number, which is for tables without a header, and the first line here"
            f" names them: {', '.join(cells)}. Map these names."
        )


def _tsv(head: str, name: str, columns: Collection[str]) -> tuple[Read, list[str]]:
    """The first line is a header if `columns` are in it, or if it has names that data sets give to columns, or names
    of languages. A note says what it was taken for."""
    lines = [(number, line) for number, line in enumerate(head.split("\n")[:1000], 1) if line.strip()]
    if lines and SEPARATOR_LINE.fullmatch(f"{lines[0][1]}\n"):
        del lines[0]
    number, first = lines[0] if lines else (1, "")
    cells = [cell.strip() for cell in first.split("\t")]
    texts = [line for _, line in lines]
    notes, table = [], [line.rstrip("\r").split("\t") for line in texts[:100]]
    is_first_quoted = bool(table) and all(map(QUOTED.fullmatch, table[0]))
    if is_first_quoted or any(QUOTED.fullmatch(cell) and '""' in cell[1:-1] for line in table for cell in line):
        notes.append(
            "some cells look quoted as in a csv. A tsv has no quoting, so the quote marks are read as text. If they"
            " quote, name the file .csv"
        )
    if _are_numbers(columns):
        _check_no_header([cell.casefold() for cell in cells], name)
        header = Header.numbered(_usual_columns(texts, name))
        notes.append(FIRST_LINE_IS_DATA)
    elif any(cell in columns for cell in cells) or _are_names(cells):
        header = Header.of_cells(cells, number)
        check_header(header, first, name, None)
        notes.append(f"its first line names the columns: {', '.join(header.names)}")
    else:
        width = _usual_columns(texts, name)  # further columns, such as an attribution, are kept
        header = Header(("first", "second", *(f"column {place}" for place in range(3, width + 1))), width, None)
        if len(cells) >= 2:  # else it will be rejected
            note = f"its first line is taken for a pair, {cells[0][:40]!r} and {cells[1][:40]!r}"
            if all(NAME.fullmatch(cell) for cell in cells[:2]):
                note += f"; if it names columns, --map first={cells[0]} second={cells[1]} makes it the header"
            notes.append(note)
    return functools.partial(line_chunks, row_of=functools.partial(tsv_row, header=header)), notes


def _are_names(cells: list[str]) -> bool:
    """Whether two cells are names that data sets give to columns, or names of languages, and the others look like
    names too."""
    names = {cell.casefold() for cell in cells if cell}
    known = len(names & KNOWN_COLUMNS), sum(map(names_language, set(cells)))
    return max(known) >= 2 and all(map(NAME.fullmatch, names))


def _usual_columns(lines: list[str], name: str) -> int:
    [(columns, _)] = Counter(line.count("\t") + 1 for line in lines).most_common(1) or [(1, 0)]
    if columns < 2:
        raise UserError(f"{name} has no tabs between its columns: a line is first ⇥ second ⇥ anything else.")
    return columns


# JSON


def _json(head: str, file: File, limits: Limits, mark: int) -> tuple[Read, list[str]]:
    """Lines, an array or an object: the content decides, not whether the file is called .json or .jsonl."""
    start = SPACE.match(head).end()
    first, *others = (line.strip() for line in head[start:].split("\n", 3)[:3])
    second = next(filter(None, others), "")
    is_array, is_named_json = head.startswith("[", start), file.suffix == ".json"
    if is_named_json and not is_array:
        if not head.startswith("{", start):
            where = f"line {head.count(chr(10), 0, start) + 1}, column {start - head.rfind(chr(10), 0, start)}"
            raise UserError(
                f"{file.name}, {where}: {head[start : start + 1]!r} stands here, and an array of objects is due:"
                " [{…}, {…}]. If it has one object a line, name it .jsonl."
            )
        if not second or not (_is_object(first) or (first.endswith("}") and _is_object(second))):
            return object_reader(file, limits, mark)
    if not is_named_json and first == "{" and second and not second.startswith("{"):
        raise UserError(
            f"{file.name}: its first object goes over several lines, and one object a line is due. Write it so:"
            f" {shell_command('jq -c .', file.name, 'lines.jsonl')}. If the file is one object or an array, name it"
            " .json."
        )
    is_array = is_array and (is_named_json or not (first.endswith("}") and second.startswith("{")))
    what = "a JSON array" if is_array else "one JSON object a line"
    notes = [] if is_array == is_named_json else [f"read as {what}, in spite of its name"]
    return array_chunks if is_array else functools.partial(line_chunks, row_of=json_row), notes


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
