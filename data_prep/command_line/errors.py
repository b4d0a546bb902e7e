"""The error for mistakes that a person can correct, and two helpers for its message.

raise UserError(f"{counted(3, 'row')} have no column 'output'. Did you mean {nearest('output', ['Output'])!r}?")
"""

import difflib
from collections.abc import Iterable


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
