"""What a stranger's checkpoint may ask for has a bound, and what it may not ask for is one message, with the key.

A share of what fuzz_checkpoints.py does by the thousand; and, by name, what was a hang, a traceback, or nonsense.
"""

import functools
import json
import os
import shutil
import struct
import time

import datasets
import pytest
import torch
from fuzz_checkpoints import KINDS, fuzz
from safetensors.torch import load_file, save_file
from spoiled_model_files import load_and_write, make_adapter, make_model

from diptych.data_prep.command_line.errors import UserError, library_errors
from diptych.data_prep.text_to_ids.decoder_start import decoder_start_of
from diptych.data_prep.text_to_ids.tokenizer_files import open_tokenizer
from diptych.finetune.batches.padded_rows import check_rows_fit, check_targets
from diptych.finetune.commands import cli
from diptych.finetune.commands.exit_codes import CheckpointError
from diptych.finetune.model.loading import load_checkpoint


def test_spoiled_checkpoints_load_or_are_refused_in_one_message(tmp_path):
    findings = [result for result in fuzz(2 * len(KINDS), 0, list(KINDS), tmp_path) if result.is_finding]
    assert not findings, findings


@pytest.fixture
def copy(tmp_path, t5_checkpoint):
    """A checkpoint to do anything with."""
    return shutil.copytree(t5_checkpoint, tmp_path / "copy")


@pytest.fixture(scope="module")
def an_adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    make_adapter(folder)
    return folder


@pytest.fixture
def adapter(tmp_path, an_adapter):
    return shutil.copytree(an_adapter, tmp_path / "adapter")


def edit(file, **changes):
    values = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps(values | changes), encoding="utf-8")


def refusal(folder, load=load_and_write) -> str:
    started = time.process_time()
    with pytest.raises(UserError) as caught:
        load(folder)
    assert time.process_time() - started < 5 and len(str(caught.value)) < 1000
    return str(caught.value)


# The boundary


def test_errors_of_libraries_become_one_message_and_those_of_the_machine_pass():
    with pytest.raises(UserError, match=r"^a.json cannot be read \('b'\): KeyError 'c'. Mend it.$"):
        with library_errors("a.json cannot be read", "Mend it.", lambda: " ('b')"):
            raise KeyError("c")
    passing = [MemoryError(), KeyboardInterrupt(), OSError(28, "No space left on device"), UserError("mine")]
    passing.append(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    for error in passing:
        with pytest.raises(type(error)) as caught, library_errors("a.json", "Mend it."):
            raise error
        assert caught.value is error


# Adapters

BACKTRACKING = "(([a-zA-Z0-9_.]+)*)*!"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_modules": BACKTRACKING}, "a pattern in target_modules that cannot be used: it takes more than 1 s"),
        ({"exclude_modules": BACKTRACKING}, "a pattern in exclude_modules that cannot be used: it takes more than"),
        ({"rank_pattern": {BACKTRACKING: 4}}, "a pattern in rank_pattern that cannot be used: it takes more than 1 s"),
        ({"alpha_pattern": {BACKTRACKING: 4}}, "a pattern in alpha_pattern that cannot be used: it takes more than"),
        ({"modules_to_save": [BACKTRACKING]}, "a pattern in modules_to_save that cannot be used: it takes more than"),
        ({"layers_to_transform": [0], "layers_pattern": BACKTRACKING}, "a pattern in layers_pattern"),
        ({"target_modules": "(q"}, "a pattern in target_modules that cannot be used: .*unterminated subpattern"),
        ({"init_lora_weights": "pissa_niter_999999999"}, "has the init_lora_weights 'pissa_niter_999999999'"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 10**9}}, "weights 'loftq'"),
        ({"num_cayley_neumann_terms": 10**4}, "10000 in num_cayley_neumann_terms. 100 are the most"),
        ({"layer_replication": [[0, 10**9]]}, "has a layer_replication"),
        ({"lora_alpha": 10**30}, "in lora_alpha. 10,000 are the most that are tried"),
        ({"peft_type": ["LORA"]}, "has the peft_type"),
        ({"target_parameters": 7}, "cannot be put on its base"),
        ({"rank_pattern": None}, "cannot be put on its base"),
        ({"kasa_config": []}, "KasaConfig"),
        ({"target_modules": 7}, "cannot be put on its base"),
        ({"bias": {}}, "cannot be put on its base"),
        ({"r": "4"}, "has the rank 4"),
        ({"lora_alpha": "x"}, "cannot be put on its base"),
    ],
)
def test_what_an_adapter_asks_of_peft_is_bounded(adapter, changes, said):
    edit(adapter / "adapter_config.json", **changes)
    with pytest.raises(UserError, match=said):
        raise UserError(refusal(adapter))


