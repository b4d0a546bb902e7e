"""How the ranks of a training run meet: one Accelerator. UserError if they would train apart, or in another way than
the recipe says.

    accelerator = meet(recipe)
"""

import os
from datetime import timedelta

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import InitProcessGroupKwargs

from diptych.data_prep.command_line.arguments import choose_from
from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.commands.exit_codes import RankError, is_main_rank
from diptych.finetune.commands.ranks import refuse_deepspeed
from diptych.finetune.training.recipe import TrainRecipe, split_names


def meet(recipe: TrainRecipe) -> Accelerator:
    """All ranks that were launched, joined to one run."""
    refuse_deepspeed()
    _settle_fsdp(recipe)
    _check_trackers(recipe)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        accelerator = Accelerator(
            mixed_precision="no",  # the loop has its own autocast; a launcher's default must not add another
            log_with=split_names(recipe.trackers) or None,
            project_dir=recipe.out,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=recipe.rank_timeout))],
        )
    except RuntimeError as error:
        if launched == 1:
            raise
        why = str(error).splitlines()[0][:300]
        raise RankError(f"the {launched} ranks of this run did not meet: {why}") from error
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


def _settle_fsdp(recipe: TrainRecipe) -> None:
    """The recipe decides about FSDP, not accelerate's configuration, which would silently become DDP on a CPU. If both
    ask for it, accelerate's setting is removed: with it, transformers would load weights on the first rank alone."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() not in ("true", "1"):
        return
    if recipe.sharding != "full":
        raise UserError(
            "accelerate's configuration asks for FSDP. Here the recipe says how weights are spread: launch with"
            " `torchrun --nproc_per_node=N -m diptych.finetune.train --config RECIPE --sharding full`, which is"
            " FSDP2, or drop it for DDP."
        )
    del os.environ["ACCELERATE_USE_FSDP"]
    if is_main_rank():
        print("sharding: full, and accelerate's FSDP settings are not used", flush=True)


def _check_trackers(recipe: TrainRecipe) -> None:
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in split_names(recipe.trackers):
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"accelerate knows no tracker {name!r}. {choose_from(name, list(LOGGER_TYPE_TO_CLASS))}")
        if name not in available:
            raise UserError(f"the tracker {name} is not installed. Install it: pip install {name}")
