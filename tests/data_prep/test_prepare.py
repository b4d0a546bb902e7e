"""`diptych prepare` from end to end, in this process and as a command: what it writes, reuses, refuses and says."""

import copy
import gzip
import itertools
import json
import os
import random
import re
import subprocess
import sys
import time
import unicodedata
from dataclasses import fields

import datasets
import numpy
import pytest
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from diptych.data_prep.packing.packed_row import PACKED_COLUMNS, SHARED_COLUMN
from diptych.data_prep.pipeline.prepare_settings import PrepareSettings
from diptych.data_prep.pipeline.prepared_folder import FORMAT, beside
from diptych.data_prep.prepare import main
from diptych.data_prep.text_to_ids.templates import TEMPLATES, load_template, template_of

ROWS = [{"instruction": f"Say {n}.", "input": f"number {n}", "output": f"It is {n}."} for n in range(40)]
LONG_ROW = {"instruction": "Count.", "output": "one two three " * 20}
COMMAND = [sys.executable, "-m", "diptych", "prepare"]
SAMPLE = ["--data", "tatoeba", "--train_tokenizer", "bpe"]
GOOD = '{"instruction": "a", "output": "b"}'


@pytest.fixture
def prepare(tmp_path, bpe_folder, capsys):
    """prepare("--data", path) → exit code, standard output, standard error, with the trained BPE tokenizer."""

    def run(*arguments, out="prepared", tokenizer=bpe_folder):
        tokenizer_arguments = ["--tokenizer", str(tokenizer)] if tokenizer else []
        code = main([*map(str, arguments), *tokenizer_arguments, "--out", str(tmp_path / out)])
        return (code, *capsys.readouterr())

    return run


@pytest.fixture(name="path")
def path_of_rows(write_rows):
    """The file of ROWS."""
    return write_rows("rows.jsonl", ROWS)


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def rejects_of(folder):
    return [json.loads(line) for line in (folder / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]


def examples_of(folder):
    """Of each packed row (input_ids, labels, what its decoder starts with) of every example, segment by segment; they
    are the examples of the train split at `examples`."""
    train = datasets.load_from_disk(folder)["train"]
    for row in datasets.load_from_disk(folder / "packed"):
        row = {name: numpy.array(column) for name, column in row.items()}
        found = []
        for segment in range(1, len(row["examples"]) + 1):
            there = row["decoder_segment_ids"] == segment
            read = row[SHARED_COLUMN][there][0] if SHARED_COLUMN in row else segment
            ids = row["input_ids"][row["segment_ids"] == read].tolist()
            found.append((ids, row["labels"][there].tolist(), row["decoder_input_ids"][there][0]))
        whole = [train[int(place)] for place in row["examples"]]
        assert [ids for ids, _, _ in found] == [row["input_ids"] for row in whole]
        for (_, labels, start), row in zip(found, whole, strict=True):
            assert row["labels"] in (labels, [start, *labels])
        yield found


# What comes out


def test_a_prepared_folder_holds_what_training_needs(prepare, path, tmp_path):
    code, said, _ = prepare("--data", path, "--template", "plain")
    assert code == 0
    tables = datasets.load_from_disk(tmp_path / "prepared")
    assert {name: len(table) for name, table in tables.items()} == {"train": 36, "validation": 2, "test": 2}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "prepared" / "tokenizer")
    assert template_of(tokenizer) == TEMPLATES["plain"]
    features = tables["train"].features
    assert features["input_ids"] == features["labels"] == datasets.List(datasets.Value("int32"))
    assert set(features) == {"input_ids", "labels", "source", "target", "instruction", "input", "origin"}
    originals = {f"{path}:{number}": row for number, row in enumerate(ROWS, start=1)}
    for row in (row for table in tables.values() for row in table):
        original = originals.pop(row["origin"])
        assert row["source"] == f"{original['instruction']}\n\n{original['input']}"
        assert (row["instruction"], row["input"]) == (original["instruction"], original["input"])
        assert row["target"] == original["output"]
        assert row["input_ids"] == tokenizer(row["source"])["input_ids"]
        assert row["labels"] == tokenizer(row["target"])["input_ids"]
        assert row["labels"][-1] == tokenizer.eos_token_id
    assert originals == {}
    assert "Read       40 rows" in said and "40 kept, 0 rejected" in said
    assert "train 36 | validation 2 | test 2" in said


def test_a_tokenizer_is_trained_on_the_train_split_alone(prepare, write_rows, tmp_path):
    """Every word stands in one row: those of train rows become tokens, those of held-out rows do not."""
    words = ["zebra" + "".join(pair) for pair in itertools.product("abcdefghijklmnop", repeat=2)]
    rows = [{"instruction": "Repeat.", "input": f"{word} " * 9, "output": f"{word} " * 9} for word in words]
    path = write_rows("rows.jsonl", rows)
    code, _, error = prepare("--data", path, "--train_tokenizer", "bpe", "--vocab_size", "2000", tokenizer=None)
    assert code == 0
    assert re.search(r"the tokenizer has \d+ tokens, and 2,000 were asked for: this little text", error)
    tables = datasets.load_from_disk(tmp_path / "prepared")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "prepared" / "tokenizer")
    for name, table in tables.items():
        is_one_token = [len(tokenizer.tokenize(" " + row["input"].split()[0])) == 1 for row in table]
        assert all(is_one_token) if name == "train" else not any(is_one_token), name


def test_the_shipped_sample_is_prepared_with_a_trained_tokenizer(prepare, tmp_path):
    """Of a size that the data decides."""
    arguments = ["--train_tokenizer", "bpe", "--vocab_size", "auto", "--template", "translate"]
    code, said, _ = prepare("--data", "tatoeba", *arguments, tokenizer=None)
    assert code == 0
    assert "Read       3,318 rows, 6,636 examples in them, from tatoeba_eng_kor.tsv: 6,636 kept, 0 rejected" in said
    tables = datasets.load_from_disk(tmp_path / "prepared")
    sides = {name: {*table["input"], *table["target"]} for name, table in tables.items()}
    assert sides["train"].isdisjoint(sides["validation"] | sides["test"])
    assert sides["validation"].isdisjoint(sides["test"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "prepared" / "tokenizer")
    assert len(tokenizer) == 4000
    for row in tables["test"]:
        assert tokenizer.decode(row["labels"], skip_special_tokens=True) == row["target"]


@pytest.mark.parametrize("family", ["t5", "mbart50", "bart", "byt5", "m2m100"])
def test_existing_tokenizers_of_other_families_prepare(family, prepare, write_rows, tokenizers_by_family, tmp_path):
    tokenizers_by_family[family].save_pretrained(tmp_path / family)
    rows = [*ROWS, {"instruction": "Keep </s> as it is.", "input": "</s><pad>", "output": "a </s> b"}]
    code, said, _ = prepare("--data", write_rows("rows.jsonl", rows), tokenizer=tmp_path / family)
    assert (code, "41 kept" in said) == (0, True)
    for table in datasets.load_from_disk(tmp_path / "prepared").values():
        for row in table:
            assert row["labels"].count(tokenizers_by_family[family].eos_token_id) == 1


def test_several_processes_encode_as_one_does(prepare, path, tmp_path):
    assert prepare("--data", path, "--workers", 1, out="one")[0] == 0
    assert prepare("--data", path, "--workers", 2, out="two")[0] == 0
    one, two = (datasets.load_from_disk(tmp_path / name) for name in ("one", "two"))
    assert {name: table.to_list() for name, table in one.items()} == {name: t.to_list() for name, t in two.items()}


def test_several_sources_and_aligned_files_are_read_together(prepare, write_rows):
    first, second = write_rows("a.en", ["Go.", "Hi."]), write_rows("a.ko", ["가.", "안녕."])
    rows, more = write_rows("rows.jsonl", ROWS), write_rows("more.json", ROWS[:2])
    code, said, _ = prepare("--data", rows, more, "--aligned", first, second, "--forward", "To Korean:")
    assert (code, "Read       44 rows" in said) == (0, True)


# Formats, sources and their mixture


TURNS = [
    ("system", "Be brief."),
    ("user", "Hi."),
    ("assistant", "Hello."),
    ("user", "Bye."),
    ("assistant", "So long."),
]
FORMS = {
    "dolly": {"instruction": "Say {n}.", "context": "c{n}", "response": "r{n}", "category": "open_qa"},
    "prompt_completion": {"prompt": "Say {n}.", "completion": "r{n}"},
    "summarisation": {"article": "A long text {n}.", "highlights": "short {n}"},
    "self_instruct": {
        "instruction": "Say {n}.",
        "instances": [{"input": "{n}", "output": "a{n}"}, {"input": "{n}+", "output": "b{n}"}],
    },
    "messages": {"messages": [{"role": role, "content": text + " {n}"} for role, text in TURNS]},
    "sharegpt": {
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": text + " {n}"}
            for role, text in TURNS
        ]
    },
    "parallel": {"translation": {"en": "text {n}", "ko": "글 {n}"}},
}


@pytest.mark.parametrize("name", FORMS)
def test_each_format_is_recognised_and_prepared(name, prepare, write_rows, tmp_path):
    rows = [json.loads(json.dumps(FORMS[name]).replace("{n}", str(n))) for n in range(30)]
    directions = ["--forward", "To Korean:", "--backward", "To English:"] if name == "parallel" else []
    code, said, error = prepare("--data", write_rows("rows.jsonl", rows), *directions)
    assert code == 0, error
    template = "chat" if name in ("messages", "sharegpt") else "alpaca"
    assert f"rows.jsonl: {name}, recognised" in said and f"Template   {template}" in said
    manifest = manifest_of(tmp_path / "prepared")
    per_row = 1 if name in ("dolly", "prompt_completion", "summarisation") else 2
    assert manifest["rows"] == {"read": 30, "examples": 30 * per_row, "kept": 30 * per_row, "rejected": 0}
    assert manifest["inputs"][0]["format"] == name
    sources = [row["source"] for table in datasets.load_from_disk(tmp_path / "prepared").values() for row in table]
    if name in ("messages", "sharegpt"):
        assert sum("Hello. 3" in source and "Be brief. 3" in source for source in sources) == 1


