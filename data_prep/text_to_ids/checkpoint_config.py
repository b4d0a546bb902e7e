"""Checks of a checkpoint's name and configs, before anything is loaded.

    check_place("google-t5/t5-small")    → nothing, if it is cached or the Hub has it
    check_place("t5-smal")               → UserError: there is no folder t5-smal, and …
    check_config("google-t5/t5-small")   → nothing; UserError where it says num_layers: 10**9, with the bytes
    read_generation_config("google-t5/t5-small")  → GenerationConfig(…), or None where it has none

On a name that is not cached, `from_pretrained` waits 1, 2, 4, 8 and 8 s in between for each file that it looks for
(huggingface_hub's `http_backoff`), so that a misspelt name took 47 s without a network. Here it is one request.

transformers makes lists as long as a config has layers or labels, and imports the kernels of the Hub that a config
names for attention, where the package `kernels` is installed. Both are refused here.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionResolutionError,
)

from diptych.data_prep.command_line.errors import UserError, excerpt, in_short, library_errors

if TYPE_CHECKING:
    from transformers import GenerationConfig

READ = (".json", ".safetensors", ".jinja", ".model", ".spm")
ADVICE = "Name a checkpoint folder, or a Hub id such as google-t5/t5-small"

WIDTHS = ("d_model", "hidden_size")
INNER_WIDTHS = ("d_ff", "intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim")
LAYERS = ("num_layers", "num_decoder_layers", "num_hidden_layers", "encoder_layers", "decoder_layers")
POSITIONS = "max_position_embeddings"
OTHER_SIZES = ("vocab_size", POSITIONS, "d_kv", "head_dim", "num_heads", "num_attention_heads")
MOST_LAYERS = 1000
"""Also of experts in a layer. The deepest published encoder-decoder has some fifty layers."""
MOST_LABELS = 100_000
"""A config makes a name for each label, and a tokenizer for each of its extra ids."""
MOST_BYTES = 32 * 2**20
"""Of a JSON file: the index of the largest published checkpoints has 9 MB."""
MOST_NESTED, LONGEST_TEXT = 20, 1000
"""Lists and objects in each other in a config, which transformers copies several times (published ones have four);
characters of a text, which it may print."""
CODE_CHOICES = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
SHIPPED_CODE = ("eager", "sdpa", None)
OF_THE_CLASS = ("attribute_map", "sub_configs", "base_config_key")
"""What a config.json would set in transformers' class of configs, beside the methods."""
FP32_BYTES = 4
GENERATION_CONFIG = "generation_config.json"
MOST_LISTED = 10_000
"""Values of a list in a generation config."""


def check_place(name: str) -> None:
    """UserError where `name` is neither a folder nor a Hub repository that is cached or can be reached; and for a
    folder in which something has the name of a checkpoint's file and is none, which libraries would pass over."""
    place = Path(name)
    if place.is_dir():
        for file in place.iterdir():
            if file.suffix in READ and not file.is_file():
                raise UserError(f"{file} is no file that can be read (a pipe, a device, a folder or a broken link).")
        return
    if place.exists():
        raise UserError(f"{name} is a file; a checkpoint is a folder. Name the folder it lies in.")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or ("/" in name and place.parent.is_dir()):
        # what is left, a name or owner/name whose owner is no folder here, may be a Hub id
        raise UserError(f"there is no folder {name}. {ADVICE}.")
    try:  # whether it was downloaded before; no connection is made
        HfApi().resolve_revision(name, local_files_only=True)
    except RevisionResolutionError:
        _ask_hub(name)
    except HFValidationError as error:
        raise UserError(f"there is no folder {name}, and no Hub id looks so: {excerpt(error)} {ADVICE}.") from None


