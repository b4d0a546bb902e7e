"""A model in memory in; a folder that CTranslate2 reads out, or a message that names what it cannot express.

    write(loaded, folder, "int8")
    folder/  model.bin               weights and shape, in CTranslate2's format
             config.json             its start, end and unknown token
             shared_vocabulary.json  the token of each id; ids without a token are <unused_i> (a model with two
                                     vocabularies has source_vocabulary.json and target_vocabulary.json)

For T5, BART and their relatives the loaders of CTranslate2's own converter fill the specification from our model in
memory: its `TransformersConverter` would load the checkpoint again, pickles included, and knows no adapters. Fields
that these loaders need and transformers 5 no longer has are added meanwhile.

A Diptych with separate cross-attention is written here. All types of rotary positions become the type that CTranslate2
calls Su, with a factor for each frequency; so yarn (arXiv 2309.00071), llama3, linear and layers without positions are
exact. yarn also scales queries and keys, which becomes a factor on their product. `diptych_faults` names everything
that CTranslate2's layers do not have; each was found by a comparison.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diptych.data_prep.command_line.errors import UserError, library_errors
from diptych.data_prep.text_to_ids.languages import codes_of
from diptych.data_prep.text_to_ids.two_vocabularies import source_side, target_side
from diptych.finetune.exporting.ctranslate2_engine import CTranslate2Engine, import_ctranslate2
from diptych.finetune.model.families import FAMILIES, decoder_start_token, embedding_rows
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.loading import position_limit
from diptych.modeling import DiptychPanelConfig

NOT_EXPRESSED = (
    *("norm_offset", "norm_placement", "joint_qk_norm", "attention_softcap", "windowed_layers"),
    *("embedding_multiplier", "residual_multiplier"),
)
"""Settings of a panel that are not translated."""
NO_ROTATION = np.float32(1e38)
"""A frequency divided by this rotates nothing, at any position."""


def check(model: PreTrainedModel) -> None:
    """UserError that names what CTranslate2 cannot express of this model."""
    import_ctranslate2()
    kind = model.config.model_type
    if kind == "diptych":
        if faults := diptych_faults(model.config):
            raise UserError(
                f"CTranslate2 cannot express this model: {'; '.join(faults)}. Use it as it is (`diptych "
                f"generate`), or export it --to onnx."
            )
    elif kind not in LOADERS:
        reason = REFUSED.get(kind, f"it has no loader for {kind}")
        raise UserError(f"CTranslate2 cannot express this model: {reason}. It takes diptych, {', '.join(LOADERS)}.")


def diptych_faults(config: Any) -> list[str]:
    """What CTranslate2's layers do not have of a DiptychConfig, in words."""
    encoder, decoder = config.encoder, config.decoder
    faults = []
    if decoder.cross_attention == "merged":
        faults.append("cross_attention is 'merged', but its decoder reads the encoder's final states only")
    if encoder.lookahead is not None:
        faults.append(f"encoder.lookahead is {encoder.lookahead}, but its encoder sees the whole source")
    if decoder.qk_norm and decoder.cross_attention == "separate":
        faults.append("decoder.qk_norm is set, but its cross-attention norms no heads (encoder.qk_norm alone is fine)")
    if encoder.rms_norm_eps != decoder.rms_norm_eps:
        faults.append(
            f"rms_norm_eps is {encoder.rms_norm_eps} in the encoder and {decoder.rms_norm_eps} in the decoder, but it "
            f"has one for all norms"
        )
    for name, plain in (("logits_divisor", 1.0), ("logits_softcap", None)):
        if getattr(config, name) != plain:
            faults.append(f"{name} is {getattr(config, name)}, but its logits are those of the head")
    for side, panel in (("encoder", encoder), ("decoder", decoder)):
        for name in NOT_EXPRESSED:
            if getattr(panel, name) != getattr(DiptychPanelConfig, name):
                faults.append(f"{side}.{name} is {getattr(panel, name)}, which is not translated")
        if panel.rotary_size < panel.head_dim:
            faults.append(f"{side}.rope_parameters turn a part of each head, which is not translated")
        rope_type = panel.rope_parameters["rope_type"]
        if rope_type in ("dynamic", "longrope"):
            faults.append(f"{side}.rope_parameters are {rope_type!r}, whose frequencies change with the text's length")
        if panel.hidden_act not in _activations():
            faults.append(
                f"{side}.hidden_act is {panel.hidden_act!r}, but it has only {', '.join(sorted(_activations()))}"
            )
    return faults


