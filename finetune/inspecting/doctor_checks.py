"""The checks of `diptych doctor`: a loaded checkpoint in; each is green, red with a remedy, a note, or does not apply.

    examine("batched = alone", patient)
    ->  CheckResult("green", "largest difference of a row 2.4e-07 nats/token", {"difference": 2.4e-07}, "")

A check is a function of the patient, and one line in CHECKS at the foot. If it needs what the checkpoint does not have
(finite weights, a start token), the patient raises DoesNotApply. All is computed in fp32 and without dropout on the
same eight rows.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate.utils import find_tied_parameters
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.packing.unpacked_families import reason_not_packed
from diptych.data_prep.text_to_ids.decoder_start import split_start
from diptych.data_prep.text_to_ids.encode import vocabulary_sizes
from diptych.data_prep.text_to_ids.templates import carried_template, golden_difference, stored_golden
from diptych.data_prep.text_to_ids.two_vocabularies import padding_id, target_side
from diptych.finetune.batches.packed_rows import pack_examples
from diptych.finetune.batches.padded_rows import pad_sources
from diptych.finetune.inference.generation import eager_attention, own_cache
from diptych.finetune.inference.generation_config import search_settings_ignored
from diptych.finetune.inspecting.doctor_rows import Row, Rows, built_in_rows, eight_of, random_rows
from diptych.finetune.inspecting.doctor_steps import (
    LOSS_TOLERANCE,
    Batch,
    ExaminedRows,
    LossAndGradients,
    agree,
    compare,
    compare_ranks,
    objective_step,
    trainer_step,
)
from diptych.finetune.model.families import (
    FAMILIES,
    decoder_start_token,
    embedding_rows,
    family_of,
    input_and_output_tables,
)
from diptych.finetune.model.loading import lacking_most, load_model, position_limit
from diptych.finetune.model.loss import Seq2SeqObjective
from diptych.finetune.model.untrusted_files import conversion

COLUMNS = ("input_ids", "labels")
MICRO_BATCHES = 8
NEW_TOKENS = 16
LOGITS_TOLERANCE = 1e-4
FORCE_TIES = ("t5", "mt5", "umt5")
"""Their configs say tie_word_embeddings whatever is in config.json. If the file has a separate head, as in Flan-T5 and
mT5, transformers does not tie it."""


class CheckResult(NamedTuple):
    status: Literal["green", "red", "note", "not_applicable"]
    """note: what is wrong is not the checkpoint."""
    message: str
    measured: dict[str, Any] = {}
    remedy: str = ""


class DoesNotApply(Exception):
    """Why a check cannot be made."""


@dataclass
class Patient:
    """A checkpoint as it was loaded, and what several checks need of it."""

    name: str
    model: PreTrainedModel | None
    """In fp32 and in eval mode; None if only pickled weights are there, which are not read."""
    tokenizer: PreTrainedTokenizerBase | None
    given: Rows | None
    """The user's rows, if there are any."""
    config: PreTrainedConfig
    """As it was saved, with the dtype of the weights."""
    folder: Path
    """For temporary files."""

    @property
    def weights(self) -> PreTrainedModel:
        if self.model is None:
            raise DoesNotApply("the weights were not read")
        return self.model

    @property
    def vocabulary(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise DoesNotApply("the checkpoint has no tokenizer")
        return self.tokenizer

    @cached_property
    def not_finite(self) -> list[str]:
        return [name for name, weight in self.weights.named_parameters() if not weight.isfinite().all()]

    @property
    def sound(self) -> PreTrainedModel:
        """The model, if it can compute."""
        if self.not_finite:
            raise DoesNotApply("not measured: there are weights that are not finite")
        return self.weights

    @cached_property
    def all_rows(self) -> Rows:
        if self.given is not None:
            return self.given
        return random_rows(self.weights) if self.tokenizer is None else built_in_rows(self.tokenizer)

    @cached_property
    def step(self) -> ExaminedRows:
        """Eight rows that the model can read, with labels as training has them: without the start token."""
        limits, start = embedding_rows(self.weights), self.start_token
        kept = [
            row
            for row in self.all_rows.looked_at
            if all(
                row[it] and min(row[it]) >= 0 and max(row[it]) < end for it, end in zip(COLUMNS, limits, strict=True)
            )
        ]
        rows = eight_of(kept or random_rows(self.weights).looked_at, position_limit(self.weights))
        split = [split_start(row["labels"], start, self.tokenizer) for row in rows]
        rows = [
            row | {"labels": labels, "decoder_start": first} if labels else row
            for row, (first, labels) in zip(rows, split, strict=True)
        ]
        return ExaminedRows(rows, self.pad_token, start)

    @property
    def start_token(self) -> int:
        try:
            token = decoder_start_token(self.weights)
        except UserError:
            raise DoesNotApply("not measured: there is no decoder start token") from None
        if token >= embedding_rows(self.weights)[1]:
            raise DoesNotApply("not measured: the decoder start token has no embedding row")
        return token

    @property
    def pad_token(self) -> int:
        known = None if self.tokenizer is None else padding_id(self.tokenizer)
        known = self.weights.generation_config.pad_token_id if known is None else known
        return 0 if known is None or known >= min(embedding_rows(self.weights)) else known

    def batch(self, rows: list[Row] | None = None) -> Batch:
        """Of all rows, unless some are given."""
        return self.on_device(self.step.batch(self.step.rows if rows is None else rows))

    def on_device(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.weights.device) for name, tensor in batch.items()}

    @cached_property
    def objective(self) -> Seq2SeqObjective:
        return Seq2SeqObjective(self.sound).eval()

    def divided(self, batches: list[Batch]) -> LossAndGradients:
        return objective_step(self.objective, batches, self.step.target_tokens)

    @cached_property
    def whole_step(self) -> LossAndGradients:
        """All rows as one padded batch: what other ways are compared with."""
        return self.divided([self.batch()])

    @cached_property
    def saved(self) -> Path:
        self.sound.save_pretrained(self.folder / "saved")
        return self.folder / "saved"


