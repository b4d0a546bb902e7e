"""A packed row is its examples, each as if alone, in every family: loss and every gradient, on real text.

Each family stands in for its relatives (t5 for Flan-T5, m2m_100 for NLLB). flex_attention has no backward on the CPU
(torch 2.13 refuses it), so there its loss alone is compared, uncompiled.
"""

import numpy as np
import pytest
import torch
from small_families import PACKED

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.packing.packed_row import Budget, assemble_row
from diptych.finetune.batches.packed_rows import pack_examples, packed_batch
from diptych.finetune.batches.padded_rows import pad_batch
from diptych.finetune.model.adapters import add_adapter
from diptych.finetune.model.families import FAMILIES, decoder_start_token, family_of
from diptych.finetune.model.loss import Seq2SeqObjective
from diptych.finetune.model.packed_attention import VARLEN, boundaries, register_varlen
from diptych.finetune.training.training_batches import set_attention

CASES = [
    (family, attention)
    for family in PACKED
    for attention in FAMILIES[family].attentions
    if attention != "flex_attention"
]


@pytest.fixture(scope="module", autouse=True)
def _varlen():
    register_varlen()


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_packed_is_separate(model, rows, share_sources=False, tolerance=1e-5):
    objective = Seq2SeqObjective(model).train()
    start, count = decoder_start_token(model), sum(len(row["labels"]) for row in rows)
    alone = sum(objective(pad_batch([row], 0, start), count) for row in rows)
    alone.backward()
    expected = gradients(model)
    together = objective(pack_examples(rows, 0, start, share_sources), count)
    together.backward()
    found = gradients(model)
    torch.testing.assert_close(together, alone, rtol=tolerance, atol=tolerance)
    assert found.keys() == expected.keys() and len(expected) > 10
    for name, gradient in expected.items():  # relative to large ones, where fp32 itself is coarser
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(
            found[name] / scale, gradient / scale, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def moderate(new_model, family: str, attention: str):
    """Weights with which fp32 is as fine as 1e-5. The heads of mT5 and UMT5 are not scaled, so that their gradients
    would be in the hundreds; the merged hinge has one softmax over both sides, which large weights make very sharp."""
    model = new_model(family, **({"initializer_factor": 0.5} if family in ("mt5", "umt5") else {}))
    if family == "diptych_merged":
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.mul_(0.7)
    model.set_attn_implementation(attention)
    return model


def fastest(family: str) -> str:
    return VARLEN if VARLEN in FAMILIES[family].attentions else "eager"


@pytest.mark.parametrize("family, attention", CASES)
def test_packed_rows_match_separate_rows_in_loss_and_every_gradient(family, attention, new_model, eight_prepared_rows):
    model = moderate(new_model, family, attention)
    assert_packed_is_separate(model, eight_prepared_rows)


@pytest.mark.parametrize("family", PACKED)
def test_what_is_left_between_them_is_rounding(family, new_model, eight_prepared_rows):
    """In float64 a difference of 1e-10 is one of arithmetic. (The T5Gemmas' norms compute in float32 all the same.)"""
    model = new_model(family).double()
    model.set_attn_implementation(fastest(family))
    assert_packed_is_separate(model, eight_prepared_rows, tolerance=1e-6 if "t5gemma" in family else 1e-10)


GEMMA = {"norm_placement": "around", "norm_offset": 1.0, "embedding_multiplier": 3.0, "qk_norm": True}
GEMMA |= {"attention_window": 3, "attention_softcap": 5.0, "logits_softcap": 4.0}
GEMMA |= {panel: {"windowed_layers": [0]} for panel in ("encoder", "decoder")}
GRANITE = {"attention_multiplier": 0.1, "residual_multiplier": 0.5, "logits_divisor": 3.0}
OLMO = {"norm_placement": "after", "qk_norm": True, "joint_qk_norm": True}


@pytest.mark.parametrize("family", ["diptych", "diptych_merged"])
@pytest.mark.parametrize(
    "blocks, attentions",
    [
        (GEMMA, {"eager"}),
        (GEMMA | {"attention_softcap": None}, {"eager", "sdpa"}),
        (GRANITE, {"eager", "sdpa", VARLEN}),
        (OLMO, {"eager", "sdpa", VARLEN}),
    ],
    ids=["gemma", "gemma without caps", "granite", "olmo"],
)
def test_a_diptych_with_blocks_of_other_llms_trains_on_packed_rows(
    family, blocks, attentions, new_model, eight_prepared_rows
):
    model = new_model(family, **blocks)
    usable = set(family_of(model).attentions) - {"flex_attention"}
    assert usable == attentions - ({VARLEN} if family == "diptych_merged" else set())
    for attention in sorted(usable):
        model.set_attn_implementation(attention)
        # (OLMo's gradients differ by 1.1e-5 on AMD's Zen 5, and by 1e-14 in float64.)
        assert_packed_is_separate(model, eight_prepared_rows, tolerance=2e-5)
    batch = pad_batch(eight_prepared_rows, 0, decoder_start_token(model))
    expected = model.eval()(**batch, num_items_in_batch=1).loss
    torch.testing.assert_close(Seq2SeqObjective(model).eval()(batch, 1), expected)


@pytest.mark.parametrize("is_packed", [True, False])
def test_attention_that_cannot_cap_scores_is_refused_for_a_model_that_does(is_packed, new_model):
    model = new_model("diptych", attention_softcap=5.0)
    with pytest.raises(UserError, match="attention is sdpa, which cannot compute .* choose from: eager"):
        set_attention(model, "sdpa", "fp32", torch.device("cpu"), is_packed)
    set_attention(model, "auto", "fp32", torch.device("cpu"), is_packed)
    assert model.config._attn_implementation == "eager"


def rows_that_share(rows: list[dict]) -> list[dict]:
    """Five targets of two sources, in turns."""
    return [
        rows[source] | {"labels": rows[target]["labels"]}
        for source, target in [(0, 0), (3, 1), (0, 2), (0, 3), (3, 4)]
    ]


@pytest.mark.parametrize("family, attention", CASES)
def test_targets_that_share_a_source_match_rows_of_their_own(family, attention, new_model, eight_prepared_rows):
    model = moderate(new_model, family, attention)
    rows = rows_that_share(eight_prepared_rows)
    packed = pack_examples(rows, 0, 0, share_sources=True)
    assert packed["input_ids"].shape[1] == len(rows[0]["input_ids"]) + len(rows[1]["input_ids"])
    assert_packed_is_separate(model, rows, share_sources=True)


@pytest.mark.parametrize("family", ["diptych", "diptych_merged", "t5", "bart", "m2m_100", "t5gemma"])
def test_packed_rows_match_separate_rows_through_an_adapter(family, new_model, eight_prepared_rows, in_fp64):
    """In fp64, because the adapter's random weights make gradients for which fp32 is not as fine on every CPU."""
    torch.manual_seed(0)
    model = in_fp64(add_adapter(new_model(family), "base", rank=4, alpha=8))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    assert_packed_is_separate(model, eight_prepared_rows, tolerance=1e-10)


@pytest.mark.parametrize("family", [name for name in PACKED if "flex_attention" in FAMILIES[name].attentions])
def test_flex_attention_keeps_examples_apart(family, new_model, eight_prepared_rows):
    model = new_model(family).eval()
    model.set_attn_implementation("flex_attention")
    objective, start = Seq2SeqObjective(model), decoder_start_token(model)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        together = objective(pack_examples(eight_prepared_rows, 0, start), 1)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        alone = sum(objective(pad_batch([row], 0, start), 1) for row in eight_prepared_rows)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", PACKED)
def test_rows_with_padding_in_batches_lose_what_their_examples_lose(family, new_model, eight_prepared_rows):
    """Two rows of one shape, cut differently, with padding on either side, as the prepared folder has them."""
    model = new_model(family).eval()
    model.set_attn_implementation(fastest(family))
    objective, start = Seq2SeqObjective(model), decoder_start_token(model)
    budget = Budget(80, 70)
    rows = [assemble_row(part, budget, 0, start) for part in (eight_prepared_rows[:3], eight_prepared_rows[3:6])]
    batch = packed_batch({name: np.stack([row[name] for row in rows]) for name in rows[0]})
    alone = sum(objective(pad_batch([row], 0, start), 1) for row in eight_prepared_rows[:6])
    torch.testing.assert_close(objective(batch, 1), alone, rtol=1e-5, atol=1e-5)
    losses = objective.token_losses(batch)
    assert losses.shape == batch["labels"].shape and (losses[batch["labels"] == -100] == 0).all()
    torch.testing.assert_close(losses.sum(), alone, rtol=1e-5, atol=1e-5)


def test_boundaries_are_those_of_the_file_head():
    source = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 0]])
    target = torch.tensor([[1, 1, 1, 2, 2, 0]])
    assert boundaries(target, source).tolist() == [[[[0, 3, 5, 6], [0, 4, 7, 8]]]]


