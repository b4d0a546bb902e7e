"""Rows that are checked, rendered, encoded and packed while they are read: data that need not fit on a disk.

    stream = open_stream(settings)                     the settings of `diptych prepare`
    for row in stream.shard(rank, ranks): …            the arrays of a packed row, (S,) and (T,), see packing.py
    state = stream.state_dict()                        after any row; load_state_dict goes on with the next one

Data is cut into windows, some megabytes of neighbouring chunks; window k belongs to shard k mod shards, and is packed
by itself (two thousand examples fill rows to 98 %). So a position is two integers, window and row, nothing of what was
read has to be saved, and shards neither overlap nor leave a gap. What needs all rows at once (duplicates, splits, a
trained tokenizer, a mixture) needs `diptych prepare`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from diptych.data_prep.checkpoint_tokenizer import decoder_start_of, load_tokenizer_and_template
from diptych.data_prep.packing import Budget, assemble_row, choose_budget, pack, repeated_start
from diptych.data_prep.prepare import facts_that_decide, make_stages, open_inputs
from diptych.data_prep.prepared import fingerprint
from diptych.data_prep.readers import Chunk, Source
from diptych.data_prep.records import Rejects, UserError
from diptych.data_prep.settings import PrepareSettings
from diptych.data_prep.stages import Stages

WINDOW_BYTES = 4_000_000
"""Of raw data, at least, unless there is no more. Of a source whose size is unknown every chunk is a window."""

POSITION = "position"
"""A column of each row: (shard, window, number of the next row there), (3,) int64."""

NOT_STREAMED = ("near_duplicates", "mixture", "train_tokenizer", "share_sources")


@dataclass
class PackedStream:
    """Packed rows of one shard, from a position on. Cheap to copy and to send to another process."""

    sources: list[Source]
    stages: Stages
    budget: Budget
    pad_token_id: int
    decoder_start_token_id: int
    seed: int
    fingerprint: str
    """Of everything that decides which rows there are."""
    rejects_folder: Path | None = None
    """Where each shard writes down which rows it did not keep; None counts them only."""
    strict: bool = False
    index: int = 0
    shards: int = 1
    window: int = 0
    row: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    """How many rows of which fault this shard has met since it began."""

    def shard(self, index: int, shards: int) -> PackedStream:
        """One of `shards` parts that together are the whole, from its beginning."""
        if not 0 <= index < shards:
            raise UserError(f"shard {index} of {shards}: shards are numbered from 0 to {shards - 1}.")
        return replace(self, index=index, shards=shards, window=0, row=0, rejected={})

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """From the position on to the end of the data; the position moves with each row that is taken."""
        for window, chunks in self._windows():
            if window % self.shards != self.index or window < self.window:
                continue
            first = self.row if window == self.window else 0
            rows = self._packed(window, chunks, is_new=first == 0)
            for number, row in enumerate(rows):
                if number >= first:
                    self.window, self.row = window, number + 1
                    yield {**row, POSITION: np.array([self.index, window, number + 1])}

    def state_dict(self) -> dict[str, Any]:
        """Integers and a string, for JSON."""
        position = {"window": self.window, "row": self.row, "shard": self.index, "shards": self.shards}
        return {**position, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["fingerprint"] != self.fingerprint:
            raise UserError(
                "the position is in other data: a file, the template, the tokenizer or a setting has changed since."
                " Begin anew, or restore what was."
            )
        if (state["shard"], state["shards"]) != (self.index, self.shards):
            raise UserError(
                f"the position is that of shard {state['shard']} of {state['shards']}, and this is {self.index} of"
                f" {self.shards}. Go on with as many ranks and workers as before."
            )
        self.window, self.row = state["window"], state["row"]

    def _windows(self) -> Iterator[tuple[int, list[tuple[Chunk, int]]]]:
        """Number and chunks of each. Those that are skipped are read, but of line formats not parsed."""
        number, chunks, size = 0, [], 0
        for source_number, source in enumerate(self.sources):
            done = 0
            for chunk in source.chunks():
                chunks.append((chunk, source_number))
                size += chunk.bytes_done - done if source.bytes else WINDOW_BYTES
                done = chunk.bytes_done
                if size >= WINDOW_BYTES:
                    yield number, chunks
                    number, chunks, size = number + 1, [], 0
        if chunks:
            yield number, chunks

    def _packed(self, window: int, chunks: Sequence[tuple[Chunk, int]], is_new: bool) -> list[dict[str, np.ndarray]]:
        examples = []
        for chunk, source_number in chunks:
            batch = self.stages.run(chunk, source_number)
            if is_new:
                self._note(batch.rejects)
            columns = (batch.examples[name].to_pylist() for name in ("input_ids", "labels"))
            examples += zip(*columns, strict=True)
        if not examples:
            return []
        first_labels = np.array([labels[0] for _, labels in examples])
        repeats = repeated_start(first_labels, self.decoder_start_token_id)
        examples = [
            {"input_ids": source, "labels": labels[int(is_repeated) :]}
            for (source, labels), is_repeated in zip(examples, repeats, strict=True)
        ]
        sides = ([len(example[name]) for example in examples] for name in ("input_ids", "labels"))
        ids = (self.pad_token_id, self.decoder_start_token_id)
        return [
            assemble_row([examples[place] for place in row], self.budget, *ids)
            for row in pack(*sides, self.budget, seed=self.seed + window)
        ]

    def _note(self, found: list) -> None:
        if not found:
            return
        if self.rejects_folder is None:
            self._add(found, Rejects(strict=self.strict))
            return
        self.rejects_folder.mkdir(parents=True, exist_ok=True)
        with (self.rejects_folder / f"rejects-{self.index}-of-{self.shards}.jsonl").open(
            "a", encoding="utf-8"
        ) as file:
            self._add(found, Rejects(file, self.strict))

    def _add(self, found: list, rejects: Rejects) -> None:
        for reject in found:
            rejects.add(reject)
            self.rejected[reject.kind] = self.rejected.get(reject.kind, 0) + 1


def open_stream(settings: PrepareSettings, rejects_folder: Path | None = None) -> PackedStream:
    """All that a person has to mend is said here, before the first row."""
    for name in NOT_STREAMED:
        if getattr(settings, name):
            raise UserError(f"{name} needs all rows at once, and a stream has none but the next. Use diptych prepare.")
    inputs = open_inputs(settings)
    tokenizer, template = load_tokenizer_and_template(settings)
    start, _ = decoder_start_of(settings) or (tokenizer.pad_token_id, "assumed")
    stages, _ = make_stages(settings, inputs, tokenizer, template)
    print("Stream     every row trains: nothing is held out, and duplicates stay")
    decides = facts_that_decide(settings, inputs, tokenizer, template)
    stream = PackedStream(
        inputs.sources,
        stages,
        Budget(settings.max_source_tokens, settings.max_target_tokens),
        tokenizer.pad_token_id,
        start,
        settings.seed,
        fingerprint({**decides, "decoder_start": start}),
        rejects_folder,
        settings.strict,
    )
    return replace(stream, budget=_budget(stream, settings))


def _budget(stream: PackedStream, settings: PrepareSettings) -> Budget:
    """Room for the longest example that the limits let in; else as the first window has it, on every shard alike."""
    lengths = [(settings.max_source_tokens, settings.max_target_tokens)]
    for _, chunks in stream._windows():
        for chunk, source_number in chunks:
            batch = stream.stages.run(chunk, source_number)
            lengths += zip(
                *(batch.examples[f"{side}_tokens"].to_pylist() for side in ("source", "target")), strict=True
            )
        break
    return choose_budget(*zip(*lengths, strict=True), settings.packed_source_tokens, settings.packed_target_tokens)
