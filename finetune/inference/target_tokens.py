"""The decoder's forced tokens, and the labels of a target: the same in training, scoring and inspection.

given_tokens(loaded)             [0, 632]                  start token, template prefix
given_tokens(nllb, languages)    [2, 256098]               start token, code of the target language
target_ids(loaded, ["가."])      [(0, [632, 17, 9, 1])]    start; labels: prefix, text, end
"""

from collections.abc import Sequence
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from diptych.data_prep.text_to_ids.decoder_start import split_start
from diptych.data_prep.text_to_ids.encode import encode_targets, label_prefix
from diptych.data_prep.text_to_ids.languages import Languages, codes_of
from diptych.data_prep.text_to_ids.templates import Template
from diptych.finetune.model.loaded_model import LoadedModel


class TargetSide(Protocol):
    """A LoadedModel or an InferenceEngine."""

    tokenizer: PreTrainedTokenizerBase
    template: Template | None
    decoder_start_token_id: int


def given_tokens(side: TargetSide, languages: Languages | None = None) -> list[int]:
    """The tokens that the decoder is given: its start token, then the template's prefix or the code of the target
    language. The model itself writes what the tokenizer puts before targets besides (BART's `<s>`). `languages` are as
    `resolved` returns them; by default the tokenizer's own."""
    start, decoder_prefix = side.decoder_start_token_id, side.template.decoder_prefix if side.template else ()
    if not decoder_prefix and not codes_of(side.tokenizer).is_around_texts:
        return [start]
    start, prefix = split_start(label_prefix(side.tokenizer, decoder_prefix, languages), start, side.tokenizer)
    return [start, *prefix]


def target_ids(
    loaded: LoadedModel, texts: Sequence[str], languages: Languages | None = None
) -> list[tuple[int, list[int]]]:
    """Start token and labels of rendered targets, as training has them: labels do not repeat the start token, which
    Gemma's tokenizers put before each target."""
    decoder_prefix = loaded.template.decoder_prefix if loaded.template else ()
    of_texts = None if languages is None else [languages] * len(texts)
    targets = encode_targets(loaded.tokenizer, texts, decoder_prefix=decoder_prefix, languages=of_texts)
    return [split_start(ids, loaded.decoder_start_token_id, loaded.tokenizer) for ids in targets]
