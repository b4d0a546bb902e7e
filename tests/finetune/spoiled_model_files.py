"""Spoiled files of the model's side of a checkpoint: configs, generation configs, adapters, weights."""

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save, save_file
from small_families import family_configs
from spoiled_files import TEXTS, Kind, shown, spoil_json, spoil_text, spoil_value, without_limits, write
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedTokenizerFast

from diptych.finetune.inference.generation import generate_outputs
from diptych.finetune.model.loading import load_checkpoint

# Valid checkpoints


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and three special ones."""
    words = ["<pad>", "</s>", "<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Split("", "isolated")]
    )
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


def make_model(family: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        tokenizer = make_tokenizer()
        torch.manual_seed(0)
        AutoModelForSeq2SeqLM.from_config(family_configs(len(tokenizer))[family]).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return make


def make_adapter(folder: Path) -> None:
    """With the base inside, so that the folder can be copied anywhere: its name is relative to the working folder."""
    make_model("t5")(folder / "base")
    base = AutoModelForSeq2SeqLM.from_pretrained(folder / "base")
    lora = LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules=["q", "v"], init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    file = folder / "adapter_config.json"
    write(file, json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "base"}).encode())


def load_and_write(folder: Path) -> None:
    """Four tokens, as `diptych generate` writes them. An adapter's base is looked for in the working folder."""
    os.chdir(folder)
    generate_outputs(load_checkpoint(folder, "float32"), [[5, 6, 7, 1]], batch_size=1, max_new_tokens=4)


# Weights


def spoil_tensors(pattern: str) -> Callable[[Path, random.Random], str]:
    return lambda folder, dice: spoil_weights(next(folder.glob(pattern)), dice)


def spoil_weights(file: Path, dice: random.Random) -> str:
    weights = load_file(file)
    name = dice.choice(sorted(weights))
    how = dice.choice(["missing", "shape", "type", "value", "more", "many", "name", "header", "bytes", "index"])
    if how == "missing":
        del weights[name]
    elif how == "shape":
        weights[name] = torch.zeros(dice.choice([(), (0,), (1,), (3, 3), (300_000,), (1,) * 60, (0, 10**9)]))
    elif how == "type":
        kind = dice.choice([torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64, torch.float16, torch.uint8])
        weights[name] = weights[name].to(kind)
        how += f" {kind}"
    elif how == "value":
        value = dice.choice([float("nan"), float("inf"), 3e38, 1e-40, 0.0])
        weights[name].view(-1)[dice.randrange(weights[name].numel())] = value
        how += f" {value}"
    elif how == "name":
        new = dice.choice([*TEXTS, "lm_head.weight", name + ".lora_A.weight", name.replace(".", "..")])[:1000]
        weights[new.encode(errors="replace").decode()] = weights.pop(name)
        how += f" {shown(new)}"
    elif how == "more":
        weights |= {f"{name}.{number}": torch.ones(2) for number in range(dice.choice([1, 300, 3000]))}
    else:
        content = file.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        if how == "many":
            empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
            header |= {f"{name}.{number}": empty for number in range(dice.choice([2_000, 100_000, 400_000]))}
            write(file, with_header(json.dumps(header).encode(), content))
        elif how == "header":
            header, said = spoil_value(header, dice, {"__metadata__": {"format": "pt"}, "new": header[name]})
            with without_limits():
                write(file, with_header(json.dumps(header).encode(), content))
            how += f" {said}"
        elif how == "bytes":
            content, said = spoil_text(content, dice)
            write(file, content)
            how += f" {said}"
        elif how == "index":
            file.unlink()
            save_file(weights, file.parent / "other.safetensors")
            index, said = spoil_value({"weight_map": dict.fromkeys(weights, "other.safetensors")}, dice, {})
            with without_limits():
                write(Path(f"{file}.index.json"), json.dumps(index).encode())
            how += f" {said}"
        return f"{name}: {how}"
    write(file, save(weights, {"format": "pt"}))
    return f"{name}: {how}"


def with_header(header: bytes, content: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + content[8 + int.from_bytes(content[:8], "little") :]


# Kinds

GENERATION = {name: value for name, value in GenerationConfig().to_dict().items() if name != "transformers_version"}
GENERATION |= {"num_beams": 2, "temperature": 0.5, "eos_token_id": [1, 2], "bad_words_ids": [[3, 4]], "max_length": 20}
GENERATION |= {"suppress_tokens": [3], "begin_suppress_tokens": [3], "forced_bos_token_id": 2, "min_new_tokens": 1}
GENERATION |= {"sequence_bias": [[[3], 1.0]], "stop_strings": ["a"], "watermarking_config": {"bias": 2.0}}
ADAPTER = {name: value for name, value in LoraConfig().to_dict().items() if name != "peft_version"}
ADAPTER |= {
    "rank_pattern": {"q": 2},
    "alpha_pattern": {"q": 2},
    "exclude_modules": "decoder.*",
    "layers_pattern": "block",
}
ADAPTER |= {"target_modules": ".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$", "layers_to_transform": [0, 1]}
ADAPTER |= {"init_lora_weights": "pissa_niter_4", "layer_replication": [[0, 2]], "modules_to_save": ["lm_head"]}
ADAPTER |= {"trainable_token_indices": {"shared": [3]}, "target_parameters": ["q.weight"], "feedforward_modules": "wi"}
ADAPTER |= {
    "oft_block_size": 2,
    "decompose_factor": 2,
    "vera_dropout": 0.1,
    "projection_prng_key": 0,
    "save_projection": 1,
}
ADAPTER |= {"loftq_config": {"loftq_bits": 4, "loftq_iter": 2}, "corda_config": {"cache_file": "a"}, "eva_config": {}}
OF_ALL_CONFIGS = {
    "num_labels": 2,
    "id2label": {"0": "a"},
    "dtype": "float32",
    "architectures": ["A"],
    "extra_ids": 100,
}
OF_ALL_CONFIGS |= {
    "encoder": {"num_layers": 2},
    "text_config": {},
    "task_specific_params": {"a": {}},
    "pruned_heads": {},
}
OF_ALL_CONFIGS |= {
    "rope_parameters": {"rope_type": "default"},
    "layer_types": ["full_attention"],
    "num_hidden_layers": 2,
}
OF_ALL_CONFIGS |= {"problem_type": "regression", "attribute_map": {"a": "b"}, "max_length": 20, "num_beams": 2}
OF_ALL_CONFIGS |= {"hidden_act": "gelu", "tie_word_embeddings": True, "use_cache": True, "model_type": "bart"}


def of_config(family: str) -> Kind:
    known = OF_ALL_CONFIGS | family_configs(300)[family].to_dict()
    return Kind(make_model(family), spoil_json("config.json", known), load_and_write)


FAMILIES = ("t5", "bart", "diptych", "t5gemma", "marian", "switch_transformers", "encoder-decoder", "prophetnet")
OF_THE_MODEL = {
    **{f"config.json of {family}": of_config(family) for family in FAMILIES},
    "generation_config.json": Kind(make_model("t5"), spoil_json("generation_config.json", GENERATION), load_and_write),
    "adapter_config.json": Kind(make_adapter, spoil_json("adapter_config.json", ADAPTER), load_and_write),
    "safetensors": Kind(make_model("bart"), spoil_tensors("*model.safetensors"), load_and_write),
    "safetensors of an adapter": Kind(make_adapter, spoil_tensors("*model.safetensors"), load_and_write),
}
