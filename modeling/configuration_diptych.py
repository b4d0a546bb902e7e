"""The shape of a Diptych: one config for each panel, and one that hinges them.

    DiptychConfig(hidden_size=256, num_hidden_layers=4)                      # both panels alike
    DiptychConfig(encoder={"num_hidden_layers": 12}, decoder={"num_hidden_layers": 4}, hidden_size=256)

This file travels with every checkpoint; it imports transformers only.
"""

import copy
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.modeling_rope_utils import RopeParameters

# The code in a published checkpoint, which loads it where Diptych is not installed (`trust_remote_code=True`).
REMOTE_CODE = {
    "AutoConfig": "configuration_diptych.DiptychConfig",
    "AutoModel": "modeling_diptych.DiptychModel",
    "AutoModelForSeq2SeqLM": "modeling_diptych.DiptychForConditionalGeneration",
    "AutoModelForTextEncoding": "modeling_diptych.DiptychEncoderModel",
}


def gathered(tp_plan: dict[str, str]) -> dict[str, str]:
    """A tensor-parallel plan for joint_qk_norm, which needs all heads at once: as transformers has it for OLMo 2."""
    styles = {"colwise": "colwise_gather_output", "rowwise": "rowwise_split_input"}
    plan = {rule: styles.get(style, style) if "attn." in rule else style for rule, style in tp_plan.items()}
    return {rule: style for rule, style in plan.items() if not rule.endswith(("q_norm", "k_norm"))}


