"""Files of unknown origin are checked before they are loaded: their kind, their place, and the memory they need.

    weights = weight_files("google-t5/t5-small", "model.safetensors")  # [Path(…/model.safetensors)], or its shards
    check_sizes(config, weights, torch.float32, "google-t5/t5-small")  # nothing, or UserError with the bytes
    check_model(model, "google-t5/t5-small")                           # nothing, or CheckpointError for a NaN
    check_adapter(settings, weight_files(…, "adapter_model.safetensors"), "me/adapter")
    splits = open_prepared("prepared")                                 # rows of numbers and texts, and nothing else

Weights are safetensors, because opening a pickle can run code. The files that an index names must lie beside it. The
sizes that a config asks for are compared with the headers of the files, on torch's meta device, before any weight is
allocated. What an adapter asks peft to compute, and the patterns by which it names layers, are bounded as well.

Without these checks transformers (5.23) and peft (0.21) follow an index to a `.bin` or out of the folder, unpickle an
adapter, load what a conversion service answers for a Hub repository of pickles, and allocate a width of a billion.
"""

import copy
import itertools
import json
import logging
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import psutil
import pyarrow.compute
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from datasets.features.features import require_decoding
from safetensors import safe_open
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from transformers import AutoModelForSeq2SeqLM, DynamicCache, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from diptych.data_prep.command_line.errors import UserError, counted, library_errors
from diptych.data_prep.text_to_ids.checkpoint_config import (
    LAYERS,
    check_bytes,
    config_parts,
    file_of,
    first_wrong,
    least_weights,
)
from diptych.finetune.commands.exit_codes import CheckpointError, StorageError

AGAIN = "Run `diptych prepare` again."
BUCKETS = [
    ("relative_attention_num_buckets", "relative_attention_max_distance"),
    ("num_buckets", "relative_max_distance"),
]
TOKEN_COLUMN = re.compile(r"labels|\w+_ids")
MODEL_WEIGHTS = "model.safetensors"
INDEX = ".index.json"
PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.h5", "*.msgpack")
WEIGHT_TYPES = ("F64", "F32", "F16", "BF16")
FOLDS = 4
"""A model may have so many times the weights that its files hold: three tied tables are stored as one."""
SLACK = 2**20
"""… and so many weights more: for small models, a message about missing weights is clearer than one about sizes."""

METHODS = ["LORA", "HRA", "IA3", "LOHA", "LOKR", "MISS", "OFT", "VERA"]
"""Those of peft's methods that need a config and nothing else. Left out: AdaLoRA has to be called after each step;
prompts need peft's own forward pass, which packed rows do not use; BOFT builds a CUDA extension; Lily and BEFT cannot
be merged everywhere; FourierFT and FRoD are off by more than 1e-5."""
MOST_HEADER_BYTES = 8 * 2**20
"""Of a safetensors file: 60,000 tensors. Published shards have a few thousand."""
MOST_NUMBER, MOST_TERMS = 10_000, 100
"""In an adapter_config.json, where not the largest side of its tensors is more; and of a series that it names."""
PATTERN_SECONDS = 1
ENDS = ("eos_token_id", "forced_eos_token_id")
TOKEN_SETTINGS = {
    **dict.fromkeys(("pad_token_id", "bos_token_id", "decoder_start_token_id", "forced_bos_token_id"), 0),
    **dict.fromkeys((*ENDS, "suppress_tokens", "begin_suppress_tokens"), 1),
    **{"bad_words_ids": 2, "min_length": 0, "min_new_tokens": 0},
}
"""Of a generation config, what is used of a checkpoint: 0 a number, 1 a list of them, 2 a list of such lists. ENDS may
also be one number."""
MODEL_SETTINGS = frozenset(TOKEN_SETTINGS)
"""Used from a checkpoint's generation config: its special tokens, its forbidden tokens, its shortest output. Settings
that a later transformers adds are not used."""


