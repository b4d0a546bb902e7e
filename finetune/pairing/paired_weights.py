"""Decoder-only LLMs as the panels of a Diptych: which fit, what becomes of their configs, and where weights are from.

    config = paired_config(donor, donor, cross_attention="merged")        # donor: the LLM's own config
    origins = weight_origins(config, encoder_weights, decoder_weights)    # of each tensor: copied, resized or new
    write_weights(origins, folder, torch.bfloat16)                        # one shard at a time is in memory

Diptych's blocks are Llama's, with switches for what other LLMs have more (DONORS), and with Llama's weight names. With
merged cross-attention and a causal encoder the result computes what the donor computes on source and target in a row;
to initialise both panels from one LLM is T5Gemma's idea (arXiv 2504.06225).
"""

import copy
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PreTrainedConfig

from diptych.finetune.model.donor_llm import DonorWeights, divisor_and_cap
from diptych.finetune.model.untrusted_files import check_finite, rounded
from diptych.modeling.configuration_diptych import DiptychConfig, DiptychPanelConfig
from diptych.modeling.modeling_diptych import DiptychForConditionalGeneration

COPIED_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "initializer_range"),
)
AROUND = {
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "attention_output_layernorm": "post_attention_layernorm",
    "mlp_output_layernorm": "post_feedforward_layernorm",
    "cross_attention_output_layernorm": "post_attention_layernorm",
}
"""Names of norms here, and in LLMs with norms after their sub-layers."""

SHARD_BYTES = 4 * 2**30

CrossAttentionInit = Literal["copied", "fresh", "zeroed"]
Kind = Literal["copied", "reshaped", "fresh"]


def _biased(config: PreTrainedConfig) -> dict[str, Any]:
    return {"attention_bias": config.attention_bias, "attention_output_bias": config.attention_bias}


def _smollm3(config: PreTrainedConfig) -> dict[str, Any]:
    without = [layer for layer, has_rope in enumerate(config.no_rope_layers) if not has_rope]
    return _biased(config) | {"mlp_bias": config.mlp_bias, "layers_without_rope": without or None}


def _gemma(config: PreTrainedConfig) -> dict[str, Any]:
    return _biased(config) | {"norm_offset": 1.0, "embedding_multiplier": config.hidden_size**0.5}


def _gemma2(config: PreTrainedConfig) -> dict[str, Any]:
    return _gemma(config) | {
        "hidden_act": config.hidden_activation,
        "norm_placement": "around",
        "attention_multiplier": config.query_pre_attn_scalar**-0.5,
        "attention_softcap": config.attn_logit_softcapping,
    }


def _olmo2(config: PreTrainedConfig) -> dict[str, Any]:
    return _biased(config) | {"norm_placement": "after", "qk_norm": True, "joint_qk_norm": True}


def _granite(config: PreTrainedConfig) -> dict[str, Any]:
    multipliers = ("attention_multiplier", "embedding_multiplier", "residual_multiplier")
    return _biased(config) | {"mlp_bias": config.mlp_bias} | {name: getattr(config, name) for name in multipliers}


DONORS: dict[str, Callable[[PreTrainedConfig], dict[str, Any]]] = {
    "llama": lambda config: _biased(config) | {"mlp_bias": config.mlp_bias},
    "mistral": lambda config: {},
    "qwen2": lambda config: {"attention_bias": True},
    "qwen3": lambda config: _biased(config) | {"qk_norm": True},
    "smollm3": _smollm3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    # transformers caps none of its scores, whatever its config says.
    "gemma3_text": lambda config: _gemma2(config) | {"qk_norm": True, "attention_softcap": None},
    "olmo2": _olmo2,
    "olmo3": _olmo2,
    "granite": _granite,
    "phi3": lambda config: {},
}
"""By model_type: the fields that not all donors have. SmolLM and SmolLM2 are Llamas; Qwen2.5 is a Qwen2."""

