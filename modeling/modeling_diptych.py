"""Diptych, the model: an encoder panel reads the source, and a decoder panel writes the target.

    input_ids ─embed─▶ [norm, self-attention, norm, SwiGLU] × N ─norm─▶ encoder states
    decoder_input_ids ─embed─▶ [norm, causal self-attention, norm, cross-attention, norm, SwiGLU] × M ─norm─▶ head

That is the separate hinge. With the merged hinge the decoder has no cross-attention sub-layer. Each of its layers
attends, in one softmax, to its own tokens and to the input of an encoder layer, as if source and target were one text:

    decoder_input_ids ─embed─▶ [norm, attention to (source, target so far), norm, SwiGLU] × M ─norm─▶ head

Shapes: B rows, S source tokens, T target tokens, L tokens of either side, D width, H query heads, K key/value heads,
E head size, V vocabulary, M decoder layers.

A row may hold several examples (packing). `segment_ids` number them, 0 is padding. Each attention site has its own
mask, and no token sees another example (names as in seqio and T5X):

    input_ids     12  7  9  1 |  5  8  1 |  0      labels              31 40  1 | 22  1 | -100
    segment_ids    1  1  1  1 |  2  2  2 |  0      decoder_input_ids    0 31 40 |  0 22 |    0
    position_ids   0  1  2  3 |  0  1  2 |  0      decoder_segment_ids  1  1  1 |  2  2 |    0

Weights are named as in Llama, so that those of Llama, Mistral, Qwen2 and Qwen3 fit by name. By `norm_placement` a norm
may also, or only, stand after a sub-layer, before the residual is added. Every saved checkpoint carries a copy of this
file: it imports torch, transformers and configuration_diptych.py only.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import (
    and_masks,
    create_bidirectional_mask,
    create_causal_mask,
    create_masks_for_generate,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_diptych import DiptychConfig, DiptychPanelConfig, gathered

# transformers 5.24 calls the cache `cache`, in its outputs and as an argument. Our `forward` takes both names.
CACHE_NAME = "cache" if "cache" in Seq2SeqLMOutput.__dataclass_fields__ else "past_key_values"

RotaryAngles = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of the positions' angles, (B, L, E) each."""


class DiptychRMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467), computed in float32 or better, returned in the input's dtype."""

    def __init__(self, config: DiptychPanelConfig, size: int | None = None):
        super().__init__()
        self.offset = config.norm_offset
        self.weight = nn.Parameter(torch.full((size or config.hidden_size,), 1.0 - self.offset))
        self.eps = config.rms_norm_eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        weight = self.weight.to(dtype) + self.offset if self.offset else self.weight.to(dtype)
        normed = F.rms_norm(hidden_states.to(dtype), self.weight.shape, weight, self.eps)
        return normed.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


def input_norm(config: DiptychPanelConfig) -> nn.Module:
    """The norm before a sub-layer."""
    return nn.Identity() if config.norm_placement == "after" else DiptychRMSNorm(config)


def output_norm(config: DiptychPanelConfig) -> nn.Module:
    """The norm after a sub-layer, before the residual is added."""
    return nn.Identity() if config.norm_placement == "before" else DiptychRMSNorm(config)


class DiptychEmbedding(nn.Embedding):
    """Tokens (B, L) → (B, L, D), times a factor."""

    def __init__(self, config: DiptychPanelConfig):
        super().__init__(config.vocab_size, config.hidden_size)
        self.embed_scale = config.embedding_multiplier  # peft looks for this name

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        embedded = super().forward(input_ids)
        # Gemma was trained with a factor that is rounded to the dtype: √3072 is 55.5 in bfloat16.
        return embedded if self.embed_scale == 1 else embedded * embedded.new_full((), self.embed_scale)


class DiptychRotaryEmbedding(nn.Module):
    """Rotary positions (arXiv 2104.09864), also scaled: position_ids (B, L) → cos, sin (B, L, E), or of fewer numbers
    if only a part of each head is turned."""

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
        """Unscaled frequencies, one for each pair that is turned, and the factor on cos and sin, which is 1.
        transformers calls it by name."""
        exponents = torch.arange(0, config.rotary_size, 2, dtype=torch.float) / config.rotary_size
        return config.rope_parameters["rope_theta"] ** -exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(hidden_states.device, torch.float)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


