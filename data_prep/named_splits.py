"""What the splits of a prepared dataset are called, and which split a file says it is by its name.

    train   validation         test                                  one of each
    train   validation/news    validation/medical    test/news       several, each with a name

    said_kind("data/valid-00000-of-00002.parquet")   → "validation"
    named("news=a.jsonl")                            → ("news", "a.jsonl")
    splits_of("validation", splits)                  → ["validation/news", "validation/medical"]

The words are those by which `datasets` knows the files of a Hub data set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

KINDS = ("train", "validation", "test")
HELD_OUT = KINDS[1:]

_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|val|dev|development",
    "test": "test|testing|eval|evaluation",
}
_SAYS = {kind: re.compile(rf"(?<![a-z])(?:{words})(?![a-z])") for kind, words in _WORDS.items()}
_NAMED = re.compile(r"([\w-]+)=(.+)", re.DOTALL)


def said_kind(path: str) -> str:
    """The kind that a path, or the name of a split, says; "" if it says none. The last part that says one decides, and
    a part that says two (train_test.jsonl) says none."""
    for part in reversed(path.casefold().split("/")):
        said = [kind for kind, words in _SAYS.items() if words.search(part)]
        if len(said) == 1:
            return said[0]
    return ""


def named(entry: str) -> tuple[str, str]:
    """The name and the source of what the command line has; no name where a file is called so, "=" included."""
    found = _NAMED.fullmatch(entry)
    return ("", entry) if found is None or os.path.lexists(entry) else (found[1], found[2])


def kind_of(split: str) -> str:
    """`validation/news` → `validation`."""
    return split.partition("/")[0]


def name_in(split: str) -> str:
    """`validation/news` → `news`; `validation` → `validation`."""
    return split.rpartition("/")[2]


def splits_of(kind: str, splits: Iterable[str]) -> list[str]:
    return [split for split in splits if kind_of(split) == kind]
