"""Spoiled files of a run that is resumed: the parts of a checkpoint, with a manifest that was written anew to fit."""

import contextlib
import io
import json
import os
import random
import shutil
from pathlib import Path

from spoiled_files import Kind, spoil_json
from spoiled_model_files import make_model, spoil_tensors

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.commands import cli
from diptych.finetune.run_files import atomic_folders, checkpoints

SAVED = "run/checkpoints/step-000002"
TRAIN = [
    "train",
    "--model",
    "model",
    "--data",
    "data",
    "--batch_size",
    "2",
    "--precision",
    "fp32",
    "--save_every",
    "1",
]


def command(*words: str) -> None:
    """UserError with what it said, unless it ended well."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = cli.main(words)
    if code:
        raise UserError(*said.getvalue().splitlines()[-3:])


def make_run(folder: Path) -> None:
    make_model("t5")(folder / "model")
    rows = [{"source": f"{number} and one", "target": str(number + 1)} for number in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.chdir(folder)
    command("prepare", "--data", "rows.jsonl", "--tokenizer", "model", "--template", "plain", "--out", "data")
    command(*TRAIN, "--out", "run", "--max_steps", "2")


def forge(saved: Path) -> None:
    """All that says which files belong together, written anew."""
    has_state = (saved / "state.json").is_file()
    if has_state and isinstance(state := json.loads((saved / "state.json").read_text()), dict):
        (saved / "state.json").write_text(json.dumps(state | {checkpoints.FILES: {}}))
    atomic_folders.write_manifest(saved)


def resume(folder: Path) -> None:
    os.chdir(folder)
    shutil.copytree("run", "again")
    saved = Path(SAVED.replace("run", "again", 1))
    with contextlib.suppress(ValueError, RecursionError):  # it is no JSON
        forge(saved)
    command(*TRAIN, "--out", "again", "--max_steps", "3", "--resume", str(saved))


PARTS = [spoil_json(f"{SAVED}/{file}", {}) for file in ("state.json", "rng.json")]
PARTS += [spoil_tensors(f"{SAVED}/optimizer.safetensors")]


def spoil_part(folder: Path, dice: random.Random) -> str:
    return dice.choice(PARTS)(folder, dice)


OF_THE_RUN = {"checkpoint of a run": Kind(make_run, spoil_part, resume, 15.0)}
