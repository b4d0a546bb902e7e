"""Diptych, the model: an encoder panel that reads, a decoder panel that writes, cross-attention as the hinge.

    input_ids ─embed─▶ [norm, self-attention, norm, SwiGLU] × N ─norm─▶ encoder states
    decoder_input_ids ─embed─▶ [norm, causal self-attention, norm, cross-attention, norm, SwiGLU] × M ─norm─▶ head

Shapes: B rows, S source tokens, T target tokens, D width, H query heads, K key/value heads, E head size, V vocabulary.

A row may hold several examples (packing). `segment_ids` number them, 0 is padding; each attention site has a mask of
its own, and no token ever sees another example (names as in seqio and T5X):

    input_ids     12  7  9  1 |  5  8  1 |  0      labels              31 40  1 | 22  1 | -100
    segment_ids    1  1  1  1 |  2  2  2 |  0      decoder_input_ids    0 31 40 |  0 22 |    0
    position_ids   0  1  2  3 |  0  1  2 |  0      decoder_segment_ids  1  1  1 |  2  2 |    0

Weight names are Llama's, so that Llama, Mistral, Qwen2 and Qwen3 map one to one. This file travels with every
checkpoint: it imports torch, transformers, and its neighbour.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_diptych import DiptychConfig, DiptychPanelConfig


class DiptychRMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467), computed in float32 or better, returned in the input's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        normed = F.rms_norm(hidden_states.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps)
        return normed.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class DiptychRotaryEmbedding(nn.Module):
    """Rotary positions (arXiv 2104.09864), also scaled: position_ids (B, L) → cos, sin (B, L, E)."""

    def __init__(self, config: DiptychPanelConfig):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        init_fn = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = init_fn(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: DiptychPanelConfig, **kwargs) -> tuple[torch.Tensor, float]:
        """Unscaled frequencies (E / 2,) and the factor on cos and sin, which is 1. transformers calls it by name."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return config.rope_parameters["rope_theta"] ** -exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(hidden_states.device, torch.float)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns each pair (i, i + E/2) of a head by its position's angle: states (B, H, L, E); cos, sin (B, L, E)."""
    first, second = states.chunk(2, dim=-1)
    return states * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as in the paper (arXiv 1706.03762): query (B, H, T, E), key and value (B, K, S, E), an additive mask
    (B, 1, T, S) → output (B, T, H, E) and weights (B, H, T, S)."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class DiptychAttention(nn.Module):
    """What self- and cross-attention share: the projections, the optional head norms, and the choice of kernel."""

    def __init__(self, config: DiptychPanelConfig, layer_idx: int, key_value_size: int, is_causal: bool):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = is_causal  # what sdpa and flash go by when there is no mask
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(key_value_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(key_value_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_output_bias)
        self.q_norm = DiptychRMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = DiptychRMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        """(B, L, heads × E) → (B, L, heads, E). The head count is inferred: tensor parallelism splits it."""
        return projected.view(*projected.shape[:-1], -1, self.head_dim)

    def _queries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.q_norm(self._heads(self.q_proj(hidden_states))).transpose(1, 2)

    def _keys_and_values(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys = self.k_norm(self._heads(self.k_proj(states))).transpose(1, 2)
        return keys, self._heads(self.v_proj(states)).transpose(1, 2)

    def _attend(self, query, key, value, attention_mask) -> tuple[torch.Tensor, torch.Tensor | None]:
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attention(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, is_causal=self.is_causal
        )
        return self.o_proj(output.flatten(2)), weights


class DiptychSelfAttention(DiptychAttention):
    """Attention within one panel; the decoder's is causal and grows a cache."""

    def __init__(self, config: DiptychPanelConfig, layer_idx: int):
        super().__init__(config, layer_idx, key_value_size=config.hidden_size, is_causal=config.is_decoder)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query = rotate(self._queries(hidden_states), *position_embeddings)
        key, value = self._keys_and_values(hidden_states)
        key = rotate(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        return self._attend(query, key, value, attention_mask)


class DiptychCrossAttention(DiptychAttention):
    """The hinge: the decoder looks at the encoder's final states. No positions; keys and values are cached once."""

    def __init__(self, config: DiptychPanelConfig, layer_idx: int):
        super().__init__(config, layer_idx, key_value_size=config.cross_attention_hidden_size, is_causal=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: EncoderDecoderCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query = self._queries(hidden_states)
        if past_key_values is not None and past_key_values.is_updated.get(self.layer_idx):
            cached = past_key_values.cross_attention_cache.layers[self.layer_idx]
            key, value = cached.keys, cached.values
        else:
            key, value = self._keys_and_values(encoder_hidden_states)
            if past_key_values is not None:
                key, value = past_key_values.cross_attention_cache.update(key, value, self.layer_idx)
                past_key_values.is_updated[self.layer_idx] = True
        return self._attend(query, key, value, attention_mask)


class DiptychMLP(nn.Module):
    """Gated feed-forward network (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, config: DiptychPanelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class DiptychEncoderLayer(GradientCheckpointingLayer):
    """hidden_states (B, S, D) → (B, S, D)."""

    def __init__(self, config: DiptychPanelConfig, layer_idx: int):
        super().__init__()
        self.self_attn = DiptychSelfAttention(config, layer_idx)
        self.mlp = DiptychMLP(config)
        self.input_layernorm = DiptychRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = DiptychRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), position_embeddings, attention_mask)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


class DiptychDecoderLayer(GradientCheckpointingLayer):
    """hidden_states (B, T, D) and encoder_hidden_states (B, S, D of the encoder) → (B, T, D)."""

    def __init__(self, config: DiptychPanelConfig, layer_idx: int):
        super().__init__()
        self.self_attn = DiptychSelfAttention(config, layer_idx)
        self.cross_attn = DiptychCrossAttention(config, layer_idx)
        self.mlp = DiptychMLP(config)
        self.input_layernorm = DiptychRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attention_layernorm = DiptychRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = DiptychRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        encoder_attention_mask: torch.Tensor | None,
        past_key_values: EncoderDecoderCache | None = None,
    ) -> torch.Tensor:
        own_past = past_key_values.self_attention_cache if past_key_values is not None else None
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states), position_embeddings, attention_mask, own_past
        )
        hidden_states = hidden_states + self.dropout(attended)
        attended, _ = self.cross_attn(
            self.cross_attention_layernorm(hidden_states),
            encoder_hidden_states,
            encoder_attention_mask,
            past_key_values,
        )
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


def same_segment(query_segments: torch.Tensor, key_segments: torch.Tensor) -> Callable:
    """The rule "same example" for `masking_utils`: query_segments (B, T) and key_segments (B, S).

    A padding query (segment 0) may look anywhere: nobody reads it, and a softmax over nothing would not be a number.
    """

    def rule(batch_idx, head_idx, q_idx, kv_idx):
        query_segment = query_segments[batch_idx, q_idx]
        return (query_segment == key_segments[batch_idx, kv_idx]) | (query_segment == 0)

    return rule


def positions_within_segments(segment_ids: torch.Tensor) -> torch.Tensor:
    """Positions that restart at 0 in each segment: [[1, 1, 1, 2, 2, 0]] → [[0, 1, 2, 0, 1, 0]]. Shape (B, L)."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    starts = segment_ids != F.pad(segment_ids, (1, -1), value=-1)
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def check_segments(config: DiptychPanelConfig, segment_ids: torch.Tensor | None, embeds: torch.Tensor, name: str):
    """Refuses segments that could not be honoured exactly.

    Raises:
        ValueError: the shape is not (B, L) of the tokens, or the attention cannot keep examples apart.
    """
    if segment_ids is None:
        return
    if segment_ids.shape != embeds.shape[:2]:
        raise ValueError(
            f"{name} has shape {tuple(segment_ids.shape)}, but there are {tuple(embeds.shape[:2])} tokens: "
            "give one segment number per token."
        )
    if config._attn_implementation not in ("eager", "sdpa", "flex_attention"):
        raise ValueError(
            f"{name} needs attention that takes a mask, but attn_implementation is {config._attn_implementation!r}. "
            "Use 'sdpa', 'flex_attention' or 'eager' for packed rows."
        )


class DiptychPreTrainedModel(PreTrainedModel):
    """Loading, saving, initialisation, and what transformers asks a model family to declare."""

    config: DiptychConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DiptychEncoderLayer", "DiptychDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Teacher forcing: labels (B, T), one example a row → the same tokens one place later, after the start token.

        Raises:
            ValueError: the config names no start token or no padding token.
        """
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or pad is None:
            raise ValueError(
                f"labels alone need a start and a padding token, but decoder_start_token_id is {start} and "
                f"pad_token_id is {pad}. Set them in the config, or give decoder_input_ids."
            )
        shifted = F.pad(labels, (1, -1), value=start)
        return shifted.masked_fill(shifted == -100, pad)

    def _resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of=None, mean_resizing=True):
        """Resizes the decoder's table too; the library itself knows of the encoder's and the head."""
        embeddings = super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        decoder = self.get_decoder()
        if isinstance(decoder, DiptychDecoder):
            decoder.embed_tokens = self._get_resized_embeddings(
                decoder.embed_tokens, new_num_tokens, pad_to_multiple_of, mean_resizing
            )
        self.config.vocab_size = embeddings.weight.shape[0]
        return embeddings


class DiptychEncoder(DiptychPreTrainedModel):
    """The panel that reads: input_ids (B, S) → BaseModelOutput with last_hidden_state (B, S, D), normed."""

    config: DiptychPanelConfig
    _can_record_outputs = {
        "hidden_states": DiptychEncoderLayer,
        "attentions": OutputRecorder(DiptychSelfAttention, index=1),
    }

    def __init__(self, config: DiptychPanelConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.residual_dropout)
        self.layers = nn.ModuleList([DiptychEncoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = DiptychRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = DiptychRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutput:
        hidden_states = embed(self, input_ids, inputs_embeds)
        check_segments(self.config, segment_ids, hidden_states, "segment_ids")
        if position_ids is None:
            position_ids = default_positions(hidden_states, segment_ids)
        mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            and_mask_function=None if segment_ids is None else same_segment(segment_ids, segment_ids),
        )
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        hidden_states = self.dropout(hidden_states)
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_embeddings, mask)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))


class DiptychDecoder(DiptychPreTrainedModel):
    """The panel that writes: input_ids (B, T) and encoder states (B, S, D) → last_hidden_state (B, T, D), normed."""

    config: DiptychPanelConfig
    _can_record_outputs = {
        "hidden_states": DiptychDecoderLayer,
        "attentions": OutputRecorder(DiptychSelfAttention, index=1),
        "cross_attentions": OutputRecorder(DiptychCrossAttention, index=1),
    }
    _tp_plan = {
        "layers.*.cross_attn.q_proj": "colwise",
        "layers.*.cross_attn.k_proj": "colwise",
        "layers.*.cross_attn.v_proj": "colwise",
        "layers.*.cross_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.cross_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.cross_attn.o_proj": "rowwise",
    }

    def __init__(self, config: DiptychPanelConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.residual_dropout)
        self.layers = nn.ModuleList([DiptychDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = DiptychRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = DiptychRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        encoder_hidden_states: torch.FloatTensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        encoder_segment_ids: torch.LongTensor | None = None,
        cross_segment_ids: torch.LongTensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPastAndCrossAttentions:
        if encoder_hidden_states is None:
            raise ValueError("The decoder needs encoder_hidden_states (B, S, D): there is nothing to write about.")
        if (segment_ids is None) != (encoder_segment_ids is None):
            raise ValueError("Packed rows need segments on both sides: give segment_ids and decoder_segment_ids.")
        hidden_states = embed(self, input_ids, inputs_embeds)
        check_segments(self.config, segment_ids, hidden_states, "decoder_segment_ids")
        check_segments(self.config, encoder_segment_ids, encoder_hidden_states, "segment_ids")
        check_segments(self.config, cross_segment_ids, hidden_states, "cross_segment_ids")
        if cross_segment_ids is None:
            cross_segment_ids = segment_ids
        elif segment_ids is None:
            raise ValueError("cross_segment_ids say which segment a segment reads: give decoder_segment_ids, too.")
        if segment_ids is not None and past_key_values is not None:
            raise ValueError("Packed rows cannot grow token by token: give decoder_segment_ids or past_key_values.")
        if use_cache and past_key_values is None and segment_ids is None and not self.training:
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        own_past = past_key_values.self_attention_cache if past_key_values is not None else None
        if position_ids is None:
            offset = own_past.get_seq_length() if own_past is not None else 0
            position_ids = default_positions(hidden_states, segment_ids) + offset

        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=own_past,
            and_mask_function=None if segment_ids is None else same_segment(segment_ids, segment_ids),
        )
        cross_mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=encoder_attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            and_mask_function=None if segment_ids is None else same_segment(cross_segment_ids, encoder_segment_ids),
        )
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        hidden_states = self.dropout(hidden_states)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                encoder_hidden_states,
                position_embeddings,
                mask,
                cross_mask,
                past_key_values=past_key_values,
            )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )


def embed(panel: nn.Module, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
    """Tokens (B, L) or finished embeddings (B, L, D) → (B, L, D).

    Raises:
        ValueError: both or neither were given.
    """
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise ValueError(f"{type(panel).__name__} takes token ids or embeddings, but {given} were given: give one.")
    return panel.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds


def default_positions(hidden_states: torch.Tensor, segment_ids: torch.Tensor | None) -> torch.Tensor:
    """0, 1, 2 … in each row, or in each segment: (1, L) or (B, L)."""
    if segment_ids is not None:
        return positions_within_segments(segment_ids)
    return torch.arange(hidden_states.shape[1], device=hidden_states.device).unsqueeze(0)


class DiptychModel(DiptychPreTrainedModel):
    """Both panels, hinged, without a head."""

    _tied_weights_keys = {"decoder.embed_tokens.weight": "encoder.embed_tokens.weight"}

    def __init__(self, config: DiptychConfig):
        if not config.is_encoder_decoder:
            raise ValueError(
                "The config describes an encoder alone (is_encoder_decoder=False): use DiptychEncoderModel."
            )
        super().__init__(config)
        if not config.shares_panel_embeddings:
            self._tied_weights_keys = {}
        self.encoder = DiptychEncoder(config.encoder)
        self.decoder = DiptychDecoder(config.decoder)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module):
        self.encoder.embed_tokens = value  # `tie_weights` carries it to the decoder and the head

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        decoder_segment_ids: torch.LongTensor | None = None,
        cross_segment_ids: torch.LongTensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqModelOutput:
        """Reads the source, then runs the decoder over the target so far.

        Args:
            input_ids, attention_mask, position_ids, segment_ids: (B, S), the encoder's side.
            decoder_input_ids, decoder_attention_mask, decoder_position_ids, decoder_segment_ids: (B, T), the other.
            cross_segment_ids: (B, T), the encoder segment that each target token reads; that of its own number unless
                given. With it, several targets can share one source.
            encoder_outputs: what the encoder returned earlier; the source is then not read again.
            past_key_values: the decoder's cache.
            inputs_embeds, decoder_inputs_embeds: (B, S, D) and (B, T, D), in place of ids.
        """
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(self.config, name):  # else each panel goes by its own config
                kwargs.setdefault(name, True)
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                segment_ids=segment_ids,
                inputs_embeds=inputs_embeds,
                return_dict=True,
                **kwargs,
            )
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        decoder_outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            position_ids=decoder_position_ids,
            segment_ids=decoder_segment_ids,
            inputs_embeds=decoder_inputs_embeds,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            encoder_segment_ids=segment_ids,
            cross_segment_ids=cross_segment_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            past_key_values=decoder_outputs.past_key_values,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


class DiptychForConditionalGeneration(DiptychPreTrainedModel, GenerationMixin):
    """Both panels and the head that turns decoder states into logits over the vocabulary."""

    _tied_weights_keys = {
        "model.decoder.embed_tokens.weight": "model.encoder.embed_tokens.weight",
        "lm_head.weight": "model.encoder.embed_tokens.weight",
    }
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: DiptychConfig):
        super().__init__(config)
        if not config.shares_panel_embeddings:
            self._tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}
        self.model = DiptychModel(config)
        self.lm_head = nn.Linear(config.decoder.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForMaskedLM"  # cross-entropy with no shift: the decoder's input is shifted already
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        decoder_segment_ids: torch.LongTensor | None = None,
        cross_segment_ids: torch.LongTensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqLMOutput:
        """`DiptychModel.forward`, the head, and the loss.

        Args:
            labels: (B, T), -100 where there is no target. Without decoder_input_ids they are shifted right for teacher
                forcing; packed rows must bring their own, since a shift would carry one example's end into the next.
            num_items_in_batch: target tokens of the whole optimizer step; the loss is then sum ÷ this number, else the
                mean over this call's target tokens.
            logits_to_keep: how many of the last positions get logits (0: all), or their indices.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            if decoder_segment_ids is not None:
                raise ValueError("Packed labels need decoder_input_ids that begin anew in each segment: give them.")
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs: Seq2SeqModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            position_ids=position_ids,
            decoder_position_ids=decoder_position_ids,
            segment_ids=segment_ids,
            decoder_segment_ids=decoder_segment_ids,
            cross_segment_ids=cross_segment_ids,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )


class DiptychEncoderModel(DiptychPreTrainedModel):
    """The encoder panel alone, for embeddings. Loads from its own checkpoint or from a whole model's."""

    _keys_to_ignore_on_load_unexpected = [r"^(model\.)?decoder\.", r"^lm_head\."]

    def __init__(self, config: DiptychConfig):
        config = copy.deepcopy(config)  # the caller's may go on to build a whole model
        config.is_encoder_decoder = False
        super().__init__(config)
        self.encoder = DiptychEncoder(config.encoder)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module):
        self.encoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """input_ids (B, S) or inputs_embeds (B, S, D) → last_hidden_state (B, S, D), normed."""
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(self.config, name):
                kwargs.setdefault(name, True)
        return self.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            segment_ids=segment_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )


# Saved checkpoints carry this code, whichever Auto class reads them.
DiptychConfig.register_for_auto_class()
DiptychModel.register_for_auto_class("AutoModel")
DiptychForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")
DiptychEncoderModel.register_for_auto_class("AutoModelForTextEncoding")

__all__ = [
    "DiptychDecoder",
    "DiptychEncoder",
    "DiptychEncoderModel",
    "DiptychForConditionalGeneration",
    "DiptychModel",
    "DiptychPreTrainedModel",
]
