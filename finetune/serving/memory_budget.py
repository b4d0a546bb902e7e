"""How much memory a batch of prompts takes, measured when a checkpoint is served, and how much it may take.

    budget = measured_budget(loaded)      MemoryBudget(bytes=2_300_000_000, per_token=24_576.0, per_square=96.0, …)
    budget.cost(512, Decoding(256), prompts=16)      bytes of such a batch
    budget.most_source_tokens(Decoding(256))         the longest prompt that may be read

The encoder's memory for S source tokens is a S + b S²: attention with a bias (T5) makes tensors (B, H, S, S). The
decoder's grows with rows and tokens. Both are measured by reading two short prompts: families differ too much for a
formula. Tensors are counted (MemoryMeter); the process grew by up to 1.2 times as much (T5, BART, LED and Diptych with
up to 3,000 tokens). A batch may take a third of the free memory, or less with more than two models: the rest is for
the others, and for requests.
"""

import bisect
import contextlib
import math
import resource
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.inference.generation import generate_batch
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.loading import position_limit
from diptych.finetune.serving.request_batches import Decoding, Job

SHARE = 1 / 3
"""Of the free memory, for one batch."""
MEASURED_TOKENS = 512
MOST_TOKENS = 1_000_000
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class MemoryBudget(NamedTuple):
    bytes: float
    """That a batch may take."""
    measured_tokens: int
    """The longest source that was read to measure."""
    per_token: float
    per_square: float
    """The encoder's bytes for each source token, and for each pair of them."""
    per_decoded_token: float
    """The decoder's bytes for a row, for each of its source and target tokens."""

    def cost(self, source_tokens: int, decoding: Decoding, prompts: int = 1) -> float:
        """Bytes that a batch takes, with its sources padded to `source_tokens`."""
        rows = prompts * decoding.rows
        cached = max(source_tokens, self.measured_tokens) + decoding.max_new_tokens
        read, read_rows = (cached, rows) if decoding.scores else (source_tokens, prompts)
        return read_rows * read * (self.per_token + self.per_square * read) + rows * cached * self.per_decoded_token

    def check(self, source_tokens: int, decoding: Decoding) -> None:
        """UserError if a prompt with this decoding takes more than a batch may."""
        if (needed := self.cost(source_tokens, decoding)) > self.bytes:
            answers, tokens = decoding.rows, decoding.max_new_tokens
            raise UserError(
                f"a prompt of {source_tokens} tokens with {answers} answers or beams of up to {tokens} tokens can take"
                f" {needed / 1e6:,.0f} MB of memory, and may take {self.bytes / 1e6:,.0f}. Ask for fewer or shorter"
                f" answers, or shorten the prompt."
            )

    def fits(self, jobs: Sequence[Job]) -> bool:
        """Whether the jobs may share a batch. One alone always may: those that may not are refused before."""
        longest = max(len(job.source_ids) for job in jobs)
        decoding = max((job.decoding for job in jobs), key=lambda decoding: decoding.max_new_tokens)
        return len(jobs) == 1 or self.cost(longest, decoding, len(jobs)) <= self.bytes

    def most_source_tokens(self, decoding: Decoding) -> int:
        """At least as many as were measured."""
        most = bisect.bisect_right(range(MOST_TOKENS), self.bytes, key=lambda tokens: self.cost(tokens, decoding)) - 1
        return max(most, self.measured_tokens)


UNMEASURED = MemoryBudget(math.inf, 0, 0.0, 0.0, 0.0)
"""Of an engine whose tensors torch does not see: any batch fits."""
MOST_UNMEASURED = 2048
"""Tokens of a prompt for such an engine, if the model has no limit."""


class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of tensors that are made in its block and alive at the same time; those of `model` are not new.

    `most_reading` and `most_writing` are the largest sums until the encoder has ended, and after that.
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        own = (*model.parameters(), *model.buffers())
        self._alive = {tensor.untyped_storage()._cdata for tensor in own}
        self._now = self.most_reading = self.most_writing = 0
        self._hook = model.get_encoder().register_forward_hook(self._end_of_reading)

    def __exit__(self, *error: Any) -> None:
        self._hook.remove()
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._alive:
                    self._alive.add(storage._cdata)
                    self._now += storage.nbytes()
                    weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        self.most_writing = max(self.most_writing, self._now)
        return result

    def _forget(self, address: int, size: int) -> None:
        self._alive.discard(address)
        self._now -= size

    def _end_of_reading(self, *_: Any) -> None:
        self.most_reading, self.most_writing = max(self.most_reading, self.most_writing), self._now


def measured_budget(loaded: LoadedModel, share: float = SHARE) -> MemoryBudget:
    """For batches that take up to `share` of the free memory. Reads a prompt of 512 tokens (or of as many as the model
    has positions for) and one of half the length."""
    long = min(MEASURED_TOKENS, position_limit(loaded.model, of_source=True) or MEASURED_TOKENS)
    half = long // 2
    peaks = []
    for tokens in (half, long):
        with MemoryMeter(loaded.model) as meter:
            generate_batch(loaded, [[loaded.tokenizer.eos_token_id] * tokens], 2, {})
        peaks.append(meter.most_reading)
    # a half + b half² and a long + b long², solved for b, and for a with what does not depend on the length in it
    per_square = max(0.0, (peaks[1] - long / half * peaks[0]) / (long**2 - long * half))
    per_token = peaks[1] / long - per_square * long
    return MemoryBudget(share * free_memory(loaded.device), long, per_token, per_square, meter.most_writing / long)


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still have: of the GPU or of the machine, its container, and `ulimit -v`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [psutil.virtual_memory().available]
    mine, (most_addresses, _) = psutil.Process().memory_info(), resource.getrlimit(resource.RLIMIT_AS)
    if most_addresses != resource.RLIM_INFINITY:
        free.append(most_addresses - mine.vms)
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        free.append(int(CGROUP_LIMIT.read_text()) - mine.rss)
    return max(0, min(free))
