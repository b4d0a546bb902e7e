"""From rendered texts to token ids, for any tokenizer, such that text is always text.

    encode_sources(tokenizer, ["Go.", "a </s> b"])           each list: what the tokenizer puts before, text, and after
    encode_targets(tokenizer, ["가."], max_target_tokens=8)  each list ends in eos, also when it was cut

Special tokens come from the tokenizer alone: a text that holds the characters `</s>` gets tokens of these characters.
`split_special_tokens=True` is not enough for that. Unigram tokenizers (T5, mT5, mBART, XLM-R) keep `</s>` among the
words of the model itself, where the best way to write the text `</s>` is the word `</s>`: a T5 tokenizer still gave
the eos id in the middle of `"a </s> b"` (transformers 5.23). Such rows, and only they, are encoded again by a copy of
the tokenizer in which no control token can be spelled.
"""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, NamedTuple

import tokenizers

from diptych.data_prep.records import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNSPELLABLE = "\U0010ffff"
"""A noncharacter: Unicode promises that it stands in no text."""


class Encoding(NamedTuple):
    """One encoded text. Only `content` comes from the text; the rest is the tokenizer's own."""

    prefix: list[int]
    content: list[int]
    suffix: list[int]

    @property
    def token_count(self) -> int:
        return len(self.prefix) + len(self.content) + len(self.suffix)

    def ids(self, max_tokens: int | None = None) -> list[int]:
        """All ids; where they are too many, the end of the content goes, never the special tokens."""
        special = len(self.prefix) + len(self.suffix)
        room = len(self.content) if max_tokens is None else max_tokens - special
        if room < 1 <= len(self.content):
            raise UserError(
                f"a limit of {max_tokens} tokens leaves no room for text beside {special} special tokens. Raise it."
            )
        return [*self.prefix, *self.content[:room], *self.suffix]


def encode_sources(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], max_source_tokens: int | None = None
) -> list[list[int]]:
    """`input_ids` of each text, with the special tokens that the tokenizer gives to sources."""
    return [encoding.ids(max_source_tokens) for encoding in split_sources(tokenizer, texts)]


def encode_targets(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], max_target_tokens: int | None = None
) -> list[list[int]]:
    """`labels` of each text, with the special tokens that the tokenizer gives to targets; the last one is eos."""
    return [encoding.ids(max_target_tokens) for encoding in split_targets(tokenizer, texts)]


def split_sources(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Encoding]:
    return _split(tokenizer, texts, side="text")


def split_targets(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Encoding]:
    """Some tokenizers put nothing after a target, mBART puts a language code after eos: generation must end at eos."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError("the tokenizer has no eos token, and a target must end in one. Set tokenizer.eos_token first.")
    encodings = _split(tokenizer, texts, side="text_target")
    return [encoding._replace(suffix=[*_before(eos, encoding.suffix), eos]) for encoding in encodings]


def _before(eos: int, suffix: list[int]) -> list[int]:
    return suffix[: suffix.index(eos)] if eos in suffix else suffix


def _split(tokenizer: PreTrainedTokenizerBase, texts: list[str], side: str) -> list[Encoding]:
    """`side` is the keyword of tokenizer(…): multilingual tokenizers add other special tokens to `text_target`."""
    if not texts:
        return []
    encoded = tokenizer(
        **{side: texts},
        split_special_tokens=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        truncation=False,
        verbose=False,
    )
    control_ids = _control_ids(tokenizer)
    encodings = []
    for text, ids, mask in zip(texts, encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
        encoding = _divide(ids, mask)
        spells_unk = tokenizer.is_fast and tokenizer.unk_token and tokenizer.unk_token in text
        if spells_unk or not control_ids.isdisjoint(encoding.content):
            encoding = encoding._replace(content=_encode_as_text(tokenizer, text))
        encodings.append(encoding)
    return encodings


def _divide(ids: list[int], mask: list[int]) -> Encoding:
    """Special tokens that a tokenizer adds stand before and after the text:

    ids  0 31 40 27 1        prefix [0]
    mask 1  0  0  0 1   →    content [31, 40, 27]
                             suffix [1]
    """
    start = mask.index(0) if 0 in mask else 0
    end = len(mask) - mask[::-1].index(0) if 0 in mask else 0
    return Encoding(list(ids[:start]), list(ids[start:end]), list(ids[end:]))


def _control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every special id but unk, which is an honest answer to an unknown character."""
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return (special | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}


def _encode_as_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} turns text of a row into one of its control tokens, and as a Python"
            f" tokenizer it cannot be told otherwise. Use a tokenizer with a tokenizer.json. The text: {text[:200]!r}"
        )
    special_ids = _control_ids(tokenizer) | ({tokenizer.unk_token_id} - {None})
    special_tokens = tuple(tokenizer.convert_ids_to_tokens(sorted(special_ids)))
    return _text_only(tokenizer, special_tokens).encode(text, add_special_tokens=False).ids


@functools.lru_cache(maxsize=4)
def _text_only(tokenizer: PreTrainedTokenizerBase, special_tokens: tuple[str, ...]) -> tokenizers.Tokenizer:
    """The same tokenizer with the same ids, its special tokens renamed to what no text can spell."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    renamed = {token: UNSPELLABLE + token for token in special_tokens}
    model, vocab = backend["model"], backend["model"]["vocab"]
    if isinstance(vocab, list):  # Unigram: [piece, score] at the place of its id
        model["vocab"] = [[renamed.get(piece, piece), score] for piece, score in vocab]
    else:
        model["vocab"] = {renamed.get(piece, piece): token_id for piece, token_id in vocab.items()}
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    if "merges" in model:  # none may build a special token from its characters
        model["merges"] = [merge for merge in model["merges"] if renamed.keys().isdisjoint(_parts(merge))]
    for token in backend["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
    backend["post_processor"] = backend["truncation"] = backend["padding"] = None
    return tokenizers.Tokenizer.from_str(json.dumps(backend))


def _parts(merge: str | list[str]) -> tuple[str, str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right, left + right
