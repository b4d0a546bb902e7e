"""Files of unknown origin are checked before they are loaded: their kind, their place, and the memory they need.

    weights = weight_files("google-t5/t5-small", "model.safetensors")  # [Path(…/model.safetensors)], or its shards
    check_sizes(config, weights, torch.float32, "google-t5/t5-small")  # nothing, or UserError with the bytes
    check_adapter(settings, weight_files(…, "adapter_model.safetensors"), "me/adapter")
    splits = open_prepared("prepared")                                 # rows of numbers and texts, and nothing else

Weights are safetensors, because opening a pickle can run code. The files that an index names must lie beside it. The
sizes that a config asks for are compared with the headers of the files, on torch's meta device, before any weight is
allocated.

Without these checks transformers (5.23) and peft (0.21) follow an index to a `.bin` or out of the folder, unpickle an
adapter that has no safetensors, load what a conversion service answers for a Hub repository of pickles, and allocate a
width of a billion before they compare it.
"""

import copy
import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from datasets.features.features import require_decoding
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForSeq2SeqLM, PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.utils import cached_file

from diptych.data_prep.command_line.errors import UserError, excerpt
from diptych.data_prep.text_to_ids.checkpoint_config import LAYERS, config_parts, least_weights
from diptych.finetune.commands.exit_codes import StorageError

MODEL_WEIGHTS = "model.safetensors"
INDEX = ".index.json"
PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.h5", "*.msgpack")
FOLDS = 4
"""A model may have so many times the weights that its files hold: three tied tables are stored as one."""
SLACK = 2**20
"""… and so many weights more: for small models, a message about missing weights is clearer than one about sizes."""

_FAULTS_OF_CONFIGS = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, ImportError),
    StrictDataclassError,
)
"""What transformers raises for a config with values that it did not expect."""


def weight_files(name: str, wanted: str) -> list[Path]:
    """The file `wanted` (model.safetensors or adapter_model.safetensors), or the shards that its index names, of a
    folder or of the Hub, from where they are downloaded. UserError where there are none, or the index names others."""
    if file := _file(name, wanted):
        return [file]
    index = _file(name, wanted + INDEX) if wanted == MODEL_WEIGHTS else None
    if index is None:
        raise UserError(_no_safetensors(name, wanted))
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{wanted + INDEX} of {name} is no index of weights: {error!r}. Copy it again.") from None
    for shard in shards:
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\]+\.safetensors", shard):
            raise UserError(
                f"{wanted + INDEX} of {name} names {shard!r}. Only *.safetensors files beside it are read; take the"
                f" checkpoint from somewhere else."
            )
    found = {shard: _file(name, shard) for shard in shards}
    if missing := [shard for shard, file in found.items() if file is None]:
        raise UserError(f"{name} lacks {missing[0]}, which its index names. Copy it again, with all its files.")
    return list(found.values())


def _file(name: str, file: str) -> Path | None:
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    try:
        found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise UserError(f"{file} of {name} could not be downloaded: {excerpt(error)}") from error
    return Path(found) if found else None


def _no_safetensors(name: str, wanted: str) -> str:
    pickles = sorted(file.name for pattern in PICKLES for file in Path(name).glob(pattern))
    others = sorted(file.name for file in Path(name).glob("*.safetensors"))
    what, found = wanted if others else "*.safetensors file", ""
    if pickles:
        found = f", only {pickles[0]}"
    elif others:
        found = f" (it has {others[0]})"
    return (
        f"{name} has no {what}{found}. Weights are read from safetensors alone, because a pickle can run code. If you"
        f" trust it, convert it: {conversion(name, wanted)}"
    )


def conversion(name: str, wanted: str = MODEL_WEIGHTS) -> str:
    """A command that makes safetensors of a pickle, which it opens with torch's unpickler that reads tensors only."""
    if wanted != MODEL_WEIGHTS:
        pickle = str(Path(name) / wanted.replace(".safetensors", ".bin"))
        code = (
            "import torch; from safetensors.torch import save_file; "
            f"save_file(torch.load({pickle!r}, weights_only=True), {str(Path(name) / wanted)!r}, {{'format': 'pt'}})"
        )
    else:
        new = f"{Path(name).name}-safetensors"
        code = (
            "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer; "
            f"[kind.from_pretrained({name!r}).save_pretrained({new!r}) for kind in"
            " (AutoModelForSeq2SeqLM, AutoTokenizer)]"
        )
    return f"python -c {shlex.quote(code)}"


