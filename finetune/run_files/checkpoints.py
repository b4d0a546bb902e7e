"""Checkpoints that are whole or not there at all.

    run/checkpoints/step-000200/  model/                 as save_pretrained writes it: weights, config, tokenizer
                                  optimizer.safetensors  AdamW's two means of every weight, by name
                                  state.json             step, place in the data, sums since the last log line
                                  rng.json               random states of python, numpy and torch, of every rank
                                  manifest.json          size and XXH3-128 of each file above
    run/checkpoints/best.json     which one is the best, by what
    run/checkpoints/aside/        what was newer when a run was taken back to an earlier one

All of it is written to step-000200.partial, flushed to the disk, renamed, and read back before an older one goes: a
rename is atomic, so a run that is killed at any moment leaves complete checkpoints and perhaps one `.partial`, which
nobody reads. Their order is that of their steps; clocks have no part in it. Nothing is unpickled.

(`accelerate.save_state` takes the old one away before it writes the new, flushes nothing, and its states are pickles;
`torch.distributed.checkpoint` unpickles its `.metadata`; and no format of weights would notice a flipped bit.)
"""

import base64
import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.command_line.run_command import STORAGE_ERRORS
from diptych.finetune.commands.exits import CheckpointError, StorageError

MANIFEST = "manifest.json"
BEST = "best.json"
PARTIAL = ".partial"
ASIDE = "aside"


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def write_checkpoint(path: Path, write: Callable[[Path], None], bytes_needed: int = 0) -> None:
    """`write(folder)` fills a folder beside `path`; then it is flushed, described, renamed to `path`, and read back.

    StorageError, and no half a folder, where the disk has less than `bytes_needed`, or runs full nevertheless.
    """
    partial = path.with_name(path.name + PARTIAL)
    for leftover in (partial, path):  # of a killed run, or damaged: a complete one is never written again
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _check_space(path, bytes_needed)
        write(partial)
        write_manifest(partial)
        flush_folder(partial)
    except Exception as error:
        written = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
        shutil.rmtree(partial, ignore_errors=True)
        if _is_of_storage(error):
            raise _no_space(path, f"it ended after {written:,} bytes: {error}", bytes_needed) from error
        raise
    os.rename(partial, path)
    _flush(path.parent)
    if fault := fault_of(path):
        raise StorageError(f"{path} was written, and is not what is read back: {fault}. Look after this disk.")


def write_new_folder(out: Path, write: Callable[[Path], None], bytes_needed: int) -> None:
    """The same for a folder that is no run's checkpoint: `write(folder)`, manifest, flush, rename, read back.

    StorageError, and nothing left, where the disk has no room or gives back something else.
    """
    partial = partial_of(out)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        free = shutil.disk_usage(partial).free
        if free < bytes_needed:
            raise StorageError(
                f"{out} needs {bytes_needed:,} bytes, and {free:,} are free. Make room, or name another disk."
            )
        write(partial)
        write_manifest(partial)
        flush_folder(partial)
        os.rename(partial, out)
    except SafetensorError as error:  # by which safetensors says that a disk is full
        raise StorageError(f"{out} could not be written: {error}. Make room, or name another disk.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if fault := fault_of(out):
        raise StorageError(f"{out} was written, and is not what is read back: {fault}. Look after this disk.")


def write_manifest(folder: Path) -> None:
    """Size and hash of every file in the folder, in a file beside them. XXH3 finds damage, not forgery."""
    write_json(folder / MANIFEST, _manifest_of(folder))
    for file in folder.rglob("*.safetensors"):  # which safetensors lets nobody else read, whatever the umask says
        file.chmod((folder / MANIFEST).stat().st_mode)


def _manifest_of(folder: Path) -> dict[str, Any]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / MANIFEST)
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "xxh3_128": _hash(file)} for file in files
    }


