"""Language codes: what a tokenizer calls languages, how its family writes them, and what people call them.

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

encode.py puts the codes there, in training and at inference. With `both`, T is a label that the model learns to write
first, and generation forces it; transformers does the same with `forced_bos_token_id`. With `start`, T stands in the
place of the decoder's start token; transformers has `decoder_start_token_id` for it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from diptych.data_prep.rows.records import IGNORE_INDEX, Languages, UserError, nearest
from diptych.data_prep.text_to_ids.two_vocabularies import source_side

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOURCE_COLUMNS = ("source_language", "src_lang", "source_lang", "src_language", "lang_src", "sourceLang")
TARGET_COLUMNS = ("target_language", "tgt_lang", "target_lang", "tgt_language", "lang_tgt", "targetLang")
"""What rows call the columns of their codes; the first of each is ours."""


class UnknownLanguage(UserError):
    """A language that a tokenizer does not know, or that nobody has said. `fault` is the message without the list of
    all codes."""

    def __init__(self, fault: str, known: Iterable[str]):
        codes = ", ".join(known)
        super().__init__(f"{fault} {f'Known are {codes}.' if codes else 'The tokenizer has no language codes.'}")
        self.fault = fault


Layout = Literal["both", "start", "source", "words", "none"]
STARTING_CLASSES = ("MBartTokenizer", "PLBartTokenizer")
"""Tokenizers of models that were pretrained with the target's code in the place of the decoder's start token."""

AROUND_TEXTS = re.compile(r"(?:__)?([a-z]{2,8}(?:_[A-Za-z]{2,4})?)(?:__)?")
"""Special tokens such as kor_Hang, ko_KR, __ko__."""
BEFORE_SOURCES = re.compile(r"<2([A-Za-z_-]+)>|>>([A-Za-z_-]+)<<")
"""Tokens such as <2ko>, >>kor<<."""
FEWEST_CODES = 2
"""A single token of such a form is no choice of languages."""

NLLB_CODE = re.compile("[a-z]{3}_[A-Z][a-z]{3}")

SCRIPT_OF_REGION = {"cn": "hans", "sg": "hans", "tw": "hant", "hk": "hant", "mo": "hant"}


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
        that language (`ko`, `kor`, `Korean`).

        Raises:
            UserError: it stands for none, or for several.
        """
        if name not in self._found:
            self._found[name] = self._look_up(name)
        return self._found[name]

    def _look_up(self, name: str) -> str:
        if name in self.tokens:
            return name
        plain = _plain(name)
        for code in self.tokens:
            if plain in (_plain(code), _plain(self.spellings[code])):
                return code
        alike = self._of_same_language(plain)
        fitting = [code for code in alike if _fits(plain, _plain(code))]
        simple = [code for code in fitting if "_" not in code]  # MADLAD has zh and zh_Hant
        for choice in (fitting, [code for code in fitting if _has_same_script(plain, _plain(code))], simple):
            if len(choice) == 1:
                return choice[0]
        if len(alike) > 1:
            raise UnknownLanguage(f"language '{name}' may be {' or '.join(alike)}. Give one of these.", self.tokens)
        near = alike[0] if alike else nearest(name, self.tokens, cutoff=0.5)
        hint = f" Did you mean '{near}'?" if near else ""
        raise UnknownLanguage(f"'{name}' is no language code of this tokenizer.{hint}", sorted(self.tokens))

    def _of_same_language(self, plain: str) -> list[str]:
        names = _names_of(plain.split("_")[0])
        return [code for code in self.tokens if _plain(code).split("_")[0] in names]

    def named_by(self, tokens: Iterable[str]) -> str:
        """The language that a template's decoder prefix names; "" where it names none."""
        return next((code for code, spelling in self.spellings.items() if spelling in tokens), "")

    def checked(self, languages: Languages) -> Languages:
        """Each that is given and that the tokenizer writes, as the tokenizer calls it; the others as they are."""
        source, target = languages
        if self.is_around_texts and source:
            source = self.find(source)
        if self.tokens and target:
            target = self.find(target)
        return Languages(source, target)

    def read_from(self, input_ids: Sequence[int], labels: Sequence[int]) -> Languages:
        """The languages of a row that came as token ids, by the codes in it."""
        code_of = {token: code for code, token in self.tokens.items()}
        in_source = next((code_of[token] for token in (*input_ids[:2], *input_ids[-1:]) if token in code_of), "")
        if not self.is_around_texts:
            return Languages("", in_source)
        return Languages(in_source, code_of.get(labels[0], ""))

    def start_first(self, labels: Sequence[int]) -> tuple[int, ...]:
        """Labels as transformers' mBART-cc25 tokenizer makes them, whose model moves the last one, the code, to the
        front: `text </s> T` → `T text </s>`. All others stay as they are."""
        last = max(place for place, token in enumerate(labels) if token != IGNORE_INDEX)
        rest = (*labels[:last], *labels[last + 1 :])
        return (labels[last], *rest) if labels[last] in self.starts else tuple(labels)

    def instruction(self, instruction: str, languages: Languages) -> str:
        """The instruction of a row: its own, or where there is none and the tokenizer has no codes, T5's words for the
        direction, `translate English to Korean:`."""
        if instruction or self.layout != "words" or not languages.direction:
            return instruction
        return f"translate {english_name(languages.source)} to {english_name(languages.target)}:"


