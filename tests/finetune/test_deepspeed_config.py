"""A DeepSpeed configuration is understood: ZeRO as sharding, "auto" as the recipe has it, contradictions refused."""

import json
from dataclasses import replace

import pytest

from diptych.data_prep.records import UserError
from diptych.finetune.config import TrainRecipe
from diptych.finetune.deepspeed_config import understood

# As transformers' documentation and accelerate's questionnaire write them: all that a recipe has is left to it.
USUAL = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": False, "loss_scale": 0},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto"}},
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}, "overlap_comm": True},
    "wall_clock_breakdown": False,
}


@pytest.fixture
def recipe(tmp_path):
    def make(changes: dict, **settings) -> TrainRecipe:
        file = tmp_path / "ds.json"
        file.write_text(json.dumps(USUAL | changes))
        return TrainRecipe(model="m", data="d", out="o", max_steps=3, deepspeed=str(file), **settings)

    return make


@pytest.mark.parametrize("stage, ranks, sharding", [(0, 2, "none"), (1, 2, "full"), (3, 2, "full"), (3, 1, "none")])
def test_zero_is_sharding(stage, ranks, sharding, recipe, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    given = recipe({"zero_optimization": {"stage": stage}})
    assert understood(given) == replace(given, sharding=sharding)
    said = capsys.readouterr().out
    assert f"ZeRO stage {stage} -> sharding: {sharding} | without effect here: wall_clock_breakdown" in said


def test_values_that_are_the_recipes_own_are_fine(recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    same = {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3}
    same |= {"gradient_clipping": 1.0, "bf16": {"enabled": True}}
    same["optimizer"] = {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.999], "eps": 1e-8}}
    assert understood(recipe(same, gradient_accumulation_steps=3)).sharding == "full"


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu 8 there, batch_size 4 here"),
        ({"train_batch_size": 9}, "train_batch_size 9 there, 4 here"),
        ({"gradient_clipping": 0.5}, "gradient_clipping 0.5 there, max_grad_norm 1.0 here"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, "lr 0.0001 there, learning_rate 0.0003 here"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer Lamb, and here it is AdamW"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}}, "its own warmup_num_steps"),
        ({"fp16": {"enabled": True}}, "fp16 there, precision fp32 here"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "offload_param to cpu"),
        ({"zero_optimization": {"stage": 4}}, "there are 0, 1, 2 and 3"),
        ({"amp": {"enabled": True}}, "amp: set precision"),
        ({"zero_optimisation": {"stage": 3}}, "is zero_optimization meant?"),
    ],
)
def test_what_contradicts_the_recipe_or_cannot_be_had_is_refused(changes, said, recipe):
    with pytest.raises(UserError) as error:
        understood(recipe(changes, precision="fp32"))
    assert said in str(error.value)


def test_a_file_that_is_none_is_named(recipe, tmp_path):
    given = recipe({})
    with pytest.raises(UserError, match="cannot be read"):
        understood(replace(given, deepspeed=str(tmp_path / "nowhere.json")))
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        understood(given)


def test_accelerates_own_settings_are_understood_and_its_engine_is_not_started(monkeypatch):
    recipe = TrainRecipe(model="m", data="d", out="o", max_steps=3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
    assert understood(recipe).sharding == "full"
    assert understood(recipe) == recipe, "asked once, and taken out of accelerate's sight"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu")
    with pytest.raises(UserError, match="accelerate's DeepSpeed settings does not go with the recipe: offload_param"):
        understood(recipe)
