"""Lengths and languages: what is kept, what goes, and that a filter does not judge what it cannot know."""

import pickle
import subprocess
import sys
import unicodedata
from dataclasses import replace

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.data_prep.cleaning.filters import (
    LanguageFilter,
    LengthFilter,
    is_composed,
    script_of,
    source_text,
)
from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.records import Origin, Record
from diptych.data_prep.rows.text_language import language_of

FOREIGN = {
    "de": "Ich habe heute leider keine Zeit.",
    "es": "¿Dónde está la estación?",
    "pl": "Nie mam dziś czasu.",
    "ru": "Сегодня у меня нет времени.",
    "ja": "今日は時間がありません。",
    "zh": "我今天没有时间。",
    "el": "Σήμερα δεν έχω χρόνο.",
}


def record(source, output, instruction="Translate."):
    return Record(instruction=instruction, input=source, output=output, origin=Origin("rows", 1))


def test_bounds_are_included():
    five = LengthFilter(minimum_source=5, maximum_source=5, minimum_target=2, maximum_target=3)
    assert five.check(record("12345", "12")) is None
    assert five.check(record("12345", "123")) is None
    assert five.check(record("1234", "12")) == ("source too short", "The source has 4 characters, fewer than 5.")
    assert five.check(record("123456", "12")) == ("source too long", "The source has 6 characters, more than 5.")
    assert five.check(record("12345", "1"))[0] == "target too short"
    assert five.check(record("12345", "1234"))[0] == "target too long"


def test_lengths_are_counted_in_words_if_asked():
    words = LengthFilter(unit="words", maximum_source=3)
    assert words.check(record("one  two\nthree", "a")) is None
    assert words.check(record("one two three four", "a"))[1] == "The source has 4 words, more than 3."


def test_the_ratio_is_that_of_target_to_source():
    ratio = LengthFilter(minimum_ratio=0.5, maximum_ratio=2)
    assert ratio.check(record("1234", "12")) is None
    assert ratio.check(record("1234", "12345678")) is None
    kind, reason = ratio.check(record("1234", "1"))
    assert kind == "target short for its source"
    assert reason == "The target has 1 characters, the source 4: 0.25 times as many, below 0.5."
    assert ratio.check(record("1234", "123456789"))[0] == "target long for its source"


def test_a_filter_without_bounds_keeps_all(pairs):
    assert not any(LengthFilter().check(record(*pair)) or LanguageFilter().check(record(*pair)) for pair in pairs)


@pytest.mark.parametrize(
    "bounds, said",
    [
        ({"unit": "tokens"}, "characters or words"),
        ({"minimum_source": 9, "maximum_source": 3}, "minimum_source is 9, above maximum_source, 3"),
        ({"minimum_ratio": 2.0, "maximum_ratio": 1.0}, "no row could be kept"),
    ],
)
def test_bounds_that_keep_nothing_are_refused(bounds, said):
    with pytest.raises(UserError, match=said):
        LengthFilter(**bounds)


def test_the_source_is_the_input_or_else_the_instruction():
    assert source_text(record("an input", "x", instruction="long instruction")) == "an input"
    assert source_text(record(" ", "x", instruction="an instruction")) == "an instruction"


def test_of_tatoeba_one_row_goes_that_should_stay(pairs):
    """py3langid is unsure of most short English, and sure and wrong of one sentence in 3,318."""
    gone = [pair for pair in pairs if LanguageFilter(("en",), ("ko",)).check(record(*pair))]
    assert [source for source, _ in gone] == ["We'll meet again in October."]


def test_of_tatoeba_the_wrong_way_round_nearly_all_goes(pairs):
    judged = LanguageFilter(target=("en",))
    assert sum(judged.check(record("x", korean)) is not None for _, korean in pairs) > 0.998 * len(pairs)
    judged = LanguageFilter(source=("ko",))
    assert sum(judged.check(record(english, "x")) is not None for english, _ in pairs) > 0.7 * len(pairs)


