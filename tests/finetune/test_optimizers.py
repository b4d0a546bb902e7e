"""Optimizers, averages and schedules by name: they are what the libraries compute, and a run with them goes on with
the same bits."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import assert_same_bits, figures, final_weights, write_recipe
from transformers import AutoModelForSeq2SeqLM, get_scheduler

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.commands import cli
from diptych.finetune.model.loss import Seq2SeqObjective
from diptych.finetune.model.neftune import noisy_embeddings
from diptych.finetune.run_files import atomic_folders, checkpoints
from diptych.finetune.train import run_recipe
from diptych.finetune.training import loop
from diptych.finetune.training.optimizers import CLASSES, LearningRates, make_optimizer

FREE = {"optimizer": "schedule_free", "schedule": "constant", "warmup_steps": 2}
KINDS = {
    "adamw_8bit": {"optimizer": "adamw_8bit"},
    "adafactor": {"optimizer": "adafactor", "optimizer_settings": {"beta1": 0.9}},
    "muon": {"optimizer": "muon"},
    "schedule_free": FREE,
    "ema": {"ema": 0.9},
    "ema of an adapter": {"ema": 0.9, "method": "lora"},
    "bf16": {"weights": "bf16", "precision": "auto"},
    "bf16 base of an adapter": {"weights": "bf16", "precision": "auto", "method": "lora"},
    "neftune": {"neftune": 5.0},
}


@pytest.fixture
def recipe(short_run, training_folder):
    changes = {"data": str(training_folder), "max_steps": 8, "save_every": 3, "eval_every": 3, "keep_last": 9}
    return partial(short_run, **changes, logging_every=1)


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_a_run_goes_on_with_the_same_bits(changes, recipe, tmp_path):
    if changes.get("optimizer") == "adamw_8bit":
        pytest.importorskip("bitsandbytes")  # .ci/run installs it for this test alone
    whole, parted = (recipe("t5", out=str(tmp_path / name), **changes) for name in ("whole", "parted"))
    assert run_recipe(whole) == 0
    shutil.copytree(whole.out, parted.out)
    shutil.rmtree(Path(parted.out) / "final")
    for step in (6, 8):
        shutil.rmtree(checkpoints.checkpoint_path(Path(parted.out) / "checkpoints", step))
    assert run_recipe(recipe("t5", out=parted.out, resume=True, **changes)) == 0
    assert len(checkpoints.complete_checkpoints(Path(parted.out) / "checkpoints")) == 3
    assert_same_bits(whole.out, parted.out)
    assert [entry["loss"] for entry in figures(whole.out, "train")][-1] < figures(whole.out, "train")[0]["loss"]


def gradients(model: torch.nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator)


def test_matrices_go_to_muon_and_all_other_weights_to_adamw(new_model, recipe):
    settings = recipe(optimizer="muon", optimizer_settings={"momentum": 0.8}, weight_decay=0.1)
    ours, theirs = new_model("t5"), new_model("t5")
    optimizer = make_optimizer(ours, settings)
    of_muon = {name for name, _ in theirs.named_parameters() if name.split(".")[-2] in {*"qkvo", "wi", "wo"}}
    named = {weight: name for name, weight in ours.named_parameters()}
    assert {named[weight] for group in optimizer.parts[0].param_groups for weight in group["params"]} == of_muon
    weights = dict(theirs.named_parameters())
    muon = torch.optim.Muon(
        [weights[name] for name in weights if name in of_muon],
        settings.learning_rate,
        weight_decay=0.1,
        momentum=0.8,
        adjust_lr_fn="match_rms_adamw",
    )
    tables = [weight for name, weight in weights.items() if name not in of_muon and weight.ndim == 2]
    adamw = torch.optim.AdamW(tables, settings.learning_rate, weight_decay=0.1, fused=True)
    for step in range(3):
        for model in (ours, theirs):
            gradients(model, step)
        optimizer.step()
        muon.step()
        adamw.step()
    for name in (*of_muon, "shared.weight"):
        assert torch.equal(ours.get_parameter(name), theirs.get_parameter(name)), name


def test_an_average_is_evaluated_and_saved_and_the_weights_come_back(new_model, recipe):
    model = new_model("t5")
    optimizer = make_optimizer(model, recipe(ema=0.5))
    expected = model.lm_head.weight.detach().clone()
    for step in range(4):
        gradients(model, step)
        optimizer.step()
        expected.lerp_(model.lm_head.weight.detach(), 1 - min(0.5, (2 + step) / (11 + step)))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with optimizer.evaluated_weights() as trained:
        torch.testing.assert_close(model.lm_head.weight.detach(), expected, rtol=0, atol=1e-7)
        assert torch.equal(trained[model.lm_head.weight], before["shared.weight"])
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_small_updates_of_bf16_weights_are_not_lost(new_model, recipe):
    """Steps of a ten-thousandth, which weights of about 1 lose when they are rounded."""
    settings = {"learning_rate": 1e-4, "weight_decay": 0.0}
    full, half = new_model("t5"), new_model("t5").to(torch.bfloat16)
    start = half.lm_head.weight.detach().float().clone()
    with torch.no_grad():
        full.lm_head.weight.copy_(start)
    optimizers = [
        make_optimizer(full, recipe(**settings)),
        make_optimizer(half, recipe(**settings, weights="bf16", precision="bf16")),
    ]
    for _ in range(200):
        for model, optimizer in zip((full, half), optimizers, strict=True):
            for weight in model.parameters():
                weight.grad = torch.ones_like(weight)
            optimizer.step()
    moved, expected = (model.lm_head.weight.detach().float() - start for model in (half, full))
    assert moved.mean().item() == pytest.approx(expected.mean().item(), rel=0.1)


def test_final_is_the_mean_of_the_last_checkpoints(recipe):
    settings = recipe("t5", final="average", keep_last=2)
    assert run_recipe(settings) == 0
    one, other = (
        load_file(checkpoints.checkpoint_path(Path(settings.out) / "checkpoints", step) / "model/model.safetensors")
        for step in (6, 8)
    )
    for name, weight in final_weights(settings.out).items():
        torch.testing.assert_close(weight, (one[name] + other[name]) / 2, rtol=0, atol=1e-7)
    AutoModelForSeq2SeqLM.from_pretrained(Path(settings.out) / "final")


def test_a_step_with_a_sudden_gradient_is_skipped_and_told(recipe, monkeypatch, capsys):
    """Step 23 of 24 has a gradient a million times too long."""
    computed = loop.add_up_gradients

    def with_a_spike(run, step):
        result = computed(run, step)
        if run.progress.step == 22:
            for weight in run.model.parameters():
                weight.grad *= 1e6
        return result

    monkeypatch.setattr(loop, "add_up_gradients", with_a_spike)
    settings = recipe(
        "t5", max_steps=24, skip_spikes=10.0, max_grad_norm=0.0, save_every=1, eval_every=99, keep_last=3
    )
    assert run_recipe(settings) == 0
    assert "step 23 is skipped: its gradient norm is" in capsys.readouterr().out
    assert [entry["skipped_steps"] for entry in figures(settings.out, "train")] == [0] * 22 + [1, 1]
    before, after, last = (
        load_file(checkpoints.checkpoint_path(Path(settings.out) / "checkpoints", step) / "model/model.safetensors")
        for step in (22, 23, 24)
    )
    name = "shared.weight"
    assert torch.equal(before[name], after[name]) and not torch.equal(after[name], last[name])


@pytest.mark.parametrize("family", ["t5", "bart", "t5gemma", "m2m_100", "diptych"])
def test_noise_goes_to_the_tokens_of_each_example_and_only_in_training(family, new_model, packed_pair):
    """Packed rows get noise of the same size as separate rows: alpha / √(tokens of the example × width)."""
    model = new_model(family)
    batch, tokens = packed_pair
    table = model.get_encoder().get_input_embeddings()
    objective = Seq2SeqObjective(model, neftune=4.0)
    looked_up = []
    for alpha in (0.0, 4.0):
        with noisy_embeddings(model, batch, alpha):
            hook = table.register_forward_hook(lambda module, arguments, output: looked_up.append(output.detach()))
            Seq2SeqObjective(model)(batch, 4)
            hook.remove()
    clean, noisy = looked_up[0], looked_up[len(looked_up) // 2]
    for start, length in tokens:
        limit = 4.0 / (length * clean.shape[-1]) ** 0.5
        assert 0.9 * limit < (noisy - clean)[0, start : start + length].abs().max() <= limit * (1 + 1e-5)
    assert torch.equal(noisy[0, 9:], clean[0, 9:])
    with torch.no_grad():
        assert objective.eval()(batch, 4) == Seq2SeqObjective(model).eval()(batch, 4) != objective.train()(batch, 4)


@pytest.fixture
def packed_pair():
    """One packed row with sources of 6 and 3 tokens and one of padding; where each is."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 1, 5, 6, 1, 0]])
    segments = torch.tensor([[1, 1, 1, 1, 1, 1, 2, 2, 2, 0]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 0]])
    batch = {
        "input_ids": ids,
        "segment_ids": segments,
        "position_ids": positions,
        "decoder_input_ids": torch.tensor([[0, 8, 0, 9]]),
        "decoder_segment_ids": torch.tensor([[1, 1, 2, 2]]),
        "decoder_position_ids": torch.tensor([[0, 1, 0, 1]]),
        "labels": torch.tensor([[8, 1, 9, 1]]),
    }
    return batch, [(0, 6), (6, 3)]


