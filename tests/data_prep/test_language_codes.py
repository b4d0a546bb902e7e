"""Language codes: what people call them, where each family writes them, and what `prepare` makes of both."""

import json
import re

import datasets
import pytest
import transformers

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.prepare import main
from diptych.data_prep.rows.language_names import is_swapped
from diptych.data_prep.rows.records import Languages
from diptych.data_prep.text_to_ids import tokenizer_files
from diptych.data_prep.text_to_ids.encode import encode_sources, encode_targets
from diptych.data_prep.text_to_ids.languages import codes_of, languages_note, resolved

BOTH = Languages("en", "ko")
NO_HELD_OUT = ("--validation_fraction", 0, "--test_fraction", 0)


@pytest.fixture(scope="module")
def load(language_folders):
    return lambda name, **settings: transformers.AutoTokenizer.from_pretrained(language_folders / name, **settings)


@pytest.mark.parametrize(
    "family, code_of",
    [
        ("nllb", {"ko": "kor_Hang", "en": "eng_Latn", "ko_KR": "kor_Hang", "Korean": "kor_Hang", "zh_TW": "zho_Hant"}),
        ("nllb", {"kor-hang": "kor_Hang", "ar": "arb_Arab", "lv": "lvs_Latn", "zh-CN": "zho_Hans"}),
        ("mbart50", {"ko": "ko_KR", "eng_Latn": "en_XX", "en_GB": "en_XX", "zh": "zh_CN", "kor": "ko_KR"}),
        ("m2m100", {"kor_Hang": "ko", "ko_KR": "ko", "zho_Hant": "zh", "ceb": "ceb", "__ko__": "ko"}),
        ("madlad", {"kor_Hang": "ko", "zho": "zh", "zh-Hant": "zh_Hant", "zh_Hans": "zh", "<2ko>": "ko"}),
        ("marian", {"ko": "kor", "English": "eng", ">>kor<<": "kor"}),
    ],
)
def test_a_short_or_another_name_is_the_code_of_the_tokenizer(load, family, code_of):
    codes = codes_of(load(family))
    assert {name: codes.find(name) for name in code_of} == code_of


@pytest.mark.parametrize(
    "family, name, message",
    [
        ("nllb", "kor_Kore", "Did you mean 'kor_Hang'\\? Known are ace_Arab, .*kor_Hang.*, zul_Latn"),
        ("nllb", "zh", "may be zho_Hans or zho_Hant"),
        ("nllb", "no", "may be nno_Latn or nob_Latn"),
        ("nllb", "Klingon", "is no language code"),
        ("mbart50", "zh_TW", "Did you mean 'zh_CN'"),
        ("m2m100", "kp", "Did you mean"),
    ],
)
def test_a_code_that_is_none_or_several_is_refused_with_the_nearest_and_the_list(load, family, name, message):
    with pytest.raises(UserError, match=message):
        codes_of(load(family)).find(name)


@pytest.mark.parametrize(
    "family, source, target",
    [
        ("nllb", ["eng_Latn", ..., "</s>"], ["kor_Hang", ..., "</s>"]),
        ("legacy", [..., "</s>", "eng_Latn"], ["kor_Hang", ..., "</s>"]),
        ("m2m100", ["__en__", ..., "</s>"], ["__ko__", ..., "</s>"]),
        ("mbart50", ["en_XX", ..., "</s>"], ["ko_KR", ..., "</s>"]),
        ("mbart", [..., "</s>", "en_XX"], ["ko_KR", ..., "</s>"]),  # the first is then the decoder's start
        ("madlad", ["▁", "<2ko>", ..., "</s>"], [..., "</s>"]),
        ("marian", [">>kor<<", ..., "</s>"], [..., "</s>"]),
        ("t5", [..., "</s>"], [..., "</s>"]),
    ],
)
def test_codes_stand_where_each_family_has_them_and_the_source_is_what_transformers_reads(
    load, family, source, target
):
    tokenizer = load(family)
    languages = resolved(tokenizer, BOTH)
    (read,) = encode_sources(tokenizer, ["Go home."], languages=[languages])
    (written,) = encode_targets(tokenizer, ["집에 가."], languages=[languages])
    for ids, expected in ((read, source), (written, target)):
        names, place = tokenizer.convert_ids_to_tokens(ids), expected.index(...)
        after = len(expected) - place - 1
        assert (names[:place], names[len(names) - after :]) == (expected[:place], expected[place + 1 :])
    plain = load(family, src_lang=languages.source) if hasattr(tokenizer, "src_lang") else tokenizer
    before = {"madlad": "<2ko> ", "marian": ">>kor<< "}.get(family, "")
    assert read == plain(f"{before}Go home.").input_ids
    (back,) = encode_sources(tokenizer, ["집에 가."], languages=[resolved(tokenizer, languages.swapped())])
    if family != "t5":
        assert read[:2] != back[:2] or read[-1] != back[-1]


