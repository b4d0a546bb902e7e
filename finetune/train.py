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

import gc
import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diptych.data_prep.records import UserError
from diptych.finetune import checkpoint as checkpoints
from diptych.finetune.batches import Step, longest_first
from diptych.finetune.config import TrainRecipe, parse_recipe, split_names
from diptych.finetune.evaluation import evaluate_rows
from diptych.finetune.lora import save_adapter
from diptych.finetune.loss_plot import plot_loss
from diptych.finetune.run_log import Pace, train_line, validation_line
from diptych.finetune.set_up import Run, order_facts, set_up
from diptych.finetune.speed import keep_memory, peak_memory, profiler


def run_recipe(recipe: TrainRecipe) -> int:
    run = set_up(recipe)
    train(run)
    write_final(run)
    accelerator = run.accelerator
    del run
    end(accelerator)
    return 0


def end(accelerator: Accelerator) -> None:
    """DDP, of which nobody else may hold anything, goes before the process group. If it were the last to hold it, gloo
    would join its threads while this one keeps the interpreter's lock, for which one of them may be waiting: one run
    of thirty on two ranks never ended, and one of fifty was aborted."""
    accelerator.free_memory()
    gc.collect()  # what was wrapped stands in cycles, and accelerate collects before it lets go
    accelerator.end_training()


def train(run: Run) -> None:
    """The loop."""
    recipe, progress, accelerator, order = run.recipe, run.progress, run.accelerator, run.order
    eval_every = recipe.eval_every or order.steps_per_epoch
    save_every = recipe.save_every or order.steps_per_epoch
    pace = Pace(run.total_steps, progress.step, accelerator.is_main_process)
    weights = list(run.weight_names)
    epoch_rows = None
    run.objective.train()
    profile = start_profile(run)

    while progress.step < run.total_steps and not run.is_out_of_patience:
        started = time.perf_counter()
        epoch, index = divmod(progress.step, order.steps_per_epoch)
        if epoch_rows is None or index == 0:
            epoch_rows = order.rows_of(epoch)
        step = order.step(epoch_rows, index)

        loss = add_up_gradients(run, step)
        run.scaler.unscale_(run.optimizer)
        gradient_norm = float(accelerator.clip_grad_norm_(weights, recipe.max_grad_norm or math.inf))
        rate = learning_rate(progress.step, run.total_steps, recipe)
        # A scale that was too large shows as an infinite gradient: the scaler leaves that step out, and halves it.
        if not (run.scaler.is_enabled() and math.isfinite(loss) and run.scaler.get_scale() > 1):
            check_finite(loss, gradient_norm, progress.step + 1, rate)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad()
        if profile is not None:
            profile.step()

        tokens = step.source_tokens + step.target_tokens
        progress.step += 1
        progress.tokens += tokens
        progress.target_tokens += step.target_tokens
        progress.nats += loss * step.target_tokens
        progress.logged_target_tokens += step.target_tokens
        progress.logged_tokens += tokens
        progress.logged_padded_tokens += step.padded_tokens
        work = step.source_tokens * run.work.source + step.target_tokens * run.work.target
        pace.advance(loss, tokens, work, time.perf_counter() - started)

        is_end = progress.step == run.total_steps
        if progress.step % recipe.logging_every == 0 or is_end:
            log_training(run, rate, gradient_norm, pace)
        is_better = False
        if "validation" in run.prepared.splits and (progress.step % eval_every == 0 or is_end):
            with torch.compiler.set_stance("force_eager"):  # its rows are padded: new shapes without end
                is_better = evaluate(run)
        if progress.step % save_every == 0 or is_better or is_end or run.is_out_of_patience:
            save_checkpoint(run)

    pace.bar.close()
    if profile is not None:
        profile.stop()
    if run.is_out_of_patience:
        run.log.say(f"stopped: no better {recipe.best_metric} in the last {recipe.patience} evaluations")


def add_up_gradients(run: Run, step: Step) -> float:
    """Both passes for all micro-batches of a step: every weight's gradient, the same on all ranks, and the loss."""
    accelerator = run.accelerator
    loss = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(step.batches, start=1):
        tensors = run.tensors(run.rows, batch[accelerator.process_index])
        is_last = number == len(step.batches)  # only then do ranks exchange gradients
        with nullcontext() if is_last else accelerator.no_sync(run.objective):
            with run.autocast():
                part = run.objective(tensors, step.target_tokens)
            # Each part is a share of the sum over all ranks, but DDP takes the mean over them.
            accelerator.backward(run.scaler.scale(part * accelerator.num_processes))
        loss += part.detach()
    return accelerator.reduce(loss, reduction="sum").item()


def start_profile(run: Run) -> torch.profiler.profile | None:
    if not run.recipe.profile or not run.accelerator.is_main_process:
        return None
    profile = profiler(run.folder / "profile")
    profile.start()
    return profile


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


def log_training(run: Run, rate: float, gradient_norm: float, pace: Pace) -> None:
    progress = run.progress
    tokens_per_second, work_per_second = pace.per_second()
    entry = {
        "step": progress.step,
        "split": "train",
        "epoch": progress.step / run.order.steps_per_epoch,
        "tokens": progress.tokens,
        "target_tokens": progress.target_tokens,
        "loss": progress.nats / progress.logged_target_tokens,
        "learning_rate": rate,
        "gradient_norm": gradient_norm,
        "fill": progress.logged_tokens / progress.logged_padded_tokens,
        "tokens_per_second": tokens_per_second,
        "mfu": work_per_second / run.peak / run.accelerator.num_processes,
        "memory_bytes": peak_memory(run.accelerator.device),
    }
    progress.nats, progress.logged_target_tokens = 0.0, 0
    progress.logged_tokens, progress.logged_padded_tokens = 0, 0
    run.log.add_figures(entry)
    run.log.say(train_line(entry, run.total_steps, pace.seconds_left()))


