"""When a value is a valid text: a string, of characters that can be encoded, that is not blank.

text("2", "output")                → "2", the very string: values are never changed
text(2, "output")                  → Fault "'output' is a number (2), not a string. Write it as one: …"
text("  \\u200b", "output")         → Fault "'output' is empty: a row needs one to be learned from."
text("a\\ufdd0", "output")          → Fault "'output' holds a noncharacter, U+FDD0 at character 2: …"

An ASCII text costs 0.1 µs, a Korean sentence of 160 characters 2 µs.
"""

import functools
import json
import math
import re
import reprlib
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from diptych.data_prep.command_line.errors import excerpt, message_line, nearest
from diptych.data_prep.rows.records import broken_character, character_at

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
"""The 66 code points that Unicode reserves for a program's own use; data_prep marks places in its texts with some."""

UNFIT = re.compile(f"[\0\ud800-\udfff{NONCHARACTERS}]")

NO_UNFIT_BYTES = (b"\0", b"\xef\xb7", b"\xbf\xbe", b"\xbf\xbf")
"""UTF-8 with none of these holds no NUL and no noncharacter. Four searches for bytes are 4 times faster than UNFIT."""

BLANK = re.compile(
    "[\\s\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]*"
)
"""White space and invisible characters (Unicode's Default_Ignorable_Code_Point)."""

INDEX = re.compile(r"\[\d+\]")

NAMES_SHOWN = 12


class Fault(ValueError):
    """What is wrong with a row. `of_shape` means that its structure is wrong, and not a text in it."""

    def __init__(self, field: str, kind: str, reason: str, of_shape: bool = False) -> None:
        reason = message_line(reason)
        super().__init__(reason)
        self.field, self.kind, self.reason, self.of_shape = field, excerpt(kind), reason, of_shape


def text(value: Any, name: str, may_be_empty: bool = False, what: str | None = None) -> str:
    """The value itself, if it is a valid text. `what` is its name in the kind of the fault if it is empty."""
    if type(value) is str and value.isascii() and "\0" not in value:
        if may_be_empty or (value and not value.isspace()):
            return value
    elif not isinstance(value, str):
        raise not_a_string(value, name)
    else:
        if broken := broken_character(value):
            raise Fault(name, "broken Unicode", f"'{name}' holds {broken}")
        encoded = value.encode("utf-8")
        if any(part in encoded for part in NO_UNFIT_BYTES) and (found := UNFIT.search(value)):
            place = character_at(value, found.start())
            if found.group() == "\0":
                reason = f"'{name}' holds a NUL, {place}: no text has one. The file may be binary, or UTF-16."
                raise Fault(name, "NUL in the text", reason)
            reason = f"'{name}' holds a noncharacter, {place}: Unicode keeps it for a program's own use. Take it out."
            raise Fault(name, "noncharacter in the text", reason)
        if may_be_empty or not BLANK.fullmatch(value):
            return value
    reason = f"'{name}' is empty: a row needs one to be learned from."
    raise Fault(name, f"empty {what or without_index(name)}", reason)


def not_a_string(value: Any, name: str, known: str | None = None) -> Fault:
    """`known` is the name of the column for `--map`, if the value is that of a whole column."""
    if value is None:
        return Fault(name, f"'{without_index(name)}' is null", f"'{name}' is null; a string is due.", of_shape=True)
    if is_missing(value):
        reason = f"'{name}' is NaN, a missing value. Drop such rows, or fill them in (in pandas: dropna or fillna)."
        return Fault(name, f"'{without_index(name)}' is NaN", reason, of_shape=True)
    several = ", or write a row for each" if isinstance(value, list | tuple) and len(value) > 1 else ""
    if isinstance(value, bytes):
        how = f"Decode it (in pandas: df[{name!r}] = df[{name!r}].str.decode('utf-8'))."
    elif not isinstance(value, list | tuple | Mapping):
        how = "Write it as one: in quotes in JSON, as a column of strings in a table (in pandas: .astype(str))."
    elif not (path := path_to_text(value)):
        how = "Write a string, or leave the row out."
    elif known is None:
        how = f"Write the string that is inside of it, at {excerpt('.'.join(path))}{several}."
    else:
        how = f"--map {mapped(known, '.'.join([name, *path]))} takes the string in it{several}."
    whole = " To learn all of it, write it as JSON in a string." if isinstance(value, Mapping) else ""
    reason = f"'{name}' is {described(value)}, not a string. {how}{whole}"
    return Fault(name, f"'{without_index(name)}' is not a string", reason, of_shape=True)


def path_to_text(value: Any, most_steps: int = 4) -> list[str]:
    """Steps to the first string inside of a value: `{"text": ["a"]}` → ["text", "0"]; [] if there is none."""
    if not most_steps:
        return []
    inside = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    )
    for name, inner in inside:
        if isinstance(inner, str):
            return [str(name)]
        if deeper := path_to_text(inner, most_steps - 1):
            return [str(name), *deeper]
    return []


