"""The switches that other LLMs than Llama need: each keeps what every Diptych promises, with both hinges.

B rows, S source tokens, T target tokens. That they compute what the LLMs compute is in finetune/test_pair.py.
"""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from diptych.modeling import DiptychConfig, DiptychForConditionalGeneration
from diptych.modeling.modeling_diptych import CACHE_NAME

B, S, T = 3, 9, 8
WINDOWS = {
    "attention_window": 3,
    "encoder": {"num_hidden_layers": 2, "windowed_layers": [0]},
    "decoder": {"num_hidden_layers": 3, "windowed_layers": [0, 2]},
}
BLOCKS = {
    "windows": WINDOWS,
    "windows with positions of their own": WINDOWS | {"window_rope_theta": 10.0},
    "norms around, offset": {"norm_placement": "around", "norm_offset": 1.0, "embedding_multiplier": 5.5},
    "norms after, joint": {"norm_placement": "after", "qk_norm": True, "joint_qk_norm": True},
    "capped scores and logits": {"attention_softcap": 2.0, "logits_softcap": 3.0},
    "multipliers": {"attention_multiplier": 0.4, "residual_multiplier": 0.3, "logits_divisor": 4.0},
    "a part of each head turns": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    },
    "all of Gemma": WINDOWS
    | {"norm_placement": "around", "norm_offset": 1.0, "qk_norm": True, "attention_softcap": 2.0}
    | {"logits_softcap": 3.0, "embedding_multiplier": 5.5, "attention_multiplier": 0.2},
}


@pytest.fixture(params=BLOCKS)
def block(request):
    return BLOCKS[request.param]


@pytest.fixture
def model(build_model, block):
    model = build_model(**block)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(-0.3, 0.7)
    return model


@pytest.fixture
def batch(draw_tokens):
    return {"input_ids": draw_tokens(B, S), "decoder_input_ids": draw_tokens(B, T, seed=1)}


@torch.no_grad()
def test_each_block_changes_what_is_computed(model, block, batch, build_model):
    plain = build_model()
    plain.load_state_dict(model.state_dict(), strict=False)
    assert not torch.allclose(plain(**batch).logits, model(**batch).logits, atol=1e-2)


def test_weights_of_a_plain_layer_stand_in_the_order_that_saved_optimizer_states_have(build_model, hinge):
    names = [name.split(".")[0] for name, _ in build_model().get_decoder().layers[0].named_parameters()]
    expected = ["self_attn", "cross_attn", "mlp", "input_layernorm", "cross_attention_layernorm"]
    expected = [name for name in expected if hinge == "separate" or "cross" not in name]
    assert list(dict.fromkeys(names)) == [*expected, "post_attention_layernorm"]


