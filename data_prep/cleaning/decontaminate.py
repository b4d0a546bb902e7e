"""Train rows that hold a text of an evaluation set, found by runs of words that both have.

    index = EvalIndex.from_records(records of the test file)
    index.overlap("Q: WHAT is the capital   of France, the country in Europe whose flag is blue, white, red?")
        → Overlap(words="what is the capital of france the country in europe whose flag is", text=17)
    Decontaminate(index).check(record) → None, or ("overlaps the evaluation data", "The source shares … with test:18.")

As GPT-3 did it (Brown et al. 2020, appendix C), words are compared without case and punctuation, a run of 13 words is
an overlap, and a text of 8 to 12 words is a run by itself. A shorter text says too little to be looked for inside
others ("n = 5" is in every second exercise); a row of which no text is longer goes only if it is the evaluation row:
the same instruction and input, or the same input and output, in either direction. A line of plain text is also looked
for as the whole source of a row, however short; as a target, "Yes." says nothing. Runs that stand in more than ten
evaluation texts are boilerplate and do not count (GPT-3 counted them in the training data), nor do runs of which less
than half are different words with a letter: "0 0 0 0 …", "arr j arr j 1 let temp arr j arr j arr".

Words are what Unicode's default rules say (UAX 29, 4.1): Korean is divided at spaces, Han characters and Hiragana are
a word each, Katakana and Latin runs are one. Thai, Lao, Khmer and Burmese need a dictionary; here their words are what
stands between spaces and signs, so that few runs are long enough and little but whole rows is found.

None of Tatoeba's 3,318 pairs overlaps CodeAlpaca's 2,017 rows (18 µs a row), nor the other way round (69 µs). Of
CodeAlpaca's second half 27 rows share a run with the first, all of it textbook code and markup: "def is_prime(n): …".
Since signs do not count, rows that differ in nothing but an operator are one row here.
"""

from __future__ import annotations

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
"""Stands before the words of a text that counts by itself, as no word does: it is no row of that instruction."""


class PlainText(NamedTuple):
    """A line of a file of nothing but texts: nobody knows whether it is an input, an answer or both."""

    text: str
    origin: Origin


class Overlap(NamedTuple):
    words: str
    """What both have, as it is compared: "the quick brown fox …"."""
    text: int
    """Which evaluation text, from 0; the first one that has it."""


@dataclass(frozen=True, eq=False)
class EvalIndex:
    """What evaluation texts consist of, as sorted 64-bit keys: 12 bytes a run with the text that it is from."""

    ngram: int
    lengths: tuple[int, ...]
    """Of the runs, in words, ascending: those of 8 to 12 that some text has, and 13."""
    runs: numpy.ndarray
    """(runs,) uint64, ascending."""
    run_texts: numpy.ndarray
    """(runs,) int32, the first text that has it."""
    wholes: numpy.ndarray
    """(wholes,) uint64, ascending, from `_whole_key`."""
    whole_texts: numpy.ndarray
    """(wholes,) int32."""
    names: tuple[str, ...] = ()
    """Of the texts, for messages: "test.jsonl:18"."""

    @classmethod
    def from_texts(cls, texts: Iterable[str], ngram: int = LONGEST_RUN, names: Sequence[str] = ()) -> EvalIndex:
        return cls._build((([words], [words]) for words in map(words_of, texts)), ngram, names)

    @classmethod
    def from_records(cls, records: Iterable[Record | PlainText], ngram: int = LONGEST_RUN) -> EvalIndex:
        names: list[str] = []

        def rows() -> Iterator[tuple[list[Words], list[Words]]]:
            for record in records:
                names.append(str(record.origin))
                if isinstance(record, PlainText):
                    words = words_of(record.text)
                    yield [words], [[ALONE, *words]] if words else []
                    continue
                texts = _RecordWords.of(record)
                yield [texts.source, texts.output], texts.wholes()

        return cls._build(rows(), ngram, names)

    @classmethod
    def _build(cls, rows: Iterable[tuple[list[Words], list[Words]]], ngram: int, names: Sequence[str]) -> EvalIndex:
        """Of each row, the texts to take runs of and the texts that count as a whole."""
        if ngram < 2:
            raise UserError(
                f"A run of {ngram} word would be in nearly every text. Allowed: 2 and more; usual: 8 to 13."
            )
        lengths, runs, wholes = {ngram}, _Keys(), _Keys()
        seen: set[int] = set()
        for row, (texts, whole_texts) in enumerate(rows):
            wholes.add([key for words in whole_texts if (key := _whole_key(words))], row)
            for words in texts:
                length = min(len(words), ngram)
                key = _whole_key(words)
                if length < min(SHORTEST_RUN, ngram) or key in seen:  # repeated texts are no boilerplate
                    continue
                seen.add(key)
                lengths.add(length)
                ((_, keys),) = _run_keys(_hashes(words), (length,))
                runs.add(keys[[_says_something(words[start : start + length]) for start in range(len(keys))]], row)
        return cls(
            ngram, tuple(sorted(lengths)), *runs.sorted(most=BOILERPLATE_TEXTS), *wholes.sorted(), names=tuple(names)
        )

    def overlap(self, text: str) -> Overlap | None:
        """What the text shares with an evaluation text: all of it, or the first of the longest runs."""
        words = words_of(text)
        return self.equal(words) or self.shared_run(words)

    def equal(self, words: Words) -> Overlap | None:
        found = _find(self.wholes, numpy.array([_whole_key(words)], dtype=numpy.uint64))
        return Overlap(" ".join(words[: self.ngram]).strip(), int(self.whole_texts[found[1]])) if found else None

    def shared_run(self, words: Words) -> Overlap | None:
        longest = None
        if len(words) >= self.lengths[0]:
            for length, keys in _run_keys(_hashes(words), self.lengths):
                if found := _find(self.runs, keys):
                    start, place = found
                    longest = Overlap(" ".join(words[start : start + length]), int(self.run_texts[place]))
        return longest

    def fraction(self, text: str) -> float:
        """What part of the text's words stand in runs that an evaluation text has (as in Touvron et al. 2023, A.6)."""
        words = words_of(text)
        if self.equal(words):
            return 1.0
        covered = numpy.zeros(max(1, len(words)), dtype=bool)
        for length, keys in _run_keys(_hashes(words), self.lengths):
            for start in numpy.flatnonzero(_are_in(self.runs, keys)).tolist():
                covered[start : start + length] = True
        return float(covered.mean())

    def name(self, text: int) -> str:
        return self.names[text] if self.names else f"evaluation text {text + 1}"


