"""The processes of one run: how they connect, how long one waits for another, and how they end.

    ranks = Ranks(accelerator, recipe.rank_timeout, status.end)
    with ranks.waiting_for("the gradients of step 7"):
        …                               RankError with these words where a rank has ended or does not answer
    end_ranks(accelerator)

A rank that dies closes its connections, which the others notice at once (gloo) or when the launcher ends them. For one
that hangs, the others wait `rank_timeout` seconds. On GPUs torch would then abort the process, so a thread of our own
ends it, with the exit code of exit_codes.py.
"""

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from diptych.data_prep.command_line.errors import UserError, in_short
from diptych.finetune.commands.exit_codes import RANKS, RankError, is_of_another_rank, lost_rank

PATIENCE = 1.5
"""Times the timeout: then the thread ends a process that torch has not ended."""


def several_ranks() -> Accelerator | None:
    """The ranks of a launch with several, for evaluation and generation; None for one process."""
    return join_ranks() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


def join_ranks(**settings: Any) -> Accelerator:
    """All ranks that were launched, as an Accelerator with these settings. RankError where they did not meet,
    UserError where accelerate's configuration joins them in another way."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("true", "1"):
        raise UserError(
            "accelerate's configuration asks for DeepSpeed, which does not run here: launch with `torchrun"
            " --nproc_per_node=N`, and spread a model in training with `--sharding full` (FSDP2)."
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        accelerator = Accelerator(**settings)
    except RuntimeError as error:
        if launched == 1:
            raise
        raise RankError(f"the {launched} ranks of this run did not meet: {in_short(error)}") from error
    if accelerator.num_processes != launched:
        raise UserError(
            f"{launched} processes were launched, but accelerate joined {accelerator.num_processes}: each would work "
            f"alone, and write the same files. On CPUs, set ACCELERATE_USE_CPU=true before torchrun."
        )
    return accelerator


def on_main_rank(accelerator: Accelerator | None, work: Callable[[], Any]) -> Any:
    """Runs `work()` on the main rank; all ranks return its result, or raise its error."""
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


class Ranks:
    """Waits with a deadline; with one process it does nothing."""

    def __init__(self, accelerator: Accelerator, timeout: float, on_timeout: Callable[[int, str], None]):
        self.count, self.number, self.timeout = accelerator.num_processes, accelerator.process_index, timeout
        self.on_timeout = on_timeout
        """Called with exit code and message before the process ends."""
        self.steps_lost: Callable[[], list[str]] = list
        """A sentence: which steps are lost, once the loop has set it."""

    @contextmanager
    def waiting_for(self, what: str, has_own_work: bool = False) -> Iterator[None]:
        """RankError where another rank ends or times out; `has_own_work=True` turns the timeout off."""
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
            if not is_of_another_rank(error):
                raise
            raise self._lost(what, lost_rank(error)) from error
        finally:
            timer.cancel()

    def _lost(self, what: str, why: str) -> RankError:
        return RankError(
            f"rank {self.number} waited for the others with {what}, and one of {self.count} ranks has ended or does "
            f"not answer: {why}",
            *self.steps_lost(),
            "See what the other ranks say; then go on from the last checkpoint: --resume true.",
        )

    def _give_up(self, what: str) -> None:
        message = str(self._lost(what, f"no answer in {PATIENCE * self.timeout:.0f} s (rank_timeout)."))
        self.on_timeout(RANKS, message)
        print(f"diptych train: {message}", file=sys.stderr, flush=True)
        os._exit(RANKS)  # the main thread is inside a collective that nobody will end


def end_ranks(accelerator: Accelerator, for_good: bool = True) -> None:
    """Frees DDP before the process group; nobody else may hold a reference to it. If DDP were freed last, gloo would
    join its threads while this one holds the interpreter's lock, for which one of them may wait: one run of thirty on
    two ranks never ended, and one of fifty was aborted."""
    accelerator.free_memory()
    if accelerator.num_processes > 1:
        gc.collect()  # wrapped modules are in reference cycles, and accelerate collects before it drops its own
    if for_good:
        accelerator.end_training()
        return
    for tracker in accelerator.trackers:
        tracker.finish()
