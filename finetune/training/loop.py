"""The training loop.

    code = run(recipe, stop, status)        DONE, or STOPPED if a signal came: it has saved, and can be resumed

One optimizer step: its rows are dealt to micro-batches and ranks, its target tokens are counted, every loss is a sum
divided by that count, gradients are added up, clipped, applied. The place in the data is a function of the step's
number, so a run that was killed goes on with the same bits (on a CPU), and 2 ranks compute what 1 would.

An evaluation or a checkpoint that is due at a step comes before the next step. Whether one is due depends only on
what the run has done, so a run that was killed between the two does what is left when it is resumed.
"""

import math
import statistics
import time
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from diptych.finetune.batches.padded_rows import StepRows, padded_rows
from diptych.finetune.batches.preference_rows import paired_rows
from diptych.finetune.commands.exit_codes import DONE, STOPPED, NotFiniteError
from diptych.finetune.commands.model_settings import split_names
from diptych.finetune.commands.ranks import end_ranks
from diptych.finetune.evaluating.evaluate_rows import evaluate_rows, row_losses
from diptych.finetune.evaluating.metrics import is_improvement, selected_figure
from diptych.finetune.model.device_speed import keep_memory
from diptych.finetune.preferences.figures import drift, validation_figures
from diptych.finetune.preferences.objective_settings import OF_SAMPLES
from diptych.finetune.preferences.reference import answers_of_rows
from diptych.finetune.run_files.checkpoints import checkpoint_step, complete_checkpoints, whole_tensor
from diptych.finetune.run_files.loss_plot import plot_loss
from diptych.finetune.run_files.run_folder import Status
from diptych.finetune.run_files.run_log import Pace, selection_line, train_line, validation_line
from diptych.finetune.training.recipe import TrainRecipe
from diptych.finetune.training.run import Run
from diptych.finetune.training.saving import save_checkpoint, write_final
from diptych.finetune.training.set_up_run import set_up
from diptych.finetune.training.starting_model import open_encoder
from diptych.finetune.training.stop_signals import StopRequest
from diptych.finetune.training.throughput import peak_memory, profiler

ROWS_NAMED = 20


class AskedToStop(Exception):
    """Some rank was asked to stop. All ranks raise this at the same place."""


def run(recipe: TrainRecipe, stop: StopRequest, status: Status, is_last: bool = True) -> int:
    """`is_last`: False if another stage follows, for which the ranks stay together."""
    keep_memory()
    run = set_up(recipe, stop, status)
    stop.defer()
    run.ranks.steps_lost = partial(steps_lost, run)
    is_stopped = not train(run)
    if not is_stopped:
        write_final(run)
    accelerator = run.accelerator
    del run
    end_ranks(accelerator, for_good=is_last or is_stopped)
    return STOPPED if is_stopped else DONE


def steps_lost(run: Run) -> list[str]:
    """What is lost if the run ends now. Of several ranks, one alone knows what it has saved, so the disk is asked."""
    saved = max(map(checkpoint_step, complete_checkpoints(run.checkpoints)), default=0)
    run.status.facts["step"] = saved
    since = f"the checkpoint of step {saved}" if saved else "the beginning (there is no checkpoint yet)"
    return [f"Steps since {since}, which are lost: {max(run.progress.step - saved, 0)}."]


def train(run: Run) -> bool:
    """Takes steps, evaluates and saves. True at the end; False if the run was stopped, and saved, before it."""
    recipe, progress = run.recipe, run.progress
    pace = Pace(run.total_steps, progress.step, run.accelerator.is_main_process)
    has_profile = recipe.profile and run.accelerator.is_main_process
    run.objective.train()
    try:
        with profiler(run.folder / "profile") if has_profile else nullcontext() as profile:
            while True:
                open_encoder(run.model, progress.step, recipe.open_encoder_steps, run.order.lengths.source_tokens)
                is_due_now = is_due(progress.step, recipe.eval_every or run.order.steps_per_epoch)
                is_due_now = is_due_now or progress.step == run.total_steps
                is_better = is_due_now and progress.evaluated_step != progress.step and evaluate(run)
                is_last = progress.step >= run.total_steps or run.is_out_of_patience
                if is_last or is_better or is_due(progress.step, recipe.save_every or run.order.steps_per_epoch):
                    save_checkpoint(run)
                if is_last:
                    break
                take_step(run, pace)
                if profile is not None:
                    profile.step()
    except AskedToStop:
        pace.bar.close()
        save_checkpoint(run)  # an evaluation that is due now comes first when the run is resumed
        run.log.say(f"stopped by {run.stop.reason or 'a signal to another rank'} after step {progress.step}, saved")
        return False
    pace.bar.close()
    if run.is_out_of_patience:
        run.log.say(f"stopped: no better {recipe.best_metric} in the last {recipe.patience} evaluations")
    return True


