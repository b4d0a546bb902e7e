"""Weights: one tensor for each fact, loaded as saved, resized together, drawn as the config says."""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoModelForTextEncoding

from diptych.modeling import DiptychEncoderModel, DiptychForConditionalGeneration, DiptychModel

SHAPES = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "tied, unequal width": {"tie_word_embeddings": True, "encoder": {"hidden_size": 48, "num_hidden_layers": 1}},
    "untied, all parts": {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True, "qk_norm": True},
}
SHARED_TABLES = {"tied": 1, "untied": 3, "tied, unequal width": 2, "untied, all parts": 3}


@pytest.fixture(params=SHAPES)
def shape(request):
    return request.param


@pytest.fixture
def model(shape, build_model):
    """Every tensor is drawn, so that none is what initialisation would make of it."""
    model = build_model(**SHAPES[shape])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def batch(draw_tokens):
    return {"input_ids": draw_tokens(2, 7), "decoder_input_ids": draw_tokens(2, 5, seed=1)}


def tables(model) -> list[nn.Parameter]:
    inner = model.model
    return [inner.encoder.embed_tokens.weight, inner.decoder.embed_tokens.weight, model.lm_head.weight]


def assert_ties(model, shape):
    encoder, decoder, head = tables(model)
    assert len({id(table) for table in (encoder, decoder, head)}) == SHARED_TABLES[shape]
    assert (head is decoder) == shape.startswith("tied") and (encoder is decoder) == (shape == "tied")


