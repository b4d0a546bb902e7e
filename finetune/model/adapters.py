"""LoRA (arXiv 2106.09685) and its kin through peft: a frozen checkpoint in, the same with trainable adapters out.

    model = add_adapter(model, "google-t5/t5-small", rank=16, alpha=32, variant="dora")
    save_adapter(model, folder)            adapter_config.json, adapter_model.safetensors, as peft itself writes them

What is saved loads with peft alone (`AutoPeftModelForSeq2SeqLM`), several adapters onto one base (`load_adapter`,
`set_adapter`), and merges into the base within 1e-5 of the logits' size: the tests hold this for every variant and
method below, on all ten families.

PiSSA and OLoRA begin with a part of the base in the adapter, and train it on what is left of the base. They are saved
as the LoRA of twice the rank that turns the base as it was into the same model: [B, -B0] [A; A0].

Where embedding tables are trained too (new tokens, or `lora_embeddings`), they are trained in place and saved under
their own names, which peft loads back as they are. peft's two own ways fail for encoder-decoders (0.21, tried on nine
families): `modules_to_save` with a table that encoder, decoder and head share turns the embedding into a linear layer,
and `trainable_token_indices` misses Marian's head and merges wrongly where only decoder and head are tied. The price:
peft keeps one set of tables for a base, that of the adapter loaded last. So of adapters with tables each wants a base
of its own; to serve two, merge them (`diptych merge`). And where a model's head is not the input table, though its
config says so (Flan-T5, mT5), an adapter with new tokens is for `diptych` to load or merge: AutoPeftModel grows the
base as transformers does, and loses the head.
"""

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from diptych.data_prep.command_line.arguments import choose_from
from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.commands.exits import CheckpointError
from diptych.finetune.model.families import family_of, input_and_output_tables, vocabulary_tables, without_adapter
from diptych.finetune.run_files.checkpoints import whole

ADAPTER_WEIGHTS = "adapter_model.safetensors"

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},  # arXiv 2312.03732
    "dora": {"use_dora": True},  # arXiv 2402.09353
    "pissa": {"init_lora_weights": "pissa"},  # arXiv 2404.02948
    "olora": {"init_lora_weights": "olora"},  # arXiv 2406.01775
}
TAKEN_FROM_THE_BASE = ("pissa", "olora")
"""Values of init_lora_weights with which the adapter begins as a part of the base, which loses it."""
METHODS = ["LORA", "HRA", "IA3", "LOHA", "LOKR", "MISS", "OFT", "VERA"]
"""Of peft's many, some that need a config and nothing else. AdaLoRA wants to be called after each step, prompts want
peft's own forward pass, which packed rows go round, BOFT builds a CUDA extension when it is made, Lily and BEFT cannot
be merged everywhere, and FourierFT and FRoD are off by more than 1e-5."""
OF_PEFT = ("base_layer", "token_adapter", "original_module")
"""Names that peft puts between a layer's name and the layer."""
NOISE = 3e-5
"""Of new rows, in standard deviations of the old ones: enough that no two are the same."""
LORA_FIELDS = ["rank_pattern", "alpha_pattern", "exclude_modules"]
"""Those of LoraConfig that can be given besides our settings, which stand for the others."""
OUR_FIELDS = [field.name for field in dataclasses.fields(PeftConfig)] + ["target_modules", "modules_to_save", "bias"]


@torch.no_grad()
def resize_embeddings(model: PreTrainedModel, rows: int) -> None:
    """Cuts every vocabulary table to its first rows, or adds rows: the mean of the old ones and a little noise, as
    transformers does (Hewitt 2021). Tables that were one stay one, and the others apart, whatever the config says.

    (transformers' own `resize_token_embeddings`, 5.23, ties the head of Flan-T5, T5 v1.1, mT5 and UMT5 to the input
    table, whose config says so, and the three tables of an untied BART to each other; what a table held is lost. And
    it forgets the configs of T5Gemma's panels, so that such a checkpoint could not be loaded again.)
    """
    # that of an untied Marian is read nowhere
    unread = [module.weight for name, module in model.named_modules() if name.endswith("shared")]
    tables = [*input_and_output_tables(model), *unread]
    old = tables[0].shape[0]
    if old == rows:
        return
    if any(table.shape[0] != old for table in tables):
        raise UserError(
            f"the vocabulary of this {model.config.model_type} cannot be resized to {rows} tokens: its encoder and "
            f"its decoder have one each. Prepare the data with the model's own tokenizer."
        )
    resized = {id(table): torch.nn.Parameter(_with_rows(table, rows), table.requires_grad) for table in tables}
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding | torch.nn.Linear) and id(module.weight) in resized:
            module.weight = resized[id(module.weight)]
            if isinstance(module, torch.nn.Embedding):
                module.num_embeddings = rows
            else:
                module.out_features = rows
        if isinstance(module, PreTrainedModel):
            _say_rows(module, old, rows)