def weight_files(name: str, wanted: str) -> list[Path]:
    """The file `wanted` (model.safetensors or adapter_model.safetensors), or the shards that its index names, of a
    folder or of the Hub, from where they are downloaded. UserError where there are none, or the index names others."""
    if file := file_of(name, wanted):
        return [file]
    index = file_of(name, wanted + INDEX) if wanted == MODEL_WEIGHTS else None
    if index is None:
        pickles = sorted(file.name for pattern in PICKLES for file in Path(name).glob(pattern))
        others = sorted(file.name for file in Path(name).glob("*.safetensors"))
        found = f", only {pickles[0]}" if pickles else f" (it has {others[0]})" if others else ""
        raise UserError(
            f"{name} has no {wanted if others else '*.safetensors file'}{found}. Weights are read from safetensors"
            f" alone, because a pickle can run code. If you trust it, convert it: {conversion(name, wanted)}"
        )
    check_bytes(index)
    with library_errors(f"{wanted + INDEX} of {name} is no index of weights", "Copy it again."):
        listed = json.loads(index.read_text(encoding="utf-8"))
        listed["metadata"]  # which transformers reads
        shards = sorted(set(listed["weight_map"].values()))
    for shard in shards:
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]{1,200}\.safetensors", shard):
            raise UserError(
                f"{wanted + INDEX} of {name} names {repr(shard)[:80]}. Only *.safetensors files beside it are read:"
                f" take the checkpoint from somewhere else."
            )
    found = {shard: file_of(name, shard) for shard in shards}
    if missing := [shard for shard, file in found.items() if file is None]:
        raise UserError(f"{name} lacks {missing[0]}, which its index names. Copy it again, with all its files.")
    return list(found.values())


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
) -> PreTrainedModel:
    """The model, on torch's meta device: nothing is allocated. UserError where the config asks for a far larger model
    than the files hold, two files hold the same weight, or a weight is of whole numbers; StorageError where the model
    is larger than the free memory of this machine."""
    tensors = [tensor_shapes(file) for file in files]
    shapes, where = [shape for one in tensors for shape in one.values()], {}
    for file, keys in zip(files, tensors, strict=True):
        for key in keys:
            if (other := where.setdefault(key, file)) != file:
                raise UserError(f"{other.name} and {file.name} of {name} both hold {key}. Copy the checkpoint again.")
    held = sum(map(math.prod, shapes))
    written = config.to_dict()
    layers = max((part.get(key) or 0 for part in config_parts(written) for key in LAYERS), default=0)
    if layers > len(shapes) or _is_absurd(least_weights(written), held):
        raise UserError(_absurd(name, f"{layers:,} layers and at least", least_weights(written), held, len(shapes)))

    def tried(config: PreTrainedConfig) -> PreTrainedModel:
        with torch.device("meta"), no_init_weights():
            model = auto_class.from_config(copy.deepcopy(config), trust_remote_code=False)
        if auto_class is AutoModelForSeq2SeqLM:
            _pass_without_values(model)
            DynamicCache(config=config.get_text_config(decoder=True))  # as generate makes it
        return model

    def where() -> str:
        return first_wrong(config.to_diff_dict(), lambda values: tried(type(config).from_dict(values)))

    said = f"config.json of {name} is not one that a model can be made of"
    with library_errors(said, "Correct it there, or take another checkpoint.", where):
        model = tried(config)
        model.tie_weights()
    names = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    _check_types(files, names | {key.removeprefix(f"{model.base_model_prefix}.") for key in names}, name)
    sizes = [weight.numel() for weight in model.parameters()]
    weights = sum(sizes)
    if _is_absurd(weights, held):
        raise UserError(_absurd(name, "weights of", weights, held, len(shapes)))
    check_tensors(len(shapes), len(sizes), name)
    _check_buckets(written, name)
    dtype = config.dtype if dtype == "auto" else dtype
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    size = (dtype if isinstance(dtype, torch.dtype) else torch.float32).itemsize
    memory = psutil.virtual_memory().available + psutil.swap_memory().free
    if weights * size > memory:
        raise StorageError(
            f"{name} takes {weights * size:,} bytes ({weights:,} weights of {size}), and this machine has {memory:,}"
            f" bytes of memory left. Take a smaller checkpoint, or a machine with more."
        )
    return model


