"""What training must know about a model family: one line for each `model_type` in the table at the foot.

    family_of(model)  ->  Family(lora_targets=("q", "k", …), hidden_states=…, logits=…)     or None: not in the table

A model that is not in the table trains too, with full logits and with LoRA on every linear layer. What stands here was
read in the model files of transformers 5.23, and the tests compare it with what the models themselves compute.

B rows, T target tokens, D width, V vocabulary, N target tokens picked from B × T.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from diptych.data_prep.records import UserError

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    lora_targets: tuple[str, ...]
    """Names of the linear layers that get a LoRA adapter: all of attention and of the feed-forward network."""
    hidden_states: Callable[[PreTrainedModel, Batch], torch.Tensor]
    """Model and batch (without labels) -> what the head reads, (B, T, D)."""
    logits: Callable[[PreTrainedModel, torch.Tensor], torch.Tensor]
    """Model and some of these states (N, D) -> their logits (N, V)."""
    has_position_table: bool = False
    """Whether positions beyond config.max_position_embeddings do not exist."""


def family_of(model: PreTrainedModel | PeftModel) -> Family | None:
    return FAMILIES.get(model.config.model_type)


def without_adapter(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model itself. An adapter lives inside its layers, so calling them still trains the adapter."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def decoder_start_token(model: PreTrainedModel) -> int:
    """The first decoder input, the one that `model.generate` starts with: training has to start with the same."""
    generation = model.generation_config
    configured = getattr(model.config, "decoder_start_token_id", None)  # T5Gemma's config has no such field
    for token in (generation.decoder_start_token_id, configured, generation.bos_token_id):
        if token is not None:
            return token
    raise UserError(
        f"neither config.json nor generation_config.json of this {model.config.model_type} names a "
        f"decoder_start_token_id or a bos_token_id, so it cannot begin to write. Set one there."
    )


def vocabulary_tables(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Every weight with a row for each token: input embeddings and head, a tied one once, under its first name."""
    rows = model.get_output_embeddings().weight.shape[0]
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding | torch.nn.Linear)
        and module.weight.shape[0] == rows
        and any(module.weight is table for table in _input_and_output_tables(model))
    }


def _input_and_output_tables(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    panels = (model, model.get_encoder(), model.get_decoder())
    return [panel.get_input_embeddings().weight for panel in panels] + [model.get_output_embeddings().weight]


def _model_states(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    return model.model(**batch, use_cache=False).last_hidden_state


def _t5_states(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """T5 has no inner model to call: its encoder and decoder hang on the model with the head."""
    mask = batch["attention_mask"]
    source_states = model.encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
    return model.decoder(
        input_ids=batch["decoder_input_ids"],
        encoder_hidden_states=source_states,
        encoder_attention_mask=mask,
        use_cache=False,
    ).last_hidden_state


def _scaled_t5_states(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """The first T5 shares its embedding with the head and scales for it; T5 v1.1 and mT5 do not."""
    states = _t5_states(model, batch)
    return states * model.model_dim**-0.5 if model.config.scale_decoder_outputs else states


def _scaled_umt5_states(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    states = _t5_states(model, batch)
    return states * model.model_dim**-0.5 if model.config.tie_word_embeddings else states


def _head(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    return model.lm_head(states)


def _head_with_bias(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    return model.lm_head(states) + model.final_logits_bias


def _head_with_softcap(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    logits, cap = model.lm_head(states), model.get_decoder().config.final_logit_softcapping
    return logits if cap is None else cap * torch.tanh(logits / cap)


T5_LAYERS = ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo")
BART_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

FAMILIES = {
    "diptych": Family(LLAMA_LAYERS, _model_states, _head),
    "t5": Family(T5_LAYERS, _scaled_t5_states, _head),
    "mt5": Family(T5_LAYERS, _t5_states, _head),
    "umt5": Family(T5_LAYERS, _scaled_umt5_states, _head),
    "bart": Family(BART_LAYERS, _model_states, _head_with_bias, has_position_table=True),
    "mbart": Family(BART_LAYERS, _model_states, _head_with_bias, has_position_table=True),
    "m2m_100": Family(BART_LAYERS, _model_states, _head),  # its table of sinusoids grows when a row is longer
    "marian": Family(BART_LAYERS, _model_states, _head_with_bias, has_position_table=True),
    "pegasus": Family(BART_LAYERS, _model_states, _head_with_bias, has_position_table=True),
    "t5gemma": Family(LLAMA_LAYERS, _model_states, _head_with_softcap),
}
