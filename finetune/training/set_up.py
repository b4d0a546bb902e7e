"""A recipe in; everything that the training loop works with out, looked at before anything is written.

    run = set_up(recipe)      prepared data, model, optimizer, order of rows; where a run is resumed, as it left them

What is wrong with a recipe shows here, in the first seconds, as a UserError.
"""

import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import numpy as np
import torch
import transformers
import yaml
from accelerate.utils import set_seed
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diptych.data_prep.command_line.arguments import choose_from
from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.named_splits import kind_of, name_in, splits_of
from diptych.data_prep.text_to_ids.languages import codes_of
from diptych.data_prep.text_to_ids.templates import carried_template
from diptych.data_prep.text_to_ids.two_vocabularies import all_tokens
from diptych.finetune.batches.packed_rows import PackedRows
from diptych.finetune.batches.padded_rows import (
    BatchOrder,
    PaddedRows,
    Prepared,
    StepRows,
    check_rows_fit,
    drop_repeated_start,
    load_prepared,
)
from diptych.finetune.commands.exits import CheckpointError
from diptych.finetune.commands.ranks import Ranks, on_main_rank
from diptych.finetune.commands.stop_signals import StopRequest
from diptych.finetune.evaluating.best_figure import selectable_figures
from diptych.finetune.model.families import decoder_start_token, family_of, vocabulary_tables, without_adapter
from diptych.finetune.model.loading import has_tokenizer, load_tokenizer
from diptych.finetune.model.loss import Seq2SeqObjective, left_out_of_loss
from diptych.finetune.model.speed import TokenCost, compile_layers, matmul_peak, work_per_token
from diptych.finetune.run_files import checkpoints, whole_folders
from diptych.finetune.run_files.run_folder import CONFIG, Status
from diptych.finetune.run_files.run_log import RunLog, short
from diptych.finetune.training.distillation import DistilledObjective, load_teacher
from diptych.finetune.training.feeding import DTYPES, check_precision, resolve_precision, set_attention, training_rows
from diptych.finetune.training.launch import meet
from diptych.finetune.training.recipe import TrainRecipe, split_names
from diptych.finetune.training.resuming import (
    as_it_began,
    check_same_run,
    choose_checkpoint,
    run_facts,
    say_changes,
    take_back,
    to_yaml,
    weights_hash,
)
from diptych.finetune.training.sharding import spread
from diptych.finetune.training.starting_model import is_named_size, starting_model
from diptych.finetune.training.warm_up import close_encoder, train_cross_attention_alone


@dataclass
class Progress:
    """How far a run is: all that a checkpoint holds beside weights, optimizer and random states."""

    step: int = 0
    """Optimizer steps taken; the place in the data follows from it."""
    tokens: int = 0
    """Source and target tokens trained on."""
    target_tokens: int = 0
    nats: float = 0.0
    """Since the last log line, as the next three: summed loss."""
    logged_target_tokens: int = 0
    logged_tokens: int = 0
    logged_padded_tokens: int = 0
    best: float | None = None
    """The best value of best_metric so far, and its step."""
    best_step: int | None = None
    evaluations_without_gain: int = 0
    evaluated_step: int = 0
    """The step of the last evaluation."""