def examine(name: str, patient: Patient) -> CheckResult:
    """Any error of a check is a red result, so that the other checks are still made."""
    try:
        return CHECKS[name](patient)
    except DoesNotApply as reason:
        return CheckResult("not_applicable", str(reason))
    except Exception as error:  # of any type: the checkpoint may be broken in any way
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = "Training or generation will meet the same error. See what it names."
        return CheckResult("red", f"failed: {first_line}", remedy=remedy)


def _judge(is_right: bool, message: str, remedy: str, measured: dict[str, Any] | None = None) -> CheckResult:
    return CheckResult("green" if is_right else "red", message, measured or {}, "" if is_right else remedy)


def _compared(figures: dict[str, float], remedy: str) -> CheckResult:
    loss, gradient, cosine = (
        f"{ratio:.6f}" if abs(ratio - 1) < 0.01 else f"{ratio:.3f}"
        for ratio in (figures["loss_ratio"], figures["gradient_ratio"], figures["cosine"])
    )
    return _judge(agree(figures), f"loss × {loss}, gradient × {gradient}, cosine {cosine}", remedy, figures)


def _of_the_trainer(figures: dict[str, float], remedy: str) -> CheckResult:
    result = _compared(figures, remedy)
    return result._replace(status="note") if result.status == "red" else result


# How a step is divided


def micro_batches(patient: Patient) -> CheckResult:
    figures = compare(patient.whole_step, patient.divided([patient.batch([row]) for row in patient.step.rows]))
    remedy = "Rows of one batch see each other in this model, or padding counts: train with batch_size: 1."
    return _compared(figures, remedy)


def ranks(patient: Patient) -> CheckResult:
    return _compared(
        compare_ranks("ours", patient.saved, patient.step, patient.folder),
        "DDP waits for weights that never get a gradient, and shares no others meanwhile. Freeze those (see below: "
        "each weight has a gradient), or train on one GPU.",
    )


def stock_trainer(patient: Patient) -> CheckResult:
    model, device = patient.sound, patient.sound.device
    step, folder = patient.step, patient.folder / "trainer"
    try:
        one, many = (trainer_step(model.cpu(), step, count, folder) for count in (1, MICRO_BATCHES))
    finally:
        model.to(device)
    return _of_the_trainer(
        compare(one, many),
        "Train with `diptych train`, which is right (above), or put "
        "diptych.PackedSeq2SeqTrainer in the Trainer's place. In the stock Trainer: give it compute_loss_func, summed "
        "cross-entropy / num_items_in_batch, and in each batch decoder_input_ids, by DataCollatorForSeq2Seq(model="
        "model). (model_accepts_loss_kwargs = False mends the size of the loss only, not the gradient's direction.)",
    )


def stock_trainer_ranks(patient: Patient) -> CheckResult:
    figures = compare_ranks("trainer", patient.saved, patient.step, patient.folder)
    return _of_the_trainer(figures, "As above: the Trainer takes the mean of each rank's mean, or a multiple of it.")


