"""Diptych's own decoding writes what transformers' `generate` writes, token by token."""

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from diptych.finetune.inference.fast_decode import (
    PACKED_AFTER,
    PACKED_FROM,
    ROOM,
    DecoderStep,
    OneNumberPerRow,
    can_decode_fast,
    drawn,
    fast_decode,
    look_up,
    read_fast,
)
from diptych.finetune.inference.generation import generate_batch
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.modeling import DiptychConfig, DiptychForConditionalGeneration

PAD, END, START = 0, 1, 2
SHAPE = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "encoder": {"num_hidden_layers": 3},
    "decoder": {"num_hidden_layers": 3},
    "initializer_range": 0.5,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "eos_token_id": END,
    "decoder_start_token_id": START,
}
CONFIGS = {
    "separate": {},
    "merged": {"cross_attention": "merged"},
    "normed heads, biases": {"qk_norm": True, "attention_bias": True, "mlp_bias": True},
    "merged, normed heads": {"cross_attention": "merged", "qk_norm": True},
    "one key head, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "all heads have keys": {"num_key_value_heads": 4},
    "unequal panels": {"encoder": {"num_hidden_layers": 4, "hidden_size": 48}, "decoder": {"num_hidden_layers": 2}},
    "layers without positions": {"layers_without_rope": [1]},
    "merged, layers without positions": {"cross_attention": "merged", "layers_without_rope": [0]},
    "norms around": {
        "norm_placement": "around",
        "norm_offset": 1.0,
        "embedding_multiplier": 3.0,
        "logits_softcap": 9.0,
    },
    "joint norms after": {"norm_placement": "after", "qk_norm": True, "joint_qk_norm": True},
    "merged, joint norms after": {
        "cross_attention": "merged",
        "norm_placement": "after",
        "qk_norm": True,
        "joint_qk_norm": True,
    },
    "windows": {"attention_window": 4, "decoder": {"num_hidden_layers": 3, "windowed_layers": [0, 2]}},
    "merged, windows with positions of their own": {
        "cross_attention": "merged",
        "attention_window": 4,
        "window_rope_theta": 10.0,
        "decoder": {"num_hidden_layers": 3, "windowed_layers": [0, 2]},
    },
    "multipliers": {"attention_multiplier": 0.4, "residual_multiplier": 0.5, "logits_divisor": 2.0},
    "a part of each head turns": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    },
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}},
}


def make(changes: dict, seed: int = 5) -> DiptychForConditionalGeneration:
    torch.manual_seed(seed)
    return DiptychForConditionalGeneration(DiptychConfig(**(SHAPE | changes))).eval()


@pytest.fixture(scope="module", params=CONFIGS)
def model(request) -> DiptychForConditionalGeneration:
    return make(CONFIGS[request.param])


