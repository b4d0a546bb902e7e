"""Greedy decoding and sampling of a Diptych on a CPU, without what transformers' loop costs at each token.

    read = read_fast(model, **source)
    sequences = model.generate(**source, encoder_outputs=read, max_new_tokens=64, custom_generate=fast_decode)

transformers makes the logits processors and stopping criteria; what is here takes the place of its loop, and writes
the same tokens. There, masks and positions are made anew for each token, caches are copied to grow by one, and outputs
are wrapped and unwrapped; here a step is what depends on the token, and most of its time is the reading of weights.

- Rows are read a few at a time, so that what a layer makes is small enough to be used again, and is not fetched from
  the system each time, which costs a third of reading (32 rows of 512 tokens: 4.5 s → 2.9).
- Keys and values stand in tensors with room to spare. The source's masks and the target's rotations are made once.
- Query heads that share a key head are that head's queries: nothing is repeated.
- Matrices that are met often are copied once into the layout in which oneDNN multiplies them, as long as `generate`
  lasts. All of a step (43M weights, two cores of a Xeon): 14.1 ms → 8.0 for 8 rows in fp32, 20.3 → 14.4 for 32, 4.2 →
  2.2 for one row in bf16; the copy takes 35 ms.
- Rows that are finished leave the batch, when there are enough of them.
- With `prompt_lookup_num_tokens=n` and one row, n tokens are guessed by what followed the last ones before, in the
  source or in the target (arXiv 2304.04487), and read at once; those that the model would have written stay. The same
  tokens again, in fewer steps where the target repeats the source. transformers looks in the target alone.

B rows, S source tokens, T new tokens, D width, K key/value heads, G query heads for each of them, E head size, V
vocabulary.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
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
    DiptychMLP,
    rotate,
    source_ends,
)

ROOM = 64
"""Tokens that a cache is made larger by, at least."""
LONGEST_LOOKED_UP = 2
"""Tokens by which the next ones are looked up, as in transformers, where the config does not say."""
READ_AT_ONCE = 1536
"""Source tokens, padding included, unless one row alone has more."""
PACKED_FROM = {torch.float32: 4, torch.bfloat16: 1}
"""Rows of a product from which its matrix is packed."""
PACKED_FOR = 32
"""Rows that the layout is chosen for; it serves others as well."""
PACKED_AFTER = 5
"""Steps, since a copy costs as much as some five to ten of them save: who has written so long is likely to go on."""
DROPPED_AT = 3 / 4
"""Finished rows are dropped when no more than this part of a batch goes on: each time costs a copy of the caches."""


def can_decode_fast(model: PreTrainedModel, config: GenerationConfig, others: dict[str, Any]) -> bool:
    """Whether `fast_decode` writes what `generate` would with this config and these other arguments."""
    if type(model) is not DiptychForConditionalGeneration or model.device.type != "cpu" or model.training:
        return False
    decoder = model.config.decoder
    mode = config.get_generation_mode()
    if config.prompt_lookup_num_tokens and not config.do_sample and config.num_beams in (None, 1):
        mode = GenerationMode.GREEDY_SEARCH
    return (
        all(_is_plain(layer) for layer in model.get_decoder().layers)
        and decoder._attn_implementation in ("sdpa", "eager")
        and decoder.rope_parameters["rope_type"] not in ("dynamic", "longrope")  # they change with the length
        and mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        and config.eos_token_id is not None
        and config.use_cache is not False
        and not config.return_dict_in_generate
        and not config.cache_implementation
        and not config.prefill_chunk_size
        and others.keys() <= {"streamer", "stopping_criteria", "logits_processor"}
    )


def _is_plain(layer: nn.Module) -> bool:
    """Layers are taken apart here, not called: whoever brings their weights only for a call would not notice. FSDP2
    gives them another class, and accelerate's offloading another `forward`."""
    return type(layer) is DiptychDecoderLayer and "forward" not in vars(layer)


