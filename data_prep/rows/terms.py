"""Terms that an output must have, and what must come back unchanged, written into the source.

    terms = read_terms("terms.tsv")                      cat ⇥ 고양이, a term on each line
    found = terms.found("A cat.", Languages("en", "ko")) [Term(2, 5, "cat", "고양이")], by whole words
    with_marks("A cat.", found)                          "A cat [= 고양이]."
    missing(found, "고양이가 있다.")                      []
    masked("See <b>http://a.com</b>")                    "See [#1][#2][#3]", ["<b>", "http://a.com", "</b>"]
    unmasked("[#1][#2][#3] 참조", values)                "<b>http://a.com</b> 참조", []

The mark is the inline form of Dinu et al. 2019 (arXiv 1906.01105): the target term stands behind the source term. A
model learns to obey it from rows in which the target has the term. Marks and placeholders are plain text, so no
tokenizer has to be extended for them.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

import regex

from diptych.data_prep.command_line.errors import UserError, excerpt
from diptych.data_prep.rows.language_names import language_code, names_language
from diptych.data_prep.rows.records import Languages

COLUMNS = (
    "Each line has a term, a tab and its translation; and, if the file is for several pairs of languages, a tab and "
    "the language of each. With one pair, the first line may have its two languages."
)
COLUMN_NAMES = frozenset(
    "source target src tgt trg term translation source_term target_term source_language target_language source_lang"
    " target_lang src_lang tgt_lang".split()
)
NO_BLANKS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
LETTER = regex.compile(r"[\p{L}\p{N}\p{M}]")
MAY_FOLLOW_LETTERS = regex.compile(rf"[{NO_BLANKS}]|[^\p{{L}}\p{{N}}\p{{M}}]")
MAY_PRECEDE_LETTERS = regex.compile(rf"[{NO_BLANKS}\p{{Hangul}}]|[^\p{{L}}\p{{N}}\p{{M}}]")
START = 4
"""Characters by which terms are looked up."""
KEPT = regex.compile(
    r"\[#\d+\]"  # looks like a placeholder
    # Addresses. Other letters than Latin ones begin behind a mark only: `a.com/서울` is one, `a.com에` ends before 에.
    r"|(?:https?://|www\.)(?:[!#-&(-;=?-~\p{Latin}]|(?<=[/?=&#_%+-])[^\s\x00-\x7f、。]+)+(?<![.,;:!?)\]])"
    r"|[A-Za-z\d._%+-]+@[A-Za-z\d-]+(?:\.[A-Za-z\d-]+)+"
    r"|</?[A-Za-z][^<>]*>|\{\{[^{}]*\}\}|\{\w*\}|%(?:\(\w+\))?[sd]"  # tags and fields
    r"|(?<![A-Za-z\d.,])\d+(?:[.,:/-]\d+)+(?![A-Za-z\d])|(?<![A-Za-z\d.,])\d{2,}(?![A-Za-z\d])"  # numbers, but no 10th
)
LANGUAGE_LIKE = regex.compile(r"[A-Za-z]{2,3}([-_][A-Za-z]{2,4})*")
PLACEHOLDER = regex.compile(r"\[\s*#\s*(\d+)\s*\]")


class Term(NamedTuple):
    start: int
    end: int
    source: str
    """As the text has it."""
    target: str


@dataclass(frozen=True)
class Terms:
    entries: Mapping[tuple[str, str], Mapping[str, str]]
    """By the short codes of a pair of languages, ("", "") for any: source term → target term."""

    def found(self, text: str, languages: Languages) -> list[Term]:
        """The terms in a text, in order, of which none overlap: the leftmost, and of these the longest."""
        pair = tuple(language_code(it) if names_language(it) else "" for it in languages)
        hits = [
            hit
            for of, index in self._indexes.items()
            if all("" in sides or sides[0] == sides[1] for sides in zip(of, pair, strict=True))
            for hit in index.hits(text)
        ]
        chosen, end = [], 0
        for hit in sorted(hits, key=lambda it: (it.start, -it.end)):
            if hit.start >= end:
                chosen.append(hit)
                end = hit.end
        return chosen

    @cached_property
    def _indexes(self) -> dict[tuple[str, str], "_Index"]:
        return {pair: _Index(targets) for pair, targets in self.entries.items()}


class _Index:
    """Finds the terms of one pair of languages in a time that hardly depends on their number: a term with a capital
    as it is written, and others in any case."""

    def __init__(self, targets: Mapping[str, str]):
        self.kinds: dict[bool, tuple[dict[str, str], dict[str, set[int]]]] = {True: ({}, {}), False: ({}, {})}
        for source, target in targets.items():
            in_any_case = source == source.lower()
            known, lengths = self.kinds[in_any_case]
            for form in (source, normalize("NFD", source)):  # as some texts have it
                form = folded(form) if in_any_case else form
                known[form] = target
                lengths.setdefault(form[:START], set()).add(len(form))

    def hits(self, text: str) -> Iterator[Term]:
        for in_any_case, (known, lengths) in self.kinds.items():
            compared = folded(text) if in_any_case else text
            for start, size in product(range(len(text)), range(1, START + 1)):
                for length in lengths.get(compared[start : start + size], ()):
                    end = start + length
                    if (target := known.get(compared[start:end])) and is_whole(text, start, end):
                        yield Term(start, end, text[start:end], target)


def folded(text: str) -> str:
    """Without case, as long as before."""
    return "".join(it if len(it) == 1 else character for character in text for it in (character.casefold(),))


def is_whole(text: str, start: int, end: int) -> bool:
    """Whether no letter stands before or behind a part; after Hangul particles may follow, and scripts without blanks
    have no words."""
    part = normalize("NFC", text[start:end])
    if end < len(text) and len(normalize("NFC", text[start : end + 1])) == len(part):
        return False  # what follows belongs to the last character
    is_open = MAY_FOLLOW_LETTERS.match(part) or start == 0 or not LETTER.match(text, start - 1)
    return bool(is_open and (MAY_PRECEDE_LETTERS.match(part, len(part) - 1) or not LETTER.match(text, end)))


def read_terms(file: str) -> Terms:
    """UserError: a line has other columns, an unknown language, or another translation of a term than an earlier
    line."""
    entries: dict[tuple[str, str], dict[str, str]] = {}
    lines: dict[tuple[str, str, str], tuple[int, str]] = {}
    default = ("", "")
    try:
        text = normalize("NFC", Path(file).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not in UTF-8: {excerpt(error)}. Save it in UTF-8.") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        cells = [cell.strip() for cell in line.split("\t")]
        if not lines and default == ("", "") and len(cells) == 2 and all(map(names_language, cells)):
            default = tuple(map(language_code, cells))
            continue
        if not lines and {cell.casefold() for cell in cells} <= COLUMN_NAMES:
            raise UserError(
                f"{file} line {number} is {excerpt(line)!r}: names of columns, and no term. Remove it, or write the"
                " terms' two languages there, such as en, a tab and ko."
            )
        are_languages = [names_language(cell) for cell in cells]
        if not lines and sum(are_languages) == 1 and len(cells) == 2 and all(map(LANGUAGE_LIKE.fullmatch, cells)):
            raise UserError(
                f"{file} line {number} is {cells[0]!r} and {cells[1]!r}, and {cells[are_languages.index(False)]!r} is"
                f" no language. If these are the terms' languages, correct it; if it is a term, put another one first."
            )
        if len(cells) not in (2, 4) or not all(cells):
            raise UserError(f"{file} line {number} is {excerpt(line)!r}. {COLUMNS}")
        source, target, *named = cells
        for name in named:
            if not names_language(name):
                raise UserError(f"{file} line {number}: {name!r} is no language. {COLUMNS}")
        pair = tuple(map(language_code, named)) if named else default
        for other in {pair, ("", ""), *(entries if pair == ("", "") else ())}:
            if (before := lines.get((*other, source))) and before[1] != target:
                raise UserError(
                    f"{file} line {number} translates {source!r} as {target!r}, and line {before[0]} as"
                    f" {before[1]!r}. Keep one of them, or give the longer terms in which they differ."
                )
        lines.setdefault((*pair, source), (number, target))
        entries.setdefault(pair, {})[source] = target
    if not entries:
        raise UserError(f"{file} has no terms. {COLUMNS}")
    return Terms(entries)


def with_marks(text: str, terms: Sequence[Term]) -> str:
    for term in reversed(terms):
        text = f"{text[: term.end]} [= {term.target}]{text[term.end :]}"
    return text


def missing(terms: Sequence[Term], output: str) -> list[str]:
    """The target terms that an output does not have; a term in lower case may be in any case."""
    output = normalize("NFC", output)
    wanted = dict.fromkeys(term.target for term in terms)
    return [it for it in wanted if it not in output and not (it == it.lower() and folded(it) in folded(output))]


def masked(text: str, only: Sequence[str] | None = None) -> tuple[str, list[str]]:
    """The text with a placeholder for each URL, address, tag, field and longer number, and these values; with `only`
    for each of these values."""
    values: list[str] = []

    def number(hit: regex.Match) -> str:
        if only is not None and hit.group() not in only:
            return hit.group()
        values.append(hit.group())
        place = len(values) if only is None else only.index(hit.group()) + 1
        return f"[#{place}]"

    return KEPT.sub(number, text), values


def unmasked(text: str, values: Sequence[str]) -> tuple[str, list[str]]:
    """The text with the values in place of their placeholders, and those that do not come back exactly once. A
    placeholder of no value stays, and is one of these."""
    counts = Counter(int(number) for number in PLACEHOLDER.findall(text))
    lost = [value for place, value in enumerate(values, start=1) if counts[place] != 1]
    lost += [f"[#{place}]" for place in counts if not 1 <= place <= len(values)]

    def value(hit: regex.Match) -> str:
        place = int(hit.group(1))
        return values[place - 1] if 1 <= place <= len(values) else hit.group()

    return PLACEHOLDER.sub(value, text), lost


def masked_pair(source: str, target: str) -> tuple[str, str]:
    """Source and target with placeholders for the values that stand exactly once on each side."""
    counts = [Counter(KEPT.findall(side)) for side in (source, target)]
    shared = [value for value in counts[0] if counts[0][value] == counts[1][value] == 1]
    return masked(source, shared)[0], masked(target, shared)[0]
