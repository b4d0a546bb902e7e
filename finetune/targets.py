"""What a decoder is given before it writes, and what it is to write: the same in training, scoring and looking inside.

given_tokens(model, tokenizer, template)            [0, 632]             the start token, and a template's prefix
target_ids(model, tokenizer, ["가."], template)     [[632, 17, 9, 1]]    labels: prefix, text, end
"""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diptych.data_prep.encode import encode_targets, label_prefix
from diptych.data_prep.templates import Template
from diptych.finetune.families import decoder_start_token


def given_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: Template | None) -> list[int]:
    """Which `generate` does not write: the decoder's start token and, where the template forces one, its prefix. What
    the tokenizer puts before targets by itself (BART's `<s>`) is not forced: the model writes it."""
    start = decoder_start_token(model)
    if template is None or not template.decoder_prefix:
        return [start]
    return [start, *_without_start(label_prefix(tokenizer, template.decoder_prefix), start)]


def target_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], template: Template | None
) -> list[list[int]]:
    """Labels of rendered targets, as training has them: without the start token, which Gemma's tokenizers repeat."""
    prefix = template.decoder_prefix if template else ()
    start = decoder_start_token(model)
    return [_without_start(ids, start) for ids in encode_targets(tokenizer, texts, decoder_prefix=prefix)]


def _without_start(ids: list[int], start: int) -> list[int]:
    return ids[1:] if ids[:1] == [start] else ids
