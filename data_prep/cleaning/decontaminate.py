"""Train rows that hold a text of an evaluation set, found by runs of words that both have.

    check = Decontaminate.from_records(records of the test file).check
    check(record)      None, or ("overlaps the evaluation data", "The source shares a run of words with test:18: “…”.")

As GPT-3 did it (Brown et al. 2020, appendix C), words are compared without case and punctuation, a run of 13 words is
an overlap, and a text of 8 to 12 words is a run by itself. A shorter text says too little to be looked for inside
others ("n = 5" is in every second exercise). A row of which no text is longer goes only if it is the evaluation row:
the same instruction and input, or the same input and output, in either direction. A line of plain text is also looked
for as the whole source of a row, however short; as a target, "Yes." says nothing. Runs that stand in more than ten
evaluation texts are boilerplate and do not count, nor do runs of which less than half are different words with a
letter: "0 0 0 0 …", "arr j arr j 1 let temp arr j arr j arr".

Words are what Unicode's default rules say (UAX 29, 4.1): Korean is divided at spaces, Han characters and Hiragana are
a word each, Katakana and Latin runs are one. Thai, Lao, Khmer and Burmese need a dictionary; here their words are what
stands between spaces and signs, so that few runs are long enough and little but whole rows is found. Since signs do
not count, rows that differ in nothing but an operator are one row here.

None of Tatoeba's 3,318 pairs overlaps CodeAlpaca's 2,017 rows (18 µs a row), nor the other way round (69 µs). Of
CodeAlpaca's second half 27 rows share a run with the first, all of it textbook code and markup: "def is_prime(n): …".
"""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy
import regex
import xxhash

from diptych.data_prep.cleaning.filters import Complaint
from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.records import Origin, Record

LONGEST_RUN = 13
SHORTEST_RUN = 8
BOILERPLATE_TEXTS = 10
_FACTOR = numpy.uint64(0x9E3779B97F4A7C15)

_CHARACTER_WORDS = r"\p{Han}\p{Hiragana}"
_WORD = regex.compile(rf"[{_CHARACTER_WORDS}]|[[\p{{L}}\p{{M}}\p{{N}}]--[{_CHARACTER_WORDS}]]+", regex.V1)

Words = list[str]
ALONE = ""
"""Stands before the words of a plain text, as no word does, so that its key is not that of a row."""


class PlainText(NamedTuple):
    """A line of a file of texts: nobody knows whether it is an input, an answer or both."""

    text: str
    origin: Origin


Overlap = tuple[str, int]
"""What both have, as it is compared ("the quick brown fox …"), and which evaluation text, from 0, is the first with
it."""


@dataclass(frozen=True, eq=False)
class Decontaminate:
    """Evaluation texts as sorted 64-bit keys: 12 bytes a run with the text that it is from. A row goes if it is an
    evaluation row, or if one of its texts shares a run of words with one."""

    ngram: int
    lengths: tuple[int, ...]
    """Of the runs, in words, ascending: those of 8 to 12 that some text has, and `ngram`."""
    runs: numpy.ndarray
    """(runs,) uint64, ascending."""
    run_texts: numpy.ndarray
    """(runs,) int32, the first text that has it."""
    wholes: numpy.ndarray
    """(wholes,) uint64, ascending, from `_whole_key`."""
    whole_texts: numpy.ndarray
    """(wholes,) int32."""
    names: tuple[str, ...]
    """Of the texts, for messages: "test.jsonl:18"."""

    @classmethod
    def from_records(cls, records: Iterable[Record | PlainText], ngram: int = LONGEST_RUN) -> "Decontaminate":
        if ngram < 2:
            raise UserError(
                f"A run of {ngram} word would be in nearly every text. Allowed: 2 and more; usual: 8 to 13."
            )
        names, lengths, seen = [], {ngram}, set()
        runs: list[tuple[int, numpy.ndarray]] = []
        wholes: list[tuple[int, numpy.ndarray]] = []
        for row, record in enumerate(records):
            names.append(str(record.origin))
            if isinstance(record, PlainText):
                texts = [words_of(record.text)]
                whole_texts = [[ALONE, *texts[0]]] if texts[0] else []
            else:
                words = _RecordWords.of(record)
                texts, whole_texts = [words.source, words.output, words.rejected], words.wholes()
            keys = [key for words in whole_texts if (key := _whole_key(words))]
            wholes.append((row, numpy.array(keys, dtype=numpy.uint64)))
            for words in texts:
                length, key = min(len(words), ngram), _whole_key(words)
                if length < min(SHORTEST_RUN, ngram) or key in seen:  # repeated texts are no boilerplate
                    continue
                seen.add(key)
                lengths.add(length)
                ((_, keys),) = _run_keys(_hashes(words), (length,))
                found = (words[start : start + length] for start in range(len(keys)))
                is_telling = [2 * sum(not word.isnumeric() for word in set(run)) >= length for run in found]
                runs.append((row, keys[is_telling]))
        return cls(ngram, tuple(sorted(lengths)), *_sorted(runs, BOILERPLATE_TEXTS), *_sorted(wholes), tuple(names))

    def check(self, record: Record) -> Complaint | None:
        texts = _RecordWords.of(record)
        for what, find, words in (
            *(("row is the same as", self.equal, words) for words in texts.wholes()),
            ("source is the same as", self.equal, [ALONE, *texts.source]),
            ("source shares a run of words with", self.shared_run, texts.source),
            ("target shares a run of words with", self.shared_run, texts.output),
            ("rejected answer shares a run of words with", self.shared_run, texts.rejected),
            *(("history shares a run of words with", self.shared_run, words) for words in texts.history),
        ):
            if found := find(words):
                return "overlaps the evaluation data", f"The {what} {self.names[found[1]]}: “{found[0]}”."
        return None

    def equal(self, words: Words) -> Overlap | None:
        found = _find(self.wholes, numpy.array([_whole_key(words)], dtype=numpy.uint64))
        return (" ".join(words[: self.ngram]).strip(), int(self.whole_texts[found[1]])) if found else None

    def shared_run(self, words: Words) -> Overlap | None:
        """The first of the longest runs that an evaluation text has."""
        longest = None
        if len(words) >= self.lengths[0]:
            for length, keys in _run_keys(_hashes(words), self.lengths):
                if found := _find(self.runs, keys):
                    start, place = found
                    longest = (" ".join(words[start : start + length]), int(self.run_texts[place]))
        return longest