def test_rows_that_come_as_token_ids_pass_as_they_are(prepare, write_rows, tmp_path):
    rows = [{"input_ids": [5 + n, 6, 7], "labels": [8 + n, 9]} for n in range(20)]
    code, said, _ = prepare("--data", write_rows("rows.jsonl", rows))
    assert code == 0 and "rows.jsonl: tokenised, recognised" in said
    assert "20 kept" in prepare("--data", tmp_path / "rows.jsonl", "--near_duplicates", 0.8, out="near")[1]
    train = datasets.load_from_disk(tmp_path / "prepared")["train"]
    assert {(tuple(row["input_ids"]), tuple(row["labels"])) for row in train} <= {
        (tuple(row["input_ids"]), tuple(row["labels"])) for row in rows
    }


def test_columns_can_be_mapped(prepare, write_rows):
    rows = [{"question": f"What is {n}?", "answers": {"text": [f"It is {n}."]}} for n in range(20)]
    path = write_rows("rows.jsonl", rows)
    assert "--map" in prepare("--data", path)[2]
    code, said, _ = prepare("--data", path, "--map", "instruction=question", "output=answers.text.0")
    assert (code, "20 kept, 0 rejected" in said) == (0, True)


NO_SPLITS = ["--validation_fraction", 0, "--test_fraction", 0, "--template", "plain"]


def targets_of(folder):
    return [row["target"] for row in datasets.load_from_disk(folder)["train"]]


def test_no_pair_of_a_tsv_is_lost_to_a_quote_mark_and_none_leaks_past_decontamination(prepare, write_rows, tmp_path):
    pairs = [
        (f'"Speech {n} begins.', f"„Rede {n}.") if n % 2 else (f'It {n} ends."', f"Ende {n}.“") for n in range(20)
    ]
    path = write_rows("a.tsv", ["source\ttarget", *map("\t".join, pairs)])
    code, said, _ = prepare("--data", path, *NO_SPLITS)
    assert code == 0 and "20 rows" in said and f"Note       {path}: its first line names the columns" in said
    assert sorted(targets_of(tmp_path / "prepared")) == sorted(target for _, target in pairs)
    held_out = write_rows("test.tsv", ["source\ttarget", *map("\t".join, pairs[:12])])
    assert (
        prepare("--data", path, "--decontaminate", held_out, "--decontaminate_ngram", 3, *NO_SPLITS, out="clean")[0]
        == 0
    )
    assert sorted(targets_of(tmp_path / "clean")) == sorted(target for _, target in pairs[12:])


@pytest.mark.parametrize("arguments", [["--map", "first=en", "second=ko"], ["--languages", "en", "ko"]])
def test_names_that_stand_in_the_first_line_of_a_tsv_make_it_the_header(arguments, prepare, write_rows, tmp_path):
    path = write_rows("a.tsv", ["en\tko", "Go.\t가.", "Hi.\t안녕."])
    code, said, _ = prepare("--data", path, "--forward", "To Korean:", *arguments, *NO_SPLITS)
    assert code == 0 and "its first line names the columns: en, ko" in said
    assert sorted(targets_of(tmp_path / "prepared")) == ["가.", "안녕."]
    names = write_rows("b.tsv", ["left\tright", "Go.\t가."])  # no languages, which would be recognised
    code, said, _ = prepare("--data", names, "--forward", "To Korean:", *NO_SPLITS, out="pairs")
    shown = (
        "its first line is taken for a pair, 'left' and 'right'; if it names columns, --map first=left second=right"
    )
    assert shown in said
    code, _, said = prepare("--data", path, "--forward", "x", "--map", "first=en", "second=kr", *NO_SPLITS)
    assert code == 2 and "there is no column 'kr' in its first rows; columns there are 'en', 'ko'" in said


def test_columns_of_a_table_without_a_header_are_mapped_by_number(prepare, write_rows):
    path = write_rows("rows.csv", [f'"Say {n}, please.",It is {n}.,x' for n in range(20)])
    assert "--map instruction=1 output=2" in prepare("--data", path)[2]
    code, said, warned = prepare("--data", path, "--map", "instruction=1", "output=2")
    assert code == 0 and "20 kept, 0 rejected" in said and "its first line is data" in said
    assert "fields that are not used: 3." in warned
    code, _, error = prepare("--data", path, "--map", "instruction=1", "output=4", out="other")
    assert code == 2 and "there is no column '4' in its first rows; columns there are '1', '2', '3'" in error


def test_the_format_can_be_given_and_an_ambiguous_one_is_an_error(prepare, write_rows):
    rows = [{"instruction": f"a{n}", "output": f"b{n}", "prompt": f"c{n}", "completion": f"d{n}"} for n in range(20)]
    path = write_rows("rows.jsonl", rows)
    code, _, error = prepare("--data", path)
    assert code == 2 and "alpaca" in error and "prompt_completion" in error and "--format" in error
    code, said, _ = prepare("--data", path, "--format", "prompt_completion")
    assert code == 0 and "prompt_completion, given" in said


def test_sources_are_mixed_as_the_recipe_says(prepare, write_rows, tmp_path):
    a = write_rows("a.jsonl", [{"instruction": f"a{n}", "output": f"x{n}"} for n in range(90)])
    b = write_rows("b.jsonl", [{"instruction": f"b{n}", "output": f"y{n}"} for n in range(10)])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"mixture:\n  temperature: 2.0\n  rows: 80\n  weights: {{{b}: 3}}\ntest_fraction: 0.0\n")
    arguments = ("--config", recipe, "--data", a, b, "--validation_fraction", 0)
    code, said, _ = prepare(*arguments)
    assert code == 0 and "Mixture    50.0 % of train, 40 rows" in said
    train = datasets.load_from_disk(tmp_path / "prepared")["train"]
    origins = [row["origin"] for row in train]
    of_b = [origin for origin in origins if origin.startswith(b)]
    assert len(origins) == 80 and len(of_b) == 40 and len(set(of_b)) == 10
    assert len(set(origins) - set(of_b)) == 40
    inputs = manifest_of(tmp_path / "prepared")["inputs"]
    assert [(source["kept"], source["mixed"]) for source in inputs] == [(90, 40), (10, 40)]
    prepare(*arguments, out="again")
    assert datasets.load_from_disk(tmp_path / "again")["train"].to_list() == train.to_list()


# Cleaning


def test_exact_duplicates_go_with_their_reason_and_can_stay(prepare, write_rows, tmp_path):
    path = write_rows("rows.jsonl", [*ROWS, ROWS[3], {**ROWS[3], "instruction": "say 3."}])
    code, said, _ = prepare("--data", path)
    assert code == 0 and "Rejected   1 × exact duplicate" in said
    [reject] = rejects_of(tmp_path / "prepared")
    assert json.loads(reject["raw"]) == ROWS[3]
    assert reject["row"] == 41 and reject["reason"] == f"the same source and target as {path}:4, which stays."
    report = json.loads((tmp_path / "prepared" / "report.json").read_text(encoding="utf-8"))
    assert report["duplicates"]["exact"] == 1 and report["rows"]["kept"] == 41  # case can be what a row is about
    assert "42 kept" in prepare("--data", path, "--deduplicate", "false")[1]


def test_a_duplicate_that_is_also_too_long_is_one_reject(prepare, write_rows, tmp_path):
    """The tokenizer is trained after duplicates are gone, and encodes what stays."""
    path = write_rows("rows.jsonl", [*ROWS, LONG_ROW, LONG_ROW])
    limits = ["--max_target_tokens", 20, "--vocab_size", 300]
    code, said, _ = prepare("--data", path, "--train_tokenizer", "bpe", *limits, tokenizer=None)
    assert code == 0 and "Read       42 rows" in said
    kinds = [reject["kind"] for reject in rejects_of(tmp_path / "prepared")]
    assert kinds == ["exact duplicate", "target over the limit"] and "40 kept, 2 rejected" in said


def test_near_duplicates_go_when_asked(prepare, write_rows, tmp_path):
    text = "The quick brown fox jumps over the lazy dog, and then it sleeps in the warm sun until the evening comes"
    rows = [*ROWS, {"instruction": text, "output": f"{text}."}, {"instruction": text + "!", "output": f"{text}."}]
    path = write_rows("rows.jsonl", rows)
    assert "42 kept" in prepare("--data", path)[1]
    code, said, _ = prepare("--data", path, "--near_duplicates", 0.9, "--workers", 2, out="near")
    assert code == 0 and "Rejected   1 × near duplicate" in said
    [reject] = rejects_of(tmp_path / "near")
    assert reject["row"] == 42 and f"{path}:41, which stays" in reject["reason"]


def test_conflicting_targets_are_listed_and_stay(prepare, write_rows, tmp_path):
    path = write_rows("rows.jsonl", [*ROWS, {**ROWS[5], "output": "No."}])
    code, said, _ = prepare("--data", path)
    assert code == 0 and "41 kept" in said and "Conflicts  1 × one source with different targets" in said
    [group] = [json.loads(line) for line in (tmp_path / "prepared" / "conflicts.jsonl").read_text().splitlines()]
    assert [row["target"] for row in group["rows"]] == ["It is 5.", "No."]


