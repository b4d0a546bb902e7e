"""`generate` in every mode, and that no way of computing it changes what is written."""

import copy
import functools

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from diptych.modeling import DiptychForConditionalGeneration
from diptych.modeling.modeling_diptych import CACHE_NAME, check_cached_decoding

NEW_TOKENS = 10
GREEDY = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}


@pytest.fixture(scope="module")
def model(build_model):
    return build_model()


@pytest.fixture(scope="module")
def source(draw_tokens):
    mask = torch.ones(4, 7, dtype=torch.long)
    mask[1, 4:], mask[2, :2] = 0, 0
    return {"input_ids": draw_tokens(4, 7), "attention_mask": mask}


@pytest.fixture(scope="module")
def greedy(model, source):
    tokens = model.generate(**source, **GREEDY)
    assert tokens.shape == (4, 1 + NEW_TOKENS) and (tokens[:, 0] == 2).all(), "begins with the start token"
    assert all(len(row.unique()) > 5 for row in tokens), "outputs that hardly vary prove nothing"
    assert len({tuple(row.tolist()) for row in tokens}) == 4
    return tokens


PANELS = {
    "equal": {},
    "deep encoder": {"encoder": {"num_hidden_layers": 4}, "decoder": {"num_hidden_layers": 1}},
    "deep decoder": {"encoder": {"num_hidden_layers": 1}, "decoder": {"num_hidden_layers": 4}},
    "unequal width": {"encoder": {"hidden_size": 48, "num_hidden_layers": 1}, "decoder": {"num_hidden_layers": 2}},
}
MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.6, "early_stopping": True},
    "sampling": {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 1.3, "num_return_sequences": 2},
    "beam sampling": {"do_sample": True, "num_beams": 2},
    "penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "bad_words_ids": [[7]]},
}


@pytest.mark.parametrize("panels", PANELS)
@pytest.mark.parametrize("mode", MODES)
def test_cached_generation_matches_uncached(mode, panels, build_model, source):
    model = build_model(**PANELS[panels])
    settings = GREEDY | MODES[mode]
    torch.manual_seed(5)
    cached = model.generate(**source, **settings)
    torch.manual_seed(5)
    assert torch.equal(cached, model.generate(**source, use_cache=False, **settings))
    assert len(cached) == 4 * settings.get("num_return_sequences", 1)


def test_cached_logits_match_uncached_at_each_step(model, source, greedy):
    outputs = model.generate(
        **source, **GREEDY, return_dict_in_generate=True, output_logits=True, output_hidden_states=True
    )
    assert torch.equal(outputs.sequences, greedy)
    expected = model(**source, decoder_input_ids=greedy[:, :-1], use_cache=False).logits
    torch.testing.assert_close(torch.stack(outputs.logits, dim=1), expected, rtol=1e-4, atol=1e-4)
    assert len(outputs.encoder_hidden_states) == 3 and len(outputs.decoder_hidden_states) == NEW_TOKENS
    assert getattr(outputs, CACHE_NAME).get_seq_length() == NEW_TOKENS


