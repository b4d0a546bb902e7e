"""Rows of Parquet and Arrow files, and of data sets of the Hub, a slice of some 1,000 at a time.

    instruction  output         Row({"instruction": "Add.", "output": "2"}, Origin("rows.parquet", 1), raw)
    "Add."       "2"       →
    "Sub."       b"\xff"        Reject "invalid UTF-8 in 'output': byte 0xff at byte 0 of the value."

Values become Python objects in the worker: those of `datasets`' Json() are decoded, and a ClassLabel is the name that
the file gives to its number.

Files are not trusted: their unpacked size is checked first, and so are Arrow's offsets, since a wrong one would be
followed to any place in memory.
"""

import contextlib
import functools
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from diptych.data_prep.command_line.errors import UserError, excerpt
from diptych.data_prep.reading.find_files import File, Limits, OwnBytes
from diptych.data_prep.reading.json_rows import STRICT_JSON, is_too_deep, json_fault
from diptych.data_prep.reading.row_chunks import (
    CHARACTERS_IN_CHUNK,
    ROWS_IN_CHUNK,
    Chunk,
    Rows,
    size_if_too_large,
    too_large,
)
from diptych.data_prep.rows.records import Origin, Reject, Row

MOST_BATCH_BYTES = 1 << 28
"""What the rows decoded at once may come to, if each held all that its row group has (a value that is stored once may
stand in every row)."""

FEWEST_ROWS = 16

TEXT_TYPES = (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())
LIST_TYPES = (
    pyarrow.ListType,
    pyarrow.LargeListType,
    pyarrow.FixedSizeListType,
    pyarrow.ListViewType,
    pyarrow.LargeListViewType,
)

FAULTS = (pyarrow.ArrowException, OSError, MemoryError, UnicodeDecodeError)
"""What Arrow raises for broken files; the last one for a column's name."""


@dataclass(frozen=True)
class Columns:
    """Rows as Arrow has them; a worker makes Python values of them."""

    name: str
    batch: pyarrow.RecordBatch
    first_row: int
    bytes_done: int
    limits: Limits

    def __reduce__(self) -> tuple:
        """Arrow pickles a slice with the whole batch; the stream format holds only its own rows."""
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, self.batch.schema) as stream:
            stream.write_batch(self.batch)
        return _columns_again, (self.name, sink.getvalue().to_pybytes(), self.first_row, self.bytes_done, self.limits)

    def rows(self) -> Rows:
        try:  # `datasets` writes its features into the schema
            features = json.loads(self.batch.schema.metadata[b"huggingface"])["info"]["features"]
        except (TypeError, KeyError, ValueError):
            features = None
        names = self.batch.schema.names
        decoders = [_decoder(it.type, _inside(features, it.name), self.limits) for it in self.batch.schema]
        columns = list(map(_values, self.batch.columns, decoders))
        for number, values in enumerate(zip(*columns, strict=True), self.first_row):
            yield _row(dict(zip(names, values, strict=True)), Origin(self.name, number), self.limits)


def _columns_again(name: str, stream: bytes, first_row: int, bytes_done: int, limits: Limits) -> Columns:
    with pyarrow.ipc.open_stream(stream) as reader:
        return Columns(name, reader.read_next_batch(), first_row, bytes_done, limits)


class _Unreadable(str):
    """What is wrong with a value that cannot be a Python value."""


Decoder = Callable[[Any], Any]
"""From a stored value to the one that is meant. Raises ValueError("kind: what is wrong")."""


def _inside(feature: Any, key: str) -> Any:
    return feature.get(key) if isinstance(feature, dict) else None