def codes_of(tokenizer: PreTrainedTokenizerBase | None) -> LanguageCodes:
    """None is a tokenizer that has still to be trained."""
    if tokenizer is None:
        return WITHOUT_CODES
    return _codes_of(source_side(tokenizer), len(tokenizer))


@functools.lru_cache(maxsize=16)
def _codes_of(tokenizer: PreTrainedTokenizerBase, tokens: int) -> LanguageCodes:
    """`tokens` are counted, because a person may add a language of their own."""
    kind = type(tokenizer).__name__.removesuffix("Fast")
    if kind == "FSMTTokenizer":  # its languages are its vocabularies', and nothing is written of them
        return NOTHING_TO_SAY
    if hasattr(tokenizer, "src_lang"):
        spelled = [*tokenizer.all_special_tokens, *tokenizer.added_tokens_encoder]
        spelled += getattr(tokenizer, "lang_code_to_token", {}).values()  # M2M100: these are no added tokens
        codes = _matches(AROUND_TEXTS, spelled)
        return _made("start" if kind in STARTING_CLASSES else "both", codes, tokenizer.convert_tokens_to_ids)
    vocabulary = tokenizer.get_vocab()
    codes = _matches(BEFORE_SOURCES, getattr(tokenizer, "supported_language_codes", vocabulary))
    if len(codes) >= FEWEST_CODES:
        return _made("source", codes, vocabulary.__getitem__)
    return NOTHING_TO_SAY if kind == "MarianTokenizer" else WITHOUT_CODES


def _made(layout: Layout, codes: dict[str, str], id_of: Callable[[str], int]) -> LanguageCodes:
    return LanguageCodes(layout, {code: id_of(spelling) for code, spelling in codes.items()}, codes)


def _matches(pattern: re.Pattern, tokens: Iterable[str]) -> dict[str, str]:
    """Code → token, in the order of the tokens."""
    found = ((pattern.fullmatch(token), token) for token in tokens)
    return {next(filter(None, match.groups())): token for match, token in found if match}


WITHOUT_CODES = LanguageCodes("words", {}, {})
NOTHING_TO_SAY = LanguageCodes("none", {}, {})


def own_languages(tokenizer: PreTrainedTokenizerBase) -> Languages:
    """Those that are set in the tokenizer, which a prepared one brings from its preparation; "" for what it does not
    know. (A new NLLB tokenizer names eng_Latn as source, and no target.)"""
    tokens = codes_of(tokenizer).tokens
    own = (getattr(tokenizer, name, None) or "" for name in ("src_lang", "tgt_lang"))
    return Languages(*(code if code in tokens else "" for code in own))