def test_a_tensor_of_an_adapter_that_belongs_nowhere_is_told(adapter):
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.nowhere.weight": torch.zeros(4)}, file)
    assert "has base_model.model.nowhere.weight, for which its base has no place" in refusal(adapter)


def test_patterns_that_adapters_have_still_work(adapter):
    pattern = r"(?:.*?(?:encoder|decoder).*?(?:SelfAttention|EncDecAttention)\.(?:q|v))|(?:\bmodel\.q)"
    edit(adapter / "adapter_config.json", target_modules=pattern, rank_pattern={r"block\.1.*q": 4})
    load_and_write(adapter)


def test_torch_prints_no_traceback_of_its_own_beside_the_refusal(tmp_path, nursery):
    """A ProphetNet whose table of positions is too short for any pass."""
    make_model("prophetnet")(tmp_path / "model")
    edit(tmp_path / "model" / "config.json", max_position_embeddings=3)
    words = ["generate", str(tmp_path / "model"), "--instruction", "Go.", "--device", "cpu"]
    assert nursery.run(words, tmp_path / "log").wait(120) == 2
    said = (tmp_path / "log").read_text()
    assert said.count("\n") == 1 and "config.json" in said, said


@pytest.mark.parametrize("value", [0.5, ["full_attention"], {}])
def test_a_text_model_in_a_config_that_is_none_is_refused_when_it_is_loaded(tmp_path, value):
    """transformers asks it for layers when it makes a cache, in generating only."""
    make_model("t5gemma")(tmp_path)
    decoder = json.loads((tmp_path / "config.json").read_text())["decoder"]
    edit(tmp_path / "config.json", decoder=decoder | {"text_config": value})
    assert "config.json" in (said := refusal(tmp_path)) and (value == {} or "text_config is" in said)


# Generation configs


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("eos_token_id", value) for value in ("x", {}, [[1]], 10**9, -1, 1.5, True, [1, 10**9])),
        *(("decoder_start_token_id", value) for value in ("x" * 10**6, [0], 10**9, 1e30)),
        *(("bad_words_ids", value) for value in ([1], [[10**9]], [[3]] * 10**5, [[[3]]])),
        *(("suppress_tokens", value) for value in ([10**9], {"a": 1}, [None], 3)),
        *(("min_length", value) for value in ("5", -1, 10**30, [1])),
        *(("forced_bos_token_id", value) for value in (10**9, [2])),
        *((key, "x") for key in ("max_new_tokens", "watermarking_config", "early_stopping", "pad_token_id")),
    ],
)
def test_a_generation_config_is_refused_with_its_key_when_it_is_loaded(copy, key, value):
    edit(copy / "generation_config.json", **{key: value})
    said = refusal(copy)
    assert key in said and "generation_config.json" in said


def test_a_generation_config_that_is_none_is_said_and_not_passed_over(copy):
    for text in ("[1]", "{", '"a"', "[" * 10**5):
        (copy / "generation_config.json").write_text(text)
        assert "refuses" in (said := refusal(copy)) and "generation_config.json" in said
    assert "refuses" in refusal(copy, lambda folder: decoder_start_of(str(folder)))


# Configs


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_labels": 10**9}, "num_labels is 1000000000"),
        ({"extra_ids": 10**9}, "extra_ids is 1000000000"),
        ({"num_experts": 10**9}, "num_experts is 1000000000"),
        ({"num_sparse_encoder_layers": 10**9}, "num_sparse_encoder_layers is 1000000000"),
        ({"model_type": "marian", "max_position_embeddings": 10**9, "d_model": 48}, "asks for"),
        ({"rope_parameters": ["x"]}, "config"),
        ({"feed_forward_proj": "no-such"}, "config"),
        ({"attribute_map": ["a"]}, "names attribute_map, which is none of its settings"),
        (
            {"decoder_sparse_step": functools.reduce(lambda inner, _: {"a": [inner]}, range(11), 0)},
            "more than 20 deep",
        ),
        ({"pad_token_id": -1}, "pad_token_id is '-1' in"),
        ({"architectures": [7]}, "architectures is no list of texts"),
        ({"rope_type": "default" * 200}, "'rope_type' has a text of 1,400 characters"),
        ({"to_dict": 1}, "names to_dict, which is none of its settings"),
        ({"num_layers": 0}, "num_layers is '0', which is no size"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder is not true"),
        ({"layer_norm_epsilon": -1.0}, "layer_norm_epsilon is -1.0"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
        ({"relative_attention_max_distance": 0}, "can be made of ('relative_attention_max_distance'): math domain"),
    ],
)
def test_what_a_config_asks_for_is_bounded(copy, changes, said):
    edit(copy / "config.json", **changes)
    assert said in refusal(copy)


