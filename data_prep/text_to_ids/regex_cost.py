"""How long a regular expression of a tokenizer.json may search before it gives up, found from its text alone.

    regex_cost(r"\\s+(?!\\S)|\\s+").tries        1001: as many tries from each character as a run of blanks is long
    regex_cost(r"\\w+\\s*\\w*:").tries            10**9: three runs are divided in every way before `:` is missed
    regex_cost(r"(a|a)*b").tries                inf

`tokenizers` searches with Oniguruma, in which nothing ends a search that takes years. A run (`+`, `*`) counts as RUN
tries where something after it can fail, and runs multiply. What repeats a group that can match in several ways counts
as infinite. What this reader does not know (references, comments) is a ValueError.
"""

import math
import re
from typing import NamedTuple

RUN = 1000
"""Characters of a run, by which costs are compared."""
ESCAPE = re.compile(r"\\(?:[pPxou]\{[^{}]*\}|x[0-9A-Fa-f]{1,2}|u[0-9A-Fa-f]{4}|[^1-9CMcgkpPxou])", re.DOTALL)
CLASS = re.compile(r"\[\^?[^\[\]]+\]")
GROUP = re.compile(r"\((?:\?(=|!|<=|<!)|(\?>)|\?(?::|[im]+:|<[A-Za-z]\w*>))?([^()]*)\)")
PIECE = re.compile(r"([^*+?])((?:[*+?]|\{(?:\d+,?\d*|,\d+)\})*)", re.DOTALL)
QUANTIFIER = re.compile(r"[*+?]|\{(\d*)(,?)(\d*)\}")
ATOM, ANCHOR = "a", "\ue000"


class Cost(NamedTuple):
    tries: float = 1
    """From one character on, until no match is found."""
    ways: float = 1
    """In which it may match from one character on."""
    least: int = 0
    """Characters of its shortest match."""
    size: float = 1
    """Atoms, once repetitions with numbers are written out."""
    can_fail: bool = True


def regex_cost(pattern: str) -> Cost:
    """Groups are replaced by one character each, from the innermost on, whose costs are known from then on."""
    costs = {ANCHOR: Cost()}
    text = re.sub(r"[\ue000-\uf8ff]", ATOM, pattern.removeprefix("(?i)"))
    text = ESCAPE.sub(lambda it: ANCHOR if it[0][1] in "bBAzZG" else ATOM, text)
    while text != (text := CLASS.sub(ATOM, text)):
        pass
    text = f"({re.sub('[$^]', ANCHOR, text)})"

    def cost_of(group: re.Match) -> str:
        branches = [_in_sequence(branch, costs) for branch in group[3].split("|")]
        tries, ways, least, size, can_fail = zip(*branches, strict=True)
        cost = Cost(sum(tries), sum(ways), min(least), sum(size), all(can_fail))
        if group[1]:
            cost = cost._replace(ways=1, least=0, can_fail=True)
        costs[name := chr(0xE000 + len(costs))] = cost._replace(ways=1) if group[2] else cost
        return name

    while len(text) > 1:
        if len(costs) > RUN or text == (text := GROUP.sub(cost_of, text)):
            raise ValueError(f"something is not allowed or not closed: {text[1:20]!r}")
    return costs[text]


def _in_sequence(text: str, costs: dict[str, Cost]) -> Cost:
    tries, ways, least, size, can_fail = 1.0, 1.0, 0, 0.0, False
    if "".join(match[0] for match in PIECE.finditer(text)) != text or re.search(r"[\[\]\\]", text):
        raise ValueError(f"something is not allowed or not closed: {text[:20]!r}")
    for character, quantifiers in PIECE.findall(text):
        item = costs.get(character, Cost(least=1))
        for place, match in enumerate(QUANTIFIER.finditer(quantifiers)):
            if place and match[0] in "+?" and quantifiers[0] in "*+?":
                continue  # lazy or possessive
            item = _times(item, match)
        tries = max(tries, item.tries * (ways if item.can_fail else 1))
        ways, least, size = ways * item.ways, least + item.least, size + item.size
        can_fail = can_fail or item.can_fail
    return Cost(tries, ways, least, size, can_fail)


def _times(item: Cost, quantifier: re.Match) -> Cost:
    low, comma, high = quantifier.groups()
    least, most = int(quantifier[0] == "+"), 1.0 if quantifier[0] == "?" else math.inf
    if comma is not None:
        least, most = int(low or 0), float(high or (math.inf if comma else low))
    base = min(item.ways, 1e9)
    ways = (most - least + 1) * base ** min(most, 30) if most < math.inf else RUN if base == 1 else math.inf
    tries = item.tries * base ** min(max(least - 1, 0), 30)
    size = item.size * max(least, 1 if most == math.inf else most)
    return Cost(tries, ways, item.least * least, size, least > 0 and item.can_fail)
