"""From files to rows. A reader yields a Row for each row that it can read and a Reject for each that it cannot.

    rows.json      [{"instruction": …, "input": …, "output": …}, …]     rows.jsonl    one such object a line
    rows.csv       a header line with these names                       rows.parquet  columns with these names
    pairs.tsv      first ⇥ second ⇥ further columns, no header          --aligned a.en a.ko   line N with line N
    hf:user/name   a data set of the Hub (hf:user/name:split)           tatoeba, seed_tasks   ship with the project

Self-Instruct rows (`instruction` and `instances`, a list of `input` and `output`) become one row for each instance.
Parallel text becomes one row for each direction that has an instruction.

One bad row never loses the others. Broken JSON inside an array is skipped up to the next `}, {`; a quote that is never
closed in a csv costs its own line. Only what makes a whole file useless is a UserError.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from diptych.data_prep.records import Origin, Reject, Row, UserError, nearest

HUB_PREFIX = "hf:"
SAMPLES_FOLDER = Path(__file__).with_name("samples")
UTF8_MARK = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of a byte that is no UTF-8
NEXT_ROW = re.compile(r"\}\s*,\s*(?=\{)")

Rows = Iterator[Row | Reject]


@dataclass(frozen=True)
class Directions:
    """Instructions for parallel text. A direction without one gives no rows."""

    forward: str | None = None
    backward: str | None = None


@dataclass(frozen=True)
class Sample:
    """A file that ships with the project."""

    file: str
    directions: Directions = Directions()


@dataclass(frozen=True)
class Source:
    """One thing to read, known to exist. `name` is what messages say, `digest` changes when the content does."""

    name: str
    digest: str
    read: Callable[[], Rows]


def open_source(entry: str, directions: Directions) -> Source:
    """`entry` is a sample's name, `hf:user/name`, or a path; what can be known to be wrong is said here."""
    if entry.startswith(HUB_PREFIX):
        return _hub_source(entry)
    if entry in SAMPLES:
        sample = SAMPLES[entry]
        directions = directions if directions.forward or directions.backward else sample.directions
        return _file_source(SAMPLES_FOLDER / sample.file, sample.file, directions)
    return _file_source(Path(entry), entry, directions)


def open_aligned(first: str, second: str, directions: Directions) -> Source:
    for path in (first, second):
        _must_exist(Path(path), path)
    _must_have_direction(f"{first} and {second}", directions)
    read = functools.partial(read_aligned, first, second, directions)
    return Source(f"{first} + {second}", _digest(Path(first)) + _digest(Path(second)), read)


def _hub_source(entry: str) -> Source:
    name, _, split = entry.removeprefix(HUB_PREFIX).partition(":")
    try:
        dataset = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{entry} could not be loaded from the Hub: {error}") from error
    return Source(entry, dataset._fingerprint, functools.partial(read_hub, dataset, entry))


def _file_source(path: Path, name: str, directions: Directions) -> Source:
    _must_exist(path, name)
    suffix = path.suffix.lower()
    if suffix == ".tsv":
        _must_have_direction(name, directions)
        return Source(name, _digest(path), functools.partial(read_tsv, path, name, directions))
    if suffix not in ROW_READERS:
        raise UserError(
            f"{name}: do not know how to read '{suffix or path.name}'. Known are {', '.join([*ROW_READERS, '.tsv'])}."
            " Two text files with a sentence a line are --aligned FIRST SECOND."
        )
    return Source(name, _digest(path), functools.partial(ROW_READERS[suffix], path, name))


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _must_exist(path: Path, name: str) -> None:
    if path.is_dir():
        raise UserError(f"{name} is a folder; a file is due. Name the files in it.")
    if path.is_file():
        return
    beside = [str(path.with_name(file.name)) for file in path.parent.iterdir()] if path.parent.is_dir() else []
    near = nearest(name, [*beside, *SAMPLES], cutoff=0.75)
    hint = f"Did you mean '{near}'?" if near else f"Shipped samples are {', '.join(SAMPLES)}; Hub ids start with hf:."
    raise UserError(f"{name}: there is no such file. {hint}")


def _must_have_direction(name: str, directions: Directions) -> None:
    if not directions.forward and not directions.backward:
        raise UserError(
            f"{name} is parallel text, and no direction has an instruction. Give one or both, for example"
            " --forward 'Translate English to Korean:' --backward 'Translate Korean to English:'."
        )


