"""A text in; its sentences, or pieces that fit a limit, out. Joined they are the text again, byte for byte.

    sentences_of("Dr. Kim left.  Why?\\n", "en")       ["Dr. Kim left.  ", "Why?\\n"]
    lines_and_sentences("# News\\n- It rains. Go.", "en")
        gaps ["# ", "\\n- ", " ", ""], pieces ["News", "It rains.", "Go."]

Sentence ends are found by sentencex (Wikimedia: rules and abbreviations, most languages, 4 MB), for Thai, which has no
mark at the end of a sentence, by PyThaiNLP (a conditional random field over words). On 175 paragraphs of known
sentences, 97 % of the ends found are right in English and 91 % in Korean, and 97 % and 95 % of all ends are found
(benchmarks/sentence_ends.py). A no-break space after an initial ends sentencex 1.0.32 with an error, so it reads plain
blanks in place of other white space.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import regex

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.language_names import UnknownLanguage, english_name, language_code

THAI = "th"
WITHOUT_SPLITTER = {"bo", "dz", "km", "lo"}
"""Languages whose sentence ends neither library knows: tried on the marks of each."""
BLANKS = regex.compile(r"[^\S\n ]")
WHITE_SPACE = regex.compile(r"\s*")
CLAUSES = regex.compile(r"(?:[^,;:،؛、，；：]|[,;:،؛](?!\s))*(?:[,;:،؛、，；：]\s*|$)", regex.DOTALL)
WORDS = regex.compile(r"\s*\S+\s*|\s+")
CHARACTERS = regex.compile(r"\X")
INSIDE = (CLAUSES, WORDS, CHARACTERS)
"""Where a sentence over the limit is cut: at clause marks, else at white space, else between characters."""
SPEECH_GOES_ON = regex.compile(r"[\"”'’」』]\s*(?:이?라|하)(?:고|며|는|면서)")
"""Korean puts the verb of saying behind a quotation, in the same sentence: `"왜요?" 라고 물었다.`"""
LINE = regex.compile(r"[^\n\r]*(?:\r\n|\n|\r|$)")
LINE_MARKS = regex.compile(r"\s*(?:(?:[-*+•‣◦▪>]|#{1,6}|\d{1,2}[.)])[^\S\n\r]+)*")
"""White space, and the marks of lists, headings and quotations at the start of a line."""
HAS_WORDS = regex.compile(r"[\p{L}\p{N}]")


class NoRoom(ValueError):
    """Not even one character fits beside the rest of the prompt."""


class NoSplitter(UserError):
    """A text has to be cut at sentence ends, which cannot be found."""


class Pieces(NamedTuple):
    """`gaps[0] + texts[0] + gaps[1] + … + gaps[-1]` is the text that was cut."""

    gaps: list[str]
    texts: list[str]
    cut_sentences: int = 0
    """Sentences that were over the limit by themselves, and were cut inside."""


def splitter(language: str) -> Callable[[str], list[str]]:
    """What cuts a text of this language into sentences, between which white space may be missing.

    Raises:
        NoSplitter: the language is "" or unknown, has no splitter, or its library is not installed.
    """
    if not language:
        raise NoSplitter(
            "texts are cut at sentence ends, and their language is not given. Give --source_language or this column."
        )
    try:
        code = language_code(language)
    except UnknownLanguage as error:
        raise NoSplitter(str(error)) from None
    if code in WITHOUT_SPLITTER:
        raise NoSplitter(
            f"there is no sentence splitter for {english_name(language)} here. Cut the texts into rows, and generate "
            "without --long."
        )
    try:
        if code == THAI:
            import pycrfsuite  # noqa: F401  PyThaiNLP's own error is a traceback
            from pythainlp.tokenize import sent_tokenize

            return partial(sent_tokenize, engine="crfcut")
        import sentencex

        return partial(sentencex.segment, code)
    except ImportError as error:
        extra = "thai" if code == THAI else "documents"
        raise NoSplitter(
            f"the sentence splitter for {language} is not installed. Install it: pip install 'diptych[{extra}]'"
        ) from error


def sentences_of(text: str, language: str) -> list[str]:
    """Each with the white space behind it, the first with that before it. NoSplitter as of `splitter`."""
    return _sentences(text, splitter(language))


def _sentences(text: str, split: Callable[[str], list[str]]) -> list[str]:
    read = BLANKS.sub(" ", text)
    ends, end = [], 0
    for sentence in split(read):  # a library may drop white space around sentences
        if sentence := sentence.strip():
            end = read.index(sentence, end) + len(sentence)
            ends.append(end)
    ends = [end for end in ends if not SPEECH_GOES_ON.match(text, end - 1)]
    starts = [0, *(WHITE_SPACE.match(text, end).end() for end in ends[:-1]), len(text)]
    return [text[start:end] for start, end in zip(starts, starts[1:], strict=False) if start < end]


def lines_and_sentences(text: str, language: str) -> Pieces:
    """A piece for each sentence. Lines end sentences. White space, marks of lists and headings at the start of a
    line, and what has no letter and no digit are gaps."""
    split = splitter(language)
    parts = []
    for line in LINE.findall(text):
        mark = LINE_MARKS.match(line).end()
        parts += [(line[:mark], False), *((sentence, True) for sentence in _sentences(line[mark:], split))]
    return _pieces(parts)


def filled(text: str, language: str, fits: Callable[[str], bool]) -> Pieces:
    """As few pieces as fit, cut at sentence ends."""
    cut = fit(sentences_of(text, language), fits)
    units = [unit for units in cut for unit in units]
    pieces = _pieces([(piece, True) for piece in merged(units, fits)])
    return pieces._replace(cut_sentences=sum(len(units) > 1 for units in cut))


def within(pieces: Pieces, fits: Callable[[str], bool]) -> Pieces:
    """The pieces, those that do not fit cut inside."""
    cut = fit(pieces.texts, fits)
    parts = [(pieces.gaps[0], False)]
    for units, gap in zip(cut, pieces.gaps[1:], strict=True):
        parts += [*((unit, True) for unit in units), (gap, False)]
    return _pieces(parts)._replace(cut_sentences=sum(len(units) > 1 for units in cut))


def fit(texts: list[str], fits: Callable[[str], bool]) -> list[list[str]]:
    """Each text as itself, or cut inside into as few parts as fit. NoRoom if a character does not fit."""

    def cut(text: str, marks: tuple[Any, ...]) -> list[str]:
        if fits(text):
            return [text]
        if not marks:
            raise NoRoom(text)
        units = [part for unit in filter(None, marks[0].findall(text)) for part in cut(unit, marks[1:])]
        return merged(units, fits)

    return [cut(text, INSIDE) for text in texts]


def merged(units: list[str], fits: Callable[[str], bool]) -> list[str]:
    """Neighbours put together as long as they fit; each unit fits by itself."""
    found, first = [], 0
    while first < len(units):
        count, step = 1, 1
        while step:  # twice as many, until they do not fit; then half as many
            more = count + step
            if first + more <= len(units) and fits("".join(units[first : first + more])):
                count, step = more, 2 * step
            else:
                step //= 2
        found.append("".join(units[first : first + count]))
        first += count
    return found


def _pieces(parts: list[tuple[str, bool]]) -> Pieces:
    """Of texts in order, and whether each is to be generated."""
    gaps, texts = [""], []
    for text, is_read in parts:
        inner = text.strip()
        if not is_read or not HAS_WORDS.search(inner):
            gaps[-1] += text
            continue
        before, _, after = text.partition(inner)
        gaps[-1] += before
        texts.append(inner)
        gaps.append(after)
    return Pieces(gaps, texts)
