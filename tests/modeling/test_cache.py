"""The decoder's cache: what it holds, and that going on from it is the same as beginning anew.

B rows, S source tokens, T target tokens; 2 encoder and 3 decoder layers with 2 key/value heads of 16.
"""

import copy

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.modeling_outputs import BaseModelOutput

from diptych.modeling.modeling_diptych import CACHE_NAME

B, S, T = 3, 7, 6
UNEQUAL = {
    "equal": {},
    "deep encoder": {"encoder": {"num_hidden_layers": 4}, "decoder": {"num_hidden_layers": 1}},
    "deep decoder": {"encoder": {"num_hidden_layers": 1}, "decoder": {"num_hidden_layers": 4}},
    "wide encoder": {"encoder": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "head_dim": 8}},
    "wide decoder": {
        "encoder": {"hidden_size": 24, "num_key_value_heads": 4},
        "decoder": {"hidden_size": 40, "num_hidden_layers": 2},
    },
}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model(build_model):
    return build_model()


@pytest.fixture(scope="module")
def batch(draw_tokens):
    mask = torch.ones(B, S, dtype=torch.long)
    mask[1, 4:] = 0
    return {"input_ids": draw_tokens(B, S), "attention_mask": mask, "decoder_input_ids": draw_tokens(B, T, seed=1)}


def source_of(batch) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def logits_in_pieces(model, batch, pieces, cache=None) -> torch.Tensor:
    """Feeds the target in pieces of these lengths, each on top of the cache, without naming positions."""
    encoded = model.get_encoder()(**source_of(batch))
    collected, start = [], 0
    for length in pieces:
        outputs = model(
            encoder_outputs=encoded,
            attention_mask=batch["attention_mask"],
            decoder_input_ids=batch["decoder_input_ids"][:, start : start + length],
            cache=cache,
            use_cache=True,
        )
        cache, start = getattr(outputs, CACHE_NAME), start + length
        collected.append(outputs.logits)
    return torch.cat(collected, dim=1)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("pieces", [[1] * 6, [2, 1, 3], [6]])