def resolved(
    tokenizer: PreTrainedTokenizerBase | None, given: Languages, decoder_prefix: Sequence[str] = ()
) -> Languages:
    """What is given, looked up; what is not, as the tokenizer has it. A template's `decoder_prefix` may say a target.

    Raises:
        UnknownLanguage: the tokenizer needs a code that nobody has said, or does not know one; or two are said.
    """
    codes = codes_of(tokenizer)
    if not codes.is_around_texts:
        return codes.checked(given)
    languages, named = codes.checked(given), codes.named_by(decoder_prefix)
    if named and languages.target not in ("", named):
        raise UnknownLanguage(
            f"the template's decoder_prefix names {named}, and the target is in {languages.target}. Drop one of them.",
            sorted(codes.tokens),
        )
    languages = Languages(languages.source, named or languages.target).or_else(own_languages(tokenizer))
    missing = [side for side, code in languages._asdict().items() if not code]
    if missing:
        raise UnknownLanguage(
            f"the tokenizer is multilingual: it writes a language code on both sides, and nobody has said that of the"
            f" {' and the '.join(missing)}. Give --source_language and --target_language, or rows with these columns.",
            sorted(codes.tokens),
        )
    if languages.source == languages.target and not all(given):
        raise UnknownLanguage(
            f"source and target are both in {languages.target}: one was not given, and is as the tokenizer says. Give"
            f" --source_language and --target_language.",
            sorted(codes.tokens),
        )
    return languages


def languages_note(tokenizer: PreTrainedTokenizerBase, given: Languages) -> str:
    """What should be said of the languages of prompts that bring none: in which they are read and written where a
    person gave no code, or another one, or for a tokenizer without codes; "" where there is nothing to say."""
    codes, own = codes_of(tokenizer), own_languages(tokenizer)
    if any(given) and not codes.tokens:
        words = codes.instruction("", given)
        what = f"prompts without an instruction begin '{words}', and for others they" if words else "those given"
        return f"the tokenizer has no language codes: {what} are not used"
    languages = codes.checked(given).or_else(own if codes.is_around_texts else Languages())
    if languages == given or not languages.direction:
        return ""
    whose = "" if all(given) else ", as the tokenizer says; --source_language and --target_language choose others"
    return f"{languages.source} to {languages.target}{whose}"


def set_languages(tokenizer: PreTrainedTokenizerBase, languages: Languages) -> None:
    """Makes them the tokenizer's own, also in what save_pretrained writes."""
    for name, code in zip(("src_lang", "tgt_lang"), languages, strict=True):
        if code:
            setattr(tokenizer, name, code)
            tokenizer.init_kwargs[name] = code


def languages_in(fields: Mapping[str, Any]) -> Languages:
    """The codes that a row brings, under whichever of the usual names."""
    return Languages(_first_of(fields, SOURCE_COLUMNS), _first_of(fields, TARGET_COLUMNS))


def _first_of(fields: Mapping[str, Any], names: Iterable[str]) -> str:
    values = (fields.get(name) for name in names)
    return str(next((value for value in values if value is not None), "")).strip()


def names_language(name: str) -> bool:
    """Whether data that calls a text so says its language by it: `ko`, `Korean`, `en-GB`, `ace_Arab`."""
    language, *more = _plain(name).split("_")
    is_code = bool(NLLB_CODE.fullmatch(name)) or language in _languages_by_name()
    return is_code and all(len(part) in (2, 4) or part.isdecimal() for part in more)


def languages_of_files(first: str, second: str) -> Languages:
    """Those that two aligned files are called by: `a.ko` and `a.en`, `ko/a.txt` and `en/a.txt`, `a_ko.txt` and
    `a_en.txt`; none where their names say none."""
    for between in (r"[./\\]", r"[./\\_-]"):
        parts = zip(re.split(between, first)[::-1], re.split(between, second)[::-1], strict=False)
        different = [pair for pair in parts if pair[0] != pair[1]]
        if len(different) == 1 and all(map(names_language, different[0])):
            return Languages(*different[0])
    return Languages()


