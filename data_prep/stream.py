"""Rows that are checked, rendered, encoded and packed while they are read: data that need not be prepared first.

    stream = open_stream(settings, Path("run/rejects"))       the settings of `diptych prepare`
    for row in stream.shard(rank, ranks): …                   the arrays of a packed row, (S,) and (T,), see packing.py
    state = stream.state_dict()                               after any row; load_state_dict goes on with the next one

Data is read in parts (a file; of small files, several; of a Hub data set, each of its files), and of a part some
neighbouring chunks, a window, are packed by themselves: twelve windows of 3,100 examples fill the targets of their
rows to 91.3 %, and to 91.7 % when they are packed at once. Where there are many parts each shard reads its own, where
there are few it reads all of them and does every n-th window. So a position is four integers, nothing of what was read
has to be saved, and shards neither overlap nor leave a gap. To go on, parts before the position are not opened, and of
its own part what comes before is only read (the end of 200 MB of JSONL is reached in 0.4 s; formats whose rows are
found by parsing take longer). Every epoch has its parts in another order and packs its windows anew, by the seed.

One of four shards of a file of 200 MB takes 75 MB of memory beside the 365 MB that imports take. What needs all rows
at once (duplicates, splits, a trained tokenizer, a mixture) needs `diptych prepare`. Local files are digested when a
stream is opened, so that a position is never taken for one in other data; of the Hub the revision counts.
"""

from __future__ import annotations

import functools
import json
import os
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute

from diptych.data_prep.checkpoint_tokenizer import decoder_start_of, load_tokenizer_and_template
from diptych.data_prep.encode import vocabulary_size
from diptych.data_prep.inputs import (
    Inputs,
    facts_that_decide,
    fatal_kinds,
    limits_of,
    make_converter,
    make_stages,
    open_inputs,
)
from diptych.data_prep.packing import Budget, assemble_row, choose_budget, pack, repeated_start
from diptych.data_prep.prepared import fingerprint
from diptych.data_prep.read_columns import hub_chunks
from diptych.data_prep.readers import HUB_PREFIX, Chunk, Limits, Source
from diptych.data_prep.records import Reject, Rejects, UserError
from diptych.data_prep.settings import PrepareSettings
from diptych.data_prep.stages import Stages

PART_BYTES = 8_000_000
"""Smaller files are read together, so that a folder of many packs as well as one file."""

PARTS_PER_SHARD = 4
"""With so many, shards that read their own parts alone have about equally much to do."""

WINDOW_CHUNKS = 8
"""2 MB of JSONL, and of other formats at most 8 MB or 16,000 rows."""

POSITION = "position"
"""A column of each row, (5,): its shard, and the Position after it."""

NOT_STREAMED = ("near_duplicates", "mixture", "train_tokenizer", "share_sources", "gathered")


class Position(NamedTuple):
    """Where the next row is. Positions compare as rows follow one another."""

    epoch: int = 0
    part: int = 0
    """In the order of this epoch."""
    window: int = 0
    """In its part."""
    row: int = 0
    """In its window."""