@pytest.mark.parametrize("panels", UNEQUAL)
def test_logits_with_a_cache_match_logits_without(panels, pieces, implementation, build_model, batch):
    model = build_model(attn_implementation=implementation, **UNEQUAL[panels])
    expected = model(**batch, use_cache=False).logits
    torch.testing.assert_close(logits_in_pieces(model, batch, pieces), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("panels", UNEQUAL)
def test_cache_is_sized_by_the_decoder(panels, build_model, batch):
    model = build_model(**UNEQUAL[panels])
    cache = getattr(model(**batch), CACHE_NAME)
    decoder = model.config.decoder
    assert isinstance(cache, EncoderDecoderCache)
    for kind, length in ((cache.self_attention_cache, T), (cache.cross_attention_cache, S)):
        assert len(kind.layers) == decoder.num_hidden_layers
        shape = (B, decoder.num_key_value_heads, length, decoder.head_dim)
        assert {tuple(tensor.shape) for layer in kind.layers for tensor in (layer.keys, layer.values)} == {shape}


def test_a_static_cache_gives_the_same_logits(model, batch):
    config = model.config.decoder
    cache = EncoderDecoderCache(StaticCache(config, max_cache_len=10), StaticCache(config, max_cache_len=S))
    expected = model(**batch, use_cache=False).logits
    torch.testing.assert_close(logits_in_pieces(model, batch, [2, 1, 3], cache), expected, rtol=1e-4, atol=1e-4)


def test_no_cache_where_none_is_wanted(build_model, batch):
    model = build_model()
    assert getattr(model(**batch, use_cache=False), CACHE_NAME) is None
    assert getattr(build_model(use_cache=False)(**batch), CACHE_NAME) is None
    assert getattr(model.train()(**batch), CACHE_NAME) is None


@pytest.mark.separate_hinge
def test_cross_keys_are_written_once_and_the_source_is_not_read_again(model, batch):
    first = model(**batch)
    cache, probe = getattr(first, CACHE_NAME), {"decoder_input_ids": torch.full((B, 1), 9)}
    keys = [layer.keys for layer in cache.cross_attention_cache.layers]
    other_states = BaseModelOutput(last_hidden_state=torch.randn(B, S, 32))
    again = copy.deepcopy(cache)
    mask = {"attention_mask": batch["attention_mask"]}
    expected = model(**source_of(batch), **probe, cache=again).logits
    assert torch.equal(model(encoder_outputs=other_states, **mask, **probe, cache=cache).logits, expected)
    assert all(layer.keys is key for layer, key in zip(cache.cross_attention_cache.layers, keys, strict=True))
    assert cache.get_seq_length() == T + 1 and all(cache.is_updated.values())


def test_positions_not_given_begin_at_the_cached_length(model, batch):
    source, target = source_of(batch), batch["decoder_input_ids"]
    cache = getattr(model(**source, decoder_input_ids=target[:, :4]), CACHE_NAME)
    step = source | {"decoder_input_ids": target[:, 4:]}
    at = {
        start: model(
            **step, cache=copy.deepcopy(cache), decoder_position_ids=torch.arange(start, start + 2)[None]
        ).logits
        for start in (0, 4)
    }
    default = model(**step, cache=cache).logits
    assert torch.equal(default, at[4]) and not torch.allclose(default, at[0], atol=1e-3)


def test_left_padded_prompts_go_on_from_the_cache(model, batch, draw_tokens):
    prompt, mask = batch["decoder_input_ids"].clone(), torch.ones(B, T, dtype=torch.long)
    prompt[0, :2], mask[0, :2] = 0, 0
    first = model(**source_of(batch), decoder_input_ids=prompt[:, :5], decoder_attention_mask=mask[:, :5])
    cache = getattr(first, CACHE_NAME)
    cached = model(
        **source_of(batch), decoder_input_ids=prompt[:, 5:], decoder_attention_mask=mask, cache=cache
    ).logits
    alone = model(
        input_ids=batch["input_ids"][:1], decoder_input_ids=prompt[:1, 2:], attention_mask=batch["attention_mask"][:1]
    )
    torch.testing.assert_close(cached[0, -1], alone.logits[0, -1], rtol=1e-4, atol=1e-4)


def select(batch, rows) -> dict[str, torch.Tensor]:
    return {name: values[rows] for name, values in batch.items()}


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["reorder", "select", "repeat"],
)
def test_rows_of_a_cache_can_be_moved(change, rows, model, batch):
    cache = getattr(model(**{**batch, "decoder_input_ids": batch["decoder_input_ids"][:, :5]}), CACHE_NAME)
    change(cache)
    moved = select(batch, rows)
    expected = model(**moved, use_cache=False).logits[:, -1:]
    step = moved | {"decoder_input_ids": moved["decoder_input_ids"][:, 5:]}
    torch.testing.assert_close(model(**step, cache=cache).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_cropped_cache_forgets_the_last_tokens(model, batch):
    cache = getattr(model(**batch), CACHE_NAME)
    cache.crop(-2)
    assert cache.get_seq_length() == T - 2
    step = source_of(batch) | {"decoder_input_ids": batch["decoder_input_ids"][:, 4:5]}
    expected = model(**batch, use_cache=False).logits[:, 4:5]
    torch.testing.assert_close(model(**step, cache=cache).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_reset_cache_reads_the_new_source(model, batch, draw_tokens):
    config = model.config.decoder
    cache = EncoderDecoderCache(StaticCache(config, max_cache_len=T), StaticCache(config, max_cache_len=S))
    model(**batch, cache=cache)
    cache.reset()
    other = {"input_ids": draw_tokens(B, S, seed=8), "decoder_input_ids": batch["decoder_input_ids"]}
    expected = model(**other, use_cache=False).logits
    torch.testing.assert_close(model(**other, cache=cache).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_empty_dynamic_cache_can_be_given(model, batch):
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    outputs = model(**batch, cache=cache)
    assert getattr(outputs, CACHE_NAME) is cache and cache.get_seq_length() == T
    torch.testing.assert_close(outputs.logits, model(**batch, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_the_cache_has_two_names_of_which_one_is_given(model, batch):
    step = source_of(batch) | {"decoder_input_ids": torch.full((B, 1), 9)}
    cache = getattr(model(**batch), CACHE_NAME)
    by_new_name = model(**step, cache=copy.deepcopy(cache)).logits
    assert torch.equal(model(**step, past_key_values=copy.deepcopy(cache)).logits, by_new_name)
    assert not torch.equal(model(**step).logits, by_new_name), "else no cache was read"
    with pytest.raises(ValueError, match="two names of one argument"):
        model(**step, cache=cache, past_key_values=cache)


def test_a_cache_under_gradient_checkpointing_is_refused(build_model, batch):
    model = build_model().train()
    model.gradient_checkpointing_enable()
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with torch.enable_grad(), pytest.raises(ValueError, match="write the cache twice"):
        model(**batch, cache=cache)
