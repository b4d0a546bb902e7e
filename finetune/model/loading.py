"""A checkpoint's name in; a model ready for inference with its tokenizer out, or one message that says what is wrong.

    loaded = load_checkpoint("runs/translate/final")         # a folder as save_pretrained writes it
    loaded = load_checkpoint("google-t5/t5-small")           # a Hub id
    loaded = load_checkpoint("runs/translate-lora/final")    # a peft adapter; its base is found

Any `AutoModelForSeq2SeqLM` checkpoint. An adapter is merged into its base, so the result is always a plain model.
Weights are read from safetensors only, and code in a checkpoint is never run.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from logging import Filter
from pathlib import Path

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.models.pegasus.modeling_pegasus import PegasusSinusoidalPositionalEmbedding
from transformers.utils import logging

import diptych.modeling  # noqa: F401  registers Diptych with the Auto classes
from diptych.data_prep.command_line.errors import UserError, counted, in_short, library_errors
from diptych.data_prep.text_to_ids import checkpoint_config
from diptych.data_prep.text_to_ids.checkpoint_config import check_bytes, check_config, check_place, file_of
from diptych.data_prep.text_to_ids.encode import vocabulary_sizes
from diptych.data_prep.text_to_ids.templates import load_template
from diptych.data_prep.text_to_ids.tokenizer_files import has_tokenizer, open_tokenizer
from diptych.finetune.model import untrusted_files as untrusted
from diptych.finetune.model.device_speed import training_pace
from diptych.finetune.model.families import embedding_rows, table_positions, unread_names
from diptych.finetune.model.global_attention import attend_globally
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.untrusted_files import MODEL_WEIGHTS, weight_files

ADAPTER_CONFIG = "adapter_config.json"
EXPORT_FILE = "export.json"
"""`diptych export` writes it into its folders."""
_NO_CODE = {"trust_remote_code": False}  # without it, transformers would ask on the terminal whether to run code


def load_checkpoint(
    path: str | Path, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu", template: str = ""
) -> LoadedModel:
    """The model in eval mode on `device`, in `dtype` ("auto": as it was saved), and the tokenizer saved with it.

    `template` is the name or file of one to use in place of the tokenizer's own. UserError where the own one no longer
    gives the texts and token ids that it gave when it was saved, and for whatever else is wrong with the checkpoint.
    """
    name = os.path.expanduser(path)
    model, tokenizer = load_parts(name, dtype)
    untrusted.check_model(model, name)
    loaded = LoadedModel.of(model.eval(), tokenizer, load_template(template) if template else None)
    say_if_slow(name, model.dtype, torch.device(device))
    model.to(device)
    return loaded


def load_parts(name: str, dtype: str | torch.dtype = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer as `load_checkpoint` has them, on the CPU; the template is not looked at."""
    check_folder(name)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    if adapter := adapter_settings(name):
        tokenizer = load_tokenizer(name, fallback=adapter["base_model_name_or_path"])
        model = _load_adapted(name, adapter, tokenizer, dtype)
    else:
        model, tokenizer = load_model(name, dtype), load_tokenizer(name)
    check_embedding_rows(model, tokenizer, name)
    return model, tokenizer


