"""How every command runs: first its settings, then its work. Each mistake is one message and an exit code.

    run_command("diptych evaluate", parse_it, work, argv)      → the exit code

`parse_it(argv)` and the modules of the settings import nothing heavy; `work(settings)` imports torch when it is
called. So --help, a misspelt option and a path that does not exist are answered at once.

If the reader of a pipe ends (`| head -1`), further output is dropped, and the work goes on.
"""

import io
import logging
import mmap
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from diptych.data_prep.command_line.errors import (
    CONTROLS,
    STORAGE_ERRORS,
    UserError,
    escaped,
    excerpt,
    in_short,
    is_out_of_memory,
    message_line,
    storage_errno,
)

Settings = TypeVar("Settings")

DONE, USER, STORAGE, INTERRUPTED = 0, 2, 4, 130
"""Exit codes; finetune/commands/exit_codes.py has the others."""
SPARE_BYTES = 2**25
_spare: list[mmap.mmap] = []
"""Set aside for a message, until one is made: where there is no more memory, it takes some, too."""
NO_MEMORY = (
    "Use a machine with more, or lower batch_size; in training, raise gradient_accumulation_steps by as much, set"
    " gradient_checkpointing, or pack into shorter rows (prepare's --packed_source_tokens, --packed_target_tokens)."
)


