"""A packed row is its examples, each as if alone: loss, every gradient, and whatever else stands in the row.

The arrays are those of the module's docstring. flex_attention has no backward on the CPU (torch 2.13 refuses it), so
there its forward alone is compared; its kernel runs uncompiled, except where a test says compiled.
"""

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from diptych.modeling import DiptychEncoderModel
from diptych.modeling.modeling_diptych import CACHE_NAME, default_positions, same_segment

IMPLEMENTATIONS = ["eager", "sdpa", "flex_attention"]
PACKED = {
    "input_ids": [[12, 7, 9, 1, 5, 8, 1, 0]],
    "segment_ids": [[1, 1, 1, 1, 2, 2, 2, 0]],
    "position_ids": [[0, 1, 2, 3, 0, 1, 2, 0]],
    "labels": [[31, 40, 1, 22, 1, -100]],
    "decoder_input_ids": [[0, 31, 40, 0, 22, 0]],
    "decoder_segment_ids": [[1, 1, 1, 2, 2, 0]],
    "decoder_position_ids": [[0, 1, 2, 0, 1, 0]],
}
ALONE = [  # the same two examples, a call each; the start token is the padding token
    {"input_ids": [[12, 7, 9, 1]], "labels": [[31, 40, 1]]},
    {"input_ids": [[5, 8, 1]], "labels": [[22, 1]]},
]
TARGET_TOKENS = 5


def tensors(arrays: dict) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(values) for name, values in arrays.items()}


def two_rows() -> dict[str, torch.Tensor]:
    """Two packed rows of different cuts; each array's second row begins with padding or ends with more of it."""
    return tensors(
        {
            "input_ids": [[12, 7, 9, 1, 5, 8, 1, 0], [0, 5, 8, 1, 12, 7, 9, 1]],
            "segment_ids": [[1, 1, 1, 1, 2, 2, 2, 0], [0, 1, 1, 1, 2, 2, 2, 2]],
            "labels": [[31, 40, 1, 22, 1, -100], [22, 1, -100, 31, 40, 1]],
            "decoder_input_ids": [[0, 31, 40, 0, 22, 0], [0, 22, 0, 0, 31, 40]],
            "decoder_segment_ids": [[1, 1, 1, 2, 2, 0], [1, 1, 0, 2, 2, 2]],
        }
    )


@pytest.fixture
def build_packing_model(build_model):
    def build(implementation="sdpa", **fields):
        fields = {"decoder_start_token_id": 0, "initializer_range": 0.2} | fields
        return build_model(attn_implementation=implementation, **fields)

    return build


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_a_token_sees_its_own_example_and_padding_is_never_left_with_nothing_to_see():
    target, source = torch.tensor([[1, 1, 2, 0]]), torch.tensor([[1, 2, 2, 0, 0]])
    rule = same_segment(target, source)
    batch, head, query, key = torch.meshgrid(*map(torch.arange, (1, 1, 4, 5)), indexing="ij")
    assert rule(batch, head, query, key)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [1, 1, 1, 1, 1],
    ]


def test_positions_restart_in_each_segment():
    segments = torch.tensor([[1, 1, 1, 2, 2, 0], [0, 4, 4, 7, 0, 0]])
    assert default_positions(segments, segments).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 0, 0, 1]]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True, "qk_norm": True, "attention_bias": True}])