@torch.no_grad()
def read_fast(
    model: DiptychForConditionalGeneration, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> BaseModelOutput:
    """What `model.get_encoder()` makes of these sources (B, S), as `generate` takes it for `encoder_outputs`."""
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
    """What `generate` calls in place of its own loop: prompts (B, P) → them and what was written, padded, (B, L).

    `writes_to` is told the prompts and then the tokens of each step, as `generate` tells its streamer, which it keeps
    to itself. What the model is `given` has no names here, since `generate` would take those for arguments of this
    function alone; `inputs_tensor` is its name for the source, (B, S).

    Raises:
        ValueError: tokens are to be looked up, for several rows.
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
    step = Step(model, getattr(outputs, CACHE_NAME), encoder_outputs, encoder_mask, decoder_mask)
    logits = outputs.logits[:, -1]
    if generation_config.prompt_lookup_num_tokens:
        rules = (logits_processor, stopping_criteria, generation_config)
        return _decode_by_lookup(step, logits, inputs_tensor, input_ids, *rules, writes_to)
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
            tokens = likeliest(scores)
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
        logits = step(sequences[rows, length - 1 : length])
    if writes_to is not None:
        writes_to.end()
    return sequences[:, :length]


def _decode_by_lookup(
    step: "Step",
    logits: torch.Tensor,
    source: torch.Tensor,
    sequence: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    config: GenerationConfig,
    writes_to: BaseStreamer | None,
) -> torch.Tensor:
    """The rest of `fast_decode` for one row, greedily: source (1, S), sequence (1, P) → (1, L)."""
    guesses: list[int] = []
    while True:
        # logits (1 + guesses, V): after the last token, and after each guess, of use as long as these are right.
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


def likeliest(scores: torch.Tensor) -> torch.Tensor:
    """(B, V) → (B,). torch's own argmax takes six to ten times as long as numpy's: 0.9 ms a step for 32 rows."""
    return torch.from_numpy(scores.float().numpy().argmax(-1))


def look_up(ids: list[int], tokens: int, longest: int) -> list[int]:
    """What followed the last `longest` ids where they stood last, or the last fewer: `[5, 6, 7, 8, 5, 6]` -> `[7, 8]`
    for 2 tokens. [] where even the last one is new."""
    for length in range(min(longest, len(ids) - 1), 0, -1):
        end = ids[-length:]
        for start in range(len(ids) - length - 1, -1, -1):
            if ids[start : start + length] == end:
                return ids[start + length : start + length + tokens]
    return []


def _pad_token(config: GenerationConfig) -> int:
    """As transformers has it: an end token, where there is no padding token."""
    if config.pad_token_id is not None:
        return config.pad_token_id
    return config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id


class Step:
    """The decoder and the head over the next tokens of each row, after the model itself has read the prompts.

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
        self.steps, self.packed = 0, {}
        self.first = self.length = target[0].shape[3]
        self._make_room()

    def _make_room(self) -> None:
        """Doubles what there is for the target, and makes cos and sin of what is not read yet, (B or 1, L, E)."""
        more = max(ROOM, self.length)
        self.own = [F.pad(each, (0, 0, 0, more)) for each in self.own]
        if self.own_mask is not None:
            self.own_mask = F.pad(self.own_mask, (0, more))
        new = torch.arange(self.own[0].shape[3] - self.first)
        self.cos, self.sin = self.decoder.rotary_emb(self.own[0], self.position + new)

    def keep(self, rows: torch.Tensor) -> None:
        """Goes on with these rows alone."""
        self.own, self.cross = ([each[:, rows] for each in side] for side in (self.own, self.cross))
        if self.own_mask is not None:
            self.own_mask = self.own_mask[rows]
        if self.cross_mask is not None:
            self.cross_mask = self.cross_mask[rows]
        if len(self.position) > 1:
            self.position, self.cos, self.sin = self.position[rows], self.cos[rows], self.sin[rows]

    def forget(self, tokens: int) -> None:
        """The last ones were wrong."""
        self.length -= tokens

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """The tokens that each row goes on with, (B, T), of which none is padding → logits (B × T, V)."""
        new = tokens.shape[1]
        while self.length + new > self.own[0].shape[3]:
            self._make_room()
        self.steps += 1
        if self.steps == PACKED_AFTER and tokens.numel() >= PACKED_FROM.get(self.own[0].dtype, math.inf):
            self._pack()
        place = self.length - self.first
        rotation = self.cos[:, place : place + new], self.sin[:, place : place + new]
        self.length += new
        own_mask = None if self.own_mask is None else self.own_mask[..., : self.length]
        hidden = self.decoder.embed_tokens(tokens.flatten())
        for index, layer in enumerate(self.decoder.layers):
            normed = layer.input_layernorm(hidden)
            hidden = hidden + self._write_and_attend(index, layer.self_attn, normed, rotation, own_mask)
            if not self.is_merged:
                attention, normed = layer.cross_attn, layer.cross_attention_layernorm(hidden)
                query = attention.q_norm(self._heads(attention, attention.q_proj, normed, new))
                hidden = hidden + self._attend(attention, query, self.cross[index], self.cross_mask)
            hidden = hidden + self._feed_forward(layer.mlp, layer.post_attention_layernorm(hidden))
        return self._project(self.lm_head, self.decoder.norm(hidden))

    def _write_and_attend(
        self,
        index: int,
        attention: DiptychAttention,
        normed: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        new = rotation[0].shape[1]
        query = attention.q_norm(self._heads(attention, attention.q_proj, normed, new))
        key = attention.k_norm(self._heads(attention, attention.k_proj, normed, new))
        if attention.has_rope:
            query, key = rotate(query, *rotation), rotate(key, *rotation)
        own = self.own[index]
        own[0, :, :, self.length - new : self.length] = key
        own[1, :, :, self.length - new : self.length] = self._heads(attention, attention.v_proj, normed, new)
        if new > 1:  # each sees those before it, in each of the queries that share a key head
            ahead = torch.full((new, self.length), -torch.inf, dtype=normed.dtype).triu(self.length - new + 1)
            ahead = ahead.repeat(attention.num_key_value_groups, 1)
            mask = ahead if mask is None else mask + ahead
        return self._attend(attention, query, own[:, :, :, : self.length], mask)

    def _heads(self, attention: DiptychAttention, layer: nn.Module, states: torch.Tensor, new: int) -> torch.Tensor:
        """(B × T, D) → (B, heads, T, E)."""
        projected = self._project(layer, states)
        return projected.unflatten(-1, (-1, attention.head_dim)).unflatten(0, (-1, new)).transpose(1, 2)

    def _attend(
        self,
        attention: DiptychAttention,
        query: torch.Tensor,
        keys_and_values: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Queries (B, K × G, T, E), what they look at (2, B, K, L, E) → (B × T, D)."""
        heads, new = query.shape[1:3]
        groups = query.contiguous().view(len(query), keys_and_values.shape[2], -1, query.shape[-1])  # (B, K, G × T, E)
        attended = F.scaled_dot_product_attention(groups, *keys_and_values, attn_mask=mask, scale=attention.scaling)
        attended = attended.reshape(len(query), heads, new, -1).transpose(1, 2)
        return self._project(attention.o_proj, attended.reshape(len(query) * new, -1))

    def _feed_forward(self, mlp: DiptychMLP, states: torch.Tensor) -> torch.Tensor:
        gated = mlp.act_fn(self._project(mlp.gate_proj, states)) * self._project(mlp.up_proj, states)
        return self._project(mlp.down_proj, gated)

    def _project(self, layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """(B × T, in) → (B × T, out)."""
        packed = self.packed.get(layer)
        if packed is None:
            return layer(states)
        return torch.ops.mkldnn._linear_pointwise(states, packed, layer.bias, "none", [], "")

    def _pack(self) -> None:
        """The plain layers of the decoder, and the head, where oneDNN computes in their type."""
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
