"""Language codes: what a tokenizer calls languages, and where its family writes them.

    codes = codes_of(nllb)                       LanguageCodes(layout="both", tokens={"ace_Arab": 256001, …})
    codes.find("ko")                             "kor_Hang"
    codes.find("kor_Kore")                       UserError: … Did you mean 'kor_Hang'? It has ace_Arab, …
    resolved(nllb, Languages("en", "ko"))        Languages("eng_Latn", "kor_Hang")

Where the codes of a row stand, S being the code of the source and T that of the target:

    layout   families                    encoder reads        decoder reads    and writes
    both     NLLB, M2M100, mBART-50      S text </s>          </s> T text      T text </s>
             NLLB with legacy_behaviour  text </s> S          </s> T text      T text </s>
    start    mBART-cc25, PLBart          text </s> S          T text           text </s>
    source   MADLAD `<2ko>`,             T text </s>          <pad> text       text </s>
             Marian `>>kor<<`
    words    T5 and all others           translate English to Korean: text     text </s>
    none     Marian of one pair, FSMT    text </s>            <pad> text       text </s>

encode.py puts the codes there, in training and at inference. With `both`, T is the first label, and generation forces
it (transformers' `forced_bos_token_id`). With `start`, T stands in the place of the decoder's start token.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from diptych.data_prep.command_line.errors import UserError, nearest
from diptych.data_prep.rows.language_names import (
    UnknownLanguage,
    english_name,
    fits_code,
    has_same_script,
    names_of,
    plain_code,
)
from diptych.data_prep.rows.records import IGNORE_INDEX, Languages
from diptych.data_prep.text_to_ids.two_vocabularies import source_side

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Layout = Literal["both", "start", "source", "words", "none"]
STARTING_CLASSES = ("MBartTokenizer", "PLBartTokenizer")
"""Tokenizers of the layout `start`."""
AROUND_TEXTS = re.compile(r"(?:__)?([a-z]{2,8}(?:_[A-Za-z]{2,4})?)(?:__)?")
"""Special tokens such as kor_Hang, ko_KR, __ko__."""
BEFORE_SOURCES = re.compile(r"<2([A-Za-z_-]+)>|>>([A-Za-z_-]+)<<")
"""Tokens such as <2ko>, >>kor<<."""
FEWEST_CODES = 2
"""A single token of such a form is no choice of languages."""


@dataclass(frozen=True)
class LanguageCodes:
    """The codes of one tokenizer, and where they stand."""

    layout: Layout
    tokens: Mapping[str, int]
    """Code → token id; none for the layouts `words` and `none`."""
    spellings: Mapping[str, str]
    """Code → the token as it is written: ko → __ko__."""

    @property
    def is_around_texts(self) -> bool:
        """Whether both sides have a code, without which no row can be encoded."""
        return self.layout in ("both", "start")

    @functools.cached_property
    def starts(self) -> frozenset[int]:
        """Ids that stand in the place of the decoder's start token."""
        return frozenset(self.tokens.values()) if self.layout == "start" else frozenset()

    @functools.cached_property
    def _found(self) -> dict[str, str]:
        """What was looked up before."""
        return {}

    def find(self, name: str) -> str:
        """The code that `name` stands for: itself, in another spelling (`kor-hang`, `__ko__`), or the only code of
        that language (`ko`, `kor`, `Korean`). UnknownLanguage where it stands for none, or for several."""
        if name in self.tokens:
            return name
        if name not in self._found:
            self._found[name] = self._look_up(name)
        return self._found[name]

    def _look_up(self, name: str) -> str:
        plain = plain_code(name)
        for code in self.tokens:
            if plain in (plain_code(code), plain_code(self.spellings[code])):
                return code
        names = names_of(plain.split("_")[0])
        alike = [code for code in self.tokens if plain_code(code).split("_")[0] in names]  # of the same language
        fitting = [code for code in alike if fits_code(plain, plain_code(code))]
        simple = [code for code in fitting if "_" not in code]  # MADLAD has zh and zh_Hant
        for choice in (fitting, [code for code in fitting if has_same_script(plain, plain_code(code))], simple):
            if len(choice) == 1:
                return choice[0]
        if len(alike) > 1:
            raise UnknownLanguage(f"language '{name}' may be {' or '.join(alike)}. Give one of these.", self.tokens)
        near = alike[0] if alike else nearest(name, self.tokens, cutoff=0.5)
        hint = f" Did you mean '{near}'?" if near else ""
        raise UnknownLanguage(f"'{name}' is no language code of this tokenizer.{hint}", sorted(self.tokens))

    def named_by(self, tokens: Iterable[str]) -> str:
        """The code that a template's decoder prefix has; "" where it has none."""
        return next((code for code, spelling in self.spellings.items() if spelling in tokens), "")

    def checked(self, languages: Languages) -> Languages:
        """The languages that are given, as the tokenizer calls them; what it writes no code for stays as it is."""
        source, target = languages
        if self.is_around_texts and source:
            source = self.find(source)
        if self.tokens and target:
            target = self.find(target)
        return Languages(source, target)

    def read_from(self, input_ids: Sequence[int], labels: Sequence[int]) -> Languages:
        """The languages of a row of token ids, by the codes in it."""
        code_of = {token: code for code, token in self.tokens.items()}
        in_source = next((code_of[token] for token in (*input_ids[:2], *input_ids[-1:]) if token in code_of), "")
        if not self.is_around_texts:
            return Languages("", in_source)
        return Languages(in_source, code_of.get(labels[0], ""))

    def start_first(self, labels: Sequence[int]) -> tuple[int, ...]:
        """`text </s> T` → `T text </s>`: transformers' mBART-cc25 tokenizer writes the code last, and its model moves
        it to the front. All other labels stay as they are."""
        last = max(place for place, token in enumerate(labels) if token != IGNORE_INDEX)
        rest = (*labels[:last], *labels[last + 1 :])
        return (labels[last], *rest) if labels[last] in self.starts else tuple(labels)

    def instruction(self, instruction: str, languages: Languages) -> str:
        """The row's own instruction; where it has none and the tokenizer has no codes, `translate English to
        Korean:`."""
        if instruction or self.layout != "words" or not languages.direction:
            return instruction
        return f"translate {english_name(languages.source)} to {english_name(languages.target)}:"