def token_limit(model: PreTrainedModel) -> int | None:
    """Tokens that a source or a target may have. T5Gemma 2's sliding windows are not CTranslate2's, so all its layers
    are written with full attention, which is the same for texts that fit in half of the encoder's window."""
    limits = [position_limit(model)]
    if model.config.model_type == "t5gemma2" and "sliding_attention" in model.config.encoder.text_config.layer_types:
        limits.append((model.config.encoder.text_config.sliding_window + 1) // 2)
    return min(filter(None, limits), default=None)


def write(loaded: LoadedModel, folder: Path, precision: str) -> None:
    """Writes the files above. `precision` is CTranslate2's name of the type that weights are stored in; int8 is for
    matrices, with a scale per row. UserError for what cannot be expressed."""
    model = loaded.model
    check(model)
    if precision.startswith("int8") or model.device.type != "cpu" or model.config.model_type == "t5gemma2":
        model = copy.deepcopy(model).cpu()  # CTranslate2 rounds to int8 in place, and takes T5Gemma 2's layers apart
    with torch.no_grad():
        spec = _spec(model, loaded.tokenizer)
        spec.validate()
        spec.optimize(quantization=precision)
        spec.save(str(folder))


def open_export(folder: Path, loaded: LoadedModel) -> CTranslate2Engine:
    """What `write` wrote, with export.json beside it."""
    return CTranslate2Engine(folder, loaded.tokenizer, loaded.template, loaded.device)


def _spec(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    sides = zip((source_side(tokenizer), target_side(tokenizer)), embedding_rows(model), strict=True)
    source, target = (Vocabulary(side, rows) for side, rows in sides)
    if model.config.model_type == "diptych":
        spec = _diptych_spec(model)
        spec.config.layer_norm_epsilon = model.config.decoder.rms_norm_eps
    else:
        spec = _family_spec(model, target)
    spec.register_source_vocabulary(source.tokens)
    spec.register_target_vocabulary(target.tokens)
    config = spec.config
    config.bos_token, config.eos_token, config.unk_token = target.bos_token, target.eos_token, target.unk_token
    config.decoder_start_token = target.tokens[decoder_start_token(model)]
    return spec


class Vocabulary:
    """The methods of a tokenizer that CTranslate2's loaders call, for every row of one side's embedding table.

    The tokenizer itself has gaps (T5 has 32,128 rows for 32,100 tokens) and returns None for a missing special token,
    which CTranslate2 cannot read.
    """

    num_madeup_words = 0
    special_tokens_map: dict[str, list[str]] = {}

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: int):
        codes = codes_of(tokenizer)  # M2M100's codes are not in its vocabulary
        names = {row: codes.spellings[code] for code, row in codes.tokens.items()}
        names |= {row: token for token, row in tokenizer.get_vocab().items()}
        self.tokens = [names.get(row, f"<unused_{row}>") for row in range(rows)]
        if tokenizer.eos_token is None:
            raise UserError("the tokenizer has no eos token, so no output would end. Set tokenizer.eos_token first.")
        self.eos_token = tokenizer.eos_token
        self.bos_token = tokenizer.bos_token or tokenizer.pad_token or self.eos_token
        self.pad_token = tokenizer.pad_token or self.eos_token
        self.unk_token = tokenizer.unk_token or self.eos_token
        self.unk_token_id = self.tokens.index(self.unk_token)

    def get_vocab(self) -> dict[str, int]:
        return {token: row for row, token in enumerate(self.tokens)}

    def convert_ids_to_tokens(self, row: int) -> str:
        return self.tokens[row]


def _family_spec(model: PreTrainedModel, vocabulary: Vocabulary) -> Any:
    """From CTranslate2's own loader, with its wrong assumptions corrected."""
    from ctranslate2.converters import transformers as converters

    kind = model.config.model_type
    loader_name, config_fields = LOADERS[kind]
    loader = getattr(converters, loader_name)()
    loader.set_vocabulary = lambda spec, tokens: None  # one for both sides
    vars(model.config).update(config_fields)  # transformers 5 removed them because its classes imply them
    try:
        with library_errors("CTranslate2 takes no such model", "Use it as it is, or export it --to onnx."):
            spec = loader(model, vocabulary)
    finally:
        for name in config_fields:
            delattr(model.config, name)
    if hasattr(model.config, "layer_norm_epsilon"):
        spec.config.layer_norm_epsilon = model.config.layer_norm_epsilon
    if kind in ("t5", "mt5", "umt5"):
        # The loader scales if embeddings are tied; T5's configs have a field for it, and mT5 never scales.
        scale = FAMILIES[kind].scale(model)
        spec.decoder.scale_outputs = scale if scale != 1.0 else "__optional"
    if hasattr(model.config, "decoder_attention_heads"):  # the loaders take the encoder's for both
        spec.decoder.num_heads = np.int16(model.config.decoder_attention_heads)
    if kind == "m2m_100":
        # M2M100 counts positions from the row after `padding_idx`. A decoder that starts with the padding token begins
        # one row earlier. The loader always takes the table from row 2 on.
        for side, panel in ((spec.encoder, model.get_encoder()), (spec.decoder, model.get_decoder())):
            table = panel.embed_positions
            starts_with_padding = side is spec.decoder and decoder_start_token(model) == table.padding_idx
            side.position_encodings.encodings = table.weights[table.padding_idx + (not starts_with_padding) :]
    if kind == "t5gemma2":
        for side, panel in ((spec.encoder, model.config.encoder.text_config), (spec.decoder, model.config.decoder)):
            for layer in side.layer:
                layer.self_attention.sliding_window = np.int32(0)
                layer.self_attention.queries_scale = float(panel.query_pre_attn_scalar) ** -0.5
        spec.decoder.projection.weight = model.lm_head.out_proj.weight  # the loader takes the embeddings, tied or not
    return spec


def _diptych_spec(model: PreTrainedModel) -> Any:
    from ctranslate2.specs import TransformerDecoderSpec, TransformerEncoderSpec, TransformerSpec

    encoder, decoder = model.model.encoder, model.model.decoder
    encoder_spec = TransformerEncoderSpec(**_shape(encoder.config))
    decoder_spec = TransformerDecoderSpec(**_shape(decoder.config))
    encoder_spec.embeddings[0].weight = encoder.embed_tokens.weight
    decoder_spec.embeddings.weight = decoder.embed_tokens.weight
    decoder_spec.projection.weight = model.lm_head.weight
    for spec, panel in ((encoder_spec, encoder), (decoder_spec, decoder)):
        spec.scale_embeddings = False
        spec.layer_norm.gamma = panel.norm.weight
        for layer_spec, layer in zip(spec.layer, panel.layers, strict=True):
            layer_spec.self_attention = _self_attention(layer, panel)
            if panel is decoder:
                cross = layer_spec.attention = _attention_spec(panel.config, self_attention=False)
                cross.queries_scale = float(layer.cross_attn.scaling)
                _set_projections(cross, layer.cross_attention_layernorm, layer.cross_attn, fused=((0,), (1, 2)))
            ffn, mlp = layer_spec.ffn, layer.mlp
            ffn.layer_norm.gamma = layer.post_attention_layernorm.weight
            ffn.linear_0, ffn.linear_0_noact = _linear(mlp.gate_proj), _linear(mlp.up_proj)
            ffn.linear_1 = _linear(mlp.down_proj)
    return TransformerSpec(encoder_spec, decoder_spec)


def _shape(config: Any) -> dict[str, Any]:
    """Arguments of both specifications. With a rotary_dim they add no positions to the embeddings."""
    return {
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "activation": _activations()[config.hidden_act],
        "ffn_glu": True,
        "rms_norm": True,
        "rotary_dim": config.head_dim,
    }


def _self_attention(layer: nn.Module, panel: nn.Module) -> Any:
    from ctranslate2.specs.attention_spec import RotaryScalingType

    config, attention = panel.config, layer.self_attn
    # CTranslate2 switches to the long factors beyond the original length and rescales if the two lengths differ. Equal
    # lengths and equal factors turn both off.
    positions = {"max_position_embeddings": config.max_position_embeddings}
    positions |= {"original_max_position_embeddings": config.max_position_embeddings}
    spec = _attention_spec(
        config,
        self_attention=True,
        qk_norm=config.qk_norm,
        rotary_dim=config.head_dim,
        rotary_interleave=False,
        rotary_base=config.rope_parameters["rope_theta"],
        rotary_scaling_type=RotaryScalingType.Su,
        **positions,
    )
    unscaled, _ = panel.rotary_emb.compute_default_rope_parameters(config)
    factors = np.full(config.head_dim // 2, NO_ROTATION)
    scale = 1.0
    if attention.has_rope:
        factors = (unscaled.double() / panel.rotary_emb.original_inv_freq.double().cpu()).float().numpy()
        scale = panel.rotary_emb.attention_scaling
    spec.rotary_scaling_long_factor, spec.rotary_scaling_short_factor = factors, factors.copy()
    spec.queries_scale = float(attention.scaling * scale**2)
    _set_projections(spec, layer.input_layernorm, attention, fused=((0, 1, 2),))
    if config.qk_norm:
        spec.q_norm.gamma, spec.k_norm.gamma = attention.q_norm.weight, attention.k_norm.weight
    return spec


def _attention_spec(config: Any, **settings: Any) -> Any:
    from ctranslate2.specs.attention_spec import MultiHeadAttentionSpec

    grouped = config.num_key_value_heads != config.num_attention_heads
    return MultiHeadAttentionSpec(
        rms_norm=True,
        num_heads_kv=config.num_key_value_heads if grouped else None,
        head_dim=config.head_dim,
        **settings,
    )


def _set_projections(spec: Any, norm: nn.Module, attention: nn.Module, fused: tuple[tuple[int, ...], ...]) -> None:
    """`fused`: for each of the specification's matrices the places of query (0), key (1) and value (2) in it."""
    from ctranslate2.converters.utils import fuse_linear

    spec.layer_norm.gamma = norm.weight
    projections = [_linear(layer) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    for place, parts in enumerate(fused):
        fuse_linear(spec.linear[place], [projections[part] for part in parts])
    spec.linear[-1] = _linear(attention.o_proj)


def _linear(layer: nn.Linear) -> Any:
    from ctranslate2.specs.common_spec import LinearSpec

    spec = LinearSpec()
    spec.weight = layer.weight
    if layer.bias is not None:
        spec.bias = layer.bias
    return spec


def _activations() -> dict[str, Any]:
    """CTranslate2's activations by the names of transformers."""
    from ctranslate2.specs.common_spec import Activation

    return {
        "silu": Activation.SWISH,
        "swish": Activation.SWISH,
        "relu": Activation.RELU,
        "gelu": Activation.GELU,
        "gelu_new": Activation.GELUTanh,
        "gelu_pytorch_tanh": Activation.GELUTanh,
        "quick_gelu": Activation.GELUSigmoid,
        "tanh": Activation.Tanh,
        "sigmoid": Activation.Sigmoid,
    }


# By model_type: CTranslate2's loader, and the config fields that it needs. Its own Marian loader is not used: it drops
# the last embedding row and starts from zeros, which is right only for an untrained pad token in the last row.
LOADERS = {
    "t5": ("T5Loader", {}),
    "mt5": ("MT5Loader", {}),
    "umt5": ("UMT5Loader", {}),
    "bart": ("BartLoader", {"normalize_before": False, "normalize_embedding": True}),
    "mbart": ("MBartLoader", {"normalize_before": True, "normalize_embedding": True}),
    "m2m_100": ("M2M100Loader", {"normalize_before": True, "normalize_embedding": False}),
    "marian": ("BartLoader", {"normalize_before": False, "normalize_embedding": False}),
    "pegasus": ("PegasusLoader", {"normalize_before": True, "normalize_embedding": False}),
    "t5gemma2": ("T5Gemma2Loader", {}),
}
REFUSED = {
    "t5gemma": "t5gemma caps its attention scores (attn_logit_softcapping), and CTranslate2's attention does not"
}