@dataclass
class PackedStream:
    """Packed rows of one shard, from a position on. Cheap to copy and to send to another process."""

    sources: tuple[Source, ...]
    stages: Stages
    budget: Budget
    pad_token_id: int
    decoder_start_token_id: int
    seed: int
    fingerprint: str
    """Of everything that decides which rows there are."""
    rejects_folder: Path
    """Where is written down which rows were not kept, once: a file for each window that has such rows."""
    strict: bool = False
    fatal: tuple[str, ...] = ()
    epochs: int | None = 1
    """None goes on without end: shards have not equally many rows, and ranks that train together count steps."""
    index: int = 0
    shards: int = 1
    position: Position = Position()
    window_chunks: int = WINDOW_CHUNKS
    part_bytes: int = PART_BYTES

    @property
    def vocabulary(self) -> int:
        return vocabulary_size(self.stages.tokenizer)

    def shard(self, index: int, shards: int) -> PackedStream:
        """One of `shards` that together are the whole, from its beginning."""
        if not 0 <= index < shards:
            raise UserError(f"shard {index} of {shards}: shards are numbered from 0 to {shards - 1}.")
        return replace(self, index=index, shards=shards, position=Position())

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """From the position on; it moves with each row that is taken."""
        while self.epochs is None or self.position.epoch < self.epochs:
            epoch = Position(self.position.epoch)
            yield from self._rest_of_epoch()
            if self.epochs is None and self.position == epoch:
                raise UserError(
                    f"shard {self.index} of {self.shards} has no rows: there are too few for so many ranks and"
                    " workers, or none is kept. Take fewer, or prepare the data."
                )
            self.position = Position(epoch.epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        """Integers and a string, for JSON."""
        place = {"position": list(self.position), "shard": self.index, "shards": self.shards}
        return {**place, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.check_same_data(state["fingerprint"])
        if (state["shard"], state["shards"]) != (self.index, self.shards):
            raise UserError(
                f"the position is that of shard {state['shard']} of {state['shards']}, and this is {self.index} of"
                f" {self.shards}. Go on with as many ranks and workers as before."
            )
        self.position = Position(*state["position"])

    def check_same_data(self, other: str) -> None:
        if other != self.fingerprint:
            raise UserError(
                "the position is in other data: a file, the template, the tokenizer, a setting or the code has changed"
                " since. Begin anew, or restore what was."
            )

    def rejected(self) -> Counter[str]:
        """How many rows of which fault all shards have met so far, as their files say."""
        kinds = Counter()
        for path in self._rejects_files().glob("*/*.jsonl"):
            with path.open(encoding="utf-8") as lines:
                kinds.update(json.loads(line)["kind"] for line in lines)
        return kinds

    def _rest_of_epoch(self) -> Iterator[dict[str, np.ndarray]]:
        epoch = self.position.epoch
        for place, part, window, chunks in self._windows():
            is_begun = (place, window) == self.position[1:3]
            first = self.position.row if is_begun else 0
            examples = self._examples(part, window, chunks)
            lengths = ([len(example[name]) for example in examples] for name in ("input_ids", "labels"))
            rows = pack(*lengths, self.budget, _seed(self.seed, epoch, part, window)) if examples else []
            for number in range(first, len(rows)):
                row = assemble_row(
                    [examples[place] for place in rows[number]],
                    self.budget,
                    self.pad_token_id,
                    self.decoder_start_token_id,
                )
                self.position = Position(epoch, place, window, number + 1)
                yield {**row, POSITION: np.array([self.index, *self.position])}

    def _parts(self) -> list[list[int]]:
        """Numbers of sources that are read together."""
        parts, size = [[]], 0
        for number, source in enumerate(self.sources):
            own = self.part_bytes if source.bytes is None else source.bytes
            if parts[-1] and size + own > self.part_bytes:
                parts.append([])
                size = 0
            parts[-1].append(number)
            size += own
        return parts

    def _windows(self) -> Iterator[tuple[int, int, int, list[tuple[Chunk, int]]]]:
        """Of this shard, from the position on: place and number of the part, number of the window, its chunks."""
        epoch, first, first_window, _ = self.position
        parts = self._parts()
        reads_all = len(parts) < PARTS_PER_SHARD * self.shards
        order = np.random.default_rng((self.seed, epoch)).permutation(len(parts)).tolist()
        for place, part in enumerate(order[first:], start=first):
            if not reads_all and place % self.shards != self.index:
                continue
            for window, chunks in enumerate(self._cut(parts[part])):
                is_mine = not reads_all or (place + window) % self.shards == self.index
                if is_mine and (place, window) >= (first, first_window):
                    yield place, part, window, chunks

    def _cut(self, numbers: Sequence[int]) -> Iterator[list[tuple[Chunk, int]]]:
        chunks = []
        for number in numbers:
            for chunk in self.sources[number].chunks():
                chunks.append((chunk, number))
                if len(chunks) == self.window_chunks:
                    yield chunks
                    chunks = []
        if chunks:
            yield chunks

    def _examples(self, part: int, window: int, chunks: Sequence[tuple[Chunk, int]]) -> list[dict[str, np.ndarray]]:
        sources, targets, found = [], [], []
        for chunk, number in chunks:
            batch = self.stages.run(chunk, number)
            sources += _arrays(batch.examples["input_ids"])
            targets += _arrays(batch.examples["labels"])
            found += batch.rejects
        self._note(part, window, found)
        first_labels = np.array([labels[0] for labels in targets], dtype=int)
        repeats = repeated_start(first_labels, self.decoder_start_token_id)
        return [
            {"input_ids": source, "labels": labels[int(is_repeated) :]}
            for source, labels, is_repeated in zip(sources, targets, repeats, strict=True)
        ]

    def _rejects_files(self) -> Path:
        return self.rejects_folder / self.fingerprint[:12]

    def _note(self, part: int, window: int, found: list[Reject]) -> None:
        """A file that is there was written by whoever read this window before: in another epoch, or a run that broke
        off."""
        if not found:
            return
        path = self._rejects_files() / f"{part:05d}" / f"{window:05d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with partial.open("w", encoding="utf-8") as file:
                rejects = Rejects(file, self.strict, self.fatal)
                for reject in found:
                    rejects.add(reject)
            if not path.exists():
                os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def open_stream(settings: PrepareSettings, rejects_folder: Path, epochs: int | None = 1) -> PackedStream:
    """All that a person has to mend is said here, before the first row. Nothing of the Hub is downloaded first."""
    for name in NOT_STREAMED:
        if getattr(settings, name):
            raise UserError(f"{name} is for `diptych prepare`, which sees all rows; a stream sees the next. Drop it.")
    if not settings.packing:
        raise UserError("packing is false, and a stream is packed always. Drop it.")
    if settings.tokenizer is None:
        raise UserError("a stream needs a tokenizer. Give the folder or Hub id of the checkpoint's.")
    inputs, parts_of = _open_inputs(settings)
    tokenizer, template = load_tokenizer_and_template(settings, inputs.default_template)
    start, _ = decoder_start_of(settings) or (tokenizer.pad_token_id, "assumed")
    stages = make_stages(settings, inputs, tokenizer, template)
    print("Stream     every row trains: nothing is held out, and duplicates stay")
    facts = facts_that_decide(settings, inputs, tokenizer, template)
    parts = [parts_of.get(source.name, [source]) for source in inputs.sources]
    converters = [[it] * len(part) for it, part in zip(stages.converters, parts, strict=True)]
    stream = PackedStream(
        tuple(sum(parts, [])),
        replace(stages, converters=tuple(sum(converters, []))),
        Budget(settings.max_source_tokens, settings.max_target_tokens),
        tokenizer.pad_token_id,
        start,
        settings.seed,
        fingerprint({**facts, "decoder_start": start}),
        Path(rejects_folder),
        settings.strict,
        fatal_kinds(settings),
        epochs,
    )
    return replace(stream, budget=_budget(stream, settings))


def _open_inputs(settings: PrepareSettings) -> tuple[Inputs, dict[str, list[Source]]]:
    """What will be read, and the parts of what comes from the Hub: the format of a data set is that of its first."""
    limits = limits_of(settings)
    files = open_inputs(replace(settings, data=[it for it in settings.data if not it.startswith(HUB_PREFIX)]))
    parts_of = {entry: _open_hub(entry, limits) for entry in settings.data if entry.startswith(HUB_PREFIX)}
    whole = [replace(parts[0], name=entry) for entry, parts in parts_of.items()]
    converters = [*files.converters, *(make_converter(settings, source) for source in whole)]
    return Inputs([*files.sources, *whole], [*files.entries, *parts_of], files.evaluation, converters), parts_of


def _open_hub(entry: str, limits: Limits) -> list[Source]:
    """A source for each file of the data set, of which nothing is read before its turn comes."""
    import datasets  # takes a second

    name, _, split = entry.removeprefix(HUB_PREFIX).partition(":")
    try:
        builder = datasets.load_dataset_builder(name)
        dataset = builder.as_streaming_dataset(split or "train")
        parts = [dataset.shard(dataset.num_shards, number) for number in range(dataset.num_shards)]
    except (OSError, ValueError, RuntimeError, RecursionError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{entry} could not be opened for streaming: {error}") from error
    names = [f"{entry} file {number} of {len(parts)}" for number in range(1, len(parts) + 1)]
    return [
        Source(name, builder.hash, None, functools.partial(hub_chunks, part, name, limits), entry)
        for name, part in zip(names, parts, strict=True)
    ]


def _budget(stream: PackedStream, settings: PrepareSettings) -> Budget:
    """Room for the longest example that the limits let in; else as the first window has it, on every shard alike."""
    longest = (settings.max_source_tokens, settings.max_target_tokens)
    lengths = [longest]
    for chunk, number in next(stream._cut(range(len(stream.sources))), []):
        examples = stream.stages.run(chunk, number).examples
        columns = (pyarrow.compute.list_value_length(examples[name]).to_pylist() for name in ("input_ids", "labels"))
        lengths += zip(*columns, strict=True)
    names = ["a row as long as max_source_tokens and max_target_tokens let in", *("" for _ in lengths[1:])]
    given = (settings.packed_source_tokens, settings.packed_target_tokens)
    return choose_budget(*zip(*lengths, strict=True), *given, names=names)


def _arrays(column: pyarrow.ListArray) -> list[np.ndarray]:
    if not len(column):
        return []
    ends = np.cumsum(pyarrow.compute.list_value_length(column).to_numpy())
    return np.split(column.flatten().to_numpy(), ends[:-1])


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
