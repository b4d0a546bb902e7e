"""Which rows repeat an earlier row, exactly or nearly, and which sources have several targets.

    keys, (rows, 2) uint64        exact_duplicates    →  [-1, -1, 0, -1, 0]     rows 2 and 4 repeat row 0
    signatures, (rows, P) uint32  near_duplicates     →  [-1, 0, -1, -1, 2]     −1, or the row that stays instead

The first of its kind stays. A row goes only if it is like a row that *stays*: in a chain a ~ b ~ c, where a and c are
not alike, b goes and c stays. The same rows in the same order give the same answer in every process.

Exact: two texts that differ in how Unicode composes a character are the same, and no others. Five million keys take
2.7 s and 210 MB.

Near: the Jaccard similarity of two texts' shingles. Candidates are found by MinHash (Broder 1997) and banding
(Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.4), then the texts are compared. Shingles are five
characters of the text in Unicode's decomposed form, where a Hangul syllable is two or three letters: a Korean typing
error then weighs what an English one does. Of texts with one small edit (a letter, a word, a sign), a threshold of 0.7
finds

                                 5 characters   5, decomposed   3, decomposed
    English, 35 characters           72 %            72 %            88 %
    Korean, 18 characters            43 %            69 %            83 %
    CodeAlpaca, 262 characters      100 %           100 %           100 %

and with three characters twice as many different sentences pass for alike. Two million signatures of 128 numbers on
disk, 5 % of them duplicates, take 11 s and 300 MB. Of 2,000 rows, half of them edited copies, at 0.7, 0.8 and 0.9 at
least 99.7 % of what brute force finds is found, and nothing else (benchmarks/near_duplicates.py).

MinHash is datasketch's (kept since 2015, numpy; its scheme has a name, `affine32`, under which the values stay). rensa
hashes 17 times as fast, but a worker forked after its parent has used it waits for ever, and its values may change
from version to version. datasketch's own index of bands keeps Python objects for each row, in memory.
"""

import functools
import math
import unicodedata
from collections.abc import Callable, Sequence

import numpy
import xxhash

from diptych.data_prep.cleaning.filters import source_text
from diptych.data_prep.cleaning.splits import normalise, scattered
from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.records import Record

PERMUTATIONS = 128
"""Numbers in a signature. The estimate's standard error is √(s(1−s)/P): 0.035 where the similarity is 0.8."""
RECALL_AT_THRESHOLD = 0.95
"""Bands are chosen so that a pair exactly as similar as the threshold is a candidate at least this often."""
MOST_COMPARED = 512
"""A row is compared with so many kept rows, those that share most bands with it. Alike rows share many bands;
thousands of rows that share one are boilerplate."""
HASHES_AT_ONCE = 8192
"""So that a long text never becomes a table of all its shingles times all permutations."""
ROWS_AT_ONCE = 65_536
SHINGLE_SIZE = 5
"""Characters."""
_FACTOR = numpy.uint64(0x9E3779B97F4A7C15)


def shingles_of(text: str, size: int = SHINGLE_SIZE) -> set[str]:
    """All runs of `size` characters: "Hi there" → {"hi th", "i the", " ther", "there"}. A shorter text is one run."""
    letters = _letters(text)
    return {letters[start : start + size] for start in range(max(1, len(letters) - size + 1))}


def shingle_hashes(text: str, size: int = SHINGLE_SIZE) -> numpy.ndarray:
    """(runs,) uint32, one for each run of the text, repeated ones repeated."""
    code_points = numpy.frombuffer(_letters(text).encode("utf-32-le", "surrogatepass"), dtype=numpy.uint32)
    size = min(size, len(code_points))
    runs = max(1, len(code_points) - size + 1)
    mixed = numpy.full(runs, size, dtype=numpy.uint64)
    for place in range(size):
        mixed *= _FACTOR
        mixed += code_points[place : place + runs]
    return (scattered(mixed) >> numpy.uint64(32)).astype("u4")


def _letters(text: str) -> str:
    text = normalise(text)
    return text if text.isascii() else unicodedata.normalize("NFD", text)


