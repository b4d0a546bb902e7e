"""Two runs beside each other: real reports of two checkpoints, run folders around them, and what must be refused."""

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from transformers import AutoModelForSeq2SeqLM

from diptych.data_prep.text_to_ids.templates import TEMPLATES, attach_template
from diptych.finetune.commands import cli
from diptych.finetune.evaluating import compare_runs as compare
from diptych.finetune.evaluating.evaluate_split import predictions_file
from diptych.finetune.evaluating.metrics import compute_metrics
from diptych.finetune.training.recipe import TrainRecipe


@pytest.fixture(scope="module")
def evaluated(t5_checkpoint, prepared_folder, tmp_path_factory):
    """(folder, reports): a checkpoint that knows its rows, and the same with its weights disturbed."""
    folder = tmp_path_factory.mktemp("evaluated")
    model = AutoModelForSeq2SeqLM.from_pretrained(t5_checkpoint)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.25 * weight.std() * torch.randn_like(weight)
    shutil.copytree(t5_checkpoint, folder / "worse")
    model.save_pretrained(folder / "worse")
    for name, checkpoint in {"good": t5_checkpoint, "bad": folder / "worse"}.items():
        evaluate(checkpoint, prepared_folder, folder / f"{name}.json")
    return folder


def evaluate(checkpoint: Path, data: Path, out: Path, *more: str) -> None:
    arguments = ["--data", str(data), "--metrics", "chrf,bleu,exact_match", "--device", "cpu", "--out", str(out)]
    assert cli.run("evaluate", [str(checkpoint), *arguments, *more]) == 0


@pytest.fixture
def reports(evaluated, tmp_path):
    """Copies of both reports and their predictions, to be spoilt."""
    for name in ("good", "bad"):
        for file in evaluated.glob(f"{name}.*"):
            shutil.copy(file, tmp_path)
    return tmp_path / "good.json", tmp_path / "bad.json"