def flush_folder(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def _check_space(path: Path, bytes_needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < bytes_needed:
        raise _no_space(path, f"{free:,} bytes are free", bytes_needed)


def _no_space(path: Path, why: str, bytes_needed: int) -> StorageError:
    older = checkpoint_steps(path.parent)
    left = f"That of step {older[-1]} is untouched" if older else "There is no earlier one"
    return StorageError(
        f"{path} needs {bytes_needed:,} bytes, and there is no room: {why}\n"
        f"{left}. Make room, or have fewer kept (keep_last), and go on: --resume true."
    )


def _is_of_storage(error: Exception) -> bool:
    """safetensors tells an OSError's number in words alone."""
    words = [os.strerror(number) for number in STORAGE_ERRORS if number != errno.EIO]
    return getattr(error, "errno", None) in STORAGE_ERRORS or any(word in str(error) for word in words)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Those whose files are all there in full length, the oldest first."""
    paths = (checkpoint_path(folder, step) for step in checkpoint_steps(folder))
    return [path for path in paths if not fault_of(path, read=False)]


def checkpoint_steps(folder: Path) -> list[int]:
    """Of all that are visible as checkpoints, whatever is in them."""
    names = (path.name.removeprefix("step-") for path in folder.glob("step-*") if path.is_dir())
    return sorted(int(name) for name in names if name.isdigit())


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


class LatestCheckpoint(NamedTuple):
    path: Path | None
    passed_over: list[str]
    """Newer ones, and what is wrong with each."""


def latest_checkpoint(folder: Path) -> LatestCheckpoint:
    """The newest checkpoint whose contents are what was written. CheckpointError where there are some, all damaged."""
    passed_over = []
    for step in reversed(checkpoint_steps(folder)):
        path = checkpoint_path(folder, step)
        fault = fault_of(path)
        if not fault:
            return LatestCheckpoint(path, passed_over)
        passed_over.append(f"{path.name}: {fault}")
    if passed_over:
        raise CheckpointError(
            f"no checkpoint in {folder} is sound: {'; '.join(passed_over)}.\nBring one back from a copy, or begin anew"
            f" with another `out`."
        )
    return LatestCheckpoint(None, [])


def check_checkpoint(path: Path) -> None:
    """CheckpointError where it is not whole, or not what was written."""
    fault = "there is no such folder" if not path.is_dir() else fault_of(path)
    if fault:
        raise CheckpointError(f"{path} cannot be used: {fault}. Name another one, or `--resume true` for the newest.")


def fault_of(path: Path, read: bool = True) -> str:
    """What is wrong with a checkpoint, in words; empty where nothing is. Without `read`, by its files' sizes alone."""
    try:
        entries = read_json(path / MANIFEST)
        expected = {name: (entry["bytes"], entry["xxh3_128"]) for name, entry in entries.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (ValueError, AttributeError, KeyError, TypeError, OSError):
        return f"its {MANIFEST} cannot be read"
    for name, (size, digest) in expected.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} bytes instead of {size:,}"
        if read and _hash(file) != digest:
            return f"{name} is not what was written"
    return ""


def set_aside(folder: Path, after: int) -> list[Path]:
    """Moves checkpoints of later steps to where no run looks for them; they are not deleted."""
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
    return folder / json.loads(marker.read_text(encoding="utf-8"))["checkpoint"] if marker.is_file() else None


def prune_checkpoints(folder: Path, keep_last: int) -> None:
    """Deletes all but the newest `keep_last` and the best, and what killed runs left half-written.

    Those that are damaged do not count among the newest, and stay for somebody to look at."""
    best = best_checkpoint(folder)
    for path in complete_checkpoints(folder)[:-keep_last]:
        if path != best:
            os.rename(path, path.with_name(path.name + PARTIAL))  # first, so that a half-deleted one is never seen
    for path in folder.glob(f"step-*{PARTIAL}"):
        shutil.rmtree(path)


def copy_folder(source: Path, target: Path) -> None:
    """A copy that is whole or not there, with a manifest, as checkpoints are. A target that has these files already
    stays as it is, whatever else lies in it. UserError where another one holds what was not written here."""
    if _manifest_of(source) == _entries_of(target) and not fault_of(target):
        return
    check_own(target)
    partial, previous = partial_of(target), partial_of(target.with_name(f"{target.name}.previous"))
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    write_manifest(partial)
    flush_folder(partial)
    shutil.rmtree(previous, ignore_errors=True)
    if target.exists():
        os.rename(target, previous)
    os.rename(partial, target)
    _flush(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def check_own(folder: Path) -> None:
    """UserError where a folder that is to be replaced holds what was not written here, or was changed since."""
    if not os.path.lexists(folder):
        return
    entries, why = _entries_of(folder), "it is a link" if folder.is_symlink() else ""
    for path in [] if why else sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path == folder / MANIFEST or (path.is_dir() and not path.is_symlink()):
            continue
        if path.is_symlink() or name not in entries or _hash(path) != entries[name]["xxh3_128"]:
            why = f"{name} in it is not as training wrote it" if name in entries else f"{name} in it is not training's"
            break
    if why:
        raise UserError(
            f"{folder} would be replaced, but {why}, and would be lost. Move {folder} away, and go on: --resume true."
        )


def _entries_of(folder: Path) -> dict[str, Any]:
    """What the manifest of a folder says; nothing where there is none that can be read."""
    try:
        entries = read_json(folder / MANIFEST)
        return entries if all({"bytes", "xxh3_128"} == entry.keys() for entry in entries.values()) else {}
    except (OSError, ValueError, AttributeError):
        return {}


def partial_of(folder: Path) -> Path:
    """Where a folder is written before it is renamed. What lies there is of a run that was killed, and is removed:
    nobody else gives that name."""
    return folder.with_name(f".{folder.name}.diptych-partial")


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


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: dict[torch.nn.Parameter, str], keep: bool = True
) -> dict[str, torch.Tensor]:
    """Every tensor that the optimizer keeps, whole and on the CPU, as `name/exp_avg`: the same whatever the number of
    ranks, all of which must ask for it. Its settings are the recipe's and are not kept. `keep`: see `whole`."""
    return {
        f"{names[parameter]}/{key}": whole(value, keep)
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def whole(tensor: torch.Tensor, keep: bool = True) -> torch.Tensor:
    """On the CPU; what is spread over ranks, put together. All of them must ask; one that does not `keep` it gets
    nothing, or a machine of eight ranks would hold everything eight times."""
    tensor = tensor.detach()
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.cpu().contiguous() if keep else torch.empty(0)


def save_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, file)


def load_optimizer(file: Path, optimizer: torch.optim.Optimizer, names: dict[torch.nn.Parameter, str]) -> None:
    """CheckpointError where the file holds anything else than the state of these weights."""
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


def _hash(file: Path) -> str:
    digest = xxhash.xxh3_128()
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