def assert_loads_cleanly(model_class, folder, **settings):
    model, report = model_class.from_pretrained(folder, output_loading_info=True, **settings)
    problems = {name: keys for name, keys in report.items() if keys}
    assert not problems, problems
    assert not any(parameter.is_meta for parameter in (*model.parameters(), *model.buffers()))
    return model


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"], ids=["single", "sharded"])
def test_saved_weights_load_to_the_same_logits(max_shard_size, shape, model, batch, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    shards = len(list(tmp_path.glob("*.safetensors")))
    assert shards == 1 if max_shard_size == "5GB" else shards > 2
    loaded = assert_loads_cleanly(DiptychForConditionalGeneration, tmp_path)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert_ties(loaded, shape)
    loaded.save_pretrained(tmp_path / "again")
    again = assert_loads_cleanly(AutoModelForSeq2SeqLM, tmp_path / "again")
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_a_tied_table_is_stored_once(shape, model, tmp_path):
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum("embed_tokens" in name or name == "lm_head.weight" for name in stored) == SHARED_TABLES[shape]
    assert "model.encoder.embed_tokens.weight" in stored, "the encoder alone must find its table"
    assert sum(tensor.numel() for tensor in stored.values()) == model.num_parameters()


def test_every_tensor_is_a_parameter_or_buffer_and_every_parameter_learns(shape, model, batch):
    model(**batch, labels=batch["decoder_input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert_ties(model, shape)
    for name, module in model.named_modules():
        loose = [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
        assert not loose, f"{name} holds {loose}, which neither .to() nor loading would reach"
    assert {name.rsplit(".", 1)[1] for name, _ in model.named_buffers()} == {"inv_freq", "original_inv_freq"}
    assert not any("inv_freq" in name for name in model.state_dict())


def test_base_and_head_checkpoints_load_into_each_other(shape, model, batch, tmp_path):
    model.save_pretrained(tmp_path / "head")
    base, report = DiptychModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not report["missing_keys"]
    assert set(report["unexpected_keys"]) <= {"lm_head.weight"}
    states = model.model(**batch).last_hidden_state
    assert torch.equal(base(**batch).last_hidden_state, states)
    base.save_pretrained(tmp_path / "base")
    head, report = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert set(report["missing_keys"]) == (set() if shape.startswith("tied") else {"lm_head.weight"})
    assert not report["unexpected_keys"]
    assert torch.equal(head.model(**batch).last_hidden_state, states)
    assert isinstance(AutoModel.from_pretrained(tmp_path / "head"), DiptychModel)


@pytest.mark.parametrize("whole", ["head", "base"])
def test_the_encoder_loads_from_a_whole_checkpoint_and_from_its_own(whole, model, batch, tmp_path):
    (model if whole == "head" else model.model).save_pretrained(tmp_path / "whole")
    encoder = assert_loads_cleanly(AutoModelForTextEncoding, tmp_path / "whole")
    assert isinstance(encoder, DiptychEncoderModel) and not encoder.config.is_encoder_decoder
    expected = model.get_encoder()(input_ids=batch["input_ids"]).last_hidden_state
    assert torch.equal(encoder(input_ids=batch["input_ids"]).last_hidden_state, expected)
    encoder.save_pretrained(tmp_path / "alone")
    stored = load_file(tmp_path / "alone" / "model.safetensors")
    assert all(name.startswith("encoder.") for name in stored)
    again = assert_loads_cleanly(AutoModelForTextEncoding, tmp_path / "alone")
    assert torch.equal(again(input_ids=batch["input_ids"]).last_hidden_state, expected)


def test_attention_and_dtype_asked_of_the_encoder_are_used(build_model, tmp_path):
    build_model().save_pretrained(tmp_path)
    encoder = AutoModelForTextEncoding.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.bfloat16)
    assert encoder.encoder.config._attn_implementation == "eager"
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("settings", [{"device_map": "cpu"}, {"device_map": "auto"}, {"device_map": {"": "cpu"}}])
def test_device_maps_load_the_same_model(settings, shape, model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = assert_loads_cleanly(DiptychForConditionalGeneration, tmp_path, **settings)
    assert torch.equal(loaded(**batch).logits.cpu(), model(**batch).logits)
    assert_ties(loaded, shape)


def test_a_model_too_large_for_memory_is_spread_without_splitting_a_layer(build_model, batch, tmp_path):
    model = build_model()
    model.save_pretrained(tmp_path)
    spread = DiptychForConditionalGeneration.from_pretrained(
        tmp_path, device_map="auto", max_memory={"cpu": "150KB", "disk": "1GB"}, offload_folder=tmp_path / "disk"
    )
    assert set(spread.hf_device_map.values()) == {"cpu", "disk"}
    assert not [place for place in spread.hf_device_map if re.search(r"layers\.\d+\.", place)]
    with torch.no_grad():
        assert torch.equal(spread(**batch).logits, model(**batch).logits)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    tokens = [each.generate(batch["input_ids"], **settings) for each in (spread, model)]
    assert torch.equal(*tokens)


def test_weights_load_in_the_dtype_that_is_asked_or_stored(build_model, tmp_path):
    build_model().to(torch.bfloat16).save_pretrained(tmp_path)
    for dtype, expected in ((None, torch.bfloat16), ("auto", torch.bfloat16), (torch.float32, torch.float32)):
        loaded = DiptychForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
        assert {parameter.dtype for parameter in loaded.parameters()} == {expected}, dtype
        assert loaded.get_encoder().rotary_emb.inv_freq.dtype is torch.float32, "positions need their precision"


def test_a_model_is_built_on_the_meta_device_and_filled_later(shape, model, batch, build_config):
    with torch.device("meta"):
        empty = DiptychForConditionalGeneration(build_config(**SHAPES[shape]))
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert_ties(empty, shape)
    loaded = DiptychForConditionalGeneration.from_pretrained(
        None, config=build_config(**SHAPES[shape]), state_dict=model.state_dict()
    )
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.separate_hinge
def test_what_a_checkpoint_lacks_is_drawn_and_the_rest_is_left_alone(build_model, tmp_path):
    model = build_model(initializer_range=0.02, attention_bias=True, qk_norm=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    lost = {
        "model.encoder.layers.0.mlp.up_proj.weight": 0.02,
        "model.decoder.layers.1.cross_attn.k_proj.bias": 0.0,
        "model.decoder.layers.1.cross_attn.k_norm.weight": 0.0,
        "model.decoder.embed_tokens.weight": 0.02,
        "lm_head.weight": 0.02,
    }
    kept = {name: tensor for name, tensor in stored.items() if name not in lost}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = DiptychForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == set(lost)
    for name, parameter in loaded.named_parameters():
        if name not in lost:
            assert (parameter == 7.0).all(), f"{name} was overwritten"
        elif name.endswith("norm.weight"):
            assert (parameter == 1.0).all(), name
        else:
            assert parameter.std().item() == pytest.approx(lost[name], rel=0.15), name


def test_a_table_of_another_size_is_refused_or_drawn_anew(build_model, build_config, tmp_path):
    build_model().save_pretrained(tmp_path)
    other = build_config(vocab_size=61)
    with pytest.raises(RuntimeError, match="size mismatch|mismatched"):
        DiptychForConditionalGeneration.from_pretrained(tmp_path, config=other)
    loaded = DiptychForConditionalGeneration.from_pretrained(tmp_path, config=other, ignore_mismatched_sizes=True)
    assert [len(table) for table in tables(loaded)] == [61] * 3
    assert all(parameter.isfinite().all() for parameter in loaded.parameters())


def test_fresh_weights_have_the_spread_of_their_panel(build_model):
    model = build_model(
        encoder={"num_hidden_layers": 2, "initializer_range": 0.05},
        initializer_range=0.02,
        attention_bias=True,
        qk_norm=True,
        hidden_size=64,
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            spread = 0.05 if ".encoder." in name else 0.02
            assert parameter.std().item() == pytest.approx(spread, rel=0.1), name
            assert abs(parameter.mean()) < 0.1 * spread, name


@pytest.mark.parametrize("new_size", [60, 41])
def test_every_table_is_resized_and_stays_so(new_size, shape, model, tmp_path, draw_tokens):
    old = [table.detach().clone() for table in tables(model)]
    batch = {"input_ids": draw_tokens(2, 7) % 41, "decoder_input_ids": draw_tokens(2, 5, seed=1) % 41}
    before = model(**batch).logits.detach()
    returned = model.resize_token_embeddings(new_size, mean_resizing=False)
    assert returned is model.get_input_embeddings() and returned.num_embeddings == new_size
    config = model.config
    assert {config.vocab_size, config.encoder.vocab_size, config.decoder.vocab_size} == {new_size}
    assert model.get_decoder().embed_tokens.num_embeddings == model.lm_head.out_features == new_size
    kept = min(new_size, 53)
    for table, before_resizing in zip(tables(model), old, strict=True):
        assert len(table) == new_size and torch.equal(table[:kept], before_resizing[:kept])
    assert_ties(model, shape)
    logits = model(**batch).logits
    torch.testing.assert_close(logits[..., :kept], before[..., :kept])
    model(**batch, labels=batch["decoder_input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = assert_loads_cleanly(DiptychForConditionalGeneration, tmp_path)
    assert torch.equal(loaded(**batch).logits, logits)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == new_size


def test_resizing_can_round_up_and_draws_new_rows_around_the_old_mean(shape, model):
    old = tables(model)[1].detach().clone()
    model.resize_token_embeddings(pad_to_multiple_of=64)
    assert [len(table) for table in tables(model)] == [64] * 3 and model.config.vocab_size == 64
    new_rows = tables(model)[1][53:]
    assert torch.equal(tables(model)[1][:53], old)
    assert (new_rows.mean(0) - old.mean(0)).abs().max() < 0.05
    assert_ties(model, shape)


def test_base_and_encoder_models_resize_too(build_model, shape):
    base = build_model(DiptychModel, **SHAPES[shape])
    base.resize_token_embeddings(60)
    assert base.encoder.embed_tokens.num_embeddings == base.decoder.embed_tokens.num_embeddings == 60
    assert base.config.vocab_size == base.config.encoder.vocab_size == 60
    encoder = build_model(DiptychEncoderModel, **SHAPES[shape])
    encoder.resize_token_embeddings(60)
    assert encoder.encoder.embed_tokens.num_embeddings == encoder.config.vocab_size == 60


def test_frozen_tables_stay_frozen_when_resized(model):
    model.requires_grad_(False)
    model.resize_token_embeddings(60)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_panels_and_tables_are_found_and_replaced_by_the_librarys_names(build_model):
    model = build_model(tie_word_embeddings=True)
    assert model.get_encoder() is model.model.encoder and model.get_decoder() is model.model.decoder
    assert model.model.get_encoder() is model.model.encoder and model.base_model is model.model
    assert model.get_input_embeddings() is model.model.encoder.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    table, head = nn.Embedding(53, 32), nn.Linear(32, 53, bias=False)
    model.set_input_embeddings(table)
    model.set_output_embeddings(head)
    assert model.get_input_embeddings() is table and model.get_output_embeddings() is head
    model.tie_weights()
    assert_ties(model, "tied")
    assert model.lm_head.weight is table.weight
    encoder = build_model(DiptychEncoderModel)
    encoder.set_input_embeddings(table)
    assert encoder.get_input_embeddings() is encoder.encoder.embed_tokens is table


def test_a_copy_is_another_model(model, shape, batch):
    copied = copy.deepcopy(model)
    assert_ties(copied, shape)
    with torch.no_grad():
        copied.get_encoder().layers[0].mlp.up_proj.weight.zero_()
    assert not torch.equal(copied(**batch).logits, model(**batch).logits)
