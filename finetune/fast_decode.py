"""Greedy decoding and sampling of a Diptych on a CPU, without what transformers' loop costs at each token.

    sequences = model.generate(**source, max_new_tokens=64, custom_generate=fast_decode)

transformers runs the encoder and makes the logits processors and stopping criteria; what is here takes the place of
its loop, and writes the same tokens. Of a token's time on two cores (61M weights, one row, fp32) less than a third is
work with weights; the rest goes to masks and positions made anew, caches that are copied to grow by one, outputs that
are wrapped and unwrapped. Here a step is what depends on the token: some thirty tensor operations a layer.

- Keys and values stand in tensors with room to spare. The source's masks and the target's rotations are made once.
- Query heads that share a key head are that head's queries: nothing is repeated.
- Several rows in fp32 are multiplied as W · xᵀ with xᵀ laid out anew: BLAS then reads both as they lie, and takes half
  to three quarters of the time. Weights are the model's own, so that there is nothing to keep in step.
- Rows that are finished leave the batch, when there are enough of them.

B rows, S source tokens, D width, K key/value heads, G query heads for each of them, E head size, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import EncoderDecoderCache
from transformers.generation import GenerationMode
from transformers.generation.streamers import BaseStreamer

from diptych.modeling import DiptychForConditionalGeneration
from diptych.modeling.modeling_diptych import DiptychAttention, DiptychMLP, rotate, source_ends

ROOM = 64
"""Tokens that a cache is made larger by, at least."""
DROPPED_AT = 3 / 4
"""Finished rows are dropped when no more than this part of a batch goes on: each time costs a copy of the caches."""


def can_decode_fast(model: PreTrainedModel, config: GenerationConfig, others: dict[str, Any]) -> bool:
    """Whether `fast_decode` writes what `generate` would with this config and these other arguments."""
    if type(model) is not DiptychForConditionalGeneration or model.device.type != "cpu" or model.training:
        return False
    decoder = model.config.decoder
    mode = config.get_generation_mode()
    return (
        decoder._attn_implementation in ("sdpa", "eager")
        and decoder.rope_parameters["rope_type"] not in ("dynamic", "longrope")  # they change with the length
        and mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        and config.eos_token_id is not None
        and config.use_cache is not False
        and not config.return_dict_in_generate
        and not config.cache_implementation
        and not config.prefill_chunk_size
        and others.keys() <= {"streamer", "stopping_criteria", "logits_processor"}
    )


def fast_decode(
    model: DiptychForConditionalGeneration,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    writes_to: BaseStreamer | None = None,
    **given: Any,
) -> torch.Tensor:
    """What `generate` calls in place of its own loop: prompts (B, P) → them and what was written, padded, (B, L).

    `writes_to` is told the prompts and then the tokens of each step, as `generate` tells its streamer, which it keeps
    to itself. What the model is `given` has no names here, since `generate` would take those for arguments of this
    function alone.
    """
    if writes_to is not None:
        writes_to.put(input_ids)
    names = ("encoder_outputs", "attention_mask", "decoder_attention_mask", "past_key_values")
    encoder_outputs, encoder_mask, decoder_mask, cache = (given.get(name) for name in names)
    outputs = model(
        encoder_outputs=encoder_outputs,
        attention_mask=encoder_mask,
        decoder_input_ids=input_ids,
        decoder_attention_mask=decoder_mask,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    step = Step(model, outputs.past_key_values, encoder_outputs, encoder_mask, decoder_mask)
    logits = outputs.logits[:, -1]
    (batch, length), pad = input_ids.shape, _pad_token(generation_config)
    sequences = F.pad(input_ids, (0, generation_config.max_length - length), value=pad)
    going_on = torch.ones(batch, dtype=torch.bool)
    rows = torch.arange(batch)  # rows[i] of the batch is row i of the step
    # What is drawn depends on who is drawn with, and a processor may have a mind of its own about each row.
    keeps_all = generation_config.do_sample or len(logits_processor) > 0
    while True:
        scores = logits_processor(sequences[:, :length], logits.float()) if logits_processor else logits
        if generation_config.do_sample:
            tokens = torch.multinomial(scores.float().softmax(-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        sequences[rows, length] = tokens.where(going_on[rows], pad)
        length += 1
        going_on &= ~stopping_criteria(sequences[:, :length], None)
        if writes_to is not None:
            writes_to.put(sequences[:, length - 1])
        if not going_on.any():
            break
        if not keeps_all and going_on.sum() <= DROPPED_AT * len(rows):
            kept = going_on[rows].nonzero().squeeze(1)
            step.keep(kept)
            rows = rows[kept]
        logits = step(sequences[rows, length - 1])
    if writes_to is not None:
        writes_to.end()
    return sequences[:, :length]


def _pad_token(config: GenerationConfig) -> int:
    """As transformers has it: an end token, where there is no padding token."""
    if config.pad_token_id is not None:
        return config.pad_token_id
    return config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id


class Step:
    """The decoder and the head over one more token of each row, after the model itself has read the prompts.

    For each layer `own` has the keys and values of the target so far, (2, B, K, room, E), of which `length` are
    filled; with the separate hinge `cross` has the source's, (2, B, K, S, E). With the merged hinge the source's stand
    first in `own`. Masks are added to scores: (B, 1, 1, room) and (B, 1, 1, S), or None where nothing is padding.
    """

    def __init__(
        self,
        model: DiptychForConditionalGeneration,
        cache: EncoderDecoderCache,
        encoder_outputs: Any,
        encoder_mask: torch.Tensor | None,
        decoder_mask: torch.Tensor | None,
    ):
        self.decoder, self.lm_head = model.get_decoder(), model.lm_head
        self.is_merged = model.config.decoder.cross_attention == "merged"
        target, source = (
            [torch.stack((layer.keys, layer.values)) for layer in side.layers]
            for side in (cache.self_attention_cache, cache.cross_attention_cache)
        )
        (batch, prompt), source_length = (target[0].shape[i] for i in (1, 3)), source[0].shape[3]
        self.own_mask, self.cross_mask = _additive(decoder_mask, model.dtype), _additive(encoder_mask, model.dtype)
        self.position = torch.tensor([[prompt]])
        if self.is_merged:
            target = [torch.cat(pair, dim=3) for pair in zip(source, target, strict=True)]
            source = []
            masks = [encoder_mask, decoder_mask]
            if any(mask is not None for mask in masks):
                lengths = (source_length, prompt)
                full = [torch.ones(batch, n) if m is None else m for m, n in zip(masks, lengths, strict=True)]
                self.own_mask = _additive(torch.cat(full, dim=1), model.dtype)
            # The target follows its source directly, whatever padding stands between them.
            read = prompt if decoder_mask is None else decoder_mask.sum(1, keepdim=True)
            self.position = read + source_ends(encoder_outputs.position_ids, encoder_mask, None, None)
        self.own, self.cross = target, source
        self.length = target[0].shape[3]
        self._make_room()

    def _make_room(self) -> None:
        """Doubles what there is for the target, and turns the angles of its positions into factors, (B or 1, L, E)."""
        more = max(ROOM, self.length)
        self.own = [F.pad(each, (0, 0, 0, more)) for each in self.own]
        if self.own_mask is not None:
            self.own_mask = F.pad(self.own_mask, (0, more))
        ahead = self.position + torch.arange(more)
        self.cos, self.sin = self.decoder.rotary_emb(self.own[0], ahead)
        self.first = self.length
        """Where the factors begin."""

    def keep(self, rows: torch.Tensor) -> None:
        """Goes on with these rows alone."""
        self.own, self.cross = ([each[:, rows] for each in side] for side in (self.own, self.cross))
        if self.own_mask is not None:
            self.own_mask = self.own_mask[rows]
        if self.cross_mask is not None:
            self.cross_mask = self.cross_mask[rows]
        if len(self.position) > 1:
            self.position, self.cos, self.sin = self.position[rows], self.cos[rows], self.sin[rows]

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """The token that was written last in each row, (B,) → logits (B, V)."""
        if self.length == self.own[0].shape[3]:
            self._make_room()
        place = self.length - self.first
        rotation = self.cos[:, place : place + 1], self.sin[:, place : place + 1]
        self.length += 1
        self.position = self.position + 1
        own_mask = None if self.own_mask is None else self.own_mask[..., : self.length]
        hidden = self.decoder.embed_tokens(tokens)
        for index, layer in enumerate(self.decoder.layers):
            attended = self._write_and_attend(
                index, layer.self_attn, layer.input_layernorm(hidden), rotation, own_mask
            )
            hidden = hidden + attended
            if not self.is_merged:
                normed = layer.cross_attention_layernorm(hidden)
                query = _heads(layer.cross_attn, layer.cross_attn.q_proj, normed)
                query = layer.cross_attn.q_norm(query)
                hidden = hidden + _attend(layer.cross_attn, query, self.cross[index], self.cross_mask)
            hidden = hidden + _feed_forward(layer.mlp, layer.post_attention_layernorm(hidden))
        return _project(self.lm_head, self.decoder.norm(hidden)).contiguous()

    def _write_and_attend(
        self,
        index: int,
        attention: DiptychAttention,
        normed: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        query = attention.q_norm(_heads(attention, attention.q_proj, normed))
        key = attention.k_norm(_heads(attention, attention.k_proj, normed))
        if attention.has_rope:
            query, key = _rotate(query, *rotation), _rotate(key, *rotation)
        own = self.own[index]
        own[0, :, :, self.length - 1] = key
        own[1, :, :, self.length - 1] = _heads(attention, attention.v_proj, normed)
        return _attend(attention, query, own[:, :, :, : self.length], mask)


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """1 and 0 (B, L) → 0 and -inf (B, 1, 1, L); None if nothing is masked."""
    if mask is None or mask.bool().all():
        return None
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(mask == 0, -torch.inf)[:, None, None]


def _heads(attention: DiptychAttention, layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """(B, D) → (B, heads, E)."""
    return _project(layer, states).unflatten(-1, (-1, attention.head_dim))


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(B, heads, E), factors (B or 1, 1, E): all heads of a row stand at the same position."""
    return rotate(states.unsqueeze(2), cos, sin).squeeze(2)


def _attend(
    attention: DiptychAttention, query: torch.Tensor, keys_and_values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Queries (B, K × G, E), what they look at (2, B, K, L, E) → (B, D)."""
    groups = query.contiguous().unflatten(1, (-1, attention.num_key_value_groups))
    attended = F.scaled_dot_product_attention(groups, *keys_and_values, attn_mask=mask, scale=attention.scaling)
    return _project(attention.o_proj, attended.flatten(1))


def _feed_forward(mlp: DiptychMLP, states: torch.Tensor) -> torch.Tensor:
    gated = mlp.act_fn(_project(mlp.gate_proj, states)) * _project(mlp.up_proj, states)
    return _project(mlp.down_proj, gated)


def _project(layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """(B, in) → (B, out), for several rows laid out column by column; what is no plain layer does it by itself."""
    if type(layer) is not nn.Linear or states.dtype != torch.float32 or len(states) == 1:
        return layer(states)
    projected = torch.mm(layer.weight, states.t().contiguous()).t()
    return projected if layer.bias is None else projected + layer.bias