def _decoder(kind: pyarrow.DataType, feature: Any, limits: Limits) -> Decoder | None:
    """None if values are meant as stored. `feature` is what `datasets` says of values of this type: {"_type": "List",
    "feature": …} or [feature] of a list, {name: feature} of a struct; anything else says nothing."""
    what = _inside(feature, "_type")
    is_json = isinstance(kind, pyarrow.BaseExtensionType) and kind.extension_name == "arrow.json"
    if is_json or (what == "Json" and kind in TEXT_TYPES):
        return functools.partial(_json_value, limits=limits)
    if what == "ClassLabel" and pyarrow.types.is_integer(kind) and isinstance(names := feature.get("names"), list):
        return functools.partial(_label_name, names=names)
    if pyarrow.types.is_struct(kind):
        if what == "Sequence":  # of objects, which `datasets` before 4.0 stores as an object of lists
            inner = _inside(feature, "feature")
            feature = {field.name: [_inside(inner, field.name)] for field in kind}
        decoders = {field.name: _decoder(field.type, _inside(feature, field.name), limits) for field in kind}
        decoders = {name: decode for name, decode in decoders.items() if decode}
        if decoders:
            return lambda value: {name: _decoded(inner, decoders.get(name)) for name, inner in value.items()}
    if isinstance(kind, LIST_TYPES):
        inner = feature[0] if isinstance(feature, list) and feature else _inside(feature, "feature")
        if decode := _decoder(kind.value_type, inner, limits):
            return lambda value: [_decoded(inner, decode) for inner in value]
    return None


def _json_value(text: str, limits: Limits) -> Any:
    try:
        value = STRICT_JSON.decode(text)
        if is_too_deep(value, text, limits):
            raise RecursionError
        return value
    except (ValueError, RecursionError) as error:
        kind, reason, _ = json_fault(error, lambda at: f"character {at + 1}", 0)
        raise ValueError(f"{kind}: {reason.removeprefix(f'{kind}: ').rstrip('.')}") from None


def _label_name(value: int, names: list[Any]) -> Any:
    """-1 means in `datasets` that there is none."""
    if not -1 <= value < len(names):
        raise ValueError(f"unknown label: {value}, and the file names 0 to {len(names) - 1}")
    return None if value == -1 else names[value]


def _decoded(value: Any, decode: Decoder | None) -> Any:
    return value if decode is None or value is None else decode(value)


def _values(column: pyarrow.Array, decode: Decoder | None) -> list[Any]:
    """Arrow does not check that its strings are UTF-8, and has times that Python has not. Such a value rejects its
    row."""
    try:
        return [_decoded(value, decode) for value in column.to_pylist()] if decode else column.to_pylist()
    except (ValueError, OverflowError, pyarrow.ArrowException):
        return [_value(scalar, decode) for scalar in column]


def _value(scalar: pyarrow.Scalar, decode: Decoder | None) -> Any:
    try:
        value = scalar.as_py()
    except UnicodeDecodeError as error:
        return _Unreadable(f"invalid UTF-8: byte 0x{error.object[error.start]:02x} at byte {error.start} of the value")
    except (ValueError, OverflowError, pyarrow.ArrowException) as error:
        return _Unreadable(f"unreadable value: {error}")
    try:
        return _decoded(value, decode)
    except ValueError as error:
        return _Unreadable(error)


def _row(fields: dict[str, Any], origin: Origin, limits: Limits) -> Row | Reject:
    raw = json.dumps(fields, ensure_ascii=False, default=str)
    if size := size_if_too_large(raw, limits):
        return too_large(origin, raw, size, limits)
    for name, value in fields.items():
        if isinstance(value, _Unreadable):
            kind, _, what = value.partition(": ")
            return Reject(origin, name, kind, f"{kind} in '{name}': {what}.", raw)
    return Row(fields, origin, raw)