def say_if_slow(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Many checkpoints are saved in bf16 or fp16, which most CPUs can only emulate."""
    if dtype not in (torch.bfloat16, torch.float16) or device.type != "cpu":
        return
    times_slower = training_pace(device, torch.float32) / training_pace(device, dtype)
    if times_slower > 2:
        print(
            f"{name}: its weights are {str(dtype).removeprefix('torch.')}, which this CPU computes {times_slower:.0f} "
            f"times slower than float32. With dtype float32 they take twice the memory.",
            file=sys.stderr,
        )


def pick_device(device: str = "auto") -> torch.device:
    """`auto` takes an accelerator if there is one. UserError for a device that this machine does not have."""
    if device == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        found = torch.empty(0, device=device).device  # torch.device("cuda:9") alone would raise nothing
        if found.type == "meta":
            raise RuntimeError("it holds no values")
        return found
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without it
        reason = in_short(error).split(". ")[0].rstrip(".")
        raise UserError(f"device {device!r} cannot be used: {reason}. Leave it at auto.") from error


def check_folder(name: str) -> None:
    """UserError where `name` is neither a folder nor on a Hub that can be reached, or a folder without checkpoint."""
    check_place(name)
    folder = Path(name)
    if kind := export_kind(name):
        use = "generate from it with --engine ctranslate2, or name" if kind == "ctranslate2" else "name"
        raise UserError(
            f"{name} is an export to {kind}, made by `diptych export`, and no checkpoint: {use} the checkpoint that "
            f"it was made of."
        )
    if folder.is_dir() and not any((folder / file).is_file() for file in ("config.json", ADAPTER_CONFIG)):
        inside = sorted(file.parent for file in folder.glob("*/config.json"))
        hint = f" Did you mean {inside[-1]}?" if inside else ""
        raise UserError(
            f"{name} has neither config.json nor {ADAPTER_CONFIG}, so it is not a checkpoint. Name the folder "
            f"that save_pretrained wrote (after `diptych train`: RUN/final).{hint}"
        )


def export_kind(name: str) -> str:
    """The engine that the folder was exported for (`ctranslate2`, `onnx`); "" where it is no export."""
    file = Path(name) / EXPORT_FILE
    if not file.is_file():
        return ""
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["to"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} says nothing that `diptych export` writes ({error}). Export again.") from None


def adapter_settings(name: str) -> dict:
    """adapter_config.json of a local adapter or of a Hub repository that has one; {} where the model is whole."""
    file = file_of(name, ADAPTER_CONFIG)
    if file is None:
        return {}
    check_bytes(file)
    with library_errors(f"{file} is no JSON", "Copy the adapter again."):
        settings = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or not isinstance(settings.get("base_model_name_or_path"), str | None):
        raise UserError(f"{file} holds no settings of an adapter. Copy the adapter again.")
    if not settings.get("base_model_name_or_path"):
        raise UserError(f"{file} names no base model. Write its folder or Hub id into base_model_name_or_path.")
    return settings


def load_tokenizer(name: str, fallback: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in `name`, or in `fallback` (an adapter's base) where `name` has none."""
    try:
        return open_tokenizer(name)
    except UserError:
        if fallback is None or (Path(name).is_dir() and has_tokenizer(name)):
            raise
        return open_tokenizer(os.path.expanduser(fallback))


def load_model(
    name: str, dtype: str | torch.dtype = "auto", quantization: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """An encoder-decoder checkpoint that is no adapter; with `quantization`, on this rank's GPU. UserError for another
    kind of model, or where weights are missing."""
    settings = {} if quantization is None else {"quantization_config": quantization, "device_map": "cuda"}
    config = load_config(name)
    _check_seq2seq(config, name)
    files = weight_files(name, MODEL_WEIGHTS)
    if quantization is None:  # else it takes a quarter, of the GPU's memory
        untrusted.check_sizes(config, files, dtype, name)
    checkpoint_config.read_generation_config(
        name
    )  # where it is broken, transformers would not use it, or not name the file
    with library_errors(f"the weights of {name} could not be read", "Copy it again."), without_load_report():
        model, info = AutoModelForSeq2SeqLM.from_pretrained(
            name, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True, **settings, **_NO_CODE,
        )  # fmt: skip
    if wrong := sorted(info["mismatched_keys"]):
        key, found, expected = wrong[0]
        raise UserError(
            f"{counted(len(wrong), 'weight')} of {name} have other shapes than its config.json says: {key} is"
            f" {list(found)}, where {list(expected)} is due. Copy it again, with all its files."
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(
            f"{name} lacks {len(missing)} weights of {type(model).__name__}, {missing[0]} among them; it was saved as "
            f"{', '.join(config.architectures or ['an unnamed class'])}. Name a checkpoint that has both the encoder "
            f"and the decoder: random weights in their place would answer nonsense."
        )
    if config.is_encoder_decoder is not True:  # as in the config of an encoder alone
        raise UserError(f"config.json of {name} says that is_encoder_decoder is not true. Correct it there.")
    if unknown := sorted(info["unexpected_keys"]):
        print(
            f"{name}: {counted(len(unknown), 'weight')} of its files are of no layer of {type(model).__name__}, and"
            f" not used: {unknown[0]}{', …' * (len(unknown) > 1)}",
            file=sys.stderr,
        )
    for said in (model.config, model.generation_config):
        untrusted.check_token_settings(said, max(embedding_rows(model)), name)
    _freeze(model)
    attend_globally(model)
    return model


@contextlib.contextmanager
def without_load_report() -> Iterator[None]:
    """transformers' table of keys that are missing or left over: in its place stand messages of our own."""
    logger = logging.get_logger("transformers.modeling_utils")
    nothing = Filter("no logger's name")  # a level of its own would make transformers (5.24) warn of other things
    logger.addFilter(nothing)
    try:
        yield
    finally:
        logger.removeFilter(nothing)


def _freeze(model: PreTrainedModel) -> None:
    """What gets no gradient, for which DDP would wait. (Marian and Pegasus freeze their tables of sinusoids when they
    are made, but not when they are loaded: transformers 5.24.)"""
    unread = unread_names(model)
    for name, module in model.named_modules():
        is_table = isinstance(module, MarianSinusoidalPositionalEmbedding | PegasusSinusoidalPositionalEmbedding)
        if is_table or name.rpartition(".")[2] in unread:
            module.requires_grad_(False)


def load_config(name: str) -> PreTrainedConfig:
    """UserError for a config that cannot be read, that would load code, or whose weights are quantized."""
    check_config(name)
    advice = "Name a checkpoint folder, or a Hub id such as google-t5/t5-small (the Hub must be reachable for it)."
    if Path(name).is_dir():
        advice = "Copy its config.json again, or name another checkpoint."
    with library_errors(f"the config of {name} could not be read", advice):
        config = AutoConfig.from_pretrained(name, **_NO_CODE)
        for part in [config, *filter(None, (getattr(config, name) for name in config.sub_configs))]:
            # What a call gives is for the caller to say.
            part.return_dict, part.output_attentions, part.output_hidden_states = True, False, False
    for key in ("quantization_config", "transformers_weights"):
        if getattr(config, key, None) is not None:
            raise UserError(
                f"config.json of {name} has a {key}: its weights lie elsewhere, or need other libraries to read. Take "
                f"the checkpoint that is not quantized, with {MODEL_WEIGHTS}."
            )
    return config


def _check_seq2seq(config: PreTrainedConfig, name: str) -> None:
    if type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING:  # first, because BERT and the like have a causal class as well
        kind = "an encoder-only model"
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = "a decoder-only model"
    else:
        kind = "no text-to-text model"
    raise UserError(
        f"{name} is {kind} (model_type {config.model_type}); an encoder-decoder is needed, "
        f"such as Diptych, T5, mT5, BART, M2M100 or T5Gemma."
    )


def _load_adapted(
    name: str, adapter: dict, tokenizer: PreTrainedTokenizerBase, dtype: str | torch.dtype
) -> PreTrainedModel:
    """The base that the adapter names, with the adapter merged in. Merging is done in fp32; `dtype` rounds last."""
    from diptych.finetune.model.adapters import ADAPTER_WEIGHTS, load_for_inference, merge_adapter

    files = weight_files(name, ADAPTER_WEIGHTS)
    untrusted.check_adapter(adapter, files, name)
    base_name = os.path.expanduser(adapter["base_model_name_or_path"])
    try:
        check_folder(base_name)
        base = load_model(base_name, dtype)
    except UserError as error:
        raise UserError(f"{name} is an adapter, and its base model cannot be used: {error}") from error
    tokens, rows = lacking_most(base, tokenizer)
    dtypes = {weight: tensor.dtype for weight, tensor in _tensors(base)}
    untrusted.check_patterns(adapter, [layer for layer, _ in base.named_modules()], name)
    try:
        model = merge_adapter(load_for_inference(base.float(), name, files[0], tokens if rows < tokens else None))
    except UserError as error:
        raise UserError(f"the adapter {name} cannot be put on its base {base_name}: {error}") from error
    for weight, tensor in _tensors(model):
        tensor.data = tensor.data.to(dtypes[weight])
    own = checkpoint_config.read_generation_config(name)  # training writes one
    model.generation_config = untrusted.savable(own or model.generation_config)
    attend_globally(model)
    untrusted.check_token_settings(model.generation_config, max(embedding_rows(model)), name)
    return model


def lacking_most(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """(tokens of the tokenizer, embedding rows of the model), of source or target: where tokens - rows is larger."""
    sides = zip(vocabulary_sizes(tokenizer), embedding_rows(model), strict=True)
    return max(sides, key=lambda side: side[0] - side[1])


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def position_limit(model: PreTrainedModel, of_source: bool = False) -> int | None:
    """Tokens that a row may have: the table of positions (BART), or what rotary positions are scaled for (Diptych);
    None for relative positions (T5). Where panels differ (an LED reads 16,384 tokens and writes 1,024), that of the
    smaller one; with `of_source` the encoder's."""
    config = model.config.to_dict()
    encoder = config.get("encoder") or {}
    panels = [config, encoder | (encoder.get("text_config") or {}), config.get("decoder") or {}]  # T5Gemma 2: nested
    panels, tables = panels[: 3 - of_source], table_positions(model)[: 2 - of_source]
    limits = [panel["max_position_embeddings"] for panel in panels if "max_position_embeddings" in panel]
    return min([*limits, *filter(None, tables)], default=None)


def check_embedding_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    tokens, rows = lacking_most(model, tokenizer)
    if tokens > rows:
        raise UserError(
            f"the tokenizer of {name} has ids up to {tokens - 1}, but the model has {rows} embedding rows. Use the "
            f"tokenizer that the model was trained with, or resize the model and train the new rows: "
            f"model.resize_token_embeddings({tokens})."
        )
