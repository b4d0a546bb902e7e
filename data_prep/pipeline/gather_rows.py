"""Runs every source through the stages, in one pass, into one Arrow file that may be larger than memory.

    sources ─ chunks ─▶ worker processes ─ batches, in order ─▶ scratch/examples.arrow, rejects.jsonl, counts

Only a few chunks a worker are in memory, and counts. Afterwards, the columns of integers (lengths, keys, source) are
read as a whole; texts and token ids stay in the file, which is memory-mapped.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path

import numpy
import pyarrow
from tqdm import tqdm

from diptych.data_prep.cleaning.duplicates import PERMUTATIONS
from diptych.data_prep.command_line.errors import counted
from diptych.data_prep.pipeline.row_stages import MARK_FIELD, REJECTED_KEY_FIELD, Batch, Counts, Stages
from diptych.data_prep.pipeline.workers import in_order
from diptych.data_prep.reading.sources import Source
from diptych.data_prep.rows.records import Preferences, Rejects, Row

ROWS_TO_RECOGNISE = 100
LINES_TO_RECOGNISE = 10_000
"""The format is found even if a file begins with nearly so many rows that cannot be read."""

ROWS_AT_ONCE = 2_000


@dataclass(frozen=True)
class Gathered:
    """The examples of all sources, in a file, and what was counted while they were read."""

    examples: pyarrow.Table
    """Mapped from the file: the columns of row_stages.py."""
    signatures: numpy.ndarray | None
    """(rows, permutations), mapped too, where near duplicates are looked for."""
    counts: Counts
    examples_read: list[int]
    """For each source, how many examples and rejects it gave. `counts.rows` counts the rows of all."""

    @property
    def preferences(self) -> Preferences | None:
        """What the data says of its answers. Columns that a user keeps may have the same names, and are texts."""
        columns = {"pairs": REJECTED_KEY_FIELD, "marks": MARK_FIELD}
        return next((kind for kind, field in columns.items() if field in list(self.examples.schema)), None)

    def column(self, name: str) -> numpy.ndarray:
        """A column of numbers, (rows,)."""
        return self.examples[name].to_numpy()


def first_rows(source: Source) -> list[Row]:
    """The rows by which the format of a source is recognised."""
    rows = (row for row in islice(source.rows(), LINES_TO_RECOGNISE) if isinstance(row, Row))
    return list(islice(rows, ROWS_TO_RECOGNISE))


def gather(sources: Sequence[Source], stages: Stages, rejects: Rejects, scratch: Path, workers: int) -> Gathered:
    """Reads all sources here. `scratch` is a folder that has to stay as long as the result is used."""
    sizes = [source.bytes for source in sources]
    bytes_before = list(accumulate((size or 0 for size in sizes), initial=0))
    tasks = ((chunk, number) for number, source in enumerate(sources) for chunk in source.chunks())
    bar = tqdm(total=sum(sizes) if all(sizes) else None, unit="B", unit_scale=True, desc="Reading", mininterval=0.5)

    def batches() -> Iterator[Batch]:
        rows = 0
        for batch in in_order(stages.run, tasks, workers):
            yield batch
            rows += batch.counts.rows
            bar.set_postfix_str(f"{counted(rows, 'row')}, {rejects.count:,} rejected", refresh=False)
            bar.update(bytes_before[batch.source_number] + batch.bytes_done - bar.n)

    with bar:
        return collect(batches(), len(sources), stages, rejects, scratch)


def collect(batches: Iterable[Batch], sources: int, stages: Stages, rejects: Rejects, scratch: Path) -> Gathered:
    """Writes batches to a file and counts them. They come in the order of the data, from any engine."""
    counts, examples_read = Counts(), [0] * sources
    has_signatures = stages.has_signatures
    schema = stages.schema.remove(stages.schema.get_field_index("signature")) if has_signatures else stages.schema

    with (scratch / "signatures").open("wb") as signatures_file:

        def examples() -> Iterator[pyarrow.RecordBatch]:
            for batch in batches:
                examples_read[batch.source_number] += batch.examples_read
                examples = _counted(batch, counts, rejects)
                if has_signatures:
                    signatures_file.write(b"".join(examples["signature"].to_pylist()))
                yield examples.select(schema.names)

        table = written(examples(), schema, scratch / "examples.arrow")
    signatures = None
    if has_signatures and table.num_rows:
        shape = (table.num_rows, PERMUTATIONS)
        signatures = numpy.memmap(scratch / "signatures", numpy.uint32, "r", shape=shape)
    return Gathered(table, signatures, counts, examples_read)


def encode(
    gathered: Gathered, rows: numpy.ndarray, stages: Stages, rejects: Rejects, scratch: Path, workers: int
) -> Gathered:
    """The rows at these places (ascending) with token ids, for a tokenizer that was trained on some of them. Some
    become rejects here, so the column `place` tells where a row stood before."""
    numbered = gathered.examples.append_column("place", pyarrow.array(numpy.arange(gathered.examples.num_rows)))
    tasks = ((batch,) for batch in taken(numbered, rows))

    def examples() -> Iterator[pyarrow.RecordBatch]:
        with tqdm(total=len(rows), unit=" examples", unit_scale=True, desc="Encoding") as bar:
            for batch in in_order(stages.encode, tasks, workers):
                bar.update(batch.examples_read)
                yield _counted(batch, gathered.counts, rejects)

    schema = pyarrow.schema([*numbered.schema, *stages.id_fields])
    return replace(gathered, examples=written(examples(), schema, scratch / "encoded.arrow"), signatures=None)


def _counted(batch: Batch, counts: Counts, rejects: Rejects) -> pyarrow.RecordBatch:
    """Adds the rejects and counts of a batch to those of all, and returns its examples."""
    counts.add(batch.counts)
    for reject in batch.rejects:
        rejects.add(reject)
    return batch.examples


def written(batches: Iterable[pyarrow.RecordBatch], schema: pyarrow.Schema, path: Path) -> pyarrow.Table:
    """Writes the batches to an Arrow stream on disk; the table is memory-mapped from there."""
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as stream:
        for batch in batches:
            stream.write_batch(batch)
    return pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()


def taken(table: pyarrow.Table, rows: numpy.ndarray) -> Iterator[pyarrow.RecordBatch]:
    """The rows at these places, which ascend and may repeat, in batches."""
    start = 0
    for batch in table.to_batches(max_chunksize=ROWS_AT_ONCE):
        end = start + batch.num_rows
        first, last = numpy.searchsorted(rows, [start, end])
        if first < last:
            yield batch.take(pyarrow.array(rows[first:last] - start))
        start = end
