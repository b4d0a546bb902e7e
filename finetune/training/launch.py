"""How the ranks of a training run meet: one Accelerator, or a UserError where they would train apart or in another way
than the recipe says.

    accelerator = meet(recipe)
"""

import os
from datetime import timedelta

import accelerate
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from diptych.data_prep.command_line.arguments import choose_from
from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.commands.exits import RankError, is_main_rank
from diptych.finetune.commands.ranks import refuse_deepspeed
from diptych.finetune.training.recipe import TrainRecipe, split_names


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


def _check_launch(recipe: TrainRecipe) -> None:
    """What accelerate's configuration asks for and this loop does otherwise is refused: on a CPU, accelerate itself
    would take DDP for FSDP without a word. Where the recipe asks for FSDP as well, accelerate is not to hear of it:
    sharding.py does it, and transformers would load weights on the first rank alone."""
    refuse_deepspeed()
    if recipe.sharding == "full" and os.environ.pop("ACCELERATE_USE_FSDP", "").lower() in ("true", "1"):
        if is_main_rank():
            print("sharding: full, and accelerate's FSDP settings have no part in it", flush=True)
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1"):
        raise UserError(
            "accelerate's configuration asks for FSDP. Here the recipe says how weights are spread: launch with"
            " `torchrun --nproc_per_node=N -m diptych.finetune.train --config RECIPE --sharding full`, which is"
            " FSDP2, or drop it for DDP."
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
