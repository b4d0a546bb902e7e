"""The decoder's forced tokens, and the labels of a target: the same in training, scoring and inspection.

given_tokens(model, tokenizer, template)             [0, 632]        start token, template prefix
given_tokens(nllb, tokenizer, template, languages)   [2, 256098]     start token, code of the target language
target_ids(model, tokenizer, ["가."], template)      [(0, [632, 17, 9, 1])]   start; labels: prefix, text, end
"""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diptych.data_prep.text_to_ids.decoder_start import split_start
from diptych.data_prep.text_to_ids.encode import encode_targets, label_prefix
from diptych.data_prep.text_to_ids.languages import Languages, codes_of
from diptych.data_prep.text_to_ids.templates import Template
from diptych.finetune.model.families import decoder_start_token


def given_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: Template | None,
    languages: Languages | None = None,
) -> list[int]:
    return forced_tokens(decoder_start_token(model), tokenizer, template, languages)


def forced_tokens(
    start: int, tokenizer: PreTrainedTokenizerBase, template: Template | None, languages: Languages | None = None
) -> list[int]:
    """The tokens that the decoder is given: its start token, then the template's prefix or the code of the target
    language. The model itself writes what the tokenizer puts before targets besides (BART's `<s>`). `languages` are as
    `resolved` returns them; by default the tokenizer's own."""
    decoder_prefix = template.decoder_prefix if template else ()
    if not decoder_prefix and not codes_of(tokenizer).is_around_texts:
        return [start]
    start, prefix = split_start(label_prefix(tokenizer, decoder_prefix, languages), start, tokenizer)
    return [start, *prefix]


def target_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    template: Template | None,
    languages: Languages | None = None,
) -> list[tuple[int, list[int]]]:
    """Start token and labels of rendered targets, as training has them: labels do not repeat the start token, which
    Gemma's tokenizers put before each target."""
    decoder_prefix = template.decoder_prefix if template else ()
    of_texts = None if languages is None else [languages] * len(texts)
    targets = encode_targets(tokenizer, texts, decoder_prefix=decoder_prefix, languages=of_texts)
    return [split_start(ids, decoder_start_token(model), tokenizer) for ids in targets]