class _RecordWords(NamedTuple):
    """The words of a record's texts."""

    history: list[Words]
    instruction: Words
    input: Words
    output: Words
    rejected: Words

    @classmethod
    def of(cls, record: Record) -> "_RecordWords":
        history = [words_of(text) for turn in record.history for text in turn]
        texts = (record.instruction, record.input, record.output, record.rejected)
        return cls(history, *map(words_of, texts))

    @property
    def source(self) -> Words:
        return self.input or self.instruction

    def wholes(self) -> list[Words]:
        """What makes two rows the same: history, instruction and input; or input and output, in either order."""
        found = [[*chain.from_iterable(self.history), *self.instruction, *self.input]]
        for answer in (self.output, self.rejected):
            if self.input and answer and not self.history:
                found.append([*chain.from_iterable(sorted((self.input, answer)))])
        return found


def words_of(text: str) -> Words:
    """`"The NBA, 어제 봤다! 東京"` → `["the", "nba", "어제", "봤다", "東", "京"]`."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _WORD.findall(text.casefold())


def _hashes(words: Sequence[str]) -> numpy.ndarray:
    """(words,) uint64."""
    digest = xxhash.xxh3_64_intdigest
    return numpy.array([digest(word.encode("utf-8", "surrogatepass")) for word in words], dtype=numpy.uint64)


def _run_keys(hashes: numpy.ndarray, lengths: Sequence[int]) -> Iterator[tuple[int, numpy.ndarray]]:
    """For each of the ascending lengths that fits, a key for each run of so many words: (words − length + 1,) uint64.

    Key of a run = ((w₁ · f + w₂) · f + w₃) …, so that each longer run goes on from the shorter one.
    """
    keys, words = hashes, 1
    for length in lengths:
        if length > len(hashes):
            return
        while words < length:
            keys = keys[:-1] * _FACTOR
            keys += hashes[words:]
            words += 1
        yield length, keys


def _whole_key(words: Sequence[str]) -> int:
    """0 for a text without words, which equals no other."""
    return xxhash.xxh3_64_intdigest(" ".join(words).encode("utf-8", "surrogatepass")) if words else 0


def _sorted(found: list[tuple[int, numpy.ndarray]], most: int | None = None) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Of (row, keys): (keys,) ascending and each one's first row; keys of more than `most` rows are left out."""
    if not found:
        return numpy.zeros(0, dtype=numpy.uint64), numpy.zeros(0, dtype=numpy.int32)
    unique = [numpy.unique(keys) for _, keys in found]
    rows = numpy.repeat(numpy.array([row for row, _ in found], dtype=numpy.int32), [len(keys) for keys in unique])
    keys, first, counts = numpy.unique(numpy.concatenate(unique), return_index=True, return_counts=True)
    wanted = slice(None) if most is None else counts <= most
    return keys[wanted], rows[first][wanted]


def _find(keys: numpy.ndarray, wanted: numpy.ndarray) -> tuple[int, int] | None:
    """The place in `wanted` of the first that is among the sorted keys, and its place there."""
    if not len(keys):
        return None
    places = numpy.minimum(numpy.searchsorted(keys, wanted), len(keys) - 1)
    found = numpy.flatnonzero(keys[places] == wanted)
    return (int(found[0]), int(places[found[0]])) if len(found) else None
