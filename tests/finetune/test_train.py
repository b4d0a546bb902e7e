"""The loop itself, on real files: it learns, on every family; and however a run is cut, it is the same run."""

import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from matplotlib.axes import Axes
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForSeq2SeqLM

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.text_to_ids.train_tokenizer import train_tokenizer
from diptych.finetune.commands import cli
from diptych.finetune.evaluating.evaluate_rows import evaluate_rows
from diptych.finetune.model.adapters import add_adapter
from diptych.finetune.model.loading import load_checkpoint
from diptych.finetune.run_files import atomic_folders, checkpoints
from diptych.finetune.train import run_recipe
from diptych.finetune.training import loop, training_batches
from diptych.finetune.training.optimizers import make_optimizer
from diptych.finetune.training.recipe import TrainRecipe
from diptych.finetune.training.resuming import to_yaml

FAMILIES = ["diptych", "t5", "mt5", "bart", "m2m_100", "t5gemma"]

# Adam divides a gradient by its own size, so that the rounding of one near zero becomes a whole step of its weight.
# With this epsilon a step is in proportion to its gradient, and two computations of the same sum stay together.
STEADY = {"epsilon": 1e-2, "group_by_length": False}

# What the eight rows take to be known by heart.
LEARN = {"max_steps": 100, "batch_size": 8, "learning_rate": 5e-3, "warmup_steps": 10, "logging_every": 50}


@pytest.fixture
def recipe(short_run, training_folder):
    return partial(short_run, data=str(training_folder), eval_every=1000)