def check_sizes(
    config: PreTrainedConfig,
    files: Sequence[Path],
    dtype: str | torch.dtype,
    name: str,
    auto_class: type = AutoModelForSeq2SeqLM,
) -> None:
    """UserError where the config asks for a far larger model than the files hold; StorageError where it is larger than
    the free memory of this machine. Nothing is allocated."""
    shapes = [shape for file in files for shape in _shapes(file)]
    held = sum(map(math.prod, shapes))
    written = config.to_dict()
    layers = max((part.get(key) or 0 for part in config_parts(written) for key in LAYERS), default=0)
    if layers > len(shapes) or _is_absurd(least_weights(written), held):
        raise UserError(_absurd(name, f"{layers:,} layers and at least", least_weights(written), held, len(shapes)))
    weights = _count(config, name, auto_class)
    if _is_absurd(weights, held):
        raise UserError(_absurd(name, "weights of", weights, held, len(shapes)))
    size = _bytes_each(config.dtype if dtype == "auto" else dtype)
    memory = psutil.virtual_memory().available + psutil.swap_memory().free
    if weights * size > memory:
        raise StorageError(
            f"{name} takes {weights * size:,} bytes ({weights:,} weights of {size}), and this machine has {memory:,}"
            f" bytes of memory left. Take a smaller checkpoint, or a machine with more."
        )


def _is_absurd(weights: int, held: int) -> bool:
    return weights > FOLDS * held + SLACK


def _absurd(name: str, what: str, weights: int, held: int, tensors: int) -> str:
    return (
        f"config.json of {name} asks for {what} {4 * weights:,} bytes in fp32, and its files hold {4 * held:,}, in"
        f" {tensors:,} tensors: it is not theirs. Copy the checkpoint again, or take another."
    )


def _shapes(file: Path) -> Iterator[list[int]]:
    """Of all tensors in a file, from its header, which safetensors checks."""
    try:
        with safe_open(file, framework="numpy") as tensors:  # torch would map the file as memory of its own
            for key in tensors.keys():
                yield tensors.get_slice(key).get_shape()
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"the weights of {file.parent} could not be read: {file.name} is damaged, or no safetensors ({error})."
            f" Copy it again."
        ) from error


def _count(config: PreTrainedConfig, name: str, auto_class: type) -> int:
    try:
        with torch.device("meta"), no_init_weights():
            model = auto_class.from_config(copy.deepcopy(config), trust_remote_code=False)
        model.tie_weights()
    except _FAULTS_OF_CONFIGS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"config.json of {name} is not one that a model can be made of: {reason} Mend it.") from error
    return sum(weight.numel() for weight in model.parameters())


def _bytes_each(dtype: str | torch.dtype | None) -> int:
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return dtype.itemsize if isinstance(dtype, torch.dtype) else torch.float32.itemsize


def check_adapter(settings: Mapping[str, Any], files: Sequence[Path], name: str) -> None:
    """UserError where adapter_config.json asks for a method that does more than read weights (BOFT compiles, prompts
    load a tokenizer), for code, or for ranks larger than any tensor of the files."""
    from diptych.finetune.model.adapters import METHODS  # peft takes seconds to import

    method = settings.get("peft_type")
    if method not in METHODS:
        raise UserError(
            f"adapter_config.json of {name} has the peft_type {method!r}. Adapters of {', '.join(METHODS)} are loaded."
        )
    if settings.get("megatron_config"):
        raise UserError(
            f"adapter_config.json of {name} has a megatron_config, which would import"
            f" {settings.get('megatron_core')!r}. Which code runs is not for an adapter to say: take the lines out."
        )
    largest = max((size for file in files for shape in _shapes(file) for size in shape), default=0)
    pattern = settings.get("rank_pattern")
    ranks = [settings.get("r"), *(pattern.values() if isinstance(pattern, dict) else [])]
    for rank in ranks:
        if rank is not None and (not isinstance(rank, int) or not 0 <= rank <= largest):
            asked = f": {4 * rank * largest:,} bytes or more a layer" if isinstance(rank, int) and rank > 0 else ""
            raise UserError(
                f"adapter_config.json of {name} has the rank {str(rank)[:40]}{asked}, and no tensor of its weights has"
                f" a side of more than {largest:,}. Copy the adapter again, or take another."
            )


def open_prepared(folder: str | Path) -> DatasetDict | Dataset:
    """A dataset that `save_to_disk` wrote. UserError where it cannot be read, or a column has pictures, sounds or
    documents: reading such a row would open whatever file or address it names."""
    try:
        found = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder} cannot be read as a prepared dataset ({error!r}). Run `diptych prepare` again."
        ) from error
    for split in found.values() if isinstance(found, DatasetDict) else [found]:
        for column, feature in split.features.items():
            if require_decoding(feature, ignore_decode_attribute=True):
                raise UserError(
                    f"{folder} has a column {column} of type {type(feature).__name__}, and `diptych prepare` writes"
                    f" numbers and texts alone. Prepare the data here."
                )
    return found
