"""A decoder-only LLM from which another model is made (`diptych pair`), or which teaches one (distillation).

    donor = open_donor("HuggingFaceTB/SmolLM2-135M")
    donor.config, donor.tokenizer, donor.weights.tensor("model.embed_tokens.weight")

Only what is asked for is read from its files; the whole model is never in memory.
"""

import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.model.loading import check_folder, load_config, load_tokenizer
from diptych.finetune.model.untrusted_files import MODEL_WEIGHTS, check_sizes, weight_files


class DonorWeights:
    """The tensors of one or several safetensors files, by name; each is read when it is asked for."""

    def __init__(self, files: Sequence[Path]):
        self._file_of: dict[str, Path] = {}
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                self._file_of |= dict.fromkeys(tensors.keys(), file)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def keep(self, names: Set[str]) -> list[str]:
        """Forgets all others, and returns their names."""
        others = sorted(self._file_of.keys() - names)
        self._file_of = {name: file for name, file in self._file_of.items() if name in names}
        return others

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self._file_of[name], framework="pt") as tensors:
            return tuple(tensors.get_slice(name).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        with safe_open(self._file_of[name], framework="pt") as tensors:
            return tensors.get_tensor(name)


@dataclass(frozen=True, eq=False)
class Donor:
    name: str
    config: PreTrainedConfig
    weights: DonorWeights
    model: PreTrainedModel
    """Its layers, without values."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.name)


def open_donor(name: str) -> Donor:
    """UserError for what is no decoder-only checkpoint in safetensors."""
    name = os.path.expanduser(name)
    check_folder(name)
    config = load_config(name)
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{name} is no decoder-only LLM (model_type {config.model_type}). An encoder-decoder is trained as it is:"
            f" diptych train --model {name}"
        )
    files = weight_files(name, MODEL_WEIGHTS)
    model = check_sizes(config, files, config.dtype or torch.float32, name, AutoModelForCausalLM)
    return Donor(name, config, DonorWeights(files), model)


def check_weights(donor: Donor) -> list[str]:
    """From here on its weights are those of its layers alone; returned are the names of others in its files. UserError
    where the files lack a weight, or have it twice, or in another shape."""
    held, tied = set(), donor.model.all_tied_weights_keys
    for key, weight in donor.model.state_dict().items():
        names = dict.fromkeys((key, key.removeprefix(f"{donor.model.base_model_prefix}.")))  # of a base model alone
        found = [name for name in names if name in donor.weights]
        if len(found) != 1 and key not in tied:
            how = f"lacks {key}" if not found else f"has {' and '.join(found)}, which are one weight"
            raise UserError(f"{donor.name} {how}. Copy it again, with all its files.")
        for name in found:
            if (shape := donor.weights.shape(name)) != weight.shape:
                raise UserError(
                    f"{name} of {donor.name} has the shape {list(shape)}, and its config.json says"
                    f" {list(weight.shape)}. Copy it again, with all its files."
                )
        held.update(found)
        if found and key in tied and not _is_equal(donor.weights, found[0], tied[key]):
            raise UserError(
                f"config.json of {donor.name} says tie_word_embeddings, and {found[0]} in its files is no copy of"
                f" {tied[key]}. Say false there if the LLM has both."
            )
    return donor.weights.keep(held)


def _is_equal(weights: DonorWeights, one: str, other: str) -> bool:
    return other not in weights or torch.equal(weights.tensor(one), weights.tensor(other))


def divisor_and_cap(config: PreTrainedConfig) -> tuple[float, float | None]:
    """What an LLM's logits are divided by (Granite), and what they are capped at (Gemma 2), if at all."""
    return getattr(config, "logits_scaling", 1.0), getattr(config, "final_logit_softcapping", None)


def llm_logits(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """What the decoder of an LLM returns (…, D) → logits (…, V)."""
    divisor, cap = divisor_and_cap(model.config)
    logits = model.get_output_embeddings()(states) / divisor
    return logits if cap is None else cap * torch.tanh(logits / cap)


def tokenizers_differ(one: Mapping[str, int], other: Mapping[str, int]) -> str:
    """Which token differs, in words; "" where both vocabularies are the same."""
    for token in sorted(one.keys() | other.keys()):
        if one.get(token) != other.get(token):
            return f"{token!r} is {one.get(token)} in one and {other.get(token)} in the other"
    return ""