def figures(out: str, split: str) -> list[dict]:
    lines = (Path(out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if entry["split"] == split]


def splits_of_run(out: str) -> set[str]:
    lines = (Path(out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {"train", "validation"} if not lines else {entry["split"] for entry in map(json.loads, lines)}


def final_weights(out: str) -> dict[str, torch.Tensor]:
    """Of the model, or of the adapter."""
    (file,) = (Path(out) / "final").glob("*.safetensors")
    return load_file(file)


def as_yaml(settings: TrainRecipe) -> str:
    return yaml.safe_dump(to_yaml(settings))


def write_recipe(settings: TrainRecipe) -> str:
    file = Path(settings.out).with_suffix(".yaml")
    file.write_text(as_yaml(settings))
    return str(file)


def assert_close(first: str, second: str, tolerance: float = 1e-5) -> None:
    """Two runs: the same losses, and the same weights."""
    for split in splits_of_run(first):
        for one, other in zip(figures(first, split), figures(second, split), strict=True):
            assert one["loss"] == pytest.approx(other["loss"], abs=tolerance)
    weights = final_weights(second)
    for name, weight in final_weights(first).items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=tolerance)


def assert_same_bits(first: str, second: str) -> None:
    """Two runs: the same weights, optimizer, random states, place in the data, figures and samples."""
    folder = Path(first) / "checkpoints"
    for step in [path.name for path in checkpoints.complete_checkpoints(folder)]:
        weights = [str(file.relative_to(file.parents[1])) for file in (folder / step / "model").glob("*.safetensors")]
        for name in (*weights, "optimizer.safetensors", "rng.json"):
            one, other = (Path(run) / "checkpoints" / step / name for run in (first, second))
            assert filecmp.cmp(one, other, shallow=False), f"{step}/{name}"
        one, other = (
            atomic_folders.read_json(Path(run) / "checkpoints" / step / "state.json") for run in (first, second)
        )
        assert one["progress"] == other["progress"]
    for split in splits_of_run(first):
        one, other = figures(first, split), figures(second, split)
        for entry in one + other:
            for measured in ("tokens_per_second", "mfu", "memory_bytes", "sampling_seconds"):  # all else is the same
                entry.pop(measured, None)
        assert one == other and one
    samples = [Path(run) / "samples.jsonl" for run in (first, second)]
    assert [file.exists() for file in samples] in ([False, False], [True, True])
    assert not samples[0].exists() or samples[0].read_bytes() == samples[1].read_bytes()


# In full, all but mT5 learn from packed rows in test_train_packed.py; there, a Diptych does with an adapter.
@pytest.mark.slow
@pytest.mark.parametrize(
    "family, method", [*((family, "lora") for family in FAMILIES), ("t5", "full"), ("mt5", "full")]
)
def test_eight_rows_are_learned_and_generated_exactly(family, method, recipe, training_folder):
    settings = recipe(family, method=method, **LEARN)
    assert run_recipe(settings) == 0
    rows = datasets.load_from_disk(training_folder)["train"]
    loaded = load_checkpoint(Path(settings.out) / "final")
    found = evaluate_rows(loaded, rows, metrics=["exact_match"], batch_size=3).figures
    assert found["loss"] < 0.1 and found["exact_match_rows"] == 100.0


def test_a_new_diptych_is_trained_from_a_named_size(recipe):
    shape = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "residual_dropout": 0.1}
    shape |= {panel: {"num_hidden_layers": 1} for panel in ("encoder", "decoder")}
    settings = recipe(model="diptych-8m", model_overrides=shape)
    run_recipe(settings)
    model = AutoModelForSeq2SeqLM.from_pretrained(Path(settings.out) / "final")
    assert model.config.model_type == "diptych" and model.config.vocab_size == 368
    assert figures(settings.out, "train")[-1]["loss"] < figures(settings.out, "train")[0]["loss"]


@pytest.mark.slow
def test_checkpointed_layers_give_the_same_gradients(recipe):
    plain, changed = (recipe(out=str(it), gradient_checkpointing=it, **STEADY) for it in (False, True))
    for settings in (plain, changed):
        run_recipe(settings)
    assert_close(plain.out, changed.out)


@pytest.fixture
def two_sets(training_folder, tmp_path):
    """The eight rows to train on, and two validation sets with names."""
    folder = tmp_path / "two sets"
    train = datasets.load_from_disk(training_folder)["train"]
    sets = {"validation/news": train.select(range(5)), "validation/law": train.select([7, 2, 5])}
    datasets.DatasetDict({"train": train, **sets}).save_to_disk(folder)
    shutil.copytree(training_folder / "tokenizer", folder / "tokenizer")
    (folder / "manifest.json").write_text('{"rows": 8}')
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, changes", [("t5", {}), ("diptych", {"method": "lora"}), ("encoder-decoder", {"eval_every": 4})]
)
def test_two_ranks_are_one_rank(family, changes, recipe, two_sets, nursery, tmp_path):
    """3 rows a rank; in the last step of an epoch 2 rows are left for both. Of the encoder-decoder, whose panels are
    BERTs, the encoder's pooler never gets a gradient."""
    changes = changes or {"data": two_sets, "eval_every": 4, "metrics": "chrf", "best_metric": "law/chrf"}
    alone = recipe(family, out="alone", batch_size=6, **STEADY, **changes)
    run_recipe(alone)
    shared = recipe(family, out="shared", batch_size=3, **STEADY, **changes)
    processes = nursery.train(["--config", str(write_recipe(shared))], tmp_path / "log", ranks=2)
    ended = [process.wait(200) for process in processes]
    said = [(tmp_path / f"log.{rank}").read_text() for rank in range(2)]
    assert ended == [0, 0], said
    assert "2 × cpu" in said[0]
    assert said[0].count("step 8/8 | loss") == 1 and "step 8/8 | loss" not in said[1], "one rank speaks"
    assert_close(alone.out, shared.out)


@pytest.fixture
def resumable(recipe, checkpoint_of, tmp_path):
    """`resumable("t5", "out", …)`: 12 steps with dropout, so that random states matter, and several checkpoints."""

    def make(family: str, out: str, **changes) -> TrainRecipe:
        model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint_of(family))
        name = {"diptych": "residual_dropout", "t5": "dropout_rate", "bart": "dropout"}[family]
        setattr(model.config, name, 0.1)
        model.save_pretrained(tmp_path / "model")
        settings = {"max_steps": 12, "batch_size": 2, "save_every": 5, "eval_every": 4, "logging_every": 3}
        return recipe(out=out, keep_last=9, **(settings | changes | {"model": str(tmp_path / "model")}))

    return make


@pytest.mark.parametrize(
    "family, changes",
    [
        ("bart", {"method": "lora", "lora_dropout": 0.1, "lora_embeddings": True}),
        ("t5", {"group_by_length": False, "gradient_accumulation_steps": 2}),
    ],
)
def test_an_interrupted_run_goes_on_with_the_same_bits(family, changes, resumable, monkeypatch, capsys):
    whole, stopped = (resumable(family, out, **changes) for out in ("whole", "stopped"))
    run_recipe(whole)

    def interrupt_in_step_8(run, *_):
        if run.progress.step == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "check_finite", interrupt_in_step_8)
        assert cli.run("train", ["--config", write_recipe(stopped)]) == 130
    assert "interrupted; the checkpoints are kept" in capsys.readouterr().err
    assert cli.run("train", ["--config", str(Path(stopped.out) / "config.yaml"), "--resume", "true"]) == 0
    assert_same_bits(whole.out, stopped.out)