def is_due(step: int, every: int) -> bool:
    return step > 0 and step % every == 0


def take_step(run: Run, pace: Pace) -> None:
    """One optimizer step. AskedToStop after it, if any rank was asked to stop meanwhile."""
    recipe, progress = run.recipe, run.progress
    started = time.perf_counter()
    step = run.step(progress.step)
    if run.own_objective.needs_divergence:
        set_divergence(run, step)
    loss, shares, is_asked_to_stop = add_up_gradients(run, step)
    with run.ranks.waiting_for(f"the gradient's length of step {progress.step + 1}"):  # each may hold a part of it
        run.scaler.unscale_(run.optimizer)
        clipped_from = run.accelerator.clip_grad_norm_(list(run.weight_names), recipe.max_grad_norm or math.inf)
        gradient_norm = float(whole_tensor(clipped_from))
    rate = run.rates(progress.step)
    # A scale that was too large shows as an infinite gradient: the scaler leaves that step out, and halves the scale.
    if not (run.scaler.is_enabled() and math.isfinite(loss) and run.scaler.get_scale() > 1):
        check_finite(run, step, shares, loss, gradient_norm, rate)
    if progress.is_spike(gradient_norm, recipe.skip_spikes):
        run.log.say(
            f"step {progress.step + 1} is skipped: its gradient norm is {gradient_norm:.3g}, and the median of the "
            f"last {len(progress.norms)} is {statistics.median(progress.norms):.3g}"
        )
        progress.skipped += 1
    else:
        run.optimizer.set_rate(rate)
        run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()

    progress.add(step, loss, gradient_norm if recipe.skip_spikes else None)
    work = step.source_tokens * run.work.source + step.target_tokens * run.work.target
    pace.advance(loss, step.source_tokens + step.target_tokens, work, time.perf_counter() - started)
    if is_due(progress.step, recipe.logging_every) or progress.step == run.total_steps:
        log_training(run, rate, gradient_norm, pace)
    if is_asked_to_stop:
        raise AskedToStop


def add_up_gradients(run: Run, step: StepRows) -> tuple[float, list[torch.Tensor], bool]:
    """Forward and backward passes of all micro-batches of a step. Afterwards every weight has its gradient, the same
    on all ranks.

    Returns the step's loss, this rank's share of it from each micro-batch, and whether any rank was asked to stop.
    """
    accelerator, shares = run.accelerator, []
    for number, batch in enumerate(step.batches, start=1):
        with run.autocast():  # answers may be sampled here
            tensors = run.tensors(batch[accelerator.process_index])
        is_last = number == len(step.batches)  # only then does DDP exchange gradients; FSDP always does
        is_waited = is_last or run.recipe.sharding == "full"
        waits = run.ranks.waiting_for(f"the gradients of step {run.progress.step + 1}") if is_waited else nullcontext()
        with waits, nullcontext() if is_last else accelerator.no_sync(run.objective):
            with run.autocast():
                share = run.objective(tensors, step.num_items_in_batch)
            # The shares of all ranks add up to the loss, but DDP and FSDP take the mean over the ranks.
            if share.requires_grad:  # not where layer drop left out all layers that have adapters
                accelerator.backward(run.scaler.scale(share * accelerator.num_processes))
        shares.append(share.detach())
    asked = shares[0].new_tensor(float(bool(run.stop.reason)))
    with run.ranks.waiting_for(f"the loss of step {run.progress.step + 1}"):
        loss, asked = accelerator.reduce(torch.stack((torch.stack(shares).sum(), asked)), reduction="sum").tolist()
        if run.own_objective.figure_names:
            found = accelerator.reduce(run.own_objective.take_figures(), reduction="sum").flatten().tolist()
            before = run.progress.figures or [0.0] * len(found)
            run.progress.figures = [sum(both) for both in zip(before, found, strict=True)]
    return loss, shares, asked > 0


