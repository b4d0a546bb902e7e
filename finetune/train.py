"""The training loop. A recipe in; a run folder out.

    accelerate launch -m diptych.finetune.train --config recipe.yaml        (or finetune/train.py, or `diptych train`)

    run/  config.yaml      the recipe as it was resolved        checkpoints/   see checkpoint.py
          metrics.jsonl    one line for each log line and       samples.jsonl  what was generated for the metrics
                           each evaluation                      final/         the best checkpoint's model, or the
          loss.png         both losses, learning rate                          last one's: from_pretrained loads it

One optimizer step: its rows are dealt to micro-batches and ranks, its target tokens are counted, every loss is a sum
divided by that count, gradients are added up, clipped, applied. The place in the data is a function of the step's
number, so a run that was killed goes on with the same bits (on a CPU), and 2 ranks compute what 1 would.
"""

import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
import yaml
from accelerate.utils import InitProcessGroupKwargs, gather_object, set_seed
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diptych.data_prep.records import UserError
from diptych.finetune import checkpoint as checkpoints
from diptych.finetune.batches import (
    BatchOrder,
    Prepared,
    check_rows_fit,
    load_prepared,
    longest_first,
    pad_batch,
    row_lengths,
)
from diptych.finetune.cli import choose_from
from diptych.finetune.config import FIXED_IN_A_RUN, FREE_IN_A_RUN, TrainRecipe, parse_recipe, split_names
from diptych.finetune.evaluation import evaluate_rows
from diptych.finetune.families import family_of, vocabulary_tables, without_adapter
from diptych.finetune.loading import load_tokenizer
from diptych.finetune.lora import save_adapter
from diptych.finetune.loss_plot import plot_loss
from diptych.finetune.metrics import score_texts
from diptych.finetune.objectives import Seq2SeqObjective
from diptych.finetune.run_log import Pace, RunLog, short, train_line, validation_line
from diptych.finetune.starting_model import starting_model


@dataclass
class Progress:
    """How far a run is: all that a checkpoint holds beside weights, optimizer and random states."""

    step: int = 0
    """Optimizer steps taken."""
    target_tokens: int = 0
    """Target tokens trained on."""
    nats: float = 0.0
    """Since the last log line, as the next three: summed loss."""
    logged_target_tokens: int = 0
    logged_tokens: int = 0
    logged_padded_tokens: int = 0
    best: float | None = None
    """The best value of best_metric so far, and its step."""
    best_step: int | None = None
    evaluations_without_gain: int = 0