IN_THE_WAY = {
    "gemma3": "its vision tower. The text models of Gemma 3 (model_type gemma3_text) are taken",
    "gemma3n": "its per-layer embeddings and alternating updates (AltUp)",
    "gemma4": "its per-layer embeddings and shared keys and values",
    "gpt2": "its learned positions, LayerNorm and ungated feed-forward network",
    "gpt_neox": "its parallel residual, LayerNorm and ungated feed-forward network",
    "falcon": "its parallel residual, LayerNorm and ungated feed-forward network",
    "phi": "its parallel residual, LayerNorm and ungated feed-forward network",
    "olmo": "its LayerNorm without weights",
    "cohere": "its parallel residual and LayerNorm",
    "cohere2": "its parallel residual and LayerNorm",
}
"""By model_type: the block that a panel does not have."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def kind_fault(config: PreTrainedConfig) -> str:
    """Which block of this kind of LLM is in the way, in words; "" if none is."""
    kind = config.model_type
    if kind not in DONORS:
        block = IN_THE_WAY.get(kind)
        block = block or ("its mixture of experts" if any(hasattr(config, name) for name in EXPERTS) else None)
        fault = f"a {kind} cannot be paired because of {block}." if block else f"{kind} is an unknown kind of LLM."
        return f"{fault} These model types can be: {', '.join(DONORS)}."
    if getattr(config, "use_bidirectional_attention", None):
        return f"this {kind} has use_bidirectional_attention: it is an encoder, and a decoder is causal."
    return ""


def donor_panel(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a `DiptychPanelConfig` that computes what this LLM's layers compute. ValueError: its blocks, or
    its positions, are others than a panel has."""
    if fault := kind_fault(config):
        raise ValueError(fault)
    fields = {name: getattr(config, name) for name in COPIED_FIELDS}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fields |= {"head_dim": head_dim, **_positions_and_windows(config)}
    own = DONORS[config.model_type](config)
    return fields | own if "hidden_act" in own else fields | own | {"hidden_act": config.hidden_act}


