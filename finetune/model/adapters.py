"""LoRA (arXiv 2106.09685) and other adapters of peft: a frozen checkpoint in, the same with trainable adapters out.

    model = add_adapter(model, "google-t5/t5-small", rank=16, alpha=32, variant="dora")
    save_adapter(model, folder)            adapter_config.json, adapter_model.safetensors, as peft itself writes them

A saved adapter loads with peft alone (`AutoPeftModelForSeq2SeqLM`), several onto one base (`load_adapter`,
`set_adapter`), and merges into the base within 1e-5 of the logits' size: tested for every variant and method below, on
every family.

Embedding tables that are trained too (new tokens, or `lora_embeddings`) are trained in place and saved under their own
names, which peft loads back. peft's own two ways fail for encoder-decoders (0.21, tried on nine families): a shared
table in `modules_to_save` becomes a linear layer, and `trainable_token_indices` misses Marian's head and merges wrong
where only decoder and head are tied. The price: a base has one set of tables, of the adapter loaded last, so merge
such adapters (`diptych merge`). And where the head is no input table although the config says so (Flan-T5, mT5), only
`diptych` loads an adapter with new tokens: AutoPeftModel grows the base as transformers does, which loses the head.
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
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from diptych.data_prep.command_line.arguments import choose_from
from diptych.data_prep.command_line.errors import UserError, library_errors
from diptych.finetune.commands.exit_codes import CheckpointError
from diptych.finetune.model.families import (
    embedding_rows,
    family_of,
    input_and_output_tables,
    text_modules,
    unread_names,
    vocabulary_tables,
    without_adapter,
)
from diptych.finetune.model.untrusted_files import METHODS, check_tensors, tensor_shapes

ADAPTER_WEIGHTS = "adapter_model.safetensors"

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},  # arXiv 2312.03732
    "dora": {"use_dora": True},  # arXiv 2402.09353
}
WRAPPERS = ("base_layer", "token_adapter", "original_module")
"""Names that peft puts between a layer's name and the layer."""
NOISE = 3e-5
"""Of new rows, in standard deviations of the old ones: enough that no two rows are equal."""
LORA_FIELDS = ["rank_pattern", "alpha_pattern", "exclude_modules"]
"""Fields of LoraConfig that `peft_config` may have; our own settings stand for the others."""
FAILING = {("OFT", "prophetnet"): "its attention computes with an empty tensor, which peft 0.21 cannot rotate"}
"""(Method, model_type) → why not. It would show in the first step only."""
COMMON_FIELDS = {field.name for field in dataclasses.fields(PeftConfig)} | {
    "target_modules",
    "modules_to_save",
    "bias",
}


@torch.no_grad()
def resize_embeddings(model: PreTrainedModel, rows: int) -> None:
    """Cuts every vocabulary table to its first rows, or adds rows: the mean of the old ones and a little noise, as
    transformers does (Hewitt 2021). Tied tables stay tied and the others apart, whatever the config says.

    (transformers' own `resize_token_embeddings`, 5.23, ties the head of Flan-T5, T5 v1.1, mT5 and UMT5 to the input
    table, and the three tables of an untied BART to each other: weights are lost. And it leaves the configs of
    T5Gemma's panels as they were, so that such a checkpoint cannot be loaded again.)
    """
    # an untied Marian has a `shared` table that nothing reads
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
    heads = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear) and id(layer.weight) in resized]
    biases = {id(head.bias): head.bias for head in heads if head.bias is not None}
    for key, bias in biases.items():
        biases[key] = torch.nn.Parameter(torch.nn.functional.pad(bias, (0, rows - old)), bias.requires_grad)
    for module in model.modules():
        if id(getattr(module, "bias", None)) in biases:  # BERT's head has it in two places
            module.bias = biases[id(module.bias)]
        if isinstance(module, torch.nn.Embedding | torch.nn.Linear) and id(module.weight) in resized:
            module.weight = resized[id(module.weight)]
            if isinstance(module, torch.nn.Embedding):
                module.num_embeddings = rows
            else:
                module.out_features = rows
        if isinstance(module, PreTrainedModel):
            _write_row_count(module, old, rows)


