"""The exit codes of commands, and the errors that stand for them.

    0    done                                       6    a rank was lost, or did not answer in time
    2    a user's error                             7    the Hub or the network
    3    a checkpoint that cannot be used           75   stopped by a signal, saved: run it again to go on
    4    storage or memory                          130  a second Ctrl-C
    5    a loss or gradient that is no number       1    an error of Diptych's own

torchrun and `accelerate launch` exit with 1 for all of them, so a run also writes its own into status.json.
"""

import os

from diptych.data_prep.command_line.errors import UserError, is_out_of_memory, message_line
from diptych.data_prep.command_line.run_command import DONE, INTERRUPTED, STORAGE, USER, exit_code, message_of_file

__all__ = ["DONE", "INTERRUPTED", "STORAGE", "USER"]  # those that data preparation has, too
BUG, CHECKPOINT, NOT_FINITE, RANKS, HUB, STOPPED = 1, 3, 5, 6, 7, 75

NO_MEMORY = (
    "Lower batch_size and raise gradient_accumulation_steps by as much, set gradient_checkpointing, or pack into"
    " shorter rows (prepare's --packed_source_tokens, --packed_target_tokens)."
)


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


def exit_code_of(error: BaseException) -> int:
    """1 for an unexpected error, whose traceback should be shown."""
    if isinstance(error, UserError | OSError) and not is_out_of_memory(error):
        return exit_code(error)
    if isinstance(error, Stopped):
        return STOPPED
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if is_out_of_memory(error):
        return STORAGE
    return BUG


def message_of(error: BaseException) -> str:
    """What a person is told of an error that has one of the codes above."""
    if is_out_of_memory(error):
        return f"out of memory: {(str(error).splitlines() or [''])[0]} {NO_MEMORY}"
    if isinstance(error, OSError) and exit_code_of(error) == STORAGE:
        room = "Make room on this disk, then go on from what was committed: --resume true."
        return f"{message_of_file(error)}. {room}"
    return message_of_file(error)
