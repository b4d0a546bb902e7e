"""Folders that are whole or not there: checkpoints, `final/` of a run, merged and exported models.

    write_folder(Path("merged"), write, bytes_needed)      `write(folder)` fills a folder, which becomes merged/
    fault_of(Path("merged"))                               "" or what is wrong: "config.json is missing"

    merged/manifest.json     size and XXH3-128 of each other file

All files are written to a folder beside (`.merged.diptych-partial`), flushed to the disk, renamed, and read back. A
rename is atomic, so a process that is killed at any moment leaves whole folders and perhaps one partial folder, which
nobody reads.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import xxhash

from diptych.data_prep.command_line.errors import UserError, library_errors, storage_errno
from diptych.finetune.commands.exit_codes import StorageError, message_of

MANIFEST = "manifest.json"
MOST_BYTES = 2**26
"""Of a file of JSON."""
PARTIAL = ".diptych-partial"


def write_folder(folder: Path, write: Callable[[Path], Any], bytes_needed: int = 0, left: Sequence[str] = ()) -> None:
    """`write(partial)` fills a folder beside, which then replaces `folder`, whatever is in it.

    StorageError, and what was there before, where the disk has less than `bytes_needed`, runs full nevertheless,
    fails, or gives back something else than was written. `left` are further lines of its message.
    """
    partial, previous = partial_of(folder), partial_of(folder.with_name(f"{folder.name}.previous"))
    _put_back(previous, folder)
    for leftover in (partial, previous):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < bytes_needed:
            raise OSError(errno.ENOSPC, f"{free:,} bytes are free")
        write(partial)
        write_manifest(partial)
        for path in [*partial.rglob("*"), partial]:
            _flush(path)
        if folder.exists():
            os.rename(folder, previous)
        os.rename(partial, folder)
        _flush(folder.parent)
    except Exception as error:  # of any type: it is raised again, after the half-written folder is removed
        written = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
        shutil.rmtree(partial, ignore_errors=True)
        _put_back(previous, folder)
        if storage_errno(error) is None:
            raise
        raise StorageError(
            f"{folder} could not be written ({written:,} of {bytes_needed:,} bytes were): {message_of(error)}", *left
        ) from error
    shutil.rmtree(previous, ignore_errors=True)
    if fault := fault_of(folder):
        raise StorageError(f"{folder} was written, and is not what is read back: {fault}. Look after this disk.")


def _put_back(previous: Path, folder: Path) -> None:
    """What was moved out of the way, where nothing came in its place."""
    if previous.exists() and not os.path.lexists(folder):
        os.rename(previous, folder)


def partial_of(folder: Path) -> Path:
    """Where a folder is written before it is renamed. What lies there is of a process that was killed, and is removed:
    nobody else gives that name."""
    return folder.with_name(f".{folder.name}{PARTIAL}")


def write_manifest(folder: Path) -> None:
    """Size and hash of every file in the folder, in a file beside them. XXH3 finds damage, not forgery."""
    write_json(folder / MANIFEST, manifest_of(folder))
    for file in folder.rglob("*.safetensors"):  # safetensors makes its files with mode 0600, whatever the umask says
        file.chmod((folder / MANIFEST).stat().st_mode)


def manifest_of(folder: Path) -> dict[str, Any]:
    """Size and hash of each file in it."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / MANIFEST)
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "xxh3_128": _hash(file)} for file in files
    }


def fault_of(path: Path, read: bool = True) -> str:
    """What differs from the manifest, in words; "" where nothing does. Without `read`, only sizes are compared."""
    try:
        entries = read_json(path / MANIFEST)
        expected = {name: (int(entry["bytes"]), entry["xxh3_128"]) for name, entry in entries.items()}
        missing = next((name for name in expected if not (path / name).is_file()), None)
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except PermissionError:
        raise
    except (ValueError, OverflowError, AttributeError, KeyError, TypeError, OSError):
        return f"its {MANIFEST} cannot be read"
    if missing:
        return f"{missing} is missing"
    for name, (size, digest) in expected.items():
        file = path / name
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} bytes instead of {size:,}"
        try:
            if read and _hash(file) != digest:
                return f"{name} is not what was written"
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return f"{name} cannot be read: {error.strerror}"
    return ""


def copy_folder(source: Path, target: Path) -> None:
    """A whole copy with a manifest. A target that has these files already stays as it is, whatever else lies in it.
    UserError where the target holds what was not written here."""
    entries = manifest_of(source)
    if entries == _entries_of(target) and not fault_of(target):
        return
    check_own(target)
    needed = sum(entry["bytes"] for entry in entries.values())
    write_folder(target, lambda partial: shutil.copytree(source, partial, dirs_exist_ok=True), needed)


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


def write_json(file: Path, value: Any) -> None:
    """Python writes floats so that they read back to the same bits."""
    write_text(file, json.dumps(value, indent=1) + "\n")


def write_text(file: Path, text: str) -> None:
    write_bytes(file, text.encode())


def write_bytes(file: Path, content: bytes) -> None:
    """Replaces the file in one move. Into a pipe or a device, such as /dev/stdout, the content is written."""
    is_replaced = file.is_file() or not file.exists()
    beside = file.with_name(f"{file.name}.partial") if is_replaced else file
    try:
        beside.write_bytes(content)
    except OSError as error:  # the system does not say which file
        if is_replaced:
            beside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(file)) from error
    if is_replaced:
        _flush(beside)
        os.replace(beside, file)


def read_json(file: Path) -> Any:
    """ValueError for what is no JSON, or larger or deeper nested than what training writes."""
    if file.stat().st_size > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
    if not file.is_file():
        raise ValueError("it is a pipe, a device or a folder")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """All whole lines; a running training may be at the last one. UserError names a line that is damaged."""
    entries = []
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):
        with library_errors(f"{file} line {number} is no entry of a log", "Remove the line, or restore it."):
            if not isinstance(entry := json.loads(line), dict):
                raise TypeError(f"it is a {type(entry).__name__}, and an object is due")
            entries.append(entry)
    return entries


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
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)
