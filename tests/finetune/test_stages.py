"""Stages: one run of several trainings, that goes on wherever it was cut, with the same bits."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.commands.cli import main as diptych
from diptych.finetune.commands.exit_codes import DONE, STOPPED, Stopped
from diptych.finetune.run_files.atomic_folders import fault_of
from diptych.finetune.run_files.run_folder import read_status
from diptych.finetune.train import run_recipe
from diptych.finetune.training import loop, training_batches
from diptych.finetune.training.resuming import to_yaml
from diptych.finetune.training.stop_signals import StopRequest

STAGES = [
    {"name": "warm-up", "trainable": "cross_attention", "max_steps": 3},
    {"name": "heal", "max_steps": 4, "learning_rate": 1e-3, "schedule": "constant"},
    {"name": "instruct", "epochs": 1, "packed": False},
]


@pytest.fixture(scope="module")
def into(recipe_of, packed_folder):
    """`into(folder, …)`: the recipe of a run of these stages."""
    settings = {"stages": STAGES, "batch_size": 2, "learning_rate": 5e-3, "logging_every": 1, "save_every": 2}
    settings |= {"max_steps": None, "epsilon": 1e-2, "rank_timeout": 300.0, "data": str(packed_folder(0))}
    return lambda out, **changes: recipe_of("diptych", out, **(settings | changes))


@pytest.fixture
def recipe(into, tmp_path):
    return lambda **changes: into(**({"out": tmp_path / "run"} | changes))


@pytest.fixture(scope="module")
def whole(into, tmp_path_factory):
    """Such a run that nobody disturbed: to be read."""
    out = tmp_path_factory.mktemp("stages") / "whole"
    assert run_recipe(into(out)) == 0
    return out


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "final/model.safetensors")


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def figures(run: Path) -> list[str]:
    return [(run / "stages" / f"{n}-{it['name']}" / "metrics.jsonl").read_text() for n, it in enumerate(STAGES, 1)]


def losses(run: Path) -> list[list[float]]:
    return [[json.loads(line)["loss"] for line in text.splitlines()] for text in figures(run)]


@pytest.mark.slow
def test_each_stage_begins_where_the_one_before_it_ended(recipe, whole, tmp_path):
    folders = [whole / "stages" / name for name in ("1-warm-up", "2-heal", "3-instruct")]
    for folder, earlier in zip(folders[1:], folders, strict=False):
        assert yaml.safe_load((folder / "config.yaml").read_text())["model"] == str(earlier / "final")
    assert not same(weights(folders[0]), weights(folders[1])) and not same(weights(folders[1]), weights(folders[2]))
    assert same(weights(whole), weights(folders[2])) and not fault_of(whole / "final")
    status = json.loads((whole / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["stage"]) == ("done", 0, "instruct")
    assert [len(it) for it in losses(whole)][:2] == [3, 4]
    alone = {"max_steps": 4, "learning_rate": 1e-3, "schedule": "constant", "stages": []}
    run_recipe(recipe(model=str(folders[0] / "final"), out=str(tmp_path / "apart"), **alone))
    assert same(weights(tmp_path / "apart"), weights(folders[1])), "a stage is a run like any other"


@pytest.mark.slow
@pytest.mark.parametrize("die_at", [9, 40, 75, 110, 150])
def test_a_run_that_is_killed_goes_on_with_the_same_bits(die_at, recipe, whole, nursery, tmp_path):
    """Before so many changes to the disk: in the first stage, later, or not at all."""
    cut = recipe(out=str(tmp_path / "cut"))
    file = tmp_path / "cut.yaml"
    file.write_text(yaml.safe_dump(to_yaml(cut)))
    (first,) = nursery.train(["--config", str(file)], tmp_path / "log", die_at=die_at)
    assert first.wait(120) in (-9, 0)
    (second,) = nursery.train(["--config", str(file), "--resume", "true"], tmp_path / "log-2")
    assert second.wait(120) == 0, (tmp_path / "log-2.0").read_text()
    assert same(weights(whole), weights(tmp_path / "cut"))
    assert losses(whole) == losses(tmp_path / "cut")


@pytest.mark.slow
def test_a_signal_between_stages_keeps_what_ended(recipe, tmp_path, monkeypatch):
    """It came while the first stage wrote its model: that stage has ended, and the next one begins when the run goes
    on. One that comes at the very end changes nothing."""
    stop, whole = StopRequest(), recipe(stages=STAGES[:2])

    def signalled(name: str, when: int):
        original = getattr(loop, name)
        calls = iter(range(9))

        def call(*arguments, **settings):
            done = original(*arguments, **settings)
            if next(calls) == when:
                stop._on_signal(signal.SIGTERM, None)
            return done

        monkeypatch.setattr(loop, name, call)

    signalled("write_final", 0)
    with pytest.raises(Stopped, match="SIGTERM before the first step of stage heal: nothing is lost"):
        run_recipe(whole, stop)
    assert read_status(tmp_path / "run")["exit_code"] == STOPPED
    assert read_status(tmp_path / "run/stages/1-warm-up")["state"] == "done"
    assert not (tmp_path / "run/stages/2-heal").exists()
    stop = StopRequest()
    signalled("end_ranks", 0)
    assert run_recipe(replace(whole, resume=True), stop) == DONE
    assert stop.reason == "SIGTERM" and read_status(tmp_path / "run")["state"] == "done"
    assert (tmp_path / "run/final").is_dir()


@pytest.mark.slow
def test_two_ranks_go_through_the_stages_as_one(recipe, nursery, tmp_path):
    for ranks in (1, 2):
        settings = recipe(out=str(tmp_path / str(ranks)), batch_size=2 // ranks)
        file = tmp_path / f"{ranks}.yaml"
        file.write_text(yaml.safe_dump(to_yaml(settings)))
        processes = nursery.train(["--config", str(file)], tmp_path / f"log-{ranks}", ranks)
        ended = [process.wait(180) for process in processes]
        assert ended == [0] * ranks, (tmp_path / f"log-{ranks}.0").read_text()
    one, two = (weights(tmp_path / ranks) for ranks in ("1", "2"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is_and_another_one_is_told(into, whole):
    before = weights(whole)
    assert run_recipe(into(whole, resume=True)) == 0 and same(before, weights(whole))
    with pytest.raises(UserError, match="is not empty"):
        run_recipe(into(whole))
    other = [STAGES[0] | {"trainable": "all"}, *STAGES[1:]]
    with pytest.raises(UserError, match="(?s)this is not the run in .*trainable 'cross_attention' -> 'all'"):
        run_recipe(into(whole, resume=True, stages=other))


@pytest.mark.slow
def test_a_run_of_stages_is_compared_and_published_like_any_other(whole, tmp_path, capsys):
    run = str(whole)
    assert diptych(["publish", run, "--to", "me/staged", "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "In 3 stages, one after the other: warm-up, heal, instruct." in said
    assert "  - name: heal" in said or "- name: heal" in said
    assert str(whole) not in said.split("# staged")[1]
    assert diptych(["compare", run, f"{run}/stages/2-heal", "--out", str(tmp_path / "compared.png")]) == 0
    assert "warm-up" not in capsys.readouterr().err


def test_an_adapter_may_be_the_last_stage(recipe, tmp_path):
    """The rank is the recipe's; it means nothing for the first stage, and is no error there."""
    run_recipe(recipe(lora_rank=2, stages=[STAGES[1], {"name": "adapt", "method": "lora", "max_steps": 2}]))
    settings = json.loads((tmp_path / "run/final/adapter_config.json").read_text())
    assert settings["r"] == 2
    assert settings["base_model_name_or_path"] == str((tmp_path / "run/stages/1-heal/final").resolve())


