"""The names of the splits of a prepared dataset, and which split a file's name means.

    train   validation         test                                  one of each
    train   validation/news    validation/medical    test/news       several, each with a name

    kind_in_name("data/valid-00000-of-00002.parquet")   → "validation"
    named("news=a.jsonl")                            → ("news", "a.jsonl")
    splits_of("validation", splits)                  → ["validation/news", "validation/medical"]

The words are those by which `datasets` recognises the files of a Hub data set, and those of translation data.
"""

import os
import re
from collections.abc import Iterable

KINDS = ("train", "validation", "test")
HELD_OUT = KINDS[1:]

DOUBTFUL = "?"
"""The kind of a part whose name may mean that it is held out, or not."""

_TEST_OF_DEV = re.compile("(?<![a-z])(?:dev[_.-]?test|test[_.-]?dev)(?![a-z])")
"""FLORES and WMT divide what they publish into dev and devtest, others into dev and test-dev."""
_WORDS = {
    "train": "(?:train|training)(?:set)?",
    "validation": "(?:(?:news|newsdiscuss)?dev|validation|valid|val|development)(?:set)?",
    "test": "(?:(?:news|newsdiscuss)?test|tst)(?:set|s|[ab])?|testing|evals?|evaluations?|evalset|held[_-]?out",
}
_KIND_WORDS = {kind: re.compile(rf"(?<![a-z])(?:{words})(?![a-z])") for kind, words in _WORDS.items()}
_DOUBTFUL_WORDS = re.compile(
    r"(?<![a-z])(?:test(?!i|ament)|eval|valid|dev(?:set|data|split|files?)|hold[_-]?out)"
    r"|(?<!la)(?<!con)(?<!pro)(?<!grea)(?<!fas)test(?![a-z])|[a-z]dev(?![a-z])|held[_-]?out"
)
_NAMED = re.compile(r"([\w-]+)=(.+)", re.DOTALL)


def kind_in_name(path: str) -> str:
    """The kind that a path, or the name of a split, means; "" if it means none. The last part of the path with such a
    word decides. A part with two of them (train_test.jsonl), or with one inside a word (mytest.jsonl), is DOUBTFUL."""
    for part in reversed(_TEST_OF_DEV.sub("test", path.casefold()).split("/")):
        kinds = [kind for kind, words in _KIND_WORDS.items() if words.search(part)]
        if kinds or _DOUBTFUL_WORDS.search(part):
            return kinds[0] if len(kinds) == 1 else DOUBTFUL
    return ""


def named(entry: str) -> tuple[str, str]:
    """Name and source of an entry of the command line; no name if there is a file called so, with the "="."""
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