def sources(rows: int = 5, padding: str = "right") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 53, (rows, 11), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        if padding == "right":
            ids[row, 11 - row :], mask[row, 11 - row :] = PAD, 0
        elif padding == "left":
            ids[row, :row], mask[row, :row] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def both(model, inputs, seed: int = 0, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": 20} | settings
    found = []
    for more in ({}, {"custom_generate": fast_decode}):
        torch.manual_seed(seed)
        found.append(model.generate(**inputs, **settings, **more))
    return tuple(found)


# One of each way to keep keys and to count positions. What else a layer has meets one token or several elsewhere.
OF_EACH_CACHE = pytest.mark.parametrize(
    "model",
    [
        *("separate", "merged", "one key head, tied", "merged, layers without positions", "windows"),
        *("merged, windows with positions of their own", "yarn"),
    ],
    indirect=True,
)


@pytest.mark.parametrize("padding", ["right", "left", "none"])
def test_greedy_tokens_are_the_same(model, padding):
    theirs, ours = both(model, sources(max(PACKED_FROM.values()) + 1, padding))
    assert torch.equal(theirs, ours)
    assert len({tuple(row) for row in ours.tolist()}) > 1


@OF_EACH_CACHE
def test_one_row_and_outputs_longer_than_the_first_room(model):
    theirs, ours = both(model, sources(1), max_new_tokens=2 * ROOM + 30, min_new_tokens=2 * ROOM + 20)
    assert torch.equal(theirs, ours) and ours.shape[1] > 2 * ROOM


def test_rows_end_at_different_steps(model):
    """With ten tokens that end a row, most rows end early and leave the batch."""
    ends = list(range(1, 53, 5))
    theirs, ours = both(model, sources(8), eos_token_id=ends, max_new_tokens=40)
    assert torch.equal(theirs, ours)
    lengths = {int((row[1:] != PAD).sum()) for row in ours}
    assert len(lengths) > 1


@pytest.mark.parametrize("padding", ["right", "left"])
def test_decoder_prompts_with_and_without_padding(model, padding):
    prompts = torch.tensor([[START, 7, 8], [PAD, START, 9], [START, 4, 5]])
    mask = (prompts != PAD).long()
    inputs = sources(3, padding) | {"decoder_input_ids": prompts, "decoder_attention_mask": mask}
    theirs, ours = both(model, inputs)
    assert torch.equal(theirs, ours) and torch.equal(ours[:, :3], prompts)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 5},
        {"bad_words_ids": [[9], [10, 11]], "suppress_tokens": [20, 21]},
        {"forced_bos_token_id": 12, "forced_eos_token_id": END},
        {"do_sample": True, "temperature": 1.5},
        {"do_sample": True, "top_k": 5, "top_p": 0.8},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "top_k": 0, "max_new_tokens": 40},
    ],
)
def test_rules_and_samples_are_theirs(settings):
    """Samples where transformers' loop draws in the same way: also while finished rows leave the batch."""
    for changes in (CONFIGS["separate"], CONFIGS["merged"]):
        with OneNumberPerRow():
            theirs, ours = both(make(changes), sources(4), seed=3, **settings)
        assert torch.equal(theirs, ours)


def test_tokens_are_drawn_by_their_probabilities():
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    for number, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.5, 3), (1 - 2**-24, 3)):
        assert drawn(probabilities, torch.tensor([number])).tolist() == [token]
    rows = torch.rand(2000, 50).softmax(-1)  # whose sums are not all 1, by rounding
    assert drawn(rows, torch.full((2000,), 1 - 2**-24)).unique().tolist() == [49]
    assert len(rows.cumsum(-1)[:, -1].unique()) > 1
    with OneNumberPerRow(), pytest.raises(RuntimeError, match="nan"):
        torch.multinomial(torch.tensor([[0.5, torch.nan]]), num_samples=1)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with OneNumberPerRow():
        tokens = torch.multinomial(probabilities.expand(8000, -1), num_samples=1)
    torch.set_rng_state(state)
    assert torch.equal(tokens[:, 0], drawn(probabilities.expand(8000, -1), torch.rand(8000)))
    counts = tokens.flatten().bincount(minlength=5) / 8000
    torch.testing.assert_close(counts[[1, 3]], torch.tensor([0.25, 0.75]), atol=0.02, rtol=0)