@dataclass(frozen=True)
class Text:
    """A file's text. Bytes that are no UTF-8 are kept as lone surrogates, so that they cost only their own row."""

    name: str
    text: str
    bytes_before: int

    def bad_byte(self, start: int, end: int) -> str | None:
        """The byte offset in the file of the first byte between two characters that is no UTF-8."""
        bad = NOT_UTF8.search(self.text, start, end)
        if bad is None:
            return None
        offset = self.bytes_before + len(self.text[: bad.start()].encode("utf-8", "surrogateescape"))
        return f"invalid UTF-8: byte 0x{ord(bad.group()) - 0xDC00:02x} at byte offset {offset} of the file."

    def line_and_column(self, position: int) -> str:
        line = self.text.count("\n", 0, position) + 1
        return f"line {line}, column {position - self.text.rfind(chr(10), 0, position)}"

    def lines(self) -> Iterator[tuple[int, int, str]]:
        """Number, position and text of each line. A line ends in \\n or \\r\\n, which do not belong to its text."""
        position = 0
        for number, line in enumerate(self.text.split("\n"), start=1):
            if position < len(self.text):  # what stands after the last \n is a line only if it is not empty
                yield number, position, line.removesuffix("\r")
            position += len(line) + 1


def read_text(path: Path, name: str) -> Text:
    content = path.read_bytes()
    if content.startswith(UTF16_MARKS):
        raise UserError(f"{name} is UTF-16, and UTF-8 is due. Convert it: iconv -f UTF-16 -t UTF-8.")
    mark = len(UTF8_MARK) if content.startswith(UTF8_MARK) else 0
    if not content[mark:].strip():
        raise UserError(f"{name} is empty: there is nothing to prepare.")
    return Text(name, content[mark:].decode("utf-8", "surrogateescape"), mark)


class _Repeated(dict):
    """An object with a key twice, of which plain JSON would silently keep the last."""

    key: str


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    repeated, keys = _Repeated(fields), [key for key, _ in pairs]
    repeated.key = next(key for key in keys if keys.count(key) > 1)
    return repeated


_JSON = json.JSONDecoder(object_pairs_hook=_object)


def read_json(path: Path, name: str) -> Rows:
    """An array of objects, decoded one by one, so that a broken one does not hide the rest."""
    source = read_text(path, name)
    text = source.text
    position = _after_space(text, 0)
    if text[position] != "[":
        found = "a JSON object" if text[position] == "{" else f"'{text[position]}'"
        raise UserError(
            f"{name}, {source.line_and_column(position)}: {found} stands here, and an array of objects is due:"
            " [{…}, {…}]. If it has one object a line, name it .jsonl; if an object holds the array, keep the array."
        )
    row, position = 0, _after_space(text, position + 1)
    while not text.startswith("]", position):
        row += 1
        origin, start = Origin(name, row), position
        try:
            value, end = _JSON.raw_decode(text, start)
            position = _after_space(text, end)
            if not text.startswith((",", "]"), position):
                raise json.JSONDecodeError("',' or ']' expected after the row", text, position)
        except (ValueError, RecursionError) as error:  # ValueError: also a number of more than 4,300 digits
            position = _next_row(text, start, getattr(error, "pos", start))
            yield source_reject(source, start, position, origin, _json_fault(source, error, start))
        else:
            yield from _row_or_reject(source, value, start, end, origin)
            position = _after_space(text, position + 1) if text[position] == "," else position
            if position >= len(text):
                fault = f"broken JSON: the file ends inside the array, {source.line_and_column(position)}."
                yield source_reject(source, start, end, Origin(name, row + 1), fault)
        if position >= len(text):
            return
    if (rest := _after_space(text, position + 1)) < len(text):
        fault = f"broken JSON: text after the end of the array, {source.line_and_column(rest)}."
        yield source_reject(source, rest, len(text), Origin(name, row + 1), fault)


def _after_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _next_row(text: str, start: int, error_position: int) -> int:
    """Where to go on after a broken row: at the next object after a `}, `, else at the end of the file."""
    if text.startswith(",", start):  # a comma too many
        return _after_space(text, start + 1)
    if text.startswith("{", error_position) and error_position > start:  # a comma is missing between two rows
        return error_position
    found = NEXT_ROW.search(text, start + 1)
    return found.end() if found else len(text)


