"""How long a regular expression of a tokenizer.json may search before it gives up, found from its text alone.

    regex_cost(r"\\s+(?!\\S)|\\s+").tries        1000: as many tries from each character as a run of blanks is long
    regex_cost(r"[A-Z]*[a-z]+").tries           1000
    regex_cost(r"\\w+\\s*\\w*:").tries            10**9: three runs are divided in every way before `:` is missed
    regex_cost(r"(a|a)*b").tries                inf

`tokenizers` searches with Oniguruma, in which nothing ends a search that takes years. A run (`+`, `*`) counts as RUN
tries where something after it can fail, and runs multiply. What repeats a group that can match in several ways counts
as infinite. Published tokenizers have at most 3 × RUN. What this reader does not know (references, comments) is a
ValueError.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

RUN = 1000
"""Characters of a run, by which costs are compared."""
DEEPEST = 30
GROUPS = re.compile(r"\?(?:(=|!|<=|<!)|>|:|i:|m:|mi:|im:|<[A-Za-z]\w*>)")
QUANTIFIER = re.compile(r"[*+?][+?]?|\{(\d*)(?:(,)(\d*))?\}\??")
ESCAPE = re.compile(r"\\(?:[pPxou]\{[^{}]*\}|x[0-9A-Fa-f]{1,2}|u[0-9A-Fa-f]{4}|[^1-9CMcgkpPxou])", re.DOTALL)
ANCHORS = ("\\b", "\\B", "\\A", "\\z", "\\Z", "\\G", "^", "$")


class Cost(NamedTuple):
    tries: float = 1
    """From one character on, until no match is found."""
    ways: float = 1
    """In which it may match from one character on."""
    least: int = 0
    """Characters of its shortest match."""
    size: int = 1
    """Atoms, once repetitions with numbers are written out."""
    can_fail: bool = True


def regex_cost(pattern: str) -> Cost:
    reader = _Reader(pattern[4:] if pattern.startswith("(?i)") else pattern)
    cost = reader.alternatives()
    if reader.place < len(reader.text):
        raise ValueError(f"an unmatched ) stands at character {reader.place + 1}")
    return cost


class _Reader:
    def __init__(self, text: str):
        self.text, self.place, self.depth = text, 0, 0

    def alternatives(self) -> Cost:
        branches = [_in_sequence(self.items())]
        while self.text.startswith("|", self.place):
            self.place += 1
            branches.append(_in_sequence(self.items()))
        tries, ways, least, size, can_fail = zip(*branches, strict=True)
        return Cost(sum(tries), sum(ways), min(least), sum(size), all(can_fail))

    def items(self) -> Iterator[Cost]:
        while self.place < len(self.text) and self.text[self.place] not in "|)":
            yield self._repeated(self._item())

    def _item(self) -> Cost:
        text, character = self.text, self.text[self.place]
        if character == "(":
            return self._group()
        if character == "[":
            self._skip_class()
            return Cost(least=1)
        if character in "*+?":
            raise ValueError(f"nothing stands before the {character} at character {self.place + 1}")
        start, self.place = self.place, self._after_escape() if character == "\\" else self.place + 1
        item = text[start : self.place]
        return Cost(ways=2 if item in ("\\X", "\\R") else 1, least=0 if item in ANCHORS else 1)

    def _after_escape(self) -> int:
        if not (match := ESCAPE.match(self.text, self.place)):
            raise ValueError(f"{self.text[self.place : self.place + 2]} is not allowed")
        return match.end()

    def _group(self) -> Cost:
        self.place, self.depth = self.place + 1, self.depth + 1
        kind = GROUPS.match(self.text, self.place)
        if self.depth > DEEPEST or (kind is None and self.text.startswith("?", self.place)):
            raise ValueError(f"{self.text[self.place - 1 : self.place + 3]} is not allowed")
        self.place = kind.end() if kind else self.place
        inside = self.alternatives()
        if not self.text.startswith(")", self.place):
            raise ValueError("a ( has no )")
        self.place, self.depth = self.place + 1, self.depth - 1
        if kind and kind[1]:
            return inside._replace(ways=1, least=0, can_fail=True)
        return inside._replace(ways=1) if kind and kind[0] == "?>" else inside

    def _skip_class(self) -> None:
        """Classes may stand in classes."""
        depth = 0
        while self.place < len(self.text):
            if opened := re.compile(r"\[\^?").match(self.text, self.place):
                depth, self.place = depth + 1, opened.end()
                if self.text.startswith("]", self.place):
                    raise ValueError("a ] in a class needs a \\ before it")
            elif self.text[self.place] == "\\":
                self.place = self._after_escape()
            else:
                depth, self.place = depth - (self.text[self.place] == "]"), self.place + 1
                if not depth:
                    return
        raise ValueError("a [ has no ]")

    def _repeated(self, item: Cost) -> Cost:
        while match := QUANTIFIER.match(self.text, self.place):
            if match[0].startswith("{") and not match[1] and not match[3]:
                return item  # a brace as a character
            self.place = match.end()
            if match[0].startswith("{"):
                least = int(match[1] or 0)
                most = math.inf if match[2] and not match[3] else int(match[3] or match[1])
                least = 0 if match[0].endswith("?") else least
            else:
                least, most = int(match[0][0] == "+"), 1 if match[0][0] == "?" else math.inf
            item = _times(item, least, most)
        return item


def _in_sequence(items: Iterator[Cost]) -> Cost:
    tries, ways, least, size, can_fail = 1.0, 1.0, 0, 0, False
    for item in items:
        tries = max(tries, item.tries * (ways if item.can_fail else 1))
        ways, least, size = ways * item.ways, least + item.least, size + item.size
        can_fail = can_fail or item.can_fail
    return Cost(tries, ways, least, size, can_fail)


def _times(item: Cost, least: int, most: float) -> Cost:
    if most == math.inf:
        ways: float = RUN if item.ways == 1 else math.inf
    else:
        ways = (most - least + 1) * (item.ways**most if item.ways == 1 or most < 100 else math.inf)
    tries = item.tries * (item.ways ** min(least - 1, 100) if least > 1 else 1)
    size = item.size * max(least, 1 if most == math.inf else int(most))
    return Cost(tries, ways, item.least * least, size, least > 0 and item.can_fail)