@dataclass(frozen=True)
class Run:
    """What the parts of the loop work with."""

    recipe: TrainRecipe
    folder: Path
    accelerator: accelerate.Accelerator
    prepared: Prepared
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel | PeftModel
    objective: nn.Module
    """Model and loss in one module, as accelerate wrapped it."""
    optimizer: torch.optim.Optimizer
    order: BatchOrder
    total_steps: int
    log: RunLog
    progress: Progress

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def weight_names(self) -> dict[nn.Parameter, str]:
        return {weight: name for name, weight in self.model.named_parameters()}

    @property
    def is_out_of_patience(self) -> bool:
        return 0 < self.recipe.patience <= self.progress.evaluations_without_gain

    def autocast(self) -> torch.autocast:
        bf16 = self.recipe.precision == "bf16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=bf16)

    def tensors(self, split: Dataset, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """These rows as a padded batch on the device of this rank."""
        columns = split[rows]
        picked = [
            {"input_ids": input_ids, "labels": labels}
            for input_ids, labels in zip(columns["input_ids"], columns["labels"], strict=True)
        ]
        batch = pad_batch(picked, self.tokenizer.pad_token_id, self.model.config.decoder_start_token_id)
        return {name: tensor.to(self.accelerator.device, non_blocking=True) for name, tensor in batch.items()}


def run(recipe: TrainRecipe) -> int:
    this = set_up(recipe)
    train(this)
    write_final(this)
    this.accelerator.end_training()
    return 0


def train(this: Run) -> None:
    """The loop."""
    recipe, progress, accelerator, order = this.recipe, this.progress, this.accelerator, this.order
    split = this.prepared.splits["train"]
    eval_every = recipe.eval_every or order.steps_per_epoch
    save_every = recipe.save_every or order.steps_per_epoch
    pace = Pace(this.total_steps, progress.step, accelerator.is_main_process)
    weights = list(this.weight_names)
    epoch_rows = None
    this.objective.train()

    while progress.step < this.total_steps and not this.is_out_of_patience:
        started = time.perf_counter()
        epoch, index = divmod(progress.step, order.steps_per_epoch)
        if epoch_rows is None or index == 0:
            epoch_rows = order.rows_of(epoch)
        step = order.step(epoch_rows, index)

        loss = torch.zeros((), device=accelerator.device)
        for number, batch in enumerate(step.batches, start=1):
            tensors = this.tensors(split, batch[accelerator.process_index])
            is_last = number == len(step.batches)  # only then do ranks exchange gradients
            with nullcontext() if is_last else accelerator.no_sync(this.objective):
                with this.autocast():
                    part = this.objective(tensors, step.target_tokens)
                # Each part is a share of the sum over all ranks, but DDP takes the mean over them.
                accelerator.backward(part * accelerator.num_processes)
            loss += part.detach()
        loss = accelerator.reduce(loss, reduction="sum").item()
        gradient_norm = float(accelerator.clip_grad_norm_(weights, recipe.max_grad_norm or math.inf))
        rate = learning_rate(progress.step, this.total_steps, recipe)
        check_finite(loss, gradient_norm, progress.step + 1, rate)
        for group in this.optimizer.param_groups:
            group["lr"] = rate
        this.optimizer.step()
        this.optimizer.zero_grad()

        tokens = step.source_tokens + step.target_tokens
        progress.step += 1
        progress.target_tokens += step.target_tokens
        progress.nats += loss * step.target_tokens
        progress.logged_target_tokens += step.target_tokens
        progress.logged_tokens += tokens
        progress.logged_padded_tokens += step.padded_tokens
        pace.advance(loss, tokens, time.perf_counter() - started)

        is_end = progress.step == this.total_steps
        if progress.step % recipe.logging_every == 0 or is_end:
            log_training(this, rate, gradient_norm, pace)
        is_better = False
        if "validation" in this.prepared.splits and (progress.step % eval_every == 0 or is_end):
            is_better = evaluate(this)
        if progress.step % save_every == 0 or is_better or is_end or this.is_out_of_patience:
            save_checkpoint(this)

    pace.bar.close()
    if this.is_out_of_patience:
        this.log.say(f"stopped: no better {recipe.best_metric} in the last {recipe.patience} evaluations")


def learning_rate(step: int, total_steps: int, recipe: TrainRecipe) -> float:
    """Of the step that comes after `step` others: a function of nothing else, so there is no scheduler to save."""
    warmup_steps = recipe.warmup_steps or math.ceil(recipe.warmup_ratio * total_steps)
    if step < warmup_steps:
        return recipe.learning_rate * (step + 1) / warmup_steps
    passed = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    left = {"constant": 1.0, "linear": 1 - passed, "cosine": 0.5 + 0.5 * math.cos(math.pi * passed)}
    return recipe.learning_rate * left[recipe.schedule]


def check_finite(loss: float, gradient_norm: float, step: int, rate: float) -> None:
    """Before the optimizer moves: weights that have seen a NaN are lost."""
    if not math.isfinite(loss) or not math.isfinite(gradient_norm):
        raise UserError(
            f"at step {step} the loss is {loss} and the gradient's length {gradient_norm}, at a learning rate of "
            f"{rate:.1e}. Training stops; the checkpoints before are sound. Lower learning_rate or max_grad_norm, or "
            f"raise warmup_steps; if it comes at step 1, try precision: fp32, and look at where you start from."
        )


def log_training(this: Run, rate: float, gradient_norm: float, pace: Pace) -> None:
    progress = this.progress
    entry = {
        "step": progress.step,
        "split": "train",
        "epoch": progress.step / this.order.steps_per_epoch,
        "target_tokens": progress.target_tokens,
        "loss": progress.nats / progress.logged_target_tokens,
        "learning_rate": rate,
        "gradient_norm": gradient_norm,
        "fill": progress.logged_tokens / progress.logged_padded_tokens,
        "tokens_per_second": pace.tokens_per_second(),
    }
    progress.nats, progress.logged_target_tokens = 0.0, 0
    progress.logged_tokens, progress.logged_padded_tokens = 0, 0
    this.log.add_figures(entry)
    this.log.say(train_line(entry, this.total_steps, pace.seconds_left()))


def evaluate(this: Run) -> bool:
    """Loss on the validation split, and metrics where asked; whether it is the best evaluation so far."""
    progress, recipe = this.progress, this.recipe
    figures = {"loss": validation_loss(this)}
    if recipe.metrics:
        figures |= generation_figures(this)
    value = figures[recipe.best_metric]
    lower_is_better = recipe.best_metric == "loss"
    is_better = progress.best is None or (value < progress.best if lower_is_better else value > progress.best)
    progress.evaluations_without_gain = 0 if is_better else progress.evaluations_without_gain + 1
    if is_better:
        progress.best, progress.best_step = value, progress.step
    entry = {"step": progress.step, "split": "validation"} | figures
    this.log.add_figures(entry)
    this.log.say(validation_line(entry, this.total_steps, is_better))
    if this.accelerator.is_main_process:
        plot_loss(this.folder / "metrics.jsonl", this.folder / "loss.png")
    return is_better


@torch.no_grad()
def validation_loss(this: Run) -> float:
    """Nats per target token over the whole split: each rank its share, in as many calls as the others."""
    split, accelerator = this.prepared.splits["validation"], this.accelerator
    lengths = row_lengths(split)
    batch_size = this.recipe.eval_batch_size or this.recipe.batch_size
    target_tokens = int(lengths.target_tokens.sum())
    loss = torch.zeros((), dtype=torch.float64)
    this.objective.eval()
    for batch in longest_first(lengths, batch_size, accelerator.num_processes):
        with this.autocast():
            part = this.objective(this.tensors(split, batch[accelerator.process_index]), target_tokens)
        loss += part.cpu().double()
    this.objective.train()
    return accelerator.reduce(loss.float().to(accelerator.device), reduction="sum").item()


def generation_figures(this: Run) -> dict[str, float]:
    """Metrics of what the model writes for a sample of the validation split, kept in samples.jsonl."""
    recipe, figures = this.recipe, [{}]
    if this.accelerator.is_main_process:
        with this.autocast():
            evaluation = evaluate_rows(
                this.model,
                this.tokenizer,
                this.prepared.splits["validation"],
                metrics=split_names(recipe.metrics),
                batch_size=recipe.eval_batch_size or recipe.batch_size,
                max_new_tokens=recipe.max_new_tokens,
                limit=recipe.metrics_limit,
            )
        this.log.add_samples([{"step": this.progress.step} | row._asdict() for row in evaluation.predictions])
        of_the_loss = ("rows", "loss", "target_tokens", "max_new_tokens")
        figures = [{name: value for name, value in evaluation.figures.items() if name not in of_the_loss}]
    return accelerate.utils.broadcast_object_list(figures)[0]


def save_checkpoint(this: Run) -> None:
    progress, recipe = this.progress, this.recipe
    random_states = gather_object([checkpoints.random_states()])

    def write(partial: Path) -> None:
        save_model(this.model, this.tokenizer, partial / "model")
        checkpoints.save_optimizer(partial / "optimizer.safetensors", this.optimizer, this.weight_names)
        checkpoints.write_json(partial / "rng.json", random_states)
        checkpoints.write_json(
            partial / "state.json",
            {"progress": asdict(progress), "order": order_facts(this), "written": this.log.bytes_written()},
        )

    if this.accelerator.is_main_process:
        checkpoints.write_checkpoint(checkpoints.checkpoint_path(this.checkpoints, progress.step), write)
        if progress.best_step is not None:
            checkpoints.mark_best(this.checkpoints, progress.best_step, recipe.best_metric, progress.best)
        checkpoints.prune_checkpoints(this.checkpoints, recipe.keep_last)
    this.accelerator.wait_for_everyone()


def save_model(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    if isinstance(model, PeftModel):
        save_adapter(model, folder)
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_final(this: Run) -> None:
    best = checkpoints.best_checkpoint(this.checkpoints) if this.recipe.final == "best" else None
    chosen = best or checkpoints.complete_checkpoints(this.checkpoints)[-1]
    if this.accelerator.is_main_process:
        checkpoints.copy_folder(chosen / "model", this.folder / "final")
        plot_loss(this.folder / "metrics.jsonl", this.folder / "loss.png")
    which = f"the best by {this.recipe.best_metric}" if best else "the last"
    this.log.say(f"final model: {this.folder / 'final'} ({chosen.name}, {which}) | {this.folder / 'loss.png'}")
    this.accelerator.wait_for_everyone()


def set_up(recipe: TrainRecipe) -> Run:
    """Everything is looked at before anything is written: what is wrong with a recipe shows here."""
    transformers.utils.logging.disable_progress_bar()  # one bar is enough
    accelerator = make_accelerator(recipe)
    recipe = resolve_precision(recipe, accelerator.device)
    folder = Path(recipe.out)
    saved = claim_folder(recipe, folder)
    prepared = load_prepared(recipe.data)
    tokenizer = load_run_tokenizer(recipe, prepared)
    check_best_metric(recipe)

    set_seed(recipe.seed)
    model = starting_model(recipe, tokenizer, saved / "model" if saved else None)
    used = [name for name in ("train", "validation") if name in prepared.splits]
    check_rows_fit(without_adapter(model), {name: prepared.splits[name] for name in used})
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    objective = Seq2SeqObjective(model, recipe.label_smoothing, recipe.compile)
    objective, optimizer = accelerator.prepare(objective, make_optimizer(model, recipe))
    order = BatchOrder(
        row_lengths(prepared.splits["train"]),
        recipe.batch_size,
        accelerator.num_processes,
        recipe.gradient_accumulation_steps,
        recipe.seed,
        recipe.group_by_length,
    )
    set_seed(recipe.seed, device_specific=True)  # from here on each rank drops out its own
    state = checkpoints.read_json(saved / "state.json") if saved else {"progress": {}, "written": {}}
    accelerator.wait_for_everyone()  # all have seen the folder as it was; now it may change
    this = Run(
        recipe=recipe,
        folder=folder,
        accelerator=accelerator,
        prepared=prepared,
        tokenizer=tokenizer,
        model=model,
        objective=objective,
        optimizer=optimizer.optimizer,
        order=order,
        total_steps=recipe.max_steps or recipe.epochs * order.steps_per_epoch,
        log=RunLog(folder, accelerator, state["written"]),
        progress=Progress(**state["progress"]),
    )
    if saved:
        restore(this, saved, state)
    if accelerator.is_main_process:
        (folder / "config.yaml").write_text(yaml.safe_dump(to_yaml(recipe), sort_keys=False), encoding="utf-8")
    accelerator.init_trackers("diptych", config={name: str(value) for name, value in asdict(recipe).items()})
    say_what_runs(this)
    return this


def make_accelerator(recipe: TrainRecipe) -> accelerate.Accelerator:
    known, available = accelerate.tracking.LOGGER_TYPE_TO_CLASS, accelerate.tracking.get_available_trackers()
    trackers = split_names(recipe.trackers)
    for name in trackers:
        if name not in known:
            raise UserError(
                f"trackers names {name!r}, which accelerate does not know. {choose_from(name, list(known))}"
            )
        if name not in [str(tracker) for tracker in available]:
            raise UserError(f"the tracker {name} is not installed. Install it: pip install {name}")
    accelerator = accelerate.Accelerator(
        mixed_precision="no",  # the loop has its own autocast; a launcher's default must not add another
        log_with=trackers or None,
        project_dir=recipe.out,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],  # ranks wait while one generates
    )
    accelerator.gradient_accumulation_steps = 1  # likewise: accelerate would divide the loss once more
    return accelerator


def resolve_precision(recipe: TrainRecipe, device: torch.device) -> TrainRecipe:
    if recipe.precision != "auto":
        return recipe
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return replace(recipe, precision="bf16" if has_bf16 else "fp32")


def claim_folder(recipe: TrainRecipe, folder: Path) -> Path | None:
    """The checkpoint to go on from; UserError where the folder is taken by another run, or by something else."""
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if not recipe.resume:
        raise UserError(f"{folder} is not empty. Give `out` a new folder, or go on with the run in it: --resume true")
    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"{folder} has no config.yaml, so there is no run to resume. Give `out` the folder of a run.")
    before, now = yaml.safe_load(config.read_text(encoding="utf-8")), to_yaml(recipe)
    for name in FIXED_IN_A_RUN:
        if before[name] != now[name]:
            raise UserError(
                f"{name} was {before[name]!r} in the run in {folder}, and is {now[name]!r} now. "
                f"A run goes on as it began: set it back, or start anew in another folder."
            )
    changed = [name for name in now if before[name] != now[name] and name not in FREE_IN_A_RUN]
    if changed and os.environ.get("RANK", "0") == "0":
        print("changed for the rest of the run: " + ", ".join(f"{n} {before[n]} -> {now[n]}" for n in changed))
    return checkpoints.latest_checkpoint(folder / "checkpoints")


