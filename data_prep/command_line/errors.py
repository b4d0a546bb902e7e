"""The error for mistakes that a person can correct, and helpers for its message.

raise UserError(f"{counted(3, 'row')} have no column 'output'. Did you mean {nearest('output', ['Output'])!r}?")

with library_errors("config.json of t5 cannot be read", "Copy it again."):
    AutoConfig.from_pretrained("t5")      # UserError: config.json of t5 cannot be read: {its message} Copy it again.
"""

import contextlib
import difflib
import errno
from collections.abc import Callable, Iterable, Iterator


class UserError(ValueError):
    """A mistake that a person can correct. Its message says what is wrong, what was found, what is allowed, what to
    do."""

    exit_code = 2
    """What the command exits with; finetune/commands/exit_codes.py has the others."""


def counted(number: int, thing: str) -> str:
    """`counted(1, "group")` → "1 group"; 2000 → "2,000 groups"."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most like `name`, without regard to case and outer blanks: "Instrution" → "instruction"."""
    spelled = {candidate.strip().casefold(): candidate for candidate in known}
    matches = difflib.get_close_matches(name.strip().casefold(), spelled, n=1, cutoff=cutoff)
    return spelled[matches[0]] if matches else None


STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
"""Of the disk, whatever was read or written."""


@contextlib.contextmanager
def library_errors(said: str, remedy: str, where: Callable[[], str] = str) -> Iterator[None]:
    """For calls of libraries with what a stranger's file says: whatever they raise becomes a UserError,
    "{said}{where()}: {its message} {remedy}". They raise errors of any type for values that they did not expect.

    A UserError, lack of memory, a full disk and what ends a process pass. Only such calls belong inside: a mistake of
    our own would be taken for one of the file.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"  # of Rust, which is no Exception
        is_of_machine = is_out_of_memory(error) or getattr(error, "errno", None) in STORAGE_ERRORS
        if is_of_machine or not (isinstance(error, Exception) or is_panic):
            raise
        raise UserError(f"{said}{where()}: {in_short(error)} {remedy}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """torch raises OutOfMemoryError on a GPU, and a plain RuntimeError on a CPU."""
    is_of_torch = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    return isinstance(error, MemoryError) or is_of_torch


def in_short(error: BaseException, limit: int = 300) -> str:
    """The first line of a message, with the second where it ends with a colon, and with the type where it is one word,
    as that of a KeyError. Characters that no terminal prints become spaces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    text = text if " " in text else f"{type(error).__name__} {text}".strip()
    text = text if len(text) <= limit else f"{text[:limit]} …"
    return text if text[-1] in ".!?…" else f"{text}."
