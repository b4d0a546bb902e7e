"""Which settings a call of `model.generate` uses: ours, the user's, and a few of the checkpoint's.

    generation_config(loaded, {"num_beams": 4, "max_new_tokens": 64})  ->  GenerationConfig(…), {}

Search is greedy unless a setting says otherwise. From a checkpoint's generation_config.json only MODEL_SETTINGS are
used. Its search settings (beams, sampling, penalties) are ignored with a warning, so that the scores of two
checkpoints are comparable.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel

from diptych.data_prep.command_line.errors import UserError, message_line, nearest
from diptych.data_prep.text_to_ids.two_vocabularies import target_side
from diptych.finetune.commands.exit_codes import is_main_rank
from diptych.finetune.model.families import GLOBAL_TOKENS, without_adapter
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.untrusted_files import MODEL_SETTINGS, model_settings

DEFAULT_NEW_TOKENS = 256
OWN_SETTINGS = {"num_beams", "num_return_sequences", "temperature", "do_sample", "max_new_tokens", "max_length"}
UNSUPPORTED_SETTINGS = frozenset(
    # transformers loads code from the Hub for these
    ("penalty_alpha", "dola_layers", "constraints", "force_words_ids", "num_beam_groups", "diversity_penalty")
    # these do not produce the text of an encoder-decoder
    + ("return_dict_in_generate", "is_assistant", "token_healing", "guidance_scale")
)


def generation_config(loaded: LoadedModel, settings: dict[str, Any]) -> tuple[GenerationConfig, dict[str, Any]]:
    """The checkpoint's MODEL_SETTINGS updated by `settings`, and those settings that no config holds (a streamer).
    Missing pad and end tokens are taken from the tokenizer."""
    _refuse_unsupported(settings)
    config, target = model_settings(loaded.model.generation_config), target_side(loaded.tokenizer)
    others = config.update(**settings)
    if config.pad_token_id is None:
        config.pad_token_id = target.pad_token_id
    if config.eos_token_id is None:
        config.eos_token_id = target.eos_token_id
    return config, others


@contextmanager
def search_settings_ignored(model: PreTrainedModel) -> Iterator[None]:
    """`model.generate` fills gaps in its config from the model's own one, so that one must hold no search settings."""
    model = without_adapter(model)
    own = model.generation_config
    warn_of_ignored(own, model.name_or_path or "the checkpoint")
    model.generation_config = model_settings(own)
    try:
        yield
    finally:
        model.generation_config = own


def warn_of_ignored(config: GenerationConfig, name: str) -> None:
    defaults = GenerationConfig._get_default_generation_params()
    ignored = {
        setting: value
        for setting, value in config.to_diff_dict().items()
        if setting[0] != "_"
        and setting not in MODEL_SETTINGS | {"transformers_version", GLOBAL_TOKENS}
        and value is not False
        and value != defaults.get(setting)
    }
    if ignored:
        shown = ", ".join(f"{setting} {json.dumps(value, default=str)[:80]}" for setting, value in ignored.items())
        warn_once(f"(search settings of {name} are ignored: {shown}. Search is greedy unless options say otherwise.)")


@cache
def warn_once(text: str) -> None:
    """On stderr, from the first rank only, above a progress bar if there is one."""
    if is_main_rank():
        tqdm.write(message_line(text), file=sys.stderr)


def end_tokens(config: GenerationConfig) -> list[int | None]:
    return config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]


def check_generation_names(generation: dict[str, Any]) -> None:
    """UserError for a name that transformers' generate does not know, or for which there is an option of our own."""
    known = sorted(name for name in GenerationConfig().to_dict() if not name.startswith("_"))
    for name in generation:
        if name in OWN_SETTINGS:
            raise UserError(
                f"generation.{name} has an option of its own. Use --max_new_tokens or --num_beams; `diptych generate` "
                f"also has --num_return_sequences and --temperature (above 0 it samples)."
            )
        if name not in known:
            near = nearest(name, known)
            hint = f"Did you mean {near}?" if near else "See GenerationConfig in its documentation."
            raise UserError(f"generation.{name} is not an argument of transformers' generate. {hint}")
    _refuse_unsupported(generation)


def _refuse_unsupported(settings: dict[str, Any]) -> None:
    if refused := sorted(UNSUPPORTED_SETTINGS & settings.keys()):
        raise UserError(
            f"{', '.join(refused)} cannot be used here: it needs code from the Hub, which never runs, or it does not "
            f"produce the text of an encoder-decoder. Remove it."
        )