def _with_rows(table: torch.Tensor, rows: int) -> torch.Tensor:
    if rows < table.shape[0]:
        return table[:rows].clone()
    noise = torch.randn(rows - table.shape[0], table.shape[1], dtype=table.dtype, device=table.device)
    return torch.cat([table, table.mean(0) + NOISE * table.std(0) * noise])


def _write_row_count(module: PreTrainedModel, old: int, rows: int) -> None:
    """Into configs, T5Gemma's head, and the length of the bias of BART's logits."""
    for name in ("vocab_size", "decoder_vocab_size"):
        for place in (module.config, module):
            if vars(place).get(name) == old:
                setattr(place, name, rows)
    if "final_logits_bias" in dict(module.named_buffers(recurse=False)):
        module.final_logits_bias = torch.nn.functional.pad(module.final_logits_bias, (0, rows - old))


@torch.no_grad()
def fill_rows_with_means(model: PreTrainedModel, pieces: Mapping[int, Sequence[int]]) -> None:
    """{new token: old tokens it is made of}: in every vocabulary table, the new row becomes the mean of the old rows
    (Gee et al. 2022, Fast Vocabulary Transfer)."""
    for table in vocabulary_tables(model).values():
        for token, old_tokens in sorted(pieces.items()):  # a later token may be made of an earlier one
            table[token] = table[list(old_tokens)].mean(dim=0)


def check_method(model_type: str, peft_config: Mapping[str, Any]) -> str:
    """The method, LORA by default. UserError for an unknown method or field, and for a method that fails on this
    family; nothing need be loaded to tell."""
    method = peft_config.get("peft_type", "LORA")
    if method not in METHODS:
        raise UserError(f"peft_config.peft_type is {method!r}. {choose_from(str(method), METHODS)}")
    if reason := FAILING.get((method, model_type)):
        others = ", ".join(other for other in METHODS if (other, model_type) not in FAILING)
        raise UserError(f"peft's {method} does not work on a {model_type}: {reason}. Choose from: {others}.")
    fields = [field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[method])]
    known = LORA_FIELDS if method == "LORA" else [name for name in fields if name not in COMMON_FIELDS]
    for name in peft_config.keys() - {"peft_type"}:
        if name not in known:
            raise UserError(
                f"peft_config has {name!r}, which is not to be set for {method}. {choose_from(name, known)}"
            )
    return method


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
    """`targets` are names of layers; all linear layers of the family unless given. `peft_config` has `peft_type`, one
    of METHODS, and its fields, and then rank, alpha, dropout and variant are not used; or some of LORA_FIELDS.

    UserError for an unknown method, field or value, and for targets that the model does not have.
    """
    given = dict(peft_config or {})
    method = check_method(model.config.model_type, given)
    given.pop("peft_type", None)
    if method == "LORA":
        given |= {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout} | VARIANTS[variant]
    layers = _targets(model, targets)
    if "feedforward_modules" in given and isinstance(layers, list) and unread_names(model):
        ends = tuple(f".{name}" for name in given["feedforward_modules"])  # which IA3 wants among the targets
        given["feedforward_modules"] = [name for name in layers if f".{name}".endswith(ends)]
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[method]
    with library_errors(f"peft takes no such {config_class.__name__}", "Change peft_config or the settings of LoRA."):
        return config_class(task_type=TaskType.SEQ_2_SEQ_LM, target_modules=layers, **given)


def _targets(model: PreTrainedModel, names: Sequence[str]) -> list[str] | str:
    family = family_of(model)
    if not names and family is None:
        return "all-linear"
    linear = [name for name, module in text_modules(model) if isinstance(module, torch.nn.Linear | Conv1D)]
    for target in names:  # peft is content if one of them fits, and silently leaves out the others
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            known = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise UserError(
                f"no adapter could be added: lora_targets names {target}, and no linear layer is called so. "
                f"{choose_from(target, known)}"
            )
    names = list(names or family.lora_targets)
    if not unread_names(model):
        return names
    ends = tuple(f".{name}" for name in names)  # by these alone, peft would adapt the vision tower, too
    return [name for name in linear if f".{name}".endswith(ends)]