@functools.lru_cache(maxsize=256)
def is_swapped(sides: Languages, asked: Languages) -> bool:
    """Whether the data says that its first text is in the language asked for as target, and its second in that of the
    source. A language that was not asked for, and a name that is none of a language, fit any.

        is_swapped(Languages("ko", "en"), Languages("eng_Latn", "kor_Hang"))  → True

    Raises:
        UserError: the data is in other languages.
    """
    as_they_are, swapped = (
        [_likeness(*pair) for pair in zip(order, asked, strict=True)] for order in (sides, sides.swapped())
    )
    if not all(as_they_are) and not all(swapped):
        said = " and ".join(f"{side} {language}" for side, language in asked._asdict().items() if language)
        raise UserError(
            f"the data names its two texts {sides.source} and {sides.target}, and the languages asked for are {said}."
            " Give the data's own, or none; names in the data that are wrong have to be mended there."
        )
    return all(swapped) and (not all(as_they_are) or sum(swapped) > sum(as_they_are))


def is_same_language(name: str, other: str) -> bool:
    """Whether both are one language, of which other regions count as others."""
    return names_language(name) and bool(other) and _likeness(name, other) == 2


def _likeness(side: str, asked: str) -> int:
    """0 for two languages, 1 for one language of two regions, or where one is not known, 2 for the same."""
    if not asked or not names_language(side):
        return 1
    side, asked = _plain(side), _plain(asked)
    parts = side.split("_"), asked.split("_")
    if _names_of(parts[0][0]).isdisjoint(_names_of(parts[1][0])):
        return 0
    if _fits(side, asked) and _fits(asked, side):
        return 2
    return 0 if any(len(part) == 4 for more in parts for part in more[1:]) else 1


def check_spells_no_code(codes: LanguageCodes, text: str, option: str) -> None:
    """UserError where an instruction spells a code, which would be characters to the model and no code."""
    for code, spelling in codes.spellings.items():
        if codes.layout == "source" and spelling in text:
            raise UserError(
                f"{option} spells the language code {spelling}, which would be read as text. Leave it out, and give"
                f" --target_language {code}."
            )


def _plain(name: str) -> str:
    """`__ko__`, `<2ko>`, `>>ko<<`, `ko-KR` → ko, ko, ko, ko_kr."""
    return re.sub(r"^__|__$|^<2|>$|^>>|<<$", "", name.strip()).replace("-", "_").casefold()


def _has_same_script(wanted: str, code: str) -> bool:
    return "_" in wanted and wanted.split("_")[1] == code.partition("_")[2]


def _fits(wanted: str, code: str) -> bool:
    """Whether a code that is said more exactly does not contradict: zh_TW is zho_Hant; ko_KR is kor_Hang; kor_Kore is
    not. Only scripts of both sides (four letters), or regions of both, can contradict."""
    parts = wanted.split("_")[1:], code.split("_")[1:]
    wanted_script, script = (next((part for part in side if len(part) == 4), "") for side in parts)
    wanted_region, region = (next((part for part in side if len(part) == 2), "") for side in parts)
    if not wanted_script and "zh" in _names_of(code.split("_")[0]):
        wanted_script = SCRIPT_OF_REGION.get(wanted_region, "")
    if wanted_script and script:
        return wanted_script == script
    return not (wanted_region and region) or "xx" in (wanted_region, region) or wanted_region == region


def english_name(language: str) -> str:
    """`"ko"`, `"kor_Hang"`, `"Korean"` → `"Korean"`. UserError for one that has no name here."""
    found = _languages_by_name().get(_plain(language).split("_")[0])
    if found is None:
        names = [names[-1] for names in _table()]
        near = nearest(language, [name for names in _table() for name in names], cutoff=0.5)
        hint = f" Did you mean '{near}'?" if near else ""
        raise UnknownLanguage(f"'{language}' is no language whose English name is known.{hint}", names)
    return found[-1]


def _names_of(language: str) -> set[str]:
    """All names of a language, itself among them: ko → ko, kor, korean."""
    return {language, *(name.casefold() for name in _languages_by_name().get(language, ()))}


@functools.cache
def _languages_by_name() -> dict[str, list[str]]:
    by_name: dict[str, list[str]] = {}
    for names in _table():
        for name in names:
            by_name.setdefault(name.casefold(), names)
    return by_name


@functools.cache
def _table() -> list[list[str]]:
    """`[["ko", "kor", "Korean"], …]`."""
    entries = (entry.strip().split(" ", 2) for entry in TABLE.split(","))
    return [[short, *longs.split("/"), name] for short, longs, name in entries]


