"""Which rows are train, validation and test, so that nothing held out was seen in training.

Rows that share a text are one group, and a group is never divided. A text is the input (the instruction where the
input is empty, the first turn of a conversation) or the output, compared without regard to case, width and spacing,
whichever side it stands on:

    "Hi."  → "안녕."     "Hello." → "안녕."     "안녕." → "Hi."     one group of three
    "Run!" → "뛰어!"                                             another group

Tatoeba's 3,318 pairs in both directions are 6,636 rows in 3,015 groups, the largest of 16 rows. The same rows,
fractions and seed give the same split, in any order of the rows. Texts are known by 64-bit keys; five million rows
take some ten seconds.

A validation or test set of the user's own stays as it is, and the train rows that are in it are found: rows with the
same source, or with the same input and output, in either direction. A shared input or output alone is not enough,
unless `split_by` is given: all labels of a classification, and the tables that questions are about, are in both sets.
"""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

import numpy
import xxhash
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from diptych.data_prep.command_line.errors import counted
from diptych.data_prep.rows.named_splits import KINDS
from diptych.data_prep.rows.records import Record

LARGE_GROUP_FRACTION = 0.1
_FACTOR = numpy.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Split:
    """`of_row[i]`, (rows,) int8, is the place in KINDS of row i."""

    of_row: numpy.ndarray
    groups: int
    warnings: list[str]


def split_rows(
    input_keys: numpy.ndarray,
    output_keys: numpy.ndarray,
    validation_fraction: float,
    test_fraction: float,
    seed: int,
    split_by: str,
    shown: Callable[[int, str], str],
    rejected_keys: numpy.ndarray | None = None,
) -> Split:
    """Groups in an order drawn from `seed` fill test, then validation, while whole groups fit; the rest is train.

    Keys are (rows,) uint64, from `text_key`; `rejected_keys` are those of pairs of answers. `shown(row, "input",
    "output" or "rejected")` is the text, for messages.
    """
    rows = len(input_keys)
    keys = row_keys(None, input_keys, output_keys, split_by, rejected_keys)
    texts, node = numpy.unique(numpy.concatenate(keys), return_inverse=True)
    nodes = node.reshape(len(keys), rows)  # each row joins its texts, which are the nodes of a graph
    ends = numpy.tile(nodes[0], len(keys)), nodes.ravel()
    graph = coo_array((numpy.ones(nodes.size, dtype=numpy.int8), ends), shape=(len(texts), len(texts)))
    groups, group_of_text = connected_components(graph, directed=False)
    group_of_row = group_of_text[nodes[0]]
    smallest_keys = numpy.full(groups, numpy.iinfo(numpy.uint64).max, dtype=numpy.uint64)
    for side in keys:  # a key that stands for a group, whatever the order of its rows
        numpy.minimum.at(smallest_keys, group_of_row, side)
    sizes = numpy.bincount(group_of_row, minlength=groups)
    fractions = {"test": test_fraction, "validation": validation_fraction}
    wanted = {name: max(1, round(part * rows)) if part > 0 else 0 for name, part in fractions.items()}
    taken = dict.fromkeys(wanted, 0)
    largest = int(sizes.argmax()) if groups else -1
    split_of_group = numpy.zeros(groups, dtype=numpy.int8)
    order = scattered(smallest_keys + numpy.uint64(xxhash.xxh3_64_intdigest(str(seed).encode())))
    for group in numpy.argsort(order, kind="stable").tolist():
        if taken == wanted:
            break
        for name in ("test", "validation"):
            if group != largest and taken[name] + sizes[group] <= wanted[name]:  # so that train is never empty
                taken[name] += int(sizes[group])
                split_of_group[group] = KINDS.index(name)
                break
    warnings = _warnings(numpy.flatnonzero(group_of_row == largest), rows, keys, shown, wanted, taken)
    return Split(split_of_group[group_of_row], groups, warnings)


