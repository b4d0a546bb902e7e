"""Prepared folders, checkpoints and runs of a stranger: what is damaged or odd is one message, by file and key."""

import json
import os
import shutil
from dataclasses import asdict
from functools import partial

import datasets
import numpy as np
import pytest

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.batches.packed_rows import Packing
from diptych.finetune.batches.padded_rows import load_prepared, row_lengths
from diptych.finetune.commands.exit_codes import CheckpointError
from diptych.finetune.model.untrusted_files import open_prepared
from diptych.finetune.run_files import atomic_folders, checkpoints
from diptych.finetune.run_files.run_folder import read_status, settings_of
from diptych.finetune.several_runs import sweep
from diptych.finetune.training.resuming import saved_state
from diptych.finetune.training.run import Progress

DEEP = "[" * 10**5
PACKING = dict.fromkeys(Packing._fields, 1) | {"language_starts": []}


def put(file, text):
    """None: a pipe, that nobody writes into."""
    file.unlink(missing_ok=True)
    file.write_text(text) if text is not None else os.mkfifo(file)


def write_state(path, step):
    (path / "state.json").write_text(json.dumps({"progress": {"step": step}}))


@pytest.fixture
def prepared(tmp_path):
    rows = datasets.Dataset.from_dict({"input_ids": [[5, 1], [6, 1]], "labels": [[7, 1], [-100, -100]]})
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path / "data")
    (tmp_path / "data" / "manifest.json").write_text("{}")
    return tmp_path / "data"


@pytest.mark.parametrize(
    "file, text, said",
    [
        ("dataset_dict.json", DEEP, "cannot be read as a prepared dataset: "),
        ("dataset_dict.json", '{"splits": ["train", "../data/train"]}', "dataset_dict.json has the splits"),
        ("dataset_dict.json", '{"splits": ["train", "train"]}', "dataset_dict.json has the splits"),
        ("train/state.json", DEEP, "cannot be read as a prepared dataset: "),
        ("train/state.json", '{"_data_files": [{"filename": "/etc/passwd"}]}', "has the file {'filename': '/etc"),
        ("train/state.json", '{"_data_files": [{"filename": "../x.arrow"}]}', "state.json of train has the file"),
        ("train/dataset_info.json", DEEP, "cannot be read as a prepared dataset: "),
        ("train/state.json", None, "train/state.json is no file that can be read"),
        ("train/data-00000-of-00001.arrow", None, "arrow is no file that can be read"),
        ("manifest.json", DEEP, "manifest.json cannot be read"),
        ("manifest.json", "[]", "manifest.json cannot be read"),
    ],
)
def test_a_damaged_file_of_a_prepared_folder_is_one_message(prepared, file, text, said):
    put(prepared / file, text)
    with pytest.raises(UserError) as caught:
        load_prepared(str(prepared))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "labels, said",
    [
        (["a", "b"], "split train of .* has no lists of whole numbers as column labels"),
        ([[1.5], [2.0]], "no lists of whole numbers"),
        ([[[1]], [[2]]], "no lists of whole numbers"),
        ([True, False], "no lists of whole numbers"),
        ([[1], None], "row 1: labels is None"),
        ([[1], [None, 2]], r"row 1: labels is \[None, 2\]"),
        ([[1], []], r"row 1: labels is \[\]"),
    ],
)
def test_a_column_that_holds_no_token_ids_is_named_with_its_row(prepared, labels, said):
    shutil.rmtree(prepared / "train")
    datasets.Dataset.from_dict({"input_ids": [[5], [6]], "labels": labels}).save_to_disk(prepared / "train")
    with pytest.raises(UserError, match=said):
        open_prepared(prepared)


def test_labels_that_are_left_out_of_the_loss_are_no_targets(prepared):
    assert np.array_equal(row_lengths(open_prepared(prepared)["train"]).target_tokens, [2, 0])


@pytest.mark.parametrize("packing", [5, {}, PACKING | {"max_source_tokens": "x"}, PACKING | {"language_starts": 5}])
def test_a_packing_that_is_none_is_refused(packing):
    assert Packing.from_manifest(PACKING).positions == 1
    with pytest.raises(UserError, match="packing in manifest.json is not what was written"):
        Packing.from_manifest(packing)


@pytest.mark.parametrize(
    "manifest",
    [
        *(
            DEEP,
            "[]",
            "7",
            '{"state.json": {"bytes": 1e999, "xxh3_128": "x"}}',
            '{"state.json": 5}',
            None,
            '{"state.json": {"bytes": "x", "xxh3_128": []}}',
        ),
        json.dumps({"a" * 5000: {"bytes": 5, "xxh3_128": "x"}}),
        json.dumps({"/etc/passwd": {"bytes": 5, "xxh3_128": "x"}}),
    ],
)
def test_a_checkpoint_whose_manifest_cannot_be_read_is_passed_over(tmp_path, manifest):
    for step in (2, 4):
        atomic_folders.write_folder(tmp_path / f"step-{step:06d}", partial(write_state, step=step))
    put(tmp_path / "step-000004" / "manifest.json", manifest)
    path, passed_over = checkpoints.latest_checkpoint(tmp_path)
    assert path.name == "step-000002" and len(passed_over) == 1


STATE = {"run": {}, "written": {}, "scaler": {}, "optimizer": {}, "progress": asdict(Progress())}


@pytest.mark.parametrize(
    "changes",
    [
        *({"step": value} for value in ("x", -5, None, True, 1.5, 10**30)),
        *({"nats": value} for value in ([], None, float("nan"), 10**400)),
        *({"norms": value} for value in (5, ["x"], [None])),
        *({"best": "x"}, {"best_step": 1.5}, {"unknown": 1}, "5", []),
    ],
)
def test_a_state_with_other_values_is_an_error_of_the_checkpoint(tmp_path, changes):
    progress = STATE["progress"] | changes if isinstance(changes, dict) else changes
    for state in (STATE | {"progress": progress}, STATE | {"written": {"metrics.jsonl": changes}}):
        (tmp_path / "state.json").write_text(json.dumps(state))
        with pytest.raises(CheckpointError, match="state.json is not the state of a run"):
            saved_state(None, tmp_path, {})


@pytest.mark.parametrize(
    "text",
    [
        *("!!python/object/apply:os.system ['touch ran']", DEEP, "[]", "", "model: a\n", "\ud800"),
        "a: &a [*a]\nmodel: *a\ndata: b\nseed: 1\n",
    ],
)
def test_a_config_yaml_that_is_no_recipe_is_refused(tmp_path, text):
    (tmp_path / "config.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match="config.yaml is not the recipe of a run"):
        settings_of(tmp_path)
    with pytest.raises(UserError, match="config.yaml|data"):  # as a recipe
        sweep.run(sweep.SweepSettings(str(tmp_path / "config.yaml"), str(tmp_path / "out"), {"seed": [1, 2]}))


@pytest.mark.parametrize("text", [DEEP, "[]", "", None])
def test_a_damaged_status_counts_as_none(tmp_path, text):
    put(tmp_path / "status.json", text)
    assert read_status(tmp_path) is None


def test_a_line_of_a_log_that_is_none_is_named(tmp_path):
    for line, said in ((DEEP, ""), ("[]", ": it is a list, and an object is due")):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + line + "\n")
        with pytest.raises(UserError, match=f"metrics.jsonl line 2 is no entry of a log{said}"):
            atomic_folders.read_json_lines(tmp_path / "metrics.jsonl")
