"""Names and codes of languages, and which language the name of a column or a file means. Tokenizers are not needed.

names_language("en-GB")                                          → True
languages_of_files("a.ko", "a.en")                               → Languages("ko", "en")
english_name("kor_Hang")                                         → "Korean"
"""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from diptych.data_prep.command_line.errors import UserError, nearest
from diptych.data_prep.rows.records import Languages

SOURCE_COLUMNS = ("source_language", "src_lang", "source_lang", "src_language", "lang_src", "sourceLang")
TARGET_COLUMNS = ("target_language", "tgt_lang", "target_lang", "tgt_language", "lang_tgt", "targetLang")
"""Names of columns that hold language codes; the first of each is ours."""


class UnknownLanguage(UserError):
    """A language that a tokenizer does not know, or that is not given. `fault` is the message without the list of all
    codes."""

    def __init__(self, fault: str, known: Iterable[str]):
        codes = ", ".join(known)
        super().__init__(f"{fault} {f'Known are {codes}.' if codes else 'The tokenizer has no language codes.'}")
        self.fault = fault


NLLB_CODE = re.compile("[a-z]{3}_[A-Z][a-z]{3}")
OF_M2M100 = {"ast", "ceb", "ilo", "ns"}
"""Its codes that are not in the table of names."""
SCRIPT_OF_REGION = {"cn": "hans", "sg": "hans", "tw": "hant", "hk": "hant", "mo": "hant"}


def languages_in(fields: Mapping[str, Any]) -> Languages:
    """The codes that a row has, under any of the usual names."""
    return Languages(_first_of(fields, SOURCE_COLUMNS), _first_of(fields, TARGET_COLUMNS))


def _first_of(fields: Mapping[str, Any], names: Iterable[str]) -> str:
    values = (fields.get(name) for name in names)
    return str(next((value for value in values if value is not None), "")).strip()


def names_language(name: str) -> bool:
    """Whether this name of a column or file is that of a language: `ko`, `Korean`, `en-GB`, `ace_Arab`."""
    language, *more = plain_code(name).split("_")
    is_code = bool(NLLB_CODE.fullmatch(name)) or language in _languages_by_name()
    return is_code and all(len(part) in (2, 4) or part.isdecimal() for part in more)


def languages_of_files(first: str, second: str) -> Languages:
    """Those in the names of two aligned files: `a.ko` and `a.en`, `ko/a.txt` and `en/a.txt`, `a_ko.txt` and
    `a_en.txt`; none if the names have none."""
    for between in (r"[./\\]", r"[./\\_-]"):
        parts = zip(re.split(between, first)[::-1], re.split(between, second)[::-1], strict=False)
        different = [pair for pair in parts if pair[0] != pair[1]]
        if len(different) == 1 and all(map(names_language, different[0])):
            return Languages(*different[0])
    return Languages()


@functools.lru_cache(maxsize=256)
def is_swapped(sides: Languages, asked: Languages) -> bool:
    """Whether the data's first text is in the language asked for as target, and its second in that of the source. A
    language that was not asked for, and a name that is no language's, fit any.

        is_swapped(Languages("ko", "en"), Languages("eng_Latn", "kor_Hang"))  → True

    Raises:
        UserError: the data is in other languages.
    """
    as_they_are, swapped = (
        [_likeness(*pair) for pair in zip(order, asked, strict=True)] for order in (sides, sides.swapped())
    )
    if not all(as_they_are) and not all(swapped):
        wanted = " and ".join(f"{side} {language}" for side, language in asked._asdict().items() if language)
        raise UserError(
            f"the data names its two texts {sides.source} and {sides.target}, and those asked for are {wanted}."
            " Give the data's own, or none; names in the data that are wrong have to be mended there."
        )
    return all(swapped) and (not all(as_they_are) or sum(swapped) > sum(as_they_are))


def is_same_language(name: str, other: str) -> bool:
    """Whether both are the same language, in the same region if both say one."""
    return names_language(name) and bool(other) and _likeness(name, other) == 2


def _likeness(side: str, asked: str) -> int:
    """0 for two languages, 1 for one language of two regions or if one is not known, 2 for the same."""
    if not asked or not names_language(side):
        return 1
    side, asked = plain_code(side), plain_code(asked)
    parts = side.split("_"), asked.split("_")
    if names_of(parts[0][0]).isdisjoint(names_of(parts[1][0])):
        return 0
    if fits_code(side, asked) and fits_code(asked, side):
        return 2
    return 0 if any(len(part) == 4 for more in parts for part in more[1:]) else 1


def plain_code(name: str) -> str:
    """`__ko__`, `<2ko>`, `>>ko<<`, `ko-KR` → ko, ko, ko, ko_kr."""
    return re.sub(r"^__|__$|^<2|>$|^>>|<<$", "", name.strip()).replace("-", "_").casefold()


def has_same_script(wanted: str, code: str) -> bool:
    return "_" in wanted and wanted.split("_")[1] == code.partition("_")[2]


def fits_code(wanted: str, code: str) -> bool:
    """Whether two codes do not contradict each other, one of which may be more exact: zh_TW fits zho_Hant, ko_KR fits
    kor_Hang, kor_Kore does not. Only scripts of both (four letters), or regions of both, can contradict."""
    parts = wanted.split("_")[1:], code.split("_")[1:]
    wanted_script, script = (next((part for part in side if len(part) == 4), "") for side in parts)
    wanted_region, region = (next((part for part in side if len(part) == 2), "") for side in parts)
    if not wanted_script and "zh" in names_of(code.split("_")[0]):
        wanted_script = SCRIPT_OF_REGION.get(wanted_region, "")
    if wanted_script and script:
        return wanted_script == script
    return not (wanted_region and region) or "xx" in (wanted_region, region) or wanted_region == region


def english_name(language: str) -> str:
    """`"ko"`, `"kor_Hang"`, `"Korean"` → `"Korean"`. UserError for a language that is not in the table."""
    return _entry(language)[-1]


def short_code(language: str) -> str:
    """The same → `"ko"`."""
    return _entry(language)[0]


def language_code(language: str) -> str:
    """The same; and of NLLB's and M2M100's codes without a name here their own: `"ceb_Latn"` → `"ceb"`."""
    code = plain_code(language).split("_")[0]
    is_of_a_model = NLLB_CODE.fullmatch(language) or code in OF_M2M100
    return code if is_of_a_model and code not in _languages_by_name() else short_code(language)


def _entry(language: str) -> list[str]:
    found = _languages_by_name().get(plain_code(language).split("_")[0])
    if found is None:
        names = [names[-1] for names in _table()]
        near = nearest(language, [name for names in _table() for name in names], cutoff=0.5)
        hint = f" Did you mean '{near}'?" if near else ""
        raise UnknownLanguage(f"'{language}' is no language whose English name is known.{hint}", names)
    return found


def names_of(language: str) -> set[str]:
    """All names of a language, with itself: ko → ko, kor, korean."""
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
"""ISO 639-1, ISO 639-3 (with the codes of models: arb for ara, cmn for zho), English name. pycountry and langcodes
have neither these codes nor these short names ("Modern Greek (1453-)"), and bring 5 to 20 MB."""
