"""Whatever `diptych prepare` reads is text for a tokenizer as well, each text once, and what is not is counted."""

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.prepare import main as prepare
from diptych.data_prep.tokenizer_tools.tokenizer_texts import open_texts

ROWS = [
    {"instruction": "Name the capital.", "input": "France", "output": "Paris"},
    {"instruction": "수도를 말하라.", "input": "", "output": "서울"},
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "I."},
]
SHARED = [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]
TEXTS = ["Name the capital.", "France", "Paris", "수도를 말하라.", "서울"]


def csv_of(rows):
    return [",".join(row) for row in (ROWS[0].keys(), *(row.values() for row in rows))]


def tmx_of(*languages):
    sides = "".join(f'<tuv xml:lang="{language}"><seg>in {language}</seg></tuv>' for language in languages)
    return f'<?xml version="1.0"?><tmx version="1.4"><header/><body><tu>{sides}</tu></body></tmx>'.encode()


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz", "a.csv", "a.csv.zst", "a.parquet", "a.arrow"])
def test_every_kind_of_file_gives_the_same_texts(name, write_rows, tmp_path):
    path = str(tmp_path / name)
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif name.endswith(".arrow"):
        table = pyarrow.Table.from_pylist(ROWS)
        with pyarrow.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    else:
        plain = name.removesuffix(".gz").removesuffix(".zst")
        path = write_rows(plain, csv_of(ROWS) if plain == "a.csv" else ROWS)
        packer = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.rpartition(".")[2])
        path = write_rows(name, packer((tmp_path / plain).read_bytes())) if packer else path
    texts = open_texts([path])
    assert list(texts()) == TEXTS == list(texts())
    assert texts.left_out() == ""


@pytest.mark.parametrize(
    ("rows", "texts"),
    [
        ([{"messages": CHAT}], ["Be brief.", "Hi.", "Hello.", "Who?", "I."]),
        ([{"conversations": SHARED}], ["Hi.", "Hello."]),
        ([{"prompt": "The sky is", "completion": " blue."}], ["The sky is", " blue."]),
        ([{"document": "It rained all day.", "summary": "Rain."}], ["It rained all day.", "Rain."]),
        ([{"translation": {"en": "Go.", "ko": "가."}}], ["Go.", "가."]),
        (
            [{"instruction": "Add.", "instances": [{"input": "1", "output": "one"}, {"input": "2", "output": "two"}]}],
            ["Add.", "1", "one", "2", "two"],
        ),
        ([{"text": "Only this."}, {"text": None, "id": 3}], ["Only this."]),
    ],
    ids=lambda rows: ", ".join(rows[0]) if isinstance(rows[0], dict) else "",
)
def test_a_row_gives_each_of_its_texts_once_and_none_of_ours(rows, texts, write_rows):
    assert list(open_texts([write_rows("rows.jsonl", rows)])()) == texts


def test_parallel_text_needs_no_direction(write_rows):
    pairs = open_texts([write_rows("pairs.tsv", ["Go.\t가.\tCC-BY"]), write_rows("m.tmx", tmx_of("en", "ko"))])
    assert [text for _, text in pairs.pairs()] == ["Go.", "가.", "in en", "in ko"]
    assert len(set(open_texts(["tatoeba"])())) > 5000


def test_any_other_file_is_a_text_a_line(write_rows, capsys):
    content = "\ufeffone\r\n\n  two \n셋".encode()
    for name, packed in (("a.en", content), ("b.txt", content), ("c.txt.gz", gzip.compress(content))):
        assert list(open_texts([write_rows(name, packed)])()) == ["one", "  two ", "셋"]
        assert f"{name}: a text a line" in capsys.readouterr().out


def test_a_quote_mark_of_a_tsv_is_text_and_a_text_field_in_its_first_line_makes_it_the_header(write_rows):
    path = write_rows("a.tsv", ["a\tb", '"I go.\t나는 간다.', 'Then."\t그래서.'])
    assert list(open_texts([path])()) == ["a", "b", '"I go.', "나는 간다.", 'Then."', "그래서."]
    assert list(open_texts([path], ["a"])()) == ['"I go.', 'Then."']


