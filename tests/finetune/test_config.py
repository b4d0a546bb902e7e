"""Recipes: those we ship can be read, and what cannot be meant is refused with a way out."""

import importlib
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from diptych.data_prep.command_line.arguments import from_values, parse
from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.command_line.option_synonyms import HERE, other_name
from diptych.data_prep.pipeline.prepare_settings import PrepareSettings
from diptych.finetune.commands import cli
from diptych.finetune.commands.model_settings import split_names
from diptych.finetune.evaluating.evaluate_settings import EvaluateSettings
from diptych.finetune.training import recipe as config
from diptych.finetune.training.optimizers import LearningRates
from diptych.finetune.training.recipe import TrainRecipe, parse_recipe

NEEDED = {"model": "diptych-8m", "data": "prepared", "out": "run", "epochs": 1}
RECIPES = sorted((Path(config.__file__).parents[1] / "recipes").glob("*.yaml"))


def recipe(**changes) -> TrainRecipe:
    return TrainRecipe(**(NEEDED | changes))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_shipped_recipe_is_read(file):
    parsed = parse(TrainRecipe, "diptych train", ["--config", str(file), "--data", "prepared", "--out", "run"])
    written = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert parsed.model == written["model"] and parsed.data == "prepared"
    assert parsed.precision == "auto", "which one is fast depends on the machine"