def normalise(text: str) -> str:
    """`" Ｈｉ  there. "` → `"hi there."`"""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def text_key(text: str) -> int:
    """64 bits of a text, as `normalise` sees it."""
    return xxhash.xxh3_64_intdigest(normalise(text).encode("utf-8", "surrogatepass"))


def record_keys(record: Record) -> tuple[int, int]:
    """The keys of a record's input and output. All turns of a conversation have the input of the first."""
    text = record.history[0][0] if record.history else record.input
    return text_key(text if text.strip() else record.instruction), text_key(record.output)


def row_keys(
    source: numpy.ndarray | None,
    inputs: numpy.ndarray,
    outputs: numpy.ndarray,
    split_by: str | None,
    rejected: numpy.ndarray | None = None,
) -> list[numpy.ndarray]:
    """Columns of keys, (rows,) uint64 each: two rows that may not stand in two splits have one in common. `source` is
    the key of the whole source, and is not used where `split_by` says which texts count."""
    if split_by is not None:
        answers = [outputs] if rejected is None else [outputs, rejected]
        return [inputs] if split_by == "source" else [inputs, *answers]
    pair = numpy.minimum(inputs, outputs) * _FACTOR + numpy.maximum(inputs, outputs)  # in either direction
    return [source, pair]


def found_in(rows: list[numpy.ndarray], held_out: list[numpy.ndarray]) -> numpy.ndarray:
    """(rows,) int64: for each row the place of the first held-out row that has one of its keys, or -1."""
    places = numpy.tile(numpy.arange(len(held_out[0])), len(held_out))
    keys, first = numpy.unique(numpy.concatenate(held_out), return_index=True)
    found = numpy.full(len(rows[0]), len(places), dtype=numpy.int64)
    for column in rows:
        place = numpy.searchsorted(keys, column).clip(max=len(keys) - 1)
        is_there = keys[place] == column
        found[is_there] = numpy.minimum(found, places[first[place]])[is_there]
    return numpy.where(found < len(places), found, -1)


def scattered(keys: numpy.ndarray) -> numpy.ndarray:
    """(keys,) uint64: the last steps of splitmix64 (Steele et al. 2014), so that all bits depend on all."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        keys = (keys ^ (keys >> numpy.uint64(shift))) * numpy.uint64(factor)
    return keys ^ (keys >> numpy.uint64(31))


def _warnings(
    largest: numpy.ndarray,
    rows: int,
    keys: list[numpy.ndarray],
    shown: Callable[[int, str], str],
    wanted: dict[str, int],
    taken: dict[str, int],
) -> list[str]:
    """About a text that very many rows share, such as the output "Yes", and sets that are smaller than asked for."""
    found = []
    if len(largest) > max(20, LARGE_GROUP_FRACTION * rows) and any(wanted.values()):
        sides = [side[largest] for side in keys]
        if len(sides) > 1:  # a row with the same text on both sides counts once
            sides[1] = sides[1][sides[1] != sides[0]]
        texts, counts = numpy.unique(numpy.concatenate(sides), return_counts=True)
        best = texts[counts.argmax()]
        side = next(place for place, its in enumerate(sides) if best in its)
        text = shown(int(largest[keys[side][largest] == best][0]), ("input", "output", "rejected")[side])
        found.append(
            f"{len(largest):,} of {rows:,} rows hang together by shared texts (the most shared,"
            f" '{text[:40]}{'…' * (len(text) > 40)}', is in {counts.max():,}), so all of them are train. For data with"
            " few different outputs, such as classification, --split_by source keeps only the inputs apart."
        )
    can_be_smaller = len(keys) > 1 and len(largest) > 1 and not found
    smaller = " --split_by source makes them smaller, by keeping only inputs apart." if can_be_smaller else ""
    for name, number in wanted.items():
        if taken[name] < 0.8 * number:
            found.append(
                f"{name} has {counted(taken[name], 'row')} instead of {number:,}: rows that share a text stay"
                f" together, and no more of these groups fit whole.{smaller}"
            )
    return found
