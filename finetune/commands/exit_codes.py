"""The exit codes of commands, and the errors that stand for them.

    0    done                                       6    a rank was lost, or did not answer in time
    2    a user's error                             7    the Hub or the network
    3    a checkpoint that cannot be used           75   stopped by a signal, saved: run it again to go on
    4    storage or memory                          130  a second Ctrl-C
    5    a loss or gradient that is no number       1    an error of Diptych's own

torchrun and `accelerate launch` exit with 1 for all of them, so a run also writes its own into status.json.
"""

import os

from diptych.data_prep.command_line.errors import UserError, message_line
from diptych.data_prep.command_line.run_command import DONE, INTERRUPTED, STORAGE, USER, exit_code, message_of

__all__ = ["DONE", "INTERRUPTED", "STORAGE", "USER", "message_of"]  # those that data preparation has, too
BUG, CHECKPOINT, NOT_FINITE, RANKS, HUB, STOPPED = 1, 3, 5, 6, 7, 75


def is_main_rank() -> bool:
    """Known from the environment, before the ranks have connected."""
    return os.environ.get("RANK", "0") == "0"


def say_once(line: str) -> None:
    """Prints a line, from the main rank alone."""
    if is_main_rank():
        print(message_line(line), flush=True)


class CheckpointError(UserError):
    """A checkpoint is damaged, incomplete, or another one than it should be."""

    exit_code = CHECKPOINT


class StorageError(UserError):
    """A disk is full or not writable, or memory is used up."""

    exit_code = STORAGE


class NotFiniteError(UserError):
    """A loss or a gradient is infinite or no number."""

    exit_code = NOT_FINITE


class RankError(UserError):
    """Another rank of the run has gone, or does not answer."""

    exit_code = RANKS


class HubError(UserError):
    """The Hub refused, or could not be reached."""

    exit_code = HUB


class Stopped(BaseException):
    """A signal came before there was anything to save. Not an Exception, because a signal may come anywhere, also
    where exceptions of a loader are taken for a broken file."""


def is_of_another_rank(error: BaseException) -> bool:
    """torch's DistError; and gloo's errors, plain RuntimeErrors that name its source files."""
    words = ("gloo", "Connection closed by peer", "NCCL", "Timed out")
    is_its_own = type(error).__name__.startswith("Dist") or any(word in str(error) for word in words)
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and isinstance(error, RuntimeError) and is_its_own


def lost_rank(error: BaseException) -> str:
    """One line, without gloo's advice for its developers."""
    return str(error).splitlines()[0].split(" This is typically")[0][-300:]


def exit_code_of(error: BaseException) -> int:
    """1 for an unexpected error, whose traceback should be shown."""
    if is_of_another_rank(error):
        return RANKS
    if isinstance(error, Stopped):
        return STOPPED
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return exit_code(error) or BUG
