"""The loss of training against its slow twin: the model's own logits, all of them, and torch's cross-entropy."""

import pytest
import torch
import torch.nn.functional as F
from small_families import PACKED
from transformers import UMT5Config

from diptych.finetune.batches.padded_rows import pad_batch
from diptych.finetune.model.adapters import add_adapter
from diptych.finetune.model.families import decoder_start_token, family_of
from diptych.finetune.model.loss import Seq2SeqObjective

ROWS = [
    {"input_ids": [12, 7, 9, 1], "labels": [31, 40, 35, 22, 1]},
    {"input_ids": [5, 8, 1], "labels": [22, 1]},
    {"input_ids": [50, 1], "labels": [9, 9, 1]},
]
TARGET_TOKENS = 10


def batch_for(model) -> dict[str, torch.Tensor]:
    return pad_batch(ROWS, 0, decoder_start_token(model))


def plain_loss(model, batch, label_smoothing=0.0):
    """What the model computes by itself, and the loss as everyone writes it, over sum of targets."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits
    total = F.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum", label_smoothing=label_smoothing
    )
    return total / TARGET_TOKENS


def gradients(model):
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_loss_and_gradients(model, label_smoothing=0.0, tokens_at_once=3):
    objective = Seq2SeqObjective(model, label_smoothing, tokens_at_once=tokens_at_once).train()
    batch = batch_for(model)
    plain = plain_loss(model, batch, label_smoothing)
    plain.backward()
    expected = gradients(model)
    chunked = objective(batch, TARGET_TOKENS)
    chunked.backward()
    found = gradients(model)
    torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-5)
    assert found.keys() == expected.keys() and expected
    for name in expected:  # mT5's unscaled random head has gradients of a size where fp32 itself is coarser than 1e-5
        scale = max(1.0, expected[name].abs().max().item())
        torch.testing.assert_close(found[name] / scale, expected[name] / scale, rtol=0, atol=1e-5)


PLAIN = [*PACKED, "longt5", "led", "bigbird_pegasus", "pegasus_x", "encoder-decoder", "bert_gpt2"]
"""Not those that add to the cross-entropy of one prediction: see test_own_loss.py."""
OTHER_CHUNKS = [
    ("t5", {"label_smoothing": 0.1}),
    ("bart", {"label_smoothing": 0.1}),
    ("diptych", {"tokens_at_once": 100}),
]


@pytest.mark.parametrize("family, settings", [*((family, {}) for family in PLAIN), *OTHER_CHUNKS])
def test_chunked_loss_matches_plain_cross_entropy(family, settings, new_model):
    model = new_model(family)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()  # pretrained Marian has one that is not zero
    assert_same_loss_and_gradients(model, **settings)


@pytest.mark.parametrize("family", ["t5", "umt5"])
def test_unscaled_t5_matches_plain_cross_entropy(family, new_model):
    """T5 v1.1, Flan-T5 and UMT5: the head is not scaled."""
    if family == "umt5" and not hasattr(UMT5Config(), "scale_decoder_outputs"):
        pytest.skip("before transformers 5.24, UMT5 always scales")
    model = new_model(family, scale_decoder_outputs=False)
    assert_same_loss_and_gradients(model)


def test_softcapped_logits_match_plain_cross_entropy(new_model):
    model = new_model("t5gemma")
    model.get_decoder().config.final_logit_softcapping = 2.0
    assert_same_loss_and_gradients(model)


def test_a_family_that_is_not_in_the_table_matches_plain_cross_entropy(new_model):
    model = new_model("fsmt")
    model.config.model_type = "of nobody"
    assert family_of(model) is None
    assert_same_loss_and_gradients(model)


@pytest.mark.parametrize("family", ["t5", "marian", "t5gemma"])
def test_z_loss_and_smoothing_together_match_what_they_are_by_definition(family, new_model):
    """By autograd from all logits: the squared log of the softmax's denominator is added to each target's loss."""
    model = new_model(family)
    batch = batch_for(model)
    is_target = batch["labels"] != -100
    logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits[is_target]
    z_loss = 1e-2 * logits.logsumexp(dim=-1).square().sum() / TARGET_TOKENS
    expected = plain_loss(model, batch, label_smoothing=0.2) + z_loss
    expected.backward()
    expected_gradients = gradients(model)
    found = Seq2SeqObjective(model, label_smoothing=0.2, z_loss=1e-2, tokens_at_once=3).train()(batch, TARGET_TOKENS)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(model).items():
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(gradient / scale, expected_gradients[name] / scale, rtol=0, atol=1e-5)


def test_token_losses_are_those_of_each_target(new_model):
    model = new_model("bart").eval()
    batch = batch_for(model)
    logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    expected = F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
    torch.testing.assert_close(Seq2SeqObjective(model, tokens_at_once=4).token_losses(batch), expected)


def test_bf16_loses_what_fp32_loses_to_its_own_precision(new_model):
    """The head in bf16, the loss in fp32: no more than the rounding of the logits is lost."""
    model = new_model("diptych")
    batch = batch_for(model)
    exact = Seq2SeqObjective(model)(batch, TARGET_TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = Seq2SeqObjective(model)(batch, TARGET_TOKENS)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=2e-2, atol=0)


@pytest.mark.parametrize("family", ["diptych", "t5", "bart", "t5gemma"])
@pytest.mark.parametrize("train_embeddings", [False, True])
def test_chunked_loss_matches_plain_cross_entropy_through_an_adapter(family, train_embeddings, new_model):
    model = add_adapter(new_model(family), "base", rank=4, alpha=8, train_embeddings=train_embeddings)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)  # they start at zero, where lora_A has no gradient
    assert_same_loss_and_gradients(model)


def test_validation_loss_is_not_smoothed(new_model):
    model = new_model("t5").eval()
    objective = Seq2SeqObjective(model, label_smoothing=0.3).eval()
    batch = batch_for(model)
    torch.testing.assert_close(objective(batch, TARGET_TOKENS), plain_loss(model, batch))


def test_rows_without_targets_give_a_zero_that_has_gradients(new_model):
    model = new_model("t5")
    loss = Seq2SeqObjective(model)(pad_batch([], 0, 0), TARGET_TOKENS)
    loss.backward()
    assert loss == 0
    assert all((weight.grad == 0).all() for weight in model.parameters())