def test_the_marks_of_a_template_are_in_nothing_that_is_learned_or_shown(prepare, write_rows, tmp_path):
    """Between reading and encoding, texts hold characters that tell the template's pieces from the user's."""
    near = {
        "instruction": "Write down at length what the quick brown fox does, and then why it does it",
        "output": "a",
    }
    rows = [*ROWS, {**ROWS[5], "output": "No."}, near, {**near, "instruction": near["instruction"] + "!"}]
    frame = tmp_path / "frame.jinja"
    frame.write_text("Do: {{ instruction }} {{ input }}\n{# target #}\nDone: {{ output }}")
    arguments = ["--train_tokenizer", "bpe", "--vocab_size", 400, "--near_duplicates", 0.8, "--template", frame]
    code, _, _ = prepare("--data", write_rows("rows.jsonl", rows), *arguments, tokenizer=None)
    assert code == 0
    written = {path.name: path.read_text("utf-8") for path in (tmp_path / "prepared").iterdir() if path.is_file()}
    assert {"conflicts.jsonl", "report.json", "report.html"} <= written.keys()
    for name, text in written.items():
        assert not re.search("\U0010fffe|U\\+10FFFE|dbff.udffe", text, re.IGNORECASE), name
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "prepared" / "tokenizer").get_vocab()
    bytes_of_a_mark = ByteLevel(add_prefix_space=False).pre_tokenize_str("\U0010fffe")[0][0]
    assert not [token for token in vocabulary if bytes_of_a_mark[:2] in token]


def test_training_holds_nothing_of_an_evaluation_set_of_rows_or_of_lines(prepare, write_rows, path, tmp_path):
    seen = write_rows("test.jsonl", [ROWS[7], {"instruction": "Something else.", "output": "Quite."}])
    lines = write_rows("test.txt", ["NUMBER 7", "", "Something else."])
    for held_out, reason in {seen: "The row is the same as", lines: f"The source is the same as {lines}:1"}.items():
        code, said, _ = prepare("--data", path, "--decontaminate", held_out)
        assert code == 0 and "Rejected   1 × overlaps the evaluation data" in said
        [reject] = rejects_of(tmp_path / "prepared")
        assert reject["row"] == 8 and reason in reject["reason"]
    code, _, error = prepare("--data", path, "--decontaminate", path)
    assert code == 2 and "of 40 rows, none can be kept (40 × overlaps the evaluation data)" in error


# Validation and test sets of one's own


def said_rows(count, word):
    return [{"instruction": "Say it.", "input": f"{word} {n}", "output": f"It is {word} {n}."} for n in range(count)]


@pytest.fixture
def own_sets(write_rows):
    """Paths of train, validation and test; two of the test rows are also in train, one of them in other capitals."""
    train, test = said_rows(30, "a"), said_rows(8, "t")
    capitals = {"instruction": "Say it.", "input": "T  5", "output": "Another answer."}
    return {
        "train": write_rows("a.jsonl", [*train, test[2], capitals]),
        "validation": write_rows("b.jsonl", said_rows(6, "v")),
        "test": write_rows("c.jsonl", test),
    }


def texts_of(folder):
    tables = datasets.load_from_disk(folder)
    return {name: table["input"] for name, table in tables.items()}


def test_sets_of_ones_own_are_whole_in_order_and_in_no_train_row(prepare, own_sets, tmp_path):
    arguments = ["--data", own_sets["train"], "--validation", own_sets["validation"], "--test", own_sets["test"]]
    code, said, error = prepare(*arguments)
    assert code == 0 and "warning" not in error
    assert texts_of(tmp_path / "prepared") == {
        "train": [f"a {n}" for n in range(30)],
        "validation": [f"v {n}" for n in range(6)],
        "test": [f"t {n}" for n in range(8)],
    }
    assert "Rejected   2 × also held out" in said and "Split      train 30 | validation 6 | test 8\n" in said
    assert "Overlap    validation: none of its 6 rows is in train" in said
    assert "Overlap    test: 2 of its 8 rows also in train: 2 train rows dropped from train, the first" in said
    assert [row["reason"] for row in rejects_of(tmp_path / "prepared")] == [
        f"it is {own_sets['test']}:{row}, which is held out (test)." for row in (3, 6)
    ]
    manifest = manifest_of(tmp_path / "prepared")
    assert [source["split"] for source in manifest["inputs"]] == ["train", "validation", "test"]
    assert manifest["own_sets"]["sets"]["test"] | {"examples": None} == {
        **{"rows": 8, "in_train": 2, "train_rows": 2, "repeated": 0, "examples": None}
    }
    assert "Reused" in prepare(*arguments)[1]
    assert "Reused" not in prepare(*arguments[:4], "--test", own_sets["validation"])[1]


def test_train_rows_that_are_held_out_can_stay_or_stop_the_run(prepare, own_sets, tmp_path):
    arguments = ["--data", own_sets["train"], "--test", own_sets["test"], "--on_both_sides"]
    code, said, error = prepare(*arguments, "keep")
    assert code == 0 and len(texts_of(tmp_path / "prepared")["train"]) == 32
    assert "2 train rows kept in train" in said
    assert "2 of the 8 rows of test are trained on, as on_both_sides keep asks" in error
    code, said, error = prepare(*arguments, "error", out="other")
    assert code == 2 and not (tmp_path / "other").exists()
    assert f"2 train rows also held out, the first {own_sets['train']}:31, which is {own_sets['test']}:3" in error


def test_labels_and_shared_inputs_stand_on_both_sides_unless_it_is_asked_otherwise(prepare, write_rows, tmp_path):
    def labelled(word):
        return [
            {"instruction": "Good?", "input": f"{word} {n}", "output": "yes" if n % 2 else "no"} for n in range(10)
        ]

    question = {"instruction": "How many?", "input": "t 1", "output": "7"}
    train = write_rows("a.jsonl", [*labelled("a"), question])
    test = write_rows("c.jsonl", labelled("t"))
    expected = {None: 11, "source": 10}
    for split_by, rows in expected.items():
        asked = ["--split_by", split_by] if split_by else []
        assert prepare("--data", train, "--test", test, *asked)[0] == 0
        assert len(texts_of(tmp_path / "prepared")["train"]) == rows
    assert "its input is that of" in rejects_of(tmp_path / "prepared")[0]["reason"]
    code, _, error = prepare("--data", train, "--test", test, "--split_by", "both")
    assert code == 2 and "nothing is left for train: 11 rows cannot be kept (11 × also held out)" in error


def test_a_pair_that_is_held_out_is_not_learned_in_the_other_direction(prepare, write_rows, tmp_path):
    pairs = [(f"word {n}", f"낱말 {n}") for n in range(12)]
    train = write_rows("a.tsv", [f"{korean}\t{english}" for english, korean in pairs])
    test = write_rows("c.tsv", [f"{english}\t{korean}" for english, korean in pairs[:3]])
    assert prepare("--data", train, "--test", test, "--forward", "Translate:")[0] == 0
    assert texts_of(tmp_path / "prepared")["train"] == [korean for _, korean in pairs[3:]]


def test_only_train_is_filtered_deduplicated_and_mixed(prepare, write_rows, tmp_path):
    """Near duplicates of a held-out row go from train, and repeated rows of a test set stay where they are."""
    long = "the quick brown fox jumps over the lazy dog near the river bank at dawn"
    held_out = [{"instruction": "Say.", "input": f"{long} {n}", "output": "yes"} for n in (1, 2, 1)]
    near = {"instruction": "Say.", "input": f"{long} 3", "output": "yes"}
    train = [*said_rows(20, "a"), near, *said_rows(3, "a")]
    path, test = write_rows("a.jsonl", train), write_rows("c.jsonl", held_out)
    cleaning = ["--near_duplicates", "0.8", "--lengths.maximum_source", "70", "--decontaminate", test]
    mixture = ["--mixture.rows", "40"]
    code, said, _ = prepare("--data", path, "--test", test, *mixture, *cleaning[:2])
    found = texts_of(tmp_path / "prepared")
    assert code == 0 and found["test"] == [row["input"] for row in held_out]
    assert (
        sorted(set(found["train"])) == sorted(row["input"] for row in said_rows(20, "a")) and len(found["train"]) == 40
    )
    assert "Rejected   3 × exact duplicate" in said and "Rejected   1 × near duplicate" in said
    assert "Repeated   test: 1 of its 3 rows repeat others of it, and stay" in said
    assert prepare("--data", path, "--test", test, *cleaning)[0] == 0
    assert texts_of(tmp_path / "prepared")["test"] == found["test"]


