"""Training on rows that are prepared while they are read: each rank and each worker has a part of its own, and a run
goes on with the very next row.

    settings = parse_settings(["--data", "rows.jsonl", "--tokenizer", "checkpoint"])
    rows = StreamedRows(open_stream(settings, Path("run/rejects"), epochs=None), rank, ranks, workers=2)
    rows.check_fits(model)
    for batch in rows.batches(batch_size=4): …               packed rows as of packed_rows.py, int64
    torch.save(rows.state_dict(), f"run/rows-{rank}.pt")     what was only fetched ahead is not counted as read

A whole run, on one process or many (`accelerate launch`):

    accelerator = Accelerator()
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint)
    settings = parse_settings(["--data", data, "--tokenizer", checkpoint])
    stream = open_stream(settings, Path(out) / "rejects", epochs=None)
    rows = StreamedRows(stream, accelerator.process_index, accelerator.num_processes, workers=0)
    rows.check_fits(model)
    objective = Seq2SeqObjective(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    objective, optimizer = accelerator.prepare(objective, optimizer)    # not the rows: they are sharded already
    losses = []
    for batch in itertools.islice(rows.batches(batch_size=4), steps):
        batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        tokens = accelerator.reduce((batch["labels"] != IGNORE_INDEX).sum())
        loss = objective(batch, tokens)
        accelerator.backward(loss * accelerator.num_processes)          # DDP takes the mean over ranks
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach()).item())

What is in a row, and what a stream cannot do: data_prep/stream.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedModel

from diptych.data_prep.records import UserError
from diptych.data_prep.stream import POSITION, PackedStream, Position
from diptych.finetune.packed_rows import Packing, check_packing_fits, packed_batch


class StreamedRows(IterableDataset):
    """The rows of one rank. There are as many shards as ranks × workers."""

    def __init__(self, stream: PackedStream, rank: int = 0, ranks: int = 1, workers: int = 0) -> None:
        if not 0 <= rank < ranks:
            raise UserError(f"rank {rank} of {ranks}: ranks are numbered from 0 to {ranks - 1}.")
        self.stream, self.rank, self.ranks, self.workers = stream, rank, ranks, workers
        self.positions = [Position()] * max(1, workers)
        """With which row each worker goes on."""
        self.turn = 0
        """Whose batch is next: a DataLoader takes one of each worker in turn."""

    def batches(self, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        """From where this rank is; that moves with each batch that is taken."""
        loader = DataLoader(self, batch_size, num_workers=self.workers, collate_fn=_collate)
        for batch in loader:
            shard, *position = batch.pop(POSITION)[-1].tolist()
            worker = shard - self.rank * len(self.positions)
            self.positions[worker] = Position(*position)
            self.turn = (worker + 1) % len(self.positions)
            yield batch

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """In a worker, its part; batches begin with the worker whose turn it is."""
        worker = get_worker_info()
        if (worker.num_workers if worker else 0) != self.workers:
            raise UserError(f"these rows are for {self.workers} workers. Take them from batches().")
        if worker:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork, and cores are taken
        count = len(self.positions)
        number = ((worker.id if worker else 0) + self.turn) % count
        shard = self.stream.shard(self.rank * count + number, self.ranks * count)
        shard.position = self.positions[number]
        yield from shard

    def check_fits(self, model: PreTrainedModel) -> None:
        """UserError where rows are packed for another model; before the first step."""
        stream = self.stream
        ids = (stream.pad_token_id, stream.decoder_start_token_id, stream.vocabulary)
        lengths = stream.stages.lengths
        longest = max(lengths.max_source_tokens, lengths.max_target_tokens)
        check_packing_fits(model, Packing(*stream.budget, False, *ids, longest), "the stream")

    def state_dict(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "ranks": self.ranks,
            "workers": self.workers,
            "turn": self.turn,
            "positions": [list(position) for position in self.positions],
            "fingerprint": self.stream.fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.stream.check_same_data(state["fingerprint"])
        for name in ("rank", "ranks", "workers"):
            if state[name] != getattr(self, name):
                raise UserError(
                    f"the state was saved with {name} {state[name]}, and here {name} is {getattr(self, name)}. Go on"
                    " with as many ranks and workers as before, each rank with its own state."
                )
        self.turn, self.positions = state["turn"], [Position(*position) for position in state["positions"]]


def _collate(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    columns = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return {**packed_batch(columns), POSITION: torch.as_tensor(columns[POSITION])}