def is_missing(value: Any) -> bool:
    """Null, or NaN, which is a missing value in tables."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def has_value(value: Any) -> bool:
    return not is_missing(value) and value not in ("", [], {}, ())


def missing(
    column: str,
    fields: Mapping[str, Any],
    known: Iterable[str],
    field: str | None = None,
    where: str = "",
    is_optional: bool = False,
) -> Fault | None:
    """`known` are the columns that mean something already, and so are not `column` misspelt; `field` is what `--map`
    calls the column, if it is one; `where` is the object that it belongs to, if that is not the row.

    None for a field that `is_optional` and not misspelt: a row with 'inptu' would otherwise lose its input without a
    word."""
    near = _nearest_unknown(column, tuple(fields), tuple(known), 0.75 if is_optional else 0.6)
    place, inside = (f"{where}.{column}", f"in '{where}', ") if where else (column, "")
    if near is not None:
        near = excerpt(near)
        in_all = f"; if it is called so in all rows, --map {mapped(field, near)} reads it" if field else ""
        reason = f"{inside}'{column}' is missing; is '{near}' meant? Rename it to '{column}'{in_all}."
        return Fault(place, f"misspelt field '{near}'", reason)
    if is_optional:
        return None
    reason = f"{inside}'{column}' is missing; the row has {listed(fields) or 'no fields'}."
    return Fault(place, f"missing field '{column}'", reason, of_shape=not where)


@functools.lru_cache(maxsize=16)
def _nearest_unknown(column: str, names: tuple[str, ...], known: tuple[str, ...], cutoff: float) -> str | None:
    """Rows of a file have the same few sets of names."""
    return nearest(column, [name for name in names if name not in known], cutoff=cutoff)


def some_list(value: Any, name: str, due: str = "a list") -> Sequence[Any]:
    """A list, which may be written as JSON text, or as an object of lists."""
    found = from_object_of_lists(value)
    if isinstance(found, list | tuple):
        return found
    reason = f"'{name}' is {described(found)}, and {due} is due.{unparsed(found, 'It', name)}"
    raise Fault(name, f"'{without_index(name)}' is not a list", reason, of_shape=True)


def filled_list(value: Any, name: str, kind: str) -> Sequence[Any]:
    found = some_list(value, name)
    if not found:
        raise Fault(name, kind, f"'{name}' is empty: there is nothing in it to learn from.")
    return found


def from_json_text(value: Any) -> Any:
    """`'[{"role": "user", …}]'` → the list: tables and databases keep lists and objects as JSON text. Any other value,
    and a text that is not the JSON of a list or an object, is returned as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def from_object_of_lists(value: Any) -> Any:
    """`{"role": ["user"], "content": ["Hi."]}` → `[{"role": "user", "content": "Hi."}]`: so `datasets` before 4.0
    keeps a list of objects. Any other value is returned as `from_json_text` does."""
    value = from_json_text(value)
    if not isinstance(value, Mapping) or not all(isinstance(part, list | tuple) for part in value.values()):
        return value
    if len(set(map(len, value.values()))) != 1:
        return value
    return [dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=True)]


def unparsed(value: Any, what: str, column: str) -> str:
    """What to do with a text that begins as a list or an object does and is no JSON; "" for any other value."""
    found = from_json_text(value)
    if not isinstance(found, str) or found.lstrip()[:1] not in ("[", "{"):
        return ""
    return (
        f" {what} is text that begins as a list or an object does, but it is no JSON. If it is Python's own notation,"
        f" as pandas writes lists into csv, pandas makes JSON of it: df[{column!r}] ="
        f" df[{column!r}].map(ast.literal_eval); df.to_json('rows.jsonl', orient='records', lines=True)."
    )


def unread(value: Any, path: str, names: Mapping[str, Any]) -> Iterator[str]:
    """`messages.name`: the keys inside of a value that hold something and are not read. `names` are those that are
    read, each with the names inside of it; without any, nothing inside is looked at. A key may come several times."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in names:
                if has_value(inner):
                    yield f"{path}.{excerpt(key)}"
            elif names[key]:
                yield from unread(inner, f"{path}.{key}", names[key])
    elif isinstance(value, list | tuple):
        for part in value:
            yield from unread(from_json_text(part), path, names)


def inner(value: Any, key: str, where: str) -> Any:
    """What an instance, called `where`, holds under `input` or `output`."""
    if not isinstance(value, Mapping):
        reason = f"'{where}' is {described(value)}, and an object {{…}} is due."
        raise Fault(where, f"'{without_index(where)}' is not an object", reason)
    if key not in value:
        raise missing(key, value, ("input", "output"), where=where)
    return value[key]


def input_of(value: Any, where: str) -> str:
    """`input`, which may be absent or null, but not misspelt."""
    if isinstance(value, Mapping) and "input" not in value:
        if misspelt := missing("input", value, ("input", "output"), where=where, is_optional=True):
            raise misspelt
        return ""
    input = inner(value, "input", where)
    return "" if input is None else text(input, f"{where}.input", may_be_empty=True)


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
        return f"{name} ({excerpt(SHORT.repr(value), 60)})"
    except ValueError:  # a number of more digits than Python writes
        return f"{name} (of very many digits)"


def listed(names: Iterable[str]) -> str:
    """`'a', 'b'`, shortened where a row has very many."""
    names = list(names)
    more = f" and {len(names) - NAMES_SHOWN:,} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(f"'{excerpt(name, 60)}'" for name in names[:NAMES_SHOWN]) + more


def mapped(field: str, column: str) -> str:
    """`output=answer`, as it is written after --map in a shell."""
    return shlex.quote(f"{field}={excerpt(column)}")


def without_index(name: str) -> str:
    """`messages[2].content` → `messages.content`: the same for all rows."""
    return INDEX.sub("", name)


SHORT = reprlib.Repr()
