"""The command that trains: a recipe in; a run folder and an exit code out.

    accelerate launch -m diptych.finetune.train --config recipe.yaml        (or finetune/train.py, or `diptych train`)

    run/  config.yaml      the recipe as it was resolved        checkpoints/   see checkpoints.py
          metrics.jsonl    one line for each log line and       samples.jsonl  what was generated for the metrics
                           each evaluation                      final/         the best checkpoint's model, or the
          loss.png         both losses, learning rate                          last one's: from_pretrained loads it
          status.json      how it ended: see run_folder.py

A run may be killed at any instant; `--resume true` goes on from the last checkpoint. The loop itself is loop.py's.
"""

import os
import shlex
import sys
import traceback
from pathlib import Path

from diptych.finetune.commands import cli
from diptych.finetune.commands.exit_codes import (
    BUG,
    INTERRUPTED,
    RANKS,
    STOPPED,
    STORAGE,
    exit_code_of,
    is_main_rank,
    message_of,
)
from diptych.finetune.run_files.run_folder import CONFIG, check_new, claimed
from diptych.finetune.training.recipe import TrainRecipe
from diptych.finetune.training.stop_signals import StopRequest


def run_recipe(recipe: TrainRecipe, stop: StopRequest | None = None) -> int:
    """DONE, or STOPPED if `stop` asked for it; anything else that ends a run is raised."""
    stop = stop or StopRequest()
    with claimed(Path(recipe.out), bool(recipe.resume)) as status:
        # imported here, since torch takes seconds: what is wrong with the folder is told before
        if os.environ.get("WORLD_SIZE", "1") == "1":  # else another rank may have written into it already
            check_new(Path(recipe.out), bool(recipe.resume))
        if recipe.stages:
            from diptych.finetune.training.staged_run import run_stages as carry_out
        else:
            from diptych.finetune.training.loop import run as carry_out

        code = carry_out(recipe, stop, status)
        stop.ignore()
        status.end(code)
        return code


def run(recipe: TrainRecipe) -> int:
    stop = StopRequest()
    stop.listen()
    try:
        code = run_recipe(recipe, stop)
    except BaseException as error:  # also KeyboardInterrupt
        code = exit_code_of(error)
        if code == BUG:
            raise
        if is_main_rank() or code in (RANKS, STORAGE):  # in all else, all ranks fail alike
            message = "interrupted; the checkpoints are kept" if code == INTERRUPTED else message_of(error)
            print(f"diptych train: {message}", file=sys.stderr)
        if recipe.debug:
            traceback.print_exception(error)
    if code in (STOPPED, STORAGE) and is_main_rank() and (Path(recipe.out) / CONFIG).is_file():
        print(f"diptych train: go on with: {resume_command(recipe)}", file=sys.stderr)
    return code


def resume_command(recipe: TrainRecipe) -> str:
    config = shlex.quote(str(Path(recipe.out) / "config.yaml"))
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    launcher = "diptych train" if ranks == 1 else f"torchrun --nproc_per_node={ranks} -m diptych.finetune.train"
    return f"{launcher} --config {config} --resume true"


if __name__ == "__main__":
    raise SystemExit(cli.run("train", None))
