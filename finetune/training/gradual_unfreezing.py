"""How the training of a paired model begins: with its cross-attention alone, or with an encoder that opens gradually.

    train_cross_attention_alone(model)                  only cross-attention is trained; all other weights are frozen
    close_encoder(model)                                the encoder is causal, as in the LLM that it was made of
    open_encoder(model, step, steps, source_tokens)     sees more tokens ahead at each step; after `steps`, all

T5Gemma's report (arXiv 2504.06225) trains cross-attention alone for the first 1,000 steps. How far the encoder is open
depends on the step only, so a resumed run continues exactly.
"""

import re
from collections.abc import Sequence

from peft import PeftModel
from transformers import PreTrainedModel

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.model.families import without_adapter

CROSS_ATTENTION = re.compile(
    r"\.(cross_attn|cross_attention_layernorm)\."  # Diptych
    r"|\.(cross_attn|pre_cross_attn_layernorm|post_cross_attn_layernorm)\."  # T5Gemma
    r"|\.(encoder_attn|encoder_attn_layer_norm)\."  # BART and its relatives
    r"|decoder\.block\.\d+\.layer\.1\."  # T5
)


def train_cross_attention_alone(model: PreTrainedModel) -> None:
    """UserError if the model has none."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(bool(CROSS_ATTENTION.search(name)))
    if not any(weight.requires_grad for weight in model.parameters()):
        raise UserError(
            "trainable is cross_attention, and this model has no such layers: with the merged hinge, no weights are "
            "new. Set trainable: all."
        )


def close_encoder(model: PreTrainedModel | PeftModel) -> None:
    """UserError for a model of another family than Diptych."""
    if model.config.model_type != "diptych":
        raise UserError(
            f"open_encoder_steps is given, but the encoder of a {model.config.model_type} is always open. Set it to 0."
        )
    without_adapter(model).config.encoder.lookahead = 0


def open_encoder(model: PreTrainedModel | PeftModel, step: int, steps: int, source_tokens: Sequence[int]) -> None:
    """After `step` of `steps`; does nothing if `steps` is 0. `source_tokens`: of each row."""
    if steps:
        lookahead = lookahead_at(step, steps, int(max(source_tokens)))
        without_adapter(model).config.encoder.lookahead = lookahead


def lookahead_at(step: int, steps: int, longest: int) -> int | None:
    return None if step >= steps else longest * step // steps
