"""The folder of a prepared dataset: when it may be reused, when it may be replaced, and how it is written.

    prepared/  dataset_dict.json train/ validation/ test/   datasets.load_from_disk("prepared") reads it
               validation/news/ test/news/                  of several sets with names, one folder each
               packed/                                      load_from_disk("prepared/packed"): train, in packed rows
               tokenizer/                                   AutoTokenizer reads it; the template is inside
               report.html report.json                      all that is worth knowing of the data, to look at
               manifest.json                                what went in, what came out, every file with its size
               rejects.jsonl conflicts.jsonl                every row that was not kept, with its reason; sources that
                                                            have several targets

The folder is written as `.prepared.partial` and renamed when it is complete: what is called `prepared` is never half a
dataset. A folder that holds anything that this code did not write is never replaced.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.command_line.overwrite_checks import take_lock
from diptych.data_prep.command_line.run_command import message_of
from diptych.data_prep.pipeline.prepare_settings import PrepareSettings
from diptych.data_prep.reading.find_files import fixed_part
from diptych.data_prep.rows.named_splits import named
from diptych.data_prep.rows.records import Rejects

FORMAT = "diptych prepared dataset, version 1"
MANIFEST, REJECTS, CONFLICTS = "manifest.json", "rejects.jsonl", "conflicts.jsonl"
TOKENIZER, PACKED = "tokenizer", "packed"
CACHE_FILE = re.compile(r"cache-\w+\.arrow|tmp\w+")  # what `datasets` leaves beside the tables when a user maps them


def code_version() -> str:
    """A hash of all code of data_prep, its templates included."""
    return _hash_files(
        path for path in Path(__file__).parents[1].rglob("*.*") if path.suffix in (".py", ".jinja", ".css")
    )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what save_pretrained writes: a folder and a Hub id with the same content have the same."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return _hash_files(path for path in Path(folder).rglob("*") if path.is_file())


def _hash_files(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a prepared dataset; None for any other folder."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_whole = isinstance(manifest, dict) and {"fingerprint", "files", "splits"} <= manifest.keys()
    return manifest if is_whole and manifest.get("format") == FORMAT else None


def find_reusable(folder: Path, wanted: str) -> dict[str, Any] | None:
    """The manifest in `folder` if it was made from the same things and its files are all there in full."""
    manifest = read_manifest(folder)
    if manifest is None or manifest["fingerprint"] != wanted:
        return None
    return manifest if manifest["files"].items() <= _file_sizes(folder).items() else None


def check_replaceable(folder: Path) -> None:
    """Raises UserError unless the folder is absent, empty, or holds an unchanged prepared dataset and nothing else."""
    if folder.is_file():
        raise UserError(f"{folder} is a file; --out names a folder.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} has other things in it, which will not be overwritten. Choose another --out.")
    written = manifest["files"]  # a table of another size is damaged, and not somebody else's
    changed = {name for name, _ in _file_sizes(folder).items() - written.items()}
    if foreign := sorted(name for name in changed if name not in written or not name.endswith(".arrow")):
        raise UserError(
            f"{folder} holds a prepared dataset, and {', '.join(foreign[:3])}, which was not written with it, and"
            " would go when it is replaced. Move that away, or choose another --out."
        )


@contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` to write into. It is removed at the end, unless `put_in_place` has renamed it."""
    check_replaceable(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            previous = _previous(folder)  # of a run that was killed between the two renames or after them
            if previous.exists() and read_manifest(previous) is None:
                raise UserError(
                    f"{previous} is in the way, and no prepared dataset. Move it away, or choose another --out."
                )
            if previous.exists() and not folder.exists():
                previous.rename(folder)
            shutil.rmtree(previous, ignore_errors=True)
            shutil.rmtree(partial, ignore_errors=True)
            try:
                partial.mkdir()
                yield partial
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder} could not be written: {message_of(error)}") from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """A lock, so that two runs never write to one folder. It is free again after a run was killed."""
    path = folder.with_name(f".{folder.name}.lock")

    def busy(holder: str) -> str:
        return f"{folder} is being written by another run ({holder}). Wait for it, or choose another --out."

    lock = take_lock(path, busy)
    try:
        if not path.exists() or not os.path.samestat(os.fstat(lock), path.stat()):  # another run has just let it go
            raise UserError(busy("one that has just ended"))
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(lock)


def put_in_place(partial: Path, folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Writes the manifest last, then renames twice: a reader sees the old dataset, none, or the whole new one. Returns
    the manifest with the sizes of all files."""
    manifest = {"format": FORMAT, **manifest, "files": _file_sizes(partial)}
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (partial / MANIFEST).write_text(text, encoding="utf-8")
    check_replaceable(folder)
    if folder.exists():
        folder.rename(_previous(folder))
    partial.rename(folder)
    shutil.rmtree(_previous(folder), ignore_errors=True)
    return manifest


def _previous(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.previous")


def check_apart(folder: Path, settings: PrepareSettings) -> None:
    """Raises UserError where `folder` lies in what is read: the next run would read what this one writes."""
    held_out = [named(entry)[1] for entry in (*settings.validation, *settings.test)]
    for entry in (*settings.data, *held_out, *settings.decontaminate):
        read = Path(entry).expanduser()
        if read.resolve() == _kept_rejects(folder):
            raise UserError(f"{entry} is what an earlier run could not keep, and goes with the next. Rename it first.")
        if "**" in entry:
            read = fixed_part(entry)
        if read.is_dir() and folder.is_relative_to(read.resolve()):
            raise UserError(
                f"--out {settings.out} lies in {entry}, all of which is read: the next run would read what this one"
                f" writes. Choose a folder beside it, such as --out {read.resolve().parent / 'prepared'}."
            )


def parts_folder(folder: Path) -> Path:
    """Where datatrove's tasks write. It stays after a failure, so that the next run does only the rest."""
    return folder.with_name(f".{folder.name}.parts")


def _kept_rejects(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.rejects.jsonl")


def keep_rejects(rejects: Rejects, folder: Path) -> Path:
    """Copies the rejects of a run that writes no dataset to a file beside `folder`, and returns its path."""
    kept = _kept_rejects(folder)
    if os.path.lexists(kept) and not _is_rejects(kept):
        kept = kept.with_name(f"{kept.stem}-{os.getpid()}.jsonl")  # the other is somebody else's
    rejects.file.flush()
    shutil.copyfile(rejects.file.name, kept)
    return kept


def remove_kept_rejects(folder: Path) -> None:
    """Removes the file of an earlier run that wrote no dataset."""
    if _is_rejects(kept := _kept_rejects(folder)):
        kept.unlink()


def _is_rejects(path: Path) -> bool:
    """Whether an earlier run wrote this file. A link, or a file of other rows, is left alone."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        first = file.readline()
    try:
        return {"file", "row", "kind", "reason", "raw"} <= json.loads(first).keys()
    except (ValueError, AttributeError):
        return False


@contextmanager
def without_bars() -> Iterator[None]:
    """Turns off the progress bars of `datasets`, which call everything examples, and count what takes no time."""
    bars_were_on = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if bars_were_on:
            datasets.enable_progress_bars()


def _file_sizes(folder: Path) -> dict[str, int]:
    found = (path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    paths = sorted(path for path in found if not CACHE_FILE.fullmatch(path.name))
    sizes = {path.relative_to(folder).as_posix(): path.lstat().st_size for path in paths}
    return {name: size for name, size in sizes.items() if name != MANIFEST}