def _json_fault(source: Text, error: Exception, start: int) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON: {error.msg}, {source.line_and_column(error.pos)}."
    what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    return f"broken JSON: {what}, in the row at {source.line_and_column(start)}."


def read_jsonl(path: Path, name: str) -> Rows:
    """One object a line; blank lines are no rows."""
    source = read_text(path, name)
    if source.text.lstrip().startswith("["):
        raise UserError(f"{name} starts with '[', as a JSON array does. Name it .json, or write one object a line.")
    for number, position, line in source.lines():
        if not line.strip():
            continue
        origin, end = Origin(name, number), position + len(line)
        try:
            value = _JSON.decode(line)
        except json.JSONDecodeError as error:
            fault = f"broken JSON: {error.msg}, line {number}, column {error.pos + 1}."
            yield source_reject(source, position, end, origin, fault)
        except (ValueError, RecursionError) as error:
            yield source_reject(source, position, end, origin, _json_fault(source, error, position))
        else:
            yield from _row_or_reject(source, value, position, end, origin)


def source_reject(source: Text, start: int, end: int, origin: Origin, fault: str) -> Reject:
    """A row that could not be read. Where bytes are no UTF-8, they are the fault to mend first."""
    bad_byte = source.bad_byte(start, end)
    kind = "invalid UTF-8" if bad_byte else fault.split(":")[0]
    return Reject(origin, None, kind, bad_byte or fault, source.text[start:end])


def _row_or_reject(source: Text, value: Any, start: int, end: int, origin: Origin) -> Rows:
    raw = source.text[start:end]
    if source.bad_byte(start, end):
        yield source_reject(source, start, end, origin, "")
    elif not isinstance(value, dict):
        reason = f"the row is {type(value).__name__} ({raw[:60]}); an object {{…}} is due."
        yield Reject(origin, None, "not an object", reason, raw)
    elif isinstance(value, _Repeated):
        yield Reject(origin, value.key, "repeated field", f"'{value.key}' occurs twice; keep the right one.", raw)
    else:
        yield from expand_instances(Row(value, origin, raw))


def expand_instances(row: Row) -> Rows:
    """A Self-Instruct task holds several examples of one instruction."""
    if "instances" not in row.fields or "output" in row.fields:
        yield row
        return
    instances = row.fields["instances"]
    if not isinstance(instances, list) or not instances:
        yield Reject(
            row.origin, "instances", "no instances", "'instances' is not a list with examples in it.", row.raw
        )
        return
    task = {name: value for name, value in row.fields.items() if name != "instances"}
    for number, instance in enumerate(instances, start=1):
        origin = replace(row.origin, instance=number if len(instances) > 1 else 0)
        if isinstance(instance, dict):
            yield Row({**task, **instance}, origin, row.raw)
        else:
            yield Reject(origin, "instances", "not an object", "an instance is not an object {…}.", row.raw)


def read_csv(path: Path, name: str) -> Rows:
    """A header, then records, which may span lines inside quotes. A record's row is the line that it starts on."""
    source = read_text(path, name)
    csv.field_size_limit(2**31 - 1)  # the default of 131,072 characters is less than some documents have
    lines = list(io.StringIO(source.text, newline=""))
    positions = list(accumulate(map(len, lines), initial=0))
    records = _csv_records(lines)
    _, _, header, fault = next(records)
    if fault or len(set(header)) < len(header):
        raise UserError(f"{name}: the header {lines[0].strip()!r} is wrong: {fault or 'it names a column twice'}.")
    for first_line, end_line, values, fault in records:
        start, end, origin = positions[first_line], positions[end_line], Origin(name, first_line + 1)
        if not values and not fault:  # a blank line
            continue
        if not fault and len(values) != len(header):
            fault = f"wrong number of columns: {len(values)}, and the header has {len(header)}."
        if fault or source.bad_byte(start, end):
            yield source_reject(source, start, end, origin, fault or "")
        else:
            yield from expand_instances(Row(dict(zip(header, values, strict=True)), origin, source.text[start:end]))