@pytest.mark.parametrize("mode", ["greedy", "beams"])
@pytest.mark.parametrize("panels", PANELS)
def test_a_static_cache_writes_what_a_dynamic_one_writes(panels, mode, build_model, source):
    model, settings = build_model(**PANELS[panels]), GREEDY | MODES[mode]
    static = model.generate(**source, **settings, cache_implementation="static")
    assert torch.equal(static, model.generate(**source, **settings))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_writes_what_each_row_writes_alone(side, implementation, build_model, draw_tokens):
    model = build_model(attn_implementation=implementation)
    rows = [draw_tokens(length, seed=length) for length in (3, 5, 8)]
    input_ids, mask = torch.full((3, 8), 44), torch.zeros(3, 8, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(8 - len(row), 8)
        input_ids[i, place], mask[i, place] = row, 1
    together = model.generate(input_ids=input_ids, attention_mask=mask, **GREEDY)
    for row, tokens in zip(rows, together, strict=True):
        assert torch.equal(model.generate(input_ids=row[None], **GREEDY)[0], tokens)


def test_left_padded_decoder_prompts_go_on_as_alone(model, source, draw_tokens):
    start = torch.tensor([2])
    prompts = [torch.cat([start, draw_tokens(length, seed=length)]) for length in (1, 3, 2, 4)]
    padded, mask = torch.full((4, 5), 44), torch.zeros(4, 5, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        padded[i, -len(prompt) :], mask[i, -len(prompt) :] = prompt, 1
    together = model.generate(**source, decoder_input_ids=padded, decoder_attention_mask=mask, **GREEDY)
    for i, prompt in enumerate(prompts):
        row = {name: values[i : i + 1] for name, values in source.items()}
        alone = model.generate(**row, decoder_input_ids=prompt[None], **GREEDY)
        assert torch.equal(together[i, -NEW_TOKENS:], alone[0, -NEW_TOKENS:])


def test_generation_stops_at_the_end_token_and_pads_the_rest(model, source, greedy):
    ends = copy.deepcopy(model.generation_config)
    ends.eos_token_id = [int(greedy[0, 4])]
    tokens = model.generate(**source, generation_config=ends, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(tokens[0, :5], greedy[0, :5]) and tokens[0, 5:].eq(0).all()


def test_more_beams_find_likelier_sequences(model, source):
    def score(beams):
        settings = GREEDY | {"num_beams": beams, "length_penalty": 0.0}
        tokens = model.generate(**source, **settings)
        log_probs = model(**source, decoder_input_ids=tokens[:, :-1]).logits.log_softmax(-1)
        log_probs[..., 1] = -torch.inf  # the end token was forbidden, and the others' odds against it do not matter
        return log_probs.log_softmax(-1).gather(2, tokens[:, 1:, None]).sum()

    assert score(4) > score(1)


class Collecting(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_tokens_are_streamed_as_they_are_written(model, source, greedy):
    streamer, row = Collecting(), {name: values[:1] for name, values in source.items()}
    model.generate(**row, **GREEDY, streamer=streamer)
    assert streamer.tokens == greedy[0].tolist() and streamer.ended


@pytest.mark.parametrize("assistant", ["the same", "another", "shallower"])
def test_assisted_generation_writes_the_same(assistant, model, build_model, source, greedy):
    helpers = {
        "the same": lambda: model,
        "another": lambda: build_model(seed=1),
        "shallower": lambda: build_model(encoder={"num_hidden_layers": 1}, decoder={"num_hidden_layers": 1}),
    }
    row = {name: values[:1] for name, values in source.items()}
    tokens = model.generate(**row, **GREEDY, assistant_model=helpers[assistant]())
    assert torch.equal(tokens, greedy[:1])


def test_prompt_lookup_writes_the_same(model, greedy, source):
    row = {name: values[:1] for name, values in source.items()}
    assert torch.equal(model.generate(**row, **GREEDY, prompt_lookup_num_tokens=3), greedy[:1])


def test_encoder_outputs_and_embeddings_can_be_given(model, source, greedy):
    encoded = model.get_encoder()(**source)
    mask = {"attention_mask": source["attention_mask"]}
    assert torch.equal(model.generate(encoder_outputs=encoded, **mask, **GREEDY), greedy)
    embeds = model.get_input_embeddings()(source["input_ids"])
    assert torch.equal(model.generate(inputs_embeds=embeds, **mask, **GREEDY), greedy)


def test_generation_goes_on_from_a_prompt_and_from_a_returned_cache(model, source, greedy):
    prompt = {"decoder_input_ids": greedy[:, :5]}
    rest = GREEDY | {"max_new_tokens": 6, "min_new_tokens": 6}
    assert torch.equal(model.generate(**source, **prompt, **rest), greedy)
    first = GREEDY | {"max_new_tokens": 4, "min_new_tokens": 4, "return_dict_in_generate": True}
    outputs = model.generate(**source, **first)
    assert getattr(outputs, CACHE_NAME).get_seq_length() == 4
    so_far = {"decoder_input_ids": outputs.sequences, CACHE_NAME: getattr(outputs, CACHE_NAME)}
    mask = torch.ones_like(outputs.sequences)  # says that the prompt holds what is cached, too
    continued = model.generate(**source, **so_far, decoder_attention_mask=mask, **rest)
    assert torch.equal(continued, greedy)


def test_generation_settings_come_from_the_config_and_travel(build_model, tmp_path):
    model = build_model(eos_token_id=[1, 5])
    settings = model.generation_config
    assert (settings.pad_token_id, settings.eos_token_id, settings.decoder_start_token_id) == (0, [1, 5], 2)
    settings.num_beams = 3
    model.save_pretrained(tmp_path)
    loaded = DiptychForConditionalGeneration.from_pretrained(tmp_path).generation_config
    assert isinstance(loaded, GenerationConfig) and (loaded.num_beams, loaded.decoder_start_token_id) == (3, 2)


def test_a_cache_that_is_lost_on_the_way_is_noticed(model, source, monkeypatch):
    """A library that renames what it hands over: each step sees its own token alone, as if it were the first."""
    check_cached_decoding.cache_clear()
    forward = DiptychForConditionalGeneration.forward

    def loses_the_cache(self, *, cache=None, past_key_values=None, **inputs):
        return forward(self, **inputs)

    monkeypatch.setattr(DiptychForConditionalGeneration, "forward", functools.wraps(forward)(loses_the_cache))
    with pytest.raises(RuntimeError, match="use_cache=False"):
        model.generate(**source, **GREEDY)
    model.generate(**source, **GREEDY, use_cache=False)


def test_the_check_of_the_cache_is_silent_and_leaves_the_random_state(model, capfd, recwarn):
    check_cached_decoding.cache_clear()
    state = torch.get_rng_state()
    check_cached_decoding(model.config.decoder.cross_attention)
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "") and not recwarn.list