def to_yaml(recipe: TrainRecipe) -> dict[str, Any]:
    return asdict(recipe) | {"betas": list(recipe.betas)}


def load_run_tokenizer(recipe: TrainRecipe, prepared: Prepared) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(str(prepared.tokenizer_folder))
    if recipe.tokenizer is not None:
        other = load_tokenizer(recipe.tokenizer)
        if other.get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"tokenizer {recipe.tokenizer} ({len(other)} tokens) has another vocabulary than the one that "
                f"{recipe.data} was prepared with ({len(tokenizer)} tokens). Prepare the data again with it."
            )
        tokenizer = other
    for name in ("pad_token", "eos_token"):
        if getattr(tokenizer, name) is None:
            raise UserError(f"the tokenizer of {recipe.data} has no {name}. Set tokenizer.{name} and prepare again.")
    return tokenizer


def check_best_metric(recipe: TrainRecipe) -> None:
    """Now, and not at the first evaluation, which may be hours away."""
    if recipe.best_metric == "loss":
        return
    known = ["loss", "exact_match_rows", *score_texts(split_names(recipe.metrics), ["a"], [["a"]])[0]]
    if recipe.best_metric not in known:
        raise UserError(f"best_metric is {recipe.best_metric!r}. {choose_from(recipe.best_metric, known)}")