def test_a_folder_is_prepared_by_its_splits_and_can_be_pooled_by_name(prepare, write_rows, own_sets, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split, path in own_sets.items():
        os.rename(path, folder / f"{split}.jsonl")
    code, said, error = prepare("--data", folder)
    assert code == 0 and f"Note       {folder} is read by the names in it: train is {folder}/train.jsonl;" in said
    assert {name: len(rows) for name, rows in texts_of(tmp_path / "prepared").items()} == {
        **{"train": 30, "validation": 6, "test": 8}
    }
    (folder / "dev.jsonl").write_text('{"instruction": "No output."}\n')
    code, _, error = prepare("--data", folder)
    assert code == 2 and "By its name it is taken for validation. To leave it out, name the files" in error
    (folder / "dev.jsonl").unlink()
    code, _, error = prepare("--data", *sorted(folder.iterdir()))
    assert code == 0 and sum(map(len, texts_of(tmp_path / "prepared").values())) == 45  # one of 46 is there twice
    assert f"{folder}/test.jsonl is trained on, as --data says, and its name says test. --test holds it out." in error


def test_fractions_are_for_what_has_no_set_of_its_own(prepare, own_sets, write_rows):
    empty = write_rows("d.jsonl", [{"instruction": "Say it.", "output": ""}])
    code, _, error = prepare("--data", own_sets["train"], "--test", empty)
    assert code == 2 and "nothing is left for test: 1 row cannot be kept (1 × empty output)" in error
    test = ["--data", own_sets["train"], "--test", own_sets["test"]]
    assert "Split      train 30 | test 8\n" in prepare(*test)[1]
    _, said, _ = prepare(*test, "--validation_fraction", "0.1")
    assert "Split      train 27 | validation 3 | test 8 | 30 groups of examples, no text in two of them" in said
    code, _, error = prepare(*test, "--test_fraction", "0.1")
    assert code == 2 and f"test_fraction holds out a part of train, and {own_sets['test']} is test already" in error


def test_several_named_sets_and_a_folder_for_evaluation_alone(prepare, own_sets, write_rows, tmp_path):
    lost = write_rows("d.jsonl", [*said_rows(3, "d"), {"instruction": "Say it.", "output": ""}])
    named = ["--test", f"news={own_sets['test']}", f"medical={lost}"]
    code, said, error = prepare("--data", own_sets["train"], *named, "--validation", own_sets["validation"])
    assert code == 0 and "Split      train 30 | validation 6 | test/news 8 | test/medical 3\n" in said
    assert "test/medical has 3 of its 4 rows, because the others cannot be kept" in error
    assert texts_of(tmp_path / "prepared")["test/news"] == [f"t {n}" for n in range(8)]
    code, said, _ = prepare(*named)
    assert code == 0 and "Split      test/news 8 | test/medical 3\n" in said and "Overlap" not in said
    assert "Packing    none: there are no rows to train on, only to evaluate" in said
    assert not (tmp_path / "prepared" / "packed").exists()
    for name, value in {"near_duplicates": "0.8", "test_fraction": "0.1", "train_tokenizer": "bpe"}.items():
        code, _, error = prepare(*named, f"--{name}", value, tokenizer=None if name == "train_tokenizer" else "none")
        assert code == 2 and f"{name} is for rows to train on, and there is no --data" in error


def test_aligned_files_can_be_held_out_and_a_set_that_is_not_there_is_told_at_once(prepare, write_rows, tmp_path):
    for name, word in {"train": "a", "test": "t"}.items():
        write_rows(f"{name}.en", [f"{word} {n}" for n in range(9)])
        write_rows(f"{name}.ko", [f"{word} 낱말 {n}" for n in range(9)])
    train, test = (f"{tmp_path}/{name}.en+{tmp_path}/{name}.ko" for name in ("train", "test"))
    assert prepare("--data", train, "--test", f"wmt={test}", "--forward", "Translate:")[0] == 0
    assert texts_of(tmp_path / "prepared")["test/wmt"] == [f"t {n}" for n in range(9)]
    code, said, error = prepare("--data", train, "--test", f"wmt={tmp_path}/tset.en")
    assert (code, said) == (2, "") and f"{tmp_path}/tset.en: there is no such file" in error


def test_held_out_texts_are_unseen_for_a_trained_tokenizer(prepare, own_sets, write_rows, tmp_path):
    test = write_rows("e.jsonl", [{"instruction": "Say.", "input": "zebrazebra " * 30, "output": "zebrazebra " * 30}])
    arguments = ["--train_tokenizer", "unigram", "--vocab_size", "400"]
    assert prepare("--data", own_sets["train"], "--test", test, *arguments, tokenizer=None)[0] == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "prepared" / "tokenizer")
    assert len(tokenizer.tokenize("zebrazebra")) > 4


def test_text_that_is_not_composed_is_kept_as_it_is_and_said(prepare, write_rows, tmp_path):
    decomposed = unicodedata.normalize("NFD", "각각 열 개")
    rows = [{**row, "output": f"{decomposed} {n}" if n < 4 else "각각"} for n, row in enumerate(ROWS)]
    path = write_rows("rows.jsonl", rows)
    code, _, warned = prepare("--data", path, "--test_fraction", 0, "--validation_fraction", 0)
    assert (
        code == 0
        and f"is not in Unicode's form NFC, such as Hangul in single jamo, stands in 4 examples of {path}" in warned
    )
    train = datasets.load_from_disk(tmp_path / "prepared")["train"]
    assert sum(decomposed in text for text in train["target"]) == 4
    assert "Unicode&#39;s form NFC" in (tmp_path / "prepared" / "report.html").read_text(encoding="utf-8")
    assert "NFC" not in prepare("--data", write_rows("composed.jsonl", ROWS), out="composed")[2]


def test_languages_and_lengths_filter_and_what_is_sensitive_is_only_reported(prepare, write_rows, tmp_path):
    rows = [
        *ROWS,
        {"instruction": "Say this in a rather long English sentence.", "output": "그는 오늘 학교에 가지 않았습니다."},
    ]
    rows += [{"instruction": "Write to me.", "output": "My address is jane.doe@example.com, as you know."}]
    path = write_rows("rows.jsonl", rows)
    code, said, _ = prepare("--data", path, "--target_languages", "en", "--lengths.maximum_target", 40, "--sensitive")
    assert code == 0
    assert "1 × target in another language" in said and "1 × target too long" in said
    assert prepare("--data", path, "--sensitive", out="kept")[0] == 0
    text = (tmp_path / "kept" / "report.json").read_text(encoding="utf-8")
    assert json.loads(text)["sensitive"]["counts"] == {"e-mail address": 1}
    assert "42 kept" in prepare("--data", path, "--sensitive", out="again")[1]


# What does not come out


def test_rows_read_are_rows_kept_and_rows_rejected(prepare, write_rows, tmp_path):
    draw = random.Random(0)
    faults = [
        '{"instruction": "a", "output": ""}',
        '{"instruction": "a", "ouput": "b"}',
        '{"instruction": "a", "output": 3}',
        '{"instruction": "a" "output": "b"}',
        '{"instruction": "a", "output": "\\ud800"}',
        "[]",
        '{"instruction": "\udcff", "output": "b"}',
        '{"instruction": "a", "output": "\u200b"}',
    ]
    for trial in range(4):
        lines = [draw.choice([GOOD, *faults]) for _ in range(60)]
        content = "\n".join([GOOD, *lines]).encode("utf-8", "surrogateescape")
        code, said, _ = prepare("--data", write_rows("rows.jsonl", content), out=str(trial))
        assert code == 0
        folder = tmp_path / str(trial)
        rows = manifest_of(folder)["rows"]
        assert rows["kept"] == sum(len(table) for table in datasets.load_from_disk(folder).values())
        assert rows["rejected"] == len(rejects_of(folder))
        assert rows["kept"] + rows["rejected"] == rows["read"] == 61
        assert f"61 rows from {tmp_path / 'rows.jsonl'}: {rows['kept']} kept, {rows['rejected']} rejected" in said


def test_each_reject_says_file_row_field_reason_and_raw_text(prepare, write_rows, tmp_path):
    path = write_rows("rows.jsonl", [*ROWS, {"instruction": "a", "output": " "}])
    code, said, _ = prepare("--data", path)
    assert code == 0
    [reject] = rejects_of(tmp_path / "prepared")
    assert (reject["file"], reject["row"], reject["field"]) == (path, 41, "output")
    assert reject["reason"] == "'output' is empty: a row needs one to be learned from."
    assert json.loads(reject["raw"]) == {"instruction": "a", "output": " "}
    assert f"Rejected   1 × empty output, the first in {path}:41" in said and "rejects.jsonl" in said
    manifest = manifest_of(tmp_path / "prepared")
    assert manifest["format"] == FORMAT and manifest["template"]["name"] == "alpaca"
    assert manifest["rows"] == {"read": 41, "examples": 41, "kept": 40, "rejected": 1}
    assert manifest["rejected_by_kind"] == {"empty output": 1}
    assert [source["name"] for source in manifest["inputs"]] == [path]
    for name, size in manifest["files"].items():
        assert (tmp_path / "prepared" / name).stat().st_size == size


def test_strict_stops_at_the_first_bad_row_and_writes_nothing(prepare, write_rows, tmp_path):
    path = write_rows("rows.jsonl", [*ROWS, {"instruction": "a", "output": ""}])
    code, said, error = prepare("--data", path, "--strict")
    assert code == 2 and "Prepared" not in said
    assert error.splitlines()[-1].startswith(f"diptych prepare: {path}:41: 'output' is empty")
    assert not (tmp_path / "prepared").exists()
    assert prepare("--data", write_rows("rows.jsonl", ROWS), "--strict")[0] == 0


def test_when_no_row_can_be_kept_the_reasons_are_the_error_and_a_file(prepare, write_rows, tmp_path):
    path = write_rows("rows.jsonl", [{"prompt": "a", "output": "b"}] * 3 + [{"instruction": "a", "output": ""}])
    code, _, error = prepare("--data", path)
    assert code == 2
    assert "of 4 rows, none can be kept (3 × missing field 'instruction'; 1 × empty output)" in error
    assert not (tmp_path / "prepared").exists()
    assert len((tmp_path / "prepared.rejects.jsonl").read_text(encoding="utf-8").splitlines()) == 4
    assert error.endswith(
        f"Correct the rows or the settings, and prepare them again. All of them: {tmp_path}/prepared.rejects.jsonl\n"
    )
    broken = b'[\n {"instruction": "a" "output": "b"}\n]'
    words = f"The first, {tmp_path}/broken.json:1: broken JSON: Expecting ',' delimiter, line 2, column 22. Correct"
    assert words in prepare("--data", write_rows("broken.json", broken))[2]
    words = "object.json, line 1, column 1: a JSON object stands here, and a list of rows is due"
    assert words in prepare("--data", write_rows("object.json", b'{"rows": {}}'))[2]
    assert prepare("--data", write_rows("empty.json", []))[2].endswith(
        "diptych prepare: there are no rows in what was read.\n"
    )


