"""What a value must be to count as a text: a string, of characters that can be encoded, with something in it.

text("2", "output")                → "2", the very string: values are never changed
text(2, "output")                  → Fault "'output' is a number (2), not a string: put it in quotes."
text("  \\u200b", "output")         → Fault "'output' is empty: a row needs one to be learned from."
text("a\\ufdd0", "output")          → Fault "'output' holds a noncharacter, U+FDD0 at character 2: …"

An ASCII text costs 0.1 µs, a Korean sentence of 160 characters 2 µs.
"""

from __future__ import annotations

import functools
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diptych.data_prep.records import broken_character, character_at, nearest

JSON_TYPE_NAMES = {
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    tuple: "a list",
    dict: "an object",
    type(None): "null",
}

NONCHARACTERS = "\ufdd0-\ufdef" + "".join(chr(plane * 0x10000 + 0xFFFE + n) for plane in range(17) for n in (0, 1))
"""The 66 code points that Unicode keeps for a program's own use; data_prep marks places in its texts with some."""

UNFIT = re.compile(f"[\0\ud800-\udfff{NONCHARACTERS}]")

NO_UNFIT_BYTES = (b"\0", b"\xef\xb7", b"\xbf\xbe", b"\xbf\xbf")
"""UTF-8 with none of these holds no NUL and no noncharacter. Four searches for bytes are 4 times faster than UNFIT."""

BLANK = re.compile(
    "[\\s\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]*"
)
"""White space and what is drawn as nothing (Unicode's Default_Ignorable_Code_Point)."""

INDEX = re.compile(r"\[\d+\]")

NAMES_SHOWN = 12


class Fault(ValueError):
    """What is wrong with a row. `of_shape` if the row is built otherwise than its file, rather than its text wrong."""

    def __init__(self, field: str, kind: str, reason: str, of_shape: bool = False) -> None:
        super().__init__(reason)
        self.field, self.kind, self.reason, self.of_shape = field, kind, reason, of_shape


def text(value: Any, name: str, may_be_empty: bool = False, what: str | None = None) -> str:
    """The value itself, if it is a sound text. `what` is its name in the kind of the fault, when it is empty."""
    if type(value) is str and value.isascii() and "\0" not in value:
        if may_be_empty or (value and not value.isspace()):
            return value
    elif not isinstance(value, str):
        raise not_a_string(value, name)
    else:
        _check_characters(value, name)
        if may_be_empty or not BLANK.fullmatch(value):
            return value
    reason = f"'{name}' is empty: a row needs one to be learned from."
    raise Fault(name, f"empty {what or without_index(name)}", reason)


def not_a_string(value: Any, name: str) -> Fault:
    if value is None:
        return Fault(name, f"'{without_index(name)}' is null", f"'{name}' is null; a string is due.", of_shape=True)
    reason = f"'{name}' is {described(value)}, not a string: put it in quotes."
    return Fault(name, f"'{without_index(name)}' is not a string", reason, of_shape=True)


def _check_characters(value: str, name: str) -> None:
    if broken := broken_character(value):
        raise Fault(name, "broken Unicode", f"'{name}' holds {broken}")
    encoded = value.encode("utf-8")
    if not any(part in encoded for part in NO_UNFIT_BYTES) or not (found := UNFIT.search(value)):
        return
    place = character_at(value, found.start())
    if found.group() == "\0":
        reason = f"'{name}' holds a NUL, {place}: no text has one. The file may be binary, or UTF-16."
        raise Fault(name, "NUL in the text", reason)
    reason = f"'{name}' holds a noncharacter, {place}: Unicode keeps it for a program's own use. Take it out."
    raise Fault(name, "noncharacter in the text", reason)


def missing(column: str, fields: Mapping[str, Any], known: Iterable[str]) -> Fault:
    """`known` are the columns that mean something already, and so are not `column` misspelt."""
    near = misspelt(column, fields, known)
    if near is not None:
        return _misspelt_fault(column, near)
    reason = f"'{column}' is missing; the row has {listed(fields) or 'no fields'}."
    return Fault(column, f"missing field '{column}'", reason, of_shape=True)


