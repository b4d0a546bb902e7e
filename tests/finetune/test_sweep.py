"""`diptych sweep` on real runs: it finds the better values, stops the worse ones, and goes on where it was stopped."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas
import pytest
import yaml
from test_train import figures, final_weights

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.several_runs.sweep import run
from diptych.finetune.several_runs.sweep_settings import SweepSettings

SEARCH = {"learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}, "schedule": ["constant", "cosine"]}


@pytest.fixture
def recipe_file(checkpoint_of, training_folder, tmp_path) -> Path:
    settings = {"model": str(checkpoint_of("t5")), "data": str(training_folder), "precision": "fp32"}
    settings |= {"max_steps": 12, "batch_size": 4, "learning_rate": 2e-5, "eval_every": 4}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def trials_of(out: Path) -> pandas.DataFrame:
    return pandas.read_csv(out / "trials.csv").sort_values("trial", ignore_index=True)


@pytest.mark.slow
def test_a_sweep_that_was_stopped_ends_as_one_that_was_not(recipe_file, tmp_path):
    """So early, what is proposed does not depend on the figures: the one that was not stopped trains nothing."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    settings = SweepSettings(str(recipe_file), str(whole), SEARCH, 3, launcher=fake_launcher(tmp_path, "x"))
    assert run(settings) == 0
    command = [sys.executable, "-m", "diptych.finetune.commands.cli", "sweep", str(recipe_file), "--out", str(parted)]
    command += ["--search", json.dumps(SEARCH), "--trials", "3"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (parted / "trial-001" / "metrics.jsonl").is_file():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75 and "stopped by SIGTERM. Run the same command to go on" in process.stderr.read()
    assert len(trials_of(parted)) == 1  # the other was cut
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr

    trials, same = trials_of(parted), ["trial", "learning_rate", "schedule"]
    pandas.testing.assert_frame_equal(trials[same], trials_of(whole)[same])
    assert trials.learning_rate[0] == 2e-5 and trials.learning_rate.nunique() == 3  # the first is the recipe's own
    best = trials.loc[trials.loss.idxmin()]
    assert best.loss < trials.loss[0]
    found = yaml.safe_load((parted / "best.yaml").read_text())
    assert (found["learning_rate"], found["schedule"]) == (best.learning_rate, best.schedule)
    folder = parted / f"trial-{best.trial:03d}"
    assert best.loss == min(entry["loss"] for entry in figures(str(folder), "validation"))
    assert final_weights(str(folder))
    assert [path.parent.name for path in parted.glob("trial-*/final")] == [folder.name]
    assert (parted / "sweep.png").stat().st_size > 10_000
    assert "trial-002 | learning_rate " in ended.stdout and "best recipe: " in ended.stdout


REFUSED = {
    "an unknown setting": ({"learning_rat": [1e-3]}, "Did you mean learning_rate"),
    "a range without an end": ({"learning_rate": {"low": 1e-5}}, "search.learning_rate is .*Give a list of values"),
    "the wrong way round": ({"learning_rate": {"low": 1e-3, "high": 1e-5}}, "search.learning_rate"),
    "what must be the same": ({"best_metric": ["loss", "chrf"]}, "has to be the same in all trials"),
    "a size that there is not": ({"model": ["diptych-9m"]}, "there is no size diptych-9m"),
    "a value that a recipe refuses": ({"label_smoothing": {"low": 0.0, "high": 1.5}}, "label_smoothing is 1.5"),
}


@pytest.mark.parametrize("search, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_varied_is_refused_before_a_trial(search, message, recipe_file, tmp_path):
    with pytest.raises(UserError, match=message):
        run(SweepSettings(str(recipe_file), str(tmp_path / "sweep"), search))
    assert not (tmp_path / "sweep").exists()


def test_a_folder_that_holds_no_sweep_is_not_written_into(recipe_file, tmp_path):
    with pytest.raises(UserError, match="holds no sweep"):
        run(SweepSettings(str(recipe_file), str(recipe_file.parent)))


def test_a_trial_that_fails_ends_the_sweep_with_what_it_said(recipe_file, tmp_path):
    recipe_file.write_text(recipe_file.read_text().replace("max_steps: 12", "max_steps: 1\nattention: flex_attention"))
    out = tmp_path / "sweep"
    command = [sys.executable, "-m", "diptych.finetune.commands.cli", "sweep", str(recipe_file), "--out", str(out)]
    failed = subprocess.run([*command, "--trials", "2"], capture_output=True, text=True)
    error = failed.stderr
    assert (
        failed.returncode == 2
        and "trial-000 | learning_rate" in error
        and "attention is flex_attention, which cannot compute" in error
    )
    with pytest.raises(UserError, match="was begun with another search. Set it back to go on"):
        run(SweepSettings(str(recipe_file), str(out), {"learning_rate": [1e-3, 1e-4]}))


def fake_launcher(tmp_path: Path, figures: str) -> str:
    """A program in place of training: the figure misses is 1 / learning_rate; `figures` may name another one."""
    program = tmp_path / "launcher.py"
    program.write_text(
        "import json, pathlib, sys, yaml\n"
        "recipe = yaml.safe_load(open(sys.argv[sys.argv.index('--config') + 1]))\n"
        "out = pathlib.Path(recipe['out']); out.mkdir()\n"
        f"entry = {{'step': 1, 'split': 'validation', 'loss': 1.0, {figures!r}: 1 / recipe['learning_rate']}}\n"
        "(out / 'metrics.jsonl').write_text(json.dumps(entry) + '\\n')\n"
    )
    return f"{sys.executable} {program}"


def test_a_metric_of_ones_own_says_which_way_is_better_and_lists_are_tried_once(recipe_file, tmp_path, monkeypatch):
    (tmp_path / "my_metric.py").write_text("def misses(predictions, references, sources): return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    recipe_file.write_text(recipe_file.read_text() + "metrics: my_metric:misses:min\nbest_metric: misses\n")
    search = {"learning_rate": [1e-3, 1e-2, 1e-4], "weight_decay": [0.0]}
    launcher = fake_launcher(tmp_path, "misses")
    assert run(SweepSettings(str(recipe_file), str(tmp_path / "sweep"), search, launcher=launcher)) == 0
    assert yaml.safe_load((tmp_path / "sweep" / "best.yaml").read_text())["learning_rate"] == 1e-2
    assert sorted(trials_of(tmp_path / "sweep").learning_rate) == [1e-4, 1e-3, 1e-2]
    launcher = fake_launcher(tmp_path, "chrf")
    with pytest.raises(UserError, match="trial-000 has no misses in its evaluations"):
        run(SweepSettings(str(recipe_file), str(tmp_path / "other"), search, launcher=launcher))


def test_the_first_trial_has_the_values_of_the_recipe_also_where_they_are_the_defaults(recipe_file, tmp_path):
    search = {"epsilon": {"low": 1e-9, "high": 1.0}, "schedule": ["linear", "cosine"]}  # the recipe names neither
    launcher = fake_launcher(tmp_path, "x")
    assert run(SweepSettings(str(recipe_file), str(tmp_path / "sweep"), search, trials=1, launcher=launcher)) == 0
    trials = trials_of(tmp_path / "sweep")
    assert (trials.epsilon[0], trials.schedule[0]) == (1e-8, "cosine")


def test_values_that_are_not_possible_together_are_told_and_left_out(recipe_file, tmp_path, capsys):
    search = {"optimizer": ["adamw", "schedule_free"], "schedule": ["linear"], "weight_decay": {"low": 0, "high": 1}}
    settings = SweepSettings(
        str(recipe_file), str(tmp_path / "sweep"), search, 8, launcher=fake_launcher(tmp_path, "x")
    )
    assert run(settings) == 0
    said = capsys.readouterr().out
    assert "not possible: schedule is linear, but schedule_free needs no decay" in said
    trials = trials_of(tmp_path / "sweep")
    assert said.startswith(f"8 trials: {tmp_path}/sweep/trial-000 to trial-007\n")
    printed = [int(line[6:9]) for line in said.splitlines() if line.startswith("trial-")]
    folders = [int(file.stem[6:]) for file in sorted((tmp_path / "sweep").glob("trial-*.yaml"))]
    assert printed == folders == list(trials.trial)  # one number for what is printed, the folder, and the table
    assert set(trials.state[trials.optimizer == "schedule_free"]) == {"FAIL"} and (trials.state == "COMPLETE").any()
    assert ((trials.weight_decay % 1) != 0).any()  # a setting that is no whole number takes values between


def test_of_a_huge_grid_no_more_is_made_than_is_tried(recipe_file, tmp_path):
    """Ten thousand million combinations; a second command goes on with those that are left."""
    names = ("learning_rate", "weight_decay", "warmup_steps", "label_smoothing", "seed")
    search = {
        name: [number / 1000 if name[0] in "lw" and name != "warmup_steps" else number for number in range(1, 101)]
        for name in names
    }
    launcher = fake_launcher(tmp_path, "x")
    for trials in (3, 5):
        (tmp_path / "sweep" / ".lock").unlink(missing_ok=True)  # held by this process
        settings = SweepSettings(str(recipe_file), str(tmp_path / "sweep"), search, trials, launcher=launcher)
        assert run(settings) == 0
        seeds = list(trials_of(tmp_path / "sweep").seed)  # the first trial has the recipe's own weight_decay
        assert len(seeds) == trials and seeds[1:] == list(range(1, trials))


@pytest.mark.parametrize(
    "launcher, said", {"'": "Write it as in a shell", "no-such-program x": "there is no program no"}.items()
)
def test_a_launcher_that_cannot_be_started_is_refused(launcher, said, recipe_file, tmp_path):
    with pytest.raises(UserError, match=said):
        SweepSettings(str(recipe_file), str(tmp_path / "sweep"), launcher=launcher)


def test_a_trial_that_is_killed_ends_the_sweep_as_in_a_shell(recipe_file, tmp_path, capsys):
    launcher = "sh -c 'head -c 3000000 /dev/zero; kill -9 $$'"
    assert run(SweepSettings(str(recipe_file), str(tmp_path / "sweep"), launcher=launcher)) == 128 + signal.SIGKILL
    said = capsys.readouterr().err
    assert "ended with exit code -9" in said and len(said) < 10_000 and "\0" not in said


def edited(**changes):
    """Of each line that has one of these keys, the value."""

    def spoil(lines):
        return [json.dumps(line | {name: changes[name] for name in changes.keys() & line.keys()}) for line in lines]

    return spoil


@pytest.mark.parametrize("lost", [1, 20])
def test_a_journal_whose_last_entry_was_cut_goes_on(lost, recipe_file, tmp_path):
    settings = SweepSettings(
        str(recipe_file), str(tmp_path / "sweep"), trials=2, launcher=fake_launcher(tmp_path, "x")
    )
    assert run(settings) == 0
    journal, trials = tmp_path / "sweep" / "study.log", trials_of(tmp_path / "sweep")
    journal.write_bytes(journal.read_bytes()[:-lost])
    (tmp_path / "sweep" / ".lock").unlink()
    shutil.rmtree(tmp_path / "sweep" / "trial-001")  # for a launcher that resumes nothing
    assert run(settings) == 0
    pandas.testing.assert_frame_equal(trials_of(tmp_path / "sweep"), trials)


JOURNALS = {
    "text": lambda lines: ["hello", *map(json.dumps, lines)],
    "without its beginning": lambda lines: list(map(json.dumps, lines[1:])),
    "a list": lambda lines: [*map(json.dumps, lines), "[1]"],
    "nested": lambda lines: [*map(json.dumps, lines), "[" * 100_000],
    "another direction": edited(directions=[2]),
    "two directions": edited(directions=[1, 2]),
    "another metric": edited(user_attr={"metric": "bleu"}),
    "not finite": edited(values=[math.nan]),
    "a text as figure": edited(values=["x"]),
    "another distribution": edited(distribution=json.dumps({"name": "os.system", "attributes": {}})),
    "a text as value": edited(param_value_internal="x"),
}


@pytest.mark.parametrize("case", JOURNALS)
def test_a_journal_that_is_damaged_is_one_message(case, recipe_file, tmp_path):
    settings = SweepSettings(
        str(recipe_file), str(tmp_path / "sweep"), trials=2, launcher=fake_launcher(tmp_path, "x")
    )
    assert run(settings) == 0
    journal = tmp_path / "sweep" / "study.log"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    (tmp_path / "sweep" / ".lock").unlink()
    journal.write_text("\n".join(JOURNALS[case](lines)) + "\n")
    with pytest.raises(UserError, match="study.log cannot be read.* Restore it, or begin anew"):
        run(settings)
