"""`import diptych`: from rows in memory to answers, with the words and the files of the commands."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset, DatasetDict

import diptych
from diptych import UserError

ROWS = [{"instruction": f"Say {number}.", "input": "", "output": f"It is {number}."} for number in range(40)]
SHORT = {"max_source_tokens": 64, "max_target_tokens": 32}


@pytest.fixture(scope="module")
def made(tmp_path_factory, t5_checkpoint):
    """(prepared data, run) of forty rows and two epochs."""
    folder = tmp_path_factory.mktemp("from_python")
    data = diptych.prepare(ROWS, tokenizer=t5_checkpoint, out=folder / "prepared", **SHORT)
    run = diptych.train(model=t5_checkpoint, data=data, out=folder / "run", epochs=2, precision="fp32")
    return data, run


@pytest.mark.slow
def test_importing_takes_no_heavy_library_and_offers_what_it_lists():
    script = (
        "import diptych, sys; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules);"
        "assert set(dir(diptych)) >= {'prepare', 'train', 'evaluate', 'load', '__version__', 'DiptychConfig'};"
        "[getattr(diptych, name) for name in dir(diptych)]; assert diptych.DiptychConfig.model_type == 'diptych'"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError, match="no attribute 'trian'.*prepare"):
        _ = diptych.trian


def test_python_dash_m_is_the_command():
    found = subprocess.run([sys.executable, "-m", "diptych", "trian"], capture_output=True, text=True)
    assert found.returncode == 2 and "Did you mean train?" in found.stderr


def test_ctrl_c_while_the_command_is_being_imported_is_no_traceback(monkeypatch):
    class CtrlC:
        def find_spec(self, name, *_):
            if name == "diptych.finetune.commands.cli":
                raise KeyboardInterrupt

    monkeypatch.setattr(sys, "meta_path", [CtrlC(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "diptych.finetune.commands.cli", raising=False)
    from diptych.__main__ import main

    assert main() == 130
    assert '"diptych=diptych.__main__:main"' in Path(__file__).parents[2].joinpath("setup.py").read_text()


def test_messages_name_settings_as_keywords(t5_checkpoint, tmp_path):
    def message(function, *rows, **settings):
        with pytest.raises(UserError) as error:
            function(*rows, **settings)
        return str(error.value)

    there = {"tokenizer": t5_checkpoint, "out": tmp_path / "prepared"}
    said = message(diptych.prepare, [*ROWS, {"instruction": "", "output": "a"}], **there, strict=True)
    assert said.endswith("(strict stops at the first row that cannot be kept.)")
    assert message(diptych.prepare, ROWS, zzz=1) == "there is no setting zzz. docs/settings.md lists them all."
    assert ": map output=answer" in message(diptych.prepare, [{"q": "a", "a": "b"}] * 4, **there)
    (tmp_path / "rows.jsonl").write_text("")
    said = message(diptych.train, model="diptych-8m", data=tmp_path / "rows.jsonl", out=tmp_path / "run", epochs=1)
    assert said.endswith(f"Make one with `diptych prepare --data {tmp_path / 'rows.jsonl'}`.")


def test_rows_become_data_a_run_figures_and_answers(made, capfd):
    data, run = made
    assert sum(data.splits.values()) == 40 and not data.rejected
    assert run.state == "done" and (run.folder / "loss.png").is_file()
    assert run.train_loss == [entry for entry in run.figures if entry["split"] == "train"][-1]["loss"]
    assert run.validation_loss < 10

    report = diptych.evaluate(run, data, metrics="chrf", batch_size=4)
    low, high = report.intervals["loss"]
    assert low <= report.figures["loss"] <= high and 0 <= report.figures["chrf"] <= 100
    assert report.predictions[0].keys() >= {"source", "references", "prediction"}
    model = run.load(device="cpu")
    assert isinstance(model.generate("Say 7.", max_new_tokens=8), str)
    assert capfd.readouterr() == ("", "")


def test_all_kinds_of_rows_give_the_same_dataset(tmp_path, t5_checkpoint):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)))
    dataset, splits = Dataset.from_list(ROWS), {"train": ROWS, "test": [ROWS[0] | {"output": "Zero."}]}
    kinds = [ROWS, str(file), file, [file], dataset, pandas.DataFrame(ROWS), DatasetDict(train=dataset)]
    sizes = []
    for number, rows in enumerate(kinds):
        out = tmp_path / str(number)
        sizes.append(diptych.prepare(rows, tokenizer=t5_checkpoint, out=out, **SHORT).splits)
    assert sizes == [{"train": 36, "validation": 2, "test": 2}] * len(kinds)
    of_splits = diptych.prepare(splits, tokenizer=t5_checkpoint, out=tmp_path / "splits", **SHORT).splits
    assert of_splits == {"train": 39, "test": 1}  # a row of test is left out of train
    two_sets = {"train": ROWS, "test_a": splits["test"], "test_b": [ROWS[1] | {"output": "One."}]}
    of_sets = diptych.prepare(two_sets, tokenizer=t5_checkpoint, out=tmp_path / "sets", **SHORT).splits
    assert of_sets == {"train": 38, "test/test_a": 1, "test/test_b": 1}


def test_sets_with_names_each_have_a_report(made, tmp_path, t5_checkpoint):
    for name, rows in {"small": ROWS[:3], "large": ROWS[3:9]}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sets = [f"{name}={tmp_path / name}.jsonl" for name in ("small", "large")]
    data = diptych.prepare(ROWS, tokenizer=t5_checkpoint, out=tmp_path / "sets", test=sets, **SHORT)
    reports = diptych.evaluate(t5_checkpoint, data, metrics="")
    assert {name: report.figures["rows"] for name, report in reports.items()} == {"test/small": 3, "test/large": 6}
    of_rows = diptych.evaluate(t5_checkpoint, ROWS[:3], metrics="")
    of_tasks = diptych.evaluate(t5_checkpoint, [row | {"task": "a"} for row in ROWS[:3]], metrics="", by="task,origin")
    assert of_tasks.groups["task"]["a"]["figures"]["loss"] == pytest.approx(of_rows.figures["loss"])
    assert len(of_tasks.groups["origin"]) == 3
    assert of_rows.figures["loss"] == reports["test/small"].figures["loss"]


def test_one_row_a_list_a_frame_and_a_dataset_are_read_alike(t5_checkpoint):
    model, rows = diptych.load(t5_checkpoint, device="cpu"), ROWS[:2]
    frame, dataset = pandas.DataFrame(rows), Dataset.from_list(rows)
    said = model.generate(rows, max_new_tokens=4)
    assert model.generate(frame, max_new_tokens=4) == model.generate(dataset, max_new_tokens=4) == said
    assert model.score(frame) == model.score(rows) and model.score(rows[0]) == model.score(rows[:1])
    assert model.embed("Say 7.").shape == model.embed(rows[0]).shape == model.embed(["Say 7."]).shape
    assert len(model.embed(frame)) == 2 and len(model.embed([])) == 0 and model.generate([]) == []
    for wrong in (7, None, [["a", "b"]]):
        with pytest.raises(diptych.UserError, match="row 1 is of type (int|NoneType|list); give texts"):
            model.generate(wrong)
    assert len(repr(model)) < 200


def test_the_same_rows_are_not_prepared_twice_and_what_is_printed_goes_to_say(tmp_path, t5_checkpoint, capfd):
    said: list[str] = []
    for say in (said.append, print):
        diptych.prepare(ROWS, tokenizer=t5_checkpoint, out=tmp_path / "prepared", say=say, **SHORT)
    assert any("40" in line for line in said) and not any(line.startswith("Reused") for line in said)
    assert "\nReused" in f"\n{capfd.readouterr().out}"


def test_mistakes_are_exceptions_with_the_words_of_the_command_line(tmp_path, made):
    data, run = made
    for wrong, message in {
        "lr": "Here it is learning_rate",
        "learning_rte": "Did you mean learning_rate",
        "learning_rate": "'fast'; it has to be a number",
    }.items():
        with pytest.raises(UserError, match=message):
            diptych.train(model=run, data=data, out=tmp_path / "run", epochs=1, **{wrong: "fast"})
    with pytest.raises(UserError, match=r"Prepare it first: data=diptych.prepare"):
        diptych.train(model=run, data=ROWS, out=tmp_path / "run", epochs=1)
    with pytest.raises(UserError, match="data is of type Dataset.*give rows to diptych.prepare"):
        diptych.train(model=run, data=Dataset.from_list(ROWS), out=tmp_path / "run", epochs=1)
    with pytest.raises(UserError, match="is no prepared dataset"):
        diptych.train(model=run, data=tmp_path / "nowhere", out=tmp_path / "run", epochs=1)
    with pytest.raises(UserError, match="rows:1 is of type int, and each row is a dict"):
        diptych.prepare([3], tokenizer=run.final, out=tmp_path / "prepared")
    with pytest.raises(UserError, match="tokenizer"):
        diptych.prepare(ROWS, out=tmp_path / "prepared")
    model = diptych.load(run.final)
    for settings in ({"num_beam": 2}, {"dtype": "float32"}, {"out_file": "x"}, {"num_beams": 0}):
        with pytest.raises(UserError, match=next(iter(settings))):
            model.generate("Go.", **settings)
    with pytest.raises(UserError, match="row 2: .*instruction"):
        model.generate(["Go.", {"instrution": "Go."}])
    with pytest.raises(UserError, match="row 1 has no text `output`"):
        model.score([{"instruction": "Go."}])
    assert not any(tmp_path.iterdir())


def test_a_second_run_goes_on_from_the_first_ones_model(made, tmp_path):
    data, run = made
    again = diptych.train(model=run, data=data, out=tmp_path / "again", max_steps=1, precision="fp32", seed=1)
    assert again.state == "done" and again.train_loss < run.figures[0]["loss"] + 1
    with pytest.raises(UserError, match="out"):
        diptych.train(model=run, data=data, out=tmp_path / "again", max_steps=1, precision="fp32")


@pytest.mark.slow
def test_runs_of_one_process_may_differ_in_precision(made, tmp_path):
    data, run = made
    for precision in ("bf16", "fp32", "bf16"):
        out = tmp_path / f"{precision}-{len(list(tmp_path.iterdir()))}"
        assert diptych.train(model=run, data=data, out=out, max_steps=1, precision=precision).state == "done"
        assert f"precision: {precision}" in (out / "config.yaml").read_text()


@pytest.mark.slow
def test_ctrl_c_ends_the_step_saves_and_the_run_goes_on(made, tmp_path):
    data, run = made
    settings = {"model": run, "data": data, "out": tmp_path / "run", "max_steps": 6, "precision": "fp32"}
    before = signal.getsignal(signal.SIGINT)

    def press_ctrl_c(line: str) -> None:
        if line.startswith("step 2/"):
            os.kill(os.getpid(), signal.SIGINT)

    stopped = diptych.train(**settings, logging_every=1, say=press_ctrl_c)
    assert stopped.state == "stopped" and 2 <= stopped.figures[-1]["step"] < 6
    assert signal.getsignal(signal.SIGINT) == before
    with pytest.raises(diptych.UserError, match="or go on with the run in it: resume=True$"):
        diptych.train(**settings, logging_every=1)
    resumed = diptych.train(**settings, logging_every=1, resume=True)
    assert resumed.state == "done" and resumed.figures[-1]["step"] == 6


def test_a_loaded_model_writes_what_it_learned(t5_checkpoint):
    model = diptych.load(t5_checkpoint)
    rows = [{"instruction": "Translate English to Korean:", "input": "Go."}, {"instruction": "Add.", "input": "1 + 1"}]
    assert model.generate(rows) == ["가.", "2"]
    assert model.generate(["Go.", "Yes."], instruction="Translate English to Korean:") == ["가.", "네."]
    assert model.generate(rows[1]) == "2"
    assert model.generate(rows[1], choices=["3", "2"]) == "2"
    pairs = model.generate(rows, num_beams=2, num_return_sequences=2)
    assert [len(pair) for pair in pairs] == [2, 2] and pairs[0][0] == "가."


def test_scores_are_the_models_own_loss(t5_checkpoint):
    model = diptych.load(t5_checkpoint)
    asked = {"instruction": "Translate English to Korean:", "input": "Go."}
    right, wrong = model.score([asked | {"output": "가."}, asked | {"output": "네."}])
    assert right.log_probability > wrong.log_probability
    (output,) = model.generate([asked], scores=True)
    assert output.log_probability == pytest.approx(right.log_probability, abs=1e-4)
    assert right.loss == pytest.approx(-right.log_probability / right.tokens)


def test_embeddings_are_means_of_the_encoders_states_whatever_stands_beside(t5_checkpoint):
    model = diptych.load(t5_checkpoint)
    texts = ["Go.", "I am a student. I am a student."]
    together = model.embed(texts)
    assert together.dtype == np.float32 and together.shape == (2, model.model.config.d_model)
    np.testing.assert_allclose(together[0], model.embed(texts[:1], batch_size=1)[0], atol=1e-5)
    ids = model.tokenizer(texts[0], return_tensors="pt").input_ids
    with torch.no_grad():
        own = model.model.get_encoder()(input_ids=ids).last_hidden_state.mean(dim=1)
    np.testing.assert_allclose(model.embed(texts[:1], template="plain")[0], own[0].numpy(), atol=1e-4)