def test_rows_over_a_limit_are_dropped_by_name_and_counted_or_an_error(prepare, write_rows, tmp_path):
    path = write_rows("rows.jsonl", [*ROWS, LONG_ROW])
    code, said, _ = prepare("--data", path, "--max_target_tokens", 20)
    assert (code, "1 dropped, over 20" in said) == (0, True)
    assert "Rejected   1 × target over the limit" in said
    [reject] = rejects_of(tmp_path / "prepared")
    assert (reject["row"], reject["kind"]) == (41, "target over the limit")
    assert reject["reason"].startswith("the target has ") and reject["reason"].endswith("max_target_tokens is 20.")
    code, _, error = prepare("--data", path, "--max_target_tokens", 20, "--too_long", "error", out="error")
    assert code == 2 and f"{path}:41: the target has " in error and not (tmp_path / "error").exists()


@pytest.mark.parametrize("end", [False, True])
def test_targets_that_are_cut_end_in_eos_only_if_the_user_says_so(end, prepare, write_rows, tmp_path):
    path = write_rows("rows.jsonl", [*ROWS, LONG_ROW])
    arguments = ["--max_target_tokens", 20, "--max_source_tokens", 90, "--too_long", "cut", "--test_fraction", 0]
    code, said, _ = prepare("--data", path, *arguments, *(["--end_cut_targets"] if end else []))
    assert (code, "1 cut at 20" in said) == (0, True)
    assert manifest_of(tmp_path / "prepared")["tokens"]["target"]["cut"] == 1
    tables = datasets.load_from_disk(tmp_path / "prepared")
    [row] = [row for table in tables.values() for row in table if len(row["labels"]) == 20]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "prepared" / "tokenizer")
    whole = tokenizer(LONG_ROW["output"])["input_ids"]
    assert row["labels"] == ([*whole[:19], tokenizer.eos_token_id] if end else whole[:20])
    for table in tables.values():
        assert all(ids[-1] == tokenizer.eos_token_id for ids in table["input_ids"])


def test_a_source_that_is_cut_keeps_what_the_template_says_after_it(prepare, write_rows, tmp_path):
    rows = [*ROWS, {"instruction": "Sum it up.", "input": "many words of it, " * 200, "output": "Many."}]
    arguments = ["--max_source_tokens", 200, "--too_long", "cut", "--template", "alpaca", "--test_fraction", 0]
    code, said, _ = prepare("--data", write_rows("rows.jsonl", rows), *arguments)
    assert (code, "1 cut at 200" in said) == (0, True)
    tables = datasets.load_from_disk(tmp_path / "prepared")
    [row] = [row for table in tables.values() for row in table if row["target"] == "Many."]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "prepared" / "tokenizer")
    read = tokenizer.decode(row["input_ids"], skip_special_tokens=True)
    assert "Sum it up." in read and "many words of it, many words" in read and read.rstrip().endswith("### Response:")
    assert 195 <= len(row["input_ids"]) <= 200 and row["input_ids"][-1] == tokenizer.eos_token_id
    code, _, error = prepare("--data", tmp_path / "rows.jsonl", "--max_source_tokens", 20, *arguments[2:])
    assert code == 2 and "the template's own text has" in error


def test_a_row_that_the_template_cannot_render_is_a_reject(prepare, write_rows, tmp_path):
    frame = tmp_path / "frame.jinja"
    frame.write_text("{{ input.split('=')[1] }}\n{# target #}\n{{ output | trim('.') }}")
    rows = [{"instruction": "x", "input": f"a=b{n}", "output": f"c{n}"} for n in range(5)]
    rows += [
        {"instruction": "x", "input": "nothing", "output": "c"},
        {"instruction": "x", "input": "a=b", "output": "."},
    ]
    code, _, _ = prepare("--data", write_rows("rows.jsonl", rows), "--template", frame)
    assert code == 0
    rejects = rejects_of(tmp_path / "prepared")
    assert [(reject["row"], reject["kind"]) for reject in rejects] == [(6, "template failed"), (7, "template empty")]
    assert "frame.jinja, line 1" in rejects[0]["reason"]


def test_a_row_of_which_the_tokenizer_keeps_nothing_is_a_reject(prepare, write_rows, tokenizers_by_family, tmp_path):
    tokenizers_by_family["bert"].save_pretrained(tmp_path / "bert")  # its normalizer drops control characters
    rows = [*ROWS, {"instruction": "a", "output": "\x01\x02"}]
    code, _, _ = prepare("--data", write_rows("rows.jsonl", rows), tokenizer=tmp_path / "bert")
    assert code == 0
    [reject] = rejects_of(tmp_path / "prepared")
    assert (reject["row"], reject["reason"]) == (41, "the tokenizer makes no token of the target.")


def test_a_tokenizer_without_an_end_token_is_refused_with_the_lines_that_give_it_one(
    prepare, write_rows, tokenizers_by_family, tmp_path
):
    bert = copy.deepcopy(tokenizers_by_family["bert"])  # as published, BERT's have a sep_token and no eos_token
    bert.eos_token = None
    bert.save_pretrained(tmp_path / "bert")
    code, _, error = prepare("--data", write_rows("rows.jsonl", ROWS), tokenizer=tmp_path / "bert")
    assert code == 2 and "has no eos_token. In Python, set tokenizer.eos_token = tokenizer.sep_token, write " in error


# Packed rows


def test_the_train_split_is_also_written_in_packed_rows(prepare, write_rows, tmp_path):
    code, said, _ = prepare("--data", write_rows("rows.jsonl", ROWS), "--template", "plain")
    assert code == 0
    tables = datasets.load_from_disk(tmp_path / "prepared")
    train, packed = tables["train"], datasets.load_from_disk(tmp_path / "prepared" / "packed")
    entry = manifest_of(tmp_path / "prepared")["packing"]
    assert set(packed.features) == {"examples", *PACKED_COLUMNS}
    places = []
    for row in packed:
        places += row["examples"]
        for name in PACKED_COLUMNS:
            assert len(row[name]) == entry["max_source_tokens" if name in PACKED_COLUMNS[:3] else "max_target_tokens"]
    assert sorted(places) == list(range(36))
    assert {start for row in examples_of(tmp_path / "prepared") for _, _, start in row} == {0}
    slots = {side: entry["rows"] * entry[f"max_{side}_tokens"] for side in ("source", "target")}
    lengths = {"source": list(map(len, train["input_ids"])), "target": list(map(len, train["labels"]))}
    assert entry == {
        "max_source_tokens": entry["max_source_tokens"],
        "max_target_tokens": entry["max_target_tokens"],
        "rows": len(packed),
        "examples": 36,
        "source_fill": pytest.approx(sum(lengths["source"]) / slots["source"]),
        "target_fill": pytest.approx(sum(lengths["target"]) / slots["target"]),
        "better_budget": None,
        "share_sources": False,
        "shared": 0,
        "decoder_start_token_id": 0,
        "decoder_start_from": "assumed",
        "pad_token_id": 0,
        "vocabulary": len(AutoTokenizer.from_pretrained(tmp_path / "prepared" / "tokenizer")),
        "target_vocabulary": entry["vocabulary"],
        "largest_source_id": max(map(max, train["input_ids"])),
        "largest_target_id": max(map(max, train["labels"])),
        "positions": max(lengths["source"] + lengths["target"]),
        "seed": 0,
    }
    assert (
        f"Packing    train: 36 examples in {len(packed)} rows of " in said and "each source encoded for itself" in said
    )
    for side, column in (("Source", "input_ids"), ("Target", "labels")):
        longest = max(len(ids) for split in tables.values() for ids in split[column])
        assert re.search(rf"\n{side}     in all splits: median .* longest {longest} \|", said)
    assert "Decoder    starts with token 0, the padding token, assumed as T5 and Diptych have it; --decoder" in said


def test_packing_false_writes_examples_alone(prepare, path, tmp_path):
    code, said, _ = prepare("--data", path, "--packing", "false")
    assert (code, "Packing    none: every row of a batch" in said) == (0, True)
    assert manifest_of(tmp_path / "prepared")["packing"] is None
    assert not (tmp_path / "prepared" / "packed").exists()
    assert prepare("--data", path, "--packing", "false")[1].startswith("Reused")
    assert prepare("--data", path, "--packing")[1].splitlines()[1].startswith("Read")
    assert (tmp_path / "prepared" / "packed").is_dir()


def test_how_rows_are_packed_decides_whether_they_are_used_again(prepare, path, tmp_path):
    arguments = ["--data", path, "--packed_source_tokens", 200]
    prepare(*arguments)
    code, said, _ = prepare(*arguments)
    assert said.startswith("Reused") and "Packing    train: 36 examples in " in said
    assert prepare(*arguments, "--packed_target_tokens", 90)[1].splitlines()[1].startswith("Read")
    assert prepare(*arguments, "--share_sources")[1].splitlines()[1].startswith("Read")
    assert prepare(*arguments, "--decoder_start_token_id", 2)[1].splitlines()[1].startswith("Read")
    packed = datasets.load_from_disk(tmp_path / "prepared" / "packed").with_format("numpy")
    assert packed[:2]["input_ids"].shape == (2, 200) and packed.features["labels"].length > 0
    table = next((tmp_path / "prepared" / "packed").glob("*.arrow"))
    table.write_bytes(table.read_bytes()[:-10])
    assert prepare(*arguments, "--decoder_start_token_id", 2)[1].splitlines()[1].startswith("Read")


def test_equal_sources_are_encoded_once_if_asked_for(prepare, write_rows, tmp_path):
    rows = [{"instruction": f"Name {n // 4}.", "output": f"This is {n}."} for n in range(80)]
    arguments = ["--data", write_rows("rows.jsonl", rows), "--template", "plain", "--test_fraction", 0]
    code, said, _ = prepare(*arguments, "--validation_fraction", 0, "--share_sources")
    assert (code, "60 examples read a source that is encoded for another" in said) == (0, True)
    assert manifest_of(tmp_path / "prepared")["packing"]["shared"] == 60
    packed = datasets.load_from_disk(tmp_path / "prepared" / "packed")
    assert set(packed.features) == {"examples", *PACKED_COLUMNS, SHARED_COLUMN}
    assert list(examples_of(tmp_path / "prepared"))
    assert sum(max(row["segment_ids"]) for row in packed) == 20


