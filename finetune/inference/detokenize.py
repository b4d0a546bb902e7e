"""Token ids in, text out: the one way that generation, evaluation and reranking take.

    text_of(tokenizer, [31, -100, 40, 1, 0])    "나는"     what is no text is left out: labels' -100, eos, pad
    text_of(tokenizer, [31, 32101, 40])         "나�는"    what the tokenizer does not know is seen

A model can write ids that its tokenizer has no token for: T5 has 32,128 embedding rows for 32,100 tokens, and a
vocabulary may have gaps. Tokenizers of the `tokenizers` library leave such ids out without a word, and fail on
negative ones; ByT5 makes letters of them; M2M100 calls them <unk>, which is then left out as a control token.
"""

from collections.abc import Iterable
from functools import lru_cache
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from diptych.data_prep.rows.records import IGNORE_INDEX
from diptych.data_prep.text_to_ids.two_vocabularies import target_side

UNKNOWN_ID = "\N{REPLACEMENT CHARACTER}"


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    """The text of any ids of a target, without control tokens and IGNORE_INDEX; for each run of unknown ids one
    UNKNOWN_ID.

    Spaces stay as the tokens have them, whatever a checkpoint asks for: `clean_up_tokenization_spaces` makes "Go !"
    to "Go!", and a target that was right would count as wrong.
    """
    tokenizer = target_side(tokenizer)
    known = _known_ids(tokenizer, len(tokenizer))
    parts = groupby((int(id) for id in ids if id != IGNORE_INDEX), key=known.__contains__)
    return "".join(
        tokenizer.decode(list(part), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if is_known
        else UNKNOWN_ID
        for is_known, part in parts
    )


@lru_cache(maxsize=4)
def _known_ids(tokenizer: PreTrainedTokenizerBase, tokens: int) -> frozenset[int]:
    """`tokens`, how many it has, only makes a tokenizer that has got more another one."""
    return frozenset(tokenizer.get_vocab().values())
