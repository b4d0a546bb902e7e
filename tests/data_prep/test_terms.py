"""Terms and placeholders: found, written into sources, and checked in outputs."""

import json
import re
from unicodedata import normalize

import pytest
from datasets import load_from_disk
from hypothesis import given
from hypothesis import strategies as st

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.prepare import main
from diptych.data_prep.rows.records import Languages
from diptych.data_prep.rows.terms import masked, masked_pair, missing, read_terms, unmasked, with_marks

TERMS = "en\tko\ncat\t고양이\nbank account\t계좌\nbank\t은행\nSeoul\t서울\n# no term\n\n"
ENGLISH, KOREAN = Languages("eng_Latn", "kor_Hang"), Languages("ko", "en")


@pytest.fixture
def file(tmp_path):
    def write(text):
        (tmp_path / "terms.tsv").write_text(text, encoding="utf-8")
        return str(tmp_path / "terms.tsv")

    return write


def test_terms_are_found_by_whole_words_and_the_longest_of_them(file):
    terms, text = read_terms(file(TERMS)), "Cat, cats, a Bank account in Seoul, seoul bank."
    found = terms.found(text, ENGLISH)
    marked = "Cat [= 고양이], cats, a Bank account [= 계좌] in Seoul [= 서울], seoul bank [= 은행]."
    assert with_marks(text, found) == marked
    assert missing(found, "고양이가 서울에서") == ["계좌", "은행"]
    assert terms.found("cat", Languages()) and not terms.found("cat", KOREAN)


def test_words_end_where_their_script_ends_them(file):
    terms = read_terms(file("고양이\tcat\tko\ten\n猫\tcat\tja\ten\nแมว\tcat\tth\ten\nc++\tC++\n"))
    assert [it.source for it in terms.found("고양이가 길고양이를", KOREAN)] == ["고양이"]
    assert len(terms.found("黒猫と猫", Languages("ja_XX", "en_XX"))) == 2
    assert len(terms.found("มีแมวดำ", Languages("tha_Thai", "eng_Latn"))) == 1
    assert len(terms.found("C++ and c++11", ENGLISH)) == 2
    assert read_terms(file("straße\tstreet\n")).found("Die Straße", ENGLISH)  # whose other forms have another length
    assert missing(terms.found("c++", ENGLISH), "c++") == ["C++"]


@pytest.mark.parametrize(
    "text, said",
    [
        ("cat\t고양이\ncat\t냥이\n", "line 2 translates 'cat' as '냥이', and line 1 as '고양이'"),
        ("Cat\ta\ncat\tb\nCAT\tc\nCat\td\n", "line 4 translates 'Cat' as 'd', and line 1 as 'a'"),
        ("cat\ta\ten\tko\ncat\tb\n", "line 2 translates"),
        ("cat\tb\ncat\ta\ten\tko\n", "line 2 translates"),
        ("cat\n", "line 1 is 'cat'. Each line has a term, a tab"),
        ("cat\ta\txq\tko\n", "'xq' is no language"),
        ("# cat\ta\n", "has no terms"),
        ("Source\tTarget\ncat\ta\n", "names of columns, and no term"),
        ("en\txx\ncat\ta\n", "line 1 is 'en' and 'xx', and 'xx' is no language"),
    ],
)
def test_a_file_that_contradicts_itself_or_is_no_list_of_terms_is_an_error(file, text, said):
    with pytest.raises(UserError) as error:
        read_terms(file(text))
    assert said in str(error.value)


def test_a_character_in_parts_is_the_whole_one(file):
    """As file systems and some editors write them: NFD."""
    for form in ("NFC", "NFD"):
        terms = read_terms(file(normalize(form, "고양이\tchaton né\ncafé\t카페\n")))
        for text in ("고양이가 Café, cafe", normalize("NFD", "고양이가 Café, cafe")):
            found = terms.found(text, ENGLISH)
            assert missing(found, "né") == ["chaton né", "카페"] and len(found) == 2
            assert missing(found, normalize("NFD", "chaton né 카페")) == []


def test_one_term_of_two_pairs_of_languages_contradicts_nothing(file):
    terms = read_terms(file("cat\t고양이\ten\tko\ncat\tKatze\ten\tde\ncat\t고양이\ten\tko\n"))
    assert [it.target for it in terms.found("cat", Languages("en", "de"))] == ["Katze"]
    for text in ("eng_Latn\tjje_Hang\ncat\t고냉이\n", "cat\t고냉이\ten\tjje_Hang\ncat\t고양이\ten\tko\n"):
        terms = read_terms(file(text))  # a language that was added to a tokenizer
        assert [it.target for it in terms.found("cat", Languages("en", "jje_Hang"))] == ["고냉이"]
        assert "고냉이" not in [it.target for it in terms.found("cat", ENGLISH)]


