"""The processes of one run: how they meet, how long one waits for another, and how they part.

    accelerator = meet(recipe)          UserError where they would train apart, or in another way than asked
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
from datetime import timedelta
from typing import Any

import accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list

from diptych.data_prep.command_line.arguments import choose_from
from diptych.data_prep.rows.records import UserError
from diptych.finetune.commands.exits import RANKS, RankError
from diptych.finetune.run_files.run_folder import is_main_rank
from diptych.finetune.training.recipe import TrainRecipe, split_names

PATIENCE = 1.5
"""Times the timeout, after which the thread ends a process that torch itself has not ended."""


def meet(recipe: TrainRecipe) -> Accelerator:
    """All ranks that were launched, joined to one run."""
    _check_launch(recipe)
    trackers, launched = _trackers(recipe), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        accelerator = Accelerator(
            mixed_precision="no",  # the loop has its own autocast; a launcher's default must not add another
            log_with=trackers or None,
            project_dir=recipe.out,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=recipe.rank_timeout))],
        )
    except RuntimeError as error:
        if launched == 1:
            raise
        raise RankError(
            f"the {launched} ranks of this run did not meet: {str(error).splitlines()[0][:300]}"
        ) from error
    if launched != accelerator.num_processes:
        raise UserError(
            f"{launched} processes were launched, but accelerate joined {accelerator.num_processes}: each would train "
            f"alone, in the same folder. On CPUs, set ACCELERATE_USE_CPU=true before torchrun."
        )
    if recipe.sharding == "full" and accelerator.num_processes == 1:
        raise UserError(
            "sharding is full, but one process was launched, and has nobody to share the model with. Launch several: "
            "`torchrun --nproc_per_node=N -m diptych.finetune.train --config RECIPE`, or add --sharding none."
        )
    accelerator.gradient_accumulation_steps = 1  # likewise: accelerate would divide the loss once more
    return accelerator


def join_ranks() -> Accelerator | None:
    """For what is no training: the ranks of a launch with several; else none. UserError where they did not find each
    other."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched == 1:
        return None
    _refuse_deepspeed()
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


def _check_launch(recipe: TrainRecipe) -> None:
    """What accelerate's configuration asks for and this loop does otherwise is refused: on a CPU, accelerate itself
    would take DDP for FSDP without a word. Where the recipe asks for FSDP as well, accelerate is not to hear of it:
    sharding.py does it, and transformers would load weights on the first rank alone."""
    _refuse_deepspeed()
    if recipe.sharding == "full" and os.environ.pop("ACCELERATE_USE_FSDP", "").lower() in ("true", "1"):
        if is_main_rank():
            print("sharding: full, and accelerate's FSDP settings have no part in it", flush=True)
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1"):
        raise UserError(
            "accelerate's configuration asks for FSDP. Here the recipe says how weights are spread: launch with"
            " `torchrun --nproc_per_node=N -m diptych.finetune.train --config RECIPE --sharding full`, which is"
            " FSDP2, or drop it for DDP."
        )


def _refuse_deepspeed() -> None:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("true", "1"):
        raise UserError(
            "accelerate's configuration asks for DeepSpeed, which does not run here: launch with `torchrun"
            " --nproc_per_node=N`, and spread a model in training with `--sharding full` (FSDP2)."
        )


def _trackers(recipe: TrainRecipe) -> list[str]:
    known, available = accelerate.tracking.LOGGER_TYPE_TO_CLASS, accelerate.tracking.get_available_trackers()
    names = split_names(recipe.trackers)
    for name in names:
        if name not in known:
            raise UserError(f"accelerate knows no tracker {name!r}. {choose_from(name, list(known))}")
        if name not in [str(tracker) for tracker in available]:
            raise UserError(f"the tracker {name} is not installed. Install it: pip install {name}")
    return names


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