@dataclass(frozen=True)
class Run:
    """What the parts of the loop work with."""

    recipe: TrainRecipe
    folder: Path
    accelerator: accelerate.Accelerator
    prepared: Prepared
    rows: PaddedRows | PackedRows
    """What is trained on."""
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel | PeftModel
    objective: nn.Module
    """Model and loss in one module, as it goes over the ranks."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    """Scales the loss in fp16, whose smallest numbers are too large for gradients; else does nothing."""
    order: BatchOrder
    work: TokenCost
    peak: float
    """Floating-point operations a second of a matrix product on this rank's device."""
    total_steps: int
    log: RunLog
    progress: Progress
    ranks: Ranks
    stop: StopRequest
    status: Status
    base_hash: str
    """Of the frozen weights under an adapter; empty where all weights are trained."""
    _epochs: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def validation_splits(self) -> list[str]:
        """`validation`, or `validation/news` and the others, where they have names."""
        return splits_of("validation", self.prepared.splits)

    @property
    def weight_names(self) -> dict[nn.Parameter, str]:
        return {weight: name for name, weight in self.model.named_parameters()}

    @property
    def eval_every(self) -> int:
        return self.recipe.eval_every or self.order.steps_per_epoch

    @property
    def save_every(self) -> int:
        return self.recipe.save_every or self.order.steps_per_epoch

    def step(self, number: int) -> StepRows:
        """The rows of the step that comes after `number` others."""
        epoch, index = divmod(number, self.order.steps_per_epoch)
        if epoch not in self._epochs:
            self._epochs.clear()
            self._epochs[epoch] = self.order.rows_of(epoch)
        return self.order.step(self._epochs[epoch], index)

    @property
    def is_out_of_patience(self) -> bool:
        return 0 < self.recipe.patience <= self.progress.evaluations_without_gain

    def autocast(self) -> torch.autocast:
        dtype = DTYPES[self.recipe.precision]
        is_whole = self.recipe.sharding == "none"  # else autocast would keep, cast, what was put together for a while
        device = self.accelerator.device.type
        return torch.autocast(device, dtype, enabled=dtype != torch.float32, cache_enabled=is_whole)

    def tensors(self, rows: PaddedRows | PackedRows, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        """A batch of these rows on the device of this rank."""
        return {name: tensor.to(self.accelerator.device) for name, tensor in rows.tensors(numbers).items()}


def set_up(recipe: TrainRecipe, stop: StopRequest, status: Status) -> Run:
    transformers.utils.logging.disable_progress_bar()  # one bar is enough
    accelerator = meet(recipe)
    ranks = Ranks(accelerator, recipe.rank_timeout, status.end)
    with ranks.waiting_for("the start of the run", has_own_work=True):
        return make_run(recipe, stop, status, accelerator, ranks)


def make_run(
    recipe: TrainRecipe, stop: StopRequest, status: Status, accelerator: accelerate.Accelerator, ranks: Ranks
) -> Run:
    recipe, slow = on_main_rank(accelerator, lambda: resolve_precision(as_it_began(recipe), accelerator.device))
    if slow and accelerator.is_main_process:
        print(slow, flush=True)
    folder = Path(recipe.out)
    saved = choose_checkpoint(recipe, folder)
    prepared = load_prepared(recipe.data)
    tokenizer = load_run_tokenizer(recipe, prepared)
    check_best_metric(recipe, splits_of("validation", prepared.splits))

    set_seed(recipe.seed)
    model = starting_model(recipe, tokenizer, saved / "model" if saved else None)
    check_checkpoint_tokenizer(recipe, tokenizer)
    if recipe.trainable == "cross_attention":
        train_cross_attention_alone(model)
    if recipe.open_encoder_steps:
        close_encoder(model)
    start = decoder_start_token(model)
    starts = codes_of(tokenizer).starts
    used = {
        name: drop_repeated_start(split, start, starts)
        for name, split in prepared.splits.items()
        if kind_of(name) in ("train", "validation")
    }
    check_rows_fit(without_adapter(model), used)
    prepared = prepared._replace(splits=used)
    rows, why_padded = training_rows(recipe, prepared, model, tokenizer)
    base_hash = weights_hash(model) if isinstance(model, PeftModel) else ""
    model = ready_to_train(recipe, model, accelerator, is_packed=why_padded is None)
    if recipe.teacher:
        teacher = load_teacher(recipe.teacher, tokenizer, accelerator.device, DTYPES[recipe.precision])
        shares = recipe.distill_weight, recipe.distill_temperature
        objective = DistilledObjective(model, teacher, *shares, z_loss=recipe.z_loss)
    else:
        objective = Seq2SeqObjective(model, recipe.label_smoothing, recipe.z_loss)
    objective = spread(objective, recipe.sharding, accelerator)
    optimizer = make_optimizer(model, recipe)
    order = BatchOrder(
        rows.lengths,
        recipe.batch_size,
        accelerator.num_processes,
        recipe.gradient_accumulation_steps,
        recipe.seed,
        recipe.group_by_length and rows.row_tokens is None,
        rows.row_tokens,
    )
    scaler = torch.amp.GradScaler(accelerator.device.type, enabled=recipe.precision == "fp16")
    set_seed(recipe.seed, device_specific=True)  # from here on each rank drops out its own
    state = saved_state(recipe, saved, run_facts(prepared, order, base_hash))
    total_steps = recipe.max_steps or recipe.epochs * order.steps_per_epoch
    if state.progress.step < total_steps:
        whole_folders.check_own(folder / "final")  # which would be replaced at the end
    accelerator.wait_for_everyone()  # all have seen the folder as it was; now it may change
    if accelerator.is_main_process:  # first of all files, and whole: by it a run is known that was killed early
        if (folder / CONFIG).is_file():
            say_changes(recipe, folder)
        whole_folders.write_text(folder / CONFIG, yaml.safe_dump(to_yaml(recipe), sort_keys=False))
        if saved:
            take_back(recipe, folder, saved)
    status.begin()
    status.update(step=state.progress.step, total_steps=total_steps)
    run = Run(
        recipe=recipe,
        folder=folder,
        accelerator=accelerator,
        prepared=prepared,
        rows=rows,
        tokenizer=tokenizer,
        model=model,
        objective=objective,
        optimizer=optimizer,
        scaler=scaler,
        order=order,
        work=work_per_token(model),
        # on CPUs without fast products in fp16, the rest of a step is faster than they are
        peak=max(matmul_peak(accelerator.device, dtype) for dtype in {DTYPES[recipe.precision], torch.float32}),
        total_steps=total_steps,
        log=RunLog(folder, accelerator, state.written),
        progress=state.progress,
        ranks=ranks,
        stop=stop,
        status=status,
        base_hash=base_hash,
    )
    accelerator.init_trackers("diptych", config={name: str(value) for name, value in asdict(recipe).items()})
    say_what_runs(run, why_padded)
    if saved:
        restore(run, saved)
        scaler.load_state_dict(state.scaler)
    return run


class SavedState(NamedTuple):
    """What state.json of a checkpoint holds beside the facts of its run."""

    progress: Progress
    written: dict[str, int]
    scaler: dict[str, Any]


def saved_state(recipe: TrainRecipe, saved: Path | None, facts: dict[str, Any]) -> SavedState:
    """Of the checkpoint to go on from, or of a run that begins. CheckpointError where it holds something else."""
    if saved is None:
        return SavedState(Progress(), {}, {})
    try:
        state = whole_folders.read_json(saved / "state.json")
        before, written, scaler = state["run"], dict(state["written"]), dict(state["scaler"])
        progress = Progress(**state["progress"])
        if missing := asdict(progress).keys() - state["progress"].keys():
            raise KeyError(*missing)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{saved / 'state.json'} is not the state of a run: {error!r}") from error
    check_same_run(recipe, saved, before, facts)
    return SavedState(progress, written, scaler)


def ready_to_train(
    recipe: TrainRecipe, model: PreTrainedModel | PeftModel, accelerator: accelerate.Accelerator, is_packed: bool
) -> PreTrainedModel | PeftModel:
    """With the attention, the memory and the compilation that the recipe asks for."""
    check_precision(recipe, model)
    set_attention(without_adapter(model), recipe.attention, recipe.precision, accelerator.device, is_packed)
    if recipe.gradient_checkpointing:
        with warnings.catch_warnings():  # transformers 5.22 has another name for it, and warns of this one
            warnings.simplefilter("ignore", FutureWarning)
            without_adapter(model).gradient_checkpointing_enable({"use_reentrant": False})
    if accelerator.num_processes > 1:
        switch_off_layer_drop(without_adapter(model))
    if recipe.compile:
        compile_layers(model)
    return model


def load_run_tokenizer(recipe: TrainRecipe, prepared: Prepared) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(str(prepared.tokenizer_folder))
    carried_template(tokenizer)  # UserError if it no longer renders what it rendered when the rows were made
    if recipe.tokenizer is not None:
        other = load_tokenizer(recipe.tokenizer)
        if all_tokens(other) != all_tokens(tokenizer):
            raise UserError(
                f"tokenizer {recipe.tokenizer} ({len(other)} tokens) has another vocabulary than the one that "
                f"{recipe.data} was prepared with ({len(tokenizer)} tokens). Prepare the data again with it."
            )
        tokenizer = other
    for name in ("pad_token", "eos_token"):
        if getattr(tokenizer, name) is None:
            raise UserError(f"the tokenizer of {recipe.data} has no {name}. Set tokenizer.{name} and prepare again.")
    return tokenizer


def check_checkpoint_tokenizer(recipe: TrainRecipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Rows are token ids: to a model with another vocabulary they are other words, and would ruin it in silence."""
    if is_named_size(recipe.model) or not has_tokenizer(recipe.model):
        return
    own, prepared = all_tokens(load_tokenizer(recipe.model)), all_tokens(tokenizer)
    if own != prepared and not (recipe.grow_vocabulary and own.items() <= prepared.items()):
        raise UserError(
            f"{recipe.data} was prepared with another tokenizer ({len(prepared)} tokens) than that of {recipe.model} "
            f"({len(own)} tokens). Prepare the data again with --tokenizer {recipe.model}; if it is the same with "
            f"tokens added, set grow_vocabulary."
        )


def check_best_metric(recipe: TrainRecipe, validation_splits: Sequence[str]) -> None:
    """Now, and not at the first evaluation, which may be hours away."""
    if recipe.best_metric == "loss":
        return
    known = selectable_figures(split_names(recipe.metrics))
    sets = [name_in(split) for split in validation_splits if split != "validation"]
    known += [f"{name}/{figure}" for name in sets for figure in known]
    if recipe.best_metric not in known:
        raise UserError(f"best_metric is {recipe.best_metric!r}. {choose_from(recipe.best_metric, known)}")


def switch_off_layer_drop(model: PreTrainedModel) -> None:
    """BART's relatives skip whole layers at random, each rank others, and DDP waits for gradients that never come."""
    for panel in (model.get_encoder(), model.get_decoder()):
        if getattr(panel, "layerdrop", 0) > 0:
            panel.layerdrop = 0.0
            if os.environ.get("RANK", "0") == "0":
                print(f"{type(panel).__name__}: layer drop is off, because ranks would drop different layers")


def make_optimizer(model: PreTrainedModel | PeftModel, recipe: TrainRecipe) -> torch.optim.AdamW:
    """Decay for matrices; none for norms and biases, nor for tables that LoRA trains, whose old rows must not move."""
    tables = vocabulary_tables(without_adapter(model)).values() if recipe.method == "lora" else []
    spared = {id(table) for table in tables}
    decayed, undecayed = [], []
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            is_spared = weight.ndim < 2 or "bias" in name or id(weight) in spared
            (undecayed if is_spared else decayed).append(weight)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], recipe.learning_rate, recipe.betas, recipe.epsilon, fused=True
    )