def packed(patient: Patient) -> CheckResult:
    model, family = patient.sound, family_of(patient.sound)
    if not (family and family.attentions):
        kind = model.config.model_type
        raise DoesNotApply(reason_not_packed(kind) or f"{kind} is padded: it is not in families.py")
    row = patient.on_device(pack_examples(*patient.step))
    can_pack = model.config._attn_implementation in family.attentions
    with nullcontext() if can_pack else eager_attention(model):  # which each family has
        together = patient.divided([row])
    remedy = "Train on padded rows, with packed: false: in a packed row examples see each other."
    return _compared(compare(patient.whole_step, together), remedy)


# Padding


@torch.no_grad()
def padding_side(patient: Patient) -> CheckResult:
    batch, tokens = patient.batch(), patient.step.target_tokens
    right = patient.objective(batch, tokens).item()
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    rolled = {
        name: torch.stack([row.roll(len(row) - length) for row, length in zip(batch[name], lengths, strict=True)])
        for name in ("input_ids", "attention_mask")
    }
    left = patient.objective(batch | rolled, tokens).item()
    difference = abs(left - right)
    measured = {"right": right, "left": left, "difference": left - right}
    if difference <= LOSS_TOLERANCE * max(1.0, abs(right)):
        return CheckResult("green", f"the loss differs by {difference:.1e} nats/token", measured)
    pads_left = patient.tokenizer is not None and patient.tokenizer.padding_side == "left"
    who = "the tokenizer pads left" if pads_left else "nothing here pads left"
    return _judge(
        not pads_left and math.isfinite(difference),
        f"on the left {difference:.2g} nats/token other; {who}",
        "Positions are counted from the row's start, and padding moves the text away from it. Write "
        '"padding_side": "right" into tokenizer_config.json (set on a loaded tokenizer, it would not be saved).',
        measured,
    )


@torch.no_grad()
def batched(patient: Patient) -> CheckResult:
    rows = patient.step.rows
    together = patient.objective.token_losses(patient.batch()).sum(dim=1)
    alone = torch.stack([patient.objective.token_losses(patient.batch([row])).sum() for row in rows])
    tokens = together.new_tensor([len(row["labels"]) for row in rows])
    differences, allowed = (together - alone).abs() / tokens, LOSS_TOLERANCE * (alone / tokens).clamp(min=1.0)
    largest = differences.max().item()
    return _judge(
        bool((differences <= allowed).all()),
        f"largest difference of a row {largest:.1e} nats/token",
        "What stands in padding changes the result: compute rows one by one, or look into the model's attention mask.",
        {"difference": largest},
    )


# Generation, saving


@torch.no_grad()
def cache(patient: Patient) -> CheckResult:
    model = patient.sound
    if model.config.model_type == "fsmt":
        raise DoesNotApply("without its cache, transformers' FSMT generates without a causal mask")
    sources = pad_sources([row["input_ids"] for row in patient.step.rows[::2]], patient.pad_token)
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "pad_token_id": patient.pad_token}
    settings |= {"output_logits": True, "return_dict_in_generate": True, "decoder_start_token_id": patient.start_token}
    settings |= patient.on_device(sources)
    with search_settings_ignored(model):
        cached = model.generate(**settings, **own_cache(model), use_cache=True)
        uncached = model.generate(**settings, use_cache=False)
    is_same = torch.equal(cached.sequences, uncached.sequences)
    logits, expected = (torch.stack(output.logits) for output in (cached, uncached))
    difference = (logits - expected).abs().max().item()
    return _judge(
        is_same and difference <= LOGITS_TOLERANCE * max(1.0, expected.abs().max().item()),
        f"{NEW_TOKENS} tokens {'the same' if is_same else 'differ'}, logits differ by {difference:.1e}",
        "Generate with use_cache=False: the model's cache changes what it says.",
        {"same_tokens": is_same, "difference": difference},
    )


@torch.no_grad()
def saved_and_loaded(patient: Patient) -> CheckResult:
    model = patient.sound
    inputs = {name: tensor for name, tensor in patient.batch().items() if name != "labels"}
    loaded = load_model(str(patient.saved), torch.float32).to(model.device).eval()
    logits, expected = (it(**inputs, use_cache=False).logits for it in (loaded, model))
    difference = (logits - expected).abs().max().item()
    ties_kept = sorted(find_tied_parameters(loaded)) == sorted(find_tied_parameters(model))
    same = "the same" if difference == 0 else f"differ by {difference:.1e}"
    return _judge(
        difference == 0 and ties_kept,
        f"logits {same}, ties {'kept' if ties_kept else 'changed'}",
        "What training saves is not what it trained: compare config.json with the model (tie_word_embeddings, dtype).",
        {"difference": difference, "ties_kept": ties_kept},
    )


