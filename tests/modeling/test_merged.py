"""The merged hinge: source and target as one text, in one softmax. What the other files hold for both hinges is not
repeated here.

B rows, S source tokens, T target tokens; 3 encoder and 4 decoder layers, so that decoder layer j reads what encoder
layer j reads, as one LLM of four layers in two panels.
"""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.modeling_outputs import BaseModelOutput

from diptych.modeling import DiptychConfig, DiptychEncoderModel, DiptychForConditionalGeneration
from diptych.modeling.configuration_diptych import default_layer_map
from diptych.modeling.modeling_diptych import CACHE_NAME

B, S, T = 3, 7, 5
SHAPE = {"vocab_size": 53, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 16}
SHAPE |= {"num_key_value_heads": 2, "initializer_range": 0.3, "tie_word_embeddings": False}
SHAPE |= {"cross_attention": "merged"}


def build(seed=0, depth=(3, 4), **fields) -> DiptychForConditionalGeneration:
    torch.manual_seed(seed)
    encoder = {"num_hidden_layers": depth[0]} | fields.pop("encoder", {})
    decoder = {"num_hidden_layers": depth[1]} | fields.pop("decoder", {})
    return DiptychForConditionalGeneration(DiptychConfig(**(SHAPE | fields), encoder=encoder, decoder=decoder)).eval()


@pytest.fixture
def batch(draw_tokens):
    return {"input_ids": draw_tokens(B, S), "decoder_input_ids": draw_tokens(B, T, seed=1)}


def one_text(model, source, target):
    """The decoder alone over source and target in one row, causal; its logits on the target. The encoder of `model`
    must have the decoder's own weights."""
    nothing = torch.zeros(B, 1, dtype=torch.long)  # a source of one token, which is padding
    states = model.get_decoder()(
        torch.cat((source, target), dim=1),
        encoder_hidden_states=torch.randn(B, 4, 1, 32),
        encoder_attention_mask=nothing,
        encoder_position_ids=nothing,
    ).last_hidden_state
    return model.lm_head(states[:, source.shape[1] :])


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_a_causal_encoder_with_the_decoders_weights_makes_one_text_of_two(implementation, batch, uncompiled_flex):
    model = build(encoder={"lookahead": 0}, attn_implementation=implementation)
    own = model.get_decoder().state_dict()
    model.get_encoder().load_state_dict({name: own[name] for name in model.get_encoder().state_dict()})
    with uncompiled_flex(implementation):
        found = model(**batch).logits
        torch.testing.assert_close(found, one_text(model, *batch.values()), rtol=1e-4, atol=1e-4)
        model.get_encoder().config.lookahead = None
        assert not torch.allclose(model(**batch).logits, found, atol=1e-2), "a bidirectional encoder reads otherwise"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("lookahead", [0, 1, 3, None])
def test_an_encoder_token_sees_just_so_many_ahead(lookahead, implementation, draw_tokens):
    encoder = build(encoder={"lookahead": lookahead}, attn_implementation=implementation, depth=(1, 2)).get_encoder()
    embeds = encoder.embed_tokens(draw_tokens(1, S)).detach().requires_grad_()
    seen = []
    for token in range(S):
        encoder(inputs_embeds=embeds).last_hidden_state[0, token].sum().backward()
        seen.append(embeds.grad.abs().sum(-1)[0].gt(0).nonzero().max().item())
        embeds.grad = None
    last = S - 1
    assert seen == [last if lookahead is None else min(token + lookahead, last) for token in range(S)]


def test_packed_rows_keep_to_their_own_lookahead(draw_tokens):
    """A token near the end of one example sees nothing of the next."""
    encoder = build(encoder={"lookahead": 2}).get_encoder()
    ids = draw_tokens(1, 8)
    packed = encoder(ids, segment_ids=torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2]])).last_hidden_state
    for part in (slice(0, 5), slice(5, 8)):
        torch.testing.assert_close(packed[:, part], encoder(ids[:, part]).last_hidden_state, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_target_follows_its_source_whatever_padding_stands_between(batch):
    """Positions, too: as if the padding were not there."""
    model, pad = build(), 44
    expected = model(**batch).logits
    for left, right in [(0, 4), (4, 0), (2, 3)]:
        source = torch.nn.functional.pad(batch["input_ids"], (left, right), value=pad)
        mask = torch.nn.functional.pad(torch.ones(B, S), (left, right))
        target = torch.nn.functional.pad(batch["decoder_input_ids"], (right, left), value=pad)
        target_mask = torch.nn.functional.pad(torch.ones(B, T), (right, left))
        found = model(source, mask, target, target_mask).logits[:, right : right + T]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_positions_that_are_given_count_from_the_targets_beginning(batch):
    model = build()
    given = model(**batch, decoder_position_ids=torch.arange(T)[None].expand(B, -1)).logits
    assert torch.equal(given, model(**batch).logits)
    shifted = model(**batch, decoder_position_ids=torch.arange(3, 3 + T)[None]).logits
    assert not torch.allclose(shifted, given, atol=1e-3)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_several_targets_share_one_source(implementation, draw_tokens):
    model = build(attn_implementation=implementation)
    source, targets = draw_tokens(1, 9), draw_tokens(1, 7, seed=3)
    rows = {
        "input_ids": source,
        "segment_ids": torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 2]]),
        "decoder_input_ids": targets,
        "decoder_segment_ids": torch.tensor([[1, 1, 2, 2, 2, 3, 3]]),
        "cross_segment_ids": torch.tensor([[2, 2, 1, 1, 1, 2, 2]]),
    }
    packed = model(**rows).logits
    packed.logsumexp(-1).sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    alone = [
        model(input_ids=source[:, read], decoder_input_ids=targets[:, written]).logits
        for read, written in ((slice(4, 9), slice(0, 2)), (slice(0, 4), slice(2, 5)), (slice(4, 9), slice(5, 7)))
    ]
    torch.cat(alone, dim=1).logsumexp(-1).sum().backward()
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-5)
    for name, weight in model.named_parameters():
        scale = max(1.0, weight.grad.abs().max().item())
        torch.testing.assert_close(gradients[name] / scale, weight.grad / scale, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_sources_keys_are_made_once_and_kept_once(batch):
    model = build()
    calls = []
    projection = model.get_decoder().layers[0].self_attn.k_proj
    projection.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0].shape[1]))
    first = model(**batch)
    cache = getattr(first, CACHE_NAME)
    keys = [layer.keys for layer in cache.cross_attention_cache.layers]
    encoded = model.get_encoder()(batch["input_ids"])
    encoded.layer_inputs = torch.full_like(encoded.layer_inputs, torch.nan)  # not read any more
    step = model(encoder_outputs=encoded, decoder_input_ids=torch.full((B, 1), 9), cache=cache)
    assert step.logits.isfinite().all() and sorted(calls) == [1, T, S]
    assert all(layer.keys is key for layer, key in zip(cache.cross_attention_cache.layers, keys, strict=True))
    assert [layer.keys.shape[2] for layer in cache.self_attention_cache.layers] == [T + 1] * 4


