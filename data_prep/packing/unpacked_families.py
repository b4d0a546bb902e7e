"""Families of encoder-decoders whose rows are not packed, and why: `prepare` packs none for them, and training pads.

why_not_packed("google/long-t5-local-base")    → "longt5 is not packed: …"
why_not_packed("google-t5/t5-small")           → "": it is packed, or it is not known which model it is for
"""

from transformers import PreTrainedConfig

BLOCKS = "its encoder attends within blocks of tokens and to global ones, and these take no mask that keeps examples"
NOT_PACKED = {
    "longt5": f"{BLOCKS} apart",
    "led": f"{BLOCKS} apart",
    "bigbird_pegasus": f"{BLOCKS} apart",
    "pegasus_x": f"{BLOCKS} apart",
    "prophetnet": "its decoder predicts by several streams, whose masks and positions it makes itself",
    "fsmt": "it makes its masks and positions itself",
    "switch_transformers": "an expert takes a limited number of a row's tokens, and examples would compete for it",
    "nllb-moe": "transformers has only eager attention for it, and its experts are told of padding by that mask",
    "encoder-decoder": "its two models make their masks and positions themselves, each in its own way",
}
"""{model_type: reason}"""


def reason_not_packed(model_type: str) -> str:
    """A clause that names the family; "" where it is packed, or not known."""
    return f"{model_type} is not packed: {NOT_PACKED[model_type]}" if model_type in NOT_PACKED else ""


def why_not_packed(checkpoint: str | None) -> str:
    """The same of the model beside a tokenizer; "" where there is none."""
    try:
        written, _ = PreTrainedConfig.get_config_dict(checkpoint) if checkpoint else ({}, {})
    except OSError:  # a tokenizer alone
        return ""
    return reason_not_packed(written.get("model_type", ""))