def evaluate(run: Run) -> bool:
    """Loss on the validation split, and metrics where asked; whether it is the best evaluation so far."""
    progress, recipe = run.progress, run.recipe
    figures = {"loss": validation_loss(run)}
    if recipe.metrics:
        figures |= generation_figures(run)
    value = figures[recipe.best_metric]
    lower_is_better = recipe.best_metric == "loss"
    is_better = progress.best is None or (value < progress.best if lower_is_better else value > progress.best)
    progress.evaluations_without_gain = 0 if is_better else progress.evaluations_without_gain + 1
    if is_better:
        progress.best, progress.best_step = value, progress.step
    entry = {"step": progress.step, "split": "validation"} | figures
    run.log.add_figures(entry)
    run.log.say(validation_line(entry, run.total_steps, is_better))
    if run.accelerator.is_main_process:
        plot_loss(run.folder / "metrics.jsonl", run.folder / "loss.png")
    return is_better


@torch.no_grad()
def validation_loss(run: Run) -> float:
    """Nats per target token over the whole split: each rank its share, in as many calls as the others."""
    rows, accelerator = run.padded(run.prepared.splits["validation"]), run.accelerator
    lengths = rows.lengths
    target_tokens = int(lengths.target_tokens.sum())
    loss = torch.zeros((), dtype=torch.float64)
    run.objective.eval()
    for batch in longest_first(lengths, run.recipe.eval_batch_size, accelerator.num_processes):
        with run.autocast():
            part = run.objective(run.tensors(rows, batch[accelerator.process_index]), target_tokens)
        loss += part.cpu().double()
    run.objective.train()
    return accelerator.reduce(loss.float().to(accelerator.device), reduction="sum").item()


def generation_figures(run: Run) -> dict[str, float]:
    """Metrics of what the model writes for a sample of the validation split, kept in samples.jsonl."""
    recipe, figures = run.recipe, [{}]
    if run.accelerator.is_main_process:
        with run.autocast():
            evaluation = evaluate_rows(
                run.model,
                run.tokenizer,
                run.prepared.splits["validation"],
                metrics=split_names(recipe.metrics),
                batch_size=recipe.eval_batch_size,
                max_new_tokens=recipe.max_new_tokens,
                limit=recipe.metrics_limit,
            )
        run.log.add_samples([{"step": run.progress.step} | row._asdict() for row in evaluation.predictions])
        of_the_loss = ("rows", "loss", "target_tokens", "max_new_tokens")
        figures = [{name: value for name, value in evaluation.figures.items() if name not in of_the_loss}]
    return accelerate.utils.broadcast_object_list(figures)[0]


def save_checkpoint(run: Run) -> None:
    progress, recipe = run.progress, run.recipe
    random_states = gather_object([checkpoints.random_states()])

    def write(partial: Path) -> None:
        save_model(run.model, run.tokenizer, partial / "model")
        checkpoints.save_optimizer(partial / "optimizer.safetensors", run.optimizer, run.weight_names)
        checkpoints.write_json(partial / "rng.json", random_states)
        order = order_facts(run.prepared, run.order)
        state = {"progress": asdict(progress), "order": order, "written": run.log.bytes_written()}
        state["scaler"] = run.scaler.state_dict()
        checkpoints.write_json(partial / "state.json", state)

    if run.accelerator.is_main_process:
        checkpoints.write_checkpoint(checkpoints.checkpoint_path(run.checkpoints, progress.step), write)
        if progress.best_step is not None:
            checkpoints.mark_best(run.checkpoints, progress.best_step, recipe.best_metric, progress.best)
        checkpoints.prune_checkpoints(run.checkpoints, recipe.keep_last)
    run.accelerator.wait_for_everyone()


def save_model(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    if isinstance(model, PeftModel):
        save_adapter(model, folder)
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_final(run: Run) -> None:
    best_step = run.progress.best_step if run.recipe.final == "best" else None
    best = None if best_step is None else checkpoints.checkpoint_path(run.checkpoints, best_step)
    chosen = best or checkpoints.complete_checkpoints(run.checkpoints)[-1]
    if run.accelerator.is_main_process:
        checkpoints.copy_folder(chosen / "model", run.folder / "final")
        plot_loss(run.folder / "metrics.jsonl", run.folder / "loss.png")
    which = f"the best by {run.recipe.best_metric}" if best else "the last"
    run.log.say(f"final model: {run.folder / 'final'} ({chosen.name}, {which}) | {run.folder / 'loss.png'}")
    run.accelerator.wait_for_everyone()


def main(argv: Sequence[str] | None = None) -> int:
    recipe = parse_recipe(argv)
    keep_memory()
    try:
        return run_recipe(recipe)
    except (UserError, OSError) as error:
        message, code = str(error), 2
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        advice = (
            "Lower batch_size and raise gradient_accumulation_steps by as much, set gradient_checkpointing, or pack "
            "into shorter rows (prepare's --packed_source_tokens, --packed_target_tokens)."
        )
        message, code = f"{str(error).splitlines()[0]} {advice}", 2
    except KeyboardInterrupt:
        message, code = f"interrupted; go on with: --config {Path(recipe.out) / 'config.yaml'} --resume true", 130
    if os.environ.get("RANK", "0") == "0":  # the ranks of a launch all fail alike
        print(f"diptych train: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
