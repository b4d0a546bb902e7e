"""Which rows a user wants, by length, language and JSON schema; and a text's script and Unicode form, for the report.

    LengthFilter(maximum_source=2000, minimum_target=2).check(record)   None, or ("target too short", "output has 1 …")
    LanguageFilter(("en",), ("ko",)).check(record)                      None, or ("source language", "… 'ja', not en")
    script_of("안녕, Tom!")                                              "Hangul", in 1 µs

A filter is a frozen value that travels to the workers; `check(record)` is pure. The source of a row is its input, or
its instruction where there is no input: an instruction that all rows share says nothing of a row. Of a pair of
answers, the chosen one counts: a wrong language may be why the other one was rejected.
"""

from __future__ import annotations

import functools
import unicodedata
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import regex

from diptych.data_prep.command_line.errors import UserError, nearest
from diptych.data_prep.rows.json_schema import as_written, fault_of
from diptych.data_prep.rows.records import Record
from diptych.data_prep.rows.text_language import NO_LANGUAGE, known_languages, language_of

if TYPE_CHECKING:
    import numpy

Complaint = tuple[str, str]
"""The kind, the same for all rows with this fault, and the reason, which tells of this row."""

SCRIPTS = (
    "none Latin Hangul Han Hiragana Katakana Cyrillic Arabic Devanagari Greek Hebrew Thai Bengali Tamil Telugu Kannada"
    " Malayalam Gujarati Gurmukhi Sinhala Armenian Georgian Ethiopic Khmer Lao Myanmar Tibetan Mongolian other"
).split()
LAST_LETTER = 0x33480  # behind it, Unicode 17 has no letters

_ASCII_LETTER = regex.compile("[A-Za-z]")


@dataclass(frozen=True)
class LengthFilter:
    """Bounds, both included; None is no bound."""

    unit: str = "characters"
    """"characters" or "words" (what white space divides)."""
    minimum_source: int | None = None
    """Shortest source that is kept: the input, or the instruction where there is none."""
    maximum_source: int | None = None
    """Longest one."""
    minimum_target: int | None = None
    """Shortest target that is kept."""
    maximum_target: int | None = None
    """Longest one."""
    minimum_ratio: float | None = None
    """Lowest length of the target over that of the source."""
    maximum_ratio: float | None = None
    """Highest one."""

    def __post_init__(self) -> None:
        if self.unit not in ("characters", "words"):
            raise UserError(f"Lengths are counted in characters or words, not in '{self.unit}'.")
        for name in ("source", "target", "ratio"):
            low, high = getattr(self, f"minimum_{name}"), getattr(self, f"maximum_{name}")
            if low is not None and high is not None and low > high:
                raise UserError(f"minimum_{name} is {low}, above maximum_{name}, {high}: no row could be kept.")

    def check(self, record: Record) -> Complaint | None:
        lengths = {"source": self._length(source_text(record)), "target": self._length(record.output)}
        for side, length in lengths.items():
            low, high = getattr(self, f"minimum_{side}"), getattr(self, f"maximum_{side}")
            if low is not None and length < low:
                return f"{side} too short", f"The {side} has {length:,} {self.unit}, fewer than {low:,}."
            if high is not None and length > high:
                return f"{side} too long", f"The {side} has {length:,} {self.unit}, more than {high:,}."
        source, target = lengths.values()
        ratio = target / max(source, 1)
        counts = f"The target has {target:,} {self.unit}, the source {source:,}: {ratio:.2f} times as many"
        if self.minimum_ratio is not None and ratio < self.minimum_ratio:
            return "target short for its source", f"{counts}, below {self.minimum_ratio:g}."
        if self.maximum_ratio is not None and ratio > self.maximum_ratio:
            return "target long for its source", f"{counts}, above {self.maximum_ratio:g}."
        return None

    def _length(self, text: str) -> int:
        return len(text) if self.unit == "characters" else len(text.split())


