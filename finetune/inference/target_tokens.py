"""The decoder's forced tokens, the labels of a target, and the text of target ids: the same in training, generation,
evaluation, scoring and inspection.

given_tokens(loaded)             [0, 632]                  start token, template prefix
given_tokens(nllb, languages)    [2, 256098]               start token, code of the target language
target_ids(loaded, ["가."])      [(0, [632, 17, 9, 1])]    start; labels: prefix, text, end
text_of(tokenizer, [31, -100, 40, 1, 0])  "나는"           -100 of labels, eos and pad are no text
text_of(tokenizer, [31, 32101, 40])    "나�는"          ids without a token are shown

A model can write ids without a token: T5 has 32,128 embedding rows for 32,100 tokens. The `tokenizers` library omits
such ids silently and fails on negative ones, ByT5 makes letters of them, and M2M100 makes <unk>, a special token.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from diptych.data_prep.rows.records import IGNORE_INDEX
from diptych.data_prep.text_to_ids.decoder_start import split_start
from diptych.data_prep.text_to_ids.encode import encode_targets, label_prefix
from diptych.data_prep.text_to_ids.languages import Languages, codes_of
from diptych.data_prep.text_to_ids.templates import Template
from diptych.data_prep.text_to_ids.two_vocabularies import target_side
from diptych.finetune.model.loaded_model import LoadedModel

UNKNOWN_ID = "\N{REPLACEMENT CHARACTER}"


class TargetSide(Protocol):
    """A LoadedModel or an engine."""

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


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    """The text of target ids, without special tokens and IGNORE_INDEX; each run of unknown ids becomes one UNKNOWN_ID.

    `clean_up_tokenization_spaces` of a checkpoint is ignored: it turns "Go !" into "Go!", and a right target would
    count as wrong.
    """
    tokenizer = target_side(tokenizer)
    known = _known_ids(tokenizer, len(tokenizer))
    runs = groupby((int(id) for id in ids if id != IGNORE_INDEX), key=known.__contains__)
    return "".join(
        tokenizer.decode(list(run), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if is_known
        else UNKNOWN_ID
        for is_known, run in runs
    )


@lru_cache(maxsize=4)
def _known_ids(tokenizer: PreTrainedTokenizerBase, tokens: int) -> frozenset[int]:
    """`tokens`, the tokenizer's size, is part of the cache's key: tokens may be added to a tokenizer."""
    return frozenset(tokenizer.get_vocab().values())