@dataclass(frozen=True, eq=False)
class Decontaminate:
    """A row goes if it is an evaluation row, or if one of its texts shares a run of words with one."""

    index: EvalIndex

    def check(self, record: Record) -> Complaint | None:
        texts = _RecordWords.of(record)
        for words in texts.wholes():
            if found := self.index.equal(words):
                return self._complaint("row is the same as", found)
        if found := self.index.equal([ALONE, *texts.source]):
            return self._complaint("source is the same as", found)
        sides = [("source", texts.source), ("target", texts.output), *(("history", words) for words in texts.history)]
        for side, words in sides:
            if found := self.index.shared_run(words):
                return self._complaint(f"{side} shares a run of words with", found)
        return None

    def _complaint(self, what: str, found: Overlap) -> Complaint:
        return "overlaps the evaluation data", f"The {what} {self.index.name(found.text)}: “{found.words}”."


class _RecordWords(NamedTuple):
    """The words of a record's texts, each divided once."""

    history: list[Words]
    instruction: Words
    input: Words
    output: Words

    @classmethod
    def of(cls, record: Record) -> _RecordWords:
        history = [words_of(text) for turn in record.history for text in turn]
        return cls(history, words_of(record.instruction), words_of(record.input), words_of(record.output))

    @property
    def source(self) -> Words:
        return self.input or self.instruction

    def wholes(self) -> list[Words]:
        """What makes two rows the same: history, instruction and input; or input and output, in either order."""
        found = [[*chain.from_iterable(self.history), *self.instruction, *self.input]]
        if self.input and self.output and not self.history:
            found.append([*chain.from_iterable(sorted((self.input, self.output)))])
        return found


def words_of(text: str) -> Words:
    """`"The NBA, 어제 봤다! 東京"` → `["the", "nba", "어제", "봤다", "東", "京"]`."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _WORD.findall(text.casefold())


def _says_something(words: Sequence[str]) -> bool:
    """At least half of them are different words with a letter."""
    return 2 * sum(not word.isnumeric() for word in set(words)) >= len(words)


class _Keys:
    """Keys as they come, each with its row."""

    def __init__(self) -> None:
        self.keys: list[numpy.ndarray] = []
        self.rows: list[int] = []

    def add(self, keys: Sequence[int] | numpy.ndarray, row: int) -> None:
        self.keys.append(numpy.unique(numpy.asarray(keys, dtype=numpy.uint64)))
        self.rows.append(row)

    def sorted(self, most: int | None = None) -> tuple[numpy.ndarray, numpy.ndarray]:
        """(keys,) ascending and each one's first row; those of more than `most` rows are left out."""
        if not self.keys:
            return numpy.zeros(0, dtype=numpy.uint64), numpy.zeros(0, dtype=numpy.int32)
        rows = numpy.repeat(numpy.array(self.rows, dtype=numpy.int32), [len(keys) for keys in self.keys])
        keys, first, counts = numpy.unique(numpy.concatenate(self.keys), return_index=True, return_counts=True)
        wanted = slice(None) if most is None else counts <= most
        return keys[wanted], rows[first][wanted]


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


def _are_in(keys: numpy.ndarray, wanted: numpy.ndarray) -> numpy.ndarray:
    if not len(keys):
        return numpy.zeros(len(wanted), dtype=bool)
    return keys[numpy.minimum(numpy.searchsorted(keys, wanted), len(keys) - 1)] == wanted


def _find(keys: numpy.ndarray, wanted: numpy.ndarray) -> tuple[int, int] | None:
    """The place in `wanted` of the first that is among the sorted keys, and its place there."""
    found = numpy.flatnonzero(_are_in(keys, wanted))
    return (int(found[0]), int(numpy.searchsorted(keys, wanted[found[0]]))) if len(found) else None
