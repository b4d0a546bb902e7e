"""Rows that are in memory, prepared from Python: what comes out is what the same rows in a file give."""

import json

import datasets
import pandas
import pytest

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.pipeline.prepare_settings import PrepareSettings
from diptych.data_prep.prepare import prepare

ROWS = [{"instruction": f"Say {n}.", "input": f"number {n}", "output": f"It is {n}."} for n in range(40)]


def test_rows_in_memory_are_prepared_as_those_of_a_file_are(bpe_folder, write_rows, tmp_path, capsys):
    settings = {"tokenizer": str(bpe_folder), "template": "plain"}
    path = write_rows("rows.jsonl", [*ROWS, {"instruction": "Say nothing.", "output": ""}])
    rows = [json.loads(line) for line in open(path, encoding="utf-8")]
    columns = {name: [row.get(name, "") for row in rows] for name in ROWS[0]}
    kinds = {
        "list": rows,
        "columns": columns,
        "dataset": datasets.Dataset.from_list(rows),
        "frame": pandas.DataFrame(rows),
    }
    prepare(PrepareSettings(data=[path], out=str(tmp_path / "file"), **settings), say=len)
    expected = [row["source"] for row in datasets.load_from_disk(tmp_path / "file")["train"]]
    for name, given in kinds.items():
        said = []
        prepared = prepare(PrepareSettings(out=str(tmp_path / name), **settings), said.append, given)
        assert (prepared.splits, prepared.rejected) == ({"train": 36, "validation": 2, "test": 2}, 1)
        assert said == ["Format     rows: alpaca, recognised"]
        assert json.loads(prepared.rejects_file.read_text())["file"] == "rows"
        assert [row["source"] for row in datasets.load_from_disk(prepared.folder)["train"]] == expected
        assert "40 kept, 1 rejected" in str(prepared) and prepared.warnings == [
            f"1 row not kept; why: {prepared.rejects_file}"
        ]
        again = prepare(PrepareSettings(out=str(tmp_path / name), **settings), said.append, given)
        assert again.is_reused and again.manifest == json.loads(json.dumps(prepared.manifest))
    assert capsys.readouterr().out == ""


def test_rows_in_memory_have_their_splits_and_stand_beside_files(bpe_folder, write_rows, tmp_path):
    settings = {"tokenizer": str(bpe_folder), "out": str(tmp_path / "out")}
    splits = {"test": [{"instruction": "Held", "output": "out"}], "train": ROWS}
    assert prepare(PrepareSettings(**settings), len, splits).splits == {"train": 40, "test": 1}
    beside_files = PrepareSettings(data=[write_rows("more.jsonl", ROWS[:3])], deduplicate=False, **settings)
    assert prepare(beside_files, len, splits).splits == {"train": 43, "test": 1}
    assert prepare(PrepareSettings(**settings), len, {"validation": ROWS}).splits == {"validation": 40}
    for rows, fault in {
        "no dict": (["Go."], "rows:1 is of type str, and each row is a dict"),
        "no split": ({"all": ROWS}, "rows has the split 'all'"),
        "no rows": ([], "there are no rows in what was read"),
        "a path": ({"train": "rows.jsonl"}, 'rows:train is a path.* data="train.jsonl", test='),
        "unequal": (
            {"instruction": ["a", "b"], "output": ["c"]},
            "different lengths, {'instruction': 2, 'output': 1}",
        ),
        "one row": ({"instruction": "Add.", "output": "2"}, "give rows as"),
    }.values():
        with pytest.raises(UserError, match=fault):
            prepare(PrepareSettings(**settings), len, rows)
    with pytest.raises(UserError, match="give either --tokenizer"):
        prepare(PrepareSettings(out=settings["out"]), len, ROWS)