def test_packed_rows_match_separate_rows_in_loss_and_every_gradient(implementation, fields, build_packing_model):
    model = build_packing_model(implementation, **fields)
    packed_loss = model(**tensors(PACKED), num_items_in_batch=TARGET_TOKENS).loss
    packed_loss.backward()
    packed = gradients(model)
    model.zero_grad()
    alone_loss = sum(model(**tensors(example), num_items_in_batch=TARGET_TOKENS).loss for example in ALONE)
    alone_loss.backward()
    torch.testing.assert_close(packed_loss, alone_loss, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(model).items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(packed[name], gradient, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_logits_match_separate_logits_in_rows_of_different_cuts(
    implementation, build_packing_model, uncompiled_flex
):
    model = build_packing_model(implementation)
    with uncompiled_flex(implementation):
        packed = model(**two_rows()).logits
        first, second = (model(**tensors(example)).logits[0] for example in ALONE)
    for ours, alone in [(packed[0, :3], first), (packed[0, 3:5], second), (packed[1, :2], second)]:
        torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-5)
    # The second row pairs decoder segment 2 with the longer source; its targets are the first example's.
    torch.testing.assert_close(packed[1, 3:], first, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiled_flex_attention_matches_eager_on_packed_rows(build_packing_model):
    """One site, one layer: compiling the kernel takes ten seconds. Shapes are static, since the C++ that torch 2.13
    writes for dynamic ones does not compile (`cur_kvSplitSize2`). Rows have 16 tokens: with 8, 24 or 40 keys its
    kernel is wrong on a CPU with AVX2 alone, in torch itself, without a model (docs/reliability.md)."""
    rows = {name: torch.nn.functional.pad(two_rows()[name], (0, 8)) for name in ("input_ids", "segment_ids")}
    shape = {"model_class": DiptychEncoderModel, "encoder": {"num_hidden_layers": 1}}
    with torch.no_grad(), torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        flex = build_packing_model("flex_attention", **shape)(**rows).last_hidden_state
        eager = build_packing_model("eager", **shape)(**rows).last_hidden_state
    assert flex.isfinite().all()
    torch.testing.assert_close(flex[rows["segment_ids"] > 0], eager[rows["segment_ids"] > 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_positions_that_are_not_given_restart_in_each_segment(implementation, build_packing_model, uncompiled_flex):
    model = build_packing_model(implementation)
    given = tensors(PACKED)
    without = {name: value for name, value in given.items() if "position" not in name}
    wrong = given | {"decoder_position_ids": torch.arange(6)[None], "position_ids": torch.arange(8)[None] * 3}
    with uncompiled_flex(implementation):
        assert torch.equal(model(**without).logits, model(**given).logits)
        assert not torch.allclose(model(**wrong).logits, model(**given).logits, atol=1e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_changing_one_example_leaves_the_others_logits_as_they_were(
    implementation, build_packing_model, uncompiled_flex
):
    model = build_packing_model(implementation)
    before = two_rows()
    with uncompiled_flex(implementation):
        logits = model(**before).logits
        for side, segments in (("input_ids", "segment_ids"), ("decoder_input_ids", "decoder_segment_ids")):
            for changed_segment in (0, 1, 2):
                changed = dict(before)
                changed[side] = torch.where(before[segments] == changed_segment, 33, before[side])
                after = model(**changed).logits
                target_segments = before["decoder_segment_ids"]
                others = (target_segments != changed_segment) & (target_segments > 0)
                torch.testing.assert_close(after[others], logits[others], rtol=0, atol=1e-6)
                own = target_segments == changed_segment
                if changed_segment:
                    assert not torch.allclose(after[own], logits[own], atol=1e-3), "the change must be seen"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_rows_of_padding_give_finite_gradients(implementation, build_packing_model):
    model = build_packing_model(implementation)
    rows = two_rows()
    for name in rows:
        rows[name][1] = -100 if name == "labels" else 0
    outputs = model(**rows)
    outputs.loss.backward()
    assert outputs.logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.separate_hinge
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])  # flex_attention takes rules, not dense masks
def test_segments_equal_dense_masks_written_by_hand(implementation, build_packing_model):
    model = build_packing_model(implementation)
    rows = tensors(PACKED)
    source, target = rows.pop("segment_ids"), rows.pop("decoder_segment_ids")
    expected = model(**tensors(PACKED)).logits
    encoder_mask = (source[:, :, None] == source[:, None, :])[:, None]
    cross_mask = ((target[:, :, None] == source[:, None, :]) | (target == 0)[:, :, None])[:, None]
    decoder_mask = ((target[:, :, None] == target[:, None, :]) & torch.ones(6, 6, dtype=torch.bool).tril())[:, None]
    if implementation == "eager":  # which adds its mask
        lowest = torch.finfo(torch.float32).min
        encoder_mask, cross_mask, decoder_mask = (
            torch.where(mask, 0.0, lowest) for mask in (encoder_mask, cross_mask, decoder_mask)
        )
    encoded = model.get_encoder()(rows["input_ids"], encoder_mask, rows["position_ids"]).last_hidden_state
    outputs = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
        attention_mask=cross_mask,
        decoder_attention_mask=decoder_mask,
        decoder_input_ids=rows["decoder_input_ids"],
        decoder_position_ids=rows["decoder_position_ids"],
    )
    torch.testing.assert_close(outputs.logits[target > 0], expected[target > 0], rtol=1e-5, atol=1e-5)


def test_segments_and_a_padding_mask_hold_together(build_packing_model):
    model = build_packing_model()
    rows = two_rows()
    masked = rows | {"attention_mask": rows["segment_ids"].clone()}
    masked["attention_mask"][0, 1] = 0  # hides one token of the first example
    masked["attention_mask"] = masked["attention_mask"].clamp(max=1)
    changed = {**masked, "input_ids": masked["input_ids"].clone()}
    changed["input_ids"][0, 1] = 44
    torch.testing.assert_close(model(**changed).logits, model(**masked).logits, rtol=0, atol=1e-6)
    assert not torch.allclose(model(**masked).logits[0, :3], model(**rows).logits[0, :3], atol=1e-3)
    torch.testing.assert_close(model(**masked).logits[0, 3:5], model(**rows).logits[0, 3:5], rtol=0, atol=1e-6)


def test_an_encoder_alone_packs_too(build_packing_model):
    encoder = build_packing_model(model_class=DiptychEncoderModel)
    rows = two_rows()
    states = encoder(input_ids=rows["input_ids"], segment_ids=rows["segment_ids"]).last_hidden_state
    for row, start, end in [(0, 0, 4), (0, 4, 7), (1, 1, 4), (1, 4, 8)]:
        alone = encoder(input_ids=rows["input_ids"][row : row + 1, start:end]).last_hidden_state[0]
        torch.testing.assert_close(states[row, start:end], alone, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_honoured_is_refused(build_packing_model):
    model = build_packing_model()
    rows = tensors(PACKED)

    def without(*names):
        return {name: value for name, value in rows.items() if name not in names}

    with pytest.raises(ValueError, match="both sides"):
        model(**without("segment_ids"))
    with pytest.raises(ValueError, match="both sides"):
        model(**without("decoder_segment_ids"))
    with pytest.raises(ValueError, match="begin anew in each segment"):
        model(**without("decoder_input_ids"))
    with pytest.raises(ValueError, match=r"segment_ids has shape \(1, 5\), but there are \(1, 8\) tokens"):
        model(**rows | {"segment_ids": rows["segment_ids"][:, :5]})
    with pytest.raises(ValueError, match="cross_segment_ids say which segment a segment reads"):
        model(**without("segment_ids", "decoder_segment_ids"), cross_segment_ids=rows["decoder_segment_ids"])
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with pytest.raises(ValueError, match="cannot grow token by token"):
        model(**rows, cache=cache)
    model.get_encoder().config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2': use 'sdpa', 'flex_attention' or 'eager'"):
        model(**rows)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_targets_that_share_a_source_match_rows_of_their_own(implementation, build_packing_model, uncompiled_flex):
    """The second target reads the first one's source, which stands there once."""
    model = build_packing_model(implementation)
    shared = tensors(
        {
            "input_ids": [[12, 7, 9, 1, 5, 8, 1]],
            "segment_ids": [[1, 1, 1, 1, 2, 2, 2]],
            "decoder_input_ids": [[0, 31, 40, 0, 22, 0, 17]],
            "decoder_segment_ids": [[1, 1, 1, 2, 2, 3, 3]],
            "cross_segment_ids": [[1, 1, 1, 1, 1, 2, 2]],
        }
    )
    first, second = ALONE[0]["input_ids"], ALONE[1]["input_ids"]
    alone = [(first, [[0, 31, 40]]), (first, [[0, 22]]), (second, [[0, 17]])]
    with uncompiled_flex(implementation):
        logits = model(**shared).logits[0]
        expected = [model(**tensors({"input_ids": s, "decoder_input_ids": t})).logits[0] for s, t in alone]
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_packed_rows_keep_no_cache(build_packing_model):
    assert getattr(build_packing_model()(**tensors(PACKED)), CACHE_NAME) is None
