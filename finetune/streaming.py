"""Streamed rows in a DataLoader: each rank and each worker reads a part of its own, and all can go on where they were.

    rows = StreamedRows(open_stream(settings), rank, ranks)
    for batch in DataLoader(rows, batch_size=4, num_workers=2):
        …
        rows.note(batch)                   in the process that trains: what was only fetched ahead does not count
    torch.save(rows.state_dict(), path)    one for each rank; load_state_dict before a DataLoader is made

Batches are those of packed_rows.py, and `position`, (B, 3). See data_prep/stream.py for what is in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from diptych.data_prep.records import UserError
from diptych.data_prep.stream import POSITION, PackedStream


class StreamedRows(IterableDataset):
    """The rows of one rank. With `num_workers` workers there are ranks × workers shards."""

    def __init__(self, stream: PackedStream, rank: int = 0, ranks: int = 1) -> None:
        self.stream, self.rank, self.ranks = stream, rank, ranks
        self.positions: dict[int, tuple[int, int]] = {}
        """Shard → window and row to go on with."""
        self.workers: int | None = None
        """Of the run that positions are from; unknown before the first batch or state."""

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        if self.positions and workers != self.workers:
            raise UserError(
                f"the positions are of {self.workers} workers a rank, and there are {workers}. Take as many as before."
            )
        shard = self.stream.shard(self.rank * workers + number, self.ranks * workers)
        shard.window, shard.row = self.positions.get(shard.index, (0, 0))
        for row in shard:
            yield {**row, POSITION: np.append(row[POSITION], workers)}

    def note(self, batch: Mapping[str, torch.Tensor]) -> None:
        """These rows are done with."""
        for shard, window, row, workers in batch[POSITION].tolist():
            self.positions[shard] = max(self.positions.get(shard, (0, 0)), (window, row))
            self.workers = workers

    def state_dict(self) -> dict[str, Any]:
        place = {"rank": self.rank, "ranks": self.ranks, "workers": self.workers}
        return {**place, "positions": dict(self.positions), "fingerprint": self.stream.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        shard = self.stream.shard(0, 1)
        shard.load_state_dict({"fingerprint": state["fingerprint"], "shard": 0, "shards": 1, "window": 0, "row": 0})
        if (state["rank"], state["ranks"]) != (self.rank, self.ranks):
            raise UserError(
                f"the state is that of rank {state['rank']} of {state['ranks']}, and this is {self.rank} of"
                f" {self.ranks}. Go on with as many ranks as before."
            )
        self.positions, self.workers = dict(state["positions"]), state["workers"]
