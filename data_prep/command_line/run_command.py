"""How every command runs: first its settings, then its work. Each mistake is one message and an exit code.

    run_command("diptych evaluate", parse_it, work, argv)      → the exit code

`parse_it(argv)` and the modules of the settings import nothing heavy; `work(settings)` imports torch when it is
called. So --help, a misspelt option and a path that does not exist are answered at once.

If the reader of a pipe ends (`| head -1`), further output is dropped, and the work goes on.
"""

import io
import os
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from diptych.data_prep.command_line.errors import STORAGE_ERRORS, UserError

Settings = TypeVar("Settings")

DONE, USER, STORAGE, INTERRUPTED = 0, 2, 4, 130
"""Exit codes; finetune/commands/exit_codes.py has the others."""


def run_command(
    command: str,
    parse_it: Callable[[Sequence[str]], Settings],
    work: Callable[[Settings], int],
    argv: Sequence[str] | None,
) -> int:
    """The exit code. A mistake that a person can correct is one message that begins with `command`."""
    asks_for_help = {"-h", "--help"} & set(sys.argv[1:] if argv is None else argv)
    survive_closed_pipes(is_said=not asks_for_help)
    rank = os.environ.get("RANK", "0")
    sender = command if rank == "0" else f"{command}, rank {rank}"
    try:
        settings = parse_it(sys.argv[1:] if argv is None else argv)
        check_places(type(settings), vars(settings))
        return work(settings)
    except (UserError, OSError) as error:
        print(f"{sender}: {message_of_file(error)}", file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:
        print(f"\n{sender}: interrupted", file=sys.stderr)
        return INTERRUPTED


def exit_code(error: UserError | OSError) -> int:
    if isinstance(error, UserError):
        return error.exit_code
    return STORAGE if error.errno in STORAGE_ERRORS else USER


def message_of_file(error: UserError | OSError) -> str:
    """For an error of a file or folder: the path, what is wrong and, if a right is missing, what to do."""
    if not isinstance(error, OSError) or error.filename is None:
        return str(error)
    remedy = ". Get yourself the right to it, or name another place" if isinstance(error, PermissionError) else ""
    return f"{error.filename}: {error.strerror}{remedy}"


# Settings that name a place


def check_places(settings_class: type, values: Mapping[str, Any]) -> None:
    """UserError if a setting names a file or folder that is not there. Only its `check` is called, no content is
    read."""
    for setting in fields(settings_class):
        check, value = setting.metadata.get("check"), values[setting.name]
        given_as = setting.name if setting.default is setting.default_factory is MISSING else f"--{setting.name}"
        for name in value if isinstance(value, list) else [value]:
            if check is not None and name:
                check(os.path.expanduser(name), given_as)


def with_wrong_places(error: UserError, settings_class: type, values: Mapping[str, Any]) -> UserError:
    """The error, after what is wrong with a file or folder that a setting names, if there is such a fault."""
    try:
        check_places(settings_class, values)
    except UserError as place:
        return UserError(f"{place}\n{error}")
    return error


# Pipes


def survive_closed_pipes(is_said: bool = True) -> None:
    """From now on, this process does not end if the reader of its stdout or stderr does; a note says so on stderr."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__") or not _is_pipe(stream.fileno()):
            continue
        stream.flush()
        pipe = io.BufferedWriter(_Pipe(stream.fileno(), is_said and name == "stdout"))
        lines = stream.line_buffering or stream.write_through
        setattr(sys, name, io.TextIOWrapper(pipe, stream.encoding, stream.errors, line_buffering=lines))


def _is_pipe(descriptor: int) -> bool:
    mode = os.fstat(descriptor).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


class _Pipe(io.FileIO):
    """Once its reader has ended, the descriptor points to /dev/null, also for other libraries and processes."""

    def __init__(self, descriptor: int, is_said: bool):
        super().__init__(descriptor, "w", closefd=False)
        self.is_said = is_said

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if self.is_said:
                print("note: nobody reads what is printed any more; the work goes on.", file=sys.stderr)
            return len(data)
