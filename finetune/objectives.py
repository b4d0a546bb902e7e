"""The loss: cross-entropy summed over target tokens ÷ the target tokens of the whole optimizer step.

    objective = Seq2SeqObjective(model)
    loss = objective(batch, num_items_in_batch=target_tokens_of_the_step)      batch: see batches.pad_batch

The number is counted before the first forward, over all micro-batches and all ranks, so that however a step is cut its
gradient is the same; the mean of micro-batch means, which is what most trainers compute, weighs tokens in short
batches more. Model and loss are one module, so that what DDP or FSDP wraps has a normal forward.

The logits (B × T × V) are never held: the head is applied to the target tokens alone, padding left out, in chunks of
LOGITS_AT_ONCE, each computed again in the backward pass. For 2048 tokens, 512 wide, 250,000 words, fp32 on one core
(benchmarks/loss.py): plain 31 s and 5.9 GB, chunked 49 s and 1.5 GB. torch.nn.functional.linear_cross_entropy (2.13)
took 129 s and 1.0 GB, and knows neither soft-capped logits nor adapters.

B rows, T target tokens, D width, V vocabulary, N target tokens picked from B × T.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from diptych.data_prep.records import IGNORE_INDEX
from diptych.finetune.families import family_of, without_adapter

LOGITS_AT_ONCE = 2**24
"""64 MiB in fp32: large enough for full speed, small beside any model."""


class Seq2SeqObjective(nn.Module):
    """A model with its loss. Labels are smoothed in training only: validation is in plain nats per target token."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        label_smoothing: float = 0.0,
        compiled: bool = False,
        logits_at_once: int = LOGITS_AT_ONCE,
    ):
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        self.logits_at_once = logits_at_once
        self.family = family_of(model)
        self.hidden_states = self.family.hidden_states if self.family else _plain_logits
        if compiled:  # the model alone: the number of target tokens differs from batch to batch
            self.hidden_states = torch.compile(self.hidden_states, dynamic=True)

    def forward(self, batch: dict[str, torch.Tensor], num_items_in_batch: int) -> torch.Tensor:
        """`batch` as pad_batch makes it, labels (B, T) with IGNORE_INDEX where there is no target -> a scalar."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        is_target = batch["labels"] != IGNORE_INDEX
        labels = batch["labels"][is_target]
        smoothing = self.label_smoothing if self.training else 0.0
        if self.family is None:
            logits = self.hidden_states(self.model, inputs)[is_target]
            return _cross_entropy(logits, labels, smoothing) / num_items_in_batch
        model = without_adapter(self.model)
        states = self.hidden_states(model, inputs)[is_target]
        tokens_at_once = max(1, self.logits_at_once // model.get_output_embeddings().weight.shape[0])
        total = chunked_cross_entropy(
            states, labels, lambda chunk: self.family.logits(model, chunk), tokens_at_once, smoothing
        )
        return total / num_items_in_batch


def chunked_cross_entropy(
    states: torch.Tensor,
    labels: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    tokens_at_once: int,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """states (N, D), labels (N,), head (n, D) -> (n, V): the summed cross-entropy. No targets at all give a zero that
    still has a gradient, which is what a rank without rows contributes."""

    def loss_of(chunk: torch.Tensor, chunk_labels: torch.Tensor) -> torch.Tensor:
        return _cross_entropy(head(chunk), chunk_labels, label_smoothing)

    chunks = list(zip(states.split(tokens_at_once), labels.split(tokens_at_once), strict=True))
    if len(chunks) == 1 or not torch.is_grad_enabled():
        return sum(loss_of(*chunk) for chunk in chunks)
    return sum(checkpoint(loss_of, *chunk, use_reentrant=False) for chunk in chunks)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Summed, in fp32 whatever the logits are in: a sum of 100,000 words' exponentials is no place for 8 bits."""
    return F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=label_smoothing)


def _plain_logits(model: PreTrainedModel | PeftModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch, use_cache=False).logits
