"""What loads, loads whole; what does not is refused in one message that says what it is and what is needed."""

import json
import os
import re
import shutil
import subprocess
import sys
from copy import deepcopy

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
)

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.text_to_ids.templates import TOKENIZER_KEY, template_of
from diptych.finetune.model.families import FAMILIES
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.loading import load_checkpoint, load_tokenizer, pick_device, position_limit
from diptych.modeling import DiptychForConditionalGeneration, named_config

LORA = LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"], init_lora_weights=False)


@pytest.fixture
def copy(tmp_path, t5_checkpoint):
    """A checkpoint that the test may damage."""
    return shutil.copytree(t5_checkpoint, tmp_path / "copy")


def refusal(folder) -> str:
    with pytest.raises(UserError) as caught:
        load_checkpoint(folder)
    return str(caught.value)


def logits_of(model, ids=(5, 6, 1)):
    return model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([[0, 7, 9]])).logits


def test_a_saved_checkpoint_loads_with_the_same_logits_and_its_template(t5_checkpoint, learned_t5):
    loaded = load_checkpoint(t5_checkpoint)
    model, tokenizer = loaded.model, loaded.tokenizer
    assert torch.equal(logits_of(model), logits_of(learned_t5))
    assert not model.training and template_of(tokenizer).name == "translate"


def test_the_limit_of_a_t5gemma2_is_that_of_its_encoders_text_and_of_its_decoder(new_model):
    model = new_model("t5gemma2")
    model.config.encoder.text_config.max_position_embeddings, model.config.decoder.max_position_embeddings = 48, 64
    assert (position_limit(model, of_source=True), position_limit(model)) == (48, 48)
    model.config.encoder.text_config.max_position_embeddings = 96
    assert (position_limit(model, of_source=True), position_limit(model)) == (96, 64)


def test_a_loaded_model_has_what_follows_from_model_and_tokenizer(t5_checkpoint):
    loaded = load_checkpoint(t5_checkpoint)
    model, tokenizer = loaded.model, deepcopy(loaded.tokenizer)
    assert (loaded.family, loaded.decoder_start_token_id, loaded.pad_token_id) == (FAMILIES["t5"], 0, 0)
    assert loaded.template.name == "translate" and not loaded.language_codes.tokens
    tokenizer.pad_token = None
    assert LoadedModel.of(model, tokenizer).pad_token_id == 0
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id = config.bos_token_id = None
    with pytest.raises(UserError, match="names a decoder_start_token_id or a bos_token_id"):
        LoadedModel.of(model, tokenizer)


