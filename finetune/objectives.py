"""The loss: cross-entropy summed over target tokens ÷ the target tokens of the whole optimizer step.

    objective = Seq2SeqObjective(model)
    loss = objective(batch, num_items_in_batch=target_tokens_of_the_step)      batch: padded or packed, see batches.py

The number is counted before the first forward, over all micro-batches and all ranks, so that however a step is cut its
gradient is the same; the mean of micro-batch means, which is what most trainers compute, weighs tokens in short
batches more. Model and loss are one module, so that what DDP or FSDP wraps has a normal forward.

The logits (B × T × V) are never held: the head is applied to the target tokens alone, padding left out, in chunks of
LOGITS_AT_ONCE. What a chunk's loss means for the states and for the head is worked out while its logits are there, in
closed form, so that they are computed once and not again in the backward pass (the idea of Liger's fused loss, arXiv
2410.10989, with any head). Figures are in benchmarks/RESULTS.md; torch.nn.functional.linear_cross_entropy (2.13) was
slower, and knows neither soft-capped logits nor z-loss nor adapters.

B rows, T target tokens, D width, V vocabulary, N target tokens picked from B × T, n of them in a chunk.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from diptych.data_prep.records import IGNORE_INDEX
from diptych.finetune.families import family_of, without_adapter

LOGITS_AT_ONCE = 2**23
"""32 MiB in fp32: large enough for the matrix product, small enough to be still in the cache when it is read."""


class Extras(NamedTuple):
    """What training adds to cross-entropy; validation adds nothing."""

    label_smoothing: float = 0.0
    """Share of the target's probability that is spread over all words (arXiv 1512.00567)."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's denominator, which keeps logits from drifting (arXiv 2204.02311)."""


class Seq2SeqObjective(nn.Module):
    """A model with its loss. What is added to cross-entropy is for training only: validation is in plain nats."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        logits_at_once: int = LOGITS_AT_ONCE,
    ):
        super().__init__()
        self.model = model
        self.extras = Extras(label_smoothing, z_loss)
        self.logits_at_once = logits_at_once
        self.family = family_of(model)

    def forward(self, batch: dict[str, torch.Tensor], num_items_in_batch: int) -> torch.Tensor:
        """`batch` padded or packed, labels (B, T) with IGNORE_INDEX where there is no target -> a scalar. A batch
        without targets gives a zero that still has a gradient, which is what a rank without rows contributes."""
        states, labels, head = self._states_labels_and_head(batch)
        extras = self.extras if self.training else Extras()
        weights = list(head.weights.values())
        total = _SummedLoss.apply(states, labels, head, extras, torch.is_grad_enabled(), *weights)
        return total / num_items_in_batch

    @torch.no_grad()
    def token_losses(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Nats of each target token, (B, T), zero where there is none: what `forward` adds up in evaluation."""
        states, labels, head = self._states_labels_and_head(batch)
        losses = [
            _losses(head(chunk, head.weights), targets, Extras())
            for chunk, targets in zip(
                states.split(head.tokens_at_once), labels.split(head.tokens_at_once), strict=True
            )
        ]
        placed = losses[0].new_zeros(batch["labels"].shape)
        return placed.masked_scatter(batch["labels"] != IGNORE_INDEX, torch.cat(losses))

    def _states_labels_and_head(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, "Head"]:
        """The decoder's states where there are targets (N, D), these targets (N,), and what makes logits of states."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        is_target = batch["labels"] != IGNORE_INDEX
        labels = batch["labels"][is_target]
        if self.family is None:  # its logits are there already, all of them
            logits = self.model(**inputs, use_cache=False).logits[is_target]
            return logits, labels, Head({}, lambda chunk, weights: chunk, max(1, len(labels)))
        model = without_adapter(self.model)

        def logits_of(chunk: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.family.logits(model, functional_call(model.lm_head, weights, (chunk,)))

        states = self.family.states(model, inputs)[is_target]
        tokens_at_once = max(1, self.logits_at_once // model.get_output_embeddings().weight.shape[0])
        return states, labels, Head(dict(model.lm_head.named_parameters()), logits_of, tokens_at_once)


class Head(NamedTuple):
    """From states to logits, with its weights as arguments."""

    weights: dict[str, torch.Tensor]
    logits_of: Callable[[torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]
    """States (n, D) and weights -> logits (n, V)."""
    tokens_at_once: int

    def __call__(self, states: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.logits_of(states, weights)


class _SummedLoss(torch.autograd.Function):
    """States (N, D), labels (N,) and the head's weights -> the summed loss, whose gradients are worked out with it."""

    @staticmethod
    def forward(ctx, states, labels, head: Head, extras: Extras, is_training: bool, *weights):
        dtype = _compute_dtype(states)
        wants = [is_training and tensor.requires_grad for tensor in (states, *weights)]
        given = {name: weight.detach().to(dtype) for name, weight in head.weights.items()}
        trained = [weight.requires_grad_() for weight, want in zip(given.values(), wants[1:], strict=True) if want]
        total = states.new_zeros((), dtype=_at_least_fp32(dtype))
        of_states = torch.zeros_like(states) if wants[0] else None
        of_trained = [torch.zeros_like(weight, dtype=_at_least_fp32(dtype)) for weight in trained]
        with torch.autocast(states.device.type, enabled=False):  # everything has its dtype already
            for start in range(0, len(labels), head.tokens_at_once):
                rows = slice(start, start + head.tokens_at_once)
                chunk = states[rows].detach().to(dtype)
                with torch.set_grad_enabled(any(wants)):
                    logits = head(chunk.requires_grad_(wants[0]), given)
                total += _losses(logits.detach(), labels[rows], extras).sum()
                if any(wants):
                    of_logits = _gradient(logits.detach(), labels[rows], extras)
                    found = torch.autograd.grad(logits, [chunk] * wants[0] + trained, of_logits)
                    if wants[0]:
                        of_states[rows] = found[0]
                    for whole, part in zip(of_trained, found[wants[0] :], strict=True):
                        whole += part
        ctx.save_for_backward(*[of_states] * wants[0], *of_trained)
        ctx.wants = wants
        return total

    @staticmethod
    def backward(ctx, of_total):
        found = iter(ctx.saved_tensors)
        of_states, *of_weights = [next(found) * of_total if wants else None for wants in ctx.wants]
        return of_states, None, None, None, None, *of_weights


def _losses(logits: torch.Tensor, labels: torch.Tensor, extras: Extras) -> torch.Tensor:
    """(n, V) and (n,) -> nats of each token (n,), in fp32 whatever the logits are in: a sum of 100,000 words'
    exponentials is no place for 8 bits."""
    logits = logits.to(_at_least_fp32(logits.dtype))
    norms = logits.logsumexp(dim=-1)
    targets = logits.gather(1, labels[:, None])[:, 0]
    if extras.label_smoothing:
        targets = torch.lerp(targets, logits.mean(dim=-1), extras.label_smoothing)
    return norms - targets + extras.z_loss * norms.square()


def _gradient(logits: torch.Tensor, labels: torch.Tensor, extras: Extras) -> torch.Tensor:
    """Of the sum of `_losses`, by the logits: softmax − target, (n, V), and what the extras add to it."""
    wide = logits.to(_at_least_fp32(logits.dtype))
    gradient = F.softmax(wide, dim=-1)
    if extras.z_loss:
        gradient *= 1 + 2 * extras.z_loss * wide.logsumexp(dim=-1, keepdim=True)
    if extras.label_smoothing:
        gradient -= extras.label_smoothing / logits.shape[-1]
    share = gradient.new_full((len(labels), 1), extras.label_smoothing - 1)
    return gradient.scatter_add_(1, labels[:, None], share).to(logits.dtype)


def _compute_dtype(states: torch.Tensor) -> torch.dtype:
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