def test_an_example_longer_than_a_packed_row_is_refused_by_name_and_nothing_is_written(prepare, write_rows, tmp_path):
    path = write_rows("rows.jsonl", [*ROWS, {"instruction": "Count.", "output": "one two three " * 20}])
    arguments = ["--data", path, "--test_fraction", 0, "--validation_fraction", 0]
    code, said, error = prepare(*arguments, "--packed_target_tokens", 32)
    assert code == 2 and "Prepared" not in said
    assert f"diptych prepare: {path}:41: its target has " in error.splitlines()[-1]
    assert "a packed row has room for 32. Give packed_target_tokens >= " in error
    assert not list(tmp_path.glob("*prepared*"))
    assert prepare(*arguments, "--packed_target_tokens", 32, "--max_target_tokens", 32)[0] == 0


def test_a_budget_that_is_given_and_poorly_filled_is_warned_of_with_a_better_one(prepare, write_rows, tmp_path):
    path = write_rows("rows.jsonl", ROWS[:10])
    assert "warning: packed rows" not in prepare("--data", path)[2]
    chosen = manifest_of(tmp_path / "prepared")["packing"]
    better = f"rows of {chosen['max_source_tokens']:,} + {chosen['max_target_tokens']:,} tokens would be chosen"
    arguments = ["--data", path, "--packed_source_tokens", 100_000]
    for words in ("Read", "Reused"):
        code, said, error = prepare(*arguments)
        assert (code, f"{words}  " in said) == (0, True)
        fill = f"{manifest_of(tmp_path / 'prepared')['packing']['source_fill']:.1%}".replace("%", " %")
        assert "warning: packed rows of 100,000 + " in error and f" tokens are filled to {fill} and " in error
        assert f"Drop packed_source_tokens: {better}." in error.splitlines()[-1]
    error = prepare(*arguments, "--packed_target_tokens", 1_000)[2]
    assert f"Drop packed_source_tokens and packed_target_tokens: {better}." in error
    full = [chosen["max_source_tokens"], "--packed_target_tokens", chosen["max_target_tokens"]]
    assert "warning: packed rows" not in prepare("--data", path, "--packed_source_tokens", *full)[2]


def test_large_splits_are_packed_some_neighbours_at_a_time(prepare, write_rows, tmp_path, monkeypatch):
    monkeypatch.setattr("diptych.data_prep.pipeline.dataset_tables.PACKED_TOGETHER", 10)
    code, *_ = prepare("--data", write_rows("rows.jsonl", ROWS), "--template", "plain", "--workers", 1)
    packed = datasets.load_from_disk(tmp_path / "prepared" / "packed")
    assert code == 0 and sorted(place for row in packed for place in row["examples"]) == list(range(36))
    assert all(max(row["examples"]) // 10 == min(row["examples"]) // 10 for row in packed)
    assert list(examples_of(tmp_path / "prepared"))


def test_packing_that_gains_nothing_is_said(prepare, path, tmp_path):
    words = "packing gains nothing: next to every row holds one example alone"
    assert words not in prepare("--data", path)[1]
    longest = manifest_of(tmp_path / "prepared")["tokens"]["source"]["p100"]
    assert words in prepare("--data", path, "--packed_source_tokens", longest)[1]


def start_of(folder):
    entry = manifest_of(folder)["packing"]
    return entry["decoder_start_token_id"], entry["decoder_start_from"]


def test_the_decoder_starts_as_the_checkpoints_config_says(prepare, path, tokenizers_by_family, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    tokenizers_by_family["bart"].save_pretrained(checkpoint)
    assert prepare("--data", path, tokenizer=checkpoint)[0] == 0
    assert start_of(tmp_path / "prepared") == (tokenizers_by_family["bart"].pad_token_id, "assumed")

    transformers.BartConfig(decoder_start_token_id=7).save_pretrained(checkpoint)
    code, said, _ = prepare("--data", path, tokenizer=checkpoint)
    assert (code, "Decoder    starts with token 7, as the config beside the tokenizer has it" in said) == (0, True)
    assert start_of(tmp_path / "prepared") == (7, "model config")
    transformers.GenerationConfig(decoder_start_token_id=8).save_pretrained(checkpoint)
    assert prepare("--data", path, tokenizer=checkpoint)[1].splitlines()[1].startswith("Read")
    assert start_of(tmp_path / "prepared") == (8, "model config")
    prepare("--data", path, "--decoder_start_token_id", 9, tokenizer=checkpoint)
    assert start_of(tmp_path / "prepared") == (9, "setting")
    assert {start for row in examples_of(tmp_path / "prepared") for _, _, start in row} == {9}


def test_a_start_that_the_tokenizer_does_not_have_is_refused_before_any_work(prepare, path, bpe_folder, tmp_path):
    last = len(AutoTokenizer.from_pretrained(bpe_folder)) - 1
    code, said, error = prepare("--data", path, "--decoder_start_token_id", last + 1)
    assert code == 2 and "Prepared" not in said and "Encoding" not in error
    assert f"decoder_start_token_id is {last + 1}, but the token ids of '{bpe_folder}' end at {last}." in error
    trained = ["--data", path, "--train_tokenizer", "bpe", "--vocab_size", 4000, "--decoder_start_token_id"]
    error = prepare(*trained, 4000, tokenizer=None)[2]
    assert "decoder_start_token_id is 4000, and with vocab_size 4000 ids end at 3999" in error
    error = prepare(*trained, 3999, tokenizer=None)[2]  # forty short rows do not make so many
    assert "decoder_start_token_id is 3999, but the token ids of the tokenizer trained here end at " in error
    assert not list(tmp_path.glob("*prepared*"))
    assert prepare("--data", path, "--decoder_start_token_id", last)[0] == 0


def test_a_config_of_an_unknown_kind_is_read_as_it_is_and_one_that_is_wrong_is_an_error(
    prepare, write_rows, bpe_folder, tmp_path
):
    checkpoint = _saved(AutoTokenizer.from_pretrained(bpe_folder), tmp_path / "checkpoint")
    written = {"model_type": "triptych", "is_encoder_decoder": True, "decoder_start_token_id": 5}
    parts = {"encoder": {"hidden_size": 8}, "decoder": {"hidden_size": 8, "bos_token_id": 3}}
    remote = {"auto_map": {"AutoConfig": "configuration_triptych.TriptychConfig"}}
    (checkpoint / "config.json").write_text(json.dumps({**written, **parts, **remote}))
    assert prepare("--data", write_rows("rows.jsonl", ROWS), tokenizer=checkpoint)[0] == 0
    assert start_of(tmp_path / "prepared") == (5, "model config")
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "bart", "d_model": "wide"}))
    code, _, error = prepare("--data", tmp_path / "rows.jsonl", tokenizer=checkpoint)
    assert (code, "d_model" in error and "Traceback" not in error) == (2, True)


def test_a_start_that_the_tokenizer_writes_itself_is_packed_once(prepare, write_rows, tokenizers_by_family, tmp_path):
    """BART's tokenizer begins with bos. A decoder that starts with bos, as T5Gemma's, is not taught to repeat it."""
    bos = tokenizers_by_family["bart"].bos_token_id
    checkpoint = _saved(tokenizers_by_family["bart"], tmp_path / "checkpoint")
    prepare("--data", write_rows("rows.jsonl", ROWS), "--decoder_start_token_id", bos, tokenizer=checkpoint)
    train = datasets.load_from_disk(tmp_path / "prepared")["train"]
    written = sorted([start, *labels] for row in examples_of(tmp_path / "prepared") for _, labels, start in row)
    assert written == sorted(train["labels"])


# Reuse and replacement


def test_a_rerun_with_the_same_inputs_reuses_and_says_so(prepare, path, tmp_path):
    prepare("--data", path)
    written = (tmp_path / "prepared" / "manifest.json").stat().st_mtime_ns
    code, said, _ = prepare("--data", path, "--workers", 2, "--strict")
    assert (code, said.startswith("Reused")) == (0, True)
    assert (tmp_path / "prepared" / "manifest.json").stat().st_mtime_ns == written


def test_an_input_of_the_same_size_and_time_but_other_content_is_noticed(prepare, path, tmp_path):
    prepare("--data", path)
    before = os.stat(path)
    content = (tmp_path / "rows.jsonl").read_bytes()
    (tmp_path / "rows.jsonl").write_bytes(content.replace(b"It is 7.", b"It is 8."))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = os.stat(path)
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert "Reused" not in prepare("--data", path)[1]
    assert "Reused" in prepare("--data", path)[1]


def test_a_second_run_into_the_same_folder_is_refused(prepare, path, tmp_path, bpe_folder):
    with beside(tmp_path / "prepared"):
        code, _, error = prepare("--data", path)
        assert code == 2 and f"is being written by another run (process {os.getpid()} on " in error
    assert prepare("--data", path)[0] == 0
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_limits_are_those_of_the_settings(prepare, write_rows, tmp_path):
    task = {
        "Definition": ["Say it."],
        "Instances": [{"id": str(n), "input": f"in {n}", "output": [f"out {n}", f"or {n}"]} for n in range(30)],
    }
    path = write_rows("task.json", json.dumps(task).encode())
    code, said, _ = prepare("--data", path)
    assert code == 0 and "natural_instructions" in said and "60 kept" in said
    packed = write_rows("rows.jsonl.gz", gzip.compress((b" " * 99_999 + b"\n") * 700 + GOOD.encode()))
    assert "max_unpacked_ratio" in prepare("--data", packed)[2]
    assert prepare("--data", packed, "--max_unpacked_ratio", 100_000)[0] == 0


