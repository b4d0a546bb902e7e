"""The source's and the target's side of a tokenizer, each a tokenizer of one vocabulary.

    source_side(marian).decode([7, 0])      "Go. </s>"     ids of a source, by the source's vocabulary
    target_side(marian).decode([7, 0])      "가. </s>"     the same ids in a target
    source_side(t5) is target_side(t5) is t5

Marian with `separate_vocabs` and FSMT have a vocabulary for each side, of different sizes, in which an id is two
words. transformers' tokenizers change between them by a switch in some methods, and in others (get_vocab, the ids of
special tokens, decoding a source, FSMT's encoding of a target) know one of them alone. Each side here is a copy that
knows nothing else, so that whatever is asked of it, it answers of its side. A Marian of one vocabulary has two
sentencepiece models, and is two sides too.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diptych.data_prep.command_line.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIDE = "is_one_side"
"""An attribute of the copies, which have no sides themselves."""


def source_side(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    return _sides(tokenizer, len(tokenizer))[0]


def target_side(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    return _sides(tokenizer, len(tokenizer))[1]


def has_two_vocabularies(tokenizer: PreTrainedTokenizerBase) -> bool:
    source, target = source_side(tokenizer), target_side(tokenizer)
    return source is not target and source.get_vocab() != target.get_vocab()


def all_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The tokens of both sides, by which two tokenizers are compared; those of a second vocabulary are named so."""
    tokens = source_side(tokenizer).get_vocab()
    if not has_two_vocabularies(tokenizer):
        return tokens
    return tokens | {f"{token} (target)": row for token, row in target_side(tokenizer).get_vocab().items()}


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """What fills up rows of either side. Where the padding tokens differ, the smaller id: both embedding tables have
    it, and what stands in padding is not read."""
    if tokenizer.pad_token is None:
        return None
    return min(source_side(tokenizer).pad_token_id, target_side(tokenizer).pad_token_id)


def name_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """FSMT's tokenizer calls the token that ends its texts a separator, and names no other end."""
    if type(tokenizer).__name__ == "FSMTTokenizer" and "eos_token" not in tokenizer.special_tokens_map:
        tokenizer.eos_token = tokenizer.sep_token


def check_one_vocabulary(tokenizer: PreTrainedTokenizerBase, name: str, what: str) -> None:
    """UserError for what works on a tokenizer of one vocabulary alone."""
    if has_two_vocabularies(tokenizer):
        raise UserError(
            f"the tokenizer of {name} ({type(tokenizer).__name__}) has a vocabulary for sources and another one for"
            f" targets, and {what}"
        )


@functools.lru_cache(maxsize=16)
def _sides(tokenizer: PreTrainedTokenizerBase, tokens: int) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """`tokens` are counted, because a person may add some."""
    kind, its = type(tokenizer).__name__, vars(tokenizer)
    if SIDE not in its and kind == "MarianTokenizer":
        of_targets = tokenizer.target_encoder if tokenizer.separate_vocabs else tokenizer.get_vocab()
        return _marian(tokenizer, tokenizer.get_vocab(), "source"), _marian(tokenizer, of_targets, "target")
    if SIDE not in its and kind == "FSMTTokenizer":
        of_targets = {token: row for row, token in tokenizer.decoder.items()}
        return (
            _side(tokenizer, tokenizer.get_vocab(), "source", tgt_lang=tokenizer.src_lang),
            _side(tokenizer, of_targets, "target", src_lang=tokenizer.tgt_lang),
        )
    return tokenizer, tokenizer


def _marian(tokenizer: PreTrainedTokenizerBase, vocabulary: Mapping[str, int], side: str) -> PreTrainedTokenizerBase:
    pieces = {"source": tokenizer.spm_source, "target": tokenizer.spm_target}[side]
    codes = [token for token in vocabulary if token.startswith(">>") and token.endswith("<<")]
    words = {row: token for token, row in vocabulary.items()}
    return _side(
        tokenizer,
        vocabulary,
        side,
        spm_source=pieces,
        spm_target=pieces,
        current_spm=pieces,
        current_encoder=vocabulary,
        separate_vocabs=False,
        supported_language_codes=codes,
        _convert_id_to_token=lambda row: words.get(row, tokenizer.unk_token),  # its own takes ids for sentencepiece's
    )


def _side(
    tokenizer: PreTrainedTokenizerBase, vocabulary: Mapping[str, int], side: str, **attributes: Any
) -> PreTrainedTokenizerBase:
    """Special and added tokens have the ids of this vocabulary; what it lacks is no token of this side."""
    for name in ("eos_token", "pad_token", "unk_token"):
        token = getattr(tokenizer, name)
        if token is not None and token not in vocabulary:
            raise UserError(
                f"the {side} vocabulary of {tokenizer.name_or_path} has no {token!r}, the tokenizer's {name}. Copy the"
                f" checkpoint's tokenizer again."
            )
    added = {
        vocabulary[token.content]: token
        for token in tokenizer.added_tokens_decoder.values()
        if token.content in vocabulary
    }
    copied = object.__new__(type(tokenizer))
    vars(copied).update(vars(tokenizer), **attributes)
    vars(copied).update(
        encoder=vocabulary,
        decoder={row: token for token, row in vocabulary.items()},
        _added_tokens_decoder=added,
        _added_tokens_encoder={token.content: row for row, token in added.items()},
        total_vocab_size=len(vocabulary),
    )
    vars(copied)[SIDE] = True
    return copied