@torch.no_grad()
def test_an_encoder_alone_hands_nothing_over_and_is_the_wholes(batch, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    encoder = DiptychEncoderModel.from_pretrained(tmp_path).eval()
    assert not any("norm" == name.split(".")[-2] for name in encoder.state_dict() if "layers" not in name)
    found = encoder(batch["input_ids"])
    assert set(found.keys()) == {"last_hidden_state"}
    assert torch.equal(found.last_hidden_state, model.get_encoder()(batch["input_ids"]).last_hidden_state)


def test_layers_without_rope_know_no_order(draw_tokens):
    """Tokens in another order are the same set to such a layer; with rope they are not."""
    ids = draw_tokens(1, 6)
    for without, is_same in ([0], True), (None, False):
        encoder = build(depth=(1, 2), encoder={"layers_without_rope": without}).get_encoder()
        states, turned = (encoder(tokens).last_hidden_state for tokens in (ids, ids.flip(1)))
        assert torch.allclose(states.flip(1), turned, atol=1e-5) == is_same


def test_the_map_is_aligned_at_the_top_unless_it_is_given():
    assert default_layer_map(3, 4) == [0, 1, 2, 3] and default_layer_map(4, 4) == [1, 2, 3, 4]
    assert default_layer_map(6, 2) == [5, 6]
    config = DiptychConfig(**SHAPE, encoder={"num_hidden_layers": 2}, decoder={"num_hidden_layers": 3})
    assert config.encoder.encoder_layer_map == config.decoder.encoder_layer_map == [0, 1, 2]
    assert DiptychConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"encoder": {"hidden_size": 48}}, "hidden_size is 48 in the encoder and 32 in the decoder"),
        ({"num_hidden_layers": 4, "encoder_layer_map": [0, 1, 2]}, "one number from 0 to 4 .* the decoder's 4 layers"),
        ({"num_hidden_layers": 2, "encoder_layer_map": [0, 3]}, "one number from 0 to 2"),
        ({"num_hidden_layers": 3, "encoder_layer_map": [0, 1, 1]}, "encoder layers 1 to 2 write is never read"),
        ({"encoder": {"num_hidden_layers": 1}, "decoder": {"num_hidden_layers": 4}}, "say in encoder_layer_map"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' changes with the length"),
        ({"cross_attention": "both"}, "there are 'separate' and 'merged'"),
        ({"encoder": {"lookahead": -1}}, "0 is causal, None sees everything"),
        ({"encoder": {"layers_without_rope": [6]}}, "but layers are 0 to 5"),
    ],
)
def test_what_cannot_be_merged_is_refused_before_anything_is_made(fields, message):
    with pytest.raises((StrictDataclassError, ValueError), match=f"(?s){message}"):
        DiptychConfig(**(SHAPE | fields))


def test_what_cannot_be_honoured_is_refused(batch):
    model = build()
    encoded = model.get_encoder()(batch["input_ids"])
    target = {"decoder_input_ids": batch["decoder_input_ids"]}
    for given in (encoded.to_tuple(), BaseModelOutput(last_hidden_state=encoded.last_hidden_state)):
        with pytest.raises(ValueError, match="give encoder_outputs as the encoder returned them"):
            model(encoder_outputs=given, **target)
    with pytest.raises(ValueError, match=r"masks of padding, \(B, L\), not attention_mask \(3, 1, 5, 7\)"):
        model(encoder_outputs=encoded, attention_mask=torch.ones(B, 1, T, S), **target)
    model.get_decoder().config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="cross_attention='merged' needs attention that takes a mask"):
        model(encoder_outputs=encoded, **target)
