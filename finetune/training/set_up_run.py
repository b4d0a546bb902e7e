"""A recipe in; the Run that the training loop works with out. Mistakes in the recipe are UserErrors within the first
seconds, before anything is written.

    run = set_up(recipe, stop, status)      data, model, optimizer and order of rows; of a resumed run, as it left them
"""

import os
import tempfile
import warnings
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import accelerate
import numpy as np
import torch
import transformers
import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, set_seed
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diptych.data_prep.command_line.arguments import choose_from
from diptych.data_prep.command_line.errors import UserError, counted, library_errors
from diptych.data_prep.rows.named_splits import kind_of, name_in, splits_of
from diptych.data_prep.text_to_ids.templates import carried_template
from diptych.data_prep.text_to_ids.two_vocabularies import all_tokens
from diptych.finetune.batches.packed_rows import PackedRows
from diptych.finetune.batches.padded_rows import (
    BatchOrder,
    PaddedRows,
    PreparedData,
    check_rows_fit,
    check_same_tokenizer,
    check_targets,
    drop_repeated_start,
    load_prepared,
)
from diptych.finetune.batches.preference_rows import ANSWERS, PairedRows, items_of, paired_rows
from diptych.finetune.commands.exit_codes import say_once
from diptych.finetune.commands.model_settings import split_names
from diptych.finetune.commands.ranks import Ranks, join_ranks, on_main_rank
from diptych.finetune.evaluating.metrics import selectable_figures
from diptych.finetune.model.adapters import check_method
from diptych.finetune.model.donor_llm import tokenizers_differ
from diptych.finetune.model.families import family_of, without_adapter
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.loading import load_checkpoint, load_config, load_tokenizer
from diptych.finetune.model.loss import Seq2SeqObjective, left_out_of_loss
from diptych.finetune.preferences.losses import PreferenceLoss
from diptych.finetune.preferences.objective import PreferenceObjective, switch_off_dropout
from diptych.finetune.preferences.objective_settings import NEED_REFERENCE, OF_SAMPLES, OF_VALIDATION, checked_settings
from diptych.finetune.preferences.online import OnlineObjective
from diptych.finetune.preferences.reference import (
    answer_log_probabilities,
    hash_of,
    say_if_far,
    store_reference,
    stored_reference,
    with_reference,
)
from diptych.finetune.preferences.scores import scores_of
from diptych.finetune.run_files import atomic_folders
from diptych.finetune.run_files.run_folder import CONFIG, Status
from diptych.finetune.run_files.run_log import RunLog
from diptych.finetune.training.distillation import DistilledObjective, load_teacher
from diptych.finetune.training.optimizers import LearningRates, check_optimizer, make_optimizer
from diptych.finetune.training.recipe import TrainRecipe
from diptych.finetune.training.resuming import (
    as_it_began,
    choose_checkpoint,
    facts_of,
    saved_state,
    say_changes,
    take_back,
    to_yaml,
)
from diptych.finetune.training.run import Run
from diptych.finetune.training.saving import restore
from diptych.finetune.training.sharding import spread
from diptych.finetune.training.starting_model import check_size, is_named_size, starting_model
from diptych.finetune.training.stop_signals import StopRequest
from diptych.finetune.training.throughput import compile_layers, cost_per_token, matmul_peak
from diptych.finetune.training.training_batches import (
    DTYPES,
    check_batch_tokens,
    resolve_precision,
    set_attention,
    training_rows,
    with_batch_size,
)

NAME_OF_RUN = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "swanlab": "experiment_name",
    "clearml": "task_name",
}
"""What the trackers call it."""


def set_up(recipe: TrainRecipe, stop: StopRequest, status: Status) -> Run:
    check_size(recipe.model)
    transformers.utils.logging.disable_progress_bar()  # training shows its own
    accelerator = join(recipe)
    ranks = Ranks(accelerator, recipe.rank_timeout, status.end)
    with ranks.waiting_for("the start of the run", has_own_work=True):
        return make_run(recipe, stop, status, accelerator, ranks)