@pytest.mark.parametrize(
    "stages, message",
    [
        ([{"max_steps": 3}], "stage 1 has the name None. Give it one"),
        ([{"name": "a/b", "max_steps": 3}], "has the name 'a/b'"),
        ([STAGES[0], STAGES[0]], "two stages are called warm-up"),
        ([{"name": "a", "out": "x", "max_steps": 3}], "stage a has out, which is the whole run's"),
        ([{"name": "a", "max_step": 3}], "stage a: .*max_step.*max_steps"),
        ([{"name": "a", "max_steps": "many"}], "stage a: .*max_steps"),
        ([{"name": "a"}], "stage a: .*neither was given"),
        ([{"name": "a", "lora_rank": 2, "max_steps": 1}], "stage a: lora_rank is given, but method is full"),
        ([{"name": "a", "method": "lora", "max_steps": 1}, STAGES[1]], "makes an adapter, and the next would need"),
    ],
)
def test_stages_that_cannot_be_are_refused_before_anything_is_written(stages, message, recipe, tmp_path):
    with pytest.raises(UserError, match=f"(?s){message}"):
        run_recipe(recipe(stages=stages))
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


@pytest.mark.slow
def test_all_stages_train_in_the_precision_that_the_first_one_measured(recipe, monkeypatch):
    """Also where the run was killed between them, and goes on where another precision is the faster one."""
    settings = recipe(stages=STAGES[:2], precision="auto")
    fast = torch.bfloat16
    monkeypatch.setattr(training_batches, "training_pace", lambda device, dtype: 2.0 if dtype == fast else 1.0)
    run_recipe(settings)
    configs = sorted(Path(settings.out).glob("stages/*/config.yaml"))
    assert [yaml.safe_load(file.read_text())["precision"] for file in configs] == ["bf16", "bf16"]
    shutil.rmtree(configs[1].parent)
    fast = torch.float32
    run_recipe(replace(settings, resume=True))
    assert yaml.safe_load(configs[1].read_text())["precision"] == "bf16"