def test_boundaries_go_on_from_row_to_row_and_a_row_with_fewer_segments_has_empty_ones():
    source = torch.tensor([[1, 1, 2, 3, 0], [1, 1, 1, 0, 0]])
    target = torch.tensor([[1, 2, 2, 3], [1, 1, 1, 0]])
    queries, keys = boundaries(target, source)[0, 0].tolist()
    assert queries == [0, 1, 3, 4, 4, 7, 7, 7, 8]
    assert keys == [0, 2, 3, 4, 5, 8, 8, 8, 10]


def test_boundaries_of_the_cross_site_follow_shared_sources():
    """Three targets read segment 1, one reads segment 2."""
    cross = torch.tensor([[1, 1, 1, 1, 2, 0]])
    assert boundaries(cross, torch.tensor([[1, 1, 2]]))[0, 0].tolist() == [[0, 4, 5, 6], [0, 2, 3, 3]]


def test_padded_rows_are_masked_under_varlen_too(new_model, eight_prepared_rows):
    """transformers makes no mask at all for an attention that it does not know."""
    model = new_model("t5").eval()
    expected = Seq2SeqObjective(model)(pad_batch(eight_prepared_rows, 0, 0), 1)
    model.set_attn_implementation(VARLEN)
    torch.testing.assert_close(Seq2SeqObjective(model)(pad_batch(eight_prepared_rows, 0, 0), 1), expected)


def test_hooks_on_position_tables_do_not_stay(new_model, eight_prepared_rows):
    model = new_model("bart")
    Seq2SeqObjective(model)(pack_examples(eight_prepared_rows, 0, 0), 1)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