def test_token_ids_of_another_tokenizer_are_rejected(prepare, write_rows, tmp_path):
    rows = [{"input_ids": [5, 6], "labels": [7 + n]} for n in range(20)] + [{"input_ids": [5, 99_999], "labels": [7]}]
    code, *_ = prepare("--data", write_rows("rows.jsonl", rows))
    [reject] = rejects_of(tmp_path / "prepared")
    assert code == 0 and reject["kind"] == "unknown token" and "99999" in reject["reason"]


def test_a_changed_input_template_tokenizer_or_setting_is_prepared_anew(
    prepare, write_rows, path, tmp_path, sentences
):
    frame = tmp_path / "frame.jinja"
    frame.write_text("{{ instruction }} {{ input }}")
    arguments = ["--data", path, "--template", frame]
    prepare(*arguments)
    assert prepare(*arguments)[1].startswith("Reused")

    write_rows("rows.jsonl", ROWS[:-1])
    assert prepare(*arguments)[1].splitlines()[1].startswith("Read       39 rows")
    frame.write_text("{{ instruction }}: {{ input }}")
    assert prepare(*arguments)[1].splitlines()[1].startswith("Read")
    assert prepare(*arguments, "--seed", 1)[1].splitlines()[1].startswith("Read")
    other = AutoTokenizer.from_pretrained(tmp_path / "prepared" / "tokenizer")
    other.add_tokens(["zebra"])
    other.save_pretrained(tmp_path / "other")
    assert prepare(*arguments, "--seed", 1, tokenizer=tmp_path / "other")[1].splitlines()[1].startswith("Read")
    assert prepare(*arguments, "--seed", 1, tokenizer=tmp_path / "other")[1].startswith("Reused")


def test_a_damaged_folder_is_prepared_anew(prepare, path, tmp_path):
    prepare("--data", path)
    table = next((tmp_path / "prepared" / "train").glob("*.arrow"))
    table.write_bytes(table.read_bytes()[:-10])
    assert prepare("--data", path)[1].splitlines()[1].startswith("Read")
    assert len(datasets.load_from_disk(tmp_path / "prepared")["train"]) == 36


def test_what_is_not_ours_is_never_overwritten(prepare, path, tmp_path):
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "thesis.txt").write_text("years of work")
    code, _, error = prepare("--data", path)
    assert (code, "has other things in it" in error) == (2, True)
    assert (tmp_path / "prepared" / "thesis.txt").read_text() == "years of work"

    prepare("--data", path, out="second")
    (tmp_path / "second" / "notes.txt").write_text("mine")
    assert prepare("--data", path, out="second")[1].startswith("Reused")
    code, _, error = prepare("--data", path, "--seed", 1, out="second")
    assert (code, "notes.txt" in error) == (2, True)
    assert (tmp_path / "second" / "notes.txt").read_text() == "mine"

    (tmp_path / "second" / "notes.txt").unlink()
    (tmp_path / "second" / "rejects.jsonl").write_text("mended by hand")
    code, _, error = prepare("--data", path, "--seed", 1, out="second")
    assert (code, "rejects.jsonl, which was not written with it" in error) == (2, True)
    assert (tmp_path / "second" / "rejects.jsonl").read_text() == "mended by hand"

    assert prepare("--data", path, out="rows.jsonl")[0] == 2
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 40


def test_the_cache_files_of_datasets_do_not_stand_in_the_way(prepare, path, tmp_path):
    prepare("--data", path)
    table = datasets.load_from_disk(tmp_path / "prepared")["train"]
    table.filter(lambda row: len(row["labels"]) > 2)
    assert list((tmp_path / "prepared" / "train").glob("cache-*.arrow"))
    assert prepare("--data", path)[1].startswith("Reused")
    assert prepare("--data", path, "--seed", 1)[0] == 0


def test_a_killed_run_leaves_a_whole_dataset_or_none(prepare, write_rows, tmp_path):
    """Killed while it writes: `prepared` is the old dataset or the new one, and the next run goes through."""
    path = write_rows("rows.jsonl", ROWS * 20)
    prepare("--data", path, "--seed", 0)
    arguments = ("--data", path, "--tokenizer", str(tmp_path / "prepared" / "tokenizer"), "--seed")
    command = [*COMMAND, *arguments, "1", "--out", "prepared"]
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    while running.poll() is None and not (tmp_path / ".prepared.partial").exists():
        time.sleep(0.001)
    running.kill()
    running.wait()
    rows = datasets.load_from_disk(tmp_path / "prepared")
    assert manifest_of(tmp_path / "prepared")["splits"] == {name: len(table) for name, table in rows.items()}
    assert prepare("--data", path, "--seed", 1)[0] == 0
    assert manifest_of(tmp_path / "prepared")["settings"]["seed"] == 1
    assert not list(tmp_path.glob(".prepared*"))


def test_what_was_moved_away_by_a_run_that_was_killed_comes_back(prepare, write_rows, tmp_path):
    """Between the two renames; the next run, which fails, does not take the old dataset with it."""
    prepare("--data", write_rows("rows.jsonl", ROWS))
    (tmp_path / "prepared").rename(tmp_path / ".prepared.previous")
    assert prepare("--data", write_rows("bad.jsonl", [{"instruction": "a", "output": ""}]))[0] == 2
    assert manifest_of(tmp_path / "prepared")["splits"]["train"] == 36


def test_a_file_that_is_called_like_the_list_of_rejects_is_left_alone(prepare, write_rows, tmp_path):
    mine = tmp_path / "prepared.rejects.jsonl"
    mine.write_text("mine")
    code, _, error = prepare("--data", write_rows("bad.jsonl", [{"instruction": "a", "output": ""}]))
    listed = re.search(r"All of them: (\S+)", error)[1]
    assert code == 2 and "'output' is empty" in open(listed).read()
    assert prepare("--data", write_rows("rows.jsonl", ROWS))[0] == 0 and mine.read_text() == "mine"


def test_a_reader_that_goes_away_ends_nothing(path, tmp_path, bpe_folder):
    command = f"{sys.executable} -m diptych.finetune.commands.cli prepare --data {path} --tokenizer {bpe_folder}"
    piped = f"{command} --out prepared | true; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", piped], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert manifest_of(tmp_path / "prepared")["splits"]["train"] == 36
    assert ended.stderr.count("note: nobody reads what is printed any more; the work goes on.") == 1


# Templates and tokenizers that a checkpoint brings along


def test_the_template_that_a_tokenizer_carries_is_used_unless_another_is_named(prepare, path, tmp_path):
    frame = tmp_path / "frame.jinja"
    frame.write_text("Q: {{ instruction }} {{ input }}")
    prepare("--data", path, "--template", frame)
    checkpoint = tmp_path / "prepared" / "tokenizer"
    prepare("--data", path, out="b", tokenizer=checkpoint)
    assert manifest_of(tmp_path / "b")["template"] == manifest_of(tmp_path / "prepared")["template"]
    prepare("--data", path, "--template", "plain", out="c", tokenizer=checkpoint)
    assert manifest_of(tmp_path / "c")["template"]["name"] == "plain"
    frame.unlink()  # the text travels, not the path
    template = template_of(AutoTokenizer.from_pretrained(tmp_path / "b" / "tokenizer"))
    assert template.render_source("x", "y") == "Q: x y"


def test_a_template_that_ignores_the_instruction_warns_and_one_that_ignores_all_is_refused(prepare, path, tmp_path):
    frame = tmp_path / "frame.jinja"
    frame.write_text("Answer: {{ input }}")
    code, _, error = prepare("--data", path, "--template", frame)
    assert code == 0 and "frame.jinja leaves out the instruction, and 40 rows have one." in error
    frame.write_text("Answer:")
    code, _, error = prepare("--data", path, "--template", frame, out="none")
    assert code == 2 and "frame.jinja: the source uses none of instruction, input" in error


def test_what_is_given_and_not_used_is_said(prepare, write_rows, tmp_path):
    frame = tmp_path / "frame.jinja"
    frame.write_text("{{ instruction }}\n{# target #}\nyes")
    rows = [{**row, "difficulty": "easy"} for row in ROWS]
    code, _, error = prepare("--data", write_rows("rows.jsonl", rows), "--template", frame)
    assert code == 0
    assert "warning: fields that are not used: difficulty." in error
    assert "leaves out the input, and 40 rows have one" in error
    assert "leaves out the output: every target is the same" in error
    assert "leaves out the instruction" not in error
    assert load_template(str(frame)).target == "yes"


def test_tokenizers_that_cannot_serve_are_refused(prepare, path, tokenizers_by_family, tmp_path):
    assert "there is no folder" in prepare("--data", path, tokenizer=tmp_path / "nowhere")[2]
    (tmp_path / "hollow").mkdir()
    assert "hollow has no tokenizer" in prepare("--data", path, tokenizer=tmp_path / "hollow")[2]
    without_pad = AutoTokenizer.from_pretrained(_saved(tokenizers_by_family["bart"], tmp_path / "bart"))
    without_pad.pad_token = None
    assert "has no pad_token" in prepare("--data", path, tokenizer=_saved(without_pad, tmp_path / "no_pad"))[2]
    nllb = AutoTokenizer.from_pretrained(_saved(tokenizers_by_family["nllb"], tmp_path / "nllb"), tgt_lang=None)
    assert "the tokenizer is multilingual" in prepare("--data", path, tokenizer=_saved(nllb, tmp_path / "no_lang"))[2]
    assert "belong together" in prepare("--data", path, "--source_language", "en_XX")[2]


