"""Packed rows in; for each of the three attention sites, which token may see which, as the chosen attention wants it.

    segment_ids          1  1  1  1 |  2  2  2 |  0      encoder   a token sees its own segment
    decoder_segment_ids  1  1  1 |  2  2 |  0            decoder   its own segment, up to itself
    cross_segment_ids    1  1  1 |  2  2 |  0            cross     the encoder segment that it belongs to

    attention           form of a mask
    eager, sdpa         dense, (B, 1, T, S), as transformers' masking_utils builds it
    flex_attention      BlockMask, likewise
    varlen              boundaries, (1, 1, 2, n + 1): where each segment of the queries and of the keys ends, rows laid
                        end to end:  [0 3 5 6] and [0 4 7 8]  for the cross site above

All forms travel as `attention_mask`, which every model of transformers hands on untouched when it has four dimensions.
"varlen" computes nothing outside the segments: on a GPU through torch.nn.attention.varlen (flash attention), elsewhere
segment by segment. On two CPU cores, 512 tokens in 9 segments, 8 heads, forward and backward in bf16: 3.3 ms, against
77 ms for sdpa with a dense mask.

B rows, S source tokens, T target tokens, H heads, E head size, n segments.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sdpa_mask,
)

from diptych.modeling.modeling_diptych import same_segment

VARLEN = "varlen"
Mask = torch.Tensor | BlockMask
LONGEST_SCORES = 1024
"""Tokens of a segment up to which its scores are held on a CPU; longer ones go through sdpa, which is slower there
and holds none."""


class SiteMasks(NamedTuple):
    """A mask for each attention site; by layer type where a model has sliding windows besides (T5Gemma)."""

    encoder: Mask | dict[str, Mask]
    decoder: Mask | dict[str, Mask]
    cross: Mask | dict[str, Mask]


def site_masks(model: PreTrainedModel, batch: dict[str, torch.Tensor], by_layer_type: bool = False) -> SiteMasks:
    """`segment_ids` (B, S), `decoder_segment_ids` (B, T) and, where sources are shared, `cross_segment_ids` (B, T)."""
    source, target = batch["segment_ids"], batch["decoder_segment_ids"]
    cross = batch.get("cross_segment_ids", target)
    if model.config._attn_implementation == VARLEN:
        return SiteMasks(boundaries(source, source), boundaries(target, target), boundaries(cross, source))
    dtype = model.dtype
    reading, writing = (segments.new_empty((*segments.shape, 0), dtype=dtype) for segments in (source, target))
    of_encoder = {"config": model.get_encoder().config, "inputs_embeds": reading, "attention_mask": None}
    of_encoder["and_mask_function"] = same_segment(source, source)
    of_decoder = {"config": model.get_decoder().config, "inputs_embeds": writing, "attention_mask": None}
    of_self = of_decoder | {"and_mask_function": same_segment(target, target), "past_key_values": None}
    of_cross = of_decoder | {"and_mask_function": same_segment(cross, source), "encoder_hidden_states": reading}
    masks = SiteMasks(
        create_bidirectional_mask(**of_encoder), create_causal_mask(**of_self), create_bidirectional_mask(**of_cross)
    )
    if not by_layer_type:
        return masks
    sliding = create_bidirectional_sliding_window_mask(**of_encoder), create_sliding_window_causal_mask(**of_self)
    return SiteMasks(
        {"full_attention": masks.encoder, "sliding_attention": sliding[0]},
        {"full_attention": masks.decoder, "sliding_attention": sliding[1]},
        {"full_attention": masks.cross},
    )


def boundaries(query_segments: torch.Tensor, key_segments: torch.Tensor) -> torch.Tensor:
    """Cumulative lengths of the segments of queries (B, T) and keys (B, S), stacked: (1, 1, 2, n + 1).

    Segments count 1, 2, 3 … in a row, on both sides alike, and padding stands at the end of a row: it becomes one
    segment more, whose queries see the padding of the other side, or nothing where there is none.

    Which lengths there are does not depend on the data: each row has as many entries as the row with most segments,
    the missing ones empty.
    """
    segments = int(max(query_segments.max(), key_segments.max()))
    numbers = torch.arange(1, segments + 1, device=query_segments.device)
    ends = []
    for segment_ids in (query_segments, key_segments):
        lengths = (segment_ids[:, :, None] == numbers).sum(dim=1)  # (B, segments)
        padding = segment_ids.shape[1] - lengths.sum(dim=1, keepdim=True)
        flat = torch.cat((lengths, padding), dim=1).flatten().cumsum(dim=0)
        ends.append(F.pad(flat, (1, 0)))
    return torch.stack(ends).to(torch.int32)[None, None]


def varlen_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention within the segments that `boundaries` marks: query (B, H, T, E), key and value (B, K, S, E) → output
    (B, T, H, E). With another mask, as padded rows and generation have it, it is sdpa.

    Args:
        position_bias: (1, H, T, S), what a T5 adds to its scores. It depends on the distance of two tokens alone, so
            that a segment's part is the corner of its size.

    Raises:
        ValueError: on a GPU, dropout or a position bias, which its kernel does not know.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        kwargs |= {"dropout": dropout, "scaling": scaling, "position_bias": position_bias}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("softcap") or kwargs.get("sliding_window"):
        raise ValueError("varlen attention knows neither soft-capped scores nor sliding windows: use eager or flex.")
    is_causal = getattr(module, "is_causal", False)
    tokens, heads, size = query.shape[0] * query.shape[2], query.shape[1], query.shape[3]
    flat = [states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)]  # (tokens, heads, E)
    scaling = size**-0.5 if scaling is None else scaling
    if query.is_cuda:
        if dropout or position_bias is not None:
            raise ValueError("varlen attention on a GPU has no attention dropout and no position bias: use sdpa.")
        longest = query.shape[2], key.shape[2]
        window = (-1, 0) if is_causal else (-1, -1)
        output = varlen_attn(
            *flat, *attention_mask[0, 0], *longest, scale=scaling, window_size=window, enable_gqa=True
        )
    else:
        ends = attention_mask[0, 0].tolist()
        output = _by_segments(*flat, ends, position_bias, scaling, dropout, is_causal)
    return output.view(query.shape[0], query.shape[2], heads, size) if tokens else output, None


def _by_segments(query, key, value, ends, position_bias, scaling, dropout, is_causal) -> torch.Tensor:
    """query (tokens, H, E), key and value (tokens, K, E): one small attention for each segment, laid end to end."""
    lengths = [[end - start for start, end in zip(side, side[1:], strict=False)] for side in ends]
    outputs = []
    for queries, keys, values in zip(
        query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True
    ):
        if not len(queries):
            continue
        if not len(keys):  # padding that finds no padding on the other side: nobody reads what comes out
            outputs.append(torch.zeros_like(queries))
            continue
        bias = None
        if position_bias is not None:
            bias = position_bias[:, :, : len(queries), : len(keys)].to(queries.dtype)
        if is_causal:
            ahead = queries.new_full((len(queries), len(keys)), torch.finfo(queries.dtype).min).triu(1)
            bias = ahead if bias is None else bias + ahead
        states = [part.transpose(0, 1)[None] for part in (queries, keys, values)]
        attended = _attend(*states, bias, scaling, dropout)
        outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)


def _attend(query, key, value, bias, scaling, dropout) -> torch.Tensor:
    """query (1, H, t, E), key and value (1, K, s, E), bias (… t, s) or None → (1, H, t, E)."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    if max(query.shape[2], key.shape[2]) > LONGEST_SCORES:
        return F.scaled_dot_product_attention(query, key, value, bias, dropout, scale=scaling)
    scores = query @ key.transpose(2, 3) * scaling
    weights = F.softmax(scores if bias is None else scores + bias, dim=-1).to(value.dtype)
    return F.dropout(weights, dropout) @ value if dropout else weights @ value


def register_varlen() -> None:
    """Makes "varlen" known to transformers, for `model.set_attn_implementation`."""
    AttentionInterface.register(VARLEN, varlen_attention_forward)
    AttentionMaskInterface.register(VARLEN, sdpa_mask)  # for rows that are padded
