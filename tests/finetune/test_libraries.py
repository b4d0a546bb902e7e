"""What a new release of a library would break first; `.ci/libraries` runs it on the newest and on the oldest ones."""

import pytest
import torch
from small_families import PACKED

PADDED = ("longt5", "led", "bigbird_pegasus", "pegasus_x", "switch_transformers", "nllb-moe", "encoder-decoder")
"""Not ProphetNet, whose cache changes what it writes, nor FSMT, which has no causal mask without (5.24)."""
NEW_TOKENS = 8


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("family", [*PACKED, *PADDED])
def test_cached_generation_is_uncached_generation_in_every_family(family, mode, new_model):
    model = new_model(family).eval()
    sources = torch.randint(3, 250, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(sources)
    sources[1, 5:], mask[1, 5:] = 0, 0
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    settings |= {"return_dict_in_generate": True, "output_logits": True} | mode
    settings["no_repeat_ngram_size"] = 1  # else a random BART repeats one token, whatever its cache holds
    cached, plain = (
        model.generate(input_ids=sources, attention_mask=mask, use_cache=use_cache, **settings)
        for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, plain.sequences)
    assert len({tuple(row.tolist()) for row in plain.sequences}) > 1, "outputs that are all alike prove nothing"
    scale = max(1.0, torch.stack(plain.logits).abs().max().item())
    torch.testing.assert_close(
        torch.stack(cached.logits) / scale, torch.stack(plain.logits) / scale, rtol=1e-4, atol=1e-4
    )


def test_an_nllb_moe_reads_two_experts_alone(new_model):
    """A fault of transformers 5.24, of which `train` and docs/families.md warn: the warning can go when this fails."""
    model = new_model("nllb-moe", num_experts=4)
    ids = torch.randint(3, 250, (4, 16), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, decoder_input_ids=ids).logits.sum().backward()
    weights = {name: weight for name, weight in model.named_parameters() if ".experts." in name}
    read = {name.split("expert_")[1][0] for name, weight in weights.items() if weight.grad is not None}
    assert read == {"0", "1"} and len(weights) == 2 * 4 * 4