@strict
class DiptychPanelConfig(PreTrainedConfig):
    r"""One panel: a stack of transformer blocks. By default they are Llama's; the switches add the parts of Mistral,
    Qwen2 and Qwen3, Gemma, OLMo 2 and 3, Granite and Phi-3.

    Args:
        vocab_size: rows of the embedding table. Both panels of a model have the same.
        hidden_size: width of the residual stream.
        intermediate_size: width inside the gated feed-forward network (SwiGLU, arXiv 2002.05202).
        num_hidden_layers: depth of this panel.
        num_attention_heads: query heads.
        num_key_value_heads: key/value heads, shared by groups of query heads (GQA, arXiv 2305.13245); all if None.
        head_dim: size of one head, even; `hidden_size // num_attention_heads` if None. It need not divide the width.
        hidden_act: activation of the gate.
        max_position_embeddings: tokens that the rotary positions are scaled for; not a hard limit.
        rms_norm_eps: epsilon of every RMSNorm (arXiv 1910.07467).
        norm_offset: what every RMSNorm adds to its weight; Gemma: 1.
        norm_placement: "before" each sub-layer (Llama), "after" it (OLMo 2), or "around" it (both; Gemma 2).
        initializer_range: standard deviation of fresh weights.
        rope_parameters: rotary positions (arXiv 2104.09864) as transformers 5 writes them: `rope_type` (default,
            linear, dynamic, yarn, longrope, llama3), `rope_theta` and what the type needs. With a
            `partial_rotary_factor` below 1, only so much of each head is turned (Phi-4-mini).
        attention_bias: bias on the query, key and value projections (Qwen2).
        attention_output_bias: bias on the attention's output projection.
        mlp_bias: bias on the feed-forward projections.
        qk_norm: RMSNorm on each query and key head (Qwen3).
        joint_qk_norm: for qk_norm, one norm over all heads at once (OLMo 2).
        attention_multiplier: factor on the attention scores; 1 / √head_dim if None.
        attention_softcap: attention scores s become cap · tanh(s / cap), if given (Gemma 2). Needs eager or flex
            attention.
        attention_window: how many tokens a token of a windowed layer sees of those before it, itself included. In a
            bidirectional encoder as many after it.
        windowed_layers: layers whose self-attention has the window.
        window_rope_theta: base of the rotary positions in windowed layers, which are then of the type default, over
            whole heads (Gemma 3, OLMo 3); rope_parameters if None.
        embedding_multiplier: factor on the embeddings of tokens, rounded to their dtype (Gemma, Granite).
        residual_multiplier: factor on what each sub-layer adds to the residual stream (Granite).
        attention_dropout: probability of dropping an attention weight in training. flex attention refuses it.
        residual_dropout: probability of dropping what is added to the residual stream, and the embeddings.
        use_cache: whether the decoder keeps keys and values when it is not training.
        layers_without_rope: layers whose self-attention knows no positions (NoPE, arXiv 2305.19466; SmolLM3).
        lookahead: how many tokens ahead each token of an encoder sees; all if None, none (causal) if 0.
        cross_attention: how the decoder reads. "separate": the encoder's final states, in a sub-layer of its own.
            "merged": the inputs of the encoder's layers, in the softmax of its self-attention, as if source and target
            were one text. Such an encoder has no final norm: each decoder layer norms what it reads.
        encoder_layer_map: for the merged hinge. Decoder layer j reads the states after so many encoder layers; 0 is
            the embeddings. If None, the last decoder layer reads the encoder's end, and each one below it a layer
            earlier.
        is_decoder: set by `DiptychConfig`.
        cross_attention_hidden_size: width of the states that a decoder reads; set by `DiptychConfig`.
    """

    model_type = "diptych_panel"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    base_model_tp_plan = {
        "embed_tokens": "embedding_rowwise",
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 1408
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    norm_offset: float = 0.0
    norm_placement: str = "before"
    initializer_range: float = 0.02
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    joint_qk_norm: bool = False
    attention_multiplier: float | None = None
    attention_softcap: float | None = None
    attention_window: int | None = None
    windowed_layers: list[int] | None = None
    window_rope_theta: float | None = None
    embedding_multiplier: float | int = 1.0
    residual_multiplier: float | int = 1.0
    attention_dropout: float | int = 0.0
    residual_dropout: float | int = 0.0
    use_cache: bool = True
    layers_without_rope: list[int] | None = None
    lookahead: int | None = None
    cross_attention: str = "separate"
    encoder_layer_map: list[int] | None = None
    is_decoder: bool = False
    cross_attention_hidden_size: int | None = None

    def __post_init__(self, **kwargs):
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self.base_model_tp_plan = gathered(self.base_model_tp_plan) if self.joint_qk_norm else self.base_model_tp_plan
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict` validation: ValueError for what cannot be computed."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads is {self.num_key_value_heads}, which does not divide num_attention_heads "
                f"({self.num_attention_heads}). Each serves an equal group of query heads: choose a divisor."
            )
        if self.rotary_size % 2 or not self.rotary_size:
            raise ValueError(
                f"head_dim is {self.head_dim}, of which rotary positions turn {self.rotary_size} numbers in pairs: "
                f"choose an even one."
            )
        bases = {
            "rope_theta": (self.rope_parameters or {}).get("rope_theta"),
            "window_rope_theta": self.window_rope_theta,
        }
        for name, base in bases.items():
            if base is not None and not (isinstance(base, float | int) and 0 < base < float("inf")):
                raise ValueError(
                    f"{name} is {base!r}; rotary positions are counted in its powers: give a number above 0."
                )
        if self.norm_placement not in ("before", "after", "around"):
            raise ValueError(f"norm_placement is {self.norm_placement!r}; there are 'before', 'after' and 'around'.")
        if self.joint_qk_norm and not self.qk_norm:
            raise ValueError("joint_qk_norm says how qk_norm is computed: set qk_norm, too.")
        if self.windowed_layers and (self.attention_window or 0) < 1:
            raise ValueError(f"attention_window is {self.attention_window}; windowed_layers need one of 1 or more.")
        if self.cross_attention not in ("separate", "merged"):
            raise ValueError(f"cross_attention is {self.cross_attention!r}; there are 'separate' and 'merged'.")
        if self.lookahead is not None and self.lookahead < 0:
            raise ValueError(f"lookahead is {self.lookahead}; it counts tokens: 0 is causal, None sees everything.")
        for name in ("layers_without_rope", "windowed_layers"):
            outside = [i for i in getattr(self, name) or [] if not 0 <= i < self.num_hidden_layers]
            if outside:
                raise ValueError(f"{name} has {outside}, but layers are 0 to {self.num_hidden_layers - 1}.")

    @property
    def rotary_size(self) -> int:
        """How many numbers of each head the rotary positions turn."""
        return int(self.head_dim * (self.rope_parameters or {}).get("partial_rotary_factor", 1.0))


PANELS_OWN_FIELDS = {
    *("is_decoder", "cross_attention_hidden_size"),
    *("lookahead", "layers_without_rope", "windowed_layers"),
}
# Given flat to `DiptychConfig`, these hold for both panels.
SHARED_FIELDS = frozenset(DiptychPanelConfig.__annotations__) - PANELS_OWN_FIELDS


@strict
class DiptychConfig(PreTrainedConfig):
    r"""An encoder panel and a decoder panel. Any field of `DiptychPanelConfig` may be given flat and then holds for
    both panels, unless a panel has its own value. Set flat later (`config.use_cache = False`), it changes both. Read
    flat, it is the decoder's (except `rope_parameters`: ask the panel). `lookahead`, `layers_without_rope` and
    `windowed_layers` are a panel's own.

    Args:
        encoder: the panel that reads; `DiptychPanelConfig`, dict or None.
        decoder: the panel that writes; `DiptychPanelConfig`, dict or None.
        vocab_size: rows of every embedding table.
        tie_word_embeddings: one table for the decoder's input, the head, and, where the panels are equally wide, the
            encoder's input. False: a table for each.
        logits_divisor: what the head's output is divided by (Granite).
        logits_softcap: logits l become cap · tanh(l / cap), if given (Gemma 2).
        pad_token_id: fills rows; never attended to, never a target.
        decoder_start_token_id: the first decoder input; the padding token if None (as T5 does it).
    """

    model_type = "diptych"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    sub_configs_defaults = {"encoder": SubConfigSpec(DiptychPanelConfig), "decoder": SubConfigSpec(DiptychPanelConfig)}

    encoder: DiptychPanelConfig | dict[Any, Any] | None = None
    decoder: DiptychPanelConfig | dict[Any, Any] | None = None
    vocab_size: int | None = None
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = True
    logits_divisor: float | int = 1.0
    logits_softcap: float | None = None
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    bos_token_id: int | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self, **kwargs):
        shared = {name: kwargs.pop(name) for name in SHARED_FIELDS & kwargs.keys()}
        # RoPE as configs wrote it before transformers 5; the panels understand it.
        shared |= {name: kwargs.pop(name) for name in {"rope_theta", "rope_scaling"} & kwargs.keys()}
        if self.vocab_size is not None:
            shared["vocab_size"] = self.vocab_size
        encoder, decoder = _panel(self.encoder, shared), _panel(self.decoder, shared)
        decoder.is_decoder = True
        decoder.cross_attention_hidden_size = encoder.hidden_size
        if decoder.cross_attention == "merged" and decoder.encoder_layer_map is None:
            decoder.encoder_layer_map = default_layer_map(encoder.num_hidden_layers, decoder.num_hidden_layers)
        # The encoder hands over the layer inputs that the decoder reads.
        encoder.cross_attention, encoder.encoder_layer_map = decoder.cross_attention, decoder.encoder_layer_map
        if self.vocab_size is None:
            self.vocab_size = decoder.vocab_size
        self.encoder, self.decoder = encoder, decoder
        if self.decoder_start_token_id is None:
            self.decoder_start_token_id = self.pad_token_id
        self.auto_map = dict(REMOTE_CODE)
        kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict` validation: ValueError unless the panels fit together."""
        for name, value in {"logits_divisor": self.logits_divisor, "logits_softcap": self.logits_softcap}.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; logits are divided by it: give a number above 0.")
        sizes = {"model": self.vocab_size, "encoder": self.encoder.vocab_size, "decoder": self.decoder.vocab_size}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"vocab_size differs ({sizes}); the panels share one tokenizer: give it once, flat.")
        if self.decoder.cross_attention == "merged":
            self._validate_merged()

    def _validate_merged(self):
        encoder, decoder = self.encoder, self.decoder
        if encoder.hidden_size != decoder.hidden_size:
            raise ValueError(
                f"Merged cross-attention projects encoder states with the decoder's weights, but hidden_size is "
                f"{encoder.hidden_size} in the encoder and {decoder.hidden_size} in the decoder: use "
                f"cross_attention='separate'."
            )
        if decoder.rope_parameters["rope_type"] == "dynamic":
            raise ValueError(
                "rope_type 'dynamic' changes with the length, also for the source's keys that are cached already: the "
                "merged cross-attention cannot use it. Use 'yarn' or 'linear', or cross_attention='separate'."
            )
        layer_map, depth = decoder.encoder_layer_map, encoder.num_hidden_layers
        if len(layer_map) != decoder.num_hidden_layers or not all(0 <= m <= depth for m in layer_map):
            raise ValueError(
                f"encoder_layer_map is {layer_map}; it needs one number from 0 to {depth} (the encoder's layers) for "
                f"each of the decoder's {decoder.num_hidden_layers} layers."
            )
        if max(layer_map) < depth:
            raise ValueError(
                f"encoder_layer_map ends at {max(layer_map)}, so what encoder layers {max(layer_map)} to {depth - 1} "
                f"write is never read: give the encoder {max(layer_map)} layers, or read its end."
            )

    @property
    def shares_panel_embeddings(self) -> bool:
        """Whether the encoder's input table is the decoder's: embeddings are tied and the panels equally wide."""
        return self.tie_word_embeddings and self.encoder.hidden_size == self.decoder.hidden_size

    def __setattr__(self, name, value):
        # Before `auto_map` is there, at the end of __post_init__, the panels may still be the caller's own objects.
        is_shared = name in SHARED_FIELDS and "auto_map" in self.__dict__
        if is_shared:
            setattr(self.encoder, name, value)
            setattr(self.decoder, name, value)
        if name == "vocab_size" or not is_shared:
            super().__setattr__(name, value)

    def __getattr__(self, name):  # reached only for what this object does not have itself
        if name in SHARED_FIELDS - {"vocab_size", "rope_parameters"} and "decoder" in self.__dict__:
            return getattr(self.decoder, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


def default_layer_map(encoder_depth: int, decoder_depth: int) -> list[int]:
    """Aligned at the top: (5, 6) → [0, 1, 2, 3, 4, 5], which is one LLM of six layers in two panels; (6, 6) → [1 … 6].
    ValueError if the encoder is too shallow for that."""
    lowest = encoder_depth - decoder_depth + 1
    if lowest < 0:
        raise ValueError(
            f"Merged cross-attention lets each of {decoder_depth} decoder layers read another depth of the encoder, "
            f"which has {encoder_depth} layers: say in encoder_layer_map which one reads after how many layers."
        )
    return list(range(lowest, encoder_depth + 1))


def _panel(panel: DiptychPanelConfig | dict | None, shared: dict[str, Any]) -> DiptychPanelConfig:
    """A copy of the caller's panel, with the flat values where it has none of its own."""
    if isinstance(panel, DiptychPanelConfig):
        return copy.deepcopy(panel)
    own = {key: value for key, value in (panel or {}).items() if value is not None}
    return DiptychPanelConfig(**copy.deepcopy(shared | own))


__all__ = ["DiptychConfig", "DiptychPanelConfig"]