def rotary_embeddings(config: DiptychPanelConfig) -> tuple[nn.Module, nn.Module | None]:
    """The rotary positions of a panel, and those of its windowed layers if they have their own."""
    if not config.windowed_layers or config.window_rope_theta is None:
        return DiptychRotaryEmbedding(config), None
    windowed = copy.deepcopy(config)
    windowed.rope_parameters = {"rope_type": "default", "rope_theta": config.window_rope_theta}
    return DiptychRotaryEmbedding(config), DiptychRotaryEmbedding(windowed)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns each pair (i, i + R/2) of a head's first R numbers by its position's angle: states (B, H, L, E); cos, sin
    (B, L, R). The others stay."""
    if cos.shape[-1] < states.shape[-1]:
        turned, rest = states.tensor_split([cos.shape[-1]], dim=-1)
        return torch.cat((rotate(turned, cos, sin), rest), dim=-1)
    first, second = states.chunk(2, dim=-1)
    return states * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)


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


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as in the paper (arXiv 1706.03762): query (B, H, T, E), key and value (B, K, S, E), an additive mask
    (B, 1, T, S) → output (B, T, H, E) and weights (B, H, T, S)."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class DiptychAttention(nn.Module):
    """The projections, the optional head norms and the choice of kernel, for self- and cross-attention."""

    def __init__(self, config: DiptychPanelConfig, layer_idx: int, key_value_size: int, is_causal: bool):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        scaling = config.attention_multiplier
        self.scaling = config.head_dim**-0.5 if scaling is None else scaling
        self.is_causal = is_causal  # sdpa and flash attention read it when there is no mask
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(key_value_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(key_value_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_output_bias)
        self.is_jointly_normed = config.joint_qk_norm
        normed = (queries, keys) if config.joint_qk_norm else (self.head_dim, self.head_dim)
        self.q_norm, self.k_norm = (DiptychRMSNorm(config, n) if config.qk_norm else nn.Identity() for n in normed)
        self.has_rope = layer_idx not in (config.layers_without_rope or ())

    def heads(self, projected: torch.Tensor) -> torch.Tensor:
        """(B, L, heads × E) → (B, L, heads, E). The head count is inferred: tensor parallelism splits it."""
        return projected.view(*projected.shape[:-1], -1, self.head_dim)

    def normed_heads(self, norm: nn.Module, projected: torch.Tensor) -> torch.Tensor:
        """Queries or keys (B, L, heads × E) → (B, L, heads, E), normed all together or head by head."""
        return self.heads(norm(projected)) if self.is_jointly_normed else norm(self.heads(projected))

    def queries(self, states: torch.Tensor, position_embeddings: RotaryAngles | None) -> torch.Tensor:
        """(B, T, D) → (B, H, T, E), rotated unless position_embeddings is None."""
        query = self.normed_heads(self.q_norm, self.q_proj(states)).transpose(1, 2)
        return rotate(query, *position_embeddings) if position_embeddings and self.has_rope else query

    def keys_and_values(
        self, states: torch.Tensor, position_embeddings: RotaryAngles | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, L, D) → keys, rotated unless position_embeddings is None, and values, (B, K, L, E) each."""
        key = self.normed_heads(self.k_norm, self.k_proj(states)).transpose(1, 2)
        value = self.heads(self.v_proj(states)).transpose(1, 2)
        return rotate(key, *position_embeddings) if position_embeddings and self.has_rope else key, value

    def source_keys_and_values(
        self, states: torch.Tensor, position_embeddings: RotaryAngles | None, cache: EncoderDecoderCache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`keys_and_values` of the source. With a cache they are computed at the first step only."""
        if cache is None:
            return self.keys_and_values(states, position_embeddings)
        if cache.is_updated.get(self.layer_idx):
            cached = cache.cross_attention_cache.layers[self.layer_idx]
            return cached.keys, cached.values
        key, value = self.keys_and_values(states, position_embeddings)
        cache.is_updated[self.layer_idx] = True
        return cache.cross_attention_cache.update(key, value, self.layer_idx)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """→ the output (B, T, D) and, from eager attention, the weights (B, H, T, L)."""
        kernel = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = kernel(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=dropout,
            softcap=self.config.attention_softcap,
            is_causal=self.is_causal,
        )
        return self.o_proj(output.flatten(2)), weights


class DiptychSelfAttention(DiptychAttention):
    """Attention within one panel. The decoder's is causal and extends a cache."""

    def __init__(self, config: DiptychPanelConfig, layer_idx: int):
        super().__init__(config, layer_idx, key_value_size=config.hidden_size, is_causal=config.is_decoder)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: RotaryAngles,
        attention_mask: torch.Tensor | None,
        cache: EncoderDecoderCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query = self.queries(hidden_states, position_embeddings)
        key, value = self.keys_and_values(hidden_states, position_embeddings)
        if cache is not None:
            key, value = cache.self_attention_cache.update(key, value, self.layer_idx)
        return self.attend(query, key, value, attention_mask)


class DiptychCrossAttention(DiptychAttention):
    """The separate hinge: attention to the encoder's final states, without positions."""

    def __init__(self, config: DiptychPanelConfig, layer_idx: int):
        super().__init__(config, layer_idx, key_value_size=config.cross_attention_hidden_size, is_causal=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: EncoderDecoderCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query = self.queries(hidden_states, position_embeddings=None)
        key, value = self.source_keys_and_values(encoder_hidden_states, position_embeddings=None, cache=cache)
        return self.attend(query, key, value, attention_mask)


class DiptychMergedAttention(DiptychSelfAttention):
    """The merged hinge: one softmax over the source and the target so far. The source's keys and values are this
    layer's projections of an encoder layer's input."""

    def __init__(self, config: DiptychPanelConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.is_causal = False  # the mask is causal over the target and open over the source

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        position_embeddings: RotaryAngles,
        encoder_position_embeddings: RotaryAngles,
        attention_mask: torch.Tensor,
        cache: EncoderDecoderCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """hidden_states (B, T, D) and encoder_hidden_states (B, S, D), both normed → the output, and the weights
        (B, H, T, …) on the target and on the source. encoder_hidden_states may be None once the cache has them."""
        query = self.queries(hidden_states, position_embeddings)
        key, value = self.keys_and_values(hidden_states, position_embeddings)
        source_key, source_value = self.source_keys_and_values(
            encoder_hidden_states, encoder_position_embeddings, cache
        )
        if cache is not None:
            key, value = cache.self_attention_cache.update(key, value, self.layer_idx)
        key, value = torch.cat((source_key, key), dim=2), torch.cat((source_value, value), dim=2)
        output, weights = self.attend(query, key, value, attention_mask)
        if weights is None:
            return output, None, None
        on_source, on_target = weights.tensor_split([source_key.shape[2]], dim=-1)
        return output, on_target, on_source


class DiptychLayer(GradientCheckpointingLayer):
    """What encoder and decoder layers have in common. Norms are identities where `norm_placement` has none."""

    def __init__(self, config: DiptychPanelConfig, **attentions: DiptychAttention):
        super().__init__()
        # Fresh weights are drawn, and optimizers' states are numbered, in this order.
        for name, attention in attentions.items():
            self.add_module(name, attention)
        self.mlp = DiptychMLP(config)
        self.input_layernorm = input_norm(config)
        if "cross_attn" in attentions:
            self.cross_attention_layernorm = input_norm(config)
            self.cross_attention_output_layernorm = output_norm(config)
        self.post_attention_layernorm = input_norm(config)  # Llama's name of the one before the feed-forward network
        self.attention_output_layernorm, self.mlp_output_layernorm = output_norm(config), output_norm(config)
        self.dropout = nn.Dropout(config.residual_dropout)
        self.residual_multiplier = config.residual_multiplier

    def add(self, hidden_states: torch.Tensor, output: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        """The residual stream and a sub-layer's output, (B, L, D) each → their sum."""
        return torch.add(hidden_states, self.dropout(norm(output)), alpha=self.residual_multiplier)

    def add_mlp(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output = self.mlp(self.post_attention_layernorm(hidden_states))
        return self.add(hidden_states, output, self.mlp_output_layernorm)


class DiptychEncoderLayer(DiptychLayer):
    """hidden_states (B, S, D) → (B, S, D)."""

    def __init__(self, config: DiptychPanelConfig, layer_idx: int):
        super().__init__(config, self_attn=DiptychSelfAttention(config, layer_idx))

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: RotaryAngles, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), position_embeddings, attention_mask)
        return self.add_mlp(self.add(hidden_states, attended, self.attention_output_layernorm))


class DiptychDecoderLayer(DiptychLayer):
    """hidden_states (B, T, D) and encoder_hidden_states (B, S, D of the encoder) → (B, T, D).

    Separate hinge: encoder_hidden_states are the encoder's final states, which cross_attn reads, and
    encoder_position_embeddings is None. Merged hinge: they are an encoder layer's input, which self_attn reads;
    attention_mask covers source and target, and encoder_attention_mask is None.
    """

    def __init__(self, config: DiptychPanelConfig, layer_idx: int):
        is_merged = config.cross_attention == "merged"
        attentions = {"self_attn": (DiptychMergedAttention if is_merged else DiptychSelfAttention)(config, layer_idx)}
        if not is_merged:
            attentions["cross_attn"] = DiptychCrossAttention(config, layer_idx)
        super().__init__(config, **attentions)
        self.layer_idx, self.is_merged = layer_idx, is_merged

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        position_embeddings: RotaryAngles,
        encoder_position_embeddings: RotaryAngles | None,
        attention_mask: torch.Tensor | None,
        encoder_attention_mask: torch.Tensor | None,
        cache: EncoderDecoderCache | None = None,
    ) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)
        if self.is_merged:
            is_cached = cache is not None and cache.is_updated.get(self.layer_idx)
            source = None if is_cached else self.input_layernorm(encoder_hidden_states)
            attended, _, _ = self.self_attn(
                normed, source, position_embeddings, encoder_position_embeddings, attention_mask, cache
            )
            hidden_states = self.add(hidden_states, attended, self.attention_output_layernorm)
        else:
            attended, _ = self.self_attn(normed, position_embeddings, attention_mask, cache)
            hidden_states = self.add(hidden_states, attended, self.attention_output_layernorm)
            normed = self.cross_attention_layernorm(hidden_states)
            attended, _ = self.cross_attn(normed, encoder_hidden_states, encoder_attention_mask, cache)
            hidden_states = self.add(hidden_states, attended, self.cross_attention_output_layernorm)
        return self.add_mlp(hidden_states)


class DiptychPreTrainedModel(PreTrainedModel):
    """Loading, saving, initialisation, and what transformers asks a model family to declare."""

    config: DiptychConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DiptychEncoderLayer", "DiptychDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @property
    def _supports_sdpa(self) -> bool:  # which cannot cap its scores; transformers then takes eager attention
        config = self.config
        panels = (config.encoder, config.decoder) if isinstance(config, DiptychConfig) else (config,)
        return all(panel.attention_softcap is None for panel in panels)

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, DiptychRMSNorm):
            init.constant_(module.weight, 1.0 - module.offset)

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Teacher forcing: labels (B, T), one example a row → the same tokens one place later, after the start token.
        ValueError if the config names no start token or no padding token."""
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or pad is None:
            raise ValueError(
                f"labels alone need a start and a padding token, but decoder_start_token_id is {start} and "
                f"pad_token_id is {pad}. Set them in the config, or give decoder_input_ids."
            )
        shifted = F.pad(labels, (1, -1), value=start)
        return shifted.masked_fill(shifted == -100, pad)

    def _resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of=None, mean_resizing=True):
        """Resizes the decoder's table too; the library itself resizes the encoder's and the head."""
        embeddings = super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        decoder = self.get_decoder()
        if isinstance(decoder, DiptychDecoder):
            decoder.embed_tokens = self._get_resized_embeddings(
                decoder.embed_tokens, new_num_tokens, pad_to_multiple_of, mean_resizing
            )
        self.config.vocab_size = embeddings.weight.shape[0]
        return embeddings


def embed(panel: nn.Module, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
    """Tokens (B, L) or finished embeddings (B, L, D) → (B, L, D). ValueError if both or neither were given."""
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise ValueError(f"{type(panel).__name__} takes token ids or embeddings, but {given} were given: give one.")
    return panel.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds


def default_positions(tokens: torch.Tensor, segment_ids: torch.Tensor | None) -> torch.Tensor:
    """Positions of tokens (B, L, …) → (1, L), from 0 in each row; or (B, L), from 0 in each segment:
    segment_ids [[1, 1, 1, 2, 2, 0]] → [[0, 1, 2, 0, 1, 0]]."""
    index = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
    if segment_ids is None:
        return index
    starts = segment_ids != F.pad(segment_ids, (1, -1), value=-1)
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def source_ends(
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    cross_segment_ids: torch.Tensor | None,
) -> torch.Tensor:
    """The position after the source that each target token reads: source positions (B, S), mask and segments (B, S),
    and cross_segment_ids (B, T) if rows are packed → (B, T), else (B, 1)."""
    after = position_ids + 1
    if attention_mask is not None:
        after = after.masked_fill(attention_mask == 0, 0)
    if segment_ids is None:
        return after.amax(dim=1, keepdim=True)
    # A row of S tokens has at most S segments, so that no length depends on the data.
    ends = after.new_zeros(after.shape[0], after.shape[1] + 1).scatter_reduce(1, segment_ids, after, "amax")
    return ends.gather(1, cross_segment_ids.clamp(max=after.shape[1]))


def same_segment(query_segments: torch.Tensor, key_segments: torch.Tensor) -> Callable:
    """The rule "same example" for `masking_utils`: query_segments (B, T) and key_segments (B, S). A padding query
    (segment 0) sees everything: its output is never used, and a softmax over nothing would be NaN."""

    def rule(batch_idx, head_idx, q_idx, kv_idx):
        query_segment = query_segments[batch_idx, q_idx]
        return (query_segment == key_segments[batch_idx, kv_idx]) | (query_segment == 0)

    return rule


def within_lookahead(lookahead: int) -> Callable:
    """The rule "at most so many tokens ahead" for `masking_utils`; 0 is causal."""
    return lambda batch_idx, head_idx, q_idx, kv_idx: kv_idx <= q_idx + lookahead


def within_window(window: int, is_causal: bool) -> Callable:
    """The rule "fewer than so many tokens away" for `masking_utils`, backwards alone where the mask is causal."""

    def rule(batch_idx, head_idx, q_idx, kv_idx):
        is_near = q_idx - kv_idx < window
        return is_near if is_causal else is_near & (kv_idx - q_idx < window)

    return rule


def source_then_target(
    source_length: int,
    offset: int | torch.Tensor,
    segment_ids: torch.Tensor | None,
    cross_segment_ids: torch.Tensor | None,
    encoder_segment_ids: torch.Tensor | None,
) -> Callable:
    """The merged hinge's rule for `masking_utils`. The first `source_length` keys are the source's, the others the
    target's. Query i is target token `offset` + i: it sees its source, and the target up to itself. Segments are
    (B, T), (B, T) and (B, S), as in `same_segment`."""
    key_segments = None if segment_ids is None else torch.cat((encoder_segment_ids, segment_ids), dim=1)

    def rule(batch_idx, head_idx, q_idx, kv_idx):
        is_before = kv_idx <= source_length + offset + q_idx
        if key_segments is None:
            return is_before
        place = (batch_idx, q_idx)
        segment = torch.where(kv_idx < source_length, cross_segment_ids[place], segment_ids[place])
        return is_before & ((segment == key_segments[batch_idx, kv_idx]) | (segment == 0))

    return rule


def within_merged_window(
    window: int, offset: int | torch.Tensor, position_ids: torch.Tensor, encoder_position_ids: torch.Tensor
) -> Callable:
    """`within_window` for the keys of `source_then_target`: of the source's by their positions (B, S), which padding
    may part from those of the target's queries (B, T); of the target's by their order."""
    source_length = encoder_position_ids.shape[1]

    def rule(batch_idx, head_idx, q_idx, kv_idx):
        source_position = encoder_position_ids[batch_idx, kv_idx.clamp(max=source_length - 1)]
        from_source = position_ids[batch_idx, q_idx] - source_position
        from_target = offset + q_idx - (kv_idx - source_length)
        return torch.where(kv_idx < source_length, from_source, from_target) < window

    return rule


def check_takes_mask(config: DiptychPanelConfig, name: str):
    """Raises ValueError if the attention implementation would ignore the mask that `name` needs."""
    if config._attn_implementation not in ("eager", "sdpa", "flex_attention"):
        raise ValueError(
            f"{name} needs attention that takes a mask, but attn_implementation is {config._attn_implementation!r}: "
            "use 'sdpa', 'flex_attention' or 'eager'."
        )


def check_segments(config: DiptychPanelConfig, segment_ids: torch.Tensor | None, batch: int, length: int, name: str):
    """Raises ValueError if the shape is not that of the tokens, or if the attention cannot keep examples apart."""
    if segment_ids is None:
        return
    if tuple(segment_ids.shape) != (batch, length):
        raise ValueError(
            f"{name} has shape {tuple(segment_ids.shape)}, but there are {(batch, length)} tokens: "
            "give one segment number per token."
        )
    check_takes_mask(config, name)


def windowed_layers(config: DiptychPanelConfig, *masks: torch.Tensor | None) -> list[bool]:
    """Whether each layer of a panel has a window. ValueError if so, and it could not be joined to one of the masks."""
    if config.windowed_layers:
        check_takes_mask(config, "attention_window")
        for mask in masks:
            if mask is not None and (not isinstance(mask, torch.Tensor) or mask.ndim != 2):
                raise ValueError("A model with attention_window makes its own masks: give masks of padding, (B, L).")
    return [layer in (config.windowed_layers or ()) for layer in range(config.num_hidden_layers)]


def rotary_angles(panel: nn.Module, states: torch.Tensor, position_ids: torch.Tensor) -> dict[bool, RotaryAngles]:
    """Cosines and sines for windowed layers (True) and for the others."""
    angles, windowed = panel.rotary_emb(states, position_ids), panel.window_rotary_emb
    return {False: angles, True: angles if windowed is None else windowed(states, position_ids)}


@dataclass
class DiptychEncoderOutput(BaseModelOutput):
    """The encoder's output with the merged hinge.

    Args:
        layer_inputs: (B, M, S, D), for each decoder layer the encoder layer's input that it reads.
        position_ids: (B, S), positions of the source tokens; those of the target continue them.
    """

    layer_inputs: torch.FloatTensor | None = None
    position_ids: torch.LongTensor | None = None


class DiptychEncoder(DiptychPreTrainedModel):
    """The panel that reads: input_ids (B, S) → BaseModelOutput with last_hidden_state (B, S, D), normed. With the
    merged hinge: DiptychEncoderOutput, and last_hidden_state is not normed."""

    config: DiptychPanelConfig
    _can_record_outputs = {
        "hidden_states": DiptychEncoderLayer,
        "attentions": OutputRecorder(DiptychSelfAttention, index=1),
    }

    def __init__(self, config: DiptychPanelConfig):
        super().__init__(config)
        self.embed_tokens = DiptychEmbedding(config)
        self.dropout = nn.Dropout(config.residual_dropout)
        self.layers = nn.ModuleList([DiptychEncoderLayer(config, i) for i in range(config.num_hidden_layers)])
        has_norm = config.cross_attention == "separate"  # else each decoder layer norms what it reads
        self.norm = DiptychRMSNorm(config) if has_norm else nn.Identity()
        self.rotary_emb, self.window_rotary_emb = rotary_embeddings(config)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> tuple | BaseModelOutput:
        """input_ids (B, S) or inputs_embeds (B, S, D) → last_hidden_state (B, S, D). `capture_outputs` reads the last
        two arguments."""
        hidden_states = embed(self, input_ids, inputs_embeds)
        check_segments(self.config, segment_ids, *hidden_states.shape[:2], "segment_ids")
        if position_ids is None:
            position_ids = default_positions(hidden_states, segment_ids)
        rules = [] if segment_ids is None else [same_segment(segment_ids, segment_ids)]
        if self.config.lookahead is not None:
            check_takes_mask(self.config, f"lookahead={self.config.lookahead}")
            rules.append(within_lookahead(self.config.lookahead))
        masks = {}  # of windowed layers, and of others
        for is_windowed in set(windowed_layers(self.config, attention_mask)):
            window = [within_window(self.config.attention_window, is_causal=False)] * is_windowed
            masks[is_windowed] = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=attention_mask,
                and_mask_function=and_masks(*rules, *window) if rules or window else None,
            )
        angles = rotary_angles(self, hidden_states, position_ids)

        hidden_states = self.dropout(hidden_states)
        after_layers = [hidden_states]  # after_layers[m]: the states after m layers
        for layer, is_windowed in zip(self.layers, windowed_layers(self.config), strict=True):
            hidden_states = layer(
                hidden_states, position_embeddings=angles[is_windowed], attention_mask=masks[is_windowed]
            )
            after_layers.append(hidden_states)
        last_hidden_state = self.norm(hidden_states)
        if self.config.cross_attention == "separate" or self.config.encoder_layer_map is None:
            return BaseModelOutput(last_hidden_state=last_hidden_state)
        return DiptychEncoderOutput(
            last_hidden_state=last_hidden_state,
            layer_inputs=torch.stack([after_layers[m] for m in self.config.encoder_layer_map], dim=1),
            position_ids=position_ids.expand(hidden_states.shape[:2]),
        )


class DiptychDecoder(DiptychPreTrainedModel):
    """The panel that writes: input_ids (B, T) and encoder states → last_hidden_state (B, T, D), normed.

    encoder_hidden_states are the encoder's last (B, S, D); with the merged hinge its layer_inputs (B, M, S, D), and
    encoder_position_ids (B, S) are needed, too. position_ids (B, T) count from the target's beginning in either case.
    """

    config: DiptychPanelConfig
    _can_record_outputs = {
        "hidden_states": DiptychDecoderLayer,
        "attentions": OutputRecorder(DiptychSelfAttention, index=1),
        "cross_attentions": [
            OutputRecorder(DiptychCrossAttention, index=1),
            OutputRecorder(DiptychMergedAttention, index=2),
        ],
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
        self.embed_tokens = DiptychEmbedding(config)
        self.dropout = nn.Dropout(config.residual_dropout)
        self.layers = nn.ModuleList([DiptychDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = DiptychRMSNorm(config)
        self.rotary_emb, self.window_rotary_emb = rotary_embeddings(config)
        self.gradient_checkpointing = False
        self.post_init()
        if config.joint_qk_norm:
            self._tp_plan = gathered(self._tp_plan)
        if config.cross_attention == "merged":  # transformers warns of a plan for layers that do not exist
            self._tp_plan = {rule: style for rule, style in self._tp_plan.items() if ".cross_attn." not in rule}

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
        encoder_position_ids: torch.LongTensor | None = None,
        cache: EncoderDecoderCache | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> tuple | BaseModelOutputWithPastAndCrossAttentions:
        """Shapes as in the class's docstring. past_key_values is the older name of cache; `capture_outputs` reads the
        last two arguments. ValueError if arguments contradict each other."""
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one argument: give one of them.")
        cache = past_key_values if cache is None else cache
        if encoder_hidden_states is None:
            raise ValueError("The decoder needs encoder_hidden_states: there is nothing to write about.")
        hidden_states = embed(self, input_ids, inputs_embeds)
        self._check_cache_and_segments(
            hidden_states, encoder_hidden_states, cache, segment_ids, cross_segment_ids, encoder_segment_ids
        )
        cross_segment_ids = segment_ids if cross_segment_ids is None else cross_segment_ids
        if use_cache and cache is None and segment_ids is None and not self.training:
            cache = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        own_cache = cache.self_attention_cache if cache is not None else None
        if position_ids is None:
            position_ids = self._default_positions(hidden_states, attention_mask, segment_ids, own_cache)

        masks = (attention_mask, encoder_attention_mask)
        windowed = windowed_layers(self.config, attention_mask)
        segments = (segment_ids, cross_segment_ids, encoder_segment_ids)
        if self.config.cross_attention == "merged":
            self._check_merged_inputs(encoder_hidden_states, encoder_position_ids, *masks)
            position_ids = position_ids + source_ends(
                encoder_position_ids, encoder_attention_mask, encoder_segment_ids, cross_segment_ids
            )
            # Source and target at once, since frequencies may depend on the longest position.
            angles = rotary_angles(self, hidden_states, torch.cat((encoder_position_ids, position_ids), dim=1))
            source_length = encoder_position_ids.shape[1]
            encoder_angles = {kind: tuple(part[:, :source_length] for part in both) for kind, both in angles.items()}
            angles = {kind: tuple(part[:, source_length:] for part in both) for kind, both in angles.items()}
            states = hidden_states, encoder_hidden_states
            positions = {False: None, True: (position_ids, encoder_position_ids)}
            self_masks = {
                is_windowed: self._merged_mask(*states, *masks, segments, own_cache, positions[is_windowed])
                for is_windowed in set(windowed)
            }
            encoder_attention_mask = None
            encoder_states_of_layers = encoder_hidden_states.unbind(1)
        else:
            angles, encoder_angles = rotary_angles(self, hidden_states, position_ids), {False: None, True: None}
            self_masks = {
                is_windowed: self._own_mask(hidden_states, attention_mask, segment_ids, own_cache, is_windowed)
                for is_windowed in set(windowed)
            }
            encoder_attention_mask = self._cross_mask(hidden_states, encoder_hidden_states, masks[1], segments)
            encoder_states_of_layers = [encoder_hidden_states] * len(self.layers)

        hidden_states = self.dropout(hidden_states)
        for layer, encoder_states, is_windowed in zip(self.layers, encoder_states_of_layers, windowed, strict=True):
            hidden_states = layer(
                hidden_states,
                encoder_states,
                position_embeddings=angles[is_windowed],
                encoder_position_embeddings=encoder_angles[is_windowed],
                attention_mask=self_masks[is_windowed],
                encoder_attention_mask=encoder_attention_mask,
                cache=cache,
            )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.norm(hidden_states), **{CACHE_NAME: cache}
        )

    def _check_cache_and_segments(self, hidden_states, encoder_states, cache, own, cross, encoder):
        """Raises ValueError if segments contradict each other or the cache, or if they cannot be kept apart."""
        if cache is not None and self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            raise ValueError(
                "Gradient checkpointing runs each layer twice, which would write the cache twice: "
                "give no cache, or call model.eval() or gradient_checkpointing_disable() first."
            )
        if cache is not None and own is not None:
            raise ValueError("Packed rows cannot grow token by token: give decoder_segment_ids or cache, not both.")
        if (own is None) != (encoder is None):
            raise ValueError("Packed rows need segments on both sides: give segment_ids and decoder_segment_ids.")
        if cross is not None and own is None:
            raise ValueError("cross_segment_ids say which segment a segment reads: give decoder_segment_ids, too.")
        check_segments(self.config, own, *hidden_states.shape[:2], "decoder_segment_ids")
        check_segments(self.config, cross, *hidden_states.shape[:2], "cross_segment_ids")
        check_segments(self.config, encoder, encoder_states.shape[0], encoder_states.shape[-2], "segment_ids")

    def _default_positions(self, hidden_states, attention_mask, segment_ids, own_cache) -> torch.Tensor:
        """Positions of the target's tokens (B or 1, T), after those in the cache."""
        if self.config.cross_attention == "merged" and attention_mask is not None and attention_mask.ndim == 2:
            # The target follows its source directly, whatever padding stands between them.
            return (attention_mask.long().cumsum(1) - 1)[:, -hidden_states.shape[1] :].clamp(min=0)
        offset = own_cache.get_seq_length() if own_cache is not None else 0
        return default_positions(hidden_states, segment_ids) + offset

    def _own_mask(self, hidden_states, mask, segment_ids, own_cache, is_windowed):
        """→ the mask of self-attention, with the separate hinge."""
        rules = [] if segment_ids is None else [same_segment(segment_ids, segment_ids)]
        rules += [within_window(self.config.attention_window, is_causal=True)] if is_windowed else []
        return create_causal_mask(
            self.config,
            hidden_states,
            mask,
            own_cache,  # by position: its name depends on the version of transformers
            and_mask_function=and_masks(*rules) if rules else None,
        )

    def _cross_mask(self, hidden_states, encoder_states, encoder_mask, segments):
        """→ the mask of cross-attention."""
        own, cross, encoder = segments
        return create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=encoder_mask,
            encoder_hidden_states=encoder_states,
            and_mask_function=None if own is None else same_segment(cross, encoder),
        )

    def _check_merged_inputs(self, encoder_states, encoder_position_ids, mask, encoder_mask):
        """Raises ValueError if the encoder's output is of no merged model, or the attention or a mask does not fit."""
        if encoder_states.ndim != 4 or encoder_position_ids is None:
            raise ValueError(
                "Merged cross-attention reads what each encoder layer read: give encoder_outputs as the encoder "
                "returned them (a DiptychEncoderOutput with layer_inputs and position_ids)."
            )
        check_takes_mask(self.config, "cross_attention='merged'")
        for name, given in {"attention_mask": encoder_mask, "decoder_attention_mask": mask}.items():
            if given is not None and given.ndim != 2:
                raise ValueError(
                    f"Merged cross-attention takes masks of padding, (B, L), not {name} {tuple(given.shape)}."
                )

    def _merged_mask(self, hidden_states, encoder_states, mask, encoder_mask, segments, own_cache, positions):
        """→ one mask over the source's keys and, after them, the target's; with a window if there are positions."""
        (batch, length), source_length = hidden_states.shape[:2], encoder_states.shape[2]
        offset, own_length = 0, length
        if own_cache is not None:
            offset, own_length = own_cache.get_query_offset(0), own_cache.get_mask_sizes(length, 0)[0]
        ones = hidden_states.new_ones(batch, source_length + own_length, dtype=torch.bool)
        source_mask = ones[:, :source_length] if encoder_mask is None else encoder_mask.bool()
        own_mask = ones[:, source_length:] if mask is None else F.pad(mask.bool(), (0, own_length - mask.shape[1]))
        rules = [source_then_target(source_length, offset, *segments)]
        if positions is not None:
            rules.append(within_merged_window(self.config.attention_window, offset, *positions))
        return create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=torch.cat((source_mask, own_mask), dim=1),
            encoder_hidden_states=hidden_states.new_empty(*ones.shape, 0),  # read for shape and dtype
            and_mask_function=and_masks(*rules),
        )