# Tokens


def padding_token(patient: Patient) -> CheckResult:
    side = target_side(patient.vocabulary)
    pad, eos = side.pad_token_id, side.eos_token_id
    measured = {"pad_token_id": pad, "eos_token_id": eos}
    remedy = 'Give the tokenizer one: tokenizer.pad_token = "<pad>"; if it is new, model.resize_token_embeddings.'
    if pad is None:
        return CheckResult("red", "the tokenizer has no padding token", measured, remedy)
    why = "labels[labels == pad] = -100 leaves out every eos, and the model never learns to stop. "
    return _judge(pad != eos, f"pad {pad}, eos {eos}", why + remedy.replace("one:", "its own:"), measured)


def tokenizer_size(patient: Patient) -> CheckResult:
    tokens, rows = lacking_most(patient.weights, patient.vocabulary)
    sides = zip(vocabulary_sizes(patient.vocabulary), embedding_rows(patient.weights), strict=True)
    return _judge(
        tokens <= rows,
        "; ".join(f"{tokens:,} tokens, {rows:,} embedding rows" for tokens, rows in dict.fromkeys(sides)),
        f"Use the tokenizer that the model was trained with; or, if tokens were added, "
        f"model.resize_token_embeddings({tokens}), and train (`diptych train` with grow_vocabulary).",
        {"tokens": tokens, "embedding_rows": rows},
    )


def ids_in_range(patient: Patient) -> CheckResult:
    limits, rows = embedding_rows(patient.weights), patient.all_rows.looked_at
    largest = -1
    for row in rows:
        for column, limit in zip(COLUMNS, limits, strict=True):
            top, bottom = max(row[column], default=0), min(row[column], default=0)
            largest = max(largest, top)
            if top >= limit or bottom < 0:
                wrong = top if top >= limit else bottom
                message = f"{row['origin']}: {column} hold {wrong}, ids end at {limit - 1}"
                measured = {"rows": len(rows), "id": wrong, "embedding_rows": limit}
                return CheckResult("red", message, measured, "Prepare the data with the model's own tokenizer.")
    measured = {"rows": len(rows), "largest_id": largest}
    return CheckResult("green", f"{len(rows):,} rows, largest id {largest}", measured)


def start_token(patient: Patient) -> CheckResult:
    model = patient.weights
    generation, config = model.generation_config, getattr(model.config, "decoder_start_token_id", None)
    measured = {"config": config, "generation_config": generation.decoder_start_token_id}
    try:
        token = decoder_start_token(model)
    except UserError:
        remedy = "Set the id that the model was trained with in config.json and generation_config.json."
        return CheckResult("red", "there is none, so the model cannot begin to write", measured, remedy)
    disagree = config is not None and token != config
    return _judge(
        not disagree,
        f"{config} in config.json, but generation starts with {token}" if disagree else f"{token}",
        "Write the same id into config.json, which training by others reads, and generation_config.json.",
        measured,
    )


def labels_without_start(patient: Patient) -> CheckResult:
    start, rows = patient.start_token, patient.all_rows.looked_at
    repeated = [row["origin"] for row in rows if len(row["labels"]) > 1 and row["labels"][0] == start]
    return _judge(
        not repeated,
        f"{len(repeated):,} of {len(rows):,} rows begin with {start}" + (f", as {repeated[0]}" if repeated else ""),
        "The decoder starts with this token anyway, and would learn to write it once more. `diptych train` drops it; "
        "elsewhere drop it from the labels yourself.",
        {"rows": len(rows), "repeated": len(repeated)},
    )


def golden_rows(patient: Patient) -> CheckResult:
    tokenizer = patient.vocabulary
    template = carried_template(tokenizer, check=False)
    if template is None:
        raise DoesNotApply("the tokenizer carries no template")
    rows = len(stored_golden(tokenizer))
    if not rows:
        raise DoesNotApply(f"template '{template.name}' was saved without golden rows")
    difference = golden_difference(tokenizer, template)
    return _judge(
        not difference,
        difference or f"'{template.name}' gives {rows} golden rows to the token",
        "Prompts would differ from those of training. Put the tokenizer's files back as they were; if the "
        "change is wanted, attach_template(tokenizer, template), and save the tokenizer.",
        {"template": template.name, "rows": rows, "difference": difference},
    )


# Weights


