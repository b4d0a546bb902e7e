"""Locks and files in a user's folder: a command replaces or removes only what it wrote itself.

lock = take_lock(folder / ".lock", lambda holder: f"{folder} is in use by {holder}.")
check_overwrite(Path("report.json"), is_report, "a report of `diptych evaluate`", "--out")
"""

import errno
import fcntl
import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path

from diptych.data_prep.command_line.errors import UserError


def take_lock(path: Path, busy: Callable[[str], str]) -> int:
    """Lock a file for this process, whose id is written into it. Returns the descriptor; closing it unlocks the file.

    UserError with `busy(holder)` if another process has the lock; and if the file is a link or is not a lock.
    """
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        holder = os.pread(lock, 200, 0).decode("utf-8", "replace")
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ESPIPE, errno.ENXIO):
            raise
        raise UserError(f"{path} is a link, or no file, and a lock is due there. Take it away.") from None
    if holder and not re.match(r"process \d+ ", holder):
        os.close(lock)
        raise UserError(f"{path} is no lock, and would be overwritten. Move it away, or choose another folder.")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(busy(holder.strip() or "one that has just begun")) from None
    os.ftruncate(lock, 0)
    since = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode(), 0)
    return lock


def new_folder(name: str) -> Path:
    """The folder that --out names, made if it is not there. UserError if it has something in it."""
    folder = Path(name).expanduser()
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise UserError(f"{name} has something in it, which will not be overwritten. Choose another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_overwrite(path: Path, is_own: Callable[[bytes], bool], what: str, given_as: str = "--out") -> None:
    """UserError if `path` is a file whose content is not what this command writes. A pipe or device is written to."""
    if path.is_dir():
        raise UserError(f"{given_as} {path} is a folder, and a file is due. Name a file in it.")
    if path.is_file() and not is_own(path.read_bytes()):
        raise UserError(f"{path} is there already, and is not {what}: it is not overwritten. Name another {given_as}.")