@pytest.mark.slow
def test_a_run_that_is_stopped_between_two_validation_sets_goes_on_with_the_same_bits(
    resumable, two_sets, monkeypatch
):
    """The first set was evaluated, and its samples generated: nothing of it may be written twice."""
    whole, stopped = (resumable("t5", out, data=two_sets, metrics="exact_match") for out in ("whole", "stopped"))
    run_recipe(whole)
    evaluated = loop.generation_figures

    def stop_in_the_second(run, split, samples):
        if split == "validation/law" and run.progress.step == 8:
            raise loop.AskedToStop
        return evaluated(run, split, samples)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "generation_figures", stop_in_the_second)
        run_recipe(stopped)
    assert [entry["step"] for entry in figures(stopped.out, "validation/news")] == [4]
    run_recipe(replace(stopped, resume=True))
    shutil.rmtree(Path(whole.out) / "checkpoints" / "step-000008")  # the other one is of before the evaluation
    assert_same_bits(whole.out, stopped.out)


@pytest.mark.slow
def test_resume_without_a_checkpoint_begins_at_the_beginning(recipe, capsys):
    whole = recipe(out="whole")
    run_recipe(whole)
    early = recipe(out="early", resume=True)
    Path(early.out).mkdir()
    (Path(early.out) / "config.yaml").write_text(as_yaml(replace(early, precision="fp32")))
    (Path(early.out) / "metrics.jsonl").write_text('{"step": 2, "split": "train", "loss": 9.0}\n')
    run_recipe(early)
    assert "begins at the beginning" in capsys.readouterr().out
    assert_same_bits(whole.out, early.out)


@pytest.mark.slow
def test_a_finished_run_can_be_prolonged(recipe):
    run_recipe(recipe(schedule="constant"))
    longer = recipe(schedule="constant", max_steps=12, resume=True)
    run_recipe(longer)
    assert [entry["step"] for entry in figures(longer.out, "train")] == [2, 4, 6, 8, 10, 12]


@pytest.mark.slow
def test_resume_refuses_another_run(recipe, tmp_path, training_folder):
    run_recipe(recipe())
    with pytest.raises(UserError, match=r"is not empty.*--resume true"):
        run_recipe(recipe())
    other = tmp_path / "other"
    datasets.load_from_disk(training_folder).save_to_disk(other)
    (other / "manifest.json").write_text('{"rows": 9}')
    load_checkpoint(Path(recipe().out) / "final").tokenizer.save_pretrained(other / "tokenizer")
    with pytest.raises(UserError, match="data, template or tokenizer '.*' -> '.*'"):
        run_recipe(recipe(data=str(other), resume=True))


def test_data_of_another_tokenizer_is_refused_though_its_ids_would_fit(recipe, checkpoint_of, tmp_path):
    model = shutil.copytree(checkpoint_of("t5"), tmp_path / "model")
    own = train_tokenizer("bpe", ["words of its own, as every checkpoint has them"], vocab_size=300)
    own.save_pretrained(model)
    with pytest.raises(UserError, match=r"was prepared with another tokenizer \(368 tokens\) than that of"):
        run_recipe(recipe(model=str(model)))
    with pytest.raises(UserError, match="another tokenizer"):  # not the same with tokens added, either
        run_recipe(recipe(model=str(model), grow_vocabulary=True))


@pytest.mark.parametrize("text", ["", "a: 1\n"])
def test_a_config_that_is_no_recipe_is_named(text, recipe):
    settings = recipe(resume=True)
    Path(settings.out).mkdir()
    (Path(settings.out) / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="config.yaml is not the recipe of a run"):
        run_recipe(settings)