def test_a_diptych_checkpoint_loads(tmp_path, tiny_tokenizer):
    config = named_config(
        "diptych-8m", vocab_size=len(tiny_tokenizer), pad_token_id=0, eos_token_id=1, decoder_start_token_id=0
    )
    model = DiptychForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    loaded = load_checkpoint(tmp_path).model
    assert type(loaded) is DiptychForConditionalGeneration
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_dtype_is_as_saved_unless_asked(t5_checkpoint):
    assert load_checkpoint(t5_checkpoint).model.dtype == torch.float32
    assert load_checkpoint(t5_checkpoint, dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.slow
def test_who_computes_in_bf16_on_a_cpu_without_it_is_told(t5_checkpoint):
    """oneDNN is told to leave out all that AMD's Zen 3 does not have."""
    script = (
        "import sys\n"
        "from diptych.finetune.model.loading import load_checkpoint\n"
        "for dtype in ('auto', 'bfloat16'):\n"
        "    load_checkpoint(sys.argv[1], dtype)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(t5_checkpoint)], capture_output=True, text=True, timeout=120,
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "times slower" in line]
    assert re.search("its weights are bfloat16, which this CPU computes [0-9]+ times slower than float32", line)


def test_an_adapter_finds_its_base_and_comes_out_merged(tmp_path, t5_checkpoint, tiny_tokenizer):
    adapted = get_peft_model(T5ForConditionalGeneration.from_pretrained(t5_checkpoint), LORA).eval()
    adapted.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model = load_checkpoint(tmp_path).model
    assert type(model) is T5ForConditionalGeneration
    assert not any("lora" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(logits_of(model), logits_of(adapted), rtol=1e-5, atol=1e-5)

    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "/nowhere/base"
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert "its base model cannot be used: there is no folder /nowhere/base" in refusal(tmp_path)


def test_an_adapter_brings_the_embedding_rows_of_a_vocabulary_that_grew(tmp_path, t5_checkpoint, tiny_tokenizer):
    base = T5ForConditionalGeneration.from_pretrained(t5_checkpoint)
    tokenizer = type(tiny_tokenizer).from_pretrained(t5_checkpoint)
    tokenizer.add_tokens(["새로운", "낱말"])
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    adapted = get_peft_model(base, LORA).eval()
    adapted.save_pretrained(tmp_path, save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_checkpoint(tmp_path)
    model, loaded_tokenizer = loaded.model, loaded.tokenizer
    new_word = loaded_tokenizer.convert_tokens_to_ids("낱말")
    torch.testing.assert_close(
        logits_of(model, (5, new_word, 1)), logits_of(adapted, (5, new_word, 1)), rtol=1e-5, atol=1e-5
    )


def test_a_folder_that_is_not_there_or_holds_no_checkpoint_is_named(tmp_path, t5_checkpoint):
    assert f"there is no folder {tmp_path}/nothing" in refusal(tmp_path / "nothing")
    message = refusal(t5_checkpoint.parent)
    assert "neither config.json nor adapter_config.json" in message
    assert f"Did you mean {t5_checkpoint}?" in message
    assert "is a file; a checkpoint is a folder" in refusal(t5_checkpoint / "config.json")


def test_a_name_that_is_neither_a_folder_nor_on_the_hub_is_explained(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # what it asks else: test_hub.py
    expected = "there is no folder nobody-here/no-such-model, .* Name a checkpoint folder, or a Hub id"
    assert re.search(expected, refusal("nobody-here/no-such-model"))
    with pytest.raises(UserError, match=expected):
        load_tokenizer("nobody-here/no-such-model")


BERT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
OTHERS = {
    "a decoder-only model": lambda: GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=50)),
    "an encoder-only model": lambda: BertForMaskedLM(BertConfig(**BERT)),
    "no text-to-text model (model_type vit)": ViTConfig,
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_kind_of_model_is_named(tmp_path, tiny_tokenizer, kind):
    OTHERS[kind]().save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    message = refusal(tmp_path)
    assert kind in message and "an encoder-decoder is needed" in message


def test_a_checkpoint_without_its_decoder_is_refused_not_filled_with_random_weights(
    tmp_path, learned_t5, tiny_tokenizer
):
    T5EncoderModel(deepcopy(learned_t5.config)).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    message = refusal(tmp_path)
    assert re.search(r"lacks \d+ weights of T5ForConditionalGeneration, decoder\.", message)
    assert "saved as T5EncoderModel" in message


def test_a_missing_tokenizer_and_one_too_large_are_refused(copy, tmp_path, t5_checkpoint, tiny_tokenizer):
    tokenizer = type(tiny_tokenizer).from_pretrained(t5_checkpoint)
    tokenizer.add_tokens([f"word{number}" for number in range(10)])
    tokenizer.save_pretrained(copy)
    message = refusal(copy)
    assert f"ids up to {len(tokenizer) - 1}, but the model has {len(tiny_tokenizer)} embedding rows" in message
    (copy / "tokenizer.json").unlink()
    assert "has neither tokenizer.json nor another vocabulary. Name the checkpoint" in refusal(copy)
    for file in copy.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer: none of tokenizer.json" in refusal(copy)


def test_device_auto_is_one_that_works():
    assert torch.zeros(1, device=pick_device("auto")).sum() == 0
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="device 'cpux' cannot be used"):
        pick_device("cpux")


def change_template(folder, change):
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings[TOKENIZER_KEY] |= change(settings[TOKENIZER_KEY])
    file.write_text(json.dumps(settings), encoding="utf-8")


def test_a_template_that_no_longer_gives_its_examples_is_refused_unless_another_is_wanted(copy):
    change_template(copy, lambda stored: {"source": stored["source"].replace("%} {% endif %}", "%}  {% endif %}")})
    message = refusal(copy)
    assert "the source text of example 1 was 'Translate English to Korean: I am a student.'" in message
    assert "--template" in message
    loaded = load_checkpoint(copy, template="alpaca")
    assert loaded.template.name == "alpaca"
    tokenizer = loaded.tokenizer
    assert "%}  {% endif %}" in template_of(tokenizer, check=False).source


def test_a_checkpoint_from_before_there_were_examples_loads(copy):
    change_template(copy, lambda stored: {"golden": []})
    assert template_of(load_checkpoint(copy).tokenizer).name == "translate"


OLD_FIELDS = {
    "t5": {"n_positions": 512, "output_past": True, "task_specific_params": {"summarization": {"num_beams": 4}}},
    "bart": dict.fromkeys(("static_position_embeddings", "normalize_before", "add_bias_logits"), False)
    | {"extra_pos_embeddings": 2, "force_bos_token_to_be_generated": True, "num_beams": 4, "max_length": 142},
}


@pytest.mark.parametrize("family", OLD_FIELDS)
def test_a_checkpoint_of_years_ago_loads(family, new_model, tiny_tokenizer, tmp_path):
    """Its config has fields that nobody reads any more and lacks newer ones; there is no generation config."""
    model = new_model(family).eval()
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    for newer in ("dtype", "transformers_version", "scale_decoder_outputs", "scale_embedding"):
        config.pop(newer, None)
    (tmp_path / "config.json").write_text(json.dumps(config | OLD_FIELDS[family]))
    assert torch.equal(logits_of(load_checkpoint(tmp_path).model), logits_of(model))


def test_an_adapter_of_a_later_peft_loads_where_its_new_fields_say_nothing(t5_checkpoint, tmp_path):
    model = get_peft_model(T5ForConditionalGeneration.from_pretrained(t5_checkpoint), LORA)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_of_the_future": None, "peft_version": "9.0"}))
    found = logits_of(load_checkpoint(tmp_path).model)
    assert torch.allclose(found, logits_of(model.eval()), atol=1e-4)
