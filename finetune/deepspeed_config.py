"""A DeepSpeed configuration in; what it asks for, in the recipe's own words, out.

    recipe = understood(recipe)      with `deepspeed: ds.json`, or launched with accelerate's DeepSpeed settings

    {"zero_optimization": {"stage": 0}}           sharding: none, which is DDP
    {"zero_optimization": {"stage": 1, 2 or 3}}   sharding: full, which is FSDP2: weights, gradients, optimizer shared

DeepSpeed's engine itself does not run: its checkpoints are pickles, and it scales the loss in its own way, while ours
are safetensors, and a gradient is the same on any number of ranks. The recipe stays what says how a step is made: a
value of the configuration that is "auto" is the recipe's, one that contradicts it is refused with both, and one that
neither FSDP2 nor the recipe has is refused, or named where it changes no result.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from diptych.data_prep.records import UserError, nearest
from diptych.finetune.config import TrainRecipe
from diptych.finetune.run_folder import is_main_rank

USE, FILE, STAGE = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE", "ACCELERATE_DEEPSPEED_ZERO_STAGE"
OFFLOADS = ("offload_optimizer", "offload_param")

SAME = {
    "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.betas": "betas",
    "optimizer.params.eps": "epsilon",
    "optimizer.params.weight_decay": "weight_decay",
}
"""Their name → that of the recipe. A value of its own must be the recipe's."""
KNOWN = (*SAME, "train_batch_size", "zero_optimization", "optimizer", "scheduler", "bf16", "fp16")
REFUSED = {
    "amp": "set precision in the recipe",
    "sparse_attention": "set attention in the recipe",
    "pipeline": "set sharding in the recipe",
    "tensor_parallel": "set sharding in the recipe",
    "compression_training": "train without it",
    "data_efficiency": "train without it",
    "curriculum_learning": "train without it",
}


def understood(recipe: TrainRecipe) -> TrainRecipe:
    """The recipe with the sharding that DeepSpeed's settings ask for; as it is where there are none.

    UserError for what contradicts the recipe, and for what cannot be had here.
    """
    launched = os.environ.pop(USE, "").lower() in ("true", "1")  # accelerate itself is not to start its engine
    file = recipe.deepspeed or (os.environ.get(FILE) if launched else None)
    if file:
        config, where = _read(Path(file)), file
    elif launched:
        config, where = _from_environment(), "accelerate's DeepSpeed settings"
    else:
        return recipe
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    problems = [*_contradictions(config, recipe, ranks), *_not_to_be_had(config)]
    if problems:
        raise UserError(
            f'{where} does not go with the recipe: {"; ".join(problems)}. Set these to the same, or to "auto".'
        )
    stage = _stage(config, where)
    sharding = "full" if stage and ranks > 1 else "none"
    if recipe.sharding == "full" and not stage:
        raise UserError(f"{where} has ZeRO stage 0, which shares nothing, but sharding is full. Drop one of them.")
    others = sorted(config.keys() - set(KNOWN))
    if is_main_rank():
        print(f"{where}: ZeRO stage {stage} -> sharding: {sharding}" + (
            f" | without effect here: {', '.join(others)}" if others else ""
        ))  # fmt: skip
    return replace(recipe, sharding=sharding)


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"deepspeed: {path} cannot be read: {error.strerror}. Name a DeepSpeed JSON.") from error
    except ValueError as error:
        raise UserError(f"deepspeed: {path} is no JSON: {error}. Mend it.") from error
    if not isinstance(config, dict):
        raise UserError(f"deepspeed: {path} holds no settings by name. Name a DeepSpeed JSON.")
    return config


def _from_environment() -> dict[str, Any]:
    """What `accelerate launch --use_deepspeed` says without a file."""
    zero: dict[str, Any] = {"stage": int(os.environ.get(STAGE, "2"))}
    for name in OFFLOADS:
        device = os.environ.get(f"ACCELERATE_DEEPSPEED_{name.upper()}_DEVICE", "none")
        zero[name] = {"device": device}
    config: dict[str, Any] = {"zero_optimization": zero}
    clipping = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "auto")
    return config | {"gradient_clipping": clipping if clipping in ("auto", "none") else float(clipping)}


def _stage(config: dict[str, Any], where: str) -> int:
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{where} has ZeRO stage {stage!r}; there are 0, 1, 2 and 3.")
    return stage


def _contradictions(config: dict[str, Any], recipe: TrainRecipe, ranks: int) -> Iterator[str]:
    for theirs, ours in SAME.items():
        asked, own = _at(config, theirs), getattr(recipe, ours)
        own = list(own) if isinstance(own, tuple) else own
        if asked not in (None, "auto", "none") and asked != own:
            yield f"{theirs} {asked} there, {ours} {own} here"
    rows = recipe.batch_size * recipe.gradient_accumulation_steps * ranks
    if config.get("train_batch_size", "auto") not in ("auto", rows):
        yield (
            f"train_batch_size {config['train_batch_size']} there, {rows} here (batch_size × "
            f"gradient_accumulation_steps × {ranks} ranks)"
        )
    for theirs in ("bf16", "fp16"):
        asked = _at(config, f"{theirs}.enabled")
        if asked is True and recipe.precision not in ("auto", theirs):
            yield f"{theirs} there, precision {recipe.precision} here"
        if asked is False and recipe.precision == theirs:
            yield f"no {theirs} there, precision {recipe.precision} here"


def _not_to_be_had(config: dict[str, Any]) -> Iterator[str]:
    for name in OFFLOADS:
        device = _at(config, f"zero_optimization.{name}.device")
        if device not in (None, "none"):
            yield f"{name} to {device}, and here everything stays on its device: share it among more ranks"
    optimizer = _at(config, "optimizer.type")
    if optimizer not in (None, "Adam", "AdamW"):
        yield f"optimizer {optimizer}, and here it is AdamW"
    params = _at(config, "scheduler.params") or {}
    if fixed := [name for name, value in params.items() if value != "auto"]:
        yield f"scheduler with its own {', '.join(fixed)}, and here schedule and warmup_steps say it"
    for name, instead in REFUSED.items():
        value = config.get(name)
        if value and not (isinstance(value, dict) and value.get("enabled") is False):
            yield f"{name}: {instead}"
    for name in config:
        near = nearest(name, KNOWN, cutoff=0.85)
        if name not in KNOWN and near:
            yield f"{name} is no name of theirs; is {near} meant?"


def _at(config: dict[str, Any], path: str) -> Any:
    for name in path.split("."):
        config = config.get(name) if isinstance(config, dict) else None
    return config
