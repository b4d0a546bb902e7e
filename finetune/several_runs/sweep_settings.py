"""What `diptych sweep` can be told."""

import importlib.util
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from typing import Any

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.pipeline.path_settings import EXISTING, OUTPUT


@dataclass(frozen=True)
class SweepSettings:
    """Train one recipe many times with other values of some settings (by Optuna), and find the best values."""

    recipe: str = field(metadata=EXISTING)
    """Recipe of `diptych train`, a YAML file. Its `best_metric` decides what is best. Its `out` is not used."""
    out: str = field(default="", metadata=OUTPUT)
    """Folder of the sweep: a run folder for each trial, trials.csv, sweep.png and best.yaml, the recipe with the best
    values. The same command goes on with a sweep that was stopped."""
    search: dict[str, Any] = field(default_factory=lambda: {"learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}})
    """What varies: ranges, {learning_rate: {low: 1e-5, high: 1e-3, log: true}, lora_rank: {low: 8, high: 64, step:
    8}}, or lists of values, {schedule: [cosine, linear]}. Default: the learning rate, from 1e-5 to 1e-2."""
    trials: int = 16
    """Number of trials. The first one has the recipe's own values, if they are within the ranges."""
    prune: bool = True
    """Stop trials that are worse at an evaluation than the median of the earlier ones at the same step; not before the
    fifth trial."""
    keep: bool = False
    """Keep the checkpoints and final models of all trials. Default: only those of the best one."""
    seed: int = 0
    """Seed of the values that are tried. (The recipe has the seed of training.)"""
    launcher: str = ""
    """Command that starts a trial, if it is not one process: torchrun --nproc_per_node 2 -m diptych.finetune.train"""

    def __post_init__(self):
        if importlib.util.find_spec("optuna") is None:
            raise UserError("diptych sweep needs Optuna. Install it: pip install 'diptych[sweep]'")
        if not self.out:
            raise UserError("out is not set. Name a folder for the sweep: --out FOLDER")
        try:
            program = next(iter(shlex.split(self.launcher)), sys.executable)
        except ValueError as error:
            raise UserError(f"launcher is {self.launcher!r}: {error}. Write it as in a shell.") from None
        if not shutil.which(program):
            raise UserError(
                f"launcher is {self.launcher!r}, and there is no program {program}. Install it, or name another."
            )
        if self.trials < 1:
            raise UserError(f"trials is {self.trials}; it must be 1 or more.")
        if not self.search:
            raise UserError("search is empty. Name what varies: --search '{learning_rate: {low: 1e-5, high: 1e-3}}'")