def exact_key(text: str) -> int:
    """64 bits of a text in Unicode's composed form: "é" is "é", however it is written, and "É" is another text. Case
    and spacing can be all that a row is about."""
    composed = text if text.isascii() else unicodedata.normalize("NFC", text)
    return xxhash.xxh3_64_intdigest(composed.encode("utf-8", "surrogatepass"))


def compared_text(record: Record) -> str:
    """The input (the instruction where there is none) and the output. An instruction that many rows share would make
    all of them alike, and the history would make the later turns of a conversation duplicates of the earlier ones.
    Both answers of a pair are compared."""
    return f"{source_text(record)}\n{record.output}" + (f"\n{record.rejected}" if record.rejected else "")


def exact_duplicates(keys: numpy.ndarray) -> numpy.ndarray:
    """Of (rows, 2) uint64: (rows,) int64, the first row with the same key, or −1 for the first row itself."""
    order = numpy.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal keys stay in the order of their rows
    repeats = numpy.zeros(len(order), dtype=bool)
    repeats[1:] = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
    first = order[numpy.maximum.accumulate(numpy.where(repeats, 0, numpy.arange(len(order))))]
    found = numpy.full(len(order), -1, dtype=numpy.int64)
    found[order[repeats]] = first[repeats]
    return found


def conflicts(source_keys: numpy.ndarray, target_keys: numpy.ndarray) -> list[list[int]]:
    """Groups of rows with one source and at least two different targets, in the order of their first rows.

    Keys are (rows,) uint64, from `splits.text_key`. All rows of a group are listed, also those with the same target.
    """
    order = numpy.lexsort((numpy.arange(len(source_keys)), source_keys))
    source, target = numpy.asarray(source_keys)[order], numpy.asarray(target_keys)[order]
    starts = numpy.flatnonzero(numpy.concatenate(([True], source[1:] != source[:-1]))) if len(order) else order
    ends = numpy.append(starts[1:], len(order))
    differ = numpy.zeros(len(order) + 1, dtype=numpy.int64)
    differ[1:] = numpy.cumsum(target != numpy.repeat(target[starts], ends - starts))
    groups = numpy.flatnonzero(differ[ends] > differ[starts])
    return sorted(order[starts[group] : ends[group]].tolist() for group in groups)


def signatures(
    texts: Sequence[str], shingle_size: int = SHINGLE_SIZE, permutations: int = PERMUTATIONS
) -> numpy.ndarray:
    """(rows, permutations) uint32: 31 µs a row of Tatoeba, 60 µs one of CodeAlpaca."""
    from datasketch import MinHash  # takes 0.4 s, which exact duplicates need not wait for

    minhash = MinHash(num_perm=permutations, seed=1, scheme="affine32", hashfunc=lambda value: value)
    found = numpy.empty((len(texts), permutations), dtype=numpy.uint32)
    for row, text in enumerate(texts):
        minhash.clear()
        hashes = shingle_hashes(text, shingle_size)
        for start in range(0, len(hashes), HASHES_AT_ONCE):
            minhash.update_batch(hashes[start : start + HASHES_AT_ONCE].tolist())
        found[row] = minhash.hashvalues
    return found


def near_duplicates(
    signatures: numpy.ndarray,
    threshold: float,
    texts: Callable[[int], str],
    shingle_size: int = SHINGLE_SIZE,
    considered: numpy.ndarray | None = None,
    stay: numpy.ndarray | None = None,
) -> numpy.ndarray:
    """(rows,) int64: the first row that stays and is at least `threshold` similar, or −1 for a row that stays.

    `signatures`, (rows, P), may be a memory map: its columns are read band by band. `texts(row)` is asked for only
    where the signatures are near the threshold or above. `considered`, (rows,) bool, leaves out rows that are gone
    already: others do not go for them. Rows of `stay`, (rows,) bool, stay whatever they are like, and others go for
    them.
    """
    if not 0 < threshold <= 1:
        raise UserError(f"The threshold for near duplicates is {threshold}; it must be above 0 and at most 1.")
    permutations = signatures.shape[1]
    groups, sizes = _groups_by_band(signatures, *choose_bands(threshold, permutations), considered)
    standard_error = math.sqrt(threshold * (1 - threshold) / permutations)
    needed = (threshold - 3 * standard_error) * permutations

    @functools.lru_cache(maxsize=1024)
    def shingles(row: int) -> set[str]:
        return shingles_of(texts(row), shingle_size)

    kept = _KeptRows(sizes)
    found = numpy.full(len(signatures), -1, dtype=numpy.int64)
    rows = numpy.flatnonzero((groups >= 0).any(axis=1))
    if stay is not None:  # first, so that all others are compared with them
        rows = rows[numpy.argsort(~stay[rows], kind="stable")]
    for row in rows.tolist():
        own = groups[row][groups[row] >= 0]
        if stay is None or not stay[row]:
            candidates = kept.sharing(own)
            agreement = numpy.count_nonzero(signatures[candidates] == signatures[row], axis=1)
            near = candidates[agreement >= needed].tolist()
            found[row] = next((it for it in near if _jaccard(shingles(row), shingles(it)) >= threshold), -1)
        if found[row] < 0:
            kept.add(row, own)
    return found