def run_folder(folder: Path, losses: list[float], **settings) -> Path:
    """What a run leaves: its recipe as resolved, and a line for each log line and evaluation."""
    folder.mkdir()
    recipe = TrainRecipe(model="m", data="d", out=str(folder), max_steps=10 * len(losses), **settings)
    (folder / "config.yaml").write_text(yaml.safe_dump(asdict(recipe) | {"betas": list(recipe.betas)}))
    lines = []
    for number, loss in enumerate(losses, start=1):
        step = 10 * number
        lines.append({"step": step, "split": "train", "epoch": number / 2, "tokens": 100 * step, "loss": loss})
        lines.append({"step": step, "split": "validation", "loss": loss + 0.2, "chrf": 50 - loss})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_two_reports_are_tested_on_the_sources_that_they_share(reports, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "figures" / "both.json"
    assert cli.run("compare", [*map(str, reports), "--trials", "500", "--out", str(out)]) == 0
    split = json.loads(out.read_text())["splits"]["test"]
    assert split["sources"] == 8 and split["notes"] == []
    assert split["tests"].keys() == {"loss", "chrf", "bleu", "exact_match"}
    for name, test in split["tests"].items():
        assert [test["a"], test["b"]] == pytest.approx([figures[name] for figures in split["figures"]])
        assert test["low"] <= test["b"] - test["a"] <= test["high"] and 1 / 501 <= test["p"] <= 1
    assert split["tests"]["loss"]["b"] > split["tests"]["loss"]["a"]
    table = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert f"{split['tests']['chrf']['p']:.4f}" in table["chrf"]
    low, high = split["intervals"][1]["loss"]
    assert f"[{low:.3f}, {high:.3f}]" in table["loss"]
    assert {"unfinished", "max_new_tokens", "exact_match_rows"} <= table.keys()


def test_each_validation_set_of_a_run_is_compared(tmp_path):
    run = run_folder(tmp_path / "a", [3.0, 2.0], metrics="chrf", best_metric="news/chrf")
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(
        text.replace("validation", "validation/news") + text.replace("validation", "validation/law")
    )
    side = compare.load_side(str(run))
    found = compare.run_figures(side)
    for name in ("news", "law"):
        assert found[f"best validation/{name} loss"] == 2.2 and found[f"best validation/{name} chrf"] == 48.0


def test_runs_show_the_settings_that_differ_and_their_losses(reports, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a = run_folder(tmp_path / "a", [3.0, 2.0, 1.5], learning_rate=1e-3)
    b = run_folder(tmp_path / "b", [3.0, 1.0, 1.2], learning_rate=1e-4, metrics="chrf", best_metric="chrf")
    for report, run in zip(reports, (a, b), strict=True):
        shutil.copy(report, run / "test.json")
        shutil.copy(predictions_file(report), run / "test.predictions.jsonl")
    (a / "status.json").write_text('{"exit_code": 0}')  # other JSON of a run folder
    (b / "notes.json").write_text("no JSON")
    assert cli.run("compare", [str(a), str(b), "--trials", "50"]) == 0
    words = {tuple(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert ("learning_rate", "0.001", "0.0001") in words
    assert not [line for line in words if line[:1] in (("out",), ("seed",))], "these do not differ, or must"
    assert ("best", "validation", "loss", "1.700", "1.200") in words
    assert ("…", "validation", "loss", "at", "step", "30", "20") in words
    assert ("best", "validation", "chrf", "-", "49.000") in words and ("steps", "30", "30") in words
    assert any(line[:1] == ("chrf",) and len(line) == 11 for line in words), "the reports in the folders are tested"


def test_a_run_that_is_still_at_work_is_compared_as_far_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = run_folder(tmp_path / "a", [3.0, 2.0]), run_folder(tmp_path / "b", [3.0])
    with (a / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 30, "spl')
    assert cli.run("compare", [str(a), str(b), "--out", str(tmp_path / "ab.json")]) == 0
    assert json.loads((tmp_path / "ab.json").read_text())["training"]["a"]["steps"] == 20


def other_split(report, predictions):
    report["data"] = report["data"] | {"rows": 9, "texts_sha256": "0"}


def old_report(report, predictions):
    del report["data"]


def no_predictions(report, predictions):
    del report["predictions_sha256"]


def predictions_lost(report, predictions):
    predictions.unlink()


def predictions_of_another_run(report, predictions):
    predictions.write_text(predictions.read_text() + "\n")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (other_split, r"the splits hold other texts (8 and 9 rows)"),
        (old_report, "bad.json does not say what texts it is of"),
        (no_predictions, "bad.json has no predictions, since it was made without metrics"),
        (predictions_lost, "bad.predictions.jsonl is not beside its report"),
        (predictions_of_another_run, "bad.predictions.jsonl is not what was written with bad.json"),
    ],
)
def test_what_cannot_be_paired_is_shown_and_not_tested(reports, spoil, reason, capsys):
    report = json.loads(reports[1].read_text())
    spoil(report, predictions_file(reports[1]))
    reports[1].write_text(json.dumps(report))
    assert cli.run("compare", [*map(str, reports), "--trials", "20"]) == 0
    shown = capsys.readouterr().out
    assert "not tested: " in shown and reason in shown
    assert "approximate randomisation" not in shown and "\nchrf" in shown


def test_another_limit_leaves_out_the_sources_that_only_one_has(
    t5_checkpoint, prepared_folder, reports, tmp_path, capsys
):
    evaluate(t5_checkpoint, prepared_folder, tmp_path / "five.json", "--limit", "5")
    assert cli.run("compare", [str(reports[1]), str(tmp_path / "five.json"), "--trials", "20"]) == 0
    shown = capsys.readouterr().out
    assert "tested on the 5 sources that both have, of 8 and 5" in shown and "on 5 sources, two-sided" in shown
    (limit,) = [line.split() for line in shown.splitlines() if line.startswith("limit")]
    assert limit == ["limit", "-", "5"]


def test_figures_that_cannot_be_compared_are_left_out_of_the_tests(
    t5_checkpoint, prepared_folder, reports, tmp_path, capsys
):
    """BLEU by another tokenisation, and loss per token of another tokenizer."""
    evaluate(t5_checkpoint, prepared_folder, tmp_path / "other.json", "--bleu_tokenize", "intl")
    predictions = tmp_path / "other.predictions.jsonl"
    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    content = "".join(
        json.dumps(line | {"target_tokens": line["target_tokens"] + 1}) + "\n" for line in lines
    ).encode()
    predictions.write_bytes(content)
    report = json.loads((tmp_path / "other.json").read_text())
    report["predictions_sha256"] = hashlib.sha256(content).hexdigest()
    (tmp_path / "other.json").write_text(json.dumps(report))
    out = tmp_path / "both.json"
    assert (
        cli.run("compare", [str(reports[0]), str(tmp_path / "other.json"), "--trials", "20", "--out", str(out)]) == 0
    )
    split = json.loads(out.read_text())["splits"]["test"]
    assert split["tests"].keys() == {"chrf", "exact_match"}
    assert len(split["notes"]) == 2
    shown = capsys.readouterr().out
    assert "loss not tested: it is per token" in shown and "bleu not tested: " in shown


def test_the_newest_report_of_a_split_is_taken_and_named(reports, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a = run_folder(tmp_path / "a", [3.0])
    for name, age in (("newest", 0), ("oldest", 500), ("middle", 100)):
        shutil.copy(reports[0], a / f"{name}.json")
        changed = (a / f"{name}.json").stat().st_mtime - age
        os.utime(a / f"{name}.json", (changed, changed))
    assert cli.run("compare", [str(a), str(reports[1]), "--trials", "20"]) == 0
    shown = capsys.readouterr().out
    assert str(a / "newest.json") in shown and "oldest" not in shown and "middle" not in shown


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nothing", "there is no"),
        (lambda folder: folder, "is no run folder (it has no config.yaml)"),
        (lambda folder: folder / "good.predictions.jsonl", "is no report of `diptych evaluate --out`"),
    ],
)
def test_what_is_no_run_and_no_report_is_a_users_error(reports, make, message, tmp_path, capsys):
    assert cli.run("compare", [str(make(tmp_path)), str(reports[0])]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_two_runs_that_were_not_evaluated_are_compared_and_the_command_that_evaluates_is_named(tmp_path, capsys):
    folders = [str(run_folder(tmp_path / name, [3.0])) for name in "ab"]
    assert cli.run("compare", folders) == 0
    assert "For each: diptych evaluate RUN/final" in capsys.readouterr().err


def test_a_broken_line_and_two_things_that_share_nothing_are_users_errors(reports, tmp_path, capsys):
    a = run_folder(tmp_path / "a", [3.0])
    assert cli.run("compare", [str(a), str(reports[0])]) == 2
    assert "nothing to compare" in capsys.readouterr().err
    (a / "metrics.jsonl").write_text('{"step": 1}\n{broken\n{"step": 2}\n')
    assert cli.run("compare", [str(a), str(reports[0])]) == 2
    assert "metrics.jsonl line 2 is no entry of a log" in capsys.readouterr().err


def test_a_table_of_another_tokenizer_is_comparable_by_its_texts(
    t5_checkpoint, eight_prepared_rows, tiny_tokenizer, reports, tmp_path, capsys
):
    """The same texts prepared once more, elsewhere and in another order of columns: the same split."""
    folder = tmp_path / "again"
    rows = [dict(reversed(row.items())) for row in eight_prepared_rows]
    datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}).save_to_disk(folder)
    attach_template(tiny_tokenizer, TEMPLATES["translate"])
    tiny_tokenizer.save_pretrained(folder / "tokenizer")
    evaluate(t5_checkpoint, folder, tmp_path / "again.json")
    capsys.readouterr()
    assert cli.run("compare", [str(reports[0]), str(tmp_path / "again.json"), "--trials", "20"]) == 0
    assert "not tested" not in capsys.readouterr().out
    good = [json.loads(line) for line in (tmp_path / "good.predictions.jsonl").read_text().splitlines()]
    texts = [row["prediction"] for row in good]
    assert compute_metrics(["chrf"], texts, [row["references"] for row in good])["chrf"] == pytest.approx(100)


def test_a_file_that_is_no_report_is_not_overwritten(reports, prepared_folder, t5_checkpoint, tmp_path, capsys):
    mine = tmp_path / "notes.json"
    mine.write_text('["mine"]')
    arguments = [str(t5_checkpoint), "--data", str(prepared_folder), "--metrics", "", "--device", "cpu"]
    assert cli.run("evaluate", [*arguments, "--out", str(mine)]) == 2
    assert cli.run("compare", [*map(str, reports), "--out", str(mine)]) == 2
    assert (
        capsys.readouterr().err.count(f"{mine} is there already, and is not") == 2 and mine.read_text() == '["mine"]'
    )
    a, b = run_folder(tmp_path / "a", [2.0, 1.5]), run_folder(tmp_path / "b", [2.5, 1.9])
    for _ in range(2):  # its own it replaces
        assert cli.run("compare", [str(a), str(b), "--out", str(tmp_path / "ab.json")]) == 0