def _csv_records(lines: list[str]) -> Iterator[tuple[int, int, list[str], str | None]]:
    """First line, line after the last, values and fault of each record.

    A quote that is never closed swallows all that follows, so after a broken record reading starts anew one line on.
    """
    start = 0
    while start < len(lines):
        base, records = start, csv.reader(islice(lines, start, None), strict=True)
        try:
            for values in records:
                yield start, base + records.line_num, values, None
                start = base + records.line_num
        except csv.Error as error:
            yield start, start + 1, [], f"broken csv: {error}."
            start += 1


def read_parquet(path: Path, name: str) -> Rows:
    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        row = 0
        for batch in batches:
            columns = [_strings(column) for column in batch.columns]
            for values in zip(*columns, strict=True):
                row += 1
                yield from _table_row(dict(zip(batch.schema.names, values, strict=True)), Origin(name, row))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{name} cannot be read as parquet: {error}") from None


def _strings(column: pyarrow.Array) -> list[Any]:
    """Arrow does not check that its strings are UTF-8; validate.py rejects the rows where they are not."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        values = column.cast(pyarrow.large_binary()).to_pylist()
        return [value if value is None else value.decode("utf-8", "surrogateescape") for value in values]


def _table_row(fields: dict[str, Any], origin: Origin) -> Rows:
    return expand_instances(Row(fields, origin, json.dumps(fields, ensure_ascii=False, default=str)))


def read_hub(dataset: datasets.Dataset, name: str) -> Rows:
    for row, fields in enumerate(dataset, start=1):
        yield from _table_row(fields, Origin(name, row))


def read_tsv(path: Path, name: str, directions: Directions) -> Rows:
    """Parallel text: two columns are a pair, further ones (an attribution) are not read; nothing is quoted."""
    source = read_text(path, name)
    lines = [(number, position, line) for number, position, line in source.lines() if line.strip()]
    columns, _ = Counter(line.count("\t") + 1 for _, _, line in lines).most_common(1)[0]
    if columns < 2:
        raise UserError(f"{name} has no tabs between its columns: a line is first ⇥ second ⇥ anything else.")
    for number, position, line in lines:
        origin, cells, fault = Origin(name, number), line.split("\t"), None
        if len(cells) != columns:
            fault = f"wrong number of columns: {len(cells)}, and most lines have {columns}."
        if fault or source.bad_byte(position, position + len(line)):
            yield source_reject(source, position, position + len(line), origin, fault or "")
        else:
            yield from _both_directions(cells[0], cells[1], origin, line, directions)


def read_aligned(first: str, second: str, directions: Directions) -> Rows:
    """Line N of one file belongs to line N of the other; if one has more lines, nobody knows which pairs are right."""
    sources = [read_text(Path(name), name) for name in (first, second)]
    lines = [list(source.lines()) for source in sources]
    if len(lines[0]) != len(lines[1]):
        raise UserError(
            f"{first} has {len(lines[0]):,} lines and {second} has {len(lines[1]):,}, so that line N no longer"
            " belongs to line N. Mend the files: a pair may be empty, a line may not be missing."
        )
    for pair in zip(*lines, strict=True):
        number, raw = pair[0][0], f"{pair[0][2]}\t{pair[1][2]}"
        bad = [
            source_reject(source, position, position + len(line), Origin(source.name, number), "")
            for source, (_, position, line) in zip(sources, pair, strict=True)
            if source.bad_byte(position, position + len(line))
        ]
        if bad:
            yield bad[0]
        else:
            yield from _both_directions(pair[0][2], pair[1][2], Origin(first, number), raw, directions)


def _both_directions(first: str, second: str, origin: Origin, raw: str, directions: Directions) -> Rows:
    for side, text in (("first side", first), ("second side", second)):
        if not text.strip():
            yield Reject(origin, side, f"empty {side}", f"the {side} of the pair is empty.", raw)
            return
    if directions.forward:
        yield Row({"instruction": directions.forward, "input": first, "output": second}, origin, raw)
    if directions.backward:
        yield Row({"instruction": directions.backward, "input": second, "output": first}, origin, raw)


ROW_READERS = {".json": read_json, ".jsonl": read_jsonl, ".csv": read_csv, ".parquet": read_parquet}

SAMPLES = {
    "tatoeba": Sample(
        "tatoeba_eng_kor.tsv", Directions("Translate English to Korean:", "Translate Korean to English:")
    ),
    "seed_tasks": Sample("self_instruct_seed_tasks.jsonl"),
}