def restore(run: Run, saved: Path) -> None:
    """Optimizer and random states; the weights are there already."""
    checkpoints.load_optimizer(saved / "optimizer.safetensors", run.optimizer, run.weight_names)
    random_states = whole_folders.read_json(saved / "rng.json")
    rank, ranks = run.accelerator.process_index, run.accelerator.num_processes
    try:
        if rank < len(random_states):
            checkpoints.restore_random_states(random_states[rank])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{saved / 'rng.json'} holds no random states of rank {rank}: {error!r}") from error
    if ranks != len(random_states):
        run.log.say(f"{len(random_states)} ranks before, {ranks} now: dropout will differ")


def say_what_runs(run: Run, why_padded: str | None) -> None:
    recipe, say = run.recipe, run.log.say
    total = sum(weight.numel() for weight in run.model.parameters())
    trained = sum(weight.numel() for weight in run.model.parameters() if weight.requires_grad)
    counts = {name: len(split) for name, split in run.prepared.splits.items()}
    kind = "padded" if why_padded else "packed"
    sharded = ", sharded" if recipe.sharding == "full" else ""
    say(
        f"{recipe.model} ({run.model.config.model_type}, {short(total)} weights, {short(trained)} trained) | "
        + ", ".join(f"{count:,} {name} rows" for name, count in counts.items())
        + f" | {run.total_steps} steps of {run.order.rows_per_step} {kind} rows | {run.accelerator.num_processes} × "
        + f"{run.accelerator.device.type}, {recipe.precision}{sharded} | {run.folder}"
    )
    if why_padded:
        say(f"trains on padded rows: {why_padded}")
    else:
        lengths, shape = run.order.lengths, run.rows.packing
        filled = {
            "source": lengths.source_tokens.sum() / (len(lengths.source_tokens) * shape.max_source_tokens),
            "target": lengths.target_tokens.sum() / (len(lengths.target_tokens) * shape.max_target_tokens),
        }
        say(
            f"{counts['train']:,} examples in {len(lengths.source_tokens):,} rows of {shape.max_source_tokens} + "
            f"{shape.max_target_tokens} tokens | filled: source {filled['source']:.1%}, target {filled['target']:.1%} "
            f"| attention: {run.model.config._attn_implementation}"
        )
    if len(run.validation_splits) > 1 and "/" not in recipe.best_metric:
        say(
            f"the best checkpoint is that of the best mean {recipe.best_metric} over {len(run.validation_splits)} "
            f"validation sets, each counting the same; best_metric: {name_in(run.validation_splits[0])}/"
            f"{recipe.best_metric} chooses by one"
        )
    if not run.validation_splits:
        say(f"{recipe.data} has no validation split: no evaluation, and the last checkpoint becomes final")
    if family_of(run.model) is None:
        say(f"{run.model.config.model_type} is not in families.py: its logits are held in full, which takes memory")
    if left_out := left_out_of_loss(run.model.config, recipe.label_smoothing):
        say(f"the loss leaves out {left_out}")
    if run.progress.step:
        say(f"{'has ended at' if run.progress.step >= run.total_steps else 'goes on after'} step {run.progress.step}")
    elif recipe.resume:
        say("there is no checkpoint to resume from: begins at the beginning")