@dataclass(frozen=True)
class LanguageFilter:
    """ISO 639-1 codes of the languages wanted, such as ("en",); an empty side is not judged."""

    source: tuple[str, ...] = ()
    target: tuple[str, ...] = ()
    minimum_confidence: float = 0.7
    """A text goes only if it is another language with at least this probability. Short texts seldom reach it."""

    def __post_init__(self) -> None:
        known = known_languages()
        for code in (*self.source, *self.target):
            if code not in known:
                guess = nearest(code, known, cutoff=0.5)
                raise UserError(
                    f"'{code}' is no language that py3langid knows{f'; did you mean {guess!r}?' if guess else '.'}"
                    f" It knows: {', '.join(sorted(known))}."
                )
        if not 0 <= self.minimum_confidence <= 1:
            raise UserError(f"The confidence is {self.minimum_confidence}; it must lie between 0 and 1.")

    def check(self, record: Record) -> Complaint | None:
        for side, text, wanted in (
            ("source", source_text(record), self.source),
            ("target", record.output, self.target),
        ):
            language, confidence = language_of(text) if wanted else (NO_LANGUAGE, 0.0)
            if language not in (*wanted, NO_LANGUAGE) and confidence >= self.minimum_confidence:
                return (
                    f"{side} in another language",
                    f"The {side} is '{language}' (confidence {confidence:.2f}), not {' or '.join(wanted)}.",
                )
        return None


@dataclass(frozen=True)
class SchemaFilter:
    """Rows whose output is JSON of a schema. The answer that a pair rejects, or that is marked as not liked, may be
    anything."""

    schema: str
    """In JSON, so that it can be hashed and sent to workers."""

    def check(self, record: Record) -> Complaint | None:
        fault = None if record.mark < 0 else fault_of(record.output, self.schema)
        if fault is not None:
            return "target not of the JSON schema", f"The target is not of it: {fault.rstrip('.')}."
        if record.rejected and record.rejected != record.output:
            formed = self.formed(record)
            if formed.rejected == formed.output:
                return "same value in both answers", "Both answers are the same JSON: neither is preferred."
        return None

    def formed(self, record: Record) -> Record:
        """With answers that are JSON of the schema in the form that outputs of the schema have."""

        def form(text: str, fits: bool) -> str:
            return as_written(text, self.schema) if fits or text and fault_of(text, self.schema) is None else text

        return replace(record, output=form(record.output, record.mark >= 0), rejected=form(record.rejected, False))


def source_text(record: Record) -> str:
    """The input, or the instruction of a row without one."""
    return record.input if record.input.strip() else record.instruction


def is_composed(record: Record) -> bool:
    """Whether all its texts are in Unicode's form NFC, which writes 각 as one character, not as three jamo (NFD)."""
    texts = (record.instruction, record.input, record.output, record.rejected, record.system)
    earlier = (text for turn in record.history for text in turn)
    return all(unicodedata.is_normalized("NFC", text) for text in (*texts, *earlier))


def script_of(text: str) -> str:
    """The Unicode script of most letters of the text, the first one on a tie; "none" for a text without letters."""
    if text.isascii():
        return "Latin" if _ASCII_LETTER.search(text) else "none"
    import numpy  # here, because `prepare --help` imports this file

    code_points = numpy.frombuffer(text.encode("utf-32-le", "surrogatepass"), numpy.uint32)
    letters = _script_of_code_point().take(code_points, mode="clip").tobytes().translate(None, b"\0")
    if not letters:
        return "none"
    first = letters[0]
    if letters.count(first) * 2 < len(letters):
        first = max(dict.fromkeys(letters), key=letters.count)
    return SCRIPTS[first]


@functools.cache
def _script_of_code_point() -> numpy.ndarray:
    """(code points,) uint8, the place in SCRIPTS of each letter, 0 for all else. Made in 0.1 s, 210 KB."""
    import numpy

    named = "|".join(rf"(?P<{script}>[\p{{Script={script}}}&&\p{{L}}]+)" for script in SCRIPTS[1:-1])
    letters = regex.compile(rf"{named}|(?P<other>[\p{{L}}--[\p{{Common}}\p{{Inherited}}]])", regex.V1)
    table = numpy.zeros(LAST_LETTER, dtype=numpy.uint8)
    for run in letters.finditer("".join(map(chr, range(LAST_LETTER - 1)))):
        table[run.start() : run.end()] = SCRIPTS.index(run.lastgroup)
    return table