def _ask_hub(name: str) -> None:
    """One request. Other errors of the Hub (not allowed, too many requests, down) are left to `from_pretrained`, which
    tries again."""
    if is_offline_mode():
        raise UserError(
            f"there is no folder {name}, nothing was downloaded under this name, and the Hub is not asked, because"
            f" HF_HUB_OFFLINE is set. Check the spelling. {ADVICE}; to download it, unset HF_HUB_OFFLINE."
        )
    try:
        HfApi().resolve_revision(name)
    except RepositoryNotFoundError as error:
        if not isinstance(error, GatedRepoError):
            raise UserError(
                f"there is no folder {name}, and the Hub has no repository of this name that you may read. Check the"
                f" spelling. {ADVICE}; a private one needs `hf auth login`."
            ) from None
    except HfHubHTTPError:
        pass
    except RevisionResolutionError as error:
        if not isinstance(error.__cause__, HfHubHTTPError):
            raise UserError(
                f"there is no folder {name}, nothing was downloaded under this name, and the Hub cannot be reached"
                f" ({excerpt(error.__cause__)}). Check the spelling and the network. {ADVICE}."
            ) from error


def check_config(name: str) -> None:
    """UserError where config.json, in a folder or on the Hub, has sizes that are no sizes or larger than any model's,
    or names code. A folder without a config (a tokenizer's) is allowed."""
    from transformers import PreTrainedConfig  # seconds, which a misspelt name should not wait for

    for file in Path(name).glob("config*.json"):  # one may name others, for other versions of transformers
        check_bytes(file)
    with library_errors(f"config.json of {name} is no config", "Copy the checkpoint again."):
        try:
            config, _ = PreTrainedConfig.get_config_dict(name)
        except OSError:  # there is none, or it cannot be read: what needs it reports that
            return
        if not isinstance(config, dict):
            raise TypeError(f"it holds a {type(config).__name__}, where settings by name are due")
        check_values(config)
        if not all(isinstance(kind, str) for kind in config.get("architectures") or ()):
            raise TypeError("architectures is no list of texts")
    for part in config_parts(config):
        if taken := [key for key in part if key in OF_THE_CLASS or callable(getattr(PreTrainedConfig, key, None))]:
            raise UserError(
                f"config.json of {name} names {taken[0]}, which is none of its settings. Take it out there."
            )
        _check_part(part, config, name)


def check_values(values: Mapping[str, Any]) -> None:
    """ValueError for a key whose values are nested too deeply, or with a text that is too long."""
    for key, value in values.items():
        level = [key, value]
        for depth in itertools.count():
            if long := [it for it in level if isinstance(it, str) and len(it) > LONGEST_TEXT]:
                raise ValueError(
                    f"{key[:80]!r} has a text of {len(long[0]):,} characters; {LONGEST_TEXT:,} are allowed"
                )
            level = [it for part in level for it in _inside(part)]
            if not level:
                break
            if depth == MOST_NESTED:
                raise ValueError(f"{key[:80]!r} has lists and objects in each other more than {MOST_NESTED} deep")