def make_run(
    recipe: TrainRecipe, stop: StopRequest, status: Status, accelerator: accelerate.Accelerator, ranks: Ranks
) -> Run:
    recipe, warning = on_main_rank(accelerator, lambda: resolve_precision(as_it_began(recipe), accelerator.device))
    if warning:
        say_once(warning)
    check_batch_tokens(recipe, accelerator.device.type)
    check_optimizer(recipe)
    if recipe.peft_config and not is_named_size(recipe.model):
        check_method(load_config(recipe.model).model_type, recipe.peft_config)
    folder = Path(recipe.out)
    saved = choose_checkpoint(recipe, folder)

    prepared = load_prepared(recipe.data)
    tokenizer = load_run_tokenizer(recipe, prepared)
    on_main_rank(accelerator, lambda: try_metrics(recipe, prepared))
    set_seed(recipe.seed)
    loaded = LoadedModel.of(starting_model(recipe, tokenizer, saved / "model" if saved else None), tokenizer)
    prepared = prepared._replace(splits=splits_for_model(prepared, loaded))
    rows, why_padded = training_rows(recipe, prepared, loaded)
    make_ready(recipe, loaded.model, accelerator, is_packed=why_padded is None)
    objective = make_objective(recipe, loaded, accelerator.device, rows)
    recipe = with_batch_size(recipe, rows, objective, accelerator)
    if recipe.compile and why_padded is None:
        rows = replace(rows, rows_at_least=recipe.batch_size)
    order = make_order(recipe, rows, accelerator.num_processes)
    facts = facts_of(prepared, order, loaded.model)

    objective = spread(objective, recipe.sharding, accelerator)
    reference = {}
    if recipe.objective in NEED_REFERENCE:
        validation = {name: paired_rows(loaded, it) for name, it in prepared.splits.items() if name != "train"}
        of_splits = {"train": rows, **validation}
        reference = find_reference(recipe, saved, of_splits, loaded, objective, accelerator)
        rows, *others = (with_reference(it, reference[name]) for name, it in of_splits.items())
        splits = {name: it.split for name, it in zip(validation, others, strict=True)}
        prepared = prepared._replace(splits=prepared.splits | splits)
        facts["log-probabilities by the reference"] = hash_of(reference)
    optimizer = make_optimizer(loaded.model, recipe)
    scaler = torch.amp.GradScaler(accelerator.device.type, enabled=recipe.precision == "fp16")
    set_seed(recipe.seed, device_specific=True)  # from here on each rank has dropout of its own

    state = saved_state(recipe, saved, facts)
    total_steps = recipe.max_steps or recipe.epochs * order.steps_per_epoch
    if state.progress.step < total_steps:
        atomic_folders.check_own(folder / "final")  # which would be replaced at the end
    accelerator.wait_for_everyone()  # all ranks have looked at the folder; now it may change
    if accelerator.is_main_process:
        write_beginning(recipe, folder, saved, reference)
    status.begin()
    status.update(step=state.progress.step, total_steps=total_steps)
    run = Run(
        recipe=recipe,
        folder=folder,
        accelerator=accelerator,
        prepared=prepared,
        rows=rows,
        loaded=loaded,
        objective=objective,
        optimizer=optimizer,
        rates=LearningRates(recipe, total_steps),
        scaler=scaler,
        order=order,
        work=cost_per_token(loaded.model),
        # on CPUs without fast products in fp16, the rest of a step is faster than they are
        peak=max(matmul_peak(accelerator.device, dtype) for dtype in {DTYPES[recipe.precision], torch.float32}),
        total_steps=total_steps,
        log=RunLog(folder, accelerator, state.written),
        progress=state.progress,
        ranks=ranks,
        stop=stop,
        status=status,
        facts=facts,
    )
    start_trackers(recipe, accelerator)
    say_what_runs(run, why_padded)
    if saved:
        restore(run, saved, state)
    return run


def write_beginning(recipe: TrainRecipe, folder: Path, saved: Path | None, reference: dict[str, np.ndarray]) -> None:
    """The first files of the run folder; or, of a run that is resumed, what has changed."""
    if (folder / CONFIG).is_file():
        say_changes(recipe, folder)
    # before any other file: even a run that was killed early can be told by it
    atomic_folders.write_text(folder / CONFIG, yaml.safe_dump(to_yaml(recipe), sort_keys=False))
    (folder / "checkpoints").mkdir(exist_ok=True)
    with tempfile.TemporaryFile(dir=folder / "checkpoints"):  # the first checkpoint may be hours away
        pass
    if reference:
        store_reference(folder, reference)
    if saved:
        take_back(recipe, folder, saved)


