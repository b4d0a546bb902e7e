"""`diptych tokenizer` as a person uses it: files in, a folder or a table out, one message where something is wrong."""

import json

import datasets
import huggingface_hub
import pytest
from transformers import AutoTokenizer

from diptych.data_prep.text_to_ids.extend_tokenizer import pieces_of_new_tokens
from diptych.data_prep.tokenizer_tools.tokenizer_command import main


@pytest.fixture(scope="module")
def korean(pairs, tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "ko.txt"
    path.write_text("".join(f"{korean}\n" for _, korean in pairs), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def t5_folder(tokenizers_by_family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    tokenizers_by_family["t5"].save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "t5", "decoder_start_token_id": 0}')
    return str(folder)


def test_train_writes_a_tokenizer_with_its_report(korean, tmp_path, capsys):
    assert main(["train", "--data", korean, "--kind", "bpe", "--out", str(tmp_path / "new")]) == 0
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "new" / "tokenizer_report.json").read_text())
    sizes = [point["vocab_size"] for point in report["vocab_size_curve"]]
    assert sizes[:2] == [1000, 2000] and report["vocab_size_chosen"] in sizes
    assert f"{report['vocab_size_chosen']:,}" in shown and "chosen" in shown and "13 of 13 hard texts" in shown
    assert len(AutoTokenizer.from_pretrained(tmp_path / "new")) == report["tokenizer"]["tokens"]


def test_report_on_every_kind_of_data(t5_folder, korean, tmp_path, capsys):
    rows = [{"instruction": "Say it.", "id": "x1", "output": "Go."}, {"instruction": "안녕", "id": "x2", "output": ""}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = datasets.Dataset.from_list([{"source": "Go now.", "target": "가."}])
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "prepared")
    data = [korean, str(tmp_path / "rows.jsonl"), str(tmp_path / "prepared")]
    out = tmp_path / "reports" / "t5.json"
    assert main(["report", t5_folder, "--data", *data, "--by", "file", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert [figures["texts"] for figures in report["languages"].values()] == [3318, 2, 2]
    shown = capsys.readouterr()
    assert "rows.jsonl: alpaca, recognised" in shown.out
    assert "warning: rows left out: 1 (1 × empty output)" in shown.err
    assert main(["report", t5_folder, "--data", data[1], "--text_fields", "id", "instruction"]) == 0
    assert "Hangul" in capsys.readouterr().out


def test_extend_writes_what_prepare_and_train_take(t5_folder, korean, tmp_path, capsys):
    out = tmp_path / "extended"
    assert main(["extend", t5_folder, "--data", korean, "--tokens", "200", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    extended = AutoTokenizer.from_pretrained(out)
    assert len(pieces_of_new_tokens(extended)) == 200
    report = json.loads((out / "tokenizer_report.json").read_text())
    assert report["new_tokens"] == 200
    assert report["after"]["total"]["tokens_per_word"] < 0.9 * report["before"]["total"]["tokens_per_word"]
    assert "200 tokens added" in shown and f"diptych prepare --tokenizer {out}" in shown
    assert f"diptych train --model {t5_folder} --grow_vocabulary true" in shown
    assert json.loads((out / "config.json").read_text())["decoder_start_token_id"] == 0


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_fewer_tokens_than_asked_for_are_said_with_the_reason(kind, tmp_path, capsys):
    (tmp_path / "few.txt").write_text("Go. Come and go.\nGo away.\n")
    few = ["train", "--data", str(tmp_path / "few.txt"), "--kind", kind]
    assert main([*few, "--vocab_size", "2000", "--out", str(tmp_path / "new")]) == 0
    got = len(AutoTokenizer.from_pretrained(tmp_path / "new"))
    shown = capsys.readouterr().err
    assert f"warning: the tokenizer has {got:,} tokens, and 2,000 were asked for: " in shown and "little text" in shown


def test_no_warning_where_there_are_as_many_as_asked_for(korean, tmp_path, capsys):
    assert main(["train", "--data", korean, "--vocab_size", "400", "--out", str(tmp_path / "new")]) == 0
    assert len(AutoTokenizer.from_pretrained(tmp_path / "new")) == 400
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["repot"], "there is no action 'repot'. Did you mean report? Choose from: train, report, extend."),
        (["train"], "nothing to read: give --data FILE"),
        (["train", "--data", "nowhere.txt"], "nowhere.txt: there is no such file."),
        (["train", "--dta", "x"], "Did you mean --data?"),
        (["train", "--vocab_size", "big"], "vocab_size is 'big'; it can be a whole number or auto."),
        (["extend", "./nowhere", "--data", "x"], "there is no folder ./nowhere. Name a checkpoint folder"),
        (["report", "t5-smal", "--data", "x"], "there is no folder t5-smal, nothing was downloaded under this name"),
        (["extend", "{t5}", "--data", "{full}/none.jsonl", "--out", "{new}"], "--text_fields words"),
        (["extend", "{t5}", "--data", "{full}/latin.txt", "--out", "{new}"], "latin.txt:1: invalid UTF-8: byte 0xff"),
        (["extend", "{t5}", "--data", "{full}/few.txt", "--out", "{new}"], "no new token stands 5 times in the data"),
        (
            ["extend", "{t5}", "--data", "{full}/few.txt", "--tokens", "0"],
            "tokens is 0; 1 to 10,000,000 tokens",
        ),
        (["extend", "{t5}", "--data", "{full}/few.txt", "--out", "{full}"], "will not be overwritten"),
        (["extend", "{byt5}", "--data", "{full}/few.txt", "--out", "{new}"], "ByT5Tokenizer) is written in Python"),
    ],
)
def test_mistakes_end_with_code_2_and_one_message(
    arguments, message, t5_folder, tokenizers_by_family, tmp_path, monkeypatch, capsys
):
    full = tmp_path / "full"
    full.mkdir()
    (full / "few.txt").write_text("Go.\n")
    (full / "none.jsonl").write_text('{"words": "a"}\n')
    (full / "latin.txt").write_bytes(b"\xff\xfd\n")
    tokenizers_by_family["byt5"].save_pretrained(tmp_path / "byt5")
    places = {"t5": t5_folder, "full": full, "new": tmp_path / "new", "byt5": tmp_path / "byt5"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert main([argument.format(**places) for argument in arguments]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.startswith("diptych tokenizer: ") and shown.count("\n") == 1
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())


def test_help_says_what_there_is(capsys):
    for words, code, said in (
        (["--help"], 0, "extend  a checkpoint and new texts"),
        (["extend", "--help"], 0, "whose tokenizer is extended"),
        ([], 2, "extend  a checkpoint and new texts"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        shown = capsys.readouterr()
        assert ended.value.code == code and said in (shown.err if code else shown.out)