def _chunks(
    batches: Iterable[pyarrow.RecordBatch], name: str, bytes_done: Callable[[], int], limits: Limits
) -> Iterator[Chunk]:
    """Slices of batches, bounded in rows and in the bytes that they come to when written out."""
    first_row = 1
    for batch in batches:
        sizes = (  # at most so many bytes the values have: a dictionary holds once what may stand in every row
            batch.num_rows * column.dictionary.nbytes if isinstance(column, pyarrow.DictionaryArray) else column.nbytes
            for column in batch.columns
        )
        step = min(ROWS_IN_CHUNK, max(1, batch.num_rows * CHARACTERS_IN_CHUNK // max(1, sum(sizes))))
        for start in range(0, batch.num_rows, step):
            part = batch.slice(start, step)
            yield Columns(name, part, first_row, bytes_done(), limits)
            first_row += part.num_rows


def _check_columns(schema: pyarrow.Schema, name: str) -> None:
    inside = list(schema)
    while inside:  # decoding a name, also of a field in a field, raises one of FAULTS
        kind = inside.pop().type
        inside += [kind.field(place) for place in range(kind.num_fields) if kind.field(place).name is not None]
    twice = [column for column, count in Counter(schema.names).items() if count > 1]
    if twice:
        raise UserError(f"{name} has the column '{twice[0]}' twice. Rename or drop one.")


@contextlib.contextmanager
def _faults_named(file: File, format: str) -> Iterator[None]:
    """Arrow's errors as a UserError; and an error if the file has changed, whichever way it ended."""
    try:
        yield
    except FAULTS as error:
        file.check_content()
        raise UserError(f"{file.name} cannot be read as {format}: {excerpt(error).rstrip('.')}.") from None
    file.check_content()


def parquet_chunks(file: File, limits: Limits) -> Iterator[Chunk]:
    """Row group by row group, some rows at a time; the fewer, the larger the group is."""
    with _faults_named(file, "parquet"), OwnBytes(file) as raw, pyarrow.parquet.ParquetFile(raw) as parquet:
        _check_columns(parquet.schema_arrow, file.name)
        # Sizes are of whole groups: to ask for one column of a broken file ends the process (pyarrow 26).
        sizes = [parquet.metadata.row_group(group).total_byte_size for group in range(parquet.num_row_groups)]
        _check_unpacked(sum(sizes), "it", file, limits)
        rows = [min(ROWS_IN_CHUNK, max(FEWEST_ROWS, MOST_BATCH_BYTES // max(1, size))) for size in sizes]
        batches = (parquet.iter_batches(it, [group], use_threads=False) for group, it in enumerate(rows))
        yield from _chunks(itertools.chain.from_iterable(batches), file.name, raw.tell, limits)


def arrow_chunks(file: File, limits: Limits) -> Iterator[Chunk]:
    """An Arrow file or stream, batch by batch as it was written: one batch is in memory at a time."""
    with _faults_named(file, "Arrow"), OwnBytes(file) as raw:
        is_file = raw.read(6) == b"ARROW1"
        raw.seek(0)
        reader = pyarrow.ipc.open_file(raw) if is_file else pyarrow.ipc.open_stream(raw)
        _check_columns(reader.schema, file.name)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        yield from _chunks(_sound_batches(batches, file, limits), file.name, raw.tell, limits)


def _sound_batches(
    batches: Iterable[pyarrow.RecordBatch], file: File, limits: Limits
) -> Iterator[pyarrow.RecordBatch]:
    for number, batch in enumerate(batches, start=1):
        for column in batch.columns:  # before anything else is asked of it, its size included
            try:
                column.validate(full=True)  # Arrow does not check offsets when it reads
            except pyarrow.ArrowInvalid as error:  # text that is no UTF-8 is a reject later
                if "UTF8" not in str(error) or column.type not in TEXT_TYPES[:2]:
                    raise
                binary = pyarrow.binary() if column.type == TEXT_TYPES[0] else pyarrow.large_binary()
                column.view(binary).validate(full=True)
        _check_unpacked(batch.nbytes, f"its batch {number}", file, limits)
        yield batch


def _check_unpacked(size: int, what: str, file: File, limits: Limits) -> None:
    if size > (most := limits.unpacked_bytes(file.bytes)):
        raise UserError(
            f"{file.name} has {file.bytes:,} bytes, and {what} unpacks to {size:,}; at most {most:,} may come of it."
            " If you trust it, raise max_unpacked_ratio."
        )


def hub_chunks(dataset: Any, name: str, limits: Limits) -> Iterator[Chunk]:
    _check_columns(dataset.features.arrow_schema, name)
    tables = dataset.with_format("arrow").iter(batch_size=ROWS_IN_CHUNK)
    features = dataset.features.arrow_schema.metadata
    batches = (batch.replace_schema_metadata(features) for table in tables for batch in table.to_batches())
    return _chunks(batches, name, lambda: 0, limits)
