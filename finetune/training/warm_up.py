"""How the training of a paired model begins: with its cross-attention alone, or with an encoder that opens by and by.

    train_cross_attention_alone(model)                  what is fresh learns to read, and spoils nothing that is not
    close_encoder(model)                                causal, as in the LLM
    open_encoder(model, step, steps, source_tokens)     at each step as far as it is due; after `steps`, to everything

T5Gemma's report (arXiv 2504.06225) warms cross-attention up alone for 1,000 steps. How far the encoder is open is a
function of the step, so that a run which goes on goes on with it.
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
    """UserError where there is none."""
    is_found = False
    for name, weight in model.named_parameters():
        is_cross = bool(CROSS_ATTENTION.search(name))
        weight.requires_grad_(is_cross)
        is_found |= is_cross
    if not is_found:
        raise UserError(
            "trainable is cross_attention, and this model has no such layers: with the merged hinge, none is fresh. "
            "Set trainable: all."
        )


def close_encoder(model: PreTrainedModel | PeftModel) -> None:
    """UserError for a model whose encoder cannot be."""
    if model.config.model_type != "diptych":
        raise UserError(
            f"open_encoder_steps is given, but the encoder of a {model.config.model_type} is always open. Set it to 0."
        )
    without_adapter(model).config.encoder.lookahead = 0


def open_encoder(model: PreTrainedModel | PeftModel, step: int, steps: int, source_tokens: Sequence[int]) -> None:
    """After `step` of `steps`; nothing where there are none. `source_tokens`: of each row."""
    if steps:
        lookahead = lookahead_at(step, steps, int(max(source_tokens)))
        without_adapter(model).config.encoder.lookahead = lookahead


def lookahead_at(step: int, steps: int, longest: int) -> int | None:
    return None if step >= steps else longest * step // steps