def find_reference(
    recipe: TrainRecipe,
    saved: Path | None,
    rows: dict[str, PairedRows | PackedRows],
    loaded: LoadedModel,
    objective: nn.Module,
    accelerator: accelerate.Accelerator,
) -> dict[str, np.ndarray]:
    """Of the answers of each split, (answers,): as the run began with, or computed now."""
    if saved and (stored := stored_reference(Path(recipe.out), rows)):
        return stored
    dtype, device = DTYPES[recipe.precision], accelerator.device
    own = accelerator.unwrap_model(objective)

    def of(answers_by: PreferenceObjective, who: str) -> dict[str, np.ndarray]:
        with torch.compiler.set_stance("force_eager"), torch.autocast(device.type, dtype, dtype != torch.float32):
            return {
                name: answer_log_probabilities(
                    answers_by,
                    it,
                    recipe.batch_size if it.row_tokens else recipe.eval_batch_size,
                    accelerator,
                    f"{name} by the {who}",
                )
                for name, it in rows.items()
            }

    answers = sum(ANSWERS * int(items_of(it).examples.sum()) for it in rows.values())
    say_once(f"reads {answers:,} answers with the reference, {recipe.reference or 'the model as it starts'}")
    if recipe.reference is None and not saved:
        return of(own, "reference")
    other = reference_model(recipe, loaded, device)
    check_rows_fit(without_adapter(other.model), {name: it.split for name, it in rows.items() if not it.row_tokens})
    make_ready(
        replace(recipe, compile=False), other.model, accelerator, is_packed=rows["train"].row_tokens is not None
    )
    reference = of(PreferenceObjective(other.model, own.loss), "reference")
    if not saved:
        tokens = {name: int(it.lengths.target_tokens.sum()) for name, it in rows.items()}
        say_if_far(reference, of(own, "model"), tokens)
    return reference


def reference_model(recipe: TrainRecipe, loaded: LoadedModel, device: torch.device) -> LoadedModel:
    """The one that the recipe names, or the model as the run began with it."""
    if recipe.reference is None:
        set_seed(recipe.seed)
        model = starting_model(recipe, loaded.tokenizer, None)
        return LoadedModel.of(model.to(device).eval(), loaded.tokenizer)
    other = load_checkpoint(recipe.reference, torch.float32, device)
    if difference := tokenizers_differ(all_tokens(other.tokenizer), all_tokens(loaded.tokenizer)):
        raise UserError(
            f"the reference {recipe.reference} has another tokenizer than the data ({difference}): its"
            f" log-probabilities are of other words. Name a model from which this one was tuned, or drop `reference`."
        )
    if other.decoder_start_token_id != loaded.decoder_start_token_id:
        raise UserError(
            f"the decoder of the reference {recipe.reference} starts with token {other.decoder_start_token_id}, and"
            f" that of the model with {loaded.decoder_start_token_id}. Name a model from which this one was tuned."
        )
    return other