def test_logits_are_the_models_own(model):
    """Through a processor that writes down what it is given."""

    class Notes(LogitsProcessor):
        def __init__(self):
            self.scores = []

        def __call__(self, input_ids, scores):
            self.scores.append(scores.clone())
            return scores

    notes = [Notes(), Notes()]
    inputs = sources(4)
    settings = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    model.generate(**inputs, **settings, logits_processor=[notes[0]])
    model.generate(**inputs, **settings, logits_processor=[notes[1]], custom_generate=fast_decode)
    theirs, ours = (torch.stack(note.scores) for note in notes)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_bfloat16_stays_close():
    for changes in (CONFIGS["separate"], CONFIGS["merged"]):
        theirs, ours = both(make(changes).to(torch.bfloat16), sources(4))
        assert (theirs[:, : ours.shape[1]] == ours[:, : theirs.shape[1]]).float().mean() > 0.5


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 4), (torch.float32, 3), (torch.bfloat16, 1)])
def test_packed_matrices_are_the_same_ones(model, dtype, rows, monkeypatch):
    """Logits of a step that multiplies the weights themselves, and of one that multiplies packed copies."""
    model = copy.deepcopy(model).to(dtype)
    steps = []
    keep = DecoderStep.__init__
    monkeypatch.setattr(DecoderStep, "__init__", lambda self, *given: (keep(self, *given), steps.append(self))[0])
    settings = {"do_sample": False, "min_new_tokens": PACKED_AFTER + 4, "max_new_tokens": PACKED_AFTER + 4}
    model.generate(**sources(rows), **settings, custom_generate=fast_decode)
    (step,) = steps
    plain = [layer for layer in (*model.get_decoder().modules(), model.lm_head) if type(layer) is torch.nn.Linear]
    can = torch.backends.mkldnn.is_available()
    can = can and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    assert list(step.packed) == (plain if can and rows >= PACKED_FROM[dtype] else [])
    with torch.no_grad():
        packed = step(torch.full((rows, 1), 9))
        step.packed.clear()
        step.forget(1)
        tolerance = 1e-4 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(packed, step(torch.full((rows, 1), 9)), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("padding", ["right", "left", "none"])
def test_rows_that_are_read_a_few_at_a_time_are_read_the_same(model, padding, monkeypatch):
    monkeypatch.setattr("diptych.finetune.inference.fast_decode.READ_AT_ONCE", 25)  # two rows of eleven tokens
    inputs = sources(5, padding)
    reads = []
    model.get_encoder().register_forward_hook(lambda module, given, output: reads.append(output))
    ours, theirs = read_fast(model, **inputs), model.get_encoder()(**inputs)
    assert theirs.last_hidden_state.requires_grad and not ours.last_hidden_state.requires_grad
    assert [len(it.last_hidden_state) for it in reads] == [2, 2, 1, 5]
    assert type(ours) is type(theirs) and list(ours) == list(theirs)
    there = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours.last_hidden_state[there], theirs.last_hidden_state[there], rtol=1e-4, atol=1e-5)
    settings = {"do_sample": False, "max_new_tokens": 20}
    expected = model.generate(**inputs, **settings)
    written = model.generate(**inputs, encoder_outputs=ours, **settings, custom_generate=fast_decode)
    assert torch.equal(written, expected)


def test_criteria_and_streamers_are_heeded(model):
    class AtThree(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.arange(len(input_ids)) < (2 if input_ids.shape[1] >= 4 else 0)

    theirs, ours = both(model, sources(4), stopping_criteria=[AtThree()])
    assert torch.equal(theirs, ours)

    class Notes(BaseStreamer):
        def __init__(self):
            self.put_in, self.has_ended = [], False

        def put(self, value):
            self.put_in.append(value.tolist())

        def end(self):
            self.has_ended = True

    told = [Notes(), Notes()]
    settings = {"do_sample": False, "max_new_tokens": 15}
    model.generate(**sources(3), **settings, streamer=told[0])
    model.generate(**sources(3), **settings, custom_generate=fast_decode, writes_to=told[1])
    assert told[0].put_in == told[1].put_in and told[1].has_ended


def test_what_it_cannot_do_is_left_to_generate():
    model = make({})
    config = GenerationConfig(eos_token_id=END, pad_token_id=PAD, max_new_tokens=4, do_sample=False, num_beams=1)
    assert can_decode_fast(model, config, {}) and can_decode_fast(model, config, {"streamer": None})
    for name, value in {"num_beams": 2, "use_cache": False, "eos_token_id": None}.items():
        other = copy.deepcopy(config)
        setattr(other, name, value)
        assert not can_decode_fast(model, other, {}), name
    assert not can_decode_fast(model, config, {"assistant_model": model})
    assert not can_decode_fast(copy.deepcopy(model).train(), config, {})
    dynamic = make({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}})
    assert not can_decode_fast(dynamic, config, {})
    assert not can_decode_fast(make({"attention_softcap": 5.0}), config, {})
    add_hook_to_module(model.get_decoder().layers[0], ModelHook())  # as accelerate does for what it offloads
    assert not can_decode_fast(model, config, {})


@OF_EACH_CACHE
def test_tokens_that_are_looked_up_change_nothing(model):
    """Guesses are mostly wrong here, and have to be taken back."""
    for tokens, rules in {
        5: {"repetition_penalty": 1.3},
        9: {"max_matching_ngram_size": 1, "eos_token_id": [END, 9, 33]},
        ROOM - 10: {"max_matching_ngram_size": 1},  # room is made for guesses that are then taken back
    }.items():
        settings = {"do_sample": False, "max_new_tokens": ROOM + 30} | rules
        expected = model.generate(**sources(1), **settings)
        ours = model.generate(**sources(1), **settings, prompt_lookup_num_tokens=tokens, custom_generate=fast_decode)
        assert torch.equal(ours, expected)