SCHEDULES = {
    "inverse_sqrt": {"timescale": 4},
    "polynomial": {"power": 2.0, "lr_end": 0.01},
    "cosine_with_restarts": {"num_cycles": 2},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 4},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_after_warm_up_the_rate_is_that_of_transformers(name, recipe):
    settings = recipe(learning_rate=0.5, schedule=name, schedule_settings=SCHEDULES[name], warmup_steps=3)
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.5)
    scheduler = get_scheduler(name, optimizer, 3, 12, SCHEDULES[name])
    expected = []
    for _ in range(12):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    rates = LearningRates(settings, 12)
    assert [rates(step) for step in range(3, 12)] == expected[3:]
    assert [rates(step) for step in range(3)] == pytest.approx([0.5 / 3, 1 / 3, 0.5])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "inverse_sqrt", "polynomial"])
def test_warm_up_may_be_longer_than_a_run(schedule, recipe):
    rates = LearningRates(recipe(learning_rate=1.0, schedule=schedule, warmup_steps=100), 8)
    assert [rates(step) for step in range(8)] == pytest.approx([(step + 1) / 100 for step in range(8)])


REFUSED = {
    "betas": ({"optimizer": "adafactor", "betas": (0.8, 0.9)}, "^adafactor has no betas and epsilon"),
    "schedule": ({"optimizer": "schedule_free"}, "^schedule is cosine, but .* set schedule: constant"),
    "two averages": (FREE | {"ema": 0.9}, "drop ema"),
    "precision": ({"weights": "bf16", "precision": "fp32"}, "^weights in bf16 need precision: bf16"),
    "no settings": ({"optimizer_settings": {"amsgrad": True}}, "drop optimizer_settings"),
    "adapters": ({"method": "lora", "final": "average"}, "adapters are not averaged"),
    "sharded": ({"optimizer": "adafactor", "sharding": "full"}, "^adafactor cannot update weights that are spread"),
    "spikes": ({"skip_spikes": 0.5}, "skip_spikes is 0.5; it must be 0, or above 1"),
    "ema": ({"ema": 1.0}, "ema is 1.0"),
    "a name": ({"optimizer": "muon", "optimizer_settings": {"momentun": 0.9}}, "Did you mean momentum"),
    "a value": ({"optimizer": "muon", "optimizer_settings": {"momentum": -1}}, "momentum should be >= 0"),
    "a kind": ({"optimizer": "muon", "optimizer_settings": {"momentum": "nan"}}, "optimizer muon with"),
    "a value at the first step": (
        {"optimizer": "muon", "optimizer_settings": {"ns_steps": 1000}},
        "optimizer muon with",
    ),
    "too long a decay": (
        {"schedule": "warmup_stable_decay", "schedule_settings": {"num_decay_steps": 20}},
        "does not fit into 8 steps",
    ),
    "a schedule": ({"schedule": "warmup_stable_decay"}, "schedule_settings {}.*They can be: .*num_decay_steps, "),
    "its settings": ({"schedule_settings": {"cycles": 3}}, "cycles.*They can be: num_cycles"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_settings_that_contradict_or_do_nothing_are_refused(changes, message, recipe):
    with pytest.raises(UserError, match=message):
        run_recipe(recipe("t5", **changes))


def test_a_missing_package_is_named_with_the_line_that_installs_it(recipe, monkeypatch):
    monkeypatch.setitem(CLASSES, "schedule_free", ("schedulefree_that_is_not_there", "X", "schedulefree"))
    with pytest.raises(UserError, match="pip install schedulefree"):
        run_recipe(recipe("t5", **FREE))


def test_another_optimizer_is_another_run_and_a_count_that_is_gone_is_told(recipe, capsys):
    settings = recipe("t5", **FREE)
    assert run_recipe(settings) == 0
    with pytest.raises(UserError, match="optimizer 'schedule_free' -> 'adamw'"):
        run_recipe(recipe("t5", out=settings.out, resume=True))
    state = checkpoints.checkpoint_path(Path(settings.out) / "checkpoints", 8) / "state.json"
    saved = json.loads(state.read_text())
    assert saved["optimizer"]["groups"][0]["k"] == 8.0
    del saved["optimizer"]["groups"][0]["weight_sum"]
    state.write_text(json.dumps(saved))
    atomic_folders.write_manifest(state.parent)
    assert cli.run("train", ["--config", write_recipe(settings), "--resume", "true"]) == 3
    assert "state.json holds other counts than this optimizer's: KeyError('weight_sum')" in capsys.readouterr().err


def test_runs_have_the_name_and_project_that_trackers_show(recipe, tmp_path):
    assert run_recipe(recipe("t5", trackers="tensorboard", project="translations", run_name="first")) == 0
    assert list(tmp_path.rglob("translations/events.*"))


def test_a_tracker_that_does_not_start_is_one_message(recipe, monkeypatch):
    """As wandb without a login, or mlflow without a server."""

    def start(tracker):
        raise RuntimeError("no API key is configured")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.start", start)
    with pytest.raises(UserError, match="the tracker .tensorboard. did not start: no API key is configured. Set it"):
        run_recipe(recipe("t5", trackers="tensorboard"))