def _check_buckets(config: Mapping[str, Any], name: str) -> None:
    """UserError where the logarithms by which T5 and its kin, and ProphetNet, share out distances divide by 0."""
    for part, (count, farthest) in itertools.product(config_parts(config), BUCKETS):
        if count in part and farthest in part and (part[count] < 4 or part[farthest] <= part[count] // 2):
            raise UserError(
                f"config.json of {name} says that {count} is {part[count]} and {farthest} {part[farthest]}, which"
                f" gives no logarithms of distances. {count} has to be 4 or more, and {farthest} more than its half."
                f" Correct it there, or take another checkpoint."
            )


def _check_types(files: Sequence[Path], parameters: Set[str], name: str) -> None:
    """UserError for a weight that is no floating-point number of 16 bits or more: of a quantized checkpoint whose
    config does not say so, of which transformers would make wrong numbers."""
    for file in files:
        with safe_open(file, framework="numpy") as tensors:
            for key in parameters & set(tensors.keys()):
                if (kind := tensors.get_slice(key).get_dtype()) not in WEIGHT_TYPES:
                    raise UserError(
                        f"{key} of {name} is stored as {kind}, and weights are {', '.join(WEIGHT_TYPES)}. Take the "
                        f"checkpoint that is not quantized."
                    )


def _pass_without_values(model: PreTrainedModel) -> None:
    """Some values of a config are looked at in a pass only, and some of these only in training. Here tensors have
    shapes alone. Of a model that asks for values meanwhile (experts, windows), the rest is not tried."""
    logged = logging.root.manager.disable
    logging.disable(logging.ERROR)  # of a source shorter than a window; torch prints a traceback, too
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), torch.random.fork_rng(devices=[]):
            ids = torch.ones(1, 2, dtype=torch.long, device="meta")
            model.train()(input_ids=ids, decoder_input_ids=ids)
    except (DataDependentOutputException, DynamicOutputShapeException):
        pass
    finally:
        logging.disable(logged)


def _is_absurd(weights: int, held: int) -> bool:
    return weights > FOLDS * held + SLACK


def _absurd(name: str, what: str, weights: int, held: int, tensors: int) -> str:
    return (
        f"config.json of {name} asks for {what} {4 * weights:,} bytes in fp32, and its files hold {4 * held:,}, in"
        f" {tensors:,} tensors: it is not theirs. Copy the checkpoint again, or take another."
    )


def check_tensors(found: int, expected: int, name: str) -> None:
    """transformers and peft need some 0.1 ms for each that they do not know."""
    if found > FOLDS * expected + 1000:
        raise UserError(
            f"the weights of {name} are {found:,} tensors, and those that its config asks for are {expected:,}: it is"
            f" not theirs. Copy the checkpoint again, or take another."
        )


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """By name, from the header of the file. UserError where it is none, or a very long one."""
    damaged = f"the weights of {file.parent} could not be read: {file.name} is damaged, or no safetensors"
    with library_errors(damaged, "Copy it again."):
        with file.open("rb") as start:
            size = int.from_bytes(start.read(8), "little")
        if MOST_HEADER_BYTES < size < file.stat().st_size:
            raise UserError(
                f"{file} has a header of {size:,} bytes, and {MOST_HEADER_BYTES:,} are the most that are read."
            )
        with safe_open(file, framework="numpy") as tensors:  # torch would map the file as memory of its own
            return {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}


def check_model(model: PreTrainedModel, name: str) -> None:
    """CheckpointError where a weight is infinite or no number: 0.1 s for 100 million of fp32 on one core."""
    for key, weight in model.named_parameters():
        check_finite(weight, key, name)


def check_finite(weight: torch.Tensor, key: str, name: str) -> None:
    if weight.numel() and weight.is_floating_point() and not all(map(torch.isfinite, torch.aminmax(weight))):
        count = int((~torch.isfinite(weight)).sum())
        raise CheckpointError(
            f"{key} of {name} has {counted(count, 'value')} that are infinite or no number (NaN): it writes"
            f" nonsense, and cannot be trained. Take a checkpoint from before it went wrong."
        )


def rounded(weight: torch.Tensor, dtype: torch.dtype, key: str, name: str) -> torch.Tensor:
    """In `dtype`. UserError where a finite value has no such number: fp16 ends at 65,504."""
    found = weight.to(dtype)
    if dtype == torch.float16 and weight.numel() and not all(map(torch.isfinite, torch.aminmax(found))):
        check_finite(weight, key, name)
        raise UserError(
            f"{key} of {name} has values up to {weight.abs().max():.3g}, and float16 ends at 65,504. Take bfloat16 or"
            f" float32."
        )
    return found


def check_token_settings(config: GenerationConfig, rows: float, name: str) -> None:
    """UserError where a token of the generation config is none of the first `rows`, which may be inf, or its shortest
    length is no number."""

    def is_right(value: Any, depth: int) -> bool:
        if depth == 0:
            return type(value) is int and 0 <= value < most
        is_list = isinstance(value, list) and len(value) <= MOST_NUMBER
        return is_list and all(isinstance(it, list) == (depth == 2) and is_right(it, depth - 1) for it in value)

    for key, depth in TOKEN_SETTINGS.items():
        value, most = getattr(config, key, None), 2**31 if key.startswith("min_") else rows
        if value is not None and not is_right(value, depth) and not (key in ENDS and is_right(value, 0)):
            allowed = f"{('one', 'a list', 'a list of lists')[depth]} of the whole numbers from 0 to {most - 1:,.0f}"
            raise UserError(
                f"{key} is {str(value)[:40]!r} in {name}'s generation_config.json or config.json, and must be"
                f" {allowed}. Correct it."
            )


