"""The row stages in tasks that may run anywhere: each task writes a file, and the files are merged in order.

    write_part(job, folder, 2, tasks=4)     → folder/part-00002-of-00004.arrow, whole or not at all
    merged(job, folder)                     → the batches of all four in the order of the data, for gather_rows.py

A part is an Arrow stream with one batch for each chunk of its task. The number of the chunk, its rejects and counts
are JSON beside the batch. The last batch is empty and tells how many chunks each source had. So a part that is
missing, cut off, doubled, or made of other data is an error that names it. Tasks need not know of each other. If
there are few sources, each task reads all and runs every n-th chunk (to skip 100 MB of lines takes 0.1 s); if there
are many, each task reads only its own.
"""

import heapq
import json
import os
import re
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow

from diptych.data_prep.command_line.errors import UserError, counted
from diptych.data_prep.pipeline.row_stages import Batch, Counts, Stages
from diptych.data_prep.reading.sources import Chunk, Source
from diptych.data_prep.rows.records import Origin, Reject

SOURCES_PER_TASK = 4
"""With so many sources for each task, tasks of whole sources take about the same time."""

CHUNK, END, FINGERPRINT = b"chunk", b"end", b"fingerprint"
PART_NAME = re.compile(r"part-(\d{5})-of-(\d{5})\.arrow")


class RowJob:
    """The sources, and the stages that their rows go through. No dataclass: datatrove would write down all of it."""

    def __init__(self, sources: Sequence[Source], stages: Stages, fingerprint: str) -> None:
        self.sources, self.stages = tuple(sources), stages
        self.fingerprint = fingerprint
        """Of everything that decides the result; see `fingerprint_of`."""

    def __repr__(self) -> str:
        return f"RowJob({len(self.sources)} sources, fingerprint {self.fingerprint[:12]})"

    def task_of(self, source: int, chunk: int, tasks: int) -> int:
        return source % tasks if self._takes_whole_sources(tasks) else (source + chunk) % tasks

    def _takes_whole_sources(self, tasks: int) -> bool:
        return len(self.sources) >= SOURCES_PER_TASK * tasks

    def chunks_of(self, task: int, tasks: int, found: Counter[int]) -> Iterator[tuple[int, int, Chunk]]:
        """Source number, chunk number and chunk; `found` counts the chunks of each source that was read."""
        for source, content in enumerate(self.sources):
            if self._takes_whole_sources(tasks) and source % tasks != task:
                continue
            for number, chunk in enumerate(content.chunks()):
                found[source] += 1
                if self.task_of(source, number, tasks) == task:
                    yield source, number, chunk


def part_path(folder: Path, task: int, tasks: int) -> Path:
    return folder / f"part-{task:05d}-of-{tasks:05d}.arrow"


def write_part(job: RowJob, folder: Path, task: int, tasks: int) -> Iterator[Batch]:
    """Yields each batch after it was written. The file gets its name once the last one was taken."""
    path = part_path(folder, task, tasks)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # the same task may run twice at a time
    folder.mkdir(parents=True, exist_ok=True)
    schema, found = job.stages.schema, Counter()
    try:
        with partial.open("wb") as file:
            with pyarrow.ipc.new_stream(file, schema.with_metadata({FINGERPRINT: job.fingerprint})) as stream:
                for source, number, chunk in job.chunks_of(task, tasks, found):
                    batch = job.stages.run(chunk, source)
                    # In ASCII, because raw text of rejects may have lone surrogates, which UTF-8 cannot hold.
                    facts = {name: getattr(batch, name) for name in ("source_number", "bytes_done")}
                    facts |= {"rejects": [asdict(reject) for reject in batch.rejects], "counts": vars(batch.counts)}
                    stream.write_batch(batch.examples, {CHUNK: json.dumps({"number": number, **facts})})
                    yield batch
                end = json.dumps(sorted(found.items()))
                stream.write_batch(pyarrow.RecordBatch.from_pylist([], schema), {END: end})
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def merged(job: RowJob, folder: Path) -> Iterator[Batch]:
    """The batches of all parts, in the order of the data."""
    paths, ends, done = _part_paths(folder), [], Counter()

    def check(source: int, chunk: int) -> None:
        """UserError where another chunk of the source is the next."""
        if chunk != done[source]:
            path = paths[job.task_of(source, done[source], len(paths))]
            raise UserError(f"{path} does not fit the other parts: something is missing or changed. {_again(path)}")

    parts = [_numbered_batches(path, job, ends) for path in paths]
    for number, batch in heapq.merge(*parts, key=lambda numbered: (numbered[1].source_number, numbered[0])):
        check(batch.source_number, number)
        done[batch.source_number] += 1
        yield batch
    for source, chunks in ends:
        check(source, chunks)


def _numbered_batches(path: Path, job: RowJob, ends: list) -> Iterator[tuple[int, Batch]]:
    """Of one part, each with the number of its chunk; at the end, into `ends`, how many chunks each source had."""
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
        counts = Counts(**{name: Counter(it) if isinstance(it, dict) else it for name, it in facts["counts"].items()})
        examples = examples.replace_schema_metadata(None)
        yield facts["number"], Batch(facts["source_number"], facts["bytes_done"], examples, rejects, counts)


def _part_paths(folder: Path) -> list[Path]:
    """The files of all tasks, in order. Raises UserError where one is missing."""
    names = [match for path in folder.glob("part-*") if (match := PART_NAME.fullmatch(path.name))]
    totals = sorted({int(match[2]) for match in names})
    if not totals:
        raise UserError(f"{folder} has no parts in it (part-00000-of-….arrow). Run the tasks first.")
    if len(totals) > 1:
        runs = " and ".join(map(str, totals))
        raise UserError(f"{folder} has parts of runs with {runs} tasks. Remove those of one.")
    paths = [part_path(folder, task, totals[0]) for task in range(totals[0])]
    if missing := [path for path in paths if not path.is_file()]:
        others = f" {counted(len(missing) - 1, 'more part')} too." if len(missing) > 1 else ""
        raise UserError(f"{missing[0]} is missing.{others} {_again(missing[0])}")
    return paths


def _again(path: Path) -> str:
    task = PART_NAME.fullmatch(path.name)[1]
    return f"Run task {int(task)} again; if datatrove skips it, remove completions/{task} in its logging_dir first."