def codes_of(tokenizer: PreTrainedTokenizerBase | None) -> LanguageCodes:
    """None is a tokenizer that is not trained yet."""
    return WITHOUT_CODES if tokenizer is None else _codes_of(source_side(tokenizer), len(tokenizer))


@functools.lru_cache(maxsize=16)
def _codes_of(tokenizer: PreTrainedTokenizerBase, tokens: int) -> LanguageCodes:
    """`tokens` are counted, because a user may add a language."""
    kind = type(tokenizer).__name__.removesuffix("Fast")
    if kind == "FSMTTokenizer":  # each vocabulary is of one language, and no code is written
        return NOTHING_TO_SAY
    if hasattr(tokenizer, "src_lang"):
        spelled = [*tokenizer.all_special_tokens, *tokenizer.added_tokens_encoder]
        spelled += getattr(tokenizer, "lang_code_to_token", {}).values()  # M2M100: these are no added tokens
        layout, spellings = "start" if kind in STARTING_CLASSES else "both", _matches(AROUND_TEXTS, spelled)
    else:
        known = getattr(tokenizer, "supported_language_codes", tokenizer.get_vocab())
        layout, spellings = "source", _matches(BEFORE_SOURCES, known)
        if len(spellings) < FEWEST_CODES:
            return NOTHING_TO_SAY if kind == "MarianTokenizer" else WITHOUT_CODES
    ids = tokenizer.convert_tokens_to_ids(list(spellings.values()))
    return LanguageCodes(layout, dict(zip(spellings, ids, strict=True)), spellings)