def test_folders_and_globs_hold_rows_and_plain_text(write_rows, tmp_path, monkeypatch, capsys):
    (tmp_path / "corpus" / "deep").mkdir(parents=True)
    (tmp_path / "corpus" / ".hidden").mkdir()
    for name, rows in (
        ("a.txt", ["one"]),
        ("deep/b.txt", ["two"]),
        (".hidden/c.txt", ["three"]),
        ("d.jsonl", ROWS[:1]),
        ("e.pdf", ["four"]),
    ):
        write_rows(f"corpus/{name}", rows)
    monkeypatch.chdir(tmp_path)
    found = list(open_texts(["corpus"]).pairs())
    assert found[:2] == [("corpus/a.txt", "one"), ("corpus/deep/b.txt", "two")]
    assert [text for file, text in found[2:] if file == "corpus/d.jsonl"] == TEXTS[:3] and len(found) == 5
    shown = capsys.readouterr().out
    assert "corpus/e.pdf is of no kind that is known and was not read" in shown
    assert "a.txt is of no kind" not in shown
    assert list(open_texts(["corpus/*.txt", "corpus/a.txt"])()) == ["one"]  # a file that comes up twice is read once


def test_a_prepared_folder_gives_its_train_split(write_rows, bpe_folder, tmp_path):
    rows = [{"instruction": f"Say {number}.", "input": "", "output": f"It is {number}."} for number in range(30)]
    out = tmp_path / "prepared"
    assert not prepare(
        ["--data", write_rows("rows.jsonl", rows), "--tokenizer", str(bpe_folder), "--out", str(out)]
        + ["--template", "plain"]
    )
    train = datasets.load_from_disk(str(out))["train"]
    expected = [text for row in train for text in (row["source"], row["target"])]
    assert list(open_texts([str(out)])()) == expected == list(open_texts([str(out / "train")])())
    datasets.DatasetDict({"test": train}).save_to_disk(tmp_path / "tests_only")
    with pytest.raises(UserError, match="tests_only: nothing is left to train on"):
        open_texts([str(tmp_path / "tests_only")])


def test_columns_of_rows_without_a_format_are_named(write_rows, capsys):
    odd = write_rows("odd.jsonl", [{"frage": "Was?", "antwort": {"kurz": "Das."}}, {"frage": "Wo?"}])
    with pytest.raises(UserError, match="out of these: --text_fields frage antwort.kurz"):
        open_texts([odd])
    assert list(open_texts([odd], ["frage", "antwort.kurz"])()) == ["Was?", "Das.", "Wo?"]
    with pytest.raises(UserError, match="has none of the columns words. Columns there are 'frage', 'antwort'"):
        open_texts([odd], ["words"])
    with pytest.raises(UserError, match="--text_fields translation.en translation.fr translation.ko"):
        open_texts([write_rows("m.tmx", tmx_of("en", "fr", "ko"))])


def test_bad_rows_are_counted_and_said(write_rows):
    rows = [*ROWS, {"instruction": "Say it.", "output": ""}, {"instruction": "And this.", "output": 5}]
    path = write_rows("rows.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in rows) + b"{broken\n")
    plain = write_rows("a.txt", b"good\n" * 30 + b"\xff\xfe\xfd\n")
    texts = open_texts([plain, path])
    assert list(texts()) == ["good"] * 30 + TEXTS == list(texts())
    assert texts.rejects.count == 4  # of one reading, however often it is done
    assert "rows left out: 4 (" in texts.left_out() and "1 × empty output" in texts.left_out()
    assert f"The first, {plain}:31: invalid UTF-8: byte 0xff at byte offset 150" in texts.left_out()
    named = open_texts([path], ["output"])
    assert list(named()) == ["Paris", "서울"]
    assert "'output' is a number (5), not a string" in named.left_out()


def test_where_there_is_no_text_it_is_said(write_rows):
    texts = open_texts([write_rows("rows.jsonl", [{"instruction": "Say it.", "output": ""}])])
    with pytest.raises(UserError, match="no text in what was read.*rows left out: 1 .1 × empty output"):
        list(texts())
    with pytest.raises(UserError, match="holds token ids, and a tokenizer needs the texts"):
        open_texts([write_rows("ids.jsonl", [{"input_ids": [1, 2], "labels": [3]}])])
    with pytest.raises(UserError, match="there is no such file"):
        open_texts(["nowhere.txt"])
    with pytest.raises(UserError, match="give --data FILE"):
        open_texts([])
