"""What stands in padding never matters: left or right, source or target, on every attention.

Rows of 4 and 7 source tokens and of 3 and 5 target tokens are padded to S = 7 and T = 5.
"""

import pytest
import torch

IMPLEMENTATIONS = ["eager", "sdpa", "flex_attention"]
SOURCE_LENGTHS, TARGET_LENGTHS = (4, 7), (3, 5)


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def model(request, build_model):
    return build_model(attn_implementation=request.param, initializer_range=0.2)


def padded(rows: list[torch.Tensor], side: str, filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of several lengths → tokens and mask, both (B, L)."""
    longest = max(len(row) for row in rows)
    tokens, mask = torch.full((len(rows), longest), filler), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        tokens[i, place], mask[i, place] = row, 1
    return tokens, mask


def batch_of(sources, targets, source_side, target_side, filler=0) -> dict[str, torch.Tensor]:
    input_ids, attention_mask = padded(sources, source_side, filler)
    decoder_input_ids, decoder_attention_mask = padded(targets, target_side, filler)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "decoder_input_ids": decoder_input_ids,
        "decoder_attention_mask": decoder_attention_mask,
    }


@pytest.fixture(scope="module")
def rows(draw_tokens):
    sources = [draw_tokens(length, seed=length) for length in SOURCE_LENGTHS]
    return sources, [draw_tokens(length, seed=length) for length in TARGET_LENGTHS]


@pytest.mark.parametrize("source_side", ["left", "right"])
@pytest.mark.parametrize("target_side", ["left", "right"])
def test_padded_rows_match_rows_alone_whatever_the_padding_holds(
    source_side, target_side, model, rows, uncompiled_flex
):
    sources, targets = rows
    with uncompiled_flex(model.config._attn_implementation):
        batch = batch_of(sources, targets, source_side, target_side)
        other = batch_of(sources, targets, source_side, target_side, filler=44)
        logits, with_other_padding = model(**batch).logits, model(**other).logits
        assert logits.isfinite().all()
        real = batch["decoder_attention_mask"].bool()
        assert torch.equal(logits[real], with_other_padding[real])
        for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
            alone = model(input_ids=source[None], decoder_input_ids=target[None]).logits[0]
            torch.testing.assert_close(logits[row, real[row]], alone, rtol=1e-4, atol=1e-4)


def test_without_its_mask_padding_would_matter(model, rows, uncompiled_flex):
    sources, targets = rows
    with uncompiled_flex(model.config._attn_implementation):
        batch = batch_of(sources, targets, "left", "left")
        logits = model(**batch).logits
        for mask in ("attention_mask", "decoder_attention_mask"):
            unmasked = model(**{name: value for name, value in batch.items() if name != mask}).logits
            assert not torch.allclose(unmasked[0, -3:], logits[0, -3:], atol=1e-3), mask


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padding_gives_finite_gradients_and_none_to_its_own_tokens(implementation, build_model, rows):
    model = build_model(attn_implementation=implementation, tie_word_embeddings=False)
    filler = 2  # a token that is drawn nowhere
    batch = batch_of(*rows, "left", "left", filler)
    logits = model(**batch).logits
    logits[batch["decoder_attention_mask"].bool()].logsumexp(-1).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    for panel in (model.get_encoder(), model.get_decoder()):
        assert panel.embed_tokens.weight.grad[filler].abs().max() == 0
        assert panel.embed_tokens.weight.grad.abs().max() > 0


@pytest.mark.parametrize("masked", [True, False])
def test_every_attention_gives_the_same_logits(masked, build_model, rows, uncompiled_flex):
    batch = batch_of(*rows, "left", "right")
    real = batch["decoder_attention_mask"].bool()
    if not masked:  # the path on which kernels go by `is_causal`
        batch = {name: ids for name, ids in batch.items() if "mask" not in name}
    logits = {}
    for implementation in IMPLEMENTATIONS:
        with uncompiled_flex(implementation):
            logits[implementation] = build_model(attn_implementation=implementation, initializer_range=0.2)(
                **batch
            ).logits[real]
        torch.testing.assert_close(logits[implementation], logits["eager"], rtol=1e-5, atol=1e-5)
