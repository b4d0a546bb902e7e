"""The optimizers by name, what they keep of each weight, and the learning rate of each step.

    optimizer = make_optimizer(model, recipe)         a RunOptimizer, which holds one or two optimizers of libraries
    with optimizer.evaluated_weights():               the averages are in the model, where averages are kept
    rate = LearningRates(recipe, total_steps)(step)   a function of the step: there is no scheduler to save

adamw          torch's; for weights in bf16 that of optimi, with Kahan summation of the updates
adamw_8bit     bitsandbytes' (arXiv 2110.02861)
adafactor      transformers' (arXiv 1804.04235)
muon           torch's for matrices (arXiv 2502.16982), and AdamW for embeddings, head, norms and biases
schedule_free  AdamW of the package schedulefree (arXiv 2405.15682)
"""

import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, SchedulerType, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from diptych.data_prep.command_line.arguments import choose_from
from diptych.data_prep.command_line.errors import UserError, in_short
from diptych.finetune.commands.exit_codes import CheckpointError
from diptych.finetune.model.families import vocabulary_tables, without_adapter
from diptych.finetune.run_files.checkpoints import whole_tensor
from diptych.finetune.training.recipe import TrainRecipe

CLASSES = {
    "adamw": ("torch.optim", "AdamW", "torch"),
    "adamw_kahan": ("optimi", "AdamW", "torch-optimi"),
    "adamw_8bit": ("bitsandbytes.optim", "AdamW8bit", "bitsandbytes"),
    "adafactor": ("transformers", "Adafactor", "transformers"),
    "muon": ("torch.optim", "Muon", "torch"),
    "schedule_free": ("schedulefree", "AdamWScheduleFree", "schedulefree"),
}
"""Module, class, and the package to install."""
OWN_SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {"fused": True},
    "adafactor": {"scale_parameter": False, "relative_step": False},  # as the Trainer has it
    "muon": {"adjust_lr_fn": "match_rms_adamw"},  # so that it takes AdamW's learning rates
}
SET_BY_RECIPE = {"params", "lr", "betas", "eps", "weight_decay", "foreach", "fused", "triton", "gradient_release"}
SCHEDULE_SET_BY_RECIPE = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
COUNTERS = ("step", "k", "weight_sum", "lr_max")
"""What optimi and schedulefree count for all weights together."""


def make_optimizer(model: PreTrainedModel | PeftModel, recipe: TrainRecipe) -> "RunOptimizer":
    """Weight decay for matrices; none for norms and biases, nor for tables that LoRA trains, whose old rows must not
    change. UserError if a package is missing, or a setting is unknown to the optimizer."""
    base = without_adapter(model)
    tables = {id(table) for table in vocabulary_tables(base).values()}
    spared = tables if recipe.method == "lora" else set()
    embeddings = tables | {id(module.weight) for module in base.modules() if isinstance(module, nn.Embedding)}
    matrices, decayed, undecayed = [], [], []
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        if weight.ndim < 2 or "bias" in name or id(weight) in spared:
            undecayed.append(weight)
        elif recipe.optimizer == "muon" and weight.ndim == 2 and id(weight) not in embeddings:
            matrices.append(weight)
        else:
            decayed.append(weight)

    def part(name: str, *groups: tuple[list[nn.Parameter], float], **settings: Any) -> torch.optim.Optimizer:
        filled = [{"params": weights, "weight_decay": decay} for weights, decay in groups if weights]
        settings = OWN_SETTINGS.get(name, {}) | settings
        if name not in ("adafactor", "muon"):
            settings |= {"betas": recipe.betas, "eps": recipe.epsilon}
        try:
            return optimizer_class(name)(filled, lr=recipe.learning_rate, **settings)
        except (ValueError, TypeError) as error:
            raise UserError(f"optimizer {recipe.optimizer} cannot be made with these settings: {error}") from error

    both = (decayed, recipe.weight_decay), (undecayed, 0.0)
    if matrices:
        parts = [part("muon", (matrices, recipe.weight_decay), **recipe.optimizer_settings)]
        parts += [part("adamw", *both)] if decayed or undecayed else []
    else:
        is_bf16 = recipe.weights == "bf16" and recipe.method == "full"
        named = {"muon": "adamw", "adamw": "adamw_kahan" if is_bf16 else "adamw"}.get(recipe.optimizer)
        parts = [part(named or recipe.optimizer, *both, **recipe.optimizer_settings)]
    return RunOptimizer(model, parts, recipe.ema)


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """UserError with the line that installs it, if it is missing."""
    module, attribute, package = CLASSES[name]
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise UserError(f"the optimizer needs {package}, which is not installed: pip install {package}") from error