def model_settings(config: GenerationConfig) -> GenerationConfig:
    """A new config with the MODEL_SETTINGS of this one. UserError for one that is no token or number of them."""
    check_token_settings(config, math.inf, "the checkpoint")
    return GenerationConfig(**{name: getattr(config, name, None) for name in sorted(MODEL_SETTINGS)})


def savable(config: GenerationConfig) -> GenerationConfig:
    """The config; where transformers saves no such one (a temperature without sampling), its MODEL_SETTINGS."""
    try:
        config.validate(strict=True)
    except ValueError:
        return model_settings(config)
    return config


def check_adapter(settings: Mapping[str, Any], files: Sequence[Path], name: str) -> None:
    """UserError where adapter_config.json asks for a method that does more than read weights (BOFT compiles, prompts
    load a tokenizer), for code, for copies of layers, for long computations, or for ranks larger than its weights'."""
    said, method = f"adapter_config.json of {name}", settings.get("peft_type")
    if not isinstance(method, str) or method not in METHODS:
        raise UserError(f"{said} has the peft_type {str(method)[:40]!r}. Adapters of {', '.join(METHODS)} are loaded.")
    if settings.get("megatron_config"):
        raise UserError(
            f"{said} has a megatron_config, which would import {str(settings.get('megatron_core'))[:80]!r}. Which code"
            f" runs is not for an adapter to say: take the lines out."
        )
    if settings.get("layer_replication"):
        raise UserError(f"{said} has a layer_replication, which no encoder-decoder has. Take it out there.")
    keys = [tensor_shapes(file) for file in files]
    _check_types(files, {key for one in keys for key in one}, name)
    shapes = [shape for one in keys for shape in one.values()]
    largest = max((size for shape in shapes for size in shape), default=0)
    # A rank is the shorter side of its tensors, unless it is larger than a layer, which only small layers can afford.
    shorter = max((min(shape) for shape in shapes if shape), default=0)
    pattern = settings.get("rank_pattern")
    for rank in [settings.get("r"), *(pattern.values() if isinstance(pattern, dict) else [])]:
        is_rank = type(rank) is int and 0 <= rank <= largest
        if rank is not None and not (is_rank and (rank <= shorter or 4 * rank * largest * len(shapes) < 64 * SLACK)):
            asked = f": {4 * rank * largest:,} bytes or more a layer" if type(rank) is int and rank > 0 else ""
            raise UserError(
                f"{said} has the rank {str(rank)[:40]}{asked}, and no tensor of its weights is so large: {shorter:,}"
                f" is the longest shorter side. Copy the adapter again, or take another."
            )
    start = str(settings.get("init_lora_weights"))
    if not re.fullmatch(r"None|True|False|gaussian|eva|orthogonal|olora|mica|pissa(_niter_\d\d?)?", start):
        raise UserError(
            f"{said} has the init_lora_weights {start[:40]!r}, by which peft would compute the base's weights anew."
            f" pissa and pissa_niter_1 to 99 are loaded. If the adapter's weights hold all of it, write true there."
        )
    for key, value in settings.items():
        most = MOST_TERMS if key == "num_cayley_neumann_terms" else max(MOST_NUMBER, largest)
        if isinstance(value, int | float) and value > most and key != "projection_prng_key":  # a seed
            raise UserError(f"{said} has {str(value)[:40]} in {key}. {most:,} are the most that are tried.")


_TRY = """
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds}))
names, patterns = json.load(sys.stdin)
for key, how, pattern in patterns:
    print(key)
    for name in names:
        getattr(re, how)(pattern, name)
"""
_AROUND = (
    ("rank_pattern", r"(.*\.)?(", ")$"),
    ("alpha_pattern", r"(.*\.)?(", ")$"),
    ("modules_to_save", r"(^|.*\.)", r"($|\..*)"),
    ("layers_pattern", r"(?:^|.*?\.)", r"\.(?P<idx>\d+)\."),
)
"""What peft puts before and behind a pattern."""