def test_languages_are_named_right(pairs):
    english = [language_of(source)[0] == "en" for source, _ in pairs if len(source) >= 20]
    korean = [language_of(target)[0] == "ko" for _, target in pairs]
    assert sum(english) > 0.995 * len(english)
    assert sum(korean) > 0.999 * len(korean)


@pytest.mark.parametrize("code", FOREIGN)
def test_sentences_in_other_languages_go(code):
    assert LanguageFilter(target=("en", "ko")).check(record("x", FOREIGN[code])) is not None
    assert LanguageFilter(target=(code,)).check(record("x", FOREIGN[code])) is None


def test_the_reason_names_the_language_and_how_sure():
    kind, reason = LanguageFilter(("ko",), ("en",)).check(record(FOREIGN["de"], "x"))
    assert kind == "source in another language"
    assert regex.fullmatch(r"The source is 'de' \(confidence [01]\.\d\d\), not ko\.", reason)


@pytest.mark.parametrize("text", ["", "Go.", "12 + 12 = 24", "🙂🙂", "Tom!", "\ud800"])
def test_what_is_too_short_to_know_is_not_judged(text):
    assert LanguageFilter(("ko",), ("ko",)).check(record("예, 그렇습니다.", text)) is None


def test_an_unknown_language_is_refused_at_once():
    with pytest.raises(UserError, match="'kr' is no language that py3langid knows; did you mean"):
        LanguageFilter(target=("kr",))
    with pytest.raises(UserError, match="between 0 and 1"):
        LanguageFilter(target=("ko",), minimum_confidence=70)


def test_filters_travel_to_workers():
    for judge in (LanguageFilter(("en",), ("ko",)), LengthFilter(maximum_source=4)):
        there = pickle.loads(pickle.dumps(judge))
        row = record("Das ist ein langer deutscher Satz.", "x")
        assert there == judge and there.check(row) == judge.check(row) is not None


def test_without_py3langid_the_extra_is_named():
    code = (
        "import sys; sys.modules['py3langid.langid'] = None\n"
        "from diptych.data_prep.cleaning.filters import LanguageFilter, LengthFilter, script_of\n"
        "LengthFilter(); assert script_of('é') == 'Latin'\n"
        "LanguageFilter(('en',))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode and "UserError" in run.stderr
    assert "pip install 'diptych[clean]'" in run.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "text, script",
    [
        ("안녕, Tom!", "Latin"),
        ("안녕하세요, Tom!", "Hangul"),
        ("\u1100\u1161", "Hangul"),
        ("東京に行きます", "Hiragana"),
        ("东京", "Han"),
        ("カタカナ", "Katakana"),
        ("Привет, мир", "Cyrillic"),
        ("naïve", "Latin"),
        ("plain", "Latin"),
        ("1 + 1 = 2", "none"),
        ("…🙂", "none"),
        ("", "none"),
        ("ⲁⲃⲅ", "other"),
        ("\U0010ffff\ud800", "none"),
        ("שלום", "Hebrew"),
        ("สวัสดี", "Thai"),
        ("نعم", "Arabic"),
    ],
)
def test_the_script_is_that_of_most_letters(text, script):
    assert script_of(text) == script


NAMED = ("Latin", "Hangul", "Han", "Cyrillic", "Greek", "Arabic")


@settings(deadline=None)
@given(st.text(st.sampled_from("aZé가힣한漢字Жяαβعنـ 1.🙂"), max_size=30))
def test_scripts_are_those_that_regex_counts(text):
    counts = {name: len(regex.findall(rf"[\p{{Script={name}}}&&\p{{L}}]", text, flags=regex.V1)) for name in NAMED}
    found = script_of(text)
    assert counts.get(found, 0) == max(counts.values())
    assert (found == "none") == (not any(counts.values()))


@pytest.mark.parametrize("text", ["각각의 값", "café", "が"])
def test_a_record_is_composed_if_all_its_texts_are(text):
    composed = record(text, text)
    decomposed = unicodedata.normalize("NFD", text)
    assert decomposed != text and is_composed(composed)
    for field in ("instruction", "input", "output", "system"):
        assert not is_composed(replace(composed, **{field: decomposed}))
    assert not is_composed(replace(composed, history=((text, text), (text, decomposed))))
