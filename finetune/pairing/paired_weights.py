"""Decoder-only LLMs as the panels of a Diptych: which fit, what becomes of their configs, and where weights are from.

    config = paired_config(donor, donor, cross_attention="merged")        # donor: the LLM's own config
    origins = weight_origins(config, encoder_weights, decoder_weights)    # of each tensor: copied, resized or new
    write_weights(origins, folder, torch.bfloat16)                        # one shard at a time is in memory

The blocks of Llama, Mistral, Qwen2, Qwen3 and SmolLM3 are Diptych's, with the same weight names. What differs is a few
fields of their configs (DONORS). With merged cross-attention and a causal encoder the result computes what the donor
computes on source and target in one row; to initialise both panels from one LLM is T5Gemma's idea (arXiv 2504.06225).
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

from diptych.finetune.model.donor_llm import DonorWeights
from diptych.modeling.configuration_diptych import DiptychConfig, DiptychPanelConfig
from diptych.modeling.modeling_diptych import DiptychForConditionalGeneration

COPIED_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "initializer_range"),
)

SHARD_BYTES = 4 * 2**30

CrossAttentionInit = Literal["copied", "fresh", "zeroed"]
Kind = Literal["copied", "reshaped", "fresh"]


def _biased(config: PreTrainedConfig) -> dict[str, Any]:
    return {"attention_bias": config.attention_bias, "attention_output_bias": config.attention_bias}


def _smollm3(config: PreTrainedConfig) -> dict[str, Any]:
    without = [layer for layer, has_rope in enumerate(config.no_rope_layers) if not has_rope]
    return _biased(config) | {"mlp_bias": config.mlp_bias, "layers_without_rope": without or None}


DONORS: dict[str, Callable[[PreTrainedConfig], dict[str, Any]]] = {
    "llama": lambda config: _biased(config) | {"mlp_bias": config.mlp_bias},
    "mistral": lambda config: {},
    "qwen2": lambda config: {"attention_bias": True},
    "qwen3": lambda config: _biased(config) | {"qk_norm": True},
    "smollm3": _smollm3,
}
"""By model_type: the fields that not all donors have. SmolLM and SmolLM2 are Llamas; Qwen2.5 is a Qwen2."""


GEMMA = " Gemma norms after each sub-layer too, scales embeddings, and caps scores: another block. T5Gemma is one."


def donor_panel(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a `DiptychPanelConfig` that computes what this LLM's layers compute.

    Raises:
        ValueError: its blocks, or its positions, are others than a panel has.
    """
    if config.model_type not in DONORS:
        raise ValueError(
            f"model_type {config.model_type!r} is none whose blocks Diptych has; these are: {', '.join(DONORS)}."
            f"{GEMMA if config.model_type.startswith('gemma') else ''}"
        )
    rope = dict(config.rope_parameters)
    if "rope_type" not in rope:
        raise ValueError(f"rope_parameters differ by layer ({', '.join(map(str, rope))}): a panel has one kind.")
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor is not 1: a panel turns whole heads.")
    fields = {name: getattr(config, name) for name in COPIED_FIELDS}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fields |= {"head_dim": head_dim, "rope_parameters": rope, **DONORS[config.model_type](config)}
    if window := sliding_window(config):
        fields["max_position_embeddings"] = min(fields["max_position_embeddings"], window)
    return fields


