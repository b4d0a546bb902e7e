"""Which rows are train, validation and test, so that nothing held out was seen in training.

Rows that share a text are one group, and a group is never divided. A text is the input (the instruction where the
input is empty) or the output, compared without regard to case, width and spacing, whichever side it stands on:

    "Hi."  → "안녕."     "Hello." → "안녕."     "안녕." → "Hi."     one group of three
    "Run!" → "뛰어!"                                             another group

Tatoeba's 3,318 pairs in both directions are 6,636 rows in 3,015 groups, the largest of 16 rows. The same rows,
fractions and seed give the same split, in whatever order the rows come.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from diptych.data_prep.records import Record

SPLITS = ("train", "validation", "test")
LARGE_GROUP_FRACTION = 0.1


@dataclass(frozen=True)
class Split:
    """`names[i]` is the split of row i."""

    names: list[str]
    groups: int
    warnings: list[str]


def split_records(
    records: Sequence[Record], validation_fraction: float, test_fraction: float, seed: int, split_by: str = "both"
) -> Split:
    """Groups in an order drawn from `seed` fill test, then validation, while whole groups fit; the rest is train."""
    texts = [_texts(record, split_by) for record in records]
    groups = _groups(texts)
    wanted = {"test": _wanted(test_fraction, records), "validation": _wanted(validation_fraction, records)}
    names = ["train"] * len(records)
    taken = Counter()
    groups.sort(key=lambda group: _draw(seed, min(text for row in group for text in texts[row])))
    largest = max(groups, key=len, default=[])
    for group in groups:
        for name in ("test", "validation"):
            if group is not largest and taken[name] + len(group) <= wanted[name]:  # so that train is never empty
                taken[name] += len(group)
                for row in group:
                    names[row] = name
                break
    return Split(names, len(groups), _warnings(texts, largest, wanted, taken))


def normalise(text: str) -> str:
    """`" Ｈｉ  there. "` and `"hi there."` are the same text to someone who looks for leaks."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _texts(record: Record, split_by: str) -> tuple[str, ...]:
    source = normalise(record.input) or normalise(record.instruction)
    return (source,) if split_by == "source" else (source, normalise(record.output))


def _groups(texts: list[tuple[str, ...]]) -> list[list[int]]:
    """Connected components of rows that share a text (union-find with path halving)."""
    parent: dict[str, str] = {}

    def root(text: str) -> str:
        while parent.setdefault(text, text) != text:
            parent[text] = parent[parent[text]]
            text = parent[text]
        return text

    for row_texts in texts:
        parent[root(row_texts[-1])] = root(row_texts[0])
    rows_of = defaultdict(list)
    for row, row_texts in enumerate(texts):
        rows_of[root(row_texts[0])].append(row)
    return list(rows_of.values())


def _wanted(fraction: float, records: Sequence[Record]) -> int:
    return max(1, round(fraction * len(records))) if fraction > 0 else 0


def _draw(seed: int, text: str) -> str:
    return hashlib.sha256(f"{seed} {text}".encode()).hexdigest()


def _warnings(texts: list[tuple[str, ...]], largest: list[int], wanted: dict[str, int], taken: Counter) -> list[str]:
    """A text that very many rows share, such as the output "Yes", can tie a whole data set into one group."""
    found = []
    if len(largest) > max(20, LARGE_GROUP_FRACTION * len(texts)) and any(wanted.values()):
        text, count = Counter(text for row in largest for text in set(texts[row])).most_common(1)[0]
        shown = text if len(text) <= 40 else text[:40] + "…"
        found.append(
            f"{len(largest):,} of {len(texts):,} rows hang together by shared texts (the most shared, '{shown}', is in"
            f" {count:,}), so all of them are train. For data with few different outputs, such as classification,"
            " --split_by source keeps only the inputs apart."
        )
    for name, rows in wanted.items():
        if taken[name] < 0.8 * rows:
            found.append(f"{name} has {taken[name]:,} rows instead of {rows:,}: no more whole groups of rows fit.")
    return found