def check_patterns(settings: Mapping[str, Any], names: Sequence[str], name: str) -> None:
    """UserError where a pattern of adapter_config.json is none, or takes more than a second for the names of the
    base's layers. peft has no limit of time, nor has `re`, so they are tried in a process of their own."""
    whole = [key for key in ("target_modules", "exclude_modules", "feedforward_modules") if settings.get(key)]
    patterns = [(key, "fullmatch", settings[key]) for key in whole if isinstance(settings[key], str)]
    for key, before, behind in _AROUND:
        value = settings.get(key)
        texts = [value] if isinstance(value, str) else value if isinstance(value, list | dict) else []
        patterns += [(key, "match", before + text + behind) for text in texts if isinstance(text, str)]
    if not patterns:
        return
    tried = subprocess.run(
        [sys.executable, "-I", "-S", "-u", "-c", _TRY.format(seconds=PATTERN_SECONDS)],
        input=json.dumps([names, patterns]), capture_output=True, text=True,
    )  # fmt: skip
    if tried.returncode:
        key = (tried.stdout.split() or ["target_modules"])[-1]
        reason = tried.stderr.strip().splitlines()[-1:] if tried.returncode > 0 else []
        raise UserError(
            f"adapter_config.json of {name} has a pattern in {key} that cannot be used:"
            f" {(reason or [f'it takes more than {PATTERN_SECONDS} s'])[0][:200]}. Name the layers there in a list."
        )


def open_prepared(folder: str | Path) -> DatasetDict | Dataset:
    """A dataset that `save_to_disk` wrote, whose `input_ids` and `labels` are lists of whole numbers, none empty.

    UserError where it cannot be read, has other columns, or one of pictures, sounds or documents: reading such a row
    would open whatever file or address it names.
    """
    with library_errors(f"{folder} cannot be read as a prepared dataset", AGAIN):
        _check_parts(Path(folder))
        found = load_from_disk(str(folder))
    splits = found if isinstance(found, DatasetDict) else {Path(folder).name: found}
    for name, split in splits.items():
        for column, feature in split.features.items():
            if require_decoding(feature, ignore_decode_attribute=True):
                raise UserError(
                    f"{folder} has a column {column} of type {type(feature).__name__}, and `diptych prepare` writes"
                    f" numbers and texts alone. Prepare the data here."
                )
        for column in dict.fromkeys(["input_ids", "labels", *filter(TOKEN_COLUMN.fullmatch, split.features)]):
            _check_ids(split, column, f"split {name} of {folder}")
    return found


def _check_parts(folder: Path) -> None:
    """Splits and files must lie in the folder; `datasets` would read any place that is named, and wait for a pipe."""
    if odd := next((it for it in folder.rglob("*") if not it.is_file() and not it.is_dir()), None):
        raise ValueError(f"{odd} is no file that can be read (a pipe, a device or a broken link)")
    names = ["."]
    if (listed := folder / "dataset_dict.json").is_file():
        names = json.loads(listed.read_text(encoding="utf-8"))["splits"]
        if len(set(names)) < len(names) or not all(map(_is_inside, names)):
            raise ValueError(f"dataset_dict.json has the splits {str(names)[:80]}")
    for name in names:
        state = json.loads((folder / name / "state.json").read_text(encoding="utf-8"))
        if state.get("_format_kwargs"):
            raise ValueError(f"state.json of {name} has _format_kwargs, which `diptych prepare` does not write")
        files = state["_data_files"]
        if wrong := [file for file in files if not _is_inside(file["filename"])]:
            raise ValueError(f"state.json of {name} has the file {str(wrong[0])[:80]}")


def _is_inside(name: str) -> bool:
    return "\\" not in name and all(part.strip(".") for part in name.split("/"))


def _check_ids(split: Dataset, column: str, where: str) -> None:
    kind = str(getattr(getattr(split.features.get(column), "feature", None), "dtype", ""))
    if not kind.startswith(("int", "uint")):
        raise UserError(f"{where} has no lists of whole numbers as column {column}. {AGAIN}")
    start, flat = 0, pyarrow.compute.list_flatten
    for table in split.with_format("arrow").select_columns(column).iter(batch_size=10_000):
        lengths = pyarrow.compute.list_value_length(table[column])
        if not pyarrow.compute.min(lengths).as_py() or lengths.null_count or flat(table[column]).null_count:
            rows = table[column].to_pylist()
            wrong = next(place for place, row in enumerate(rows) if not row or None in row)
            raise UserError(f"{where}, row {start + wrong}: {column} is {str(rows[wrong])[:80]}. {AGAIN}")
        start += len(lengths)