def outputs_to_capture(
    config: DiptychConfig, output_attentions: bool | None, output_hidden_states: bool | None
) -> dict[str, bool]:
    """The arguments that tell a panel what to capture: as given, else as the model's config says. Where neither asks
    for anything, an argument is left out, and the panel follows its own config."""
    asked = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
    asked = {name: getattr(config, name) or None if value is None else value for name, value in asked.items()}
    return {name: value for name, value in asked.items() if value is not None}


class DiptychModel(DiptychPreTrainedModel):
    """Both panels, without a head."""

    _tied_weights_keys = {"decoder.embed_tokens.weight": "encoder.embed_tokens.weight"}

    def __init__(self, config: DiptychConfig):
        if not config.is_encoder_decoder:
            raise ValueError("The config is of an encoder alone (is_encoder_decoder=False): use DiptychEncoderModel.")
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
        cache: EncoderDecoderCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> Seq2SeqModelOutput:
        """
        Args:
            input_ids, attention_mask, position_ids, segment_ids: (B, S), the encoder's side.
            decoder_input_ids, decoder_attention_mask, decoder_position_ids, decoder_segment_ids: (B, T), the other.
            cross_segment_ids: (B, T), the encoder segment that each target token reads; that of its own number unless
                given. With it, several targets can share one source.
            encoder_outputs: what the encoder returned earlier; the source is then not read again.
            cache: the decoder's cache; past_key_values is its older name.
            inputs_embeds, decoder_inputs_embeds: (B, S, D) and (B, T, D), in place of ids.
        """
        captured = outputs_to_capture(self.config, output_attentions, output_hidden_states)
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                segment_ids=segment_ids,
                inputs_embeds=inputs_embeds,
                return_dict=True,
                **captured,
            )
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        is_merged = isinstance(encoder_outputs, DiptychEncoderOutput)
        decoder_outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            position_ids=decoder_position_ids,
            segment_ids=decoder_segment_ids,
            inputs_embeds=decoder_inputs_embeds,
            encoder_hidden_states=encoder_outputs.layer_inputs if is_merged else encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            encoder_segment_ids=segment_ids,
            cross_segment_ids=cross_segment_ids,
            encoder_position_ids=encoder_outputs.position_ids if is_merged else None,
            cache=cache,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=True,
            **captured,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            **{CACHE_NAME: getattr(decoder_outputs, CACHE_NAME)},
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
    accepts_loss_kwargs = True  # transformers' Trainer gives num_items_in_batch; it cannot see it in the signature

    def __init__(self, config: DiptychConfig):
        super().__init__(config)
        if not config.shares_panel_embeddings:
            self._tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}
        self.model = DiptychModel(config)
        self.lm_head = nn.Linear(config.decoder.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForMaskedLM"  # cross-entropy with no shift: the decoder's input is shifted already
        self.post_init()

    def generate(self, *args, **kwargs):
        """`GenerationMixin.generate`, after `check_cached_decoding` unless `use_cache=False`."""
        if kwargs.get("use_cache") is not False:
            check_cached_decoding(self.config.decoder.cross_attention)
        return super().generate(*args, **kwargs)

    @staticmethod
    def create_masks_for_generate(config, attention_mask, **kwargs):
        """The decoder_attention_mask that `generate` gives to compiled decoding. A merged or a windowed decoder needs
        the padding only: it makes its masks itself."""
        if config.decoder.cross_attention == "merged" or config.decoder.windowed_layers:
            return attention_mask
        return create_masks_for_generate(config=config, attention_mask=attention_mask, **kwargs)

    def finished_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """The head's output (…, V) → logits (…, V), divided and capped as the config says."""
        if self.config.logits_divisor != 1:
            logits = logits / self.config.logits_divisor
        cap = self.config.logits_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

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
        cache: EncoderDecoderCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
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
            cache=cache,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.finished_logits(self.lm_head(outputs.last_hidden_state[:, kept]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
        states = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return Seq2SeqLMOutput(loss=loss, logits=logits, **states)


@functools.cache
def check_cached_decoding(cross_attention: str):
    """RuntimeError if a tiny model of that hinge has other logits with a cache than without, in this transformers.

    Another version may hand the cache over in another way: 5.24 renamed the argument, and a model that ignored the new
    name wrote other tokens, without an error. The check takes about 30 ms, once a process.
    """
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    # With wide weights each token depends on those before it; without an end token, all four are generated.
    settings = {"vocab_size": 17, "initializer_range": 1.0, "eos_token_id": None, "cross_attention": cross_attention}
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        model = DiptychForConditionalGeneration(DiptychConfig(**shape, **settings)).to(torch.float32).eval()
        source = torch.tensor([[3, 4, 5], [6, 7, 0]])
        generate = functools.partial(
            super(DiptychForConditionalGeneration, model).generate,
            source,
            attention_mask=source.ne(0).long(),
            max_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        cached, plain = (torch.stack(generate(use_cache=use_cache).logits) for use_cache in (True, False))
    if not torch.allclose(cached, plain, rtol=1e-3, atol=1e-3):
        raise RuntimeError(
            f"Diptych's decoding with a cache is wrong with transformers {transformers.__version__}: logits differ "
            "from those without. Pass use_cache=False, or install a version that this checkpoint's code was made for."
        )


class DiptychEncoderModel(DiptychPreTrainedModel):
    """The encoder panel alone, for embeddings. Loads from its own checkpoint or from a whole model's."""

    _keys_to_ignore_on_load_unexpected = [r"^(model\.)?decoder\.", r"^lm_head\."]

    def __init__(self, config: DiptychConfig):
        config = copy.deepcopy(config)  # the caller may build a whole model from the same config
        config.is_encoder_decoder = False
        config.encoder.encoder_layer_map = None  # no decoder reads the layers' inputs
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
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutput:
        """input_ids (B, S) or inputs_embeds (B, S, D) → last_hidden_state (B, S, D), normed."""
        return self.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            segment_ids=segment_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **outputs_to_capture(self.config, output_attentions, output_hidden_states),
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