def test_no_text_becomes_a_language_code(load):
    for family in ("nllb", "m2m100", "mbart", "madlad", "marian"):
        tokenizer = load(family)
        codes = codes_of(tokenizer)
        languages = resolved(tokenizer, BOTH)
        text = f"{' '.join(list(codes.spellings.values())[:40])} a"
        (ids,) = encode_sources(tokenizer, [text], languages=[languages])
        assert sum(token in codes.tokens.values() for token in ids) == 1


def prepare(capsys, tmp_path, tokenizer, data, *arguments):
    """Exit code, what was said, and the rows of the train split, if there are any."""
    out = tmp_path / "prepared"
    command = ["--data", data, "--tokenizer", tokenizer, "--out", out, *NO_HELD_OUT, *arguments]
    code = main(list(map(str, command)))
    said = "".join(capsys.readouterr())
    return code, said, list(datasets.load_from_disk(out)["train"]) if code == 0 else []


@pytest.fixture
def pairs_file(write_rows):
    return write_rows("08.tsv", ["Go home.\t집에 가.", "Hello.\t안녕하세요."])


GIVEN = ("--source_language", "eng_Latn", "--target_language", "kor_Hang")


def test_each_direction_of_parallel_text_has_its_own_codes(language_folders, pairs_file, capsys, tmp_path):
    for there, back in (("X", "Y"), ("", "")):
        options = ("--forward", there, "--backward", back, *GIVEN)
        code, said, rows = prepare(capsys, tmp_path, language_folders / "nllb", pairs_file, *options)
        assert code == 0 and "eng_Latn to kor_Hang and back" in said
        names = transformers.AutoTokenizer.from_pretrained(language_folders / "nllb").convert_ids_to_tokens
        firsts = [(names(row["input_ids"][0]), names(row["labels"][0])) for row in rows]
        assert firsts == [("eng_Latn", "kor_Hang"), ("kor_Hang", "eng_Latn")] * 2
        assert [(row["source_language"], row["target_language"]) for row in rows] == firsts
    assert [row["source"] for row in rows] == ["Go home.", "집에 가.", "Hello.", "안녕하세요."]


def test_languages_that_a_prepared_tokenizer_brings_are_swapped_for_the_way_back(
    language_folders, pairs_file, capsys, tmp_path
):
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        language_folders / "nllb", src_lang="eng_Latn", tgt_lang="kor_Hang"
    )
    tokenizer.save_pretrained(tmp_path / "said")
    _, _, rows = prepare(capsys, tmp_path, tmp_path / "said", pairs_file, "--forward", "", "--backward", "")
    assert [row["target_language"] for row in rows[:2]] == ["kor_Hang", "eng_Latn"]


def test_a_decoder_that_starts_with_the_code_starts_so_in_packed_rows(language_folders, pairs_file, capsys, tmp_path):
    options = ("--forward", "", "--backward", "", "--source_language", "en", "--target_language", "ko")
    code, said, _ = prepare(capsys, tmp_path, language_folders / "mbart", pairs_file, *options)
    assert code == 0 and "language ko is ko_KR" in said
    names = transformers.AutoTokenizer.from_pretrained(language_folders / "mbart").convert_ids_to_tokens
    starts = []
    for row in datasets.load_from_disk(tmp_path / "prepared" / "packed"):
        places = [place for place, position in enumerate(row["decoder_position_ids"]) if position == 0]
        starts += [names(row["decoder_input_ids"][it]) for it in places if row["decoder_segment_ids"][it]]
    assert sorted(starts) == ["en_XX", "en_XX", "ko_KR", "ko_KR"]
    assert "starts with the language code of each example's target" in said
    shown = json.loads((tmp_path / "prepared" / "report.json").read_text())["samples"]
    assert {names(sample["decoder_input_tokens"][0]["id"]) for sample in shown} == {"en_XX", "ko_KR"}