def check_optimizer(recipe: TrainRecipe) -> None:
    """UserError before anything is loaded."""
    name = recipe.optimizer
    own_name = "adamw_kahan" if recipe.weights == "bf16" and recipe.method == "full" else name
    own = optimizer_class(own_name)
    known = inspect.signature(own).parameters.keys() - SET_BY_RECIPE | ({"eps"} if name == "adafactor" else set())
    for setting in recipe.optimizer_settings:
        if setting not in known:
            raise UserError(f"optimizer_settings names {setting!r} for {name}. {choose_from(setting, sorted(known))}")
    weight = nn.Parameter(torch.ones(2, 2))  # some values are refused at the first step only
    weight.grad = torch.ones(2, 2)
    try:
        optimizer = own([weight], lr=1e-3, **OWN_SETTINGS.get(own_name, {}) | recipe.optimizer_settings)
        if hasattr(optimizer, "train"):
            optimizer.train()
        optimizer.step()
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"optimizer {name} with {recipe.optimizer_settings}: {in_short(error)}") from error
    LearningRates(recipe, recipe.max_steps or 10**9)


class LearningRates:
    """Of the step that comes after `step` others. It depends on nothing else."""

    def __init__(self, recipe: TrainRecipe, total_steps: int):
        self.peak = recipe.learning_rate
        self.warmup_steps = recipe.warmup_steps or math.ceil(recipe.warmup_ratio * total_steps)
        holder = torch.optim.SGD([torch.zeros(1)], lr=self.peak)
        try:
            self.shape: Callable[[int], float] = get_scheduler(
                recipe.schedule, holder, self.warmup_steps, total_steps, recipe.schedule_settings or None
            ).lr_lambdas[0]
            shares = [self.shape(step) for step in (self.warmup_steps, (self.warmup_steps + total_steps) // 2)]
        except (TypeError, ValueError, ArithmeticError) as error:
            takes = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(recipe.schedule)]).parameters
            raise UserError(
                f"schedule {recipe.schedule} with schedule_settings {recipe.schedule_settings}: {error}. "
                f"They can be: {', '.join(sorted(takes.keys() - SCHEDULE_SET_BY_RECIPE)) or 'none'}."
            ) from error
        room = max(0, total_steps - self.warmup_steps)  # warm-up may be longer than a short run
        is_decay_wrong = not 0 <= recipe.schedule_settings.get("num_decay_steps", 0) <= room
        if is_decay_wrong or not all(-1e-6 <= share <= 1.0 + 1e-6 for share in shares):
            raise UserError(
                f"schedule {recipe.schedule} with {recipe.schedule_settings} does not fit into {total_steps} steps, "
                f"of which {self.warmup_steps} are warm-up: the learning rate would leave 0 to {self.peak:g}."
            )

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:  # from transformers' schedules the first step would have a rate of 0
            return self.peak * (step + 1) / self.warmup_steps
        return self.peak * self.shape(step)