def sliding_window(config: PreTrainedConfig) -> int | None:
    """Tokens up to which a donor with sliding windows attends to all; longer texts it reads otherwise than we do."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    slides = layer_types is None or "sliding_attention" in layer_types
    return window if window and slides else None


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
    reads["layers_without_rope"] = [
        layer for layer in reads.get("layers_without_rope") or [] if layer < reads["num_hidden_layers"]
    ] or None
    without = set(writes.get("layers_without_rope") or [])
    writes["layers_without_rope"] = [place for place, layer in enumerate(kept) if layer in without] or None
    vocab_size = writes["vocab_size"]
    hinge = {"cross_attention": cross_attention, "encoder_layer_map": encoder_layer_map}
    # Tied tables are one; two donors of one width have two that are worth keeping.
    is_tied = decoder.tie_word_embeddings and (one_donor or reads["hidden_size"] != writes["hidden_size"])
    return DiptychConfig(
        encoder=DiptychPanelConfig(**reads | hinge | {"vocab_size": vocab_size, "lookahead": lookahead}),
        decoder=DiptychPanelConfig(**writes | hinge),
        vocab_size=vocab_size,
        tie_word_embeddings=is_tied,
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

    def tensor(self, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
        """The values, in `dtype`. The generator draws what is fresh."""
        if self.donor_name is None:
            fresh = torch.full(self.shape, self.fill)
            if len(self.shape) > 1 and self.fill:
                fresh.normal_(0.0, self.fill, generator=generator)
            return fresh.to(dtype)
        found = self.weights.tensor(self.donor_name)
        if self.kind == "reshaped":
            missing = self.shape[0] - found.shape[0]
            rows = found.float().mean(0, keepdim=True).to(found.dtype).expand(max(missing, 0), -1)
            found = torch.cat((found[: self.shape[0]], rows))
        return found.to(dtype).contiguous()


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
        donor_name = _donor_name(name, panel, kept, weights)
        is_zeroed = cross_attention_init == "zeroed" and ".cross_attn.o_proj." in name
        fill = 1.0 if name.endswith("norm.weight") else 0.0
        if len(shape) > 1 and not is_zeroed:
            fill = getattr(config, panel).initializer_range
        is_fresh = ".cross_attn." in name and (cross_attention_init == "fresh" or weights.shape(donor_name) != shape)
        if is_fresh or is_zeroed:
            origins.append(WeightOrigin(name, shape, "fresh", panel, None, weights, fill))
            continue
        if donor_name not in weights:
            raise ValueError(f"the donor of the {panel} has no {donor_name}, which {name} would be made of.")
        found = weights.shape(donor_name)
        is_table = name.endswith("embed_tokens.weight") or name == "lm_head.weight"
        if found != shape and not (is_table and found[1:] == shape[1:]):
            raise ValueError(f"{donor_name} of the {panel}'s donor has the shape {found}; its config says {shape}.")
        kind = "copied" if found == shape else "reshaped"
        origins.append(WeightOrigin(name, shape, kind, panel, donor_name, weights, fill))
    return origins


def tied_names(config: DiptychConfig) -> dict[str, str]:
    """What is stored under another name: {"lm_head.weight": "model.encoder.embed_tokens.weight"}."""
    with torch.device("meta"):
        model = DiptychForConditionalGeneration(copy.deepcopy(config))
    return dict(model.all_tied_weights_keys)


def _donor_name(name: str, panel: str, kept: Sequence[int], weights: DonorWeights) -> str:
    """`model.decoder.layers.1.cross_attn.q_proj.weight` → `model.layers.1.self_attn.q_proj.weight`."""
    if name == "lm_head.weight":
        return name if name in weights else "model.embed_tokens.weight"
    inner = name.removeprefix(f"model.{panel}.")
    inner = inner.replace(".cross_attn.", ".self_attn.").replace(".cross_attention_layernorm.", ".input_layernorm.")
    parts = inner.split(".")
    if parts[0] == "layers" and panel == "decoder":
        parts[1] = str(kept[int(parts[1])])
    inner = ".".join(parts)
    return (
        f"model.{inner}" if f"model.{inner}" in weights else inner
    )  # base models are saved without the head's prefix


def write_weights(
    origins: Sequence[WeightOrigin],
    folder: Path,
    dtype: torch.dtype,
    seed: int = 0,
) -> None:
    """Writes model.safetensors, or its shards and their index. One shard at a time is in memory.

    Raises:
        OSError, safetensors.SafetensorError: the disk.
    """
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
