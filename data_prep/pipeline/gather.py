"""Every source through the stages, in one pass, into one Arrow file that need not fit into memory.

    sources ─ chunks ─▶ worker processes ─ batches, in order ─▶ scratch/examples.arrow, rejects.jsonl, counts

In memory are a few chunks a worker, and counts. What is known of all rows at once afterwards (lengths, keys, which
source) are columns of integers; texts and token ids are read from the file, which the system maps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy
import pyarrow
from tqdm import tqdm

from diptych.data_prep.cleaning.duplicates import PERMUTATIONS
from diptych.data_prep.command_line.errors import counted
from diptych.data_prep.pipeline.row_stages import Batch, Counts, Stages
from diptych.data_prep.pipeline.workers import in_order
from diptych.data_prep.reading.sources import Source
from diptych.data_prep.rows.records import Rejects, Row

ROWS_TO_RECOGNISE = 100
LINES_TO_RECOGNISE = 10_000
"""A file may begin with so many rows that cannot be read, and its format is still found."""

ROWS_AT_ONCE = 2_000


@dataclass(frozen=True)
class Gathered:
    """What all sources gave: examples in a file, and what was counted on the way."""

    examples: pyarrow.Table
    """Mapped from the file: columns of stages.py."""
    signatures: numpy.ndarray | None
    """(rows, permutations), mapped too, where near duplicates are looked for."""
    counts: Counts
    examples_read: list[int]
    """Of each source: examples and rejects. `counts.rows` are the rows that gave them."""

    def column(self, name: str) -> numpy.ndarray:
        """A column of numbers, (rows,)."""
        return self.examples[name].to_numpy()


def first_rows(source: Source) -> list[Row]:
    """Those by which a format is recognised."""
    rows = (row for row in islice(source.rows(), LINES_TO_RECOGNISE) if isinstance(row, Row))
    return list(islice(rows, ROWS_TO_RECOGNISE))


def gather(sources: Sequence[Source], stages: Stages, rejects: Rejects, scratch: Path, workers: int) -> Gathered:
    """`scratch` is an existing folder, which has to stay as long as the result is used."""
    total = sum(source.bytes for source in sources) if all(source.bytes for source in sources) else None
    with tqdm(total=total, unit="B", unit_scale=True, desc="Reading", mininterval=0.5) as bar:
        batches = _batches(sources, stages, workers, rejects, bar)
        return collect(batches, len(sources), stages, rejects, scratch)


def collect(
    numbered: Iterable[tuple[int, Batch]], sources: int, stages: Stages, rejects: Rejects, scratch: Path
) -> Gathered:
    """Batches, each with the number of its source, in the order of the data, wherever they were made."""
    counts, examples_read = Counts(), Counter()
    signatures_file = (scratch / "signatures").open("wb") if stages.shingles else None

    def batches() -> Iterator[pyarrow.RecordBatch]:
        for number, batch in numbered:
            examples_read[number] += batch.examples_read
            counts.add(batch.counts)
            for reject in batch.rejects:
                rejects.add(reject)
            examples = batch.examples
            if signatures_file is not None:
                signatures_file.write(b"".join(examples["signature"].to_pylist()))
                examples = examples.drop_columns(["signature"])
            yield examples

    examples = written(batches(), scratch / "examples.arrow")
    signatures = None
    if signatures_file is not None:
        signatures_file.close()
        shape = (examples.num_rows, PERMUTATIONS)
        signatures = numpy.memmap(scratch / "signatures", numpy.uint32, "r", shape=shape) if shape[0] else None
    return Gathered(examples, signatures, counts, [examples_read[number] for number in range(sources)])


def encode(
    gathered: Gathered, rows: numpy.ndarray, stages: Stages, rejects: Rejects, scratch: Path, workers: int
) -> Gathered:
    """These rows (ascending places) with token ids, for a tokenizer that was trained on some of them. As some become
    rejects here, the column `place` says where a row stood before."""
    numbered = gathered.examples.append_column("place", pyarrow.array(numpy.arange(gathered.examples.num_rows)))
    tasks = ((batch,) for batch in taken(numbered, rows))

    def batches() -> Iterator[pyarrow.RecordBatch]:
        with tqdm(total=len(rows), unit=" examples", unit_scale=True, desc="Encoding") as bar:
            for batch in in_order(stages.encode, tasks, workers):
                for reject in batch.rejects:
                    rejects.add(reject)
                gathered.counts.add(batch.counts)
                bar.update(batch.examples_read)
                yield batch.examples

    examples = written(batches(), scratch / "encoded.arrow")
    return Gathered(examples, None, gathered.counts, gathered.examples_read)


def written(batches: Iterable[pyarrow.RecordBatch], path: Path) -> pyarrow.Table:
    """The batches as an Arrow stream on disk, mapped. Without a single batch, a table without columns."""
    writer = None
    with pyarrow.OSFile(str(path), "wb") as file:
        for batch in batches:
            writer = writer or pyarrow.ipc.new_stream(file, batch.schema)
            writer.write_batch(batch)
        if writer is None:
            return pyarrow.table({})
        writer.close()
    return pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()


def taken(table: pyarrow.Table, rows: numpy.ndarray) -> Iterator[pyarrow.RecordBatch]:
    """The rows at these places, which ascend and may repeat, a batch for each that the table has."""
    start = 0
    for batch in table.to_batches(max_chunksize=ROWS_AT_ONCE):
        end = start + batch.num_rows
        first, last = numpy.searchsorted(rows, [start, end])
        if first < last:
            yield batch.take(pyarrow.array(rows[first:last] - start))
        start = end


def _batches(
    sources: Sequence[Source], stages: Stages, workers: int, rejects: Rejects, bar: tqdm
) -> Iterator[tuple[int, Batch]]:
    numbers: list[int] = []  # of the chunks under way, in order

    def tasks() -> Iterator[tuple]:
        for number, source in enumerate(sources):
            for chunk in source.chunks():
                numbers.append(number)
                yield chunk, number

    done_before, done, current, rows = 0, 0, 0, 0
    for batch in in_order(stages.run, tasks(), workers):
        number = numbers.pop(0)
        if number != current:
            done_before, done, current = done_before + done, 0, number
        done = batch.bytes_done
        rows += batch.counts.rows
        yield number, batch
        bar.set_postfix_str(f"{counted(rows, 'row')}, {rejects.count:,} rejected", refresh=False)
        bar.update(done_before + done - bar.n)