def test_a_prompt_and_its_padding_are_kept_when_tokens_are_looked_up(model):
    prompt = {"decoder_input_ids": torch.tensor([[PAD, START, 9, 8, 9]])}
    inputs = sources(1) | prompt | {"decoder_attention_mask": (prompt["decoder_input_ids"] != PAD).long()}
    settings = {"do_sample": False, "max_new_tokens": 30}
    expected = model.generate(**inputs, **settings)
    ours = model.generate(**inputs, **settings, prompt_lookup_num_tokens=4, custom_generate=fast_decode)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("guessed", [4, 3 * ROOM])
def test_tokens_of_the_source_are_looked_up_and_save_steps(guessed):
    """A rule wants the source again: each step but the first few finds what it guessed right, and one token more."""
    model, source = make({}), torch.arange(3, 53).repeat(5)[None]

    class Again(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.index_fill(1, source[0, input_ids.shape[1] - 1], 1e4)

    calls = []
    model.get_decoder().norm.register_forward_hook(lambda *_: calls.append(1))
    settings = {"do_sample": False, "max_new_tokens": 250, "logits_processor": [Again()]}
    ours = model.generate(source, **settings, prompt_lookup_num_tokens=guessed, custom_generate=fast_decode)
    assert torch.equal(ours[0, 1:], source[0])
    assert len(calls) <= 8 + 250 // (guessed + 1)


def test_several_rows_are_refused_when_tokens_are_looked_up():
    settings = {"do_sample": False, "max_new_tokens": 4, "prompt_lookup_num_tokens": 4}
    with pytest.raises(ValueError, match="one row at a time, but there are 3"):
        make({}).generate(**sources(3), **settings, custom_generate=fast_decode)


def test_what_followed_is_looked_up_as_in_the_docstring():
    assert look_up([5, 6, 7, 8, 5, 6], 2, longest=2) == [7, 8]
    assert look_up([5, 6, 7, 9, 6], 3, longest=2) == [7, 9, 6], "by one token where there are no two"
    assert look_up([5, 6, 7], 3, longest=2) == [] and look_up([5, 6, 5, 6], 0, longest=2) == []
    assert look_up([1, 5, 2, 5, 3, 5], 1, longest=1) == [3], "where it stood last"


def test_generate_takes_it_for_a_diptych(tiny_tokenizer, monkeypatch):
    model = make({"vocab_size": len(tiny_tokenizer)})
    rows = [[40, 41, 42, 1], [50, 1]]
    calls = []
    whole = model.generate

    def noted(*arguments, **settings):
        calls.append(settings.get("custom_generate"))
        return whole(*arguments, **settings)

    model.generate = noted
    ours = generate_batch(LoadedModel.of(model, tiny_tokenizer), rows, 12, {"do_sample": False, "num_beams": 1})
    monkeypatch.setattr("diptych.finetune.inference.generation.can_decode_fast", lambda *given: False)
    theirs = generate_batch(LoadedModel.of(model, tiny_tokenizer), rows, 12, {"do_sample": False, "num_beams": 1})
    assert ours == theirs and calls == [fast_decode, None]


def test_samples_of_other_models_are_drawn_in_the_same_way(new_model, tiny_tokenizer):
    model = new_model("t5")
    settings = {"do_sample": True, "top_k": 0, "min_new_tokens": 12, "max_new_tokens": 12}
    torch.manual_seed(0)
    [found] = generate_batch(LoadedModel.of(model, tiny_tokenizer), [[40, 41, 42, 1]], 12, settings)
    torch.manual_seed(0)
    with OneNumberPerRow():
        theirs = model.eval().generate(torch.tensor([[40, 41, 42, 1]]), **settings)
    torch.manual_seed(0)
    others = model.generate(torch.tensor([[40, 41, 42, 1]]), **settings)
    assert theirs[0, 1:].tolist() == list(found.ids) != others[0, 1:].tolist()
