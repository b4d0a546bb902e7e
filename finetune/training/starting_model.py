"""The model that training starts from, or is resumed with: fp32 unless the recipe says bf16, on the CPU.

    diptych-8m                       new random weights, as many embedding rows as the tokenizer has tokens
    google-t5/t5-small, ./folder     a checkpoint; with method=lora, frozen and with adapters in it
    …, quantize=4bit                 its linear layers in 4 bits on a CUDA GPU. This has not been run: where it was
                                     written there was none

A tokenizer may have more tokens than the checkpoint (`grow_vocabulary`). Rows of tokens that `diptych tokenizer
extend` added start as the mean of the rows of their old pieces; those of other new tokens as transformers makes them.

The training of a paired model may begin with its cross-attention alone, as in T5Gemma's report (arXiv 2504.06225) for
1,000 steps, or with an encoder that is causal, as in the LLM that it was made of, and sees more tokens ahead at each
step. How far it is open depends on the step only, so a resumed run continues exactly.
"""

import importlib.util
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from diptych.data_prep.command_line.arguments import choose_from
from diptych.data_prep.command_line.errors import UserError, excerpt
from diptych.data_prep.text_to_ids.encode import vocabulary_size
from diptych.data_prep.text_to_ids.extend_tokenizer import pieces_of_new_tokens
from diptych.data_prep.text_to_ids.two_vocabularies import check_one_vocabulary
from diptych.finetune.batches.padded_rows import check_same_tokenizer
from diptych.finetune.commands.model_settings import split_names
from diptych.finetune.model.adapters import add_adapter, fill_rows_with_means, load_adapter, resize_embeddings
from diptych.finetune.model.families import decoder_start_token, without_adapter
from diptych.finetune.model.global_attention import attend_globally
from diptych.finetune.model.loading import (
    adapter_settings,
    check_folder,
    has_tokenizer,
    lacking_most,
    load_model,
    load_tokenizer,
)
from diptych.finetune.model.untrusted_files import check_model, savable
from diptych.finetune.training.recipe import TrainRecipe
from diptych.modeling import SIZES, DiptychConfig, DiptychPanelConfig, named_config

CROSS_ATTENTION = re.compile(
    r"\.(cross_attn|cross_attention_layernorm)\."  # Diptych
    r"|\.(cross_attn|pre_cross_attn_layernorm|post_cross_attn_layernorm)\."  # T5Gemma
    r"|\.(encoder_attn|encoder_attn_layer_norm)\."  # BART and its relatives
    r"|decoder\.block\.\d+\.layer\.1\."  # T5
)

WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def starting_model(
    recipe: TrainRecipe, tokenizer: PreTrainedTokenizerBase, saved: Path | None
) -> PreTrainedModel | PeftModel:
    """`saved` is the model folder of the checkpoint to resume from. UserError if the recipe's model, the tokenizer and
    the method do not fit together."""
    new_rows, is_new = 0, is_named_size(recipe.model)
    if recipe.method == "lora" and is_new:
        raise UserError(
            f"method is lora, but {recipe.model} starts from random weights, and there is nothing to adapt. "
            f"Use method: full, or name a checkpoint."
        )
    if recipe.method == "full" and saved is not None:
        model = load_model(str(saved), WEIGHTS[recipe.weights])
    elif is_new:
        model = _new_model(recipe, tokenizer)
    else:
        model = _load_checkpoint(recipe)
        new_rows = _fit_vocabulary(model, tokenizer, recipe)
    if not is_new:
        check_model(model, recipe.model)
    if not is_new and has_tokenizer(recipe.model):
        own = load_tokenizer(recipe.model)
        check_same_tokenizer(recipe.data, tokenizer, recipe.model, own, recipe.grow_vocabulary)
    _write_decoder_start(model)
    attend_globally(model, recipe.global_attention)
    if recipe.trainable == "cross_attention":
        train_cross_attention_alone(model)
    if recipe.open_encoder_steps:
        kind = model.config.model_type
        if kind != "diptych":
            raise UserError(f"open_encoder_steps is given, but the encoder of a {kind} is always open. Set it to 0.")
        model.config.encoder.lookahead = 0
    return _with_adapter(recipe, model, new_rows, saved) if recipe.method == "lora" else model


def is_named_size(name: str) -> bool:
    """`diptych-8m`, and also `diptych-9m`, so that the answer to it is the list of sizes and not a Hub error."""
    return name.startswith("diptych-") and "/" not in name and not Path(name).exists()


def check_size(name: str) -> None:
    if is_named_size(name) and name not in SIZES:
        raise UserError(f"there is no size {name}. {choose_from(name, list(SIZES))}")


