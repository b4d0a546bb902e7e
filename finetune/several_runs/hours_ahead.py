"""How long a distillation will take, from a handful of rows that are written and a few steps that are trained.

about 3.2 hours: 2.1 in which the teacher writes 4 answers to 12,000 rows (1.6 rows/s), 1.1 of training (2,140
tokens/s); preparation, evaluation and export come on top
"""

import io
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from diptych.finetune.inference.generate_settings import GenerateSettings
from diptych.finetune.run_files.atomic_folders import read_json, read_json_lines
from diptych.finetune.several_runs.distil_settings import DistilSettings
from diptych.finetune.several_runs.stage_table import encoded, open_engine
from diptych.finetune.several_runs.written_rows import Row, write_jsonl

HANDFUL, TRIAL_ROWS, TRIAL_STEPS = 32, 1000, 4
TRIAL = ".trial-"


class Hours(NamedTuple):
    prompts: int
    samples: int
    rows_per_second: float
    train_tokens: float
    tokens_per_second: float

    @property
    def writing(self) -> float:
        return self.prompts / self.rows_per_second / 3600

    @property
    def training(self) -> float:
        return self.train_tokens / self.tokens_per_second / 3600

    def __str__(self) -> str:
        return (
            f"about {_time(self.writing + self.training)}: {_time(self.writing)} in which the teacher writes"
            f" {self.samples} answers to {self.prompts:,} rows ({self.rows_per_second:.1f} rows/s),"
            f" {_time(self.training)} of training ({self.tokens_per_second:,.0f} tokens/s); preparation, evaluation"
            f" and export come on top"
        )


def _time(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"


def writing_pace(prompts: Sequence[Row], settings: DistilSettings, writing: Mapping[str, Any]) -> float:
    """Rows per second of the teacher, on a handful of the prompts. `writing`: settings of `diptych generate`."""
    engine = open_engine(settings.teacher, settings)
    drawn = random.Random(settings.seed).sample(prompts, min(len(prompts), max(HANDFUL, settings.batch_size)))
    handful, asked = encoded(engine, drawn), GenerateSettings(**writing)
    engine.generate(handful[:1], asked, seed=0)
    began = time.perf_counter()
    engine.generate(handful, asked, seed=0)
    return len(handful) / (time.perf_counter() - began)


def training_pace(
    rows: Sequence[Row],
    settings: DistilSettings,
    recipe: Mapping[str, Any],
    preparing: Mapping[str, Any],
    carry_out: Callable[[str, Mapping[str, Any], Path], None],
    all_rows: int,
) -> tuple[float, float]:
    """Tokens that the student will be trained on, and how many it takes in a second, from a few steps in a folder that
    is removed again. `all_rows`: of its train split."""
    drawn = random.Random(settings.seed).sample(rows, min(len(rows), TRIAL_ROWS))
    for left in Path(settings.out).glob(f"{TRIAL}*"):  # by a process that was killed
        shutil.rmtree(left)
    folder = Path(tempfile.mkdtemp(prefix=TRIAL, dir=settings.out))
    try:
        write_jsonl(folder / "rows.jsonl", drawn)
        own = {"data": [str(folder / "rows.jsonl")], "out": str(folder / "data"), "validation": [], "test": []}
        nothing = {"validation_fraction": 0.0, "test_fraction": 0.0}
        changes = {"data": str(folder / "data"), "out": str(folder / "run"), "resume": False, "logging_every": 1}
        changes |= {"epochs": None, "max_steps": TRIAL_STEPS, "metrics": "", "best_metric": "loss", "patience": 0}
        with redirect_stdout(io.StringIO()):  # it is no step of the work; what goes wrong is on stderr
            carry_out("prepare", {**preparing, **own, **nothing}, folder / "prepare.yaml")
            carry_out("train", {**recipe, **changes}, folder / "train.yaml")
        last = read_json_lines(folder / "run" / "metrics.jsonl")[-1]
        tokens = read_json(folder / "data" / "manifest.json")["tokens"]
        each = (tokens["source"]["total"] + tokens["target"]["total"]) / len(drawn)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if recipe.get("max_steps"):
        return recipe["max_steps"] * last["tokens"] / TRIAL_STEPS, last["tokens_per_second"]
    return recipe["epochs"] * all_rows * each, last["tokens_per_second"]