def _with_rows(table: torch.Tensor, rows: int) -> torch.Tensor:
    if rows < table.shape[0]:
        return table[:rows].clone()
    noise = torch.randn(rows - table.shape[0], table.shape[1], dtype=table.dtype, device=table.device)
    return torch.cat([table, table.mean(0) + NOISE * table.std(0) * noise])


def _say_rows(module: PreTrainedModel, old: int, rows: int) -> None:
    """Wherever the tokens are counted: in configs, T5Gemma's head, and the bias of BART's logits."""
    for name in ("vocab_size", "decoder_vocab_size"):
        for place in (module.config, module):
            if vars(place).get(name) == old:
                setattr(place, name, rows)
    if "final_logits_bias" in dict(module.named_buffers(recurse=False)):
        module.final_logits_bias = torch.nn.functional.pad(module.final_logits_bias, (0, rows - old))


@torch.no_grad()
def fill_rows_with_means(model: PreTrainedModel, pieces: Mapping[int, Sequence[int]]) -> None:
    """{new token: old tokens it is made of}: in every vocabulary table, the new row becomes the mean of the old rows
    (Gee et al. 2022, Fast Vocabulary Transfer), so that a new word begins as what the model knew of its parts."""
    for table in vocabulary_tables(model).values():
        for token, old_tokens in sorted(pieces.items()):  # a later token may be made of an earlier one
            table[token] = table[list(old_tokens)].mean(dim=0)


def adapter_config(
    model: PreTrainedModel,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    variant: str = "lora",
    targets: Sequence[str] = (),
    peft_config: Mapping[str, Any] | None = None,
) -> PeftConfig:
    """`targets` are names of layers, all linear layers of the family unless given. `peft_config` has the fields of
    another of METHODS, as `peft_type`, which has no use for rank, alpha, dropout and variant; or of LORA_FIELDS.

    UserError for a method, field or value that is not known, and for targets that the model has not.
    """
    given = dict(peft_config or {})
    method = given.pop("peft_type", "LORA")
    if method not in METHODS:
        raise UserError(f"peft_config.peft_type is {method!r}. {choose_from(str(method), METHODS)}")
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[method]
    known = LORA_FIELDS if method == "LORA" else _own_fields(config_class)
    for name in given:
        if name not in known:
            raise UserError(
                f"peft_config has {name!r}, which is not to be set for {method}. {choose_from(name, known)}"
            )
    if method == "LORA":
        given |= {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout} | VARIANTS[variant]
    layers = _targets(model, targets)
    try:
        return config_class(task_type=TaskType.SEQ_2_SEQ_LM, target_modules=layers, **given)
    except (TypeError, ValueError) as error:
        raise UserError(f"peft takes no such {config_class.__name__}: {error}") from error


def _own_fields(config_class: type[PeftConfig]) -> list[str]:
    return [field.name for field in dataclasses.fields(config_class) if field.name not in OUR_FIELDS]


def _targets(model: PreTrainedModel, names: Sequence[str]) -> list[str] | str:
    if not names:
        family = family_of(model)
        return list(family.lora_targets) if family else "all-linear"
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for target in names:  # peft asks for one that fits, and leaves out the others without a word
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            known = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise UserError(
                f"no adapter could be added: lora_targets names {target}, and no linear layer is called so. "
                f"{choose_from(target, known)}"
            )
    return list(names)