def set_divergence(run: Run, step: StepRows) -> None:
    """Of kto: a mean over the unrelated answers of all micro-batches and ranks, which each loss of the step needs."""
    own, rank = run.own_objective, run.accelerator.process_index
    with run.autocast():
        found = torch.stack([own.divergence_of(run.tensors(batch[rank])) for batch in step.batches]).sum(0)
    with run.ranks.waiting_for(f"the divergence of step {run.progress.step + 1}"):
        total, count = run.accelerator.reduce(found, reduction="sum").tolist()
    own.divergence = total / count


def check_finite(
    run: Run, step: StepRows, shares: list[torch.Tensor], loss: float, gradient_norm: float, rate: float
) -> None:
    """NotFiniteError before the optimizer changes the weights. All ranks see the same loss and gradient."""
    if math.isfinite(loss) and math.isfinite(gradient_norm):
        return
    rank = run.accelerator.process_index
    own = [
        f"rank {rank}, rows {_named(batch[rank])}"
        for batch, share in zip(step.batches, shares, strict=True)
        if not torch.isfinite(share) and len(batch[rank])
    ]
    all_rows = _named(np.concatenate(sum(step.batches, [])))
    where = "; ".join(gather_object(own)) or f"one of the rows {all_rows}: losses are finite, gradients are not,"
    kind = "packed/" if run.rows.row_tokens else "train"
    raise NotFiniteError(
        f"at step {run.progress.step + 1} the loss is {loss} and the gradient's length {gradient_norm}, at a learning "
        f"rate of {rate:.1e}",
        f"in {where} of {kind} in {run.recipe.data}, counted from 0",
        "Training stops before the weights change; earlier checkpoints are sound. Lower learning_rate or "
        "max_grad_norm, or raise warmup_steps; if it comes at step 1, try precision: fp32, and look at these rows.",
    )


def _named(rows: np.ndarray) -> str:
    more = f" and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else ""
    return ", ".join(map(str, np.sort(rows)[:ROWS_NAMED].tolist())) + more


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
    } | ({"skipped_steps": progress.skipped} if run.recipe.skip_spikes else {})
    if run.recipe.objective in OF_SAMPLES:
        entry["sampling_seconds"] = sum(run.rows.seconds)
        run.rows.seconds.clear()
    means = mean_figures(run)
    entry |= means
    progress.nats, progress.logged_target_tokens = 0.0, 0
    progress.logged_tokens, progress.logged_padded_tokens = 0, 0
    run.log.add_figures(entry)
    run.log.say(train_line(entry, run.total_steps, pace.seconds_left(), run.unit))
    say_drift(run, "train", means)


def mean_figures(run: Run) -> dict[str, float]:
    """The objective's figures since the last log line. There is no mean of nothing."""
    sums, counts, run.progress.figures = run.progress.figures[0::2], run.progress.figures[1::2], []
    named = zip(run.own_objective.figure_names, sums, counts, strict=True) if sums else ()
    return {name: total / count for name, total, count in named if count}


def say_drift(run: Run, split: str, figures: dict[str, float]) -> None:
    """Compared with the first figures of this split; after a word on one of them, with what it was then."""
    usual = {name: run.progress.usual_figures.get(f"{split}/{name}", value) for name, value in figures.items()}
    for name, what in drift(usual, figures):
        run.log.say(f"step {run.progress.step}/{run.total_steps} | warning: in {split}, {what}")
        usual[name] = figures[name]
    run.progress.usual_figures |= {f"{split}/{name}": value for name, value in usual.items()}