def _matches(pattern: re.Pattern, tokens: Iterable[str]) -> dict[str, str]:
    """Code → token, in the order of the tokens."""
    found = ((pattern.fullmatch(token), token) for token in tokens)
    return {next(filter(None, match.groups())): token for match, token in found if match}


WITHOUT_CODES = LanguageCodes("words", {}, {})
NOTHING_TO_SAY = LanguageCodes("none", {}, {})


def own_languages(tokenizer: PreTrainedTokenizerBase) -> Languages:
    """The languages that are set in the tokenizer, by `prepare` or by its class; "" where none is set. (A new NLLB
    tokenizer has eng_Latn as source, and no target.)"""
    tokens = codes_of(tokenizer).tokens
    own = (getattr(tokenizer, name, None) or "" for name in ("src_lang", "tgt_lang"))
    return Languages(*(code if code in tokens else "" for code in own))


def resolved(
    tokenizer: PreTrainedTokenizerBase | None, given: Languages, decoder_prefix: Sequence[str] = ()
) -> Languages:
    """The languages of a row or a direction, as the tokenizer calls them: what is given, or the template's
    `decoder_prefix` has, or else the tokenizer's own.

    Raises:
        UnknownLanguage: the tokenizer needs a code that is not given, or does not have one; or two targets are given.
    """
    codes = codes_of(tokenizer)
    languages, named, known = codes.checked(given), codes.named_by(decoder_prefix), sorted(codes.tokens)
    if not codes.is_around_texts:
        return languages
    if named and languages.target not in ("", named):
        raise UnknownLanguage(
            f"the template's decoder_prefix names {named}, and the target is in {languages.target}. Drop one of them.",
            known,
        )
    languages = Languages(languages.source, named or languages.target).filled_from(own_languages(tokenizer))
    if missing := [side for side, code in languages._asdict().items() if not code]:
        raise UnknownLanguage(
            f"the tokenizer is multilingual: it writes a language code on both sides, and that of the"
            f" {' and the '.join(missing)} is not given. Give --source_language and --target_language, or rows with"
            f" these columns.",
            known,
        )
    if languages.source == languages.target and not all(given):
        raise UnknownLanguage(
            f"source and target are both in {languages.target}: one was not given, and is as the tokenizer says. Give"
            f" --source_language and --target_language.",
            known,
        )
    return languages


def languages_note(tokenizer: PreTrainedTokenizerBase, given: Languages) -> str:
    """A note about the languages of prompts that bring none, where they are not those that were given; else ""."""
    codes, own = codes_of(tokenizer), own_languages(tokenizer)
    if any(given) and not codes.tokens:
        words = codes.instruction("", given)
        what = f"prompts without an instruction begin '{words}', and for others they" if words else "those given"
        return f"the tokenizer has no language codes: {what} are not used"
    languages = codes.checked(given).filled_from(own if codes.is_around_texts else Languages())
    if languages == given or not languages.direction:
        return ""
    left_out = " and ".join(f"--{side}_language" for side, code in given._asdict().items() if not code)
    return f"{languages.source} to {languages.target}{left_out and f', as the tokenizer says without {left_out}'}"


def set_languages(tokenizer: PreTrainedTokenizerBase, languages: Languages) -> None:
    """Sets the tokenizer's own languages, which save_pretrained writes."""
    for name, code in zip(("src_lang", "tgt_lang"), languages, strict=True):
        if code:
            setattr(tokenizer, name, code)
            tokenizer.init_kwargs[name] = code


def check_spells_no_code(codes: LanguageCodes, text: str, option: str) -> None:
    """UserError where an instruction spells a code: in a text it would be characters, and no code."""
    for code, spelling in codes.spellings.items():
        if codes.layout == "source" and spelling in text:
            raise UserError(
                f"{option} spells the language code {spelling}, which would be read as text. Leave it out, and give"
                f" --target_language {code}."
            )