class RunOptimizer:
    """The optimizers of a run, which torch's GradScaler takes for one, and the running average of the weights."""

    def __init__(self, model: PreTrainedModel | PeftModel, parts: Sequence[torch.optim.Optimizer], ema: float = 0.0):
        self.parts, self.ema, self.steps = list(parts), ema, 0
        self.names = {weight: name for name, weight in model.named_parameters() if weight.requires_grad}
        self.averages = {weight: weight.detach().clone() for weight in self.names} if ema else {}
        self.schedule_free = [part for part in parts if hasattr(part, "eval")]
        for part in self.schedule_free:
            part.train()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def set_rate(self, rate: float) -> None:
        for group in self.param_groups:
            group["lr"] = rate

    def step(self) -> None:
        for part in self.parts:
            part.step()
        self.steps += 1
        if self.averages:  # the first weights count for little soon: they are an average of few
            decay = min(self.ema, (1 + self.steps) / (10 + self.steps))
            torch._foreach_lerp_(
                list(self.averages.values()), [weight.detach() for weight in self.averages], 1 - decay
            )

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    @contextmanager
    def evaluated_weights(self) -> Iterator[dict[nn.Parameter, torch.Tensor]]:
        """In this context the model has the weights that are evaluated and saved. Gives the trained ones, if they are
        others; they come back to the bit."""
        if not (self.averages or self.schedule_free):
            yield {}
            return
        trained = {weight: weight.detach().clone() for weight in self.names}
        try:
            _copy(self.averages)
            for part in self.schedule_free:
                part.eval()
            yield trained
        finally:
            for part in self.schedule_free:
                part.train()
            _copy(trained)

    def tensors(self, trained: dict[nn.Parameter, torch.Tensor], keep: bool = True) -> dict[str, torch.Tensor]:
        """All that it keeps, whole and on the CPU, as `name/exp_avg`; the same for any number of ranks, all of which
        must call this. `trained`: as evaluated_weights gives it. `keep`: see `whole_tensor`."""
        found = {f"{self.names[weight]}/weight": value for weight, value in trained.items()}
        for part in self.parts:
            for weight, state in part.state.items():
                found |= {f"{self.names[weight]}/{key}": state[key] for key in _kept(state)}
        return {name: whole_tensor(torch.as_tensor(value), keep) for name, value in found.items()}

    def counters(self) -> dict[str, Any]:
        """What it keeps beside the tensors, for state.json."""
        groups = [{name: float(group[name]) for name in COUNTERS if name in group} for group in self.param_groups]
        return {"steps": self.steps, "groups": groups, "without_state": self._without_state()}

    def _without_state(self) -> list[str]:
        """Weights that never had a gradient, such as those of an expert that no token was sent to."""
        known = {weight for part in self.parts for weight in part.state}
        return sorted(name for weight, name in self.names.items() if weight not in known)

    def load(self, file: Path, counters: dict[str, Any]) -> None:
        """CheckpointError where the file has other entries than the state of these weights."""
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}. Name another checkpoint.") from error
        self.make_state()
        try:
            untouched = set(map(str, counters["without_state"]))
            self.steps = int(counters["steps"])
            for group, saved in zip(self.param_groups, counters["groups"], strict=True):
                for name in COUNTERS:
                    if name in group:
                        kind = type(group[name])
                        value = float(saved[name])
                        if not math.isfinite(value):
                            raise ValueError(f"{name} is {value}")
                        group[name] = torch.full_like(group[name], value) if kind is torch.Tensor else kind(value)
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            where = file.parent / "state.json"
            raise CheckpointError(f"{where} holds other counts than this optimizer's: {error!r}.") from error
        places = self._places(untouched)
        if different := sorted(places.keys() ^ tensors.keys()):
            is_missing = different[0] in places
            raise CheckpointError(
                f"{file} {'lacks' if is_missing else 'holds'} {different[0]}"
                f"{'' if is_missing else ', which is unknown'}: {len(places)} entries were expected, {len(tensors)} "
                f"found. Name another checkpoint."
            )
        with torch.no_grad():
            for name, (state, key) in places.items():
                state[key] = _as_before(state[key], tensors[name], f"{file}: {name}")

    def _places(self, untouched: set[str]) -> dict[str, tuple[dict[Any, Any], Any]]:
        """Name of a tensor in the file -> the dict and the key under which it is kept. State of weights that had none
        is dropped."""
        places: dict[str, tuple[dict[Any, Any], Any]] = {}
        for part in self.parts:
            for weight, state in list(part.state.items()):
                if self.names[weight] in untouched:
                    del part.state[weight]
                    continue
                places |= {f"{self.names[weight]}/{key}": (state, key) for key in _kept(state)}
        if self.averages or self.schedule_free:
            places |= {f"{name}/weight": ({"weight": weight}, "weight") for weight, name in self.names.items()}
        return places

    def make_state(self) -> None:
        """As after a first step, so that each entry has its kind, place and sharding; with a rate of 0, no weight
        changes (torch.distributed.checkpoint does the same)."""
        before = [dict(group) for group in self.param_groups]
        for weight in self.names:
            weight.grad = torch.zeros_like(weight)
        for group in self.param_groups:
            group |= {"lr": 0.0, "weight_decay": 0.0}
        for part in self.parts:
            part.step()
        for group, old in zip(self.param_groups, before, strict=True):
            group |= {name: old[name] for name in ("lr", "weight_decay")}
        self.zero_grad()


def _kept(state: dict[str, Any]) -> list[str]:
    """Keys of what changes: not bitsandbytes' tables of its 256 values."""
    return [key for key, value in state.items() if value is not None and not key.startswith("qmap")]


def _as_before(kept: Any, saved: torch.Tensor, where: str) -> Any:
    """What was saved, as what is kept in its place: a number, or a tensor there."""
    expected = torch.as_tensor(kept)
    if saved.shape != expected.shape or saved.dtype != expected.dtype:
        raise CheckpointError(
            f"{where} is {tuple(saved.shape)}, {saved.dtype}, and {tuple(expected.shape)}, {expected.dtype} was "
            f"expected. Name another checkpoint."
        )
    if saved.is_floating_point() and saved.numel():
        least, most = torch.aminmax(saved)
        if not (torch.isfinite(least) and torch.isfinite(most)) or (least < 0 and "_sq" in where.split("/")[-1]):
            raise CheckpointError(f"{where} has values that no training leaves. Name another checkpoint.")
    if not isinstance(kept, torch.Tensor):
        return type(kept)(saved.item())
    saved = saved.to(kept.device)
    if isinstance(kept, DTensor):
        saved = distribute_tensor(saved, kept.device_mesh, kept.placements)
    return kept.copy_(saved)


def _copy(values: dict[nn.Parameter, torch.Tensor]) -> None:
    with torch.no_grad():
        for weight, value in values.items():
            weight.copy_(value)