def check_not_misspelt(column: str, fields: Mapping[str, Any], known: Iterable[str]) -> None:
    """A field may be absent, but not misspelt: a row with 'inptu' would otherwise lose its input without a word."""
    near = misspelt(column, fields, known, cutoff=0.75)
    if near is not None:
        raise _misspelt_fault(column, near)


def _misspelt_fault(column: str, near: str) -> Fault:
    near = shown_name(near)
    reason = f"'{column}' is missing; is '{near}' meant? Rename it to '{column}'."
    return Fault(column, f"misspelt field '{near}'", reason)


def misspelt(column: str, fields: Mapping[str, Any], known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The column of a row that is most like `column`. Rows of a file have the same few sets of names."""
    if len(fields) <= 32:
        return _misspelt(column, tuple(fields), tuple(known), cutoff)
    return _misspelt.__wrapped__(column, tuple(fields), tuple(known), cutoff)


@functools.lru_cache(maxsize=16)
def _misspelt(column: str, names: tuple[str, ...], known: tuple[str, ...], cutoff: float) -> str | None:
    return nearest(column, [name for name in names if name not in known], cutoff=cutoff)


def filled_list(value: Any, name: str, kind: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        reason = f"'{name}' is {described(value)}, and a list is due."
        raise Fault(name, f"'{without_index(name)}' is not a list", reason, of_shape=True)
    if not value:
        raise Fault(name, kind, f"'{name}' is empty: there is nothing in it to learn from.")
    return value


def inner(value: Any, key: str, where: str) -> Any:
    if not isinstance(value, Mapping):
        reason = f"'{where}' is {described(value)}, and an object {{…}} is due."
        raise Fault(where, f"'{without_index(where)}' is not an object", reason)
    if key not in value:
        raise missing_inside(key, value, where, ("input", "output"))
    return value[key]


def input_of(value: Any, where: str) -> str:
    """`input`, which may be absent or null, but not misspelt."""
    if isinstance(value, Mapping) and "input" not in value:
        _check_not_misspelt_inside("input", value, where)
        return ""
    input = inner(value, "input", where)
    return "" if input is None else text(input, f"{where}.input", may_be_empty=True)


def _check_not_misspelt_inside(key: str, value: Mapping[str, Any], where: str) -> None:
    try:
        check_not_misspelt(key, value, ("input", "output"))
    except Fault as fault:
        raise Fault(f"{where}.{key}", fault.kind, f"in '{where}', {fault.reason}") from None


def missing_inside(key: str, value: Mapping[str, Any], where: str, known: Iterable[str]) -> Fault:
    fault = missing(key, value, known)
    return Fault(f"{where}.{key}", fault.kind, f"in '{where}', {fault.reason}")


def joined(value: Any, name: str, between: str, may_be_empty: bool = False) -> str:
    """A text, or a list of texts as one."""
    if not isinstance(value, list | tuple):
        return text(value, name, may_be_empty)
    parts = [text(part, f"{name}[{number}]", may_be_empty=True) for number, part in enumerate(value)]
    return text(between.join(parts), name, may_be_empty)


def described(value: Any) -> str:
    """`a number (2)`, `a list (['a'])`: what a value is, and its beginning."""
    name = JSON_TYPE_NAMES.get(type(value), f"a {type(value).__name__}")
    if value is None:
        return name
    try:
        shown = SHORT.repr(value)
    except ValueError:  # a number of more digits than Python writes
        return f"{name} (of very many digits)"
    return f"{name} ({shown if len(shown) <= 60 else shown[:60] + ' …'})"


def listed(names: Iterable[str]) -> str:
    """`'a', 'b'`, shortened where a row has very many."""
    names = list(names)
    more = f" and {len(names) - NAMES_SHOWN:,} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(f"'{shown_name(name)}'" for name in names[:NAMES_SHOWN]) + more


def shown_name(name: str) -> str:
    """A name from the data, such that a message with it can be written to a file."""
    name = name if len(name) <= 60 else name[:60] + " …"
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def without_index(name: str) -> str:
    """`messages[2].content` → `messages.content`: the same for all rows."""
    return INDEX.sub("", name)


SHORT = reprlib.Repr()