def test_a_decoder_starts_with_a_token_that_there_is(copy):
    edit(copy / "config.json", decoder_start_token_id=10**6)
    (copy / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert "decoder_start_token_id is '1000000' in" in refusal(copy)
    (copy / "generation_config.json").unlink()
    assert "decoder_start_token_id is '1000000' in" in refusal(copy)


def test_a_long_file_is_not_read(copy):
    (copy / "config.json").write_text("{}" + " " * 40_000_000)
    assert "has 40,000,002 bytes" in refusal(copy)
    (copy / "config.json").unlink()
    with (copy / "chat_template.jinja").open("wb") as sparse:
        sparse.truncate(2**33)
    assert "chat_template.jinja has 8,589,934,592 bytes" in refusal(copy, lambda folder: open_tokenizer(str(folder)))


@pytest.mark.parametrize("file", ["model.safetensors", "generation_config.json", "tokenizer_config.json"])
def test_what_has_the_name_of_a_file_and_is_none_is_not_passed_over(copy, file):
    (copy / file).unlink(missing_ok=True)
    os.mkfifo(copy / file)
    assert f"{file} is no file that can be read (a pipe" in refusal(copy)


# Weights


def test_400_000_empty_tensors_are_refused(copy, adapter):
    for file in (copy / "model.safetensors", adapter / "adapter_model.safetensors"):
        content = file.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        for number, said in ((400_000, "has a header of"), (20_000, "tensors, and")):
            empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
            longer = json.dumps(header | {f"t{place}": empty for place in range(number)}).encode()
            file.write_bytes(struct.pack("<Q", len(longer)) + longer + content[8 + size :])
            assert said in refusal(file.parent)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_said_at_loading(copy, value, training_folder, tmp_path, capsys):
    weights = load_file(copy / "model.safetensors")
    weights["shared.weight"][3, :2] = value
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"shared.weight of .* has 2 values that are infinite or no number"):
        load_checkpoint(copy)
    train = ["--data", str(training_folder), "--model", str(copy), "--out", str(tmp_path / "run"), "--max_steps", "1"]
    assert cli.main(["train", *train]) == 3
    assert "shared.weight of" in capsys.readouterr().err
    assert cli.main(["doctor", str(copy), "--device", "cpu"]) == 1  # which still finds it by itself
    assert "Not finite: 1 of" in " ".join(capsys.readouterr().out.split())


def test_other_shapes_and_weights_that_nothing_reads_are_one_line(copy, capsys):
    weights = load_file(copy / "model.safetensors")
    save_file(weights | {f"other.{place}": torch.ones(1) for place in range(50)}, copy / "model.safetensors")
    load_checkpoint(copy)
    assert "50 weights of its files are of no layer of T5ForConditionalGeneration" in capsys.readouterr().err
    save_file(weights | {"shared.weight": torch.ones(3, 3)}, copy / "model.safetensors")
    assert "1 weight of" in (said := refusal(copy)) and "shared.weight is [3, 3], where" in said


def test_weights_of_whole_numbers_and_weights_in_two_files_are_refused(copy):
    weights = load_file(copy / "model.safetensors")
    save_file(weights | {"shared.weight": weights["shared.weight"].to(torch.int8)}, copy / "model.safetensors")
    assert "shared.weight of" in (said := refusal(copy)) and "is stored as I8" in said
    (copy / "model.safetensors").rename(copy / "model-1.safetensors")
    save_file(weights, copy / "model-2.safetensors", {"format": "pt"})
    index = {key: f"model-{1 + place % 2}.safetensors" for place, key in enumerate(weights)}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert "model-1.safetensors and model-2.safetensors of" in refusal(copy)


# Rows


@pytest.mark.parametrize("labels", [[], [-100, -100]])
def test_rows_without_a_target_are_refused_with_their_number(labels, new_model):
    rows = [{"input_ids": [5, 1], "labels": [7, 1]}] * 2 + [{"input_ids": [5, 1], "labels": labels}]
    splits = {"train": datasets.Dataset.from_list(rows)}
    for check in (check_targets, lambda splits: check_rows_fit(new_model("t5"), splits)):
        with pytest.raises(UserError, match="split train, row 2: its labels hold no target"):
            check(splits)