def _inside(value: Any) -> Iterable[Any]:
    return (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()


def check_bytes(file: Path, most: int = MOST_BYTES) -> None:
    if file.stat().st_size > most:
        raise UserError(f"{file} has {file.stat().st_size:,} bytes, and {most:,} are the most that are read.")


def file_of(name: str | Path, file: str) -> Path | None:
    """In a folder, or of the Hub, from where it is downloaded; None where there is none."""
    from transformers.utils import cached_file

    if Path(name).is_dir():
        return Path(name) / file if (Path(name) / file).is_file() else None
    try:
        found = cached_file(str(name), file, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise UserError(f"{file} of {name} could not be downloaded: {in_short(error)}") from error
    return Path(found) if found else None


def read_generation_config(name: str | Path) -> GenerationConfig | None:
    """None where there is no generation_config.json: transformers makes it from config.json then."""
    from transformers import GenerationConfig

    file, values = file_of(name, GENERATION_CONFIG), {}
    if file is None:
        return None
    check_bytes(file)
    said = f"transformers refuses {name}/{GENERATION_CONFIG}"
    with library_errors(said, "Take it out there.", lambda: first_wrong(values, GenerationConfig.from_dict)):
        values = json.loads(file.read_text(encoding="utf-8"))
        # transformers copies them a dozen times, which takes seconds
        long = [name for name, it in values.items() if isinstance(it, list) and len(it) > MOST_LISTED]
        if long:
            raise UserError(
                f"{long[0][:80]} in {name}/{GENERATION_CONFIG} is a list of more than {MOST_LISTED} values."
            )
        return GenerationConfig.from_dict(values)


def first_wrong(values: Mapping[str, Any], read: Callable[[dict], Any]) -> str:
    """ " (top_k)", the first key without which `read` takes the values; "" where none is found in two seconds."""
    until = time.process_time() + 2
    for key in itertools.takewhile(lambda key: time.process_time() < until, values):
        with contextlib.suppress(Exception):  # it was another key
            read({other: value for other, value in values.items() if other != key})
            return f" ({key[:80]!r})"
    return ""


def config_parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The config and those in it: of an encoder, a decoder, a text model."""
    yield config
    for key, value in config.items():
        if isinstance(value, dict) and _is_part(key):
            yield from config_parts(value)


def _is_part(key: str) -> bool:
    return key in ("encoder", "decoder") or key.endswith("_config")


def _check_part(part: Mapping[str, Any], config: Mapping[str, Any], name: str) -> None:
    for key in (*WIDTHS, *INNER_WIDTHS, *LAYERS, *OTHER_SIZES):
        value = part.get(key)
        is_size = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if value is not None and not is_size:
            raise UserError(
                f"config.json of {name} says that {key} is '{excerpt(value, 40)}', which is no size: a whole number"
                f" from 1 on is due. Correct it, or take another checkpoint."
            )
        if key in LAYERS and value is not None and value > MOST_LAYERS:
            raise UserError(
                f"config.json of {name} asks for {value:,} layers ({key}): at least"
                f" {FP32_BYTES * least_weights(config):,} bytes of weights in fp32. {MOST_LAYERS:,} are the most that"
                f" are tried. Correct it, or take another checkpoint."
            )
    for key, value in part.items():
        is_wrong = isinstance(value, float) and not math.isfinite(value)
        is_wrong = is_wrong or (_is_part(key) and not isinstance(value, dict | None))
        if is_wrong or key.endswith(("_eps", "_epsilon")) and isinstance(value, int | float) and value < 0:
            raise UserError(
                f"config.json of {name} says that {key} is {excerpt(value, 40)}. Correct it, or take another"
                f" checkpoint."
            )
        most = MOST_LABELS if key in ("num_labels", "extra_ids") else MOST_LAYERS
        is_count = key.endswith(("layers", "experts", "ngram")) or most == MOST_LABELS
        if is_count and isinstance(value, int | float) and not value <= most:
            raise UserError(
                f"config.json of {name} says that {key} is {str(value)[:40]}. {most:,} are the most that are tried."
                f" Correct it, or take another checkpoint."
            )
    for key in CODE_CHOICES:
        choice = part.get(key)
        if any(entry not in SHIPPED_CODE for entry in (choice.values() if isinstance(choice, dict) else [choice])):
            raise UserError(
                f"config.json of {name} says that {key} is '{excerpt(choice)}', which would load code. Which code"
                f" runs is not for a checkpoint to say: take the line out."
            )


def least_weights(config: Mapping[str, Any]) -> int:
    """A lower bound of the weights of a model of this config: an embedding table, and in each layer one matrix of its
    feed-forward network. Where parts have sizes of their own, it is that of the largest part."""

    def of_part(part: Mapping[str, Any]) -> int:
        def sizes(*keys: str) -> list[int]:
            return [part[key] for key in keys if isinstance(part.get(key), int)]

        width, inner_width = min(sizes(*WIDTHS), default=1), min(sizes(*INNER_WIDTHS), default=1)
        rows = max(sizes("vocab_size"), default=1)
        if "d_model" in part:  # these have a table of positions; others compute theirs when they need them
            rows = max(rows, *sizes(POSITIONS), 0)
        return width * (rows + max(sizes(*LAYERS), default=0) * inner_width)

    return max(map(of_part, config_parts(config)))
