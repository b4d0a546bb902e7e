"""Texts are cut at sentence ends, and what is cut is the text again, byte for byte."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.data_prep.text_to_ids.sentences import (
    NoRoom,
    NoSplitter,
    filled,
    fit,
    lines_and_sentences,
    merged,
    sentences_of,
    within,
)

TEXTS = {
    "en": ["Dr. Smith paid $3.50 to J.\u00a0R. Brown.  ", '"Why?" he asked. ', "See Fig. 3 at www.a.com. ", "Go!"],
    "kor_Hang": [
        "그는 3.5%를 냈다. ",
        "오늘은 날씨가 좋아요!\u3000",
        "밥 먹었니? ",
        '"왜요?" 라고 물었다. ',
        "네, 먹었어요.",
    ],
    "ja_XX": ["今日は天気がいい。", "明日も晴れるでしょう!", "本当ですか?"],
    "zho_Hans": ["今天天气很好。", "价格是3.5元。", "真的吗?"],
    "Arabic": ["ذهب الولد إلى المدرسة. ", "هل تحب القراءة؟ ", "السعر 3.5 دولار."],
    "tha_Thai": ["วันนี้อากาศดีมาก ", "ฉันไปตลาดกับแม่ ", "เราซื้อผลไม้หลายอย่าง"],
    "hi": ["मैं जाता हूँ। ", "तुम कहाँ हो?"],
}


@pytest.mark.parametrize("language", TEXTS)
def test_sentences_end_where_a_reader_of_the_language_ends_them(language):
    assert sentences_of("".join(TEXTS[language]), language) == TEXTS[language]


ODD = st.text(
    st.sampled_from(' \n\t\r\u00a0\u3000\u2028\x1c.。!?"“”()aBJ한中กำé\u0301😀\u200d…、,;03\x00\ufeff-#*।։'),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(text=st.one_of(ODD, st.text(max_size=60)), language=st.sampled_from([*TEXTS, "de", "ru", "my", "am"]))
@pytest.mark.parametrize("room", [4, 15])
def test_pieces_and_what_stands_between_them_are_the_text(text, language, room):
    def fits(piece):
        return len(piece.strip()) <= room

    assert "".join(sentences_of(text, language)) == text
    whole = lines_and_sentences(text, language)
    for pieces in (whole, within(whole, fits), filled(text, language, fits)):
        assert len(pieces.gaps) == len(pieces.texts) + 1
        between = (*pieces.texts, "")
        assert "".join(gap + piece for gap, piece in zip(pieces.gaps, between, strict=True)) == text
        assert all(piece and piece == piece.strip() for piece in pieces.texts)
    if room == 15:  # the longest character here that is one to a reader has fewer code points
        assert all(fits(piece) for piece in (*within(whole, fits).texts, *filled(text, language, fits).texts))


def test_lines_lists_headings_and_empty_lines_stay():
    text = " # News\r\n\n1. It rains. Go.\n---\n> - quoted\n\n  ***  \nThe 2nd of May. \n"
    pieces = lines_and_sentences(text, "en")
    assert pieces.texts == ["News", "It rains.", "Go.", "quoted", "The 2nd of May."]
    assert pieces.gaps == [" # ", "\r\n\n1. ", " ", "\n---\n> - ", "\n\n  ***  \n", " \n"]


def test_a_long_sentence_is_cut_at_clauses_then_at_blanks_then_between_characters():
    def fits(piece):
        return len(piece) <= 12

    assert fit(["Short one.", "We saw 3,000 men, and a dog barked."], fits) == [
        ["Short one."],
        ["We saw ", "3,000 men, ", "and a dog ", "barked."],
    ]
    assert fit(["今天天气很好\uff0c我们去公园、然后回家吃晚饭。"], fits) == [
        ["今天天气很好\uff0c", "我们去公园、", "然后回家吃晚饭。"]
    ]
    assert fit(["x" * 30 + "e\u0301"], lambda piece: len(piece) <= 31) == [["x" * 30, "e\u0301"]]
    with pytest.raises(NoRoom):
        fit(["abc"], lambda piece: False)


@given(st.lists(st.text("ab", min_size=1, max_size=5), max_size=40), st.integers(5, 20))
def test_neighbours_are_put_together_as_far_as_they_fit(units, room):
    slow, last = [], ""
    for unit in units:
        if last and len(last + unit) > room:
            slow.append(last)
            last = ""
        last += unit
    assert merged(units, lambda piece: len(piece) <= room) == slow + [last] * bool(last)


@pytest.mark.parametrize(
    "language, said",
    [("", "--source_language"), ("khm_Khmr", "no sentence splitter for Khmer"), ("kxr", "'kxr' is no language")],
)
def test_a_language_without_a_splitter_is_an_error(language, said):
    with pytest.raises(NoSplitter, match=said):
        sentences_of("One. Two.", language)


@pytest.mark.parametrize("language", ["ceb_Latn", "ilo", "jje_Hang"])
def test_codes_of_models_without_a_name_here_are_languages(language):
    assert sentences_of("One. Two.", language) == ["One. ", "Two."]


@pytest.mark.parametrize("language, module, extra", [("en", "sentencex", "documents"), ("th", "pycrfsuite", "thai")])
def test_a_missing_library_is_an_error_that_names_its_extra(monkeypatch, language, module, extra):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(NoSplitter, match=f"diptych\\[{extra}\\]"):
        sentences_of("One. Two.", language)
