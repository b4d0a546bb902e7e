"""Token ids in, text out, for generation, evaluation and scoring.

    text_of(tokenizer, [31, -100, 40, 1, 0])    "나는"     ids that are no text are left out: -100 of labels, eos, pad
    text_of(tokenizer, [31, 32101, 40])         "나�는"    ids without a token are shown

A model can write ids without a token: T5 has 32,128 embedding rows for 32,100 tokens. The `tokenizers` library omits
such ids silently and fails on negative ones, ByT5 makes letters of them, and M2M100 makes <unk>, a special token.
"""

from collections.abc import Iterable
from functools import lru_cache
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from diptych.data_prep.rows.records import IGNORE_INDEX
from diptych.data_prep.text_to_ids.two_vocabularies import target_side

UNKNOWN_ID = "\N{REPLACEMENT CHARACTER}"


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