def evaluate(run: Run) -> bool:
    """Loss on each validation split, and metrics if the recipe has any. True if it is the best evaluation so far.
    Nothing is written before all of it is known: an evaluation that was stopped begins anew."""
    progress, recipe = run.progress, run.recipe
    if not run.validation_splits:
        return False
    figures: dict[str, dict[str, float]] = {}
    samples: list[dict[str, Any]] = []
    # padded rows have ever new shapes, and each would be compiled
    with torch.compiler.set_stance("force_eager"), run.optimizer.evaluated_weights():
        for split in run.validation_splits:
            has_answers = run.prepared.preferences is not None
            figures[split] = of_preferences(run, split) if has_answers else {"loss": validation_loss(run, split)}
            if recipe.metrics:
                figures[split] |= generation_figures(run, split, samples)
    value = selected_figure(recipe.best_metric, figures)
    is_better = is_improvement(recipe.best_metric, value, progress.best, split_names(recipe.metrics))
    if math.isnan(value):
        what = "this evaluation selects no checkpoint, and does not count for patience"
        run.log.say(f"step {progress.step}/{run.total_steps} | {recipe.best_metric} is missing: {what}")
    else:
        progress.evaluations_without_gain = 0 if is_better else progress.evaluations_without_gain + 1
    progress.evaluated_step = progress.step
    if is_better:
        progress.best, progress.best_step = value, progress.step
    run.log.add_samples(samples)
    for split, of_split in figures.items():
        entry = {"step": progress.step, "split": split} | of_split
        run.log.add_figures(entry)
        run.log.say(validation_line(entry, run.total_steps, is_better and len(figures) == 1, run.unit))
    if len(figures) > 1:
        run.log.say(selection_line(progress.step, run.total_steps, recipe.best_metric, value, len(figures), is_better))
    if run.accelerator.is_main_process and progress.step < run.total_steps:  # then write_final draws it
        plot_loss(run.folder / "metrics.jsonl", run.folder / "loss.png")
    return is_better


def validation_loss(run: Run, split: str) -> float:
    """Nats per target token over the whole split: the same digits on any number of ranks."""
    rows = padded_rows(run.loaded, run.prepared.splits[split])
    objective = run.accelerator.unwrap_model(run.objective)
    what = f"the validation loss after step {run.progress.step}"
    with run.autocast(), run.ranks.waiting_for(what, has_own_work=True):
        losses = row_losses(objective, rows, run.recipe.eval_batch_size, run.accelerator, partial(check_stop, run))
    nats, target_tokens = losses.sum(axis=0).tolist()
    return nats / target_tokens


def of_preferences(run: Run, split: str) -> dict[str, float]:
    """The loss of preferences over the whole split, rewards, margin and accuracy."""
    rows, own = paired_rows(run.loaded, run.prepared.splits[split]), run.own_objective
    what = f"the validation loss after step {run.progress.step}"
    with run.autocast(), run.ranks.waiting_for(what, has_own_work=True):
        answers = answers_of_rows(own, rows, run.recipe.eval_batch_size, run.accelerator, partial(check_stop, run))
    return validation_figures(own.loss, answers)


def generation_figures(run: Run, split: str, samples: list[dict[str, Any]]) -> dict[str, float]:
    """Metrics of what the model generates for some rows of a validation split. The texts are added to `samples`."""
    recipe = run.recipe
    with run.autocast(), run.ranks.waiting_for(f"the metrics after step {run.progress.step}", has_own_work=True):
        evaluation = evaluate_rows(
            run.loaded,
            run.prepared.splits[split],
            metrics=split_names(recipe.metrics),
            metric_settings=recipe.metric_settings,
            batch_size=recipe.eval_batch_size,
            max_new_tokens=recipe.max_new_tokens,
            limit=recipe.metrics_limit,
            accelerator=run.accelerator,
            before_each=partial(check_stop, run),
            objective=run.accelerator.unwrap_model(run.objective),
        )
    for fault in evaluation.faults.values():
        run.log.say(f"step {run.progress.step}/{run.total_steps} | {split}: a figure is missing: {fault}")
    if recipe.objective != "supervised":
        lengths = [len(row.prediction) for row in evaluation.predictions]
        evaluation.figures["output_characters"] = statistics.fmean(lengths)
        unfinished = evaluation.figures["unfinished"] / len(lengths)
        say_drift(
            run, split, {"output_characters": evaluation.figures["output_characters"], "unfinished_share": unfinished}
        )
    samples += [{"step": run.progress.step, "split": split} | row.as_json() for row in evaluation.predictions]
    of_the_loss = ("rows", "loss", "target_tokens", "max_new_tokens")
    return {name: value for name, value in evaluation.figures.items() if name not in of_the_loss}


def check_stop(run: Run) -> None:
    """Called by all ranks between two batches of an evaluation: AskedToStop if any of them was asked to stop."""
    asked = torch.tensor(float(bool(run.stop.reason)), device=run.accelerator.device)
    with run.ranks.waiting_for(f"the evaluation after step {run.progress.step}"):
        asked = run.accelerator.reduce(asked, reduction="sum")
    if asked.item():
        raise AskedToStop
