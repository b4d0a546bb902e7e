"""One run, one folder: who works in it, and how it ended.

    with claimed(Path("runs/a"), resumes=False) as status:
        …                                   a second run in the same folder is refused, naming process and host
        status.begin()                      from here on, the folder is this run's
        status.update(step=200)
        status.end(0)

    runs/a/.lock         locked by the process that trains; a lock that a killed one left is free
    runs/a/status.json   {"state": "running", "exit_code": null, "step": 200, …}; exit codes are those of exits.py

No torch here: a folder that is taken is refused before the seconds that importing it takes.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.command_line.own_files import take_lock
from diptych.finetune.commands.exits import BUG, DONE, RANKS, STOPPED, exit_code_of, is_main_rank, message_of

LOCK, STATUS, CONFIG = ".lock", "status.json", "config.yaml"
STAGES = "stages"
"""The folder of a run of several trainings in which each has its own (stages.py)."""


def last_training(run: Path) -> Path:
    """Where the figures of a run's final model are: in the run's own folder, or in its last stage's."""
    stages = sorted((run / STAGES).glob("*-*"), key=lambda folder: int(folder.name.split("-")[0]))
    return stages[-1] if stages else run


class Status:
    """What status.json says. Every rank may write how it failed; all else the main one writes."""

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
        """A rank that only lost another one leaves the word to that other one."""
        state = {DONE: "done", STOPPED: "stopped"}.get(code, "failed")
        self.facts |= {"state": state, "exit_code": code, "message": message, "ended": _now()}
        if is_main_rank() and code != RANKS or self._nobody_said_more():
            self._write()

    def _nobody_said_more(self) -> bool:
        said = read_status(self.folder)
        return said is None or said["exit_code"] in (None, RANKS)

    def _write(self) -> None:
        if not self.has_begun:
            return
        file = self.folder / STATUS
        beside = file.with_name(f"{STATUS}.{os.environ.get('RANK', '0')}.partial")
        beside.write_text(json.dumps(self.facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(beside, file)


def read_status(folder: Path) -> dict[str, Any] | None:
    file = folder / STATUS
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def holds_nothing(folder: Path) -> bool:
    """Beside a lock, and what a killed run had half written before its first file."""
    return not folder.exists() or all(path.name == LOCK or path.suffix == ".partial" for path in folder.iterdir())


@contextmanager
def claimed(folder: Path, resumes: bool) -> Iterator[Status]:
    """Alone in the folder until the end, which status.json tells, whatever it is: of a finished run, only once it goes
    on. UserError where another run is."""
    is_done = (read_status(folder) or {}).get("state") == "done"
    status = Status(folder, has_begun=resumes and not is_done and (folder / CONFIG).is_file())
    lock = _lock(folder) if is_main_rank() else None
    try:
        yield status
    except BaseException as error:
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
    """A run that was refused leaves no folder behind."""
    if [path.name for path in folder.iterdir()] == [LOCK]:
        (folder / LOCK).unlink()
        folder.rmdir()
    os.close(lock)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