TABLE = """\
af afr Afrikaans, ak aka Akan, am amh Amharic, an arg Aragonese, ar ara/arb Arabic, as asm Assamese,
ay aym/ayr Aymara, az aze/azj Azerbaijani, ba bak Bashkir, be bel Belarusian, bg bul Bulgarian, bm bam Bambara,
bn ben Bengali, bo bod/tib Tibetan, br bre Breton, bs bos Bosnian, ca cat Catalan, cs ces/cze Czech, cv chv Chuvash,
cy cym/wel Welsh, da dan Danish, de deu/ger German, dv div Dhivehi, dz dzo Dzongkha, ee ewe Ewe, el ell/gre Greek,
en eng English, eo epo Esperanto, es spa Spanish, et est/ekk Estonian, eu eus/baq Basque, fa fas/per/pes Persian,
ff ful/fuv Fulah, fi fin Finnish, fj fij Fijian, fo fao Faroese, fr fra/fre French, fy fry Western Frisian,
ga gle Irish, gd gla Scottish Gaelic, gl glg Galician, gn grn/gug Guarani, gu guj Gujarati, ha hau Hausa,
he heb/iw Hebrew, hi hin Hindi, hr hrv Croatian, ht hat Haitian Creole, hu hun Hungarian, hy hye/arm Armenian,
ia ina Interlingua, id ind Indonesian, ig ibo Igbo, is isl/ice Icelandic, it ita Italian, iu iku Inuktitut,
ja jpn Japanese, jv jav Javanese, ka kat/geo Georgian, kg kon Kongo, ki kik Kikuyu, kk kaz Kazakh, kl kal Greenlandic,
km khm Khmer, kn kan Kannada, ko kor Korean, ks kas Kashmiri, ku kur/kmr Kurdish, ky kir Kyrgyz, la lat Latin,
lb ltz Luxembourgish, lg lug Ganda, li lim Limburgish, ln lin Lingala, lo lao Lao, lt lit Lithuanian,
lv lav/lvs Latvian, mg mlg/plt Malagasy, mi mri/mao Maori, mk mkd/mac Macedonian, ml mal Malayalam,
mn mon/khk Mongolian, mr mar Marathi, ms msa/may/zsm Malay, mt mlt Maltese, my mya/bur Burmese,
ne nep/npi Nepali, nl nld/dut Dutch, nn nno Norwegian Nynorsk, nb nob Norwegian Bokmål, no nor/nob/nno Norwegian,
ny nya Chichewa, oc oci Occitan, om orm/gaz Oromo, or ori/ory Odia, os oss Ossetian, pa pan Punjabi, pl pol Polish,
ps pus/pbt Pashto, pt por Portuguese, qu que/quy Quechua, rm roh Romansh, rn run Rundi, ro ron/rum Romanian,
ru rus Russian, rw kin Kinyarwanda, sa san Sanskrit, sc srd Sardinian, sd snd Sindhi, se sme Northern Sami,
sg sag Sango, si sin Sinhala, sk slk/slo Slovak, sl slv Slovenian, sm smo Samoan, sn sna Shona, so som Somali,
sq sqi/alb/als Albanian, sr srp Serbian, ss ssw Swati, st sot Southern Sotho, su sun Sundanese, sv swe Swedish,
sw swa/swh Swahili, ta tam Tamil, te tel Telugu, tg tgk Tajik, th tha Thai, ti tir Tigrinya, tk tuk Turkmen,
tl tgl/fil Tagalog, tn tsn Tswana, to ton Tongan, tr tur Turkish, ts tso Tsonga, tt tat Tatar, tw twi Twi,
ug uig Uyghur, uk ukr Ukrainian, ur urd Urdu, uz uzb/uzn Uzbek, ve ven Venda, vi vie Vietnamese, wa wln Walloon,
wo wol Wolof, xh xho Xhosa, yi yid/ydd Yiddish, yo yor Yoruba, za zha Zhuang, zh zho/chi/cmn Chinese, zu zul Zulu"""
"""ISO 639-1, ISO 639-3 (with what models call the language of that code), English name."""
