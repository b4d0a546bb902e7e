"""What counts as a text, what is said of what does not, and that a text is never changed."""

from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.data_prep.rows.valid_text import (
    NONCHARACTERS,
    UNFIT,
    Fault,
    described,
    joined,
    listed,
    missing,
    text,
)

NO_STRING = "'output' is not a string"
AS_TEXT = "Write it as one: in quotes in JSON, as a column of strings in a table (in pandas: .astype(str))."

ALL_NONCHARACTERS = [chr(code) for code in range(0x110000) if 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE]


@pytest.mark.parametrize(
    "value",
    ["a", " a\n", "\ufeffa", "가\u1100\u1161\u11a8", "👩\u200d🔬", "\x01\x02", "a\x1b[0m", "\ufffd", "\ufffc", "῾⿾"],
)
def test_a_sound_text_is_the_very_value(value):
    assert text(value, "output") is value


@pytest.mark.parametrize(
    "value, kind, reason",
    [
        (None, "'output' is null", "'output' is null; a string is due."),
        (5, NO_STRING, f"'output' is a number (5), not a string. {AS_TEXT}"),
        (True, NO_STRING, f"'output' is true or false (True), not a string. {AS_TEXT}"),
        (date(2026, 1, 2), NO_STRING, f"'output' is a date (datetime.date(2026, 1, 2)), not a string. {AS_TEXT}"),
        (
            float("nan"),
            "'output' is NaN",
            "'output' is NaN, a missing value. Drop such rows, or fill them in (in pandas: dropna or fillna).",
        ),
        (
            ["a", "b"],
            NO_STRING,
            "'output' is a list (['a', 'b']), not a string. Write the string that is inside of it, at 0, or write a"
            " row for each.",
        ),
        (
            {"n": 1, "b": {"c": "d"}},
            NO_STRING,
            "'output' is an object ({'b': {'c': 'd'}, 'n': 1}), not a string. Write the string that is inside of it,"
            " at b.c. To learn all of it, write it as JSON in a string.",
        ),
        ([1], NO_STRING, "'output' is a list ([1]), not a string. Write a string, or leave the row out."),
        (
            b"a",
            NO_STRING,
            "'output' is a bytes (b'a'), not a string. Decode it (in pandas: df['output'] ="
            " df['output'].str.decode('utf-8')).",
        ),
        ("", "empty output", "'output' is empty: a row needs one to be learned from."),
        (" \n\t\x0b\u3000", "empty output", "'output' is empty: a row needs one to be learned from."),
        ("\u200b\ufeff \u2060\u00ad\u200d", "empty output", "'output' is empty: a row needs one to be learned from."),
        ("\u3164\u115f\U000e0061", "empty output", "'output' is empty: a row needs one to be learned from."),
        (
            "b\ud83d",
            "broken Unicode",
            "'output' holds U+D83D at character 2: half of a broken symbol, or a byte that is no UTF-8.",
        ),
        (
            "가\0나",
            "NUL in the text",
            "'output' holds a NUL, U+0000 at character 2: no text has one. The file may be binary, or UTF-16.",
        ),
        (
            "a\U0010ffff",
            "noncharacter in the text",
            "'output' holds a noncharacter, U+10FFFF at character 2: Unicode keeps it for a program's own use. Take it"
            " out.",
        ),
    ],
)
def test_what_is_no_text_is_a_fault_with_its_kind_and_reason(value, kind, reason):
    with pytest.raises(Fault) as fault:
        text(value, "output")
    assert (fault.value.field, fault.value.kind, fault.value.reason) == ("output", kind, reason)


def test_every_noncharacter_is_refused_and_its_neighbours_are_not():
    assert len(ALL_NONCHARACTERS) == 66
    for character in ALL_NONCHARACTERS:
        with pytest.raises(Fault, match="noncharacter"):
            text(f"word {character}", "output")
    for code in (0xFDCF, 0xFDF0, 0xFFFD, 0x1FFFD, 0x10FFFD, 0x10000):
        assert text(chr(code), "output") == chr(code)
    assert len(NONCHARACTERS) == 3 + 34


def test_a_nul_in_plain_ascii_is_found_too():
    with pytest.raises(Fault, match="U\\+0000 at character 3"):
        text("ab\0", "output")


def test_emptiness_is_allowed_where_it_is_said_to_be_and_nothing_else():
    assert text(" ", "input", may_be_empty=True) == " "
    assert text("\u200b", "input", may_be_empty=True) == "\u200b"
    with pytest.raises(Fault):
        text("\0", "input", may_be_empty=True)


@settings(derandomize=True, database=None)
@given(st.text(st.characters(exclude_categories=()), max_size=30))
def test_the_fast_path_agrees_with_the_plain_rule(value):
    is_unfit = bool(UNFIT.search(value))
    try:
        assert text(value, "output") is value
    except Fault as fault:
        assert is_unfit != (fault.kind == "empty output")
    else:
        assert not is_unfit and value.strip()


def test_kinds_are_the_same_for_every_place():
    for number in (0, 7):
        with pytest.raises(Fault) as fault:
            text("", f"messages[{number}].content")
        assert (fault.value.field, fault.value.kind) == (f"messages[{number}].content", "empty messages.content")


def test_long_and_odd_values_are_described_shortly():
    assert described("가" * 100_000) == "a string ('가가가가가가가가가가가가...가가가가가가가가가가가가가')"
    assert len(described([list(range(1000))] * 1000)) < 90
    assert described(10**5000) == "a number (of very many digits)"
    assert described(None) == "null"
    assert listed(map(str, range(20))).endswith("'10', '11' and 8 more")


def test_a_missing_field_names_what_may_be_meant():
    assert missing("output", {"ouput": 1}, ("output",)).reason == (
        "'output' is missing; is 'ouput' meant? Rename it to 'output'."
    )
    assert missing("output", {}, ()).reason == "'output' is missing; the row has no fields."
    many = {f"column {number}": 1 for number in range(100)}  # not remembered, as few rows are so wide
    assert "and 88 more" in missing("output", many, ()).reason


def test_several_texts_are_one():
    assert joined(["Add.", "Be quick."], "Definition", "\n") == "Add.\nBe quick."
    with pytest.raises(Fault, match=r"'Definition\[1\]' is a number"):
        joined(["Add.", 2], "Definition", "\n")
    with pytest.raises(Fault, match="'Definition' is empty"):
        joined([], "Definition", "\n")