def test_command_line_goes_before_yaml(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("{model: t5, data: d, out: o, epochs: 3, learning_rate: 3e-4, betas: [0.9, 0.95]}")
    parsed = parse(
        TrainRecipe, "diptych train", ["--config", str(file), "--learning_rate", "1e-5", "--metrics", "chrf,bleu"]
    )
    assert (parsed.learning_rate, parsed.epochs, parsed.betas) == (1e-5, 3, (0.9, 0.95))
    assert split_names(parsed.metrics) == ["chrf", "bleu"]


def test_every_field_says_what_it_does(capsys):
    with pytest.raises(SystemExit):
        parse(TrainRecipe, "diptych train", ["--help"])
    help_text = capsys.readouterr().out
    for setting in fields(TrainRecipe):
        described = help_text.split(f"\n  --{setting.name} ")[1].split("\n  --")[0]
        assert len(described.split()) > 4, f"{setting.name} has no docstring"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--lerning_rate", "1e-4"], "Did you mean --learning_rate?"),
        (["--learning-rate", "fast"], "--learning_rate is 'fast'; it has to be a number."),
        (["--lr", "1e-4"], "there is no option --lr. Here it is --learning_rate: Peak learning rate."),
        (["--num_train_epochs", "1"], "Here it is --epochs: "),
        (["--per-device-train-batch-size", "8"], "Here it is --batch_size: "),
        (["--auto_find_batch_size", "true"], "Here it is --batch_tokens auto: "),
        (["--gradient_accumulation", "8"], "Here it is --gradient_accumulation_steps: "),
        (["--optim", "adamw_torch"], "Here it is --optimizer: How weights are updated"),
        (["--report_to", "wandb"], "Here it is --trackers: "),
        (["--output_dir", "o"], "Here it is --out: "),
        (["--bf16"], "Here it is --precision bf16: "),
        (["--use_dora", "--no_cuda"], "Here it is --lora_variant dora: "),
        (["--lr_scheduler_type", "cosine"], "Here it is --schedule: "),
        (["--max_seq_length", "512"], "see diptych prepare --help, --max_source_tokens and --max_target_tokens."),
        (["--dataset_name", "x"], "Here it is --data: "),
        (["--max_length", "9"], "--max_source_tokens and --max_target_tokens."),
        (["--schedule", "cosin"], "'cosin'; it can be cosine, linear, constant, "),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--precision", "fp64"], "--precision is 'fp64'; it can be auto, bf16, fp16 or fp32."),
        (["--deepspeed", "ds.json"], "DeepSpeed does not run here; --sharding full (FSDP2) spreads a model"),
        (["--patience", "-1"], "patience is -1; it must be 0 or more."),
    ],
)
def test_wrong_argument_ends_with_one_message_and_code_2(arguments, message, capsys):
    needed = ["--model", "diptych-8m", "--data", "d", "--out", "o", "--epochs", "1"]
    assert cli.run("train", [*needed, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and error.startswith("diptych train: ")


def test_a_path_that_leads_nowhere_is_said_before_what_is_missing(capsys):
    assert cli.run("train", ["--model", "diptych-8m", "--data", "nowhere", "--out", "o"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("diptych train: nowhere is no prepared dataset (there is no such folder).")
    assert "training lasts for epochs or for max_steps, but neither was given" in error


def test_rows_that_are_not_prepared_yet_are_called_a_file(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("{}")
    assert (
        cli.run("train", ["--model", "diptych-8m", "--data", f"{tmp_path}/rows.jsonl", "--out", "o", "--epochs", "1"])
        == 2
    )
    assert f"(it is a file). Make one with `diptych prepare --data {tmp_path}/rows.jsonl`" in capsys.readouterr().err


def test_every_setting_of_a_seq2seq_trainer_and_of_sft_is_answered():
    """With what it is called here, or what to do; not with a name of ours that only looks like it."""
    from transformers import Seq2SeqTrainingArguments

    of_trl = (
        "dataset_text_field dataset_kwargs dataset_num_proc max_length packing packing_strategy padding_free loss_type"
        " eval_packing completion_only_loss assistant_only_loss activation_offloading chat_template_path lora_r"
        " model_init_kwargs model_name_or_path torch_dtype attn_implementation use_peft lora_target_modules use_dora"
        " lora_modules_to_save use_rslora load_in_4bit load_in_8bit dataset_name dataset_test_split model_revision"
        " trust_remote_code"
    )
    ours = {setting.name: "What it does." for setting in fields(TrainRecipe)}
    theirs = [setting.name for setting in fields(Seq2SeqTrainingArguments)] + of_trl.split()
    unanswered = [name for name in theirs if name not in ours and not other_name(name, ours)]
    assert not unanswered
    known = {setting.name for settings_class in settings_classes() for setting in fields(settings_class)}
    assert {name for names in HERE for name in re.sub("=[^ ]+|[+]", "", names).split()} <= known


def test_what_the_command_line_says_goes_before_what_a_recipe_says_in_another_way(tmp_path):
    file = tmp_path / "recipe.yaml"

    def parsed(recipe, *words):
        file.write_text(f"{{model: t5, data: d, out: o, {recipe}}}")
        found = parse_recipe(["--config", str(file), *words])
        return found.epochs, found.max_steps, found.warmup_steps, found.warmup_ratio

    assert parsed("epochs: 3, warmup_ratio: 0.1", "--max-steps", "10") == (None, 10, 0, 0.1)
    assert parsed("max_steps: 10, warmup_steps: 5", "--epochs=2", "--warmup_ratio", "0.1") == (2, None, 0, 0.1)
    assert parsed("max_steps: 10, epochs: null, warmup_ratio: 0.1", "--warmup_steps", "3") == (None, 10, 3, 0.0)
    with pytest.raises(UserError, match="but both were given"):
        parsed("model_overrides: {}", "--epochs", "1", "--max_steps", "2")
    with pytest.raises(UserError, match="^--max_steps is given, and stage heal has epochs: 1 of its own"):
        parsed("stages: [{name: heal, epochs: 1}]", "--max_steps", "2")


def test_unknown_key_in_yaml_names_the_nearest(tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text("model: t5\nwarmup_step: 10\n")
    assert cli.run("train", ["--config", str(file)]) == 2
    assert "Did you mean warmup_steps?" in capsys.readouterr().err


def settings_classes() -> set[type]:
    modules = {importlib.import_module(f"diptych.{it.settings.split(':')[0]}") for it in cli.COMMANDS.values()}
    return {it for module in modules for it in vars(module).values() if is_dataclass(it)}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1])
def test_every_number_of_every_command_is_refused_by_name_if_it_is_none_or_below_0(value):
    base = {"model": "diptych-8m", "data": "d", "out": "o", "tokenizer": "t", "max_steps": 3, "instruction": "x"}
    numbers = 0
    for settings_class in settings_classes():
        hints, own = get_type_hints(settings_class), fields(settings_class)
        given = {it.name: base.get(it.name, "x") for it in own if it.name in base or it.default is it.default_factory}
        for name in (it.name for it in own if {int, float} & {hints[it.name], *get_args(hints[it.name])}):
            needed = {"method": "lora"} if name.startswith("lora") else {}
            needed |= {"max_steps": None} if name == "epochs" else {}
            needed |= {"teacher": "t"} if name.startswith("distill") else {}
            value_of_it = [value, value] if name == "betas" else value
            with pytest.raises(UserError, match=rf"(?m)^(mixture\.)?{name}\b") as refusal:
                from_values(settings_class, given | needed | {name: value_of_it})
            assert re.search(
                r"(has to|must) be|it takes|it has|above|between|number", str(refusal.value), re.IGNORECASE
            )
            numbers += 1
    assert numbers > 60


def test_what_is_no_number_is_refused_where_it_stands(tmp_path):
    file = tmp_path / "recipe.yaml"
    for line, message in {
        "learning_rate: .nan": "learning_rate is NaN; it has to be a finite number",
        "max_grad_norm: -.inf": "max_grad_norm is -Infinity; it has to be a finite number",
        "schedule_settings: {power: .inf}": "schedule_settings.power is Infinity; it has to be a finite number",
        "stages: [{name: a, epochs: 1, betas: [0.9, .nan]}]": "betas, entry 2, is NaN; it has to be a finite number",
    }.items():
        file.write_text(f"{{model: t5, data: d, out: o, epochs: 1, {line}}}")
        with pytest.raises(UserError, match=message):
            parse_recipe(["--config", str(file)])
    with pytest.raises(UserError, match="mixture.cap is 0; it must be 1 or more"):
        from_values(PrepareSettings, {"mixture": {"cap": 0}})


def test_names_between_commas_may_be_a_list():
    given = {"model": "m", "data": "d", "out": "o", "epochs": 1, "method": "lora"}
    found = from_values(TrainRecipe, given | {"lora_targets": ["q", "v"], "metrics": ["chrf", "bleu"]})
    assert (found.lora_targets, found.metrics) == ("q,v", "chrf,bleu")
    assert from_values(EvaluateSettings, {"model": "m", "data": "d", "metrics": ["chrf"]}).metrics == "chrf"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": ""}, "model is not set. Name a named size"),
        ({"data": ""}, "data is not set"),
        ({"epochs": None}, "neither was given. Give one of them"),
        ({"max_steps": 5}, "both were given. Give one of them"),
        ({"batch_size": 8, "batch_tokens": 8192}, "batch_size and batch_tokens are both given. Keep one"),
        ({"batch_tokens": 0}, "batch_tokens is 0; it must be 1 or more"),
        ({"batch_size": 0}, "batch_size is 0; it must be 1 or more"),
        ({"weight_decay": float("nan")}, "weight_decay is nan; it must be 0 or more"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0; it must be 0 or more and below 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\); it must be 0 or more and below 1"),
        ({"warmup_steps": 3, "warmup_ratio": 0.1}, "both given. Keep one"),
        ({"metrics": "chrff"}, "chrff.*Did you mean chrf"),
        ({"best_metric": "chrf"}, "best_metric is chrf, but no metrics are computed"),
        ({"lora_rank": 8}, "lora_rank is given, but method is full. Set method: lora, or leave it out"),
        ({"lora_embeddings": True}, "lora_embeddings is given, but method is full"),
        ({"distill_weight": 0.2}, "distill_weight is given, but teacher is not set. Set teacher, or leave it out"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        recipe(**changes)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.8536, 0.5, 0.1464]),
    ],
)
def test_learning_rate_rises_and_then_follows_its_schedule(schedule, expected):
    settings = recipe(learning_rate=1.0, schedule=schedule, warmup_steps=2)
    assert list(map(LearningRates(settings, 6), range(6))) == pytest.approx(expected, abs=1e-4)


def test_warmup_ratio_is_a_share_of_all_steps():
    settings = recipe(learning_rate=1.0, schedule="constant", warmup_ratio=0.5)
    assert list(map(LearningRates(settings, 4), range(4))) == [0.5, 1.0, 1.0, 1.0]
