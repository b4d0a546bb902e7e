"""LoRA (arXiv 2106.09685) through peft: a frozen checkpoint in, the same model with trainable adapters out.

    model = add_adapter(model, base_name="google-t5/t5-small", rank=16, alpha=32)
    save_adapter(model, folder)            adapter_config.json, adapter_model.safetensors, as peft itself writes them

Where embedding tables are trained too (new tokens, or `lora_embeddings`), they are trained in place and saved under
their own names, which peft loads back as they are. peft's two own ways fail for encoder-decoders (0.21, tried on nine
families): `modules_to_save` with a table that encoder, decoder and head share turns the embedding into a linear layer,
and `trainable_token_indices` misses Marian's head and merges wrongly where only decoder and head are tied.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from diptych.data_prep.records import UserError
from diptych.finetune.families import family_of, vocabulary_tables, without_adapter

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def grow_embeddings(model: PreTrainedModel, rows: int) -> None:
    """Adds rows to every vocabulary table, and says so to every config that counts them (T5Gemma's panels have their
    own, which transformers 5.23 forgets: such a checkpoint could not be loaded again)."""
    model.resize_token_embeddings(rows)
    configs = {id(config): config for config in (model.config, model.get_encoder().config, model.get_decoder().config)}
    for config in configs.values():
        config.vocab_size = rows
    short = [name for name, table in vocabulary_tables(model).items() if table.shape[0] != rows]
    if short or model.get_output_embeddings().weight.shape[0] != rows:
        raise UserError(
            f"the vocabulary of this {model.config.model_type} cannot be grown to {rows} tokens: its encoder and its "
            f"decoder have one each. Prepare the data with the model's own tokenizer."
        )


@torch.no_grad()
def fill_rows_with_means(model: PreTrainedModel, pieces: Mapping[int, Sequence[int]]) -> None:
    """{new token: old tokens it is made of}: in every vocabulary table, the new row becomes the mean of the old rows
    (Gee et al. 2022, Fast Vocabulary Transfer), so that a new word begins as what the model knew of its parts."""
    for table in vocabulary_tables(model).values():
        for token, old_tokens in sorted(pieces.items()):  # a later token may be made of an earlier one
            table[token] = table[list(old_tokens)].mean(dim=0)


def add_adapter(
    model: PreTrainedModel,
    base_name: str,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: list[str] | None = None,
    new_rows: int = 0,
    train_embeddings: bool = False,
) -> PeftModel:
    """Freezes `model` and puts an adapter into each target layer.

    The last `new_rows` rows of the vocabulary tables are trained as they are; with `train_embeddings` all rows.
    """
    family = family_of(model)
    tables = list(vocabulary_tables(model).values())
    config = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets or (list(family.lora_targets) if family else "all-linear"),
    )
    try:
        with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 for something that has a new name there
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"no adapter could be added: {error} Name layers of this model in lora_targets.") from error
    adapted.peft_config["default"].base_model_name_or_path = base_name
    if new_rows or train_embeddings:
        for table in tables:
            table.requires_grad_(True)
            if not train_embeddings:
                _train_last_rows_only(table, new_rows)
    return adapted


def _train_last_rows_only(table: torch.nn.Parameter, new_rows: int) -> None:
    """The gradient of all other rows is zero, and AdamW leaves a weight with no gradient and no decay as it is."""
    is_new = torch.arange(table.shape[0]).unsqueeze(1) >= table.shape[0] - new_rows
    table.register_hook(lambda gradient: gradient * is_new.to(gradient.device))


def adapter_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """What the adapter adds to its base: LoRA matrices under peft's names, and trained tables under their own."""
    trained = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    return weights | {name: weight for name, weight in trained.items() if "lora_" not in name}


def save_adapter(model: PeftModel, folder: Path, weights: Mapping[str, torch.Tensor] | None = None) -> None:
    """`weights` are those of `adapter_weights`, if they are on the CPU already."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = weights or {name: weight.cpu().contiguous() for name, weight in adapter_weights(model).items()}
    save_file(dict(weights), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config["default"]
    was_inference, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = was_inference
    without_adapter(model).generation_config.save_pretrained(str(folder))


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Weights of a saved adapter into a model that `add_adapter` made in the same way."""
    result = set_peft_model_state_dict(model, load_file(folder / ADAPTER_WEIGHTS))
    assert not result.unexpected_keys, f"{folder} does not fit: {result.unexpected_keys[:3]}"


def merge_adapter(model: PeftModel) -> PreTrainedModel:
    """A plain model with the adapter in its weights. Its config keeps saying what is tied: peft compares the encoder's
    input table with the head, and where these two are no pair (T5Gemma) declares the decoder's table untied as well,
    which loses the head when the model is saved."""
    tied = model.config.tie_word_embeddings
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        merged = model.merge_and_unload()
    merged.config.tie_word_embeddings = tied
    return merged