@pytest.mark.slow
def test_training_stops_when_nothing_gets_better_and_final_is_the_best(recipe):
    settings = recipe(max_steps=60, learning_rate=0.3, schedule="constant", eval_every=3, patience=2, keep_last=1)
    run_recipe(settings)
    validation = figures(settings.out, "validation")
    best = min(validation, key=lambda entry: entry["loss"])
    assert len(validation) < 20 and best is validation[-3]
    folder = Path(settings.out) / "checkpoints"
    assert atomic_folders.read_json(folder / "best.json")["value"] == best["loss"]
    kept = [checkpoints.checkpoint_step(path) for path in checkpoints.complete_checkpoints(folder)]
    assert kept == [best["step"], validation[-1]["step"]]
    best_weights = load_file(folder / f"step-{best['step']:06d}" / "model" / "model.safetensors")
    assert all(torch.equal(weight, best_weights[name]) for name, weight in final_weights(settings.out).items())


@pytest.mark.slow
def test_the_best_is_chosen_by_one_validation_set_or_by_their_mean(recipe, two_sets, monkeypatch, capsys):
    labels = []
    monkeypatch.setattr(
        Axes, "legend", lambda axes, **_: labels.append([line.get_label() for line in axes.get_lines()])
    )
    changes = {"data": two_sets, "max_steps": 12, "eval_every": 4, "metrics": "chrf", "learning_rate": 5e-3}
    expected = {
        "law/chrf": lambda news, law: max(entry["chrf"] for entry in law),
        "news/loss": lambda news, law: min(entry["loss"] for entry in news),
        "loss": lambda news, law: min((a["loss"] + b["loss"]) / 2 for a, b in zip(news, law, strict=True)),
    }
    for best_metric, value in expected.items():
        settings = recipe(out=best_metric.replace("/", "-"), best_metric=best_metric, **changes)
        run_recipe(settings)
        news, law = (figures(settings.out, f"validation/{name}") for name in ("news", "law"))
        assert [entry["step"] for entry in news] == [entry["step"] for entry in law] == [4, 8, 12]
        best = atomic_folders.read_json(Path(settings.out) / "checkpoints" / "best.json")
        assert best["value"] == pytest.approx(value(news, law)) and best["metric"] == best_metric
    said = capsys.readouterr().out
    assert "step 4/12 | validation/law loss" in said and "step 4/12 | law/chrf" in said
    assert "the best mean loss over 2 validation sets" in said
    assert "step 4/12 | mean over 2 validation sets: loss" in said
    assert [label.split(",")[0] for label in labels[-1]] == ["training", "validation/news", "validation/law"]
    with pytest.raises(UserError, match="best_metric is 'lwa/chrf'. Did you mean law/chrf"):
        run_recipe(recipe(out="other", best_metric="lwa/chrf", **changes))


def test_a_folder_for_evaluation_alone_trains_nothing(recipe, two_sets):
    shutil.move(f"{two_sets}/validation/news", f"{two_sets}/news")
    (Path(two_sets) / "dataset_dict.json").write_text('{"splits": ["validation/law"]}')
    with pytest.raises(UserError, match="has no rows to train on: it is for evaluation alone, with validation/law"):
        run_recipe(recipe(data=two_sets))