@contextlib.contextmanager
def without_warnings_of_peft() -> Iterator[None]:
    """peft 0.21 uses an attribute that transformers has renamed in 5.22, warns of tied weights, which `merge_adapter`
    handles, and of missing ones, for which `load_for_inference` raises an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Model (has|with) `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")
        warnings.filterwarnings("ignore", "Found missing adapter keys")
        yield


def add_adapter(
    model: PreTrainedModel, base_name: str, *, new_rows: int = 0, train_embeddings: bool = False, **adapter: Any
) -> PeftModel:
    """Freezes `model` and puts an adapter into each target layer; `adapter` are the settings of `adapter_config`.

    The last `new_rows` rows of the vocabulary tables are trained, too; with `train_embeddings` all rows.
    UserError where peft says that adapter and model do not fit.
    """
    config = adapter_config(model, **adapter)
    tables = list(vocabulary_tables(model).values())
    remedy = "Change peft_config or lora_targets, or train LoRA."
    with library_errors("no adapter could be added", remedy), without_warnings_of_peft():
        adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = base_name
    if new_rows or train_embeddings:
        for table in tables:
            table.requires_grad_(True)
            if not train_embeddings:  # AdamW does not change a weight without gradient and decay
                is_new = torch.arange(table.shape[0]).unsqueeze(1) >= table.shape[0] - new_rows
                table.register_hook(lambda gradient, is_new=is_new: gradient * is_new.to(gradient.device))
    return adapted


def adapter_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """What is trained: the adapter's weights under peft's names, and vocabulary tables under their own."""
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    tables = {id(table) for table in vocabulary_tables(without_adapter(model)).values()}
    return weights | {
        name: weight.detach()
        for name, weight in model.named_parameters()
        if weight.requires_grad and id(weight) in tables
    }


def save_adapter(model: PeftModel, folder: Path, weights: Mapping[str, torch.Tensor] | None = None) -> None:
    """`weights` are those of `adapter_weights`, if they are on the CPU already."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = weights or {name: weight.cpu().contiguous() for name, weight in adapter_weights(model).items()}
    save_file(dict(weights), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = copy.deepcopy(model.peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(str(folder))
    without_adapter(model).generation_config.save_pretrained(str(folder))


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Weights of a saved adapter into a model that `add_adapter` made in the same way. CheckpointError where they are
    those of another adapter."""
    weights = load_file(folder / ADAPTER_WEIGHTS)
    expected = {name: weight.shape for name, weight in adapter_weights(model).items()}
    found = {name: weight.shape for name, weight in weights.items()}
    if different := [name for name in sorted(expected | found) if found.get(name) != expected.get(name)]:
        raise CheckpointError(f"{folder / ADAPTER_WEIGHTS} is of another adapter: {different[0]} does not fit.")
    set_peft_model_state_dict(model, weights)


def load_for_inference(base: PreTrainedModel, name: str, file: Path, tokens: int | None) -> PeftModel:
    """The adapter `name`, a folder or a Hub id, on its base. The base is resized to the rows of the tables in the
    adapter's `file`, or else to `tokens`, which is given where the tokenizer has more than the base. UserError where a
    tensor of the file belongs nowhere, or one is missing."""
    check_tensors(len(tensor_shapes(file)), len(base.state_dict()), name)
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
    head = base.get_output_embeddings()
    tables = [layer for layer, it in base.named_modules() if isinstance(it, torch.nn.Embedding) or it is head]
    said = f"{file.parent} does not fit its base: peft says of adapter_config.json or {file.name}"
    with library_errors(said, "Use it where it was trained."), without_warnings_of_peft():
        model = PeftModel.from_pretrained(base, name, is_trainable=False)
        found = model.load_adapter(name, "default")  # a second time: only this call reports what did not fit
    if found.missing_keys:
        raise UserError(f"{file} lacks {found.missing_keys[0]}, which adapter_config.json asks for. Copy it again.")
    left_over = [key for key in found.unexpected_keys if model.base_model.prefix in key]
    # whole tables are saved by peft a second time where the vocabulary was resized
    others = [key for key in found.unexpected_keys if not any(f".{table}." in key for table in tables)]
    if unknown := sorted(set(others) - set(left_over)):
        raise UserError(f"{file} has {unknown[0]}, for which its base has no place. Copy it again.")
    if left_over:
        raise UserError(
            f"{file} has {left_over[0]}, and target_modules in adapter_config.json does not name this layer (peft "
            f"takes tied layers out if ensure_weight_tying is set). Name it there."
        )
    return model


def _rows_in(file: Path, base: PreTrainedModel) -> tuple[int | None, list[str]]:
    """How many rows the vocabulary tables in an adapter's file have, None if as many as in the base; and the names of
    the tables that the file does not hold. (With `trainable_token_indices` it holds the trained rows alone.)"""
    tables = {id(table) for table in input_and_output_tables(base)}
    layers = {
        name: layer.weight for name, layer in base.named_modules() if id(getattr(layer, "weight", None)) in tables
    }
    found = set()
    for key, shape in tensor_shapes(file).items():
        layer, _, kind = _without_peft(key.removeprefix("base_model.model.")).partition(".lora_")
        if layer.endswith("trainable_tokens_delta"):
            tables.clear()
        table = layers.get(layer.removesuffix(".weight"))
        if table is not None and kind in ("", "B.weight", "embedding_A") and len(shape) == 2:
            found |= {shape[kind == "embedding_A"]} - {table.shape[0]}
            tables -= {id(table)} if kind == "" else set()
    missing = [name for name, weight in layers.items() if id(weight) in tables]
    return found.pop() if len(found) == 1 else None, missing


def _without_peft(name: str) -> str:
    """The name that a layer or weight has without an adapter."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


@torch.no_grad()
def merge_adapter(model: PeftModel) -> PreTrainedModel:
    """A plain model with the adapter of `model`, which is in fp32, in its weights. UserError where its logits differ
    by more than rounding: 1e-5 of their size, or ten times what one more rounding in each layer changes.

    peft merges an adapter on the head into the tied table, which the panels read as well. So each adapted layer first
    gets a copy of its weight. Copies that are still equal after merging are tied again; else the model is untied.
    """
    expected = _logits_on_some_tokens(model.eval())
    base = model.get_base_model()
    tied = getattr(base.config, "tie_word_embeddings", None)  # an EncoderDecoderModel's config has no such field
    ties = _tied_layers(base)
    for module in base.modules():
        if isinstance(module, BaseTunerLayer) and id(module.get_base_layer().weight) in ties:
            _copy_weight(module.get_base_layer())
    with library_errors("peft cannot merge it", "Use it unmerged, or take another."), without_warnings_of_peft():
        merged = model.merge_and_unload(safe_merge=True)  # safe: raises for NaN
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
    """On the last tokens of each vocabulary, which may be new, and on random ones."""
    rows = embedding_rows(without_adapter(model))
    others = torch.randint(min(rows), (2, 12), generator=torch.Generator().manual_seed(0))
    source, target = (torch.cat([others, torch.arange(end - 8, end).view(2, 4)], dim=1) for end in rows)
    return model(input_ids=source, decoder_input_ids=target).logits


def _rounded_otherwise(model: PreTrainedModel) -> torch.Tensor:
    """The same logits, with the last digit of each linear layer's output changed at random."""
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
    says so. T5 scales the states only for a tied head; the weights of an untied head include the factor (T5 v1.1). For
    a family that is not in families.py these fields stay: when such a model is loaded again, transformers does not tie
    weights that differ.
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
    if family is None or not hasattr(model.config, "tie_word_embeddings"):  # two models have a config each
        return
    model.get_output_embeddings().weight.mul_(family.scale(model))
    if hasattr(model.config, "scale_decoder_outputs"):
        model.config.scale_decoder_outputs = False
    model.config.tie_word_embeddings = False