def _positions_and_windows(config: PreTrainedConfig) -> dict[str, Any]:
    """rope_parameters, and which layers have a sliding window."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if kinds and "sliding_attention" in kinds and not window or window == 0:
        raise ValueError(f"sliding_window is {window}, and layers of sliding attention need 1 or more.")
    kinds = kinds or ["sliding_attention"] * config.num_hidden_layers
    windowed = [layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"] if window else []
    fields: dict[str, Any] = {"rope_parameters": dict(config.rope_parameters)}
    if "rope_type" not in config.rope_parameters:  # by kind of layer
        own = config.rope_parameters["sliding_attention"]
        fields["rope_parameters"] = dict(config.rope_parameters["full_attention"])
        if windowed and own != fields["rope_parameters"]:
            if own["rope_type"] != "default":
                raise ValueError(
                    f"rope_parameters of sliding_attention are {own['rope_type']!r}; windowed layers have 'default'."
                )
            fields["window_rope_theta"] = float(own["rope_theta"])
    if window and window >= config.max_position_embeddings and "window_rope_theta" not in fields:
        windowed = []  # no text is long enough
    return fields | ({"attention_window": window, "windowed_layers": windowed} if windowed else {})


def paired_config(
    encoder: PreTrainedConfig,
    decoder: PreTrainedConfig,
    cross_attention: Literal["merged", "separate"] = "merged",
    decoder_layers: Sequence[int] | None = None,
    encoder_layer_map: Sequence[int] | None = None,
    lookahead: int | None = None,
    one_donor: bool = True,
    **special: Any,
) -> DiptychConfig:
    """The Diptych that two LLMs make, or one in both places.

    Args:
        encoder, decoder: their configs.
        cross_attention: the kind; merged needs equal widths.
        decoder_layers: which layers the decoder keeps, by index; all if None.
        encoder_layer_map: for the merged hinge, at which depth of the encoder each decoder layer reads. By default
            that of its own layer in the donor, for which both must be equally deep.
        lookahead: None lets the encoder see everything, 0 is causal.
        one_donor: whether both are the same model, so that the encoder may share the decoder's embeddings.
        special: further fields of `DiptychConfig` (pad_token_id, decoder_start_token_id …).

    Raises:
        ValueError: this pair cannot be made; nothing was allocated.
    """
    reads, writes = donor_panel(encoder), donor_panel(decoder)
    kept = list(range(writes["num_hidden_layers"])) if decoder_layers is None else list(decoder_layers)
    if cross_attention == "merged":
        depths = reads["num_hidden_layers"], writes["num_hidden_layers"]
        if encoder_layer_map is None and depths[0] != depths[1]:
            raise ValueError(
                f"Merged cross-attention pairs layer with layer, but the encoder has {depths[0]}, the decoder"
                f" {depths[1]}. Say in encoder_layer_map at which depth of the encoder each decoder layer reads, or"
                " take --cross_attention separate."
            )
        encoder_layer_map = kept if encoder_layer_map is None else list(encoder_layer_map)
        reads["num_hidden_layers"] = min(max(encoder_layer_map), depths[0])  # what is never read is left out
    writes["num_hidden_layers"] = len(kept)
    for name in ("layers_without_rope", "windowed_layers"):
        reads[name] = [layer for layer in reads.get(name) or [] if layer < reads["num_hidden_layers"]] or None
        meant = set(writes.get(name) or [])
        writes[name] = [place for place, layer in enumerate(kept) if layer in meant] or None
    vocab_size = writes["vocab_size"]
    hinge = {"cross_attention": cross_attention, "encoder_layer_map": encoder_layer_map}
    # Tied tables are one; two donors of one width have two that are worth keeping.
    is_tied = decoder.tie_word_embeddings and (one_donor or reads["hidden_size"] != writes["hidden_size"])
    return DiptychConfig(
        encoder=DiptychPanelConfig(**reads | hinge | {"vocab_size": vocab_size, "lookahead": lookahead}),
        decoder=DiptychPanelConfig(**writes | hinge),
        vocab_size=vocab_size,
        tie_word_embeddings=is_tied,
        **dict(zip(("logits_divisor", "logits_softcap"), divisor_and_cap(decoder), strict=True)),
        **special,
    )


@dataclass(frozen=True)
class WeightOrigin:
    """Where one tensor of the result comes from."""

    name: str
    """In the Diptych."""
    shape: tuple[int, ...]
    kind: Kind
    panel: Literal["encoder", "decoder"]
    """Whose donor."""
    donor_name: str | None
    """In the donor; None if fresh."""
    weights: DonorWeights
    fill: float
    """Fresh: the standard deviation (matrices), or the value (vectors)."""
    rows: slice
    """Of the donor's tensor, where it holds several of ours (Phi-3)."""

    def tensor(self, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
        """The values, in `dtype`. The generator draws what is fresh."""
        if self.donor_name is None:
            fresh = torch.full(self.shape, self.fill)
            if len(self.shape) > 1 and self.fill:
                fresh.normal_(0.0, self.fill, generator=generator)
            return fresh.to(dtype)
        found = self.weights.tensor(self.donor_name)[self.rows]
        if self.kind == "reshaped":
            missing = self.shape[0] - found.shape[0]
            rows = found.float().mean(0, keepdim=True).to(found.dtype).expand(max(missing, 0), -1)
            found = torch.cat((found[: self.shape[0]], rows))
        check_finite(found, self.donor_name, f"the {self.panel}'s LLM")
        return rounded(found, dtype, self.donor_name, f"the {self.panel}'s LLM").contiguous()


def weight_origins(
    config: DiptychConfig,
    encoder: DonorWeights,
    decoder: DonorWeights,
    decoder_layers: Sequence[int] | None = None,
    cross_attention_init: CrossAttentionInit = "copied",
) -> list[WeightOrigin]:
    """One for each tensor that the Diptych stores, but not for what is tied to another (`tied_names`).

    Args:
        config: of the Diptych, from `paired_config`.
        encoder, decoder: the donors' weights.
        decoder_layers: as given to `paired_config`.
        cross_attention_init: what cross-attention begins with: the decoder's self-attention where shapes agree (as
            T5Gemma), or random weights; or the former with a zero output, so that the decoder at first writes as if
            there were no source.

    Raises:
        ValueError: a donor lacks a weight, or it has another shape than its config says.
    """
    with torch.device("meta"):
        model = DiptychForConditionalGeneration(copy.deepcopy(config))
    tied = model.all_tied_weights_keys
    kept = decoder_layers or range(config.decoder.num_hidden_layers)
    origins = []
    for name, weight in model.state_dict().items():
        if name in tied:
            continue
        panel = "encoder" if name.startswith("model.encoder.") else "decoder"
        weights, shape = encoder if panel == "encoder" else decoder, tuple(weight.shape)
        donor_name, rows = _donor_place(name, panel, kept, weights, getattr(config, panel))
        is_zeroed = cross_attention_init == "zeroed" and ".cross_attn.o_proj." in name
        fill = 1.0 - getattr(config, panel).norm_offset if name.endswith("norm.weight") else 0.0
        if len(shape) > 1 and not is_zeroed:
            fill = getattr(config, panel).initializer_range
        found = _shape(weights, donor_name, rows)
        is_fresh = ".cross_attn." in name and (cross_attention_init == "fresh" or found != shape)
        if is_fresh or is_zeroed:
            origins.append(WeightOrigin(name, shape, "fresh", panel, None, weights, fill, rows))
            continue
        if found is None:
            raise ValueError(f"the donor of the {panel} has no {donor_name}, which {name} would be made of.")
        is_table = name.endswith("embed_tokens.weight") or name == "lm_head.weight"
        if found != shape and not (is_table and found[1:] == shape[1:]):
            raise ValueError(f"{donor_name} of the {panel}'s donor has the shape {found}; its config says {shape}.")
        kind = "copied" if found == shape else "reshaped"
        origins.append(WeightOrigin(name, shape, kind, panel, donor_name, weights, fill, rows))
    return origins


def tied_names(config: DiptychConfig) -> dict[str, str]:
    """What is stored under another name: {"lm_head.weight": "model.encoder.embed_tokens.weight"}."""
    with torch.device("meta"):
        model = DiptychForConditionalGeneration(copy.deepcopy(config))
    return dict(model.all_tied_weights_keys)


def _donor_place(
    name: str, panel: str, kept: Sequence[int], weights: DonorWeights, config: DiptychPanelConfig
) -> tuple[str, slice]:
    """`model.decoder.layers.1.cross_attn.q_proj.weight` → `model.layers.1.self_attn.q_proj.weight`, and its rows."""
    if name == "lm_head.weight":
        return name if name in weights else "model.embed_tokens.weight", slice(None)
    inner = name.removeprefix(f"model.{panel}.")
    inner = inner.replace(".cross_attn.", ".self_attn.").replace(".cross_attention_layernorm.", ".input_layernorm.")
    parts = inner.split(".")
    if config.norm_placement != "before":
        parts = [AROUND.get(part, part) for part in parts]
    if parts[0] == "layers" and panel == "decoder":
        parts[1] = str(kept[int(parts[1])])
    inner = ".".join(parts)
    for donor_name in (f"model.{inner}", inner):  # base models are saved without the head's prefix
        if donor_name in weights:
            return donor_name, slice(None)
        if fused := _part_of_fused(donor_name, weights, config):
            return fused
    return inner, slice(None)


def _part_of_fused(name: str, weights: DonorWeights, config: DiptychPanelConfig) -> tuple[str, slice] | None:
    """`….q_proj.weight` → `….qkv_proj.weight` and which rows of it, if the donor has that."""
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    inside = {"qkv_proj": {"q_proj": queries, "k_proj": keys, "v_proj": keys}}
    inside["gate_up_proj"] = dict.fromkeys(("gate_proj", "up_proj"), config.intermediate_size)
    for fused, parts in inside.items():
        start = 0
        for part, size in parts.items():
            whole = name.replace(f".{part}.", f".{fused}.")
            if whole != name and whole in weights and weights.shape(whole)[0] == sum(parts.values()):
                return whole, slice(start, start + size)
            start += size
    return None


def _shape(weights: DonorWeights, name: str, rows: slice) -> tuple[int, ...] | None:
    """None if there is no such tensor."""
    if name not in weights:
        return None
    first, *others = weights.shape(name)
    return (len(range(first)[rows]), *others)


def write_weights(origins: Sequence[WeightOrigin], folder: Path, dtype: torch.dtype, seed: int = 0) -> None:
    """Writes model.safetensors, or its shards and their index. One shard at a time is in memory. OSError,
    safetensors.SafetensorError where the disk fails."""
    generator = torch.Generator().manual_seed(seed)
    by_name = {origin.name: origin for origin in origins}
    shapes = {name: torch.empty(origin.shape, dtype=dtype, device="meta") for name, origin in by_name.items()}
    shards = split_torch_state_dict_into_shards(shapes, max_shard_size=SHARD_BYTES)
    with tqdm(total=len(origins), unit="tensor", desc="writing", file=sys.stderr) as bar:
        for file, names in shards.filename_to_tensors.items():
            tensors = {}
            for name in names:
                tensors[name] = by_name[name].tensor(dtype, generator)
                bar.update()
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def evenly_spaced(layers: int, count: int) -> list[int]:
    """`count` of `layers` indices, the first and the last among them: (6, 3) → [0, 2, 5]."""
    if not 2 <= count <= layers:
        raise ValueError(f"of {layers} layers, 2 to {layers} can be kept, not {count}.")
    return [round(place * (layers - 1) / (count - 1)) for place in range(count)]
