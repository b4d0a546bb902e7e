"""The stages of each row in tasks that may run anywhere, each into a file of its own, and these as if in one pass.

    write_part(job, folder, 2, tasks=4)     → folder/part-00002-of-00004.arrow, whole or not at all
    merged(job, folder)                     → the batches of all four in the order of the data, for gather.py

A part is an Arrow stream with one batch for each chunk that its task did. What else became of a chunk (which it is,
rejects, counts) stands as JSON beside its batch, and the last says how many chunks each source had: a part that is
missing, cut off, done twice, or of other data is an error that names it. Tasks know nothing of each other. Where there
are few sources, each task reads all and does every n-th chunk (of lines it takes 0.1 s to skip 100 MB); of many, it
reads only its own.
"""

from __future__ import annotations

import heapq
import json
import os
import re
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import pyarrow

from diptych.data_prep.command_line.errors import UserError, counted
from diptych.data_prep.pipeline.row_stages import Batch, Counts, Stages
from diptych.data_prep.reading.sources import Chunk, Source
from diptych.data_prep.rows.records import Origin, Reject

SOURCES_PER_TASK = 4
"""With so many, tasks that take whole sources are about equally long."""

CHUNK, END, FINGERPRINT = b"chunk", b"end", b"fingerprint"
PART_NAME = re.compile(r"part-(\d{5})-of-(\d{5})\.arrow")


class RowJob:
    """What is to be done to which data. No dataclass, so that an engine that writes down its steps writes a line."""

    def __init__(self, sources: Sequence[Source], stages: Stages, fingerprint: str) -> None:
        self.sources, self.stages = tuple(sources), stages
        self.fingerprint = fingerprint
        """Of everything that decides what comes out: what prepared.py reuses a dataset by."""

    def __repr__(self) -> str:
        return f"RowJob({len(self.sources)} sources, fingerprint {self.fingerprint[:12]})"


def part_path(folder: Path, task: int, tasks: int) -> Path:
    return folder / f"part-{task:05d}-of-{tasks:05d}.arrow"


def write_part(job: RowJob, folder: Path, task: int, tasks: int) -> Iterator[Batch]:
    """Each batch when it was written; the file has its name once the last one was taken."""
    path = part_path(folder, task, tasks)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # a task may be under way twice
    folder.mkdir(parents=True, exist_ok=True)
    writer, schema, chunks = None, job.stages.arrow([], 0).schema, Counter()
    try:
        with partial.open("wb") as file:
            for source, number, chunk in _chunks_of(job.sources, task, tasks, chunks):
                batch = job.stages.run(chunk, source)
                if writer is None:
                    schema = batch.examples.schema
                    writer = _writer(file, schema, job)
                writer.write_batch(batch.examples, {CHUNK: _to_json(source, number, batch)})
                yield batch
            writer = writer or _writer(file, schema, job)
            writer.write_batch(pyarrow.RecordBatch.from_pylist([], schema), {END: json.dumps(sorted(chunks.items()))})
            writer.close()
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def merged(job: RowJob, folder: Path) -> Iterator[tuple[int, Batch]]:
    """The batches of all parts with the numbers of their sources, in the order of the data."""
    paths, ends, done = _part_paths(folder), [], Counter()
    parts = [_batches(path, job, ends) for path in paths]
    for (source, number), batch in heapq.merge(*parts, key=lambda part: part[0]):
        if number != done[source]:
            raise _lacks(paths, job, source, done[source])
        done[source] += 1
        yield source, batch
    for source, count in ends:
        if done[source] != count:
            raise _lacks(paths, job, source, done[source])


