"""Checkpoints that are whole or not there at all.

    run/checkpoints/step-000200/  model/                 as save_pretrained writes it: weights, config, tokenizer
                                  optimizer.safetensors  AdamW's two means of every weight, by name
                                  state.json             step, place in the data, sums since the last log line
                                  rng.json               random states of python, numpy and torch, of every rank
                                  manifest.json          size and SHA-256 of each file above
    run/checkpoints/best.json     which one is the best, by what

All of it is written to step-000200.partial, flushed to the disk, and renamed: a rename is atomic, so a run that is
killed at any moment leaves complete checkpoints and perhaps one `.partial`, which nobody reads. Nothing is unpickled.
(`accelerate.save_state` writes in place, and its optimizer states are pickles.)
"""

import base64
import hashlib
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

MANIFEST = "manifest.json"
BEST = "best.json"
PARTIAL = ".partial"


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def write_checkpoint(path: Path, write: Callable[[Path], None]) -> None:
    """`write(folder)` fills a folder beside `path`; then it is flushed, described, and renamed to `path`."""
    partial = path.with_name(path.name + PARTIAL)
    for leftover in (partial, path):  # of a killed run, or damaged: a complete one is never written again
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    files = sorted(file for file in partial.rglob("*") if file.is_file())
    manifest = {
        str(file.relative_to(partial).as_posix()): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in files
    }
    write_json(partial / MANIFEST, manifest)
    for file in files:
        _flush(file)
    for folder in [*(file for file in partial.rglob("*") if file.is_dir()), partial]:
        _flush(folder)
    os.rename(partial, path)
    _flush(path.parent)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Those whose files are all there in full length, the oldest first."""
    return sorted((path for path in folder.glob("step-*") if _is_complete(path)), key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint whose contents are what was written; a damaged one is passed over, said aloud."""
    for path in reversed(complete_checkpoints(folder)):
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        damaged = [name for name, entry in manifest.items() if _sha256(path / name) != entry["sha256"]]
        if not damaged:
            return path
        warnings.warn(
            f"{path} is damaged ({damaged[0]} is not what was written); an earlier one is used", stacklevel=2
        )
    return None


def _is_complete(path: Path) -> bool:
    manifest = path / MANIFEST
    if path.name.endswith(PARTIAL) or not manifest.is_file():
        return False
    try:
        entries = json.loads(manifest.read_text(encoding="utf-8")).items()
    except (ValueError, AttributeError):  # the manifest itself is damaged
        return False
    return all((path / name).is_file() and (path / name).stat().st_size == entry["bytes"] for name, entry in entries)


def mark_best(folder: Path, step: int, metric: str, value: float) -> None:
    write_json(folder / BEST, {"checkpoint": checkpoint_path(folder, step).name, "metric": metric, "value": value})


def best_checkpoint(folder: Path) -> Path | None:
    marker = folder / BEST
    return folder / json.loads(marker.read_text(encoding="utf-8"))["checkpoint"] if marker.is_file() else None


def prune_checkpoints(folder: Path, keep_last: int) -> None:
    """Deletes all but the newest `keep_last` and the best, and what killed runs left half-written."""
    best = best_checkpoint(folder)
    for path in complete_checkpoints(folder)[:-keep_last]:
        if path != best:
            os.rename(path, path.with_name(path.name + PARTIAL))  # first, so that a half-deleted one is never seen
    for path in folder.glob(f"step-*{PARTIAL}"):
        shutil.rmtree(path)


def copy_folder(source: Path, target: Path) -> None:
    """A copy that is whole or not there, as checkpoints are."""
    partial = target.with_name(target.name + PARTIAL)
    for leftover in (partial, target):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(source, partial)
    for file in partial.rglob("*"):
        _flush(file)
    os.rename(partial, target)
    _flush(target.parent)


def write_json(file: Path, value: Any) -> None:
    """Python writes floats so that they read back to the same bits."""
    write_text(file, json.dumps(value, indent=1) + "\n")


def write_text(file: Path, text: str) -> None:
    """Replaces the file in one move."""
    beside = file.with_name(file.name + PARTIAL)
    beside.write_text(text, encoding="utf-8")
    _flush(beside)
    os.replace(beside, file)


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def save_optimizer(file: Path, optimizer: torch.optim.Optimizer, names: dict[torch.nn.Parameter, str]) -> None:
    """Every tensor that the optimizer keeps, as `name/exp_avg`. Its settings are the recipe's and are not kept."""
    tensors = {
        f"{names[parameter]}/{key}": value.detach().cpu().contiguous()
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    save_file(tensors, file)


def load_optimizer(file: Path, optimizer: torch.optim.Optimizer, names: dict[torch.nn.Parameter, str]) -> None:
    parameters = {name: parameter for parameter, name in names.items()}
    for key, value in load_file(file).items():
        name, _, entry = key.rpartition("/")
        parameter = parameters[name]
        # `step` stays where AdamW made it: on the CPU unless it is fused on a GPU
        device = parameter.device if value.ndim or optimizer.defaults["fused"] else "cpu"
        optimizer.state[parameter][entry] = value.to(device)


def random_states() -> dict[str, Any]:
    """Of this process: everything that python, numpy and torch draw from next."""
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


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Onto the disk, not only into the system's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
