"""All texts of files for `diptych tokenizer`: whatever `diptych prepare` reads, and plain text.

    texts = open_texts(["corpus.txt", "rows.parquet", "chats.jsonl.gz", "prepared"])
    texts()           → "A text a line.", …, "Name the capital.", "France", "Paris", …     as often as it is called
    texts.pairs()     → ("corpus.txt", "A text a line."), …
    texts.rejects     what the last whole reading left out, counted

Rows are read, recognised and checked as `prepare` does it. A row's texts are those of its records, each once, without
the instructions that settings add. A file of another kind is plain text, a text a line (.gz and .zst too); folders and
globs give those that are called .txt. Of what has splits, such as a prepared folder, train is read.
"""

import functools
import glob
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from diptych.data_prep.command_line.errors import UserError, message_line
from diptych.data_prep.pipeline.gather_rows import first_rows
from diptych.data_prep.reading.find_files import KNOWN_SUFFIXES, PACKED_SUFFIXES
from diptych.data_prep.reading.sources import SAMPLES, TRAIN, Source, open_plain, open_sources
from diptych.data_prep.rows.convert_rows import MISSING, Converter, Directions, value_at
from diptych.data_prep.rows.recognise_format import converter_for
from diptych.data_prep.rows.records import Record, Reject, Rejects, Row
from diptych.data_prep.rows.valid_text import Fault, listed, text

PLAIN_SUFFIX = ".txt"
TEXT_COLUMN = "text"
"""The column of a line of plain text as a row, and of rows of no known format."""

TextsOfRow = Callable[[Row], Iterable[str | Reject]]


@dataclass
class Texts:
    """The texts of several sources. After a reading to the end, `rejects` has what could not be read."""

    sources: Sequence[tuple[Source, TextsOfRow]]
    rejects: Rejects = field(default_factory=Rejects)

    def __call__(self) -> Iterator[str]:
        return (text for _, text in self.pairs())

    def pairs(self) -> Iterator[tuple[str, str]]:
        """(file, text). UserError at the end where there was no text at all."""
        rejects, is_any = Rejects(), False
        for source, texts_of in self.sources:
            for row in source.rows():
                for found in dict.fromkeys([row] if isinstance(row, Reject) else texts_of(row)):
                    if isinstance(found, Reject):
                        rejects.add(found)
                    elif found:
                        is_any = True
                        yield source.name, found
        self.rejects = rejects
        if not is_any:
            raise UserError(f"there is no text in what was read. Name other files. {self.left_out()}".rstrip())

    def left_out(self) -> str:
        """How many rows were left out and why; "" where there were none."""
        if not self.rejects.count:
            return ""
        kinds = "; ".join(f"{count:,} × {kind}" for kind, count in self.rejects.kinds.most_common())
        first = next(iter(self.rejects.examples.values()))[0]
        return f"rows left out: {self.rejects.count:,} ({kinds}). The first, {first.origin}: {first.reason}"

    def warn_of_rejects(self) -> None:
        if left_out := self.left_out():
            print(message_line(f"warning: {left_out}"), file=sys.stderr)


def open_texts(entries: Sequence[str], text_fields: Sequence[str] = ()) -> Texts:
    """`text_fields` are the columns that are text, where rows have no known format; `answers.text` is `text` in
    `answers`. How each source is read is printed. UserError where a file is missing, or where it is not known which
    columns are text."""
    if not entries:
        raise UserError("nothing to read: give --data FILE, more files, or a folder of prepared data.")
    plain: list[str] = []
    others: list[str] = []
    for entry in entries:
        files, is_more = _plain_files(entry)
        plain += files
        others += [entry] * is_more
    sources = [(open_plain(path), functools.partial(_columns, (TEXT_COLUMN,))) for path in dict.fromkeys(plain)]
    for source, _ in sources:
        print(message_line(f"Format     {source.name}: a text a line"))
    for source in open_sources(others, columns=text_fields):
        if source.split != TRAIN:
            continue
        for note in source.notes:
            if not note.startswith(tuple(f"{path} " for path in plain)):  # left out there, and read here
                print(message_line(f"Note       {note}"))
        sources.append((source, _texts_of_rows(source, text_fields)))
    return Texts(sources)