def join(recipe: TrainRecipe) -> accelerate.Accelerator:
    """All ranks that were launched. UserError if they would train in another way than the recipe says."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1"):
        # The recipe decides, not accelerate's configuration, which would silently become DDP on a CPU. If both ask for
        # FSDP, accelerate's setting is removed: with it, transformers would load weights on the first rank alone.
        if recipe.sharding != "full":
            raise UserError(
                "accelerate's configuration asks for FSDP. Here the recipe says how weights are spread: launch with"
                " `torchrun --nproc_per_node=N -m diptych.finetune.train --config RECIPE --sharding full`, which is"
                " FSDP2, or drop it for DDP."
            )
        del os.environ["ACCELERATE_USE_FSDP"]
        say_once("sharding: full, and accelerate's FSDP settings are not used")
    trackers = split_names(recipe.trackers)
    for name in trackers:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"accelerate knows no tracker {name!r}. {choose_from(name, list(LOGGER_TYPE_TO_CLASS))}")
        if name not in map(str, get_available_trackers()):
            raise UserError(f"the tracker {name} is not installed. Install it: pip install {name}")
    accelerator = join_ranks(
        mixed_precision="no",  # the loop has its own autocast; a launcher's default must not add another
        log_with=trackers or None,
        project_dir=recipe.out,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=recipe.rank_timeout))],
    )
    if accelerator.num_processes == 1 and {"MASTER_PORT", "ACCELERATE_MIXED_PRECISION"} <= os.environ.keys():
        say_once(
            "warning: this is a run of one process: without GPUs, `accelerate launch` starts one, whatever "
            "--num_processes is. For several: `ACCELERATE_USE_CPU=true torchrun --nproc_per_node=N -m …`"
        )
    if recipe.sharding == "full" and accelerator.num_processes == 1:
        raise UserError(
            "sharding is full, but one process was launched, and has nobody to share the model with. Launch several: "
            "`torchrun --nproc_per_node=N -m diptych.finetune.train --config RECIPE`, or add --sharding none."
        )
    accelerator.gradient_accumulation_steps = 1  # likewise: accelerate would divide the loss once more
    return accelerator


def start_trackers(recipe: TrainRecipe, accelerator: accelerate.Accelerator) -> None:
    name = recipe.run_name or Path(recipe.out).resolve().name
    with library_errors(f"the tracker ({recipe.trackers}) did not start", "Set it up, or leave it out of trackers."):
        accelerator.init_trackers(
            recipe.project,
            {name: str(value) for name, value in asdict(recipe).items()},
            {tracker: {argument: name} for tracker, argument in NAME_OF_RUN.items()},
        )


def load_run_tokenizer(recipe: TrainRecipe, prepared: PreparedData) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(str(prepared.tokenizer_folder))
    carried_template(tokenizer)  # UserError if it no longer renders what it rendered when the rows were made
    if recipe.tokenizer is not None:
        other = load_tokenizer(recipe.tokenizer)
        check_same_tokenizer(recipe.data, tokenizer, recipe.tokenizer, other)
        tokenizer = other
    for name in ("pad_token", "eos_token"):
        if getattr(tokenizer, name) is None:
            raise UserError(f"the tokenizer of {recipe.data} has no {name}. Set tokenizer.{name} and prepare again.")
    return tokenizer


def try_metrics(recipe: TrainRecipe, prepared: PreparedData) -> None:
    """On two rows, before a model is loaded, since the first evaluation may be hours away: a function of the user's
    own may fail, or give no number."""
    if recipe.objective in OF_SAMPLES:
        settings, rows = checked_settings(recipe.objective, recipe.objective_settings), prepared.splits["train"][:2]
        of_reward = settings["reward"], settings["reward_weights"], recipe.metric_settings
        scores_of(rows["target"], [[text] for text in rows["target"]], rows["source"], *of_reward)
    if recipe.best_metric == "loss":
        return
    splits, faults = splits_of("validation", prepared.splits), {}
    rows = prepared.splits[splits[0]][:2] if splits else {"target": ["a"], "source": ["a"]}
    metrics = split_names(recipe.metrics)
    known = selectable_figures(metrics, recipe.metric_settings, rows["target"], rows["source"], faults)
    sets = [name_in(split) for split in splits if split != "validation"]
    known += OF_VALIDATION if recipe.objective != "supervised" else []
    known += [f"{name}/{figure}" for name in sets for figure in known]
    if recipe.best_metric not in known:
        remedy = choose_from(recipe.best_metric, known)
        raise UserError(f"best_metric is {recipe.best_metric!r}. {remedy}", *faults.values())


def splits_for_model(prepared: PreparedData, loaded: LoadedModel) -> dict[str, PaddedRows]:
    """The training and validation rows as this model reads them."""
    splits = {name: split for name, split in prepared.splits.items() if kind_of(name) in ("train", "validation")}
    check_targets(splits)
    starts = loaded.decoder_start_token_id, loaded.language_codes.starts
    splits = {name: drop_repeated_start(split, *starts) for name, split in splits.items()}
    check_rows_fit(without_adapter(loaded.model), splits)
    return splits


def make_order(recipe: TrainRecipe, rows: PaddedRows | PackedRows, ranks: int) -> BatchOrder:
    return BatchOrder(
        rows.lengths,
        recipe.batch_size,
        ranks,
        recipe.gradient_accumulation_steps,
        recipe.seed,
        recipe.group_by_length and rows.row_tokens is None,
        rows.row_tokens,
        items_of(rows) if recipe.objective != "supervised" else None,
    )


def make_ready(
    recipe: TrainRecipe, model: PreTrainedModel, accelerator: accelerate.Accelerator, is_packed: bool
) -> None:
    """Gives the model the attention, the gradient checkpointing and the compilation that the recipe asks for."""
    base, family = without_adapter(model), family_of(model)
    if recipe.precision == "fp16" and family and family.overflows_in_fp16:
        raise UserError(
            f"precision is fp16, but the activations of {model.config.model_type} checkpoints grow beyond 65,504, the "
            f"largest number of fp16: the loss would become NaN. Set precision to bf16 or fp32."
        )
    set_attention(base, recipe.attention, recipe.precision, accelerator.device, is_packed)
    if recipe.gradient_checkpointing:
        with warnings.catch_warnings():  # transformers 5.22 has another name for it, and warns of this one
            warnings.simplefilter("ignore", FutureWarning)
            base.gradient_checkpointing_enable({"use_reentrant": False})
    # BART and its relatives skip whole layers at random. Each rank would skip others, and DDP would wait forever for
    # their gradients.
    for panel in (base.get_encoder(), base.get_decoder()) if accelerator.num_processes > 1 else ():
        if getattr(panel, "layerdrop", 0) > 0:
            panel.layerdrop = 0.0
            say_once(f"{type(panel).__name__}: layer drop is off, because ranks would drop different layers")
    if recipe.compile:
        compile_layers(model)


def make_objective(
    recipe: TrainRecipe, loaded: LoadedModel, device: torch.device, rows: PaddedRows | PackedRows
) -> nn.Module:
    if recipe.objective != "supervised":
        settings = checked_settings(recipe.objective, recipe.objective_settings)
        if not settings["dropout"]:
            switch_off_dropout(loaded.model)
        if recipe.objective not in OF_SAMPLES:
            return PreferenceObjective(loaded.model, PreferenceLoss(recipe.objective, settings))
        needs_model = settings.get("kl_weight") and (recipe.reference or recipe.method == "full")
        reference = reference_model(recipe, loaded, device).model if needs_model else None
        return OnlineObjective(loaded.model, recipe.objective, settings, rows.max_new_tokens, reference)
    if not recipe.teacher:
        return Seq2SeqObjective(loaded.model, recipe.label_smoothing, recipe.z_loss, neftune=recipe.neftune)
    teacher = load_teacher(recipe.teacher, loaded.tokenizer, device, DTYPES[recipe.precision])
    shares = recipe.distill_weight, recipe.distill_temperature
    return DistilledObjective(loaded.model, teacher, *shares, z_loss=recipe.z_loss, neftune=recipe.neftune)


def say_what_runs(run: Run, why_padded: str | None) -> None:
    recipe, say, model_type = run.recipe, run.log.say, run.model.config.model_type
    total = sum(weight.numel() for weight in run.model.parameters())
    trained = sum(weight.numel() for weight in run.model.parameters() if weight.requires_grad)
    counts = {name: len(split) for name, split in run.prepared.splits.items()}
    kind = "padded" if why_padded else "packed"
    sharded = ", sharded" if recipe.sharding == "full" else ""
    objective = "" if recipe.objective == "supervised" else f"{recipe.objective} | "
    say(
        f"{recipe.model} ({model_type}, {tqdm.format_sizeof(total)} weights, {tqdm.format_sizeof(trained)} trained) | "
        + objective
        + ", ".join(counted(count, f"{name} row") for name, count in counts.items())
        + f" | {run.total_steps} steps of {run.order.rows_per_step} {kind} rows | {run.accelerator.num_processes} × "
        + f"{run.accelerator.device.type}, {recipe.precision}{sharded} | {run.folder}"
    )
    if why_padded:
        say(f"trains on padded rows: {why_padded}")
    else:
        (source_tokens, target_tokens), shape = run.order.lengths, run.rows.packing
        say(
            f"{counted(counts['train'], 'example')} in {counted(len(source_tokens), 'row')} of "
            f"{shape.max_source_tokens} + {shape.max_target_tokens} tokens | filled: source "
            f"{source_tokens.mean() / shape.max_source_tokens:.1%}, target "
            f"{target_tokens.mean() / shape.max_target_tokens:.1%} | attention: "
            f"{run.model.config._attn_implementation}"
        )
    sets = run.validation_splits
    if not sets:
        say(f"{recipe.data} has no validation split: no evaluation, and the last checkpoint becomes final")
    if len(sets) > 1 and "/" not in recipe.best_metric:
        say(
            f"the best checkpoint has the best mean {recipe.best_metric} over {len(sets)} validation sets, each "
            f"counting the same; to choose by one: best_metric: {name_in(sets[0])}/{recipe.best_metric}"
        )
    if recipe.objective in OF_SAMPLES and recipe.best_metric == "loss" and sets:
        reward = checked_settings(recipe.objective, recipe.objective_settings)["reward"]
        say(
            f"the best checkpoint has the lowest loss of the targets, which {recipe.objective} does not lower. To"
            f" choose by what it learns: metrics: {reward}, and one of its figures as best_metric"
        )
    family = run.loaded.family
    if family is None or family.head(without_adapter(run.model)) is None:
        say(f"the head of {model_type} is not known apart: its logits are held in full, which takes memory")
    if model_type == "nllb-moe" and run.model.config.num_experts > 2:
        say("transformers 5.24 sends no token beyond the first two experts of an NLLB-MoE: see docs/families.md")
    if left_out := left_out_of_loss(run.model.config, recipe.label_smoothing):
        say(f"the loss leaves out {left_out}")
    if run.progress.step:
        say(f"{'has ended at' if run.progress.step >= run.total_steps else 'goes on after'} step {run.progress.step}")
    elif recipe.resume:
        say("there is no checkpoint to resume from: begins at the beginning")
