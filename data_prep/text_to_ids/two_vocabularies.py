"""The source's and the target's side of a tokenizer, each a tokenizer of one vocabulary.

    source_side(marian).decode([7, 0])      "Go. </s>"     ids of a source, by the source's vocabulary
    target_side(marian).decode([7, 0])      "가. </s>"     the same ids in a target
    source_side(t5) is target_side(t5) is t5

Marian with `separate_vocabs` and FSMT have a vocabulary for each side, of different sizes, so an id means two words.
transformers' tokenizers switch between them in some methods; in others (get_vocab, the ids of special tokens, decoding
a source, FSMT's encoding of a target) they use one of them alone. So each side here is a copy of the tokenizer that
has only the side's vocabulary. A Marian of one vocabulary has two sentencepiece models, and so two sides.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diptych.data_prep.command_line.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIDE = "is_one_side"
"""An attribute of the copies."""


def source_side(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    return _sides(tokenizer, len(tokenizer))[0]


def target_side(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    return _sides(tokenizer, len(tokenizer))[1]


def has_two_vocabularies(tokenizer: PreTrainedTokenizerBase) -> bool:
    source, target = source_side(tokenizer), target_side(tokenizer)
    return source is not target and source.get_vocab() != target.get_vocab()


def all_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The tokens of both sides, by which two tokenizers are compared; of a second vocabulary, as "a (target)"."""
    tokens = source_side(tokenizer).get_vocab()
    if not has_two_vocabularies(tokenizer):
        return tokens
    return tokens | {f"{token} (target)": row for token, row in target_side(tokenizer).get_vocab().items()}


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that pads rows of either side. Where the sides' ids differ, the smaller one, which both embedding tables
    have; padding is not read."""
    if tokenizer.pad_token is None:
        return None
    return min(source_side(tokenizer).pad_token_id, target_side(tokenizer).pad_token_id)


def name_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """FSMT's tokenizer has its end token as `sep_token` alone."""
    if type(tokenizer).__name__ == "FSMTTokenizer" and "eos_token" not in tokenizer.special_tokens_map:
        tokenizer.eos_token = tokenizer.sep_token


def check_one_vocabulary(tokenizer: PreTrainedTokenizerBase, name: str, what: str) -> None:
    """UserError where the tokenizer has two vocabularies; `what` says why one is needed, and what to do."""
    if has_two_vocabularies(tokenizer):
        raise UserError(
            f"the tokenizer of {name} ({type(tokenizer).__name__}) has a vocabulary for sources and another one for"
            f" targets, and {what}"
        )


@functools.lru_cache(maxsize=16)
def _sides(tokenizer: PreTrainedTokenizerBase, tokens: int) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """`tokens` are counted, because a user may add some."""
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
    spm = dict.fromkeys(("spm_source", "spm_target", "current_spm"), pieces)
    other = {"current_encoder": vocabulary, "separate_vocabs": False, "supported_language_codes": codes}
    # The tokenizer's own method takes ids for those of the sentencepiece model.
    return _side(
        tokenizer,
        vocabulary,
        side,
        _convert_id_to_token=lambda row: words.get(row, tokenizer.unk_token),
        **spm,
        **other,
    )


def _side(
    tokenizer: PreTrainedTokenizerBase, vocabulary: Mapping[str, int], side: str, **attributes: Any
) -> PreTrainedTokenizerBase:
    """Special and added tokens have the ids of this vocabulary; added tokens that it lacks are left out."""
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
