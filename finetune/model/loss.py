"""The loss: cross-entropy summed over target tokens ÷ the target tokens of the whole optimizer step.

    objective = Seq2SeqObjective(model)
    loss = objective(batch, num_items_in_batch=target_tokens_of_the_step)      batch: padded or packed, see batches.py

The number is counted before the first forward, over all micro-batches and ranks, so the gradient does not depend on
how a step is cut; the mean of micro-batch means, which most trainers compute, gives tokens in short batches more
weight. Model and loss are one module, so that what DDP or FSDP wraps has a normal forward.

All logits (B × T × V) are never in memory: the head is applied to target tokens only, in chunks of LOGITS_AT_ONCE. The
gradients for the states and the head are computed in closed form while a chunk's logits are there, so logits are
computed once and not again in the backward pass (the idea of Liger's fused loss, arXiv 2410.10989, with any head).
Figures are in benchmarks/RESULTS.md; torch.nn.functional.linear_cross_entropy (2.13) was slower, and has neither
soft-capped logits nor z-loss nor adapters.

B rows, T target tokens, D width, V vocabulary, N target tokens picked from B × T, n of them in a chunk.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedConfig, PreTrainedModel

from diptych.data_prep.rows.records import IGNORE_INDEX
from diptych.finetune.model.families import family_of, with_own_sources, without_adapter
from diptych.finetune.model.neftune import noisy_embeddings

LOGITS_AT_ONCE, TOKENS_AT_ONCE = 2**24, 256
"""64 MiB in fp32, but no fewer tokens than these: each chunk reads the head and its gradient once."""


class Extras(NamedTuple):
    """What training adds to cross-entropy; validation adds nothing."""

    label_smoothing: float = 0.0
    """Share of the target's probability that is spread over all words (arXiv 1512.00567)."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's denominator, against drifting logits (arXiv 2204.02311)."""


class Seq2SeqObjective(nn.Module):
    """A model with its loss. Extras and what routers add are for training only: validation is plain cross-entropy in
    nats."""

    has_all_streams = True
    """Whether a ProphetNet is trained on all its streams, or only on the first, with which it generates."""
    figure_names: tuple[str, ...] = ()
    """What a run logs beside the loss: see preferences/objective.py."""
    needs_divergence = False

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        tokens_at_once: int | None = None,
        neftune: float = 0.0,
    ):
        super().__init__()
        self.model = model
        self.neftune = neftune
        self.extras = Extras(label_smoothing, z_loss)
        self.tokens_at_once = tokens_at_once
        self.family = family_of(model)

    def forward(self, batch: dict[str, torch.Tensor], num_items_in_batch: int) -> torch.Tensor:
        """`batch` padded or packed, labels (B, T) with IGNORE_INDEX where there is no target -> a scalar. A batch
        without targets gives a zero that still has a gradient, which is what a rank without rows contributes."""
        is_noisy = self.training and self.neftune
        noise = noisy_embeddings(without_adapter(self.model), batch, self.neftune) if is_noisy else nullcontext()
        with noise:
            states, labels, head, routed = self._states_labels_and_head(batch)
        criterion = self._criterion(batch) if self.training else cross_entropy(Extras())
        loss = summed_loss(states, labels, head, criterion) / (num_items_in_batch * self._streams)
        # A mean over this batch, weighted by its share of the step's targets: over a step, these are one mean.
        return loss + routed * (batch["labels"] != IGNORE_INDEX).sum() / num_items_in_batch if self.training else loss

    @property
    def uses_all_weights(self) -> bool:
        """Whether each step gives each weight a gradient, so that DDP need not look for others."""
        return self.family is not None and self.family.uses_all_weights

    @property
    def _streams(self) -> int:
        """How often each target is predicted: ProphetNet's further streams do not see the last tokens before it."""
        config = self.model.config
        if config.model_type != "prophetnet" or config.disable_ngram_loss:
            return 1
        return config.ngram if self.training and self.has_all_streams else 1

    def _criterion(self, batch: dict[str, torch.Tensor]) -> "Criterion":
        """The loss of a batch's logits in training."""
        return cross_entropy(self.extras)

    @torch.no_grad()
    def token_losses(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Nats of each target token, (B, T), zero where there is none: what `forward` adds up in evaluation."""
        states, labels, head, _ = self._states_labels_and_head(batch)
        losses = states.new_zeros(len(labels), dtype=_at_least_fp32(states.dtype))
        for rows in head.chunks(len(labels)):
            losses[rows] = _loss_and_gradient_(
                _wide(head.logits_of(states[rows], head.weights)), labels[rows], Extras()
            )
        placed = losses.new_zeros(batch["labels"].shape)
        return placed.masked_scatter(batch["labels"] != IGNORE_INDEX, losses)

    def _states_labels_and_head(
        self, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, "Head", torch.Tensor | float]:
        """The decoder's states where there are targets (N, D), these targets (N,), what makes logits of states, and
        the routers' part of the loss."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        is_target = batch["labels"] != IGNORE_INDEX
        labels = batch["labels"][is_target]
        model = without_adapter(self.model)
        head = self.family and self.family.head(model)
        if head is None:  # its logits are there already, all of them
            logits = self.model(**with_own_sources(inputs), use_cache=False).logits[is_target]
            return logits, labels, Head({}, lambda chunk, weights: chunk, max(1, len(labels))), 0.0

        def logits_of(chunk: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.family.logits(model, functional_call(head, weights, (chunk,)))

        states, routed = self.family.states(model, inputs)
        states = states[is_target]
        if states.ndim == 3:  # of all streams, (N, streams, D)
            states = states[:, : self._streams].transpose(0, 1).flatten(0, 1)
            labels = labels.repeat(self._streams)
        vocabulary = model.get_output_embeddings().weight.shape[0]
        tokens_at_once = self.tokens_at_once or max(TOKENS_AT_ONCE, LOGITS_AT_ONCE // vocabulary)
        return states, labels, Head(dict(head.named_parameters()), logits_of, tokens_at_once), routed


def left_out_of_loss(config: PreTrainedConfig, label_smoothing: float) -> str:
    """A part of the model's own loss that is missing in training here; "" if there is none. (What routers add to it is
    part of the objective in training, as if output_router_logits were set, but not of validation.)"""
    if config.model_type == "prophetnet" and config.eps not in (0, label_smoothing):
        return f"eps: {config.eps:g} of its config, which is label_smoothing here ({label_smoothing:g})"
    return ""


class Head(NamedTuple):
    """From states to logits, with its weights as arguments."""

    weights: dict[str, torch.Tensor]
    logits_of: Callable[[torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]
    """States (n, D) and weights -> logits (n, V)."""
    tokens_at_once: int

    def chunks(self, tokens: int) -> Iterator[slice]:
        """Of nearly equal size."""
        count = -(-tokens // self.tokens_at_once)
        ends = [tokens * number // max(1, count) for number in range(count + 1)]
        return itertools.starmap(slice, itertools.pairwise(ends))


Criterion = Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor]
"""Logits (n, V) in fp32 or better, labels (n,), and which of all target tokens these are → the loss of each (n,); in
place, the logits become the gradient of the losses' sum."""


def cross_entropy(extras: Extras) -> Criterion:
    return lambda logits, labels, rows: _loss_and_gradient_(logits, labels, extras)


def summed_loss(states: torch.Tensor, labels: torch.Tensor, head: Head, criterion: Criterion) -> torch.Tensor:
    """States (N, D) and labels (N,) -> the sum of the criterion's losses, with gradients for states and head."""
    return _SummedLoss.apply(states, labels, head, criterion, torch.is_grad_enabled(), *head.weights.values())


class _SummedLoss(torch.autograd.Function):
    """States (N, D), labels (N,) and the head's weights -> the summed loss, whose gradients are worked out with it."""

    @staticmethod
    def forward(ctx, states, labels, head: Head, criterion: Criterion, is_training: bool, *weights):
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        wants = [is_training and tensor.requires_grad for tensor in (states, *weights)]
        given = {name: weight.detach().to(dtype) for name, weight in head.weights.items()}
        trained = [weight.requires_grad_() for weight, want in zip(given.values(), wants[1:], strict=True) if want]
        total = states.new_zeros((), dtype=_at_least_fp32(dtype))
        states_gradient = torch.zeros_like(states) if wants[0] else None
        weight_gradients = None
        room = None  # for a chunk's logits in fp32: allocated once, because allocating costs more than computing
        with torch.autocast(states.device.type, enabled=False):  # everything has its dtype already
            for rows in head.chunks(len(labels)):
                chunk = states[rows].detach().to(dtype)
                with torch.set_grad_enabled(any(wants)):
                    logits = head.logits_of(chunk.requires_grad_(wants[0]), given)
                wide = room = _wide(logits.detach(), room)
                total += criterion(wide, labels[rows], rows).sum()
                if any(wants):
                    logits_gradient = wide if wide.dtype == dtype else logits.detach().copy_(wide)
                    found = torch.autograd.grad(logits, [chunk] * wants[0] + trained, logits_gradient)
                    if wants[0]:
                        states_gradient[rows] = found[0]
                    weight_gradients = _added(weight_gradients, found[wants[0] :])
        if weight_gradients is None:  # there were no targets
            weight_gradients = [torch.zeros_like(weight) for weight in trained]
        ctx.save_for_backward(*[states_gradient] * wants[0], *weight_gradients)
        ctx.wants = wants
        return total

    @staticmethod
    def backward(ctx, total_gradient):
        found = iter(ctx.saved_tensors)
        states_gradient, *weight_gradients = [
            next(found).mul_(total_gradient) if wants else None for wants in ctx.wants
        ]
        return states_gradient, None, None, None, None, *weight_gradients


def _added(sums: list[torch.Tensor] | None, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """In fp32 at least: the head's gradient is a sum of many small ones."""
    if sums is None:
        return [part.to(_at_least_fp32(part.dtype)) for part in parts]
    return [whole.add_(part) for whole, part in zip(sums, parts, strict=True)]


def _wide(logits: torch.Tensor, room: torch.Tensor | None = None) -> torch.Tensor:
    """Logits in fp32 at least, because 100,000 exponentials are summed. Others are copied, into `room` if given."""
    dtype = _at_least_fp32(logits.dtype)
    if logits.dtype == dtype:
        return logits
    if room is None or len(room) < len(logits):
        room = torch.empty_like(logits, dtype=dtype)
    return room[: len(logits)].copy_(logits)


def _loss_and_gradient_(logits: torch.Tensor, labels: torch.Tensor, extras: Extras) -> torch.Tensor:
    """(n, V) and (n,) -> nats of each token (n,). In place, the logits become the gradient of the losses' sum:
    softmax − target, and what the extras add to it."""
    targets = logits.gather(1, labels[:, None])
    if extras.label_smoothing:
        targets = targets.lerp(logits.mean(dim=-1, keepdim=True), extras.label_smoothing)
    largest = logits.amax(dim=-1, keepdim=True)
    gradient = logits.sub_(largest).exp_()
    sums = gradient.sum(dim=-1, keepdim=True)
    norms = largest + sums.log()
    gradient.mul_((1 + 2 * extras.z_loss * norms) / sums)
    if extras.label_smoothing:
        gradient.sub_(extras.label_smoothing / logits.shape[-1])
    gradient.scatter_add_(1, labels[:, None], torch.full_like(targets, extras.label_smoothing - 1))
    return (norms - targets + extras.z_loss * norms.square())[:, 0]


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