def make_optimizer(model: PreTrainedModel | PeftModel, recipe: TrainRecipe) -> torch.optim.AdamW:
    """Decay for matrices; none for norms and biases, nor for tables that LoRA trains, whose old rows must not move."""
    frozen_tables = vocabulary_tables(without_adapter(model)).values() if recipe.method == "lora" else []
    still = {id(table) for table in frozen_tables}
    decayed, undecayed = [], []
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            spared = weight.ndim < 2 or "bias" in name or id(weight) in still
            (undecayed if spared else decayed).append(weight)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], recipe.learning_rate, recipe.betas, recipe.epsilon, fused=True
    )


def order_facts(this: Run) -> dict[str, Any]:
    """What decides which rows a step has."""
    return {
        "data": this.prepared.fingerprint,
        "rows_per_step": this.order.rows_per_step,
        "rows_together": this.order.rows_per_batch * this.order.ranks if this.order.group_by_length else None,
    }


def restore(this: Run, saved: Path, state: dict[str, Any]) -> None:
    """Optimizer and random states; the weights are there already."""
    before, now = state["order"], order_facts(this)
    if before["data"] != now["data"]:
        raise UserError(
            f"{this.recipe.data} is not the data that this run was trained on. Name the same prepared folder."
        )
    if before != now:
        raise UserError(
            f"a step of this run had {before['rows_per_step']} rows, now it has {now['rows_per_step']}, or they come "
            f"in other batches. Keep batch_size × ranks, and gradient_accumulation_steps, as they were."
        )
    checkpoints.load_optimizer(saved / "optimizer.safetensors", this.optimizer, this.weight_names)
    random_states = checkpoints.read_json(saved / "rng.json")
    if this.accelerator.process_index < len(random_states):
        checkpoints.restore_random_states(random_states[this.accelerator.process_index])
    if this.accelerator.num_processes != len(random_states):
        this.log.say(f"{len(random_states)} ranks before, {this.accelerator.num_processes} now: dropout will differ")


