"""NEFTune (arXiv 2310.05914): noise in the embeddings while a model is trained."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from diptych.data_prep.rows.records import IGNORE_INDEX


@contextmanager
def noisy_embeddings(model: PreTrainedModel, batch: dict[str, torch.Tensor], alpha: float) -> Iterator[None]:
    """In this context, what the encoder and the decoder look up, (B, L, D), gets uniform noise of up to ±alpha / √(n ×
    D), with the example's n tokens. transformers' own hook takes a packed row for one example, and counts padding.

    Encoder and decoder may share a table: the encoder looks up first.
    """
    source = batch.get("segment_ids", batch.get("attention_mask"))
    target = batch.get("decoder_segment_ids", (batch["labels"] != IGNORE_INDEX).long())
    lengths: dict[nn.Module, list[torch.Tensor]] = {}
    for panel, segments in ((model.get_encoder(), source), (model.get_decoder(), target)):
        table = panel.get_input_embeddings() if isinstance(panel, PreTrainedModel) else panel.embed_tokens
        lengths.setdefault(table, []).append(_own_lengths(segments))

    def add_noise(table: nn.Module, _: tuple, output: torch.Tensor) -> torch.Tensor:
        if not lengths[table]:
            return output
        size = alpha / (lengths[table].pop(0) * output.shape[-1]).sqrt()
        return output + torch.empty_like(output).uniform_(-1, 1) * size[..., None].to(output.dtype)

    hooks = [table.register_forward_hook(add_noise) for table in lengths]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _own_lengths(segments: torch.Tensor) -> torch.Tensor:
    """(B, L) numbers of segments -> (B, L) how many tokens the segment of each token has; of padding, infinitely many,
    so that it gets no noise."""
    counts = torch.zeros(len(segments), int(segments.max()) + 1, device=segments.device)
    counts.scatter_add_(1, segments, torch.ones_like(segments, dtype=counts.dtype))
    counts[:, 0] = math.inf
    return counts.gather(1, segments)
