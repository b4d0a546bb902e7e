"""The processes of one run: how they meet, how long one waits for another, and how they part.

    ranks = Ranks(accelerator, recipe.rank_timeout, status.end)
    with ranks.waiting_for("the gradients of step 7"):
        …                               RankError, which says this, where one has gone or does not answer
    part(accelerator)

A rank that dies closes its connections, which the others feel at once (gloo) or when the launcher ends them. One that
hangs is waited for as long as `rank_timeout` says; on GPUs, where torch would abort the process, a thread of our own
is what ends it, with the number of exits.py.
"""

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.commands.exits import RANKS, RankError

PATIENCE = 1.5
"""Times the timeout, after which the thread ends a process that torch itself has not ended."""


def join_ranks() -> Accelerator | None:
    """For what is no training: the ranks of a launch with several; else none. UserError where they did not find each
    other."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched == 1:
        return None
    refuse_deepspeed()
    accelerator = Accelerator()
    if accelerator.num_processes != launched:
        raise UserError(
            f"{launched} processes were launched, but accelerate joined {accelerator.num_processes}: each would do "
            f"everything. On CPUs, set ACCELERATE_USE_CPU=true before torchrun."
        )
    return accelerator


def on_main_rank(accelerator: Accelerator | None, work: Callable[[], Any]) -> Any:
    """What `work()` returns on the main rank, on all of them; what it raises there, all raise."""
    if accelerator is None:
        return work()
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except (UserError, OSError) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def refuse_deepspeed() -> None:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("true", "1"):
        raise UserError(
            "accelerate's configuration asks for DeepSpeed, which does not run here: launch with `torchrun"
            " --nproc_per_node=N`, and spread a model in training with `--sharding full` (FSDP2)."
        )


class Ranks:
    """Waits with a deadline. With one process there is nobody to wait for, and nothing here does anything."""

    def __init__(self, accelerator: Accelerator, timeout: float, on_timeout: Callable[[int, str], None]):
        self.count, self.number, self.timeout = accelerator.num_processes, accelerator.process_index, timeout
        self.on_timeout = on_timeout
        """Called with exit code and message before the process ends."""

    @contextmanager
    def waiting_for(self, what: str, has_own_work: bool = False) -> Iterator[None]:
        """RankError where a rank goes meanwhile, or where it takes too long, unless this is work of any length."""
        if self.count == 1:
            yield
            return
        timer = threading.Timer(PATIENCE * self.timeout, self._give_up, [what])
        timer.daemon = True
        if not has_own_work:
            timer.start()
        try:
            yield
        except RuntimeError as error:
            if not _is_of_another_rank(error):
                raise
            raise RankError(self._message(what, str(error).splitlines()[0])) from error
        finally:
            timer.cancel()

    def _message(self, what: str, why: str) -> str:
        return (
            f"rank {self.number} waited for the others with {what}, and one of {self.count} ranks has gone or does "
            f"not answer: {why[-300:]}\n"
            f"See what the other ranks say; then go on from the last checkpoint: --resume true."
        )

    def _give_up(self, what: str) -> None:
        message = self._message(what, f"no answer in {PATIENCE * self.timeout:.0f} s (rank_timeout).")
        self.on_timeout(RANKS, message)
        print(f"diptych train: {message}", file=sys.stderr, flush=True)
        os._exit(RANKS)  # the main thread is inside a collective that nobody will end


def _is_of_another_rank(error: RuntimeError) -> bool:
    """gloo's errors are plain RuntimeErrors that name its source files."""
    is_torchs = isinstance(error, torch.distributed.DistError)
    return is_torchs or any(word in str(error) for word in ("gloo", "Connection closed by peer", "NCCL", "Timed out"))


def part(accelerator: Accelerator, for_good: bool = True) -> None:
    """DDP, of which nobody else may hold anything, goes before the process group. If it were the last to hold it, gloo
    would join its threads while this one keeps the interpreter's lock, for which one of them may be waiting: one run
    of thirty on two ranks never ended, and one of fifty was aborted."""
    accelerator.free_memory()
    gc.collect()  # what was wrapped stands in cycles, and accelerate collects before it lets go
    if for_good:
        accelerator.end_training()
        return
    for tracker in accelerator.trackers:
        tracker.finish()
