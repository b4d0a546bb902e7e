"""The checkpoints of a run: which there are, which is the newest whole one, and the state of training in them.

    run/checkpoints/step-000200/  model/                 as save_pretrained writes it: weights, config, tokenizer
                                  optimizer.safetensors  what the optimizer keeps of each weight, by name
                                  state.json             step, place in the data, sums since the last log line; what
                                                         the manifest says of all other files
                                  rng.json               random states of python, numpy and torch, of every rank
                                  manifest.json          size and hash of each file above: see atomic_folders.py
    run/checkpoints/best.json     which one is the best, by what
    run/checkpoints/aside/        what was newer when a run was taken back to an earlier one

A checkpoint is whole or not there, and is read back before an older one goes. Their order is that of their steps;
clocks have no part in it. Nothing is unpickled.

(`accelerate.save_state` takes the old one away before it writes the new, flushes nothing, and its states are pickles;
`torch.distributed.checkpoint` unpickles its `.metadata`; and no format of weights would notice a flipped bit.)
"""

import base64
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.commands.exit_codes import CheckpointError
from diptych.finetune.run_files.atomic_folders import (
    MANIFEST,
    PARTIAL,
    fault_of,
    partial_of,
    read_json,
    write_folder,
    write_json,
)

BEST = "best.json"
FILES = "files"
"""In state.json: what the manifest says of all other files. One of another run is found by it."""
ASIDE = "aside"


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def write_checkpoint(path: Path, write: Callable[[Path], Any], bytes_needed: int = 0) -> None:
    """`write_folder`, whose StorageError says what is left to go on from."""
    if not _why_no_checkpoint(path):
        _remove(path)  # it is damaged: a whole one is never written again
    elif os.path.lexists(path):
        _move_aside(path)
    older = checkpoint_steps(path.parent)
    left = f"That of step {older[-1]} is untouched" if older else "There is no earlier one"
    write_folder(path, write, bytes_needed, [f"{left}. (keep_last says how many are kept.)"])


def complete_checkpoints(folder: Path) -> list[Path]:
    """Those whose files are all there in full size, the oldest first."""
    paths = (checkpoint_path(folder, step) for step in checkpoint_steps(folder))
    return [path for path in paths if not checkpoint_fault(path, read=False)]


def checkpoint_steps(folder: Path) -> list[int]:
    """Of all checkpoints, also damaged ones."""
    return sorted(checkpoint_step(path) for path in _called_like_one(folder) if not _why_no_checkpoint(path))


def _called_like_one(folder: Path) -> list[Path]:
    """`step-` and a number, the largest last."""
    paths = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(paths, key=checkpoint_step)


def _why_no_checkpoint(path: Path) -> str:
    """ "" for a folder that training may have written."""
    number = path.name.removeprefix("step-")
    name = checkpoint_path(path.parent, int(number)).name if number.isdecimal() else "step-000200"
    if path.is_symlink() or not path.is_dir():
        return "it is a link" if path.is_symlink() else "it is no folder"
    return "" if path.name == name else f"training would call it {name}"


def checkpoint_fault(path: Path, read: bool = True) -> str:
    """As `fault_of`; also, what is no folder of training's, and a copy of the checkpoint of another step."""
    fault = _why_no_checkpoint(path) or fault_of(path, read)
    if fault:
        return fault
    try:
        state, written = read_json(path / "state.json"), read_json(path / MANIFEST)
        step = state["progress"]["step"]
        strange = [name for name, entry in state.get(FILES, {}).items() if entry != written.get(name)]
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its state.json is not the state of a run: {error!r}"
    if strange:
        return f"its {strange[0]} was not written with its state.json"
    return "" if step == checkpoint_step(path) else f"it is that of step {step}"


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


class LatestCheckpoint(NamedTuple):
    path: Path | None
    passed_over: list[str]
    """Newer ones, and what is wrong with each."""


def latest_checkpoint(folder: Path, fault_in: Callable[[Path], str] = checkpoint_fault) -> LatestCheckpoint:
    """The newest undamaged checkpoint, None where there are none yet. CheckpointError where all are damaged."""
    passed_over = []
    for path in reversed(_called_like_one(folder)):
        fault = fault_in(path)
        if not fault:
            return LatestCheckpoint(path, passed_over)
        passed_over.append(f"{path.name}: {fault}")
    if passed_over:
        raise CheckpointError(
            f"no checkpoint in {folder} is sound: {'; '.join(passed_over)}.",
            "Bring one back from a copy, or begin anew with another `out`.",
        )
    return LatestCheckpoint(None, [])


def check_checkpoint(path: Path, fault_in: Callable[[Path], str] = checkpoint_fault) -> None:
    """CheckpointError where it is missing, incomplete or damaged."""
    fault = fault_in(path) if path.is_dir() else "there is no such folder"
    if fault:
        raise CheckpointError(f"{path} cannot be used: {fault}. Name another one, or `--resume true` for the newest.")


def set_aside(folder: Path, after: int) -> list[Path]:
    """Moves checkpoints of later steps, and what is only called like one, into a folder that no run reads; nothing is
    deleted."""
    paths = [path for path in _called_like_one(folder) if checkpoint_step(path) > after or _why_no_checkpoint(path)]
    return [_move_aside(path) for path in paths]


def _move_aside(path: Path) -> Path:
    aside = path.parent / ASIDE
    if aside.is_symlink():
        raise UserError(f"{aside} is a link: what is moved into it would leave the run. Remove the link.")
    aside.mkdir(exist_ok=True)
    number = 1
    while os.path.lexists(target := path.parent / ASIDE / f"{path.name}-{number}"):
        number += 1
    return path.rename(target)


def mark_best(folder: Path, step: int, metric: str, value: float) -> None:
    write_json(folder / BEST, {"checkpoint": checkpoint_path(folder, step).name, "metric": metric, "value": value})


def prune_checkpoints(folder: Path, keep_last: int, newest: int, best: int | None) -> None:
    """Deletes all but the newest `keep_last` and that of step `best`, and partial folders of killed runs. Damaged
    checkpoints, and those of a later step than the run has come to, do not count, and stay."""
    own = [path for path in complete_checkpoints(folder) if checkpoint_step(path) <= newest]
    for path in own[:-keep_last]:
        if checkpoint_step(path) != best:
            os.rename(path, partial_of(path))  # first, so that a half-deleted one is never seen
    for path in folder.glob(f".step-*{PARTIAL}"):
        _remove(path)


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except OSError as error:  # it names the file alone, without its folder
        raise OSError(error.errno, error.strerror, str(path)) from error


def whole_tensor(tensor: torch.Tensor, keep: bool = True) -> torch.Tensor:
    """On the CPU; a tensor that is spread over ranks is gathered, for which all of them must call this. Ranks with
    keep=False get an empty tensor, so that a machine of eight ranks does not hold everything eight times."""
    tensor = tensor.detach()
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.cpu().contiguous() if keep else torch.empty(0)


def random_states() -> dict[str, Any]:
    """Of python, numpy and torch in this process."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "python": [version, list(numbers), gauss],
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
        "torch": _encode(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        states["cuda"] = _encode(torch.cuda.get_rng_state())
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Errors of many types where they are none."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    if position not in range(len(keys) + 1):
        raise ValueError(f"the state of numpy has the position {position!r}")
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_decode(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(states["cuda"]))
    now = random_states()
    if wrong := [kind for kind in now.keys() & states.keys() if now[kind] != states[kind]]:
        raise ValueError(f"the state of {wrong[0]} is none")


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