def _batches(path: Path, job: RowJob, ends: list) -> Iterator[tuple[tuple[int, int], Batch]]:
    """Of one part, (source, number) before each; at the end, into `ends`, how many chunks each source had."""
    try:
        stream = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}. {_again(path)}") from None
    if (stream.schema.metadata or {}).get(FINGERPRINT, b"").decode() != job.fingerprint:
        raise UserError(
            f"{path} was made of other data, with other settings, or by other code. Give the settings that its"
            " tasks had, or run them again into a new folder."
        )
    while True:
        try:
            examples, beside = stream.read_next_batch_with_custom_metadata()
        except (StopIteration, pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is cut off. {_again(path)}") from error
        if END in beside:
            ends += json.loads(beside[END])
            return
        facts = json.loads(beside[CHUNK])
        rejects = [Reject(**reject | {"origin": Origin(**reject["origin"])}) for reject in facts["rejects"]]
        examples = examples.replace_schema_metadata(None)
        batch = Batch(examples, rejects, _counts_of(facts["counts"]), facts["bytes_done"])
        yield (facts["source"], facts["number"]), batch


def _lacks(paths: Sequence[Path], job: RowJob, source: int, chunk: int) -> UserError:
    path = paths[_task_of(source, chunk, len(paths), len(job.sources))]
    return UserError(f"{path} does not fit the other parts: something is missing or changed. {_again(path)}")


def _task_of(source: int, chunk: int, tasks: int, sources: int) -> int:
    return source % tasks if _takes_whole_sources(tasks, sources) else (source + chunk) % tasks


def _takes_whole_sources(tasks: int, sources: int) -> bool:
    return sources >= SOURCES_PER_TASK * tasks


def _chunks_of(
    sources: Sequence[Source], task: int, tasks: int, counts: Counter[int]
) -> Iterator[tuple[int, int, Chunk]]:
    """Source, number in it, and chunk; `counts` how many chunks those sources have that were read."""
    for source, content in enumerate(sources):
        if _takes_whole_sources(tasks, len(sources)) and source % tasks != task:
            continue
        for number, chunk in enumerate(content.chunks()):
            counts[source] = number + 1
            if _task_of(source, number, tasks, len(sources)) == task:
                yield source, number, chunk


def _part_paths(folder: Path) -> list[Path]:
    """In the order of their tasks, and all there."""
    names = [match for path in folder.glob("part-*") if (match := PART_NAME.fullmatch(path.name))]
    totals = sorted({int(match[2]) for match in names})
    if not totals:
        raise UserError(f"{folder} has no parts in it (part-00000-of-….arrow). Run the tasks first.")
    if len(totals) > 1:
        raise UserError(
            f"{folder} has parts of runs with {' and '.join(map(str, totals))} tasks. Remove those of one."
        )
    paths = [part_path(folder, task, totals[0]) for task in range(totals[0])]
    if missing := [path for path in paths if not path.is_file()]:
        others = f" {counted(len(missing) - 1, 'more part')} too." if len(missing) > 1 else ""
        raise UserError(f"{missing[0]} is missing.{others} {_again(missing[0])}")
    return paths


def _again(path: Path) -> str:
    task = PART_NAME.fullmatch(path.name)[1]
    return f"Run task {int(task)} again; if datatrove skips it, remove completions/{task} in its logging_dir first."


def _writer(file: IO[bytes], schema: pyarrow.Schema, job: RowJob) -> pyarrow.ipc.RecordBatchStreamWriter:
    return pyarrow.ipc.new_stream(file, schema.with_metadata({FINGERPRINT: job.fingerprint}))


def _to_json(source: int, number: int, batch: Batch) -> str:
    """In ASCII: what is no UTF-8 in a reject's raw text is a lone surrogate, which JSON can hold and UTF-8 cannot."""
    facts = {
        "source": source,
        "number": number,
        "bytes_done": batch.bytes_done,
        "rejects": [asdict(reject) for reject in batch.rejects],
        "counts": vars(batch.counts),
    }
    return json.dumps(facts)


def _counts_of(values: dict[str, Any]) -> Counts:
    return Counts(**{name: Counter(value) if isinstance(value, dict) else value for name, value in values.items()})