@contextlib.contextmanager
def without_warnings_of_peft() -> Iterator[None]:
    """peft 0.21 asks transformers for something that has a new name since 5.22, and warns of ties that `merge_adapter`
    handles, and of missing weights that `load_for_inference` refuses."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Model (has|with) `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")
        warnings.filterwarnings("ignore", "Found missing adapter keys")
        yield


def add_adapter(
    model: PreTrainedModel,
    base_name: str,
    *,
    new_rows: int = 0,
    train_embeddings: bool = False,
    **adapter: Any,
) -> PeftModel:
    """Freezes `model` and puts an adapter into each target layer; `adapter` are the settings of `adapter_config`.

    The last `new_rows` rows of the vocabulary tables are trained as they are; with `train_embeddings` all rows.
    UserError where peft finds that adapter and model do not fit.
    """
    config = adapter_config(model, **adapter)
    tables = list(vocabulary_tables(model).values())
    try:
        with without_warnings_of_peft():
            adapted = get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"no adapter could be added: {error}") from error
    adapted.peft_config["default"].base_model_name_or_path = base_name
    if _is_taken_from_the_base(config):
        adapted.start = _start(adapted)
    if new_rows or train_embeddings:
        for table in tables:
            table.requires_grad_(True)
            if not train_embeddings:
                _train_last_rows_only(table, new_rows)
    return adapted


def _is_taken_from_the_base(config: PeftConfig) -> bool:
    return isinstance(config, LoraConfig) and config.init_lora_weights in TAKEN_FROM_THE_BASE


def _start(model: PeftModel) -> dict[str, torch.Tensor]:
    """A0 and B0, under peft's names. UserError where a layer is too small to give as much as the rank says."""
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and layer.lora_A["default"].weight.shape[0] < layer.r["default"]:
            raise UserError(
                f"lora_rank is {layer.r['default']}, but {name} has only {layer.lora_A['default'].weight.shape[0]} "
                f"directions to take into an adapter. Lower lora_rank, or use another lora_variant."
            )
    start = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: weight.detach().clone() for name, weight in start.items()}


def _train_last_rows_only(table: torch.nn.Parameter, new_rows: int) -> None:
    """The gradient of all other rows is zero, and AdamW leaves a weight with no gradient and no decay as it is."""
    is_new = torch.arange(table.shape[0]).unsqueeze(1) >= table.shape[0] - new_rows
    table.register_hook(lambda gradient: gradient * is_new.to(gradient.device))


def adapter_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """What the adapter adds to its base: its own weights under peft's names, and trained tables under theirs."""
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    if _is_taken_from_the_base(model.peft_config["default"]):
        weights = {name: _with_start(name, weight, model.start[name]) for name, weight in weights.items()}
    tables = {id(table) for table in vocabulary_tables(without_adapter(model)).values()}
    return weights | {
        name: weight.detach()
        for name, weight in model.named_parameters()
        if weight.requires_grad and id(weight) in tables
    }


