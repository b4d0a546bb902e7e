"""transformers' Seq2SeqTrainer on packed rows, with a loss that does not depend on how a step is divided.

    trainer = PackedSeq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments("out", per_device_train_batch_size=4, gradient_accumulation_steps=8),
        train_dataset=rows,                        `input_ids` and `labels`, or the folder of a `diptych prepare`
        eval_dataset=validation_rows,
        processing_class=tokenizer,
    )
    trainer.train()

The loss of an optimizer step is summed over its target tokens and divided by their number, over all micro-batches and
ranks. Seq2SeqTrainer does this for some models only: T5, BART, M2M100 and others accept `num_items_in_batch` and do
not use it, so that 8 micro-batches give a loss 8 times too large, whose gradient gives short batches too much weight.

All else is the Trainer's: callbacks, trackers, checkpoints, DeepSpeed, hyper-parameter search, push_to_hub, generation
in evaluation. `per_device_train_batch_size` counts packed rows, each of which holds several examples.
"""

import functools
import inspect
import os
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.packing.budgets import choose_budget
from diptych.data_prep.packing.fill_rows import pack
from diptych.data_prep.packing.packed_row import assemble_row
from diptych.data_prep.packing.unpacked_families import reason_not_packed
from diptych.data_prep.rows.records import IGNORE_INDEX
from diptych.data_prep.text_to_ids.languages import codes_of
from diptych.data_prep.text_to_ids.two_vocabularies import padding_id
from diptych.finetune.batches.packed_rows import PACKED_COLUMNS, packed_batch
from diptych.finetune.batches.padded_rows import (
    check_rows_fit,
    drop_repeated_start,
    load_prepared,
    pad_batch,
    row_lengths,
)
from diptych.finetune.model.families import decoder_start_token, family_of, without_adapter
from diptych.finetune.model.global_attention import attend_globally
from diptych.finetune.model.loss import Seq2SeqObjective
from diptych.finetune.training.training_batches import set_attention

logger = logging.get_logger(__name__)


class PackedSeq2SeqTrainer(Seq2SeqTrainer):
    """
    Args:
        train_dataset, eval_dataset: tokenised rows, a `Dataset` with `input_ids` and `labels` as
            DataCollatorForSeq2Seq takes them. For training also the folder that `diptych prepare` wrote, whose train
            rows are packed here. `eval_dataset` may be a dict of several. Evaluation is on padded rows.
        processing_class: the tokenizer, whose padding token is used.
        packed: False trains on padded rows, with the same loss.
        packed_source_tokens, packed_target_tokens: room of a packed row; chosen from the lengths where not given.
        others: as those of Seq2SeqTrainer, except `data_collator`: the batches are made here.

    Raises:
        UserError: rows that the model cannot read, or settings with which the loss would be another one.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: Seq2SeqTrainingArguments | None = None,
        train_dataset: Dataset | str | Path | None = None,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        processing_class: Any = None,
        *,
        packed: bool = True,
        packed_source_tokens: int | None = None,
        packed_target_tokens: int | None = None,
        **others: Any,
    ):
        args = args or Seq2SeqTrainingArguments()
        check_arguments(args, processing_class, others)
        self._is_packed = packed
        if isinstance(train_dataset, (str, os.PathLike)):
            prepared = load_prepared(os.fspath(train_dataset))
            if prepared.preferences:
                raise UserError(
                    f"{train_dataset} has two answers to each source, and this trainer learns targets. Train with"
                    f" `diptych train --objective dpo` (or simpo, cpo, orpo, kto), or prepare with --map"
                    f" output=chosen."
                )
            train_dataset = prepared.splits["train"]
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **others,
        )
        self.label_smoother = None  # the objective smooths, in training alone
        self.model_accepts_loss_kwargs = True  # so that the Trainer counts `num_items_in_batch` over the whole step
        if model is not None:
            self._make_ready(model)
        base = without_adapter(self.model)
        ids = padding_id(processing_class), decoder_start_token(base)
        self.data_collator = functools.partial(collate, pad_token_id=ids[0], decoder_start_token_id=ids[1])
        ready = functools.partial(ready_rows, model=base, tokenizer=processing_class)
        if isinstance(eval_dataset, Mapping):
            self.eval_dataset = {name: ready(split, name) for name, split in eval_dataset.items()}
        elif eval_dataset is not None:
            self.eval_dataset = ready(eval_dataset, "eval")
        if train_dataset is not None:
            self.train_dataset = ready(train_dataset, "train")
            if self._is_packed:
                seed = args.seed if args.data_seed is None else args.data_seed
                self.train_dataset = PackedExamples(
                    self.train_dataset, packed_source_tokens, packed_target_tokens, seed, *ids
                )

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """With `model_init`, a model for each trial of a search."""
        model = super().call_model_init(trial)
        self._make_ready(model)
        return model

    def _make_ready(self, model: nn.Module) -> None:
        base = without_adapter(model)
        family, kind = family_of(base), base.config.model_type
        if self._is_packed and not (family and family.attentions):
            why = reason_not_packed(kind) or f"how packed rows are fed to a {kind} is not known"
            logger.warning(f"Rows are padded: {why}.")
            self._is_packed = False
        attend_globally(base)
        precision = "bf16" if self.args.bf16 else "fp16" if self.args.fp16 else "fp32"
        set_attention(base, "auto", precision, self.args.device, self._is_packed)
        compute_loss_in_forward(model, self.args.label_smoothing_factor)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Seq2SeqLMOutput]:
        """Summed cross-entropy ÷ `num_items_in_batch`, × the number of ranks, whose gradients DDP averages."""
        if return_outputs:  # logits are asked for: the model's own forward, and its mean
            outputs = model(**inputs)
            return outputs.loss, outputs
        if num_items_in_batch is None:
            return model(**inputs, num_items_in_batch=target_tokens(inputs)).loss
        return model(**inputs, num_items_in_batch=num_items_in_batch).loss * self.accelerator.num_processes

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[torch.Tensor | None, Any, torch.Tensor | None]:
        """The loss of a batch is the sum over its target tokens; `evaluation_loop` divides by their number."""
        if prediction_loss_only:
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad(), self.compute_loss_context_manager():
                loss, outputs, labels = self.compute_loss(model, inputs).detach(), None, None
        else:
            loss, outputs, labels = super().prediction_step(
                model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs
            )
        if loss is not None:
            tokens = target_tokens(inputs)
            loss = loss * tokens
            self._evaluated += np.array([1, tokens]) * bool(loss.isfinite())
        return loss, outputs, labels

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The loss is the mean over target tokens; the Trainer's is the mean over batches. Rows that accelerate
        repeats, so that all ranks have equally many, count twice in both."""
        self._evaluated = np.zeros(2, dtype=np.int64)  # batches, target tokens
        found = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        evaluated = torch.tensor(self._evaluated, device=self.args.device)
        batches, tokens = self.accelerator.reduce(evaluated).tolist()
        if (name := f"{metric_key_prefix}_loss") in found.metrics:
            found.metrics[name] *= batches / max(1, tokens)
        return found

    def _set_signature_columns_if_needed(self) -> None:
        """Rows keep the columns that our batches are made of, whether the model has such an argument or not."""
        self._signature_columns = [*PACKED_COLUMNS, "decoder_start"]


