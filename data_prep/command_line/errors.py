"""The error for mistakes that a person can correct, and what a message is made of.

raise UserError(f"{counted(3, 'row')} have no column 'output'. Did you mean {nearest('output', ['Output'])!r}?")

with library_errors("config.json of t5 cannot be read", "Copy it again."):
    AutoConfig.from_pretrained("t5")      # UserError: config.json of t5 cannot be read: {its message} Copy it again.

Names, texts and errors of libraries come from files of other people. A message shows control characters, line breaks
and marks of the writing direction as Python spells them, so that none of them acts on a terminal:

escaped("a\\nb")          → a, a backslash, n, b
excerpt("a" * 1000, 5)     → aaaaa …
"""

import contextlib
import difflib
import errno
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

CONTROLS = "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
"""Control characters, line breaks, marks that change the writing direction, bytes of file names that are no UTF-8; no
letter of any script, and no emoji."""

LONGEST_SHOWN = 200
LONGEST_LINE, LONGEST_END = 1_600, 400
"""Characters of a text in a message; of a line of a message, and of the end of a line that is too long."""


class UserError(ValueError):
    """A mistake that a person can correct. Its message says what is wrong, what was found, what is allowed, what to
    do. Each argument is a line of it."""

    exit_code = 2
    """What the command exits with; finetune/commands/exit_codes.py has the others."""

    def __init__(self, *lines: object) -> None:
        super().__init__(*map(message_line, lines))

    def __str__(self) -> str:
        return "\n".join(self.args)


def escaped(text: str) -> str:
    return re.sub(CONTROLS, lambda found: found[0].encode("unicode_escape").decode(), text)


def excerpt(text: object, characters: int = LONGEST_SHOWN) -> str:
    """The beginning of a text from outside, escaped; of an error, the words on all its lines."""
    text = " ".join(str(text).split()) if isinstance(text, BaseException) else str(text)
    return escaped(text if len(text) <= characters else text[:characters] + " …")


def message_line(text: object) -> str:
    """Escaped; of a line that is too long, the beginning and the end, which says what to do."""
    text = str(text)
    if len(text) > LONGEST_LINE:
        text = f"{text[: LONGEST_LINE - LONGEST_END]} … {text[-LONGEST_END:]}"
    return escaped(text)


def check_encoding(name: str) -> None:
    """UserError for the name of a file that is not UTF-8: neither YAML nor Arrow, which name it again, can hold it."""
    if re.search("[\ud800-\udfff]", name):
        raise UserError(f"{name} is not UTF-8. Rename the file, or set another locale: LC_ALL=C.UTF-8.")


def counted(number: int, thing: str) -> str:
    """`counted(1, "group")` → "1 group"; 2000 → "2,000 groups"."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most like `name`, without regard to case and outer blanks: "Instrution" → "instruction"."""
    spelled = {candidate.strip().casefold(): candidate for candidate in known}
    matches = difflib.get_close_matches(name.strip().casefold(), spelled, n=1, cutoff=cutoff)
    return spelled[matches[0]] if matches else None


def nearest_file(path: Path) -> Path | None:
    """The one in its folder whose name is most like that of a file that is not there. Endings, and the folder's name,
    are alike anyway, and say nothing."""
    beside = sorted(path.parent.iterdir() if path.parent.is_dir() else (), key=lambda it: it.suffix == path.suffix)
    stems = {it.stem: it for it in beside}
    near = nearest(path.stem, stems, cutoff=0.7)
    return stems[near] if near else None


DISK_FAILS = "This disk, or the connection to it, fails: see the system's log, or name another disk."
STORAGE_ERRORS = {
    errno.ENOSPC: "Make room on this disk, or name another.",
    errno.EDQUOT: "Make room in your quota, or name another disk.",
    errno.EFBIG: "A file may not be as large there: raise `ulimit -f`, or name another disk.",
    errno.EROFS: "This disk can only be read: name another.",
    errno.EXDEV: "The folder lies on two disks: name one that lies on one disk.",
    errno.EIO: DISK_FAILS,
    errno.ESTALE: DISK_FAILS,  # NFS
    errno.ENOTCONN: DISK_FAILS,  # FUSE
}
"""Of the disk, whatever was read or written; and what to do."""
OUT_OF_MEMORY = (
    *("DefaultCPUAllocator", "bad_alloc", "Out of memory", "can't start new thread"),
    *("Cannot allocate memory", "failed to map segment"),  # as the C library says it for a file and for a library
)


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
        is_of_machine = is_out_of_memory(error) or storage_errno(error) is not None
        if is_of_machine or not (isinstance(error, Exception) or is_panic):
            raise
        raise UserError(f"{said}{where()}: {in_short(error)} {remedy}") from error


def storage_errno(error: BaseException | None) -> int | None:
    """The key of STORAGE_ERRORS, if the disk is at fault, or is the cause of the error. Libraries in Rust give the
    number in words only."""
    if error is None:
        return None
    in_words = re.search(r"\(os error (\d+)\)", str(error))
    number = int(in_words[1]) if in_words else getattr(error, "errno", None)
    return number if number in STORAGE_ERRORS else storage_errno(error.__cause__)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Also if that is only the cause of the error. torch raises OutOfMemoryError on a GPU, and a plain RuntimeError on
    a CPU. What a UserError says may be a user's own words, so only its cause counts."""
    if error is None:
        return False
    is_named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    is_in_words = not isinstance(error, UserError) and any(words in str(error) for words in OUT_OF_MEMORY)
    return is_named or is_in_words or is_out_of_memory(error.__cause__)


def in_short(error: BaseException, limit: int = 300) -> str:
    """The first line of a message, with the second where it ends with a colon, and with the type where it is one word,
    as that of a KeyError."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    text = excerpt(text if " " in text else f"{type(error).__name__} {text}".strip(), limit)
    return text if text[-1] in ".!?…" else f"{text}."
