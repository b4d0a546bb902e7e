"""The tokens of a source that attend to all others in a LED, and to which all others attend (Longformer's global
attention, arXiv 2004.05150); all further attention is local.

    attend_globally(model)                 as generation_config.json says, or else the first token of each source
    attend_globally(model, "none")         or a number of tokens; what is saved then says so, model or adapter

A hook gives the encoder its mask, so training, evaluating, generating and serving do the same. A mask that the caller
gives is used instead. Plain transformers does not know the number: give `global_attention_mask` to its `generate`.
"""

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.model.families import GLOBAL_LAYERS, GLOBAL_TOKENS, without_adapter


def attend_globally(model: PreTrainedModel | PeftModel, wanted: str | int = "auto") -> None:
    """`wanted` is `auto`, `first`, `none`, or a number of tokens. Without any, the weights for them are frozen: they
    would get no gradient. UserError for another value, and where the model is no LED and it is not `auto`."""
    model = without_adapter(model)
    if model.config.model_type != "led":
        if wanted != "auto":
            kind = model.config.model_type
            raise UserError(f"global_attention is {wanted}, but a {kind} has none to choose. Leave it at auto.")
        return
    encoder = model.get_encoder()
    before = getattr(encoder, GLOBAL_TOKENS, None)
    saved = getattr(model.generation_config, GLOBAL_TOKENS, 1 if before is None else before)
    tokens = saved if wanted == "auto" else wanted
    if isinstance(tokens, str):
        tokens = {"first": 1, "none": 0}.get(tokens, int(tokens) if tokens.isdecimal() else tokens)
    if type(tokens) is not int or tokens < 0:
        where = f"{GLOBAL_TOKENS} in generation_config.json" if wanted == "auto" else "global_attention"
        raise UserError(f"{where} is {tokens!r}. Set it to first, none, or a number of tokens.")
    setattr(model.generation_config, GLOBAL_TOKENS, tokens)
    model.generation_config._from_model_config = False  # else transformers would not read the number from the file
    if before is None:
        encoder.register_forward_pre_hook(_with_mask, with_kwargs=True)
    setattr(encoder, GLOBAL_TOKENS, tokens)
    if (before == 0) != (tokens == 0):
        for name, module in encoder.named_modules():
            if name.rpartition(".")[2] in GLOBAL_LAYERS:
                module.requires_grad_(tokens > 0)


def _with_mask(encoder: nn.Module, arguments: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    mask, tokens = named.get("attention_mask"), getattr(encoder, GLOBAL_TOKENS)
    if named.get("global_attention_mask") is not None or not tokens:
        return None
    if mask is None:
        given = named.get("input_ids", named.get("inputs_embeds"))
        given = arguments[0] if given is None else given
        mask = torch.ones(given.shape[:2], dtype=torch.long, device=given.device)
    return arguments, named | {"global_attention_mask": ((mask.cumsum(1) <= tokens) & (mask > 0)).to(mask)}
