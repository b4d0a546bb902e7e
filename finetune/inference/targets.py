"""What a decoder is given before it writes, and what it is to write: the same in training, scoring and looking inside.

given_tokens(model, tokenizer, template)             [0, 632]             the start token, and a template's prefix
given_tokens(nllb, tokenizer, template, languages)   [2, 256098]          the start token, and the target's code
target_ids(model, tokenizer, ["가."], template)      [(0, [632, 17, 9, 1])]   start; labels: prefix, text, end
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diptych.data_prep.text_to_ids.decoder_start import split_start
from diptych.data_prep.text_to_ids.encode import encode_targets, label_prefix
from diptych.data_prep.text_to_ids.languages import Languages, codes_of
from diptych.data_prep.text_to_ids.templates import Template
from diptych.finetune.model.families import decoder_start_token

if TYPE_CHECKING:
    from diptych.finetune.exporting.ctranslate2_engine import Translator


def given_tokens(
    model: "PreTrainedModel | Translator",
    tokenizer: PreTrainedTokenizerBase,
    template: Template | None,
    languages: Languages | None = None,
) -> list[int]:
    """Which `generate` does not write: the decoder's start token and, where there is one, the template's prefix or the
    code of the target's language. What the tokenizer puts before targets besides (BART's `<s>`) is not forced: the
    model writes it. `languages` are as `resolved` gives them; the tokenizer's own unless given."""
    start, decoder_prefix = decoder_start_token(model), template.decoder_prefix if template else ()
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
    """Of rendered targets what the decoder starts with, and the labels, as training has them: without the start token,
    which Gemma's tokenizers repeat."""
    decoder_prefix = template.decoder_prefix if template else ()
    of_texts = None if languages is None else [languages] * len(texts)
    start = decoder_start_token(model)
    targets = encode_targets(tokenizer, texts, decoder_prefix=decoder_prefix, languages=of_texts)
    return [split_start(ids, start, tokenizer) for ids in targets]