def _plain_files(entry: str) -> tuple[list[str], bool]:
    """The files of plain text of an entry, and whether it may have others too."""
    path = Path(entry).expanduser()
    if path.is_dir():
        found = [file for file in path.rglob("*") if not any(part.startswith(".") for part in file.parts)]
    elif path.exists() or not glob.has_magic(entry):
        is_plain = path.is_file() and entry not in SAMPLES and _suffix(path) not in KNOWN_SUFFIXES
        return [entry] * is_plain, not is_plain
    else:
        found = [Path(match) for match in glob.glob(str(path), recursive=True)]
    plain = sorted(str(file) for file in found if _suffix(file) == PLAIN_SUFFIX and file.is_file())
    return plain, not plain or any(_suffix(file) in KNOWN_SUFFIXES for file in found)


def _suffix(path: Path) -> str:
    """`.txt` of a.txt.gz."""
    return (path.with_suffix("") if path.suffix.lower() in PACKED_SUFFIXES else path).suffix.lower()


def _texts_of_rows(source: Source, text_fields: Sequence[str]) -> TextsOfRow:
    """The function that gives a row's texts, chosen by the source's first rows."""
    rows = first_rows(source)
    if text_fields:
        if rows and all(value_at(row.fields, column) is MISSING for row in rows for column in text_fields):
            found = dict.fromkeys(column for row in rows for column in row.fields)
            raise UserError(
                f"{source.name} has none of the columns {', '.join(text_fields)}. Columns there are {listed(found)}."
                " Name those that are text with --text_fields."
            )
        print(message_line(f"Format     {source.name}: its columns {', '.join(text_fields)}"))
        return functools.partial(_columns, tuple(text_fields))
    if not rows:  # every row is a reject
        return functools.partial(_columns, (TEXT_COLUMN,))
    is_prepared = {"source", "target", "input_ids", "labels"} <= rows[0].fields.keys()  # fits two formats
    try:
        asked = Directions("needed to be there")
        converter = converter_for(rows, source.name, "parallel" if is_prepared else None, directions=asked)
    except UserError as error:
        if not any(isinstance(row.fields.get(TEXT_COLUMN), str) for row in rows):
            held = [(name, value) for row in rows for name, value in row.fields.items()]
            inside = ((f"{a}.{b}", it) for a, value in held if isinstance(value, Mapping) for b, it in value.items())
            texts = dict.fromkeys(name for name, value in (*held, *inside) if isinstance(value, str))
            if not texts:
                raise
            raise UserError(
                f"{source.name}: its first rows do not tell which columns are text, because they fit no format, or"
                f" more than one. Name those that are, out of these: --text_fields {' '.join(texts)}"
            ) from error
        print(message_line(f"Format     {source.name}: no other that is known, so its column {TEXT_COLUMN}"))
        return functools.partial(_columns, (TEXT_COLUMN,))
    if converter.format.name == "tokenised":
        raise UserError(f"{source.name} holds token ids, and a tokenizer needs the texts. Name a file with these.")
    print(message_line(f"Format     {source.name}: {converter.format.name}, recognised"))
    # Without the settings' instructions, which are no text of the data.
    return functools.partial(_record_texts, replace(converter, directions=Directions(), summary_instruction=""))


def _record_texts(converter: Converter, row: Row) -> Iterator[str | Reject]:
    for result in converter.records(row):
        if isinstance(result, Record):
            yield result.system
            for turn in result.history:
                yield from turn
            yield from (result.instruction, result.input, result.output)
        else:
            yield result


def _columns(names: tuple[str, ...], row: Row) -> Iterator[str | Reject]:
    """The texts of these columns. Null and a missing column are left out; a row with none of the columns is a
    reject."""
    values = {name: value for name in names if (value := value_at(row.fields, name)) is not MISSING}
    try:
        if not values:
            raise Fault(names[0], "no text column", f"it has none of the columns {', '.join(names)}.")
        yield from [text(value, name, may_be_empty=True) for name, value in values.items() if value is not None]
    except Fault as fault:
        yield Reject(row.origin, fault.field, fault.kind, fault.reason, row.raw)
