"""What `forward` computes, held against other people's models and plain arithmetic, and what it hands back.

B rows, S source tokens, T target tokens, D width, V vocabulary; the small models have 2 encoder and 3 decoder layers.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)
from transformers.modeling_outputs import BaseModelOutput

from diptych.modeling import DiptychEncoderModel, DiptychForConditionalGeneration, DiptychModel
from diptych.modeling.modeling_diptych import CACHE_NAME

B, S, T, D, V = 3, 7, 5, 32, 53
ENCODER_LAYERS, DECODER_LAYERS, HEADS = 2, 3, 4


@pytest.fixture(scope="module")
def model(build_model):
    return build_model()


@pytest.fixture(scope="module")
def batch(draw_tokens):
    return {"input_ids": draw_tokens(B, S), "decoder_input_ids": draw_tokens(B, T, seed=1)}


DONORS = {
    "llama": (LlamaModel, LlamaConfig, {"head_dim": 16}, {}),
    "llama with biases": (
        LlamaModel,
        LlamaConfig,
        {"head_dim": 16, "attention_bias": True, "mlp_bias": True},
        {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
    ),
    "mistral": (MistralModel, MistralConfig, {"head_dim": 16, "sliding_window": None}, {}),
    "qwen2": (Qwen2Model, Qwen2Config, {"num_attention_heads": 2, "num_key_value_heads": 1}, {"attention_bias": True}),
    "qwen3": (Qwen3Model, Qwen3Config, {"head_dim": 16}, {"qk_norm": True}),
}


LLAMA_POSITIONS = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 4},
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0, 1.1] * 4,
        "long_factor": [2.0, 3.0] * 4,
        "original_max_position_embeddings": 4,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 4,
    },
}
DONORS |= {
    f"llama, {rope_type} positions": (
        LlamaModel,
        LlamaConfig,
        {"head_dim": 16, "rope_parameters": {"rope_type": rope_type, "rope_theta": 100.0} | settings},
        {},
    )
    for rope_type, settings in LLAMA_POSITIONS.items()
}


@pytest.mark.separate_hinge
@pytest.mark.parametrize("donor", DONORS)
def test_an_encoder_with_a_donors_weights_by_name_computes_what_the_donor_computes(donor, build_model, draw_tokens):
    donor_class, donor_config_class, donor_fields, our_fields = DONORS[donor]
    torch.manual_seed(0)
    shared = {
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.4,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 8,
    } | {name: value for name, value in donor_fields.items() if name not in ("attention_bias", "mlp_bias")}
    theirs = donor_class(
        donor_config_class(**(shared | donor_fields), num_hidden_layers=2, pad_token_id=None, bos_token_id=None)
    ).eval()
    nn.init.normal_(theirs.layers[1].input_layernorm.weight)  # ones would hide a norm that is not used
    for name, weight in theirs.named_parameters():
        if name.endswith(("bias", "q_norm.weight", "k_norm.weight")):
            nn.init.normal_(weight)
    shared.pop("sliding_window", None)
    shared.setdefault("head_dim", 16)
    ours = build_model(DiptychEncoderModel, **shared, **our_fields).encoder
    ours.load_state_dict(theirs.state_dict(), strict=True)
    tokens = draw_tokens(2, 9)
    everything_visible = torch.zeros(2, 1, 9, 9)
    with torch.no_grad():
        expected = theirs(input_ids=tokens, attention_mask=everything_visible).last_hidden_state
        torch.testing.assert_close(ours(input_ids=tokens).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.separate_hinge
def test_cross_attention_is_softmax_of_queries_and_encoder_states(model, draw_tokens):
    attention = model.model.decoder.layers[1].cross_attn
    targets, sources = torch.randn(B, T, D), torch.randn(B, S, D)
    query = F.linear(targets, attention.q_proj.weight).view(B, T, HEADS, 16)
    key, value = (F.linear(sources, p.weight).view(B, S, 2, 16) for p in (attention.k_proj, attention.v_proj))
    heads = []
    for head in range(HEADS):  # two query heads share one key/value head
        weights = torch.softmax(query[:, :, head] @ key[:, :, head // 2].mT / 16**0.5, dim=-1)
        heads.append(weights @ value[:, :, head // 2])
    expected = F.linear(torch.cat(heads, dim=-1), attention.o_proj.weight)
    torch.testing.assert_close(attention(targets, sources, None)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.separate_hinge
def test_decoder_layer_adds_three_prenormed_sublayers(build_model):
    model = build_model()
    layer, decoder = model.model.decoder.layers[0], model.model.decoder
    for norm in (layer.input_layernorm, layer.cross_attention_layernorm, layer.post_attention_layernorm):
        nn.init.normal_(norm.weight)  # ones would hide a norm in another one's place
    targets, sources = torch.randn(B, T, D), torch.randn(B, S, D)
    positions = decoder.rotary_emb(targets, torch.arange(T)[None])
    expected = targets + layer.self_attn(layer.input_layernorm(targets), positions, None)[0]
    expected = expected + layer.cross_attn(layer.cross_attention_layernorm(expected), sources, None)[0]
    mlp, normed = layer.mlp, layer.post_attention_layernorm(expected)
    expected = expected + mlp.down_proj(F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))
    torch.testing.assert_close(layer(targets, sources, positions, None, None, None), expected)


def test_the_source_is_read_both_ways_and_the_target_only_backwards(model, batch):
    changed = {name: ids.clone() for name, ids in batch.items()}
    changed["decoder_input_ids"][:, 3] = 3
    before, after = model(**batch).logits, model(**changed).logits
    assert torch.equal(before[:, :3], after[:, :3]) and not torch.allclose(before[:, 3:], after[:, 3:])
    changed["input_ids"][:, -1] = 3
    encoder = model.get_encoder()
    first = [encoder(input_ids=ids).last_hidden_state[:, 0] for ids in (batch["input_ids"], changed["input_ids"])]
    assert not torch.allclose(*first)


def test_logits_are_the_head_on_the_last_hidden_state(model, batch):
    states = model.model(**batch).last_hidden_state
    assert states.shape == (B, T, D)
    torch.testing.assert_close(model(**batch).logits, model.lm_head(states))


def test_nothing_unasked_is_returned(model, batch, hinge):
    assert set(model(**batch).keys()) == {"logits", CACHE_NAME, "encoder_last_hidden_state"}
    assert set(model(**batch, use_cache=False).keys()) == {"logits", "encoder_last_hidden_state"}
    handed_over = {"layer_inputs", "position_ids"} if hinge == "merged" else set()
    assert set(model.get_encoder()(input_ids=batch["input_ids"]).keys()) == {"last_hidden_state"} | handed_over


def assert_hidden_states(states, layers, length, last):
    assert [tuple(state.shape) for state in states] == [(B, length, D)] * (layers + 1)
    assert torch.equal(states[-1], last), "the last hidden state is the normed one"
    assert not torch.equal(states[-2], last)


def assert_attentions(attentions, layers, queries, keys):
    assert [tuple(weights.shape) for weights in attentions] == [(B, HEADS, queries, keys)] * layers
    for weights in attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(B, HEADS, queries))


@pytest.mark.parametrize("asked", ["by argument", "by config"])
def test_hidden_states_and_attentions_of_both_panels_when_asked(asked, build_model, batch, hinge):
    switches = {"output_hidden_states": True, "output_attentions": True}
    model = build_model(**(switches if asked == "by config" else {}))
    model.set_attn_implementation("eager")
    for module in (model, model.model):
        outputs = module(**batch, **(switches if asked == "by argument" else {}))
        last = model.model(**batch).last_hidden_state
        assert_hidden_states(outputs.decoder_hidden_states, DECODER_LAYERS, T, last)
        assert_hidden_states(outputs.encoder_hidden_states, ENCODER_LAYERS, S, outputs.encoder_last_hidden_state)
        assert_attentions(outputs.encoder_attentions, ENCODER_LAYERS, S, S)
        if hinge == "merged":  # one softmax over both
            both = zip(outputs.cross_attentions, outputs.decoder_attentions, strict=True)
            assert_attentions([torch.cat(pair, dim=-1) for pair in both], DECODER_LAYERS, T, S + T)
            assert all(weights.sum() > 0 for weights in outputs.cross_attentions)
        else:
            assert_attentions(outputs.decoder_attentions, DECODER_LAYERS, T, T)
            assert_attentions(outputs.cross_attentions, DECODER_LAYERS, T, S)
        assert all(weights.triu(1).eq(0).all() for weights in outputs.decoder_attentions), "the decoder is causal"
        assert not any(weights.triu(1).eq(0).all() for weights in outputs.encoder_attentions)


def test_a_panels_config_asks_for_that_panel_only(build_model, batch):
    encoder_only = build_model(encoder={"num_hidden_layers": 2, "output_hidden_states": True})(**batch)
    assert len(encoder_only.encoder_hidden_states) == ENCODER_LAYERS + 1
    assert encoder_only.decoder_hidden_states is None
    decoder_only = build_model(
        decoder={"num_hidden_layers": 3, "output_attentions": True}, attn_implementation="eager"
    )
    outputs = decoder_only(**batch)
    assert len(outputs.decoder_attentions) == len(outputs.cross_attentions) == DECODER_LAYERS
    assert outputs.encoder_attentions is None and outputs.encoder_hidden_states is None


def test_an_argument_overrules_the_config(build_model, batch):
    model = build_model(output_hidden_states=True)
    assert model(**batch, output_hidden_states=False).decoder_hidden_states is None
    encoder = build_model(DiptychEncoderModel, output_hidden_states=True)
    assert len(encoder(input_ids=batch["input_ids"]).hidden_states) == ENCODER_LAYERS + 1


@pytest.mark.separate_hinge
def test_inner_states_and_attention_weights_can_be_differentiated(build_model, batch):
    model = build_model(attn_implementation="eager")
    outputs = model(**batch, output_hidden_states=True, output_attentions=True)
    inner = [outputs.encoder_hidden_states[0], outputs.decoder_hidden_states[0], outputs.cross_attentions[0]]
    for tensor in inner:
        tensor.retain_grad()
    outputs.logits.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in inner)


def test_a_panels_own_return_dict_does_not_disturb_the_whole(build_model, batch):
    tuples = {"encoder": {"num_hidden_layers": 2, "return_dict": False}, "decoder": {"return_dict": False}}
    model = build_model(num_hidden_layers=3, **tuples)
    assert isinstance(model.get_encoder()(input_ids=batch["input_ids"]), tuple)
    assert torch.equal(model(**batch).logits, build_model()(**batch).logits)


@pytest.mark.parametrize("model_class", [DiptychForConditionalGeneration, DiptychModel, DiptychEncoderModel])
@pytest.mark.parametrize("asked", ["by argument", "by config"])
def test_return_dict_false_gives_the_same_as_a_tuple(asked, model_class, build_model, batch):
    config, argument = ({"return_dict": False}, {}) if asked == "by config" else ({}, {"return_dict": False})
    inputs = batch | {"labels": batch["decoder_input_ids"]}
    if model_class is not DiptychForConditionalGeneration:
        inputs.pop("labels")
    if model_class is DiptychEncoderModel:
        inputs.pop("decoder_input_ids")
    as_tuple = build_model(model_class, **config)(**inputs, **argument)
    named = build_model(model_class)(**inputs)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == len(named.to_tuple())
    for ours, theirs in zip(as_tuple, named.to_tuple(), strict=True):
        if isinstance(ours, torch.Tensor):
            assert torch.equal(ours, theirs)


def test_logits_keep_the_models_dtype(build_model, batch):
    model = build_model().to(torch.bfloat16)
    outputs = model(**batch, output_hidden_states=True, labels=batch["decoder_input_ids"])
    assert outputs.logits.dtype is torch.bfloat16
    assert {state.dtype for state in outputs.decoder_hidden_states} == {torch.bfloat16}
    assert outputs.loss.isfinite()
    full = build_model()(**batch).logits
    assert F.cosine_similarity(outputs.logits.float(), full, dim=-1).min() > 0.95


def test_logits_to_keep_gives_these_positions_only(model, batch):
    full = model(**batch).logits
    torch.testing.assert_close(model(**batch, logits_to_keep=2).logits, full[:, -2:])
    torch.testing.assert_close(model(**batch, logits_to_keep=torch.tensor([0, 3])).logits, full[:, [0, 3]])


def test_embeddings_can_be_given_in_place_of_tokens(model, batch):
    given = {
        "inputs_embeds": model.get_encoder().embed_tokens(batch["input_ids"]),
        "decoder_inputs_embeds": model.get_decoder().embed_tokens(batch["decoder_input_ids"]),
    }
    assert torch.equal(model(**given).logits, model(**batch).logits)
    assert torch.equal(model(**given, labels=batch["decoder_input_ids"]).logits, model(**batch).logits)


def test_tokens_and_embeddings_together_or_neither_are_refused(model, batch):
    with pytest.raises(ValueError, match="DiptychDecoder takes token ids or embeddings, but neither"):
        model(input_ids=batch["input_ids"])
    with pytest.raises(ValueError, match="DiptychEncoder takes token ids or embeddings, but both"):
        model.get_encoder()(input_ids=batch["input_ids"], inputs_embeds=torch.zeros(B, S, D))
    with pytest.raises(ValueError, match="needs encoder_hidden_states"):
        model.get_decoder()(input_ids=batch["decoder_input_ids"])


@pytest.mark.separate_hinge
def test_encoder_outputs_are_used_again(model, batch):
    encoded = model.get_encoder()(input_ids=batch["input_ids"])
    expected = model(**batch)
    target = {"decoder_input_ids": batch["decoder_input_ids"]}
    for given in (encoded, encoded.to_tuple(), BaseModelOutput(last_hidden_state=encoded.last_hidden_state)):
        outputs = model(encoder_outputs=given, **target)
        assert torch.equal(outputs.logits, expected.logits)
        assert torch.equal(outputs.encoder_last_hidden_state, encoded.last_hidden_state)
    wrong = BaseModelOutput(last_hidden_state=encoded.last_hidden_state.flip(0))
    assert not torch.allclose(model(encoder_outputs=wrong, **target).logits, expected.logits)


@pytest.mark.separate_hinge
def test_panels_may_differ_in_width_and_depth(build_model, batch):
    model = build_model(encoder={"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 6})
    outputs = model(**batch, output_hidden_states=True)
    assert outputs.encoder_last_hidden_state.shape == (B, S, 48) and outputs.logits.shape == (B, T, V)
    assert (len(outputs.encoder_hidden_states), len(outputs.decoder_hidden_states)) == (2, 4)


def test_attention_can_be_switched_for_the_whole_and_for_a_panel(build_model, batch):
    model = build_model()
    expected = model(**batch).logits
    model.set_attn_implementation({"encoder": "eager", "decoder": "sdpa"})
    assert model.get_encoder().config._attn_implementation == "eager"
    assert model.get_decoder().config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    model.set_attn_implementation("eager")
    assert model.get_decoder().config._attn_implementation == "eager"
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.separate_hinge
def test_an_attention_of_ones_own_is_used_at_every_site_and_told_what_is_causal(build_model, batch):
    sites = []

    def attention(module, query, key, value, attention_mask, scaling, dropout, is_causal, **kwargs):
        sites.append((type(module).__name__, module.layer_idx, is_causal))
        output = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register("of_ones_own", attention)
    model = build_model(attn_implementation="of_ones_own")
    logits = model(**batch).logits
    encoder = [("DiptychSelfAttention", layer, False) for layer in range(ENCODER_LAYERS)]
    decoder = [
        site
        for layer in range(DECODER_LAYERS)
        for site in (("DiptychSelfAttention", layer, True), ("DiptychCrossAttention", layer, False))
    ]
    assert sites == encoder + decoder
    torch.testing.assert_close(logits, build_model()(**batch).logits, rtol=1e-5, atol=1e-5)


def test_dropouts_act_in_training_only(build_model, batch):
    dry = build_model()(**batch).logits
    for field in ("attention_dropout", "residual_dropout"):
        model = build_model(**{field: 0.5})
        assert torch.equal(model(**batch).logits, dry), field
        model.train()
        assert not torch.allclose(model(**batch).logits, dry), field


def test_residual_dropout_drops_the_embeddings_and_everything_that_is_added(build_model, batch):
    biases = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
    model = build_model(DiptychModel, residual_dropout=1.0, **biases).train()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)  # so that each part would add something even to nothing
    outputs = model(**batch)
    assert (outputs.encoder_last_hidden_state == 0).all() and (outputs.last_hidden_state == 0).all()
    assert not (model.eval()(**batch).last_hidden_state == 0).any()


def test_a_name_that_forward_does_not_know_is_an_error(build_model, batch):
    """Whatever a caller asks for is done or refused: an argument that is ignored goes wrong in silence."""
    model = build_model()
    encoder = DiptychEncoderModel(model.config)
    source = {"input_ids": batch["input_ids"]}
    with torch.no_grad():
        states = model.get_encoder()(**source).last_hidden_state
    decoder = {"input_ids": batch["decoder_input_ids"], "encoder_hidden_states": states}
    for module, inputs in (
        (model, batch),
        (model.model, batch),
        (encoder, source),
        (model.get_encoder(), source),
        (model.get_decoder(), decoder),
    ):
        with pytest.raises(TypeError, match="kv_cache"):
            module(**inputs, kv_cache=None)