def run_command(
    command: str,
    parse_it: Callable[[Sequence[str]], Settings],
    work: Callable[[Settings], int],
    argv: Sequence[str] | None,
) -> int:
    """The exit code. A mistake that a person can correct is one message that begins with `command`."""
    asks_for_help = {"-h", "--help"} & set(sys.argv[1:] if argv is None else argv)
    guard_streams(is_said=not asks_for_help)
    rank = os.environ.get("RANK", "0")
    sender = command if rank == "0" else f"{command}, rank {rank}"
    _spare[:] = [mmap.mmap(-1, SPARE_BYTES)]
    try:
        settings = parse_it(sys.argv[1:] if argv is None else argv)
        check_places(type(settings), vars(settings))
        code = work(settings)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:  # with a text: how to go on
        print(f"\n{sender}: {message_line(': '.join(['interrupted', *map(str, error.args)]))}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:  # what is none of a user, a file or the machine is raised again
        if (code := exit_code(error)) is None:
            raise
        print(f"{sender}: {message_of(error)}", file=sys.stderr)
        return code


def exit_code(error: BaseException) -> int | None:
    """None for an error of another kind: it is a mistake of Diptych's own."""
    if is_out_of_memory(error):
        return STORAGE
    if isinstance(error, UserError) and error.exit_code != USER:
        return error.exit_code
    if storage_errno(error) is not None:
        return STORAGE
    return USER if isinstance(error, UserError | OSError) else None


def message_of(error: BaseException) -> str:
    """What was wrong, and what to do; for an error of a file or folder, which one."""
    _spare.clear()
    if is_out_of_memory(error):
        return f"out of memory: {in_short(error)} {NO_MEMORY}"
    if isinstance(error, UserError):
        return str(error)
    remedy = STORAGE_ERRORS.get(storage_errno(error), "")
    if isinstance(error, PermissionError):
        remedy = "Get yourself the right to it, or name another place"
    what = str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        places = [str(place) for place in (error.filename, error.filename2) if place is not None]
        what = f"{' -> '.join(places)}: {error.strerror}" if places else error.strerror
    return escaped(f"{what}. {remedy}" if remedy else what)


# Settings that name a place


def check_places(settings_class: type, values: Mapping[str, Any]) -> None:
    """UserError if a setting names a file or folder that is not there. Only its `check` is called, no content is
    read. Also if the working folder is gone."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the folder that this process works in was removed. Change to another one.") from None
    for setting in fields(settings_class):
        check, value = setting.metadata.get("check"), values[setting.name]
        given_as = setting.name if setting.default is setting.default_factory is MISSING else f"--{setting.name}"
        for name in value if isinstance(value, list) else [value]:
            if check is not None and name == "" != setting.default:
                raise UserError(f"{given_as} is empty. Give it a name, or leave it out.")
            if check is not None and name and "\0" in name:
                raise UserError(f"{given_as} {name} has a NUL in it, which no name of a file has.")
            if check is not None and name:
                place = os.path.expanduser(name)
                if place.startswith("~") and not os.path.lexists(place):
                    raise UserError(f"{given_as} {name}: there is no such user. Write ./{name} for a file here.")
                check(place, given_as)
                say_if_pipe(place, given_as)


def say_if_pipe(name: str, given_as: str) -> None:
    """What a named pipe is waited for. (A shell's own, as of `<(…)`, is no file when its link is followed.)"""
    if Path(os.path.realpath(name)).is_fifo():
        print(f"{given_as} {name} is a pipe: waiting for a process that opens its other end.", file=sys.stderr)


def with_wrong_places(error: UserError, settings_class: type, values: Mapping[str, Any]) -> UserError:
    """The error, after what is wrong with a file or folder that a setting names, if there is such a fault."""
    try:
        check_places(settings_class, values)
    except UserError as place:
        return UserError(*place.args, *error.args)
    return error


# What is printed

BREAKS = r"[\n\t]"
BARS = rf"{BREAKS}|\A\r|\A(?:\x1b\[A)+\Z"
"""On stderr, what tqdm draws bars with: each comes in a call of its own, or begins one."""
LONGEST_WARNING = 600
"""Characters of a warning or a log line of a library, which may quote a whole list of a stranger's file."""
COLOURS = r"\x1b\[[\d;]*m"
"""Libraries print these even into files. On stderr they are left out."""


def printable(text: str, kept: str = BREAKS) -> str:
    """Control characters escaped, but those of the pattern `kept`."""
    return re.sub(f"({kept})|{CONTROLS}", lambda found: found[1] or escaped(found[0]), text)


class Printed(io.TextIOWrapper):
    """A stream for a person: whatever we or a library print, no control character of it reaches a terminal.
    Characters that the encoding lacks are escaped, too."""

    kept: str | None = BREAKS
    """None where another program reads: texts stay as they are."""

    def write(self, text: str) -> int:
        plain = re.sub(COLOURS, "", text) if self.kept == BARS else text
        super().write(text if self.kept is None else printable(plain, self.kept))
        return len(text)


class ShortRecord(logging.LogRecord):
    """Of a library: its message as one line, shortened and escaped."""

    def getMessage(self) -> str:
        message = super().getMessage()
        is_ours = self.name.startswith("diptych.")
        return message if is_ours else excerpt(" ".join(message.split()), LONGEST_WARNING)


def _short_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> str:
    return f"{category.__name__}: {excerpt(message, LONGEST_WARNING)}\n"


def guard_streams(is_said: bool = True) -> None:
    """From now on, what this process prints is `printable`, and warnings of libraries are short; and it does not end
    if the reader of its stdout or stderr does: a note says so on stderr. What is closed at the start is /dev/null, so
    that no file of ours takes its place.
    """
    logging.setLogRecordFactory(ShortRecord)
    warnings.formatwarning = _short_warning
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(0, encoding="utf-8")
    for descriptor, name in enumerate(("stdout", "stderr"), start=1):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):
            if stream is not None:
                stream.flush()
            raw = io.BufferedWriter(_Descriptor(descriptor, is_said and name == "stdout"))
            lines = stream is None or stream.line_buffering or stream.write_through
            encoding = stream.encoding if stream else "utf-8"
            stream = Printed(raw, encoding, "backslashreplace", line_buffering=lines)
            setattr(sys, name, stream)
        if isinstance(stream, Printed):
            stream.kept = BARS if name == "stderr" else BREAKS


class _Descriptor(io.FileIO):
    """If it cannot be written to, it points to /dev/null from then on, also for other libraries and processes. That is
    no error if the reader of a pipe has ended."""

    def __init__(self, descriptor: int, is_said: bool):
        super().__init__(descriptor, "w", closefd=False)
        self.is_said = is_said

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if not isinstance(error, BrokenPipeError):
                raise OSError(error.errno, error.strerror, ("", "stdout", "stderr")[self.fileno()]) from None
            if self.is_said:
                print("note: nobody reads what is printed any more; the work goes on.", file=sys.stderr)
            return len(data)