def _with_start(name: str, weight: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """A (r, in) over A0, B (out, r) beside -B0: their product is BA - B0A0."""
    return torch.cat([whole(weight), start], 0) if ".lora_A." in name else torch.cat([whole(weight), -start], 1)


def save_adapter(model: PeftModel, folder: Path, weights: Mapping[str, torch.Tensor] | None = None) -> None:
    """`weights` are those of `adapter_weights`, if they are on the CPU already."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = weights or {name: weight.cpu().contiguous() for name, weight in adapter_weights(model).items()}
    save_file(dict(weights), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = copy.deepcopy(model.peft_config["default"])
    config.inference_mode = True
    if _is_taken_from_the_base(config):
        config.init_lora_weights = True
        config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
        config.rank_pattern = {layer: 2 * rank for layer, rank in config.rank_pattern.items()}
        config.alpha_pattern = {layer: 2 * alpha for layer, alpha in config.alpha_pattern.items()}
    config.save_pretrained(str(folder))
    without_adapter(model).generation_config.save_pretrained(str(folder))


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Weights of a saved adapter into a model that `add_adapter` made in the same way. CheckpointError where they are
    another's, or began from another part of the base."""
    weights = load_file(folder / ADAPTER_WEIGHTS)
    expected = {name: weight.shape for name, weight in adapter_weights(model).items()}
    if different := [name for name in sorted(expected | weights) if _shape(weights, name) != expected.get(name)]:
        raise CheckpointError(f"{folder / ADAPTER_WEIGHTS} is of another adapter: {different[0]} does not fit.")
    if _is_taken_from_the_base(model.peft_config["default"]):
        weights = {name: _without_start(name, weight, model.start, folder) for name, weight in weights.items()}
    set_peft_model_state_dict(model, weights)


def _shape(weights: Mapping[str, torch.Tensor], name: str) -> torch.Size | None:
    return weights[name].shape if name in weights else None


def _without_start(name: str, weight: torch.Tensor, start: Mapping[str, torch.Tensor], folder: Path) -> torch.Tensor:
    if name not in start:  # a vocabulary table
        return weight
    trained, saved = weight.chunk(2, 0 if ".lora_A." in name else 1)
    if not torch.equal(saved if ".lora_A." in name else -saved, start[name]):
        raise CheckpointError(
            f"{folder} began from another part of the base than this machine takes from {name}: the last digits of a "
            f"decomposition differ from one processor to another. Go on where the run began, or begin anew."
        )
    return trained.contiguous()


def load_for_inference(base: PreTrainedModel, name: str, file: Path, tokens: int | None) -> PeftModel:
    """The adapter `name`, a folder or a Hub id, on its base. The base gets as many rows as the tables in the adapter's
    `file` have, or else `tokens`, if given: more than the base has. UserError where the file has a tensor without a
    place, or lacks one."""
    rows, missing = _rows_in(file, base)
    if tokens and missing:
        old = base.get_input_embeddings().weight.shape[0]
        raise UserError(
            f"its tokenizer has {tokens} tokens, the base {old}, and {file} lacks {missing[0]} with the rows of the "
            f"new ones. Save it again where it was trained, with save_embedding_layers=True, or save the resized base "
            f"and name that in adapter_config.json."
        )
    if rows := rows or tokens:
        resize_embeddings(base, rows)
    try:
        with without_warnings_of_peft():
            model = PeftModel.from_pretrained(base, name, is_trainable=False)
            found = model.load_adapter(name, "default")  # again, because only this tells what did not fit
    except KeyError as error:
        raise UserError(f"{file} lacks {error}, which peft looks for. Use it where it was trained.") from error
    if found.missing_keys:
        raise UserError(f"{file} lacks {found.missing_keys[0]}, which adapter_config.json asks for. Copy it again.")
    # what else is unexpected are whole tables, which peft saves a second time where the vocabulary was resized
    if left_over := [key for key in found.unexpected_keys if model.base_model.prefix in key]:
        raise UserError(
            f"{file} has {left_over[0]}, and target_modules in adapter_config.json does not name this layer (peft "
            f"takes tied layers out if ensure_weight_tying is set). Name it there."
        )
    return model


def _rows_in(file: Path, base: PreTrainedModel) -> tuple[int | None, list[str]]:
    """How many rows an adapter's vocabulary tables have, by the shapes in its file, None if they are the base's; and
    which tables the file does not hold whole. With `trainable_token_indices` it holds the rows that were trained."""
    tables = {id(table) for table in input_and_output_tables(base)}
    layers = {
        name: layer.weight for name, layer in base.named_modules() if id(getattr(layer, "weight", None)) in tables
    }
    found = set()
    with safe_open(file, framework="numpy") as tensors:
        for key in tensors.keys():
            layer, _, kind = _without_peft(key.removeprefix("base_model.model.")).partition(".lora_")
            if layer.endswith("trainable_tokens_delta"):
                tables.clear()
            table = layers.get(layer.removesuffix(".weight"))
            if table is not None and kind in ("", "B.weight", "embedding_A"):
                rows = tensors.get_slice(key).get_shape()[kind == "embedding_A"]
                found |= {rows} - {table.shape[0]}
                tables -= {id(table)} if kind == "" else set()
    missing = [name for name, weight in layers.items() if id(weight) in tables]
    return found.pop() if len(found) == 1 else None, missing


def _without_peft(name: str) -> str:
    """The name that a layer or weight has without an adapter."""
    return ".".join(part for part in name.split(".") if part not in OF_PEFT)


@torch.no_grad()
def merge_adapter(model: PeftModel) -> PreTrainedModel:
    """A plain model with the adapter of `model`, which is in fp32, in its weights. UserError where it computes other
    logits: 1e-5 of their size is rounding, and so is ten times what one more rounding in each layer changes.

    peft merges an adapter on the head into the tied table, which the panels read as well. So each adapted layer gets
    a copy of its weight first. If the copies are still equal after merging, they are tied again; if they differ, the
    model is untied.
    """
    expected = _logits_on_some_tokens(model.eval())
    base = model.get_base_model()
    tied = getattr(base.config, "tie_word_embeddings", None)  # an EncoderDecoderModel's config has no such field
    ties = _tied_layers(base)
    for module in base.modules():
        if isinstance(module, BaseTunerLayer) and id(module.get_base_layer().weight) in ties:
            _copy_weight(module.get_base_layer())
    with without_warnings_of_peft():
        merged = model.merge_and_unload(safe_merge=True)  # which looks for NaN first
    if tied is not None:
        merged.config.tie_word_embeddings = tied  # peft sets it to False for T5Gemma, whose panels have one table each
    for names in ties.values():
        _tie_again(merged, names)
    found, largest = _logits_on_some_tokens(merged), expected.abs().max()
    difference, rounding = ((other - found).abs().max() for other in (expected, _rounded_otherwise(merged)))
    if not difference <= max(1e-5 * largest.clamp(min=1.0), 10 * rounding):
        raise UserError(
            f"merging changes logits by {difference:.1e}, of {largest:.1e} at most. Use it unmerged, with "
            f"peft.AutoPeftModelForSeq2SeqLM, or train another kind of adapter."
        )
    return merged


def _logits_on_some_tokens(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    """The last tokens of each vocabulary, which may be new ones, and some others."""
    base = without_adapter(model)
    rows = [panel.get_input_embeddings().weight.shape[0] for panel in (base.get_encoder(), base.get_decoder())]
    others = torch.randint(min(rows), (2, 12), generator=torch.Generator().manual_seed(0))
    source, target = (torch.cat([others, torch.arange(end - 8, end).view(2, 4)], dim=1) for end in rows)
    return model(input_ids=source, decoder_input_ids=target).logits


def _rounded_otherwise(model: PreTrainedModel) -> torch.Tensor:
    """The same logits, with the last digit of what each linear layer gives changed at random."""
    digit = torch.finfo(torch.float32).eps
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]

    def change(layer, given, output):
        return output * (1 + digit * torch.randn_like(output))

    hooks = [layer.register_forward_hook(change) for layer in layers]
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        logits = _logits_on_some_tokens(model)
    for hook in hooks:
        hook.remove()
    return logits


def _tied_layers(base: PreTrainedModel) -> dict[int, list[str]]:
    """For each weight that several layers share, by its id: the names that these layers have without an adapter."""
    layers: dict[int, list[str]] = {}
    for name, layer in base.named_modules(remove_duplicate=False):
        if isinstance(layer, torch.nn.Embedding | torch.nn.Linear):
            layers.setdefault(id(layer.weight), []).append(_without_peft(name))
    return {weight: names for weight, names in layers.items() if len(names) > 1}


def _copy_weight(layer: torch.nn.Module) -> None:
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), layer.weight.requires_grad)


def _tie_again(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Layers that were tied share one weight again if their weights are equal. Else each keeps its own, and the config
    says so. T5 scales the states for a tied head alone; an untied head has this factor in its weights, as in T5 v1.1.
    What a family that is not in the table computes by these fields is not known: they stay, and when such a model is
    loaded again, transformers does not tie weights that differ.
    """
    layers = {name: model.get_submodule(name) for name in names}
    read = [layer for name, layer in layers.items() if not name.endswith("shared")]  # which no forward pass uses
    for layer in set(layers.values()) - set(read):
        layer.weight = read[0].weight
    if all(torch.equal(layer.weight, read[0].weight) for layer in read):
        for layer in read:
            layer.weight = read[0].weight
        return
    for layer in layers.values():
        _copy_weight(layer)
    model.all_tied_weights_keys = {}
    family = family_of(model)
    if family is None:
        return
    if hasattr(model.config, "scale_decoder_outputs"):
        model.get_output_embeddings().weight.mul_(family.scale(model))
        model.config.scale_decoder_outputs = False
    model.config.tie_word_embeddings = False