def _new_model(recipe: TrainRecipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    check_one_vocabulary(
        tokenizer, "the data", f"{recipe.model} has one. Take a checkpoint of the tokenizer's family."
    )
    settings = {
        "vocab_size": vocabulary_size(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    _check_overrides(recipe.model_overrides)
    try:
        config = named_config(recipe.model, **(settings | recipe.model_overrides))
    except (ValueError, TypeError, StrictDataclassError) as error:  # also what the config says of wrong overrides
        raise UserError(f"{recipe.model} cannot be made: {excerpt(error)}") from error
    return AutoModelForSeq2SeqLM.from_config(config, dtype=WEIGHTS[recipe.weights])  # which its config then says, too


def _check_overrides(overrides: dict[str, Any], where: str = "model_overrides") -> None:
    """transformers' configs keep any name that they are given, and a misspelt one would do nothing."""
    known = {setting.name for setting in fields(DiptychPanelConfig)}
    if where == "model_overrides":
        known |= {setting.name for setting in fields(DiptychConfig)}
    for name, value in overrides.items():
        if name not in known:
            raise UserError(f"{where} names {name!r}. {choose_from(name, sorted(known))}")
        if name in ("encoder", "decoder"):
            _check_overrides(value, f"{where}.{name}")


def _load_checkpoint(recipe: TrainRecipe) -> PreTrainedModel:
    if recipe.model_overrides:
        raise UserError(
            f"model_overrides are given for {recipe.model}, which is a checkpoint: its weights fix its config. "
            f"Drop them, or start from a named size."
        )
    check_folder(recipe.model)
    if adapter_settings(os.path.expanduser(recipe.model)):
        raise UserError(
            f"{recipe.model} is an adapter, and training begins with a whole model. Merge it into its base first: "
            f"diptych merge {shlex.quote(recipe.model)} --out merged, then train --model merged."
        )
    if recipe.quantize == "none":
        return load_model(recipe.model, WEIGHTS[recipe.weights])
    lacking = [] if torch.cuda.is_available() else ["CUDA GPU"]
    lacking += [] if importlib.util.find_spec("bitsandbytes") else ["bitsandbytes (pip install bitsandbytes)"]
    if lacking:
        raise UserError(f"quantize is 4bit, and there is no {' and no '.join(lacking)} here. Set quantize: none.")
    # As QLoRA has it: normal floats, their scales quantized again, products in bf16. Embeddings and head stay.
    in_4_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return load_model(recipe.model, torch.float32, in_4_bits)


def _fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: TrainRecipe) -> int:
    """Adds embedding rows, if allowed. Returns how many rows, the last ones of each table, belong to tokens that the
    checkpoint does not know; not all need be added: T5 has 28 rows more than tokens, where new ones find room."""
    tokens, rows = lacking_most(model, tokenizer)
    if tokens > rows and not recipe.grow_vocabulary:
        raise UserError(
            f"the tokenizer has {tokens} tokens, but {recipe.model} has {rows} embedding rows. If it is the model's "
            f"own tokenizer with tokens added, set grow_vocabulary to train rows for them; if not, prepare the data "
            f"again with --tokenizer {recipe.model}."
        )
    pieces = _pieces_to_learn(tokenizer, recipe.model, is_grown=tokens > rows)
    if tokens > rows:
        resize_embeddings(model, tokens)
    if pieces:
        fill_rows_with_means(model, pieces)
    return max(rows, tokens) - min([rows, *pieces])


def _pieces_to_learn(tokenizer: PreTrainedTokenizerBase, name: str, is_grown: bool) -> dict[int, list[int]]:
    """New tokens and their old pieces. Tokens that the checkpoint's own tokenizer has are left out, since their rows
    were trained. A checkpoint without a tokenizer has trained all of them, unless it lacks rows."""
    pieces = pieces_of_new_tokens(tokenizer)
    if pieces and has_tokenizer(name):
        known = set(load_tokenizer(name).get_vocab().items())
        words = dict(zip(pieces, tokenizer.convert_ids_to_tokens(list(pieces)), strict=True))
        return {token: old for token, old in pieces.items() if (words[token], token) not in known}
    return pieces if is_grown else {}


def _write_decoder_start(model: PreTrainedModel) -> None:
    """Into both configs: evaluation and generation read it there."""
    start = model.config.decoder_start_token_id = decoder_start_token(model)
    generation = model.generation_config
    if generation.decoder_start_token_id != start:
        generation.decoder_start_token_id = start
        model.generation_config = savable(generation)


def _with_adapter(recipe: TrainRecipe, model: PreTrainedModel, new_rows: int, saved: Path | None) -> PeftModel:
    model = add_adapter(
        model,
        str(Path(recipe.model).resolve()) if Path(recipe.model).is_dir() else recipe.model,  # from any folder
        rank=recipe.lora_rank,
        alpha=recipe.lora_alpha,
        dropout=recipe.lora_dropout,
        variant=recipe.lora_variant,
        targets=split_names(recipe.lora_targets),
        peft_config=recipe.peft_config,
        new_rows=new_rows,
        train_embeddings=recipe.lora_embeddings,
    )
    if saved is not None:
        load_adapter(model, saved)
    return model


def train_cross_attention_alone(model: PreTrainedModel) -> None:
    """UserError if the model has none."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(bool(CROSS_ATTENTION.search(name)))
    if not any(weight.requires_grad for weight in model.parameters()):
        raise UserError(
            "trainable is cross_attention, and this model has no such layers: with merged cross-attention, "
            "no weights are new. Set trainable: all."
        )


def open_encoder(model: PreTrainedModel | PeftModel, step: int, steps: int, source_tokens: Sequence[int]) -> None:
    """After `step` of `steps`; does nothing if `steps` is 0. `source_tokens`: of each row."""
    if steps:
        lookahead = None if step >= steps else int(max(source_tokens)) * step // steps
        without_adapter(model).config.encoder.lookahead = lookahead
