"""A file of prompts in; one PromptRow per line out, with the prompt or the reason why the line holds none.

rows.jsonl          a JSON object per line
rows.csv, rows.tsv  a table, read as `diptych prepare` reads it
rows.txt            a text per line: an instruction, or the input of the instruction that is given for all lines
"""

import contextlib
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.conversations import Fault
from diptych.data_prep.rows.language_names import UnknownLanguage
from diptych.data_prep.rows.records import Languages, Row
from diptych.finetune.inference.generate_settings import LINES_SUFFIX
from diptych.finetune.inference.prompts import EmptyInput, Prompt, Prompter, prompt_of

TABLE_SUFFIXES = (".csv", ".tsv")

FORMATS = (
    "What is read: a JSON object on each line (.jsonl), a table whose first line names its columns (.csv, .tsv), or a "
    "text on each line (.txt)."
)


class PromptRow(NamedTuple):
    """One line of the file: its fields as they are, and its prompt or an error."""

    fields: dict[str, Any]
    prompt: Prompt | None = None
    error: str = ""


MOST_LINE_BYTES = 10_000_000
BLANK = PromptRow({})
"""An empty line. It keeps its place in the output, as does a row whose only text is an empty `input`, which has its
fields."""


def read_prompts(
    in_file: str, instruction: str = "", system: str = "", has_languages: bool = False
) -> list[PromptRow]:
    """Every line of the file. `instruction` and `system` apply to all lines of a .txt file; with an instruction or
    `has_languages` its lines are inputs.

    Raises:
        UserError: the file is missing, empty, or has no line that is a prompt.
    """
    if in_file.endswith(TABLE_SUFFIXES):
        from diptych.data_prep.reading.sources import open_sources  # here, because pyarrow takes long to import

        read = [row for source in open_sources([in_file]) for chunk in source.chunks() for row in chunk.rows()]
        rows = [row_of(row.fields) if isinstance(row, Row) else PromptRow({}, error=row.reason) for row in read]
    else:
        is_text = in_file.endswith(LINES_SUFFIX)
        rows = []
        for line in lines_of(in_file):
            try:
                rows.append(_text_row(line, instruction, system, has_languages) if is_text else _json_row(line))
            except UnicodeDecodeError as error:
                rows.append(PromptRow({}, error=f"invalid UTF-8 at byte {error.start + 1} of the line"))
    filled = [row for row in rows if row.prompt or row.error]
    if not filled:
        raise UserError(f"{in_file} is empty. {FORMATS}")
    if all(row.error for row in filled):
        hint = "" if any(row.fields for row in filled) else f". {FORMATS}"
        first = rows.index(filled[0])
        raise UserError(f"{in_file} has no row that is a prompt; row {first + 1}: {rows[first].error}{hint}")
    return rows


def lines_of(in_file: str) -> Iterator[bytes]:
    """Without their ends. UserError for a file in another encoding, and for a line that is too long to be a prompt."""
    from diptych.data_prep.reading.find_files import HEAD_BYTES, EmptyFile  # here, because of pyarrow, as above
    from diptych.data_prep.reading.text_encoding import check_text

    if Path(in_file).is_dir():
        raise UserError(f"{in_file} is a folder, and a file is needed. {FORMATS}")
    with open(in_file, "rb") as file, contextlib.suppress(EmptyFile):
        head = file.read(HEAD_BYTES)
        head = head[check_text(head, in_file) :] + file.readline(MOST_LINE_BYTES)  # the rest of its last line
        rest = iter(lambda: file.readline(MOST_LINE_BYTES), b"")
        for number, line in enumerate(itertools.chain(io.BytesIO(head), rest), start=1):
            if len(line) >= MOST_LINE_BYTES:
                raise UserError(f"{in_file} line {number} has {MOST_LINE_BYTES:,} bytes or more. Split it. {FORMATS}")
            yield line.removesuffix(b"\n")


def _text_row(line: bytes, instruction: str, system: str, has_languages: bool) -> PromptRow:
    text = line.decode("utf-8").removesuffix("\r")
    if not text.strip():
        return BLANK
    if instruction or has_languages:
        return PromptRow({"input": text}, Prompt(instruction, text, system=system))
    return PromptRow({"instruction": text}, Prompt(text, system=system))


def _json_row(line: bytes) -> PromptRow:
    if not line.strip():
        return BLANK
    try:
        return row_of(json_object(line))
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        return PromptRow({}, error=str(error))


def json_object(line: bytes) -> dict[str, Any]:
    """ValueError says what is wrong with a line that is no JSON object of texts in UTF-8."""
    from diptych.data_prep.reading.json_rows import unrepeated  # here, because of pyarrow, as above

    try:
        fields = json.loads(line.decode("utf-8"), object_pairs_hook=unrepeated)
        json.dumps(fields, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError:
        raise
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair (\\ud800 to \\udfff) is no text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON at column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, 1000 nested brackets
        raise ValueError(f"JSON that cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"a JSON object is needed, got {type(fields).__name__}")
    return fields


def row_of(fields: dict[str, Any]) -> PromptRow:
    try:
        return PromptRow(fields, prompt_of(fields))
    except EmptyInput:
        return PromptRow(fields)
    except (UserError, Fault) as error:
        return PromptRow(fields, error=str(error))


def render_prompts(
    rows: list[PromptRow], prompter: Prompter
) -> tuple[list[PromptRow], dict[int, tuple[str, Languages]]]:
    """Renders every prompt: the rows, with an error where that failed, and text and languages by row number."""
    checked, prompts = list(rows), {}
    for number, row in enumerate(rows):
        if row.prompt is None:
            continue
        try:
            prompts[number] = prompter.render(row.prompt)
        except UnknownLanguage as error:
            checked[number] = row._replace(error=error.fault)
        except UserError as error:
            checked[number] = row._replace(error=str(error))
    return checked, prompts
