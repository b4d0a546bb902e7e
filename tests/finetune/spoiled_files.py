"""Files with something wrong in them: values of another type or size, other keys, broken text.

spoil = spoil_json("config.json", {"num_layers": 2})    spoil(folder, random.Random(0)) → "'num_layers' is [2]"
"""

import contextlib
import copy
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """Of files: how one is made, spoiled and loaded."""

    make: Callable[[Path], None]
    """Writes a valid folder."""
    spoil: Callable[[Path, random.Random], str]
    """Changes one or several things in a copy of it; returns what."""
    load: Callable[[Path], None]
    seconds: float = 5.0
    """Of computing, in which it loads or is refused."""


# Values that nobody expects

BACKTRACKING = ["(a+)+$", "(.*.*)*x", "(([a-zA-Z0-9_.]+)*)*!", "(.|.)*.*.*.*.*.*\\d$", "(?:.*\\.)*(?:.*\\.)*z"]
TEXTS = [
    *("", " ", "\x00", "\ud800", "é" * 1000, "a" * 10**6, "../../etc/passwd", "{{ 7 * 7 }}", "\u202e", "None", "nan"),
    *("true", "1e999", "0", "-1", "cuda", "float8_e4m3fn", "(", "[", "*", "\\", "(?P<a", "a{99999999999}", "\n"),
    *("pissa_niter_999999999", "pissa_niter_x", "__import__('os')", "all-linear", "t5", "bart", "gelu_new", "eager"),
]
NUMBERS = [0, 1, -1, 2, 3, 7, 100, 1000, 10**5, 10**7, 10**9, 2**31, 2**63, 10**30, 10**400, 0.5, -0.5, 1e-30, 1e308]
NUMBERS += [float("nan"), float("inf"), -float("inf")]


def odd_value(dice: random.Random, depth: int = 0) -> Any:
    """Of any JSON type; sometimes nested, sometimes large."""
    kind = dice.randrange(10 if depth < 3 else 7)
    if kind < 3:
        return dice.choice(NUMBERS)
    if kind < 5:
        return dice.choice(TEXTS + BACKTRACKING)
    if kind < 7:
        return dice.choice([None, True, False, [], {}])
    if kind == 7:
        return [odd_value(dice, depth + 1) for _ in range(dice.choice([1, 2, 3, 50]))]
    if kind == 8:
        return {str(odd_value(dice, 3))[:80]: odd_value(dice, depth + 1) for _ in range(dice.choice([1, 2, 5]))}
    nested: Any = dice.choice(NUMBERS)
    for _ in range(dice.choice([2, 20, 400])):
        nested = [nested] if dice.random() < 0.5 else {"a": nested}
    return nested


def changed(value: Any, dice: random.Random) -> Any:
    """A value like this one, of another size or form; or any other."""
    if dice.random() < 0.5:
        return odd_value(dice)
    if isinstance(value, bool) or value is None:
        return dice.choice([not value, 0, 1, "true", [value], None])
    if isinstance(value, int | float):
        by = dice.choice([-1, 0, 0.5, 2, 3, 10, 1000, 10**6, 10**12])
        return dice.choice([value * by, value + 1, value - 1, float(str(value)), str(value), [value], [value] * 1000])
    if isinstance(value, str):
        pattern = dice.choice(BACKTRACKING)
        return dice.choice([value[:-1], value.upper(), value * 1000, [value], value + "\x00", {value: value}, pattern])
    if isinstance(value, list):
        return dice.choice(
            [value[:-1], value * 1000, [value], value + [odd_value(dice)], dict.fromkeys(map(str, value))]
        )
    return dice.choice([list(value), [value], value | {"a": odd_value(dice)}, dict.fromkeys(value), str(value)])


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of each value in a JSON value, the outermost first."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def spoil_value(value: Any, dice: random.Random, known: dict[str, Any]) -> tuple[Any, str]:
    """One change; `known` are keys that the file may have, with a valid value of each."""
    value, known, paths = copy.deepcopy(value), copy.deepcopy(known), list(places(value))
    how = dice.choice(["change", "change", "add", "add", "remove", "rename"])
    if how == "add" and isinstance(value, dict):
        key = dice.choice(sorted(known) or ["new"]) if dice.random() < 0.95 else dice.choice(TEXTS)[:100]
        value[key] = changed(known.get(key), dice) if dice.random() < 0.8 else known.get(key)
        return value, f"{key!r} is {shown(value[key])}"
    path = dice.choice(paths)
    if not path:
        return (changed(value, dice), "another whole") if dice.random() < 0.1 else (value, "nothing")
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    if how == "remove":
        del parent[path[-1]]
        return value, f"without {path}"
    if how == "rename" and isinstance(parent, dict):
        new = dice.choice(sorted(known) or ["new"])
        parent[new] = parent.pop(path[-1])
        return value, f"{path} is called {new!r}"
    parent[path[-1]] = changed(parent[path[-1]], dice)
    return value, f"{path} is {shown(parent[path[-1]])}"


def shown(value: Any) -> str:
    return ascii(str(value)[:80])


def spoil_text(text: bytes, dice: random.Random) -> tuple[bytes, str]:
    """A change below the level of JSON."""
    place = dice.randrange(len(text) + 1)
    other = dice.choice(
        [b"", b"\xff\xfe", b"\x00", b'"', b"{", b"]", b",", b"[" * 10**5, b'{"a":' * 10**4, b"9" * 5000]
    )
    how = dice.choice(["cut", "insert", "byte order mark", "utf-16", "only", "blanks"])
    if how == "blanks":
        return text + b" " * dice.choice([10, 30_000_000]), how
    made = {
        "cut": text[:place],
        "insert": text[:place] + other + text[place:],
        "byte order mark": b"\xef\xbb\xbf" + text,
        "utf-16": text.decode(errors="replace").encode("utf-16"),
        "only": other,
    }
    return made[how], f"{how} {other[:8]!r} at {place}"


def write(file: Path, content: bytes) -> None:
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def spoil_json(name: str, known: dict[str, Any]) -> Callable[[Path, random.Random], str]:
    """What is wrong is one value, or two, three; rarely the text itself."""

    def spoil(folder: Path, dice: random.Random) -> str:
        file = folder / name
        if dice.random() < 0.05:
            content, said = spoil_text(file.read_bytes(), dice)
            write(file, content)
            return said
        value, all_said = json.loads(file.read_text(encoding="utf-8")), []
        with without_limits():
            for _ in range(dice.choice([1, 1, 1, 2, 3])):
                value, said = spoil_value(value, dice, known)
                all_said.append(said)
            write(file, json.dumps(value).encode())
        return "; ".join(all_said)

    return spoil


@contextlib.contextmanager
def without_limits() -> Iterator[None]:
    """On digits, and on lists in lists: three changes can nest 1,200 of them."""
    digits, depth = sys.get_int_max_str_digits(), sys.getrecursionlimit()
    sys.set_int_max_str_digits(0), sys.setrecursionlimit(10_000)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(digits), sys.setrecursionlimit(depth)