def target_tokens(inputs: Mapping[str, torch.Tensor]) -> int:
    return max(1, int((inputs["labels"] != IGNORE_INDEX).sum()))


def check_arguments(args: Seq2SeqTrainingArguments, tokenizer: Any, others: Mapping[str, Any]) -> None:
    for name in ("data_collator", "compute_loss_func"):
        if others.get(name) is not None:
            raise UserError(f"PackedSeq2SeqTrainer takes no {name}: batches and loss are its own. Leave it out.")
    if getattr(tokenizer, "pad_token_id", None) is None:
        raise UserError("PackedSeq2SeqTrainer needs processing_class=tokenizer, a tokenizer with a padding token.")
    if not args.average_tokens_across_devices:
        raise UserError(
            "average_tokens_across_devices is False: the loss would be the mean of each rank's mean. Leave it at True."
        )
    if args.n_gpu > 1:
        raise UserError(
            f"{args.n_gpu} GPUs in one process would be torch.nn.DataParallel. Start one process for each, with "
            f"`accelerate launch` or `torchrun`."
        )


def ready_rows(split: Dataset, name: str, model: PreTrainedModel, tokenizer: Any) -> Dataset:
    """The rows, checked, with no other columns, and without a first label that the decoder starts with anyway."""
    if not isinstance(split, Dataset):
        raise UserError(
            f"the {name} rows are a {type(split).__name__}. Give a datasets.Dataset with input_ids and labels (from a"
            f" list of dicts: Dataset.from_list), or as train_dataset the folder of a `diptych prepare`."
        )
    if missing := [column for column in ("input_ids", "labels") if column not in split.column_names]:
        raise UserError(
            f"the {name} rows have no column {missing[0]}; they have {', '.join(split.column_names)}. Tokenise them, "
            f"or prepare them with `diptych prepare`."
        )
    split = split.select_columns(["input_ids", "labels"])
    check_rows_fit(model, {name: split})
    return drop_repeated_start(split, decoder_start_token(model), codes_of(tokenizer).starts)


class PackedExamples(torch.utils.data.Dataset):
    """Packed rows: item k has the columns of row k, as `assemble_row` makes them."""

    def __init__(
        self, split: Dataset, source_tokens: int | None, target_tokens: int | None, seed: int, *token_ids: int
    ):
        lengths = row_lengths(split)
        self.budget = choose_budget(*lengths, source_tokens, target_tokens)
        self.split, self.rows, self.token_ids = split, pack(*lengths, self.budget, seed), token_ids

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        return assemble_row(self.split.select(self.rows[row]).to_list(), self.budget, *self.token_ids)


def collate(
    rows: Sequence[Mapping[str, Any]], pad_token_id: int, decoder_start_token_id: int
) -> dict[str, torch.Tensor]:
    """Packed rows as packed_rows.py shows them, or examples as padded_rows.py does."""
    if "segment_ids" not in rows[0]:
        return pad_batch(rows, pad_token_id, decoder_start_token_id)
    return packed_batch({name: np.stack([row[name] for row in rows]) for name in rows[0]})


def compute_loss_in_forward(model: PreTrainedModel | nn.Module, label_smoothing: float) -> None:
    """Gives this instance another `forward`, as accelerate does for mixed precision. Called with `num_items_in_batch`
    it computes our loss, packed or padded; otherwise it is the model's own. What DDP, FSDP and DeepSpeed wrap must run
    model and loss in one forward."""
    objective = Seq2SeqObjective(model, label_smoothing)
    own_forward = model.forward

    def forward(self: nn.Module, *inputs: Any, **named: Any) -> Any:
        if named.get("num_items_in_batch") is None:
            return own_forward(*inputs, **named)
        tokens = named.pop("num_items_in_batch")
        objective.training = self.training
        return Seq2SeqLMOutput(loss=objective(named, num_items_in_batch=tokens))

    forward.__signature__ = inspect.signature(type(model).forward)  # by which generate and the Trainer know it
    model.forward = types.MethodType(forward, model)
