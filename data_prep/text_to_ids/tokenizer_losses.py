"""What a tokenizer loses of texts: what was encoded is decoded again, and compared.

    T5                     "for x:\\n    y"  →  "for x: y"    line breaks
    BERT                   "Él."              →  "el."         accents
    of English alone       "서울입니다."       →  "<unk>."      unknown characters
    byte-level BPE, ByT5                                       nothing

A model learns to write what the tokenizer made of its targets, so each target is decoded; with tokenizers in Python,
which are slow, `LOOKED_AT` of a batch, unless rows that lose text are to be left out. Of sources, only the unknown
characters in the row's fields are counted: what is lost of white space and of a template is the same in every row.
benchmarks/RESULTS.md says what it costs.
"""

from __future__ import annotations

import os.path
import unicodedata
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

from diptych.data_prep.text_to_ids.encode import Encoding, control_ids, field_contents
from diptych.data_prep.text_to_ids.rendered_text import fields_in
from diptych.data_prep.text_to_ids.two_vocabularies import source_side, target_side

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOOKED_AT = 200
"""Targets of a batch, where a tokenizer in Python decodes them."""

UNKNOWN, LINE_BREAKS, SPACES, OTHERS = "unknown characters", "line breaks", "spaces", "characters"

SHOWN_BEFORE, SHOWN = 20, 60
"""Characters of an example: before the place of the first loss, and in all."""


def _without_accents(text: str) -> str:
    return "".join(letter for letter in unicodedata.normalize("NFD", text) if unicodedata.category(letter) != "Mn")


FOLDS: dict[str, Callable[[str], str]] = {
    "forms of characters (Unicode's NFKC)": lambda text: text,
    "capital letters": str.casefold,
    "accents": lambda text: _without_accents(text.casefold()),
}
"""What is lost where two texts are equal after the function, and were not after those before it."""


class Loss(NamedTuple):
    """What a text loses, and what the tokenizer makes of it."""

    kinds: tuple[str, ...]
    text: str
    written: str

    @property
    def example(self) -> str:
        """`'if x:\\n    y' becomes 'if x: y'`, around the first place where they differ."""
        start = max(len(os.path.commonprefix([self.text, self.written])) - SHOWN_BEFORE, 0)
        shown = [f"{'…' if start else ''}{text[start : start + SHOWN]}" for text in (self.text, self.written)]
        return f"{shown[0]!r} becomes {shown[1]!r}"


def kinds_lost(text: str, written: str) -> tuple[str, ...]:
    """What a text without unknown characters loses; () where nothing is lost."""
    if text == written:
        return ()
    kinds = []
    before, after = ("".join(unicodedata.normalize("NFKC", it).split()) for it in (text, written))
    if "".join(text.split()) != "".join(written.split()):
        kinds.append(next((kind for kind, fold in FOLDS.items() if fold(before) == fold(after)), OTHERS))
    if text.count("\n") != written.count("\n"):
        kinds.append(LINE_BREAKS)
    return tuple(kinds) or (SPACES,)


def target_losses(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    encodings: Sequence[Encoding],
    places: Collection[int],
    all_of_them: bool,
) -> dict[int, Loss | None]:
    """{place: what the text loses, or None} of those of `places` that were decoded."""
    tokenizer, places = target_side(tokenizer), sorted(places)
    if not tokenizer.is_fast and not all_of_them:
        places = places[:: -(-len(places) // LOOKED_AT) or 1]
    control, unknown = control_ids(tokenizer), tokenizer.unk_token_id
    decoded = _decoded(tokenizer, [encodings[place].content for place in places])
    losses: dict[int, Loss | None] = {}
    for place, written in zip(places, decoded, strict=True):
        text, ids = str(texts[place]), encodings[place].content
        kinds = (UNKNOWN,) if unknown in ids else kinds_lost(text, written)
        if kinds == (SPACES,) and not control.isdisjoint(ids):  # blanks beside a template's control token
            kinds = ()
        losses[place] = Loss(kinds, text, written) if kinds else None
    return losses


def source_losses(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], encodings: Sequence[Encoding], places: Collection[int]
) -> dict[int, Loss]:
    """{place: what is lost} of those of `places` whose fields have characters that the tokenizer does not know."""
    tokenizer = source_side(tokenizer)
    unknown = tokenizer.unk_token_id
    suspects = [
        (place, piece) for place in places if unknown in encodings[place].content for piece in fields_in(texts[place])
    ]
    found = field_contents(tokenizer, [piece for _, piece in suspects])
    lossy = [(*suspect, ids) for suspect, ids in zip(suspects, found, strict=True) if unknown in ids]
    written = _decoded(tokenizer, [ids for *_, ids in lossy])
    return {place: Loss((UNKNOWN,), piece, made) for (place, piece, _), made in zip(lossy, written, strict=True)}


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[list[int]]) -> list[str]:
    """As inference/target_tokens.py decodes a model's output, but with control tokens, among them <unk>."""
    if tokenizer.is_fast:
        return tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=False)
    return [tokenizer.decode(it, clean_up_tokenization_spaces=False) for it in ids]
