"""Greedy decoding and sampling of a Diptych on a CPU, faster than transformers' loop. Greedy tokens are the same, and
samples have the same distribution.

    read = read_fast(model, **source)
    sequences = model.generate(**source, encoder_outputs=read, max_new_tokens=64, custom_generate=fast_decode)

transformers makes the logits processors and stopping criteria; this file replaces its loop, which makes masks and
positions anew for each token, copies caches to grow them by one token, and wraps outputs.

- The encoder reads a few rows at a time, so that a layer's tensors are small enough to be reused instead of requested
  from the system each time (32 rows of 512 tokens: 4.5 s → 2.9).
- Keys and values have spare room; masks of the source and rotations of the target are made once; query heads that
  share a key head are computed as that head's queries, without repeating keys.
- After a few steps the decoder's matrices are copied into oneDNN's own layout (43M weights, two cores of a Xeon:
  14.1 ms → 8.0 per step for 8 rows in fp32, 20.3 → 14.4 for 32, 4.2 → 2.2 for one row in bf16; the copy takes 35 ms).
- Finished rows leave the batch when there are enough of them.
- A sample takes one random number (`OneNumberPerRow`).
- With `prompt_lookup_num_tokens=n` and one row, n tokens are guessed from what followed the last tokens earlier, in
  the source or the target (arXiv 2304.04487), and checked in one step. transformers looks in the target only.

B rows, S source tokens, T new tokens, D width, K key/value heads, G query heads per key head, E head size, V
vocabulary.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import EncoderDecoderCache
from transformers.generation import GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutput

from diptych.modeling import DiptychForConditionalGeneration
from diptych.modeling.modeling_diptych import (
    CACHE_NAME,
    DiptychAttention,
    DiptychDecoderLayer,
    rotary_angles,
    rotate,
    source_ends,
    windowed_layers,
)

ROOM = 64
"""Tokens that a cache grows by, at least."""
LONGEST_LOOKED_UP = 2
"""The default of transformers for `max_matching_ngram_size`."""
READ_AT_ONCE = 1536
"""Source tokens, including padding, that the encoder reads at a time; a longer row is read alone."""
PACKED_FROM = {torch.float32: 4, torch.bfloat16: 1}
"""Rows of a product from which packed matrices are faster."""
PACKED_FOR = 32
"""The number of rows that oneDNN chooses its layout for."""
PACKED_AFTER = 5
"""Steps before packing, which costs as much as five to ten steps save."""
DROPPED_AT = 3 / 4
"""Finished rows are dropped once at most this part of the batch is unfinished; dropping copies the caches."""


def can_decode_fast(model: PreTrainedModel, config: GenerationConfig, others: dict[str, Any]) -> bool:
    """Whether `fast_decode` does what `generate` does with this config and these other arguments."""
    if type(model) is not DiptychForConditionalGeneration or model.device.type != "cpu" or model.training:
        return False
    decoder = model.config.decoder
    mode = config.get_generation_mode()
    if config.prompt_lookup_num_tokens and not config.do_sample and config.num_beams in (None, 1):
        mode = GenerationMode.GREEDY_SEARCH
    return (
        # Layers are not called here, so weights that are loaded only for a call would be missing. FSDP2 changes a
        # layer's class, accelerate's offloading its `forward`.
        all(type(it) is DiptychDecoderLayer and "forward" not in vars(it) for it in model.get_decoder().layers)
        and decoder._attn_implementation in ("sdpa", "eager")
        and decoder.attention_softcap is None  # which sdpa has not
        and decoder.rope_parameters["rope_type"] not in ("dynamic", "longrope")  # which change with the length
        and mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        and config.eos_token_id is not None
        and config.use_cache is not False
        and not config.return_dict_in_generate
        and not config.cache_implementation
        and not config.prefill_chunk_size
        and others.keys() <= {"streamer", "stopping_criteria", "logits_processor"}
    )


@torch.no_grad()
def read_fast(
    model: DiptychForConditionalGeneration, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> BaseModelOutput:
    """The encoder's outputs for sources (B, S), for `generate(encoder_outputs=…)`."""
    rows = max(1, READ_AT_ONCE // input_ids.shape[1])
    read = [
        model.get_encoder()(input_ids=ids, attention_mask=mask)
        for ids, mask in zip(input_ids.split(rows), attention_mask.split(rows), strict=True)
    ]
    return type(read[0])(**{name: torch.cat([part[name] for part in read]) for name in read[0]})


def fast_decode(
    model: DiptychForConditionalGeneration,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    writes_to: BaseStreamer | None = None,
    inputs_tensor: torch.Tensor | None = None,
    **given: Any,
) -> torch.Tensor:
    """Replaces the loop of `generate`: prompts (B, P) → prompts and new tokens, padded, (B, L).

    `writes_to` gets the prompts and then the tokens of each step; `generate` does not pass its own streamer on.
    `inputs_tensor` is the source (B, S). The other inputs of the model come as `given`, because `generate` would take
    named parameters for arguments of this function alone.

    Raises:
        ValueError: tokens are to be looked up for several rows.
    """
    if generation_config.prompt_lookup_num_tokens and len(input_ids) > 1:
        raise ValueError(
            f"prompt_lookup_num_tokens is for one row at a time, but there are {len(input_ids)}: batch_size 1."
        )
    if writes_to is not None:
        writes_to.put(input_ids)
    names = ("encoder_outputs", "attention_mask", "decoder_attention_mask", CACHE_NAME)
    encoder_outputs, encoder_mask, decoder_mask, cache = (given.get(name) for name in names)
    outputs = model(
        encoder_outputs=encoder_outputs,
        attention_mask=encoder_mask,
        decoder_input_ids=input_ids,
        decoder_attention_mask=decoder_mask,
        cache=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    step = DecoderStep(model, getattr(outputs, CACHE_NAME), encoder_outputs, encoder_mask, decoder_mask)
    logits = outputs.logits[:, -1]
    if generation_config.prompt_lookup_num_tokens:
        rules = (logits_processor, stopping_criteria, generation_config)
        return _decode_by_lookup(step, logits, inputs_tensor, input_ids, *rules, writes_to)
    (batch, length), pad = input_ids.shape, generation_config.pad_token_id
    if pad is None:  # as in transformers
        ends = generation_config.eos_token_id
        pad = ends[0] if isinstance(ends, list) else ends
    sequences = F.pad(input_ids, (0, generation_config.max_length - length), value=pad)
    unfinished = torch.ones(batch, dtype=torch.bool)
    rows = torch.arange(batch)  # row i of the step is row rows[i] of the batch
    keeps_all = len(logits_processor) > 0  # a processor may treat rows by their place
    while True:
        scores = logits_processor(sequences[:, :length], logits.float()) if logits_processor else logits
        if generation_config.do_sample:
            tokens = drawn(scores.float().softmax(-1), torch.rand(batch)[rows])
        else:
            tokens = likeliest(scores)
        sequences[rows, length] = tokens.where(unfinished[rows], pad)
        length += 1
        unfinished &= ~stopping_criteria(sequences[:, :length], None)
        if writes_to is not None:
            writes_to.put(sequences[:, length - 1])
        if not unfinished.any():
            break
        if not keeps_all and unfinished.sum() <= DROPPED_AT * len(rows):
            kept = unfinished[rows].nonzero().squeeze(1)
            step.keep(kept)
            rows = rows[kept]
        logits = step(sequences[rows, length - 1 : length])
    if writes_to is not None:
        writes_to.end()
    return sequences[:, :length]


def _decode_by_lookup(
    step: "DecoderStep",
    logits: torch.Tensor,
    source: torch.Tensor,
    sequence: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    config: GenerationConfig,
    writes_to: BaseStreamer | None,
) -> torch.Tensor:
    """The loop with prompt lookup, for one row, greedily: source (1, S), sequence (1, P) → (1, L)."""
    guesses: list[int] = []
    while True:
        # logits (1 + guesses, V): after the last token, then after each guess; valid as long as the guesses are right
        for after, scores in enumerate(logits.float()):
            token = likeliest(logits_processor(sequence, scores[None]))
            sequence = torch.cat((sequence, token[None]), dim=1)
            if writes_to is not None:
                writes_to.put(token)
            is_over = bool(stopping_criteria(sequence, None).all())
            if is_over or guesses[after : after + 1] != token.tolist():
                break
        if is_over:
            break
        step.forget(len(guesses) - after)
        before = [*source[0].tolist(), *sequence[0].tolist()]
        tokens = min(config.prompt_lookup_num_tokens, config.max_length - sequence.shape[1] - 1)
        guesses = look_up(before, tokens, config.max_matching_ngram_size or LONGEST_LOOKED_UP)
        logits = step(torch.tensor([[before[-1], *guesses]]))
    if writes_to is not None:
        writes_to.end()
    return sequence


class OneNumberPerRow(TorchFunctionMode):
    """Inside, `torch.multinomial` draws a token for each row of probabilities (B, V) from one random number. Its own
    way on CPUs draws one for each token of the vocabulary (512 rows of 4,000 tokens: 45 ms → 4)."""

    def __torch_function__(self, function: Any, types: Any, given: tuple = (), named: dict | None = None) -> Any:
        if function is not torch.multinomial or named != {"num_samples": 1} or given[0].device.type != "cpu":
            return function(*given, **(named or {}))
        [probabilities] = given
        return drawn(probabilities, torch.rand(len(probabilities)))[:, None]


def drawn(probabilities: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The tokens in whose part of the cumulative probability (B, V) the numbers (B,) from [0, 1) fall, (B,)."""
    sums = probabilities.cumsum(-1)
    if not sums[:, -1].isfinite().all():
        return torch.multinomial(probabilities, num_samples=1).squeeze(1)  # which raises, and says why
    # rounded, the sum need not be 1; a number has 24 bits, so its product with the sum is below the sum
    return torch.searchsorted(sums, (numbers * sums[:, -1])[:, None], right=True).squeeze(1)


def likeliest(scores: torch.Tensor) -> torch.Tensor:
    """(B, V) → (B,). numpy's argmax is six to ten times faster than torch's: 0.9 ms per step for 32 rows."""
    return torch.from_numpy(scores.float().numpy().argmax(-1))


def look_up(ids: list[int], tokens: int, longest: int) -> list[int]:
    """The tokens after the latest earlier occurrence of the last `longest` ids, or of fewer ids if there is none:
    `[5, 6, 7, 8, 5, 6]` -> `[7, 8]` for 2 tokens. [] if even the last id is new."""
    for length in range(min(longest, len(ids) - 1), 0, -1):
        end = ids[-length:]
        for start in range(len(ids) - length - 1, -1, -1):
            if ids[start : start + length] == end:
                return ids[start + length : start + length + tokens]
    return []


class DecoderStep:
    """One step of decoder and head over the next tokens of each row, after the model has read the prompts.

    Per layer `own` has the keys and values of the target so far, (2, B, K, room, E), of which `length` are filled.
    With separate cross-attention `cross` has those of the source, (2, B, K, S, E); with merged cross-attention they
    stand first in `own`. Masks are added to scores: (B, 1, 1, room) and (B, 1, 1, S), or None without padding.
    """

    def __init__(
        self,
        model: DiptychForConditionalGeneration,
        cache: EncoderDecoderCache,
        encoder_outputs: Any,
        encoder_mask: torch.Tensor | None,
        decoder_mask: torch.Tensor | None,
    ):
        self.decoder, self.lm_head, self.finished_logits = model.get_decoder(), model.lm_head, model.finished_logits
        config = model.config.decoder
        self.is_merged = config.cross_attention == "merged"
        self.window, self.windowed = config.attention_window, windowed_layers(config)
        self.source_positions = encoder_outputs.position_ids if self.is_merged else None
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
            # Positions of the target follow those of its source directly, without the padding in between.
            read = prompt if decoder_mask is None else decoder_mask.sum(1, keepdim=True)
            self.position = read + source_ends(encoder_outputs.position_ids, encoder_mask, None, None)
        self.own, self.cross = target, source
        self.steps, self.packed = 0, {}
        self.first = self.length = target[0].shape[3]
        self._make_room()

    def _make_room(self) -> None:
        """Doubles the room for the target, and makes cos and sin of its positions, (B or 1, L, E), for windowed layers
        and for others."""
        more = max(ROOM, self.length)
        self.own = [F.pad(each, (0, 0, 0, more)) for each in self.own]
        if self.own_mask is not None:
            self.own_mask = F.pad(self.own_mask, (0, more))
        new = torch.arange(self.own[0].shape[3] - self.first)
        self.angles = rotary_angles(self.decoder, self.own[0], self.position + new)

    def keep(self, rows: torch.Tensor) -> None:
        """Drops all other rows."""
        self.own, self.cross = ([each[:, rows] for each in side] for side in (self.own, self.cross))
        if self.own_mask is not None:
            self.own_mask = self.own_mask[rows]
        if self.cross_mask is not None:
            self.cross_mask = self.cross_mask[rows]
        if self.is_merged:
            self.source_positions = self.source_positions[rows]
        if len(self.position) > 1:
            self.position = self.position[rows]
            self.angles = {kind: tuple(part[rows] for part in both) for kind, both in self.angles.items()}

    def forget(self, tokens: int) -> None:
        """Drops the last tokens, which were guessed wrong."""
        self.length -= tokens

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """The next tokens of each row (B, T), without padding → logits (B × T, V)."""
        new = tokens.shape[1]
        while self.length + new > self.own[0].shape[3]:
            self._make_room()
        self.steps += 1
        if self.steps == PACKED_AFTER and tokens.numel() >= PACKED_FROM.get(self.own[0].dtype, math.inf):
            self._pack()
        place = self.length - self.first
        self.length += new
        kinds = set(self.windowed)
        rotations = {kind: tuple(part[:, place : place + new] for part in self.angles[kind]) for kind in kinds}
        masks = {kind: self._mask(new, kind) for kind in kinds}
        hidden = self.decoder.embed_tokens(tokens.flatten())
        for index, (layer, kind) in enumerate(zip(self.decoder.layers, self.windowed, strict=True)):
            normed = layer.input_layernorm(hidden)
            attended = self._write_and_attend(index, layer.self_attn, normed, rotations[kind], masks[kind])
            hidden = layer.add(hidden, attended, layer.attention_output_layernorm)
            if not self.is_merged:
                attention, normed = layer.cross_attn, layer.cross_attention_layernorm(hidden)
                query = self._heads(attention, attention.q_proj, normed, new, attention.q_norm)
                attended = self._attend(attention, query, self.cross[index], self.cross_mask)
                hidden = layer.add(hidden, attended, layer.cross_attention_output_layernorm)
            mlp, normed = layer.mlp, layer.post_attention_layernorm(hidden)
            gated = mlp.act_fn(self._project(mlp.gate_proj, normed)) * self._project(mlp.up_proj, normed)
            hidden = layer.add(hidden, self._project(mlp.down_proj, gated), layer.mlp_output_layernorm)
        return self.finished_logits(self._project(self.lm_head, self.decoder.norm(hidden)))

    def _mask(self, new: int, is_windowed: bool) -> torch.Tensor | None:
        """What is added to the scores of the next tokens, (…, 1 or G × T, L); None if they see all keys so far."""
        padding = None if self.own_mask is None else self.own_mask[..., : self.length]
        if new == 1 and not is_windowed:
            return padding
        places = torch.arange(self.length)
        away = places[-new:, None] - places  # (T, L)
        if is_windowed and self.is_merged:  # by positions, since padding may stand between source and target
            positions = self.position + places[-new:] - self.first
            source = positions[:, :, None] - self.source_positions[:, None]
            own = away[:, source.shape[2] :].expand(len(source), -1, -1)
            away = torch.cat((source, own), dim=2)[:, None]  # (B, 1, T, L)
        forbidden = away < 0
        if is_windowed:
            forbidden = forbidden | (away >= self.window)
        mask = torch.zeros(away.shape, dtype=self.own[0].dtype).masked_fill(forbidden, -torch.inf)
        if new > 1:  # for each query head of a key head
            mask = torch.cat([mask] * self.decoder.layers[0].self_attn.num_key_value_groups, dim=-2)
        return mask if padding is None else mask + padding

    def _write_and_attend(
        self,
        index: int,
        attention: DiptychAttention,
        normed: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        new = rotation[0].shape[1]
        query = self._heads(attention, attention.q_proj, normed, new, attention.q_norm)
        key = self._heads(attention, attention.k_proj, normed, new, attention.k_norm)
        if attention.has_rope:
            query, key = rotate(query, *rotation), rotate(key, *rotation)
        own = self.own[index]
        own[0, :, :, self.length - new : self.length] = key
        own[1, :, :, self.length - new : self.length] = self._heads(attention, attention.v_proj, normed, new)
        return self._attend(attention, query, own[:, :, :, : self.length], mask)

    def _heads(
        self,
        attention: DiptychAttention,
        layer: nn.Module,
        states: torch.Tensor,
        new: int,
        norm: nn.Module | None = None,
    ) -> torch.Tensor:
        """(B × T, D) → (B, heads, T, E)."""
        projected = self._project(layer, states)
        heads = attention.heads(projected) if norm is None else attention.normed_heads(norm, projected)
        return heads.unflatten(0, (-1, new)).transpose(1, 2)

    def _attend(
        self,
        attention: DiptychAttention,
        query: torch.Tensor,
        keys_and_values: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Queries (B, K × G, T, E), keys and values (2, B, K, L, E) → (B × T, D)."""
        heads, new = query.shape[1:3]
        groups = query.contiguous().view(len(query), keys_and_values.shape[2], -1, query.shape[-1])  # (B, K, G × T, E)
        attended = F.scaled_dot_product_attention(groups, *keys_and_values, attn_mask=mask, scale=attention.scaling)
        attended = attended.reshape(len(query), heads, new, -1).transpose(1, 2)
        return self._project(attention.o_proj, attended.reshape(len(query) * new, -1))

    def _project(self, layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """(B × T, in) → (B × T, out)."""
        packed = self.packed.get(layer)
        if packed is None:
            return layer(states)
        return torch.ops.mkldnn._linear_pointwise(states, packed, layer.bias, "none", [], "")

    def _pack(self) -> None:
        """Packs the linear layers of decoder and head, if oneDNN computes in their type."""
        can = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
        if not can or (self.own[0].dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            return
        for layer in (*self.decoder.modules(), self.lm_head):
            if type(layer) is nn.Linear:
                self.packed[layer] = torch.ops.mkldnn._reorder_linear_weight(layer.weight, PACKED_FOR)


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """1 and 0 (B, L) → 0 and -inf (B, 1, 1, L); None if nothing is masked."""
    if mask is None or mask.bool().all():
        return None
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(mask == 0, -torch.inf)[:, None, None]
