"""How a model is fed: which rows, which precision, which attention.

    recipe, warning = resolve_precision(recipe, device)           `auto` becomes the faster one here
    rows, why_padded = training_rows(recipe, prepared, loaded)    packed if recipe, model and folder allow it
    recipe = with_batch_size(recipe, rows, objective, accelerator)      batch_tokens becomes a number of rows
    set_attention(model, wanted, precision, device, is_packed)    the fastest that keeps examples apart

A combination that cannot work is a UserError that says what can.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.packing.packed_row import MARKS_COLUMN
from diptych.data_prep.packing.unpacked_families import reason_not_packed
from diptych.finetune.batches.batch_tokens import largest_batch, longest_rows, rows_in_batch
from diptych.finetune.batches.packed_rows import (
    REFERENCE,
    PackedRows,
    Packing,
    check_packed_rows,
    check_packing_fits,
    load_packed,
)
from diptych.finetune.batches.padded_rows import Items, PaddedRows, PreparedData, padded_rows
from diptych.finetune.batches.preference_rows import paired_rows
from diptych.finetune.commands.exit_codes import say_once
from diptych.finetune.evaluating.evaluate_rows import cap_from_targets
from diptych.finetune.model.device_speed import training_pace
from diptych.finetune.model.families import family_of, without_adapter
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.loading import position_limit
from diptych.finetune.model.loss import Seq2SeqObjective
from diptych.finetune.model.packed_attention import VARLEN, register_varlen
from diptych.finetune.preferences.objective_settings import OF_SAMPLES, checked_settings
from diptych.finetune.preferences.online import SampledRows
from diptych.finetune.training.optimizers import make_optimizer
from diptych.finetune.training.recipe import TrainRecipe

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def training_rows(
    recipe: TrainRecipe, prepared: PreparedData, loaded: LoadedModel
) -> tuple[PaddedRows | PackedRows, str | None]:
    """The rows to train on and, if they are padded, why."""
    model = without_adapter(loaded.model)
    check_preferences(recipe, prepared)
    if recipe.objective in OF_SAMPLES:
        return sampled_rows(recipe, prepared, loaded), f"{recipe.objective} samples the answers of each step"
    padded = (paired_rows if prepared.preferences else padded_rows)(loaded, prepared.splits["train"])
    if not recipe.packed:
        return padded, "the recipe has packed: false"
    if not (loaded.family and loaded.family.attentions):
        kind = model.config.model_type
        return padded, reason_not_packed(kind) or f"how packed rows are fed to a {kind} is not known (see families.py)"
    if prepared.packing is None:
        return padded, f"{recipe.data} has no packed rows; `diptych prepare` makes them unless it gets --packing false"
    packing, packed = Packing.from_manifest(prepared.packing), load_packed(prepared.folder)
    check_packing_fits(model, packing, recipe.data)
    check_packed_rows(packed, packing, model, recipe.data)
    return PackedRows(packed, packing), None


def sampled_rows(recipe: TrainRecipe, prepared: PreparedData, loaded: LoadedModel) -> SampledRows:
    split = prepared.splits["train"]
    return SampledRows(
        split,
        loaded.pad_token_id,
        loaded.decoder_start_token_id,
        loaded=loaded,
        settings=checked_settings(recipe.objective, recipe.objective_settings),
        metric_settings=recipe.metric_settings,
        max_new_tokens=recipe.max_new_tokens or cap_from_targets(split, position_limit(loaded.model)),
    )


def check_preferences(recipe: TrainRecipe, prepared: PreparedData) -> None:
    """UserError where rows are of another kind than the objective."""
    due = {"supervised": None, "kto": "marks", **dict.fromkeys(OF_SAMPLES)}.get(recipe.objective, "pairs")
    if prepared.preferences == due:
        return
    said = {None: "one answer to each source", "pairs": "pairs of a chosen and a rejected answer"}
    said["marks"] = "answers that are marked as liked or not"
    remedy = {
        None: "Name the objective: dpo, simpo, cpo or orpo for pairs, kto for marks. To train on chosen answers alone,"
        " prepare with --map output=chosen.",
        "pairs": "`diptych prepare` makes them of rows with `chosen` and `rejected`; see docs/preferences.md.",
        "marks": "`diptych prepare` makes them of rows with `prompt`, `completion` and `label`; see"
        " docs/preferences.md.",
    }
    raise UserError(
        f"objective is {recipe.objective}, which trains on {said[due]}, and {recipe.data} has"
        f" {said.get(prepared.preferences, prepared.preferences)}. {remedy[due]}"
    )


def check_batch_tokens(recipe: TrainRecipe, device: str) -> None:
    """UserError where `auto` could find nothing."""
    if recipe.batch_tokens == "auto" and (device != "cuda" or recipe.sharding != "none"):
        why = "ranks that share a model cannot try apart" if device == "cuda" else f"this run is on a {device}"
        raise UserError(
            f"batch_tokens is auto, which tries what fits into the memory of a CUDA GPU, and {why}. Give a number of "
            f"tokens, such as batch_tokens: 4096, or batch_size."
        )


def with_batch_size(
    recipe: TrainRecipe, rows: PaddedRows | PackedRows, objective: Seq2SeqObjective, accelerator: Accelerator
) -> TrainRecipe:
    """The recipe with a batch_size in place of batch_tokens, the same on all ranks."""
    if recipe.batch_tokens is None:
        return recipe
    if recipe.batch_tokens != "auto":
        size = rows_in_batch(recipe.batch_tokens, rows)
    else:
        trial = step_in_memory(recipe, rows, objective, accelerator)
        most = -(-len(rows.lengths.source_tokens) // accelerator.num_processes)
        found = torch.tensor([largest_batch(trial, most)], device=accelerator.device)
        size = int(accelerator.gather(found).min())
    say_once(f"batch_tokens {recipe.batch_tokens}: batch_size is {size}")
    return replace(recipe, batch_size=size, batch_tokens=None)


def as_a_step(batch: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], int | Items]:
    """As if this batch were a step: what losses are divided by, and log-probabilities by a reference, which are
    computed later."""
    tokens = batch["labels"].numel()
    if MARKS_COLUMN not in batch:
        return batch, tokens
    answers = int(batch["decoder_segment_ids"].amax(1).sum()) if "segment_ids" in batch else len(batch["labels"])
    return batch | {REFERENCE: torch.zeros(answers, device=batch["labels"].device)}, Items(tokens, tokens)


def step_in_memory(
    recipe: TrainRecipe, rows: PaddedRows | PackedRows, objective: Seq2SeqObjective, accelerator: Accelerator
) -> Callable[[int], None]:
    """A trial for `largest_batch`: has in memory what a training step on the longest rows has. No weight changes."""
    device, dtype, lengths = accelerator.device, DTYPES[recipe.precision], rows.lengths
    weights = [weight for weight in objective.to(device).train().parameters() if weight.requires_grad]

    def trial(batch_size: int) -> None:
        optimizer = make_optimizer(objective.model, recipe)
        optimizer.make_state()
        buckets = [torch.empty_like(weight) for weight in weights if accelerator.num_processes > 1]  # DDP's
        numbers = longest_rows(lengths, batch_size)
        try:
            with torch.compiler.set_stance("force_eager"), torch.autocast(device.type, dtype, dtype != torch.float32):
                for _ in range(2):  # the second micro-batch has the gradients of the first one beside it
                    batch = {name: tensor.to(device) for name, tensor in rows.tensors(numbers).items()}
                    objective(*as_a_step(batch)).backward()
        finally:
            objective.zero_grad()
            del buckets

    return trial


def resolve_precision(recipe: TrainRecipe, device: torch.device) -> tuple[TrainRecipe, str | None]:
    """The recipe with bf16 or fp32 in place of `auto`, whichever trains faster here, measured in 50 ms; and a warning
    where it asks for a precision that is slower than half of fp32, as bf16 is on most CPUs (AMD Zen 3: 14 times)."""
    if recipe.weights == "bf16":
        return replace(recipe, precision="bf16"), None
    if recipe.precision == "fp32" or device.type not in ("cpu", "cuda"):
        return replace(recipe, precision="fp32" if recipe.precision == "auto" else recipe.precision), None
    asked = "bf16" if recipe.precision == "auto" else recipe.precision
    times_faster = training_pace(device, DTYPES[asked]) / training_pace(device, torch.float32)
    if recipe.precision == "auto":
        return replace(recipe, precision="bf16" if times_faster > 1 else "fp32"), None
    if times_faster >= 0.5:
        return recipe, None
    return recipe, (
        f"precision is {asked}, which this machine computes {1 / times_faster:.0f} times slower than fp32. A new "
        f"run with precision auto takes the faster of bf16 and fp32."
    )


def set_attention(model: PreTrainedModel, wanted: str, precision: str, device: torch.device, is_packed: bool) -> None:
    """The implementation that is asked for or, by `auto`, the fastest one that keeps packed examples apart."""
    family = family_of(model)
    can_varlen = is_packed and family is not None and VARLEN in family.attentions
    if device.type == "cuda":  # the flash kernel knows no fp32, no position bias and no dropout
        can_varlen = can_varlen and family.gpu_varlen and precision != "fp32" and not model.config.attention_dropout
    usable = set(family.attentions if family and is_packed else ("eager", "sdpa", "flex_attention", VARLEN))
    usable -= set() if can_varlen else {VARLEN}
    usable -= set() if model._supports_sdpa else {"sdpa"}  # such as models whose scores are capped
    usable -= {"flex_attention"} if device.type == "cpu" else set()  # torch 2.13 has no backward pass of it there
    if wanted not in ("auto", *usable):
        raise UserError(
            f"attention is {wanted}, which cannot compute {'packed' if is_packed else 'padded'} rows of a "
            f"{model.config.model_type} here ({device.type}, {precision}). "
            f"Leave it at auto, or choose from: {', '.join(sorted(usable))}."
        )
    if wanted == "auto" and is_packed:
        preferred = model.config._attn_implementation
        wanted = VARLEN if can_varlen else preferred if preferred in family.attentions else family.attentions[0]
    if wanted == VARLEN:
        register_varlen()
    if wanted != "auto":
        model.set_attn_implementation(wanted)