def _saved(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return folder


# The command line


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "nothing to read: give --data FILE"),
        (["--data", "tatoeba"], "give either --tokenizer FOLDER_OR_HUB_ID or --train_tokenizer bpe"),
        (["--data", "tatoeba", "--train_tokenizer", "bpq"], "'bpq'; it can be bpe or unigram"),
        (["--data", "tatoeba", "--train_tokeniser", "bpe"], "Did you mean --train_tokenizer?"),
        (["--data", "tatoeba", "--train_tokenizer", "bpe", "--vocab_size", "many"], "vocab_size"),
        (["--data", "tatoeba", "--train_tokenizer", "bpe", "--vocab_size", "10"], "vocab_size is 10"),
        (["--data", "tatoeba", "--train_tokenizer", "bpe", "--test_fraction", "1.5"], "test_fraction is 1.5"),
        (["--data", "tatoeba", "--train_tokenizer", "bpe", "--split_by", "x"], "split_by is 'x'; it can be both or"),
        (["--data", "tatoeba", "--train_tokenizer", "bpe", "--max_target_tokens", "1"], "max_target_tokens is 1"),
        (["--data", "tatoeba", "--train_tokenizer", "bpe", "--template", "alpcaa"], "Did you mean 'alpaca'?"),
        (["--data", "no.jsonl", "--train_tokenizer", "bpe"], "no.jsonl: there is no such file"),
        (["--aligned", "a", "--train_tokenizer", "bpe"], "--aligned takes two files, and got 1"),
        (["--config", "no.yaml"], "no.yaml"),
        ([*SAMPLE, "--packed_source_tokens", "1"], "packed_source_tokens is 1; it must be 2 or more"),
        ([*SAMPLE, "--packing", "false", "--share_sources"], "share_sources says how to pack, and packing is false"),
        ([*SAMPLE, "--packing=false", "--packed_target_tokens=9"], "packed_target_tokens says how to pack"),
        ([*SAMPLE, "--decoder_start_token_id", "-1"], "decoder_start_token_id is -1; it must be 0 or more"),
    ],
)
def test_a_user_s_mistake_is_one_message_and_exit_code_2(arguments, words, capsys, tmp_path):
    assert main([*arguments, "--out", str(tmp_path / "prepared")]) == 2
    said, error = capsys.readouterr()
    assert said == ""
    assert error.startswith("diptych prepare: ") and words in error
    assert not (tmp_path / "prepared").exists()


def test_settings_come_from_yaml_and_the_command_line_goes_before(prepare, path, tmp_path, bpe_folder):
    config = tmp_path / "prepare.yaml"
    config.write_text(f"data: [{path}]\ntemplate: plain\nseed: 3\nout: {tmp_path / 'from_yaml'}\n")
    assert prepare("--config", config, "--seed", "4", out="here")[0] == 0
    settings = manifest_of(tmp_path / "here")["settings"]
    assert (settings["data"], settings["template"], settings["seed"]) == ([path], "plain", 4)
    config.write_text(f"data: [{path}]\ntemplte: plain\n")
    code, _, error = prepare("--config", config)
    assert (code, "Did you mean template?" in error) == (2, True)


def test_an_unwritable_place_is_a_user_error(prepare, write_rows, monkeypatch):
    code, _, error = prepare("--data", write_rows("rows.jsonl", ROWS), out="rows.jsonl/below")
    assert (code, "this is a file. Choose another place." in error) == (2, True)

    def refused(path, busy):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(
        "diptych.data_prep.pipeline.prepared_folder.take_lock", refused
    )  # tests may run as root, who may all
    error = prepare("--data", write_rows("rows.jsonl", ROWS))[2].splitlines()[-1]
    assert error.endswith(".prepared.lock: Permission denied. Get yourself the right to it, or name another place")
    assert "Errno" not in error


def test_the_command_exits_with_0_and_a_summary_and_its_bars_say_what_they_count(write_rows, tmp_path):
    write_rows("rows.jsonl", [*ROWS, {"instruction": "a", "output": 1}])
    finished = run_command("--data", "rows.jsonl", "--train_tokenizer", "bpe", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "Rejected   1 × 'output' is not a string, the first in rows.jsonl:41" in finished.stdout
    assert "Reading: 100%" in finished.stderr and "41 rows, 1 rejected" in finished.stderr  # the progress bars
    (packing,) = {line.split(":")[0] for line in finished.stderr.splitlines() if " rows/s]" in line}
    assert packing == "Packing train" and "examples/s]" in finished.stderr


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    for field in fields(PrepareSettings):
        assert f"--{field.name} " in said
    assert "Whether a cut target still ends in eos" in said


def run_command(*arguments, cwd):
    return subprocess.run([*COMMAND, *arguments], cwd=cwd, capture_output=True, text=True, encoding="utf-8")


# Words on the screen


def test_one_of_something_is_told_in_the_singular(prepare, write_rows):
    code, said, _ = prepare(
        "--data", write_rows("rows.jsonl", ROWS[:1]), "--validation_fraction=0", "--test_fraction=0"
    )
    assert code == 0
    assert "Read       1 row from " in said and "1 group of examples" in said and "1 example in 1 row of" in said


@pytest.mark.parametrize("out", ["in/prepared", "in"])
def test_an_out_folder_among_what_is_read_is_refused_at_once(out, prepare, write_rows, tmp_path):
    (tmp_path / "in").mkdir()
    write_rows("in/rows.jsonl", ROWS)
    code, _, error = prepare("--data", tmp_path / "in", out=out)
    assert code == 2 and "all of which is read" in error and f"--out {tmp_path / 'prepared'}" in error
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["rows.jsonl"]
    assert prepare("--data", f"{tmp_path}/in/**/*.jsonl", out="in/deep/prepared")[0] == 2
    assert prepare("--data", tmp_path / "in")[0] == 0


def test_the_rejects_of_an_earlier_run_are_not_taken_for_data(prepare, write_rows, tmp_path):
    assert prepare("--data", write_rows("rows.jsonl", [{"instruction": "a", "output": ""}]))[0] == 2
    code, _, error = prepare("--data", tmp_path / "prepared.rejects.jsonl")
    assert code == 2 and "could not keep" in error
    assert (tmp_path / "prepared.rejects.jsonl").exists()


def _cut_json(folder):
    text = json.dumps(ROWS, indent=1)
    (folder / "cut.json").write_text(text[: text.index("number 30")])


def _cut_tmx(folder):
    unit = '<tu><tuv xml:lang="en"><seg>Go {0}.</seg></tuv><tuv xml:lang="ko"><seg>가 {0}.</seg></tuv></tu>\n'
    text = '<?xml version="1.0"?>\n<tmx version="1.4"><body>\n' + "".join(map(unit.format, range(40)))
    (folder / "cut.tmx").write_text(text[: text.index("Go 30")], encoding="utf-8")


@pytest.mark.parametrize("name, make, row", [("cut.json", _cut_json, 32), ("cut.tmx", _cut_tmx, 31)])
def test_a_file_that_is_cut_off_is_said_last_and_again_when_it_is_reused(name, make, row, prepare, tmp_path):
    make(tmp_path)
    for _ in range(2):
        code, _, error = prepare("--data", tmp_path / name, "--forward", "Translate:")
        assert code == 0
        last = error.splitlines()[-1]
        assert last.startswith(f"warning: {tmp_path / name} IS CUT OFF (the file ends ") and ", line " in last
    (reject,) = [it for it in rejects_of(tmp_path / "prepared") if it["kind"] == "file cut off"]
    assert reject["row"] == row


def test_a_broken_row_inside_a_tmx_does_not_make_it_one_that_is_cut_off(prepare, tmp_path):
    _cut_tmx(tmp_path)
    text = (tmp_path / "cut.tmx").read_text(encoding="utf-8")
    broken = text.replace("Go 7.</seg>", "Go 7.").removesuffix("<seg>") + "<seg>a</seg></tuv></tu></body></tmx>"
    (tmp_path / "broken.tmx").write_text(broken, encoding="utf-8")
    code, said, error = prepare("--data", tmp_path / "broken.tmx", "--forward", "Translate:")
    assert code == 0 and "broken XML" in said and "CUT OFF" not in error


def test_columns_that_are_named_are_kept_as_text_with_each_example(prepare, write_rows, tmp_path):
    """Also where a row makes several examples, and where a value is no text, or there is none."""
    rows = [{"prompt": f"Say {n}.", "completion": f"It is {n}.", "task": f"task {n % 3}"} for n in range(12)]
    rows[1] |= {"task": None, "meta": {"source": "wmt"}}
    rows[2] |= {"task": 7, "meta": {"source": ["a", "ä"]}}
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(2) for role in ("user", "assistant")]
    chats = write_rows("chats.jsonl", [{"messages": turns, "task": "chat"}])
    arguments = ["--data", write_rows("rows.jsonl", rows), chats, "--template", "chat", "--validation_fraction", "0.2"]
    kept = ["--keep_columns", "task", "domain=meta.source", "missing"]
    code, said, error = prepare(*arguments, *kept)
    assert code == 0, error
    tables = datasets.load_from_disk(tmp_path / "prepared")
    examples = [row for table in tables.values() for row in table]
    found = {row["origin"].rpartition("/")[2]: (row["task"], row["domain"]) for row in examples}
    assert found["rows.jsonl:1"] == ("task 0", "") and found["rows.jsonl:2"] == ("", "wmt")
    assert found["rows.jsonl:3"] == ("7", '["a", "ä"]')
    assert found["chats.jsonl:1.1"] == found["chats.jsonl:1.2"] == ("chat", "")
    assert len(found) == 14 and set(tables) == {"train", "validation", "test"}
    warnings = manifest_of(tmp_path / "prepared")["warnings"]
    assert "keep_columns missing: no row has a value there." in warnings
    assert not [warning for warning in warnings if "not used" in warning], "task and meta are used"
    assert prepare(*arguments, out="without")[0] == 0
    assert "task" not in datasets.load_from_disk(tmp_path / "without")["train"].column_names
    assert "fields that are not used: task, meta." in manifest_of(tmp_path / "without")["warnings"]


def test_a_column_to_keep_may_not_take_the_name_of_another(prepare, path):
    code, _, error = prepare("--data", path, "--keep_columns", "source")
    assert code == 2 and "--keep_columns my_source=source" in error
