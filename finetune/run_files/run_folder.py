"""The folder of a run: a lock against a second process, and status.json, which says how the run ended.

    with claimed(Path("runs/a"), resumes=False) as status:
        …                                   a second run in the same folder is refused, naming process and host
        status.begin()                      from here on, status.json is written
        status.update(step=200)
        status.end(0)

    runs/a/.lock         locked by the process that trains; the lock of a killed process is free
    runs/a/status.json   {"state": "running", "exit_code": null, "step": 200, …}; exit codes are those of exit_codes.py

torch is not imported here, so that a folder in use is refused at once.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diptych.data_prep.command_line.bounded_yaml import read_yaml, text_of
from diptych.data_prep.command_line.errors import UserError, library_errors
from diptych.data_prep.command_line.overwrite_checks import take_lock
from diptych.finetune.commands.exit_codes import BUG, DONE, RANKS, STOPPED, exit_code_of, is_main_rank, message_of
from diptych.finetune.run_files.atomic_folders import read_json

LOCK, STATUS, CONFIG = ".lock", "status.json", "config.yaml"
STAGES = "stages"
"""Subfolder with one folder for each training of a staged run (staged_run.py)."""


def last_training(run: Path) -> Path:
    """The folder with the figures of a run's final model: the run's own, or that of its last stage."""
    stages = sorted((run / STAGES).glob("*-*"), key=lambda folder: int(folder.name.split("-")[0]))
    return stages[-1] if stages else run


class Status:
    """The content of status.json. The main rank writes it; any rank may write how it failed."""

    def __init__(self, folder: Path, has_begun: bool):
        self.folder, self.has_begun = folder, has_begun
        self.facts: dict[str, Any] = {
            "state": "running",
            "exit_code": None,
            "message": "",
            "step": None,
            "total_steps": None,
            "process": os.getpid(),
            "host": socket.gethostname(),
            "began": _now(),
            "ended": None,
        }

    def begin(self) -> None:
        self.has_begun = True
        self.update()

    def update(self, **facts: Any) -> None:
        self.facts |= facts
        if is_main_rank():
            self._write()

    def end(self, code: int, message: str = "") -> None:
        """A rank that lost another one writes only where that other one has not written why."""
        state = {DONE: "done", STOPPED: "stopped"}.get(code, "failed")
        self.facts |= {"state": state, "exit_code": code, "message": message, "ended": _now()}
        try:
            if is_main_rank() and code != RANKS or self._nobody_said_more():
                self._write()
        except OSError as error:  # why the run ended is not to be hidden by this
            print(f"{self.folder / STATUS} does not say how the run ended: {message_of(error)}", file=sys.stderr)

    def _nobody_said_more(self) -> bool:
        said = read_status(self.folder)
        return said is None or said.get("exit_code") in (None, RANKS)

    def _write(self) -> None:
        if not self.has_begun:
            return
        file = self.folder / STATUS
        beside = file.with_name(f"{STATUS}.{os.environ.get('RANK', '0')}.partial")
        beside.write_text(json.dumps(self.facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(beside, file)


def read_status(folder: Path) -> dict[str, Any] | None:
    """None if there is none, or if it is damaged."""
    try:
        found = read_json(folder / STATUS)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def settings_of(folder: Path) -> dict[str, Any]:
    """The recipe in config.yaml of a run's folder, with nothing left at auto. UserError if it is no recipe."""
    config = folder / CONFIG
    with library_errors(f"{config} is not the recipe of a run", "Give the folder of a run, or a new one."):
        found = read_yaml(text_of(config))
        if not isinstance(found, dict) or not {"model", "data", "seed"} <= found.keys():
            raise ValueError("it lacks model, data or seed")
    return found


def holds_nothing(folder: Path) -> bool:
    """Nothing but a lock, and partial files of a killed run."""
    return not folder.exists() or all(path.name == LOCK or path.suffix == ".partial" for path in folder.iterdir())


def check_new(folder: Path, resumes: bool) -> None:
    """UserError for a folder that holds something, unless the run in it is to go on."""
    if not resumes and not holds_nothing(folder):
        raise UserError(f"{folder} is not empty. Give `out` a new folder, or go on with the run in it: --resume true")


@contextmanager
def claimed(folder: Path, resumes: bool) -> Iterator[Status]:
    """Locks the folder, and writes into status.json how the block ended (for a finished run, only after it has begun
    again). UserError where another process has the lock."""
    is_done = (read_status(folder) or {}).get("state") == "done"
    status = Status(folder, has_begun=resumes and not is_done and (folder / CONFIG).is_file())
    lock = _lock(folder) if is_main_rank() else None
    try:
        yield status
    except BaseException as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(folder)  # a write or a close does not say which file it was
        code = exit_code_of(error)
        status.end(code, repr(error) if code == BUG else message_of(error) or type(error).__name__)
        raise
    finally:
        if lock is not None:
            _unlock(lock, folder)


def _lock(folder: Path) -> int:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"`out` is {folder}, which is a file. Give a folder that is not there yet.")
    folder.mkdir(parents=True, exist_ok=True)
    lock = take_lock(
        folder / LOCK,
        lambda holder: (
            f"{folder} is in use by another run ({holder}). Wait for it, stop it, or give `out` another folder."
        ),
    )
    for leftover in folder.glob(f"{STATUS}.*.partial"):  # of a run that was killed
        leftover.unlink()
    return lock


def _unlock(lock: int, folder: Path) -> None:
    """Removes the folder, too, if it holds nothing else: of a run that was refused."""
    if [path.name for path in folder.iterdir()] == [LOCK]:
        (folder / LOCK).unlink()
        folder.rmdir()
    os.close(lock)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