def safetensors(patient: Patient) -> CheckResult:
    folder = Path(patient.name)
    if not folder.is_dir():
        return CheckResult("green", "read from the Hub as safetensors")
    files, pickles = (len(list(folder.glob(pattern))) for pattern in ("*.safetensors", "*.bin"))
    return _judge(
        files > 0,
        f"{files} safetensors, {pickles} pickled files",
        f"A pickle can run code, and is not read. If you trust it, convert it: {conversion(patient.name)}",
        {"safetensors": files, "pickles": pickles},
    )


def tied_weights(patient: Patient) -> CheckResult:
    model = patient.weights
    *tables, head = input_and_output_tables(model)
    is_shared = head.data_ptr() in {table.data_ptr() for table in tables}
    says = getattr(model.config, "tie_word_embeddings", None)  # an EncoderDecoderModel has a config for each panel
    measured = {"tie_word_embeddings": says, "head_is_input_table": is_shared}
    if says and model.config.model_type in FORCE_TIES and not is_shared:
        is_meant = not getattr(model.config, "scale_decoder_outputs", False)  # mT5 has no such field
        return _judge(
            is_meant,
            "the head is its own, as in Flan-T5 and mT5" if is_meant else "the head is apart, and is not to be",
            "The file holds a head of its own, but its logits are scaled as a shared table's: write "
            "scale_decoder_outputs: false into config.json if it was trained like Flan-T5; else drop the head.",
            measured,
        )
    apart = sorted(
        name
        for name, source in model.get_expanded_tied_weights_keys(all_submodels=True).items()
        if model.get_parameter(name).data_ptr() != model.get_parameter(source).data_ptr()
    )
    as_said = f"as config.json says: {'head and input table are one' if is_shared else 'the head is its own'}"
    return _judge(
        not apart,
        f"{apart[0]} is apart, though config.json ties it" if apart else as_said,
        "The file holds two tables that differ. If that is meant, write tie_word_embeddings: false into config.json; "
        "if not, go back to a checkpoint in which they were one.",
        measured | {"apart": apart},
    )


def finite(patient: Patient) -> CheckResult:
    found, count = patient.not_finite, sum(1 for _ in patient.weights.parameters())
    return _judge(
        not found,
        f"{found[0]} holds NaN or infinity" if found else f"all {count} tensors",
        f"Go back to a checkpoint before they went wrong. Not finite: {len(found)} of {count} tensors.",
        {"tensors": count, "not_finite": found},
    )


def gradients(patient: Patient) -> CheckResult:
    trained = [name for name, weight in patient.sound.named_parameters() if weight.requires_grad]
    without = [name for name in trained if name not in patient.whole_step.gradients]
    family = family_of(patient.sound)
    idle = [name for name in without if family and family.router_loss and ".experts." in name]
    without = [name for name in without if name not in idle]
    reached = f"all but {len(idle)} of experts without a token: " if idle else "all "
    return _judge(
        not without,
        f"{without[0]} gets none" if without else f"{reached}{len(trained) - len(idle)} tensors",
        f"Without a gradient nothing is learned, and several ranks wait for it. Without: {len(without)} of "
        f"{len(trained)}. Freeze them (requires_grad = False), or change the model.",
        {"tensors": len(trained), "without": without},
    )


def dtype(patient: Patient) -> CheckResult:
    saved, kind = patient.config.dtype, patient.config.model_type
    overflows = kind in FAMILIES and FAMILIES[kind].overflows_in_fp16
    name = "none" if saved is None else str(saved).removeprefix("torch.")
    return _judge(
        not (overflows and saved == torch.float16),
        "config.json names none" if saved is None else f"saved as {name}",
        f"Activations of {kind} grow beyond what fp16 holds (65,504), and become infinite. Start from an fp32 or bf16 "
        f"copy, and train with precision: bf16 or fp32.",
        {"dtype": name},
    )


CHECKS: dict[str, Callable[[Patient], CheckResult]] = {
    "8 micro-batches = 1 batch": micro_batches,
    "2 ranks = 1 rank": ranks,
    "HF Trainer: 8 = 1": stock_trainer,
    "HF Trainer: 2 ranks = 1": stock_trainer_ranks,
    "packed = separate": packed,
    "left = right padding": padding_side,
    "batched = alone": batched,
    "cached = uncached": cache,
    "saved = loaded": saved_and_loaded,
    "padding is not eos": padding_token,
    "tokenizer fits embeddings": tokenizer_size,
    "token ids in range": ids_in_range,
    "decoder start token": start_token,
    "labels do not repeat it": labels_without_start,
    "template renders as saved": golden_rows,
    "safetensors": safetensors,
    "tied weights": tied_weights,
    "finite weights": finite,
    "each weight has a gradient": gradients,
    "dtype": dtype,
}
