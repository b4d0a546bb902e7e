"""The token that a decoder is given first: one rule for preparing, training, scoring and generating.

    named_start(config, generation)    → (2, "model config")   from the two configs of a checkpoint
    decoder_start_of("t5-small")       → (0, "model config")       the same from its files, without any model code
    split_start([7, 31, 1], 0, mbart)  → (7, [31, 1])          start and labels of a row that begins with its code

It is `decoder_start_token_id` of generation_config.json, or else of config.json. Where neither has it, it is what the
family itself uses (`STARTS`), and for all others `bos_token_id`, with which transformers' `generate` begins. With some
tokenizers, each row starts with the code of its target's language instead (mBART-cc25, see languages.py).
"""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from diptych.data_prep.command_line.errors import UserError, library_errors
from diptych.data_prep.text_to_ids.checkpoint_config import read_generation_config
from diptych.data_prep.text_to_ids.languages import codes_of

STARTS = {"mbart": "eos_token_id", "plbart": "eos_token_id", "fsmt": "eos_token_id", "diptych": "pad_token_id"}
"""`shift_tokens_right` of the first three moves the last label, the end, to the front."""


def named_start(config: PreTrainedConfig, generation: GenerationConfig) -> tuple[int, str] | None:
    """The token, and where it comes from: "model config", or the field that replaces it; None where there is none.
    UserError for what is no token id."""
    configured = getattr(config, "decoder_start_token_id", None)  # T5Gemma's config has no such field
    for token in (generation.decoder_start_token_id, configured):
        if token is not None:
            return _checked(token, "decoder_start_token_id"), "model config"
    name = STARTS.get(config.model_type, "bos_token_id")
    token = getattr(config if config.model_type in STARTS else generation, name)
    return None if token is None else (_checked(token, name), name)


def _checked(token: Any, name: str) -> int:
    if type(token) is not int or token < 0:
        raise UserError(
            f"{name} is {str(token)[:40]!r} in the checkpoint's config, and a decoder starts with a token id: a whole"
            f" number from 0 on. Correct it there."
        )
    return token


def decoder_start_of(checkpoint: str | None, given: int | None = None) -> tuple[int, str] | None:
    """The same from a checkpoint's files; `given` is a setting, which decides."""
    if given is not None:
        return given, "setting"
    config = _model_config(checkpoint) if checkpoint else None
    if config is None or not getattr(config, "is_encoder_decoder", True):
        return None
    generation = read_generation_config(checkpoint) or GenerationConfig.from_model_config(config)
    return named_start(config, generation)


def split_start(ids: list[int], start: int, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, list[int]]:
    """The start of a row and its labels without it: some labels begin with the start (Gemma's), or with a code."""
    if ids and (ids[0] == start or ids[0] in codes_of(tokenizer).starts):
        return ids[0], ids[1:]
    return start, ids


def _model_config(name: str) -> PreTrainedConfig | None:
    """A config of a type that transformers does not know, such as Diptych's, is not validated."""
    try:
        written, _ = PreTrainedConfig.get_config_dict(name)
    except OSError:  # a tokenizer alone
        return None
    if "model_type" not in written:
        return None
    if written["model_type"] not in CONFIG_MAPPING:  # its parts, such as panels, would stay dicts
        values = {key: value for key, value in written.items() if not isinstance(value, dict)}
        return PreTrainedConfig.from_dict(values)
    with library_errors(f"config.json of '{name}' is not valid", "Correct it, or give --packing false."):
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