def test_addresses_tags_fields_and_longer_numbers_become_placeholders():
    text = "See <b>http://a.com/x?y=1.</b> {name} %s 12 3 3.5 1,200 5% [#1] a@b.co 2024-01-02 (www.x.com/a)."
    found, values = masked(text)
    assert found == "See [#1][#2].[#3] [#4] [#5] [#6] 3 [#7] [#8] 5% [#9] [#10] [#11] ([#12])."
    assert masked("약20명, 2.5배, 10th, a12, 1,000.")[1] == ["20", "2.5", "1,000"]
    assert values[1::10] == ["http://a.com/x?y=1", "www.x.com/a"]


@given(st.lists(st.sampled_from(["<b>", "</b>", "12", "1,5", "http://a.b", "[#2]", "a", " ", ".", "x@y.z", "{a}"])))
def test_placeholders_become_their_values_again(parts):
    text = " ".join(parts)
    assert unmasked(*masked(text)) == (text, [])


def test_values_that_do_not_come_back_exactly_once_are_named():
    assert unmasked("[#1] [ # 2 ] [#2] [#7]", ["<b>", "12", "99"]) == ("<b> 12 12 [#7]", ["12", "99", "[#7]"])


def test_training_rows_get_placeholders_for_what_stands_once_on_both_sides():
    assert masked_pair("20 and 30, 30 at http://a.b/c", "http://a.b/c: 30, 20") == (
        "[#1] and 30, 30 at [#2]",
        "[#2]: 30, [#1]",
    )
    assert masked_pair("Visit https://a.com/x?y=0 or mail me@a.com.", "https://a.com/x?y=0에서, me@a.com로") == (
        "Visit [#1] or mail [#2].",
        "[#1]에서, [#2]로",
    )
    assert masked("https://a.com/서울 http://münchen.de/a")[0] == "[#1] [#2]"


def test_rows_that_differ_in_what_placeholders_stand_for_are_no_duplicates(tmp_path, capsys):
    rows = [{"instruction": f"It is {n} won.", "output": f"{n}원이다."} for n in range(100, 140)]
    for name, part in {"train": rows[:36], "test": rows[36:]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(part), encoding="utf-8")
    command = ["--data", str(tmp_path / "train.json"), "--test", str(tmp_path / "test.json")]
    command += [
        "--train_tokenizer",
        "bpe",
        "--vocab_size",
        "300",
        "--template",
        "plain",
        "--placeholders",
        "true",
        "--inline_share",
        "1",
    ]
    assert main([*command, "--validation_fraction", "0", "--out", str(tmp_path / "out")]) == 0
    found = load_from_disk(str(tmp_path / "out"))
    assert len(found["train"]) == 36 and set(found["train"]["source"]) == {"It is [#1] won."}
    assert "It is 136 won." in set(found["test"]["source"])  # a set of the user's own stays as it is
    assert "Changed    36 × source and target with placeholders" in capsys.readouterr().out


def test_prepare_marks_a_share_of_the_rows_that_have_a_term_on_both_sides(file, tmp_path):
    rows = [
        {"instruction": "Translate:", "input": f"cat w{n} {n}.", "output": f"고양이 w{n} {n}."}
        for n in range(100, 200)
    ]
    rows += [{"instruction": "Translate:", "input": f"cat a{n}.", "output": f"개 {n}."} for n in range(20)]
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows), encoding="utf-8")
    command = ["--data", str(data), "--train_tokenizer", "bpe", "--vocab_size", "300", "--template", "translate"]
    command += ["--validation_fraction", "0", "--test_fraction", "0", "--placeholders", "true"]

    def sources(name, text, *more):
        out = tmp_path / name
        assert main([*command, "--terms", file(text), "--out", str(out), *more]) == 0
        return load_from_disk(str(out))["train"].sort("origin")

    train = sources("half", TERMS)
    marked = [row for row in train if "[=" in row["source"]]
    assert 30 < len(marked) < 70 and all(row["input"].count("[") == 0 for row in train)
    assert {re.sub(r"w\d+", "w", row["source"]) for row in marked} == {"Translate: cat [= 고양이] w [#1]."}
    assert {re.sub(r"w\d+", "w", row["target"]) for row in marked} == {"고양이 w [#1]."}
    assert not any("[=" in row["source"] for row in train if "개" in row["target"])
    assert not [row for row in sources("none", TERMS, "--inline_share", "0") if "[" in row["source"]]
    again = sources("half", TERMS.replace("고양이", "개"))  # another file of the same name is another dataset
    assert all("[= 개]" in row["source"] for row in again if "[=" in row["source"])


def test_prepare_refuses_terms_that_contradict_each_other(file, tmp_path, capsys):
    command = ["--data", "tatoeba", "--train_tokenizer", "bpe", "--out", str(tmp_path / "out")]
    assert main([*command, "--terms", file("cat\ta\ncat\tb\n")]) == 2
    assert "line 2 translates 'cat'" in capsys.readouterr().err and not (tmp_path / "out").exists()
    (tmp_path / "terms.tsv").write_text("cat\ta\n", encoding="utf-16")
    assert main([*command, "--terms", str(tmp_path / "terms.tsv")]) == 2
    assert "is not in UTF-8" in capsys.readouterr().err
    assert main([*command, "--terms", file("qqq\ta\n"), "--vocab_size", "500"]) == 0
    assert "no example has a term of" in capsys.readouterr().err