@torch.no_grad()
def test_saved_and_loaded_is_the_same(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = DiptychForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@torch.no_grad()
def test_more_tokens_leave_the_tables_as_they_were(model, batch):
    before = model(**batch).logits
    model.resize_token_embeddings(60)
    torch.testing.assert_close(model(**batch).logits[..., :53], before)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_other_kernels_compute_what_eager_attention_computes(
    implementation, build_model, block, batch, uncompiled_flex
):
    if implementation == "sdpa" and "attention_softcap" in block:
        assert build_model(**block).config._attn_implementation == "eager", "what transformers falls back to"
        with pytest.raises(ValueError, match="does not support"):
            build_model(**block).set_attn_implementation("sdpa")
        return
    eager, other = (build_model(**block, attn_implementation=kind) for kind in ("eager", implementation))
    batch["attention_mask"] = torch.ones(B, S, dtype=torch.long)
    batch["attention_mask"][1, 6:] = 0
    expected = eager(**batch).logits
    with uncompiled_flex(implementation):
        torch.testing.assert_close(other(**batch).logits, expected, rtol=1e-4, atol=1e-4)


def test_packed_rows_compute_what_each_example_computes_alone(model, draw_tokens):
    lengths = ((6, 5), (4, 7))  # of source and target
    sources, targets = (
        [draw_tokens(1, pair[side], seed=place + 4 * side) for place, pair in enumerate(lengths)] for side in (0, 1)
    )
    segments = [torch.tensor([[1] * lengths[0][side] + [2] * lengths[1][side] + [0]]) for side in (0, 1)]
    packed = model(
        input_ids=torch.cat((*sources, draw_tokens(1, 1)), 1),
        decoder_input_ids=torch.cat((*targets, draw_tokens(1, 1)), 1),
        segment_ids=segments[0],
        decoder_segment_ids=segments[1],
    ).logits
    for number, (source, target) in enumerate(zip(sources, targets, strict=True), start=1):
        alone = model(input_ids=source, decoder_input_ids=target).logits
        torch.testing.assert_close(packed[segments[1] == number], alone[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_stands_in_padding_never_matters(side, model, batch, draw_tokens):
    """Of the source; and left of the target, where prompts of unequal length have it."""
    expected = model(**batch).logits
    padding = draw_tokens(B, 5, seed=7)
    rows = (padding, batch["input_ids"]) if side == "left" else (batch["input_ids"], padding)
    masks = (torch.zeros_like(padding), torch.ones_like(batch["input_ids"]))
    mask = torch.cat(masks if side == "left" else masks[::-1], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = {"input_ids": torch.cat(rows, 1), "attention_mask": mask, "position_ids": positions}
    found = model(**padded, decoder_input_ids=batch["decoder_input_ids"]).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    target_mask = torch.cat((torch.zeros_like(padding), torch.ones_like(batch["decoder_input_ids"])), 1)
    found = model(
        **padded,
        decoder_input_ids=torch.cat((padding, batch["decoder_input_ids"]), 1),
        decoder_attention_mask=target_mask,
        decoder_position_ids=(target_mask.cumsum(1) - 1).clamp(min=0),
    ).logits
    torch.testing.assert_close(found[:, 5:], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_with_a_cache_writes_what_it_writes_without(cache, model, batch):
    source = batch["input_ids"]
    mask = torch.ones_like(source)
    mask[1, :4] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": True}
    torch.manual_seed(0)
    written = model.generate(source, **settings, cache_implementation=cache, disable_compile=True)
    torch.manual_seed(0)
    assert torch.equal(written, model.generate(source, **settings, use_cache=False))
    assert all(len(row.unique()) > 3 for row in written), "outputs that hardly vary prove nothing"


@torch.no_grad()
def test_logits_token_by_token_are_those_of_the_whole_text(model, batch):
    whole = model(**batch).logits
    outputs, found = None, []
    encoder_outputs = model.get_encoder()(batch["input_ids"])
    for token in batch["decoder_input_ids"].split([3, 1, 4], dim=1):
        cache = None if outputs is None else outputs[CACHE_NAME]
        outputs = model(encoder_outputs=encoder_outputs, decoder_input_ids=token, cache=cache, use_cache=True)
        found.append(outputs.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-4)


def test_every_weight_gets_a_gradient_with_and_without_checkpointing(model, batch):
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(**batch, labels=batch["decoder_input_ids"]).loss.backward()
        assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def seen_by(model, token: int, side: str, draw_tokens) -> tuple[list[int], list[int]]:
    """Which source and target tokens the states of a token depend on, after one windowed layer."""
    embeds = [model.get_encoder().embed_tokens(draw_tokens(1, length, seed=length)).detach() for length in (S, T)]
    source, target = (each.requires_grad_() for each in embeds)
    if side == "source":
        model.get_encoder()(inputs_embeds=source).last_hidden_state[0, token].sum().backward()
    else:
        model.model(inputs_embeds=source, decoder_inputs_embeds=target).last_hidden_state[0, token].sum().backward()
    grads = [torch.zeros(1, 1, 1) if each.grad is None else each.grad for each in (source, target)]
    return tuple(grad.abs().sum(-1)[0].gt(0).nonzero().flatten().tolist() for grad in grads)


def test_a_window_is_as_wide_as_it_says(hinge, build_model, draw_tokens):
    one = {"num_hidden_layers": 1, "windowed_layers": [0]}
    model = build_model(attention_window=3, encoder=one, decoder=one, encoder_layer_map=None)
    assert seen_by(model, 4, "source", draw_tokens) == ([2, 3, 4, 5, 6], [])
    causal = build_model(attention_window=3, encoder=one | {"lookahead": 0}, decoder=one, encoder_layer_map=None)
    assert seen_by(causal, 4, "source", draw_tokens) == ([2, 3, 4], [])
    source, target = seen_by(model, 5, "target", draw_tokens)
    assert target == [3, 4, 5]
    assert source == (list(range(S)) if hinge == "separate" else [])
    source, target = seen_by(model, 0, "target", draw_tokens)
    # Merged, source and target are one text; its last two source tokens have seen two more each.
    assert (source, target) == (list(range(S)) if hinge == "separate" else [5, 6, 7, 8], [0])


def test_finished_masks_are_refused_where_a_window_would_be_lost(build_model, batch):
    model = build_model(**WINDOWS)
    with pytest.raises(ValueError, match="give masks of padding"):
        model(**batch, attention_mask=torch.zeros(B, 1, S, S))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm_placement": "inside"}, "norm_placement is 'inside'"),
        ({"joint_qk_norm": True}, "joint_qk_norm says how qk_norm"),
        ({"encoder": {"windowed_layers": [0]}}, "attention_window is None"),
        ({"attention_window": 4, "encoder": {"windowed_layers": [6]}}, r"windowed_layers has \[6\]"),
        ({"logits_divisor": 0.0}, "logits_divisor is 0.0"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.3}},
            "turn 19 num",
        ),
    ],
)
def test_settings_that_cannot_be_computed_say_why(fields, message):
    with pytest.raises(StrictDataclassError, match=f"(?s){message}"):
        DiptychConfig(**fields)
