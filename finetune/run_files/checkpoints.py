"""The checkpoints of a run: which there are, which is the newest whole one, and the state of training in them.

    run/checkpoints/step-000200/  model/                 as save_pretrained writes it: weights, config, tokenizer
                                  optimizer.safetensors  AdamW's two means of every weight, by name
                                  state.json             step, place in the data, sums since the last log line
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
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, distribute_tensor

from diptych.finetune.commands.exit_codes import CheckpointError
from diptych.finetune.run_files.atomic_folders import (
    PARTIAL,
    fault_of,
    partial_of,
    read_json,
    write_folder,
    write_json,
)

BEST = "best.json"
ASIDE = "aside"


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def write_checkpoint(path: Path, write: Callable[[Path], Any], bytes_needed: int = 0) -> None:
    """`write_folder`, whose StorageError says what is left to go on from."""
    shutil.rmtree(path, ignore_errors=True)  # it is damaged: a whole one is never written again
    older = checkpoint_steps(path.parent)
    left = f"That of step {older[-1]} is untouched" if older else "There is no earlier one"
    remedy = f"{left}. Make room, or have fewer kept (keep_last), and go on: --resume true."
    write_folder(path, write, bytes_needed, remedy)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Those whose files are all there in full size, the oldest first."""
    paths = (checkpoint_path(folder, step) for step in checkpoint_steps(folder))
    return [path for path in paths if not fault_of(path, read=False)]


def checkpoint_steps(folder: Path) -> list[int]:
    """Of all checkpoints, also damaged ones."""
    names = (path.name.removeprefix("step-") for path in folder.glob("step-*") if path.is_dir())
    return sorted(int(name) for name in names if name.isdigit())


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


class LatestCheckpoint(NamedTuple):
    path: Path | None
    passed_over: list[str]
    """Newer ones, and what is wrong with each."""


def latest_checkpoint(folder: Path) -> LatestCheckpoint:
    """The newest undamaged checkpoint, None where there are none yet. CheckpointError where all are damaged."""
    passed_over = []
    for step in reversed(checkpoint_steps(folder)):
        path = checkpoint_path(folder, step)
        fault = fault_of(path)
        if not fault:
            return LatestCheckpoint(path, passed_over)
        passed_over.append(f"{path.name}: {fault}")
    if passed_over:
        raise CheckpointError(
            f"no checkpoint in {folder} is sound: {'; '.join(passed_over)}.",
            "Bring one back from a copy, or begin anew with another `out`.",
        )
    return LatestCheckpoint(None, [])


def check_checkpoint(path: Path) -> None:
    """CheckpointError where it is missing, incomplete or damaged."""
    fault = "there is no such folder" if not path.is_dir() else fault_of(path)
    if fault:
        raise CheckpointError(f"{path} cannot be used: {fault}. Name another one, or `--resume true` for the newest.")


def set_aside(folder: Path, after: int) -> list[Path]:
    """Moves checkpoints of later steps into a folder that no run reads; nothing is deleted."""
    moved = []
    for step in checkpoint_steps(folder):
        if step <= after:
            continue
        (folder / ASIDE).mkdir(exist_ok=True)
        number = 1
        while (target := folder / ASIDE / f"step-{step:06d}-{number}").exists():
            number += 1
        os.rename(checkpoint_path(folder, step), target)
        moved.append(target)
    return moved


def mark_best(folder: Path, step: int, metric: str, value: float) -> None:
    write_json(folder / BEST, {"checkpoint": checkpoint_path(folder, step).name, "metric": metric, "value": value})


def best_checkpoint(folder: Path) -> Path | None:
    marker = folder / BEST
    return folder / read_json(marker)["checkpoint"] if marker.is_file() else None


def prune_checkpoints(folder: Path, keep_last: int) -> None:
    """Deletes all but the newest `keep_last` and the best, and partial folders of killed runs. Damaged checkpoints do
    not count, and stay."""
    best = best_checkpoint(folder)
    for path in complete_checkpoints(folder)[:-keep_last]:
        if path != best:
            os.rename(path, partial_of(path))  # first, so that a half-deleted one is never seen
    for path in folder.glob(f".step-*{PARTIAL}"):
        shutil.rmtree(path)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: dict[torch.nn.Parameter, str], keep: bool = True
) -> dict[str, torch.Tensor]:
    """Every tensor of the optimizer's state on the CPU, as `name/exp_avg`; the same for any number of ranks, all of
    which must call this. `keep`: see `whole_tensor`."""
    return {
        f"{names[parameter]}/{key}": whole_tensor(value, keep)
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def whole_tensor(tensor: torch.Tensor, keep: bool = True) -> torch.Tensor:
    """On the CPU; a tensor that is spread over ranks is gathered, for which all of them must call this. Ranks with
    keep=False get an empty tensor, so that a machine of eight ranks does not hold everything eight times."""
    tensor = tensor.detach()
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.cpu().contiguous() if keep else torch.empty(0)


def load_optimizer(file: Path, optimizer: torch.optim.Optimizer, names: dict[torch.nn.Parameter, str]) -> None:
    """CheckpointError where the file has other entries than the state of these weights."""
    tensors = load_file(file)
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    expected = {f"{names[weight]}/{key}" for weight in trained for key in ("step", "exp_avg", "exp_avg_sq")}
    if different := sorted(expected ^ tensors.keys()):
        is_missing = different[0] in expected
        raise CheckpointError(
            f"{file} {'lacks' if is_missing else 'holds'} {different[0]}{'' if is_missing else ', which is unknown'}:"
            f" {len(expected)} entries were expected, {len(tensors)} found. Name another checkpoint."
        )
    for weight in trained:
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = tensors[f"{names[weight]}/{key}"]
            # `step` stays where AdamW made it: on the CPU unless it is fused on a GPU
            if value.ndim or optimizer.defaults["fused"]:
                value = value.to(weight.device)
            if value.ndim and isinstance(weight, DTensor):
                value = distribute_tensor(value, weight.device_mesh, weight.placements)
            optimizer.state[weight][key] = value


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
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_decode(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(states["cuda"]))


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