def say_what_runs(this: Run) -> None:
    recipe, say = this.recipe, this.log.say
    weights = {id(weight): weight for weight in this.model.parameters()}.values()
    total = sum(weight.numel() for weight in weights)
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    rows = {name: len(split) for name, split in this.prepared.splits.items() if name != "test"}
    say(
        f"{recipe.model} ({this.model.config.model_type}, {short(total)} weights, {short(trained)} trained) | "
        + ", ".join(f"{count} {name} rows" for name, count in rows.items())
        + f" | {this.total_steps} steps of {this.order.rows_per_step} rows | {this.accelerator.num_processes} × "
        + f"{this.accelerator.device.type}, {recipe.precision} | {this.folder}"
    )
    if "validation" not in this.prepared.splits:
        say(f"{recipe.data} has no validation split: no evaluation, and the last checkpoint becomes final")
    if family_of(this.model) is None:
        say(f"{this.model.config.model_type} is not in families.py: its logits are held in full, which takes memory")
    if this.progress.step:
        say(f"goes on after step {this.progress.step}")
    elif recipe.resume:
        say("there is no checkpoint to resume from: begins at the beginning")


def main(argv: Sequence[str] | None = None) -> int:
    recipe = parse_recipe(argv)
    try:
        return run(recipe)
    except (UserError, OSError) as error:
        message, code = str(error), 2
    except torch.OutOfMemoryError as error:
        advice = "Lower batch_size and raise gradient_accumulation_steps by as much, or set gradient_checkpointing."
        message, code = f"{str(error).splitlines()[0]} {advice}", 2
    except KeyboardInterrupt:
        message, code = f"interrupted; go on with: --config {Path(recipe.out) / 'config.yaml'} --resume true", 130
    if os.environ.get("RANK", "0") == "0":  # the ranks of a launch all fail alike
        print(f"diptych train: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