def test_a_run_folder_has_what_it_should(recipe):
    settings = recipe(epochs=4, eval_every=4, metrics="exact_match,chrf", best_metric="chrf")
    run_recipe(settings)
    out = Path(settings.out)
    names = ".lock status.json config.yaml metrics.jsonl samples.jsonl loss.png checkpoints final"
    assert {path.name for path in out.iterdir()} == set(names.split())
    assert TrainRecipe(**yaml.safe_load((out / "config.yaml").read_text())).precision == "fp32"
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    sample = json.loads((out / "samples.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert set(sample) == {"step", "split", "source", "references", "prediction", "finished", "nats", "target_tokens"}
    entry = figures(settings.out, "validation")[-1]
    assert entry["step"] == 8 and {"loss", "exact_match", "chrf"} < set(entry)


def test_validation_loss_is_that_of_evaluate(recipe, training_folder):
    settings = recipe(final="last", eval_batch_size=2, label_smoothing=0.1)
    run_recipe(settings)
    validation = datasets.load_from_disk(training_folder)["validation"]
    loss = evaluate_rows(load_checkpoint(Path(settings.out) / "final"), validation).figures["loss"]
    assert figures(settings.out, "validation")[-1]["loss"] == pytest.approx(loss, abs=1e-5)


def test_trackers_get_the_figures(recipe):
    settings = recipe("t5", trackers="tensorboard")
    run_recipe(settings)
    reader = EventAccumulator(str(Path(settings.out) / "diptych")).Reload()
    logged = {event.step: event.value for event in reader.Scalars("train/loss")}
    assert logged == pytest.approx({entry["step"]: entry["loss"] for entry in figures(settings.out, "train")})


BF16_IS_FAST = {torch.bfloat16: 2e11, torch.float16: 2e11, torch.float32: 1e11}
BF16_IS_SLOW = {torch.bfloat16: 1e10, torch.float16: 1e10, torch.float32: 1e11}


@pytest.fixture
def machine(monkeypatch):
    """`machine(BF16_IS_FAST)`: from here on this one computes at such a pace."""
    return lambda pace: monkeypatch.setattr(training_batches, "training_pace", lambda device, dtype: pace[dtype])


def precision_of(run: Path | str) -> str:
    return yaml.safe_load((Path(run) / "config.yaml").read_text(encoding="utf-8"))["precision"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "here, elsewhere, faster", [(BF16_IS_FAST, BF16_IS_SLOW, "bf16"), (BF16_IS_SLOW, BF16_IS_FAST, "fp32")]
)
def test_auto_takes_the_faster_precision_and_a_run_keeps_it_on_another_machine(
    here, elsewhere, faster, recipe, machine
):
    settings = recipe(precision="auto", save_every=4)
    machine(here)
    run_recipe(replace(settings, max_steps=4))
    assert precision_of(settings.out) == faster
    machine(elsewhere)
    run_recipe(replace(settings, resume=True))
    assert precision_of(settings.out) == faster
    assert [entry["step"] for entry in figures(settings.out, "train")][-1] == 8


RANKS_THAT_DIFFER = """
import os, sys, torch, yaml
from pathlib import Path
from diptych.finetune.training import training_batches
from diptych.finetune.training.set_up_run import Status, StopRequest, TrainRecipe, set_up

rank = int(os.environ["RANK"])
training_batches.training_pace = lambda device, dtype: 2 - rank if dtype == torch.bfloat16 else 1.5
recipe = TrainRecipe(**yaml.safe_load(sys.argv[1]))
print(f"rank {rank}: {set_up(recipe, StopRequest(), Status(Path(recipe.out), False)).recipe.precision}", flush=True)
"""


@pytest.mark.slow
def test_all_ranks_train_in_the_precision_that_the_first_one_measured(recipe, nursery, tmp_path):
    """Were each to take its own, their gradients would not be those of one run."""
    (tmp_path / "ranks.py").write_text(RANKS_THAT_DIFFER)
    settings = recipe(precision="auto")
    Path(settings.out).mkdir()
    said = nursery.run_script([tmp_path / "ranks.py", as_yaml(settings)], tmp_path / "log", ranks=2)
    assert "rank 0: bf16" in said[0] and "rank 1: bf16" in said[1], said


@pytest.mark.slow
def test_on_a_cpu_without_bf16_auto_is_fp32_and_who_asks_for_bf16_is_told(recipe, tmp_path):
    """oneDNN is told to leave out all that AMD's Zen 3 does not have."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    said = {}
    for precision in ("auto", "bf16"):
        settings = recipe(out=precision, precision=precision, max_steps=1)
        command = [sys.executable, "-m", "diptych.finetune.train", "--config", write_recipe(settings)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        said[precision] = re.findall(r"^precision is .*$", done.stdout, flags=re.MULTILINE)
    assert precision_of(tmp_path / "auto") == "fp32" and said["auto"] == []
    (line,) = said["bf16"]
    assert re.match(r"precision is bf16, which this machine computes [\d,]+ times slower than fp32\. A new run", line)
    assert precision_of(tmp_path / "bf16") == "bf16"


def test_a_loss_that_is_not_finite_stops_the_run(recipe, capsys):
    settings = recipe(learning_rate=1e30, max_grad_norm=0.0)
    assert cli.run("train", ["--config", write_recipe(settings)]) == 5
    error = capsys.readouterr().err.partition("diptych train: ")[2]
    assert error.startswith("at step 2 the loss is") and "Lower learning_rate" in error
    assert re.search(r"\nin .*rows (\d, ){3}\d.* of train in ", error) and error.count("\n") <= 6


def test_norms_biases_and_tables_that_lora_trains_do_not_decay(new_model, recipe):
    def undecayed(model) -> set[str]:
        optimizer = make_optimizer(model, recipe(weight_decay=0.1))
        still = {
            id(weight) for group in optimizer.param_groups for weight in group["params"] if not group["weight_decay"]
        }
        return {name for name, weight in model.named_parameters() if id(weight) in still}

    names = undecayed(new_model("t5"))
    assert all("layer_norm" in name or "relative_attention_bias" in name for name in names) and len(names) == 14
    names = undecayed(new_model("bart"))
    assert all("norm" in name or name.endswith("bias") for name in names) and names
    adapted = add_adapter(new_model("t5"), "base", rank=2, alpha=2, new_rows=3)
    optimizer = make_optimizer(adapted, recipe(weight_decay=0.1, method="lora"))
    assert [len(group["params"]) for group in optimizer.param_groups if not group["weight_decay"]] == [1]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "diptych-9m", "data": "nowhere"}, "no size diptych-9m. Did you mean diptych-8m"),
        ({"model": "./nowhere"}, "there is no folder"),
        ({"model": "diptych-8m", "method": "lora"}, "nothing to adapt"),
        ({"model": "diptych-8m", "model_overrides": {"hiden_size": 3}}, "Did you mean hidden_size"),
        ({"model_overrides": {"dropout": 0.1}}, "its weights fix its config"),
        ({"data": "nowhere"}, "no prepared dataset"),
        ({"metrics": "rouge", "best_metric": "rouge"}, "Choose from: .*rougeL"),
        ({"trackers": "tensorbord"}, "Did you mean tensorboard"),
        ({"method": "lora", "lora_targets": "query"}, "no adapter could be added"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_before_anything_is_written(changes, message, recipe):
    settings = recipe(**changes)
    with pytest.raises(UserError, match=message):
        run_recipe(settings)
    assert not Path(settings.out).exists()


def test_processes_that_were_not_joined_are_refused(recipe, monkeypatch):
    """torchrun on CPUs, where accelerate takes each process for a run of its own unless it is told."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were launched, but accelerate joined 1.*ACCELERATE_USE_CPU=true"):
        run_recipe(recipe())


def test_one_process_of_an_accelerate_launch_that_asked_for_several_is_warned_of(recipe, monkeypatch, capsys):
    """Without GPUs, `accelerate launch --num_processes 2` starts one process, and sets these variables in it."""
    for name, value in {"MASTER_PORT": "29500", "ACCELERATE_MIXED_PRECISION": "no"}.items():
        monkeypatch.setenv(name, value)
    run_recipe(recipe(max_steps=1))
    assert "warning: this is a run of one process" in capsys.readouterr().out


@pytest.mark.slow
def test_a_larger_vocabulary_is_refused_or_grown_as_asked(recipe, checkpoint_of, tmp_path, new_model, training_folder):
    new_model("bart", vocab_size=360).save_pretrained(tmp_path / "small")
    with pytest.raises(
        UserError, match="the tokenizer has 368 tokens, but .* has 360 embedding rows.*grow_vocabulary"
    ):
        run_recipe(recipe(model=str(tmp_path / "small")))
    longer = LEARN | {"max_steps": 150}  # new rows begin alike
    for method in ("full", "lora"):
        settings = recipe(out=method, method=method, grow_vocabulary=True, **longer, model=str(tmp_path / "small"))
        run_recipe(settings)
        loaded = load_checkpoint(Path(settings.out) / "final")
        assert loaded.model.config.vocab_size == 368
        rows = datasets.load_from_disk(training_folder)["train"]
        assert evaluate_rows(loaded, rows, metrics=["exact_match"]).figures["exact_match_rows"] == 100.0


def test_a_run_folder_that_may_not_be_written_is_told_with_what_to_do(
    training_folder, checkpoint_of, tmp_path, monkeypatch, capsys
):
    def refused(path, busy):
        raise PermissionError(13, "Permission denied", str(path))

    # tests may run as root, who may do everything
    monkeypatch.setattr("diptych.finetune.run_files.run_folder.take_lock", refused)
    out = tmp_path / "run"
    given = ["--model", str(checkpoint_of("t5")), "--data", str(training_folder), "--out", str(out)]
    assert cli.run("train", [*given, "--max_steps", "1"]) == 2
    said = f"diptych train: {out}/.lock: Permission denied. Get yourself the right to it, or name another place\n"
    assert capsys.readouterr().err.endswith(said)