@functools.cache
def choose_bands(threshold: float, permutations: int) -> tuple[int, int]:
    """How many bands, and how many numbers in each: the longest with the promised recall. 0.8 → 18 bands of 7."""
    for size in range(permutations, 0, -1):
        bands = permutations // size
        if 1 - (1 - threshold**size) ** bands >= RECALL_AT_THRESHOLD:
            return bands, size
    return permutations, 1


class _KeptRows:
    """For each group of rows that share a band, those that stay; all in one array, of which each group has a part."""

    def __init__(self, sizes: numpy.ndarray) -> None:
        self.starts = numpy.concatenate(([0], numpy.cumsum(sizes)[:-1])) if len(sizes) else sizes
        self.ends = self.starts.copy()
        self.rows = numpy.empty(int(sizes.sum()), dtype=numpy.int32)

    def sharing(self, groups: numpy.ndarray) -> numpy.ndarray:
        """Kept rows in any of these groups, ascending; of too many, those that are in most of them."""
        parts = zip(self.starts[groups].tolist(), self.ends[groups].tolist(), strict=True)
        sharing = numpy.concatenate([self.rows[start:end] for start, end in parts])
        rows, counts = numpy.unique(sharing, return_counts=True)
        if len(rows) > MOST_COMPARED:
            rows = numpy.sort(rows[numpy.argsort(-counts, kind="stable")[:MOST_COMPARED]])
        return rows

    def add(self, row: int, groups: numpy.ndarray) -> None:
        self.rows[self.ends[groups]] = row
        self.ends[groups] += 1


def _groups_by_band(
    signatures: numpy.ndarray, bands: int, size: int, considered: numpy.ndarray | None
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(rows, bands) int32, the number of the group that a row is in by this band, or −1 if it is alone; (groups,)
    sizes."""
    rows = numpy.arange(len(signatures)) if considered is None else numpy.flatnonzero(considered)
    groups = numpy.full((len(signatures), bands), -1, dtype=numpy.int32)
    sizes = [numpy.zeros(0, dtype=numpy.int64)]
    count = 0
    for band in range(bands):
        keys = numpy.zeros(len(signatures), dtype=numpy.uint64)
        for start in range(0, len(signatures), ROWS_AT_ONCE):
            part = keys[start : start + ROWS_AT_ONCE]
            columns = signatures[start : start + ROWS_AT_ONCE, band * size : (band + 1) * size]
            for numbers in numpy.array(columns, dtype=numpy.uint64).T:
                part *= _FACTOR
                part += numbers
        keys = scattered(keys)[rows]
        order = numpy.argsort(keys, kind="stable")
        keys = keys[order]
        new = numpy.ones(len(keys), dtype=bool)
        new[1:] = keys[1:] != keys[:-1]
        size_of_group = numpy.diff(numpy.append(numpy.flatnonzero(new), len(keys)))
        shared = size_of_group > 1
        number = numpy.where(shared, numpy.cumsum(shared) - 1 + count, -1)
        groups[rows[order], band] = numpy.repeat(number, size_of_group)
        sizes.append(size_of_group[shared])
        count += int(shared.sum())
    return groups, numpy.concatenate(sizes)


def _jaccard(first: set[str], second: set[str]) -> float:
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)