@pytest.mark.parametrize(
    "family, options, message",
    [
        ("nllb", ("--forward", "", "--source_language", "en", "--target_language", "kor_Kore"), "mean 'kor_Hang'"),
        ("nllb", ("--forward", ""), "that of the target is not given"),
        ("m2m100", ("--forward", ""), "that of the target is not given"),
        ("marian", ("--forward", ">>kor<< "), "--forward spells the language code >>kor<<.*--target_language kor"),
        ("madlad", ("--forward", "", "--backward", ""), "nothing else says which language is to be written"),
        ("t5", ("--forward", "", "--backward", ""), "nothing else says which language is to be written"),
        ("t5", ("--forward", "", "--source_language", "en"), "belong together"),
        ("t5", ("--forward", "", "--source_language", "en", "--target_language", "English"), "are one language, en"),
        ("t5", ("--forward", "", "--source_language", "en", "--target_language", "Klingon"), "English name is known"),
    ],
)
def test_languages_that_are_wrong_or_missing_are_refused(
    language_folders, pairs_file, capsys, tmp_path, family, options, message
):
    code, said, _ = prepare(capsys, tmp_path, language_folders / family, pairs_file, *options)
    assert code == 2
    assert re.search(message, said)


def test_codes_that_rows_bring_go_before_those_of_settings(language_folders, write_rows, capsys, tmp_path):
    rows = [
        {"source": "Hello.", "target": "안녕하세요.", "src_lang": "en", "tgt_lang": "ko"},
        {"source": "Hello.", "target": "Bonjour.", "src_lang": "eng_Latn", "tgt_lang": "fra_Latn"},
        {"source": "Hello.", "target": "Hola."},
        {"source": "Hello.", "target": "Hallo.", "src_lang": "en", "tgt_lang": "deu_Deva"},
        {"source": "Hola.", "target": "Hola!", "src_lang": "es"},
        {"source": "Halo.", "target": "Hello!", "src_lang": "en", "tgt_lang": "eng_Latn"},
    ]
    options = ("--forward", "", "--source_language", "en", "--target_language", "es")
    path = write_rows("rows.jsonl", rows)
    code, said, prepared = prepare(capsys, tmp_path, language_folders / "nllb", path, *options)
    assert code == 0 and "conflict" not in said
    assert [row["target_language"] for row in prepared] == ["kor_Hang", "fra_Latn", "spa_Latn", "eng_Latn"]
    lines = (tmp_path / "prepared" / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
    reject, other = sorted(map(json.loads, lines), key=lambda reject: reject["row"])
    assert (other["row"], other["kind"]) == (5, "source and target in one language")
    assert (reject["row"], reject["kind"]) == (4, "unknown language") and "mean 'deu_Latn'?" in reject["reason"]


def test_languages_are_columns_names_of_a_translation_and_mapped_ones(language_folders, write_rows, capsys, tmp_path):
    path = write_rows("units.jsonl", [{"translation": {"en": "Go.", "ko": "가."}}])
    _, _, rows = prepare(capsys, tmp_path, language_folders / "nllb", path, "--forward", "", "--backward", "")
    assert [row["target_language"] for row in rows] == ["kor_Hang", "eng_Latn"]
    path = write_rows("mapped.jsonl", [{"first": "Go.", "second": "가.", "from": "en", "into": "ko"}])
    options = ("--map", "source_language=from", "target_language=into", "--forward", "")
    _, said, rows = prepare(capsys, tmp_path, language_folders / "nllb", path, *options)
    assert [row["target_language"] for row in rows] == ["kor_Hang"] and "not used" not in said


TMX = """<tmx version="1.4"><header srclang="ko"/><body><tu><tuv xml:lang="KO-KR"><seg>가.</seg></tuv>
<tuv xml:lang="en-GB"><seg>Go.</seg></tuv></tu></body></tmx>"""
KOREAN_FIRST = {
    "translation.jsonl": ([{"translation": {"ko": "가.", "en": "Go."}}], ()),
    "memory.tmx": (TMX.encode(), ()),
    "table.csv": (["ko,en", "가.,Go."], ("--languages", "ko", "en")),
    "mapped.tsv": (["kor_Hang\teng_Latn", "가.\tGo."], ("--map", "first=kor_Hang", "second=eng_Latn")),
    "header.tsv": (["ko\ten", "가.\tGo."], ()),
    "numbered.tsv": (["id\tko\ten", "1\t가.\tGo."], ()),
    "fields.jsonl": ([{"ko": "가.", "en": "Go."}], ()),
    "a.ko+a.en": (["가."], ()),
    "rows.jsonl": ([{"translation": {"en": "Go.", "ko": "가."}, "src_lang": "ko", "tgt_lang": "en"}], ()),
}


@pytest.mark.parametrize("name", KOREAN_FIRST)
@pytest.mark.parametrize("family", ["nllb", "t5"])
def test_the_languages_that_data_names_say_which_text_is_which(
    language_folders, write_rows, capsys, tmp_path, name, family
):
    lines, options = KOREAN_FIRST[name]
    path = write_rows(name.partition("+")[0], lines)
    if "+" in name:
        path = f"{path}+{write_rows('a.en', ['Go.'])}"
    texts = {"en": "Go.", "ko": "가."}
    for first, second in (("en", "ko"), ("ko", "en")):
        asked = ("--source_language", first, "--target_language", second, "--forward", "", "--backward", "")
        code, said, rows = prepare(capsys, tmp_path, language_folders / family, path, *options, *asked)
        first, second = ("ko", "en") if name == "rows.jsonl" else (first, second)  # as the row itself says
        assert code == 0, said
        names = {"ko": "Korean", "en": "English"}
        words = f"translate {names[first]} to {names[second]}: " if family == "t5" else ""
        assert (rows[0]["source"], rows[0]["target"]) == (words + texts[first], texts[second])
        codes = {"ko": "kor_Hang", "en": "eng_Latn"} if family == "nllb" else {"ko": "ko", "en": "en"}
        if name != "rows.jsonl":
            assert said.count("its second side, which is in") == (first == "en")
        assert (rows[0]["source_language"], rows[0]["target_language"]) == (codes[first], codes[second])
    others = ("--source_language", "fr", "--target_language", "ko", "--forward", "")
    code, said, _ = prepare(capsys, tmp_path, language_folders / family, path, *options, *others)
    if name not in ("rows.jsonl", "numbered.tsv"):
        assert code == 2 and re.search(
            "names its two texts ko.* and en.*, and .* are source fr and target ko", said, re.I
        )


def test_a_table_of_more_columns_than_a_pair_is_not_guessed_at(language_folders, write_rows, capsys, tmp_path):
    for name, lines, message in (
        ("a.tsv", ["1\tGo.\t가.", "2\tHi.\t안녕."], "3 columns and no header.*'Go.', '가.'.*--map first=1 second=2"),
        ("b.tsv", ["id\ten\tko", "1\tGo.\t가."], "'id', 'en', 'ko', and pairs are of two.*--languages en ko"),
    ):
        path = write_rows(name, lines)
        code, said, _ = prepare(capsys, tmp_path, language_folders / "t5", path, "--forward", "To Korean:")
        assert code == 2 and re.search(message, said)
    licensed = write_rows("c.tsv", ["Go.\t가.\tCC-BY 2.0"])
    assert prepare(capsys, tmp_path, language_folders / "t5", licensed, "--forward", "To Korean:")[0] == 0


@pytest.mark.parametrize(
    "sides, asked, swapped",
    [
        (("ko", "en"), ("", "Korean"), True),
        (("zho_Hans", "zho_Hant"), ("zh_TW", "zh_CN"), True),
        (("pt-BR", "pt-PT"), ("por_Latn", "pt_PT"), False),
        (("zh-TW", "en"), ("en_XX", "zh_CN"), True),  # mBART-50 has no other Chinese
        (("ace_Arab", "eng"), ("en", "ace_Arab"), True),
        (("text", "other"), ("en", "ko"), False),
        (("en", "kr"), ("ko", "en"), True),
        (("zho_Hant", "en"), ("zho_Hans", "en"), None),
        (("en", "ko"), ("en", "de"), None),
    ],
)
def test_languages_of_data_and_of_settings_are_the_same_under_different_names(sides, asked, swapped):
    if swapped is None:
        with pytest.raises(UserError, match="names its two texts"):
            is_swapped(Languages(*sides), Languages(*asked))
    else:
        assert is_swapped(Languages(*sides), Languages(*asked)) == swapped


def test_a_shipped_sample_keeps_its_instructions_on_the_right_side(language_folders, capsys, tmp_path):
    options = ("--source_language", "ko", "--target_language", "en", "--max_source_tokens", 512)
    _, said, rows = prepare(capsys, tmp_path, language_folders / "t5", "tatoeba", *options, "--template", "translate")
    assert rows[0]["source"].startswith("Translate Korean to English:") and rows[0]["target_language"] == "en"
    assert not rows[0]["input"].isascii()


def test_languages_that_a_tokenizer_cannot_write_are_said_to_be_left_out(load, language_folders):
    note = "prompts without an instruction begin 'translate English to Korean:', and for others they are not used"
    assert note in languages_note(load("t5"), BOTH)
    assert "those given are not used" in languages_note(load("t5"), Languages("", "ko"))
    assert languages_note(load("t5"), Languages()) == ""
    assert languages_note(load("nllb"), Languages("eng_Latn", "kor_Hang")) == ""
    nllb, says = load("nllb", src_lang="eng_Latn", tgt_lang="kor_Hang"), ", as the tokenizer says without "
    assert languages_note(nllb, Languages("", "fr")) == f"eng_Latn to fra_Latn{says}--source_language"
    both = "--source_language and --target_language"
    assert languages_note(nllb, Languages()) == f"eng_Latn to kor_Hang{says}{both}"
    assert languages_note(nllb, Languages("ko", "en")) == "kor_Hang to eng_Latn"


def test_rows_of_token_ids_have_the_languages_of_their_codes(language_folders, write_rows, load, capsys, tmp_path):
    swapped = ("kor_Hang", "eng_Latn")
    for family, codes in (("nllb", swapped), ("legacy", swapped), ("madlad", ("", "en"))):
        tokenizer = load(family)
        languages = [resolved(tokenizer, BOTH.swapped())]
        row = {"input_ids": encode_sources(tokenizer, ["집에 가."], languages=languages)[0]}
        row["labels"] = encode_targets(tokenizer, ["Go home."], languages=languages)[0]
        code, said, rows = prepare(capsys, tmp_path, language_folders / family, write_rows(f"{family}.jsonl", [row]))
        assert code == 0, said
        assert (rows[0]["source_language"], rows[0]["target_language"]) == codes


def test_a_tokenizer_without_codes_is_told_in_words_where_a_row_has_none_of_its_own(
    language_folders, write_rows, capsys, tmp_path
):
    path = write_rows("pairs.tsv", ["Go home.\t집에 가."])
    options = ("--backward", "", "--source_language", "en", "--target_language", "kor_Hang")
    options += ("--forward", "Say it in Korean:")
    _, said, rows = prepare(capsys, tmp_path, language_folders / "t5", path, *options)
    sources = ["Say it in Korean: Go home.", "translate Korean to English: 집에 가."]
    assert [row["source"] for row in rows] == sources and "has no language codes" in said
    row = {"instruction": "Port it.", "input": "x", "output": "y", "source_lang": "Python"}
    code = write_rows("code.jsonl", [row])
    exit_code, _, rows = prepare(capsys, tmp_path, language_folders / "t5", code)
    assert exit_code == 0 and rows[0]["source_language"] == "Python"  # a column like any other


def test_a_template_that_does_not_fit_the_languages_is_refused(language_folders, pairs_file, capsys, tmp_path):
    frame = tmp_path / "frame.jinja"
    frame.write_text("{# decoder_prefix: fra_Latn #}\n{{ instruction }}{{ input }}")
    for template, message in (
        (frame, "decoder_prefix names fra_Latn, and the target is in kor_Hang"),
        ("alpaca", "is built around an instruction, and there is none"),
    ):
        options = ("--forward", "", *GIVEN, "--template", template)
        code, said, _ = prepare(capsys, tmp_path, language_folders / "nllb", pairs_file, *options)
        assert code == 2 and message in said


def test_a_sentencepiece_model_without_its_package_names_the_package(monkeypatch, language_folders):
    def refuse(*_, **__):
        raise ValueError("`tiktoken` is required to read a `tiktoken` file. Install it with `pip install tiktoken`.")

    monkeypatch.setattr(tokenizer_files.AutoTokenizer, "from_pretrained", refuse)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"that is missing: pip install 'diptych\[sentencepiece\]'"):
        tokenizer_files.open_tokenizer(str(language_folders / "nllb"))
