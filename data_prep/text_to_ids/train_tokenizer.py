"""A tokenizer learned from texts: byte-level BPE or byte-level Unigram.

Both work on UTF-8 bytes without any normalisation, so every text (Hangul composed or decomposed, emoji, leading and
double spaces, newlines, code) comes back exactly, and no text has an unknown token. On Tatoeba's sentences, 4,000
tokens take 0.2 s to learn with BPE, which then writes a sentence in 8.1 tokens; Unigram takes 0.4 s, and 9.5 tokens.

    0 <pad>    1 </s> (eos, ends every source and target)    2 <s> (bos, where a decoder may start)    3 … the words

`curve_vocab_size(kind, texts)` finds how large the vocabulary should be: it trains sizes that double until a doubling
saves too few tokens. On Tatoeba with BPE:

    vocabulary          1,000   2,000   4,000   8,000
    tokens per word      2.65    2.14    1.79    1.63        saves 19 %, 16 %, 9 % of the tokens: 4,000 are enough

Texts may come from an iterator: what stays in memory are the distinct words. BPE: Sennrich et al. 2016, on bytes as in
GPT-2. Unigram: Kudo 2018.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from diptych.data_prep.command_line.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS, BOS = "<pad>", "</s>", "<s>"
SPECIAL_TOKENS = [PAD, EOS, BOS]
MINIMUM_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256

MOST_VOCAB_SIZE = 10_000_000
CURVE_SIZES = (1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 64_000)
CURVE_CHARACTERS = 10_000_000
"""Of more text than this, a part is used."""
LEAST_SAVING = 0.1
"""A doubling of the vocabulary that saves a smaller part of the tokens is not worth its embedding rows."""
HELD_OUT = 20
"""One text in so many is not trained on but measured on."""

# Unigram's trainer scores bytes that it has not seen in an order that differs from run to run. So it is given every
# byte that UTF-8 has: ASCII, then a character for each first and each later byte of longer ones.
EVERY_BYTE = [
    chr(code)
    for code in (*range(0x80), *range(0x80, 0x800, 29), *range(0x800, 0xD800, 0x800), 0xE000, 0xF000)
    + tuple(range(0x10000, 0x110000, 0x8000))
]


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """`kind` is a key of TRAINERS. Small data gives fewer tokens than asked (`why_fewer` says so); at least the 256
    bytes are there."""
    if kind not in TRAINERS:
        raise UserError(f"train_tokenizer is '{kind}'; it can be {' or '.join(TRAINERS)}.")
    if vocab_size < MINIMUM_VOCAB_SIZE:
        raise UserError(f"vocab_size is {vocab_size}; bytes and special tokens alone are {MINIMUM_VOCAB_SIZE}.")
    if vocab_size > MOST_VOCAB_SIZE:  # for which the trainers would take the memory at once
        raise UserError(f"vocab_size is {vocab_size:,}; {MOST_VOCAB_SIZE:,} tokens are the most that are trained.")
    model, trainer = TRAINERS[kind](vocab_size)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(chain(texts, EVERY_BYTE) if kind == "unigram" else texts, trainer)
    if kind == "unigram":
        backend.model = _repeatable(backend)
    eos_id = backend.token_to_id(EOS)
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A $B {EOS}", special_tokens=[(EOS, eos_id)]
    )
    from transformers import PreTrainedTokenizerFast  # a second, which --help of prepare does not wait for

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def why_fewer(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> str | None:
    """A warning where training gave fewer tokens than were asked for; None where it did not."""
    if len(tokenizer) >= vocab_size:
        return None
    return (
        f"the tokenizer has {len(tokenizer):,} tokens, and {vocab_size:,} were asked for: this little text has no more"
        " pieces that occur again. Give more text if it should have more."
    )


def _bpe(vocab_size: int) -> tuple[models.Model, trainers.Trainer]:
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return models.BPE(), trainer


def _unigram(vocab_size: int) -> tuple[models.Model, trainers.Trainer]:
    trainer = trainers.UnigramTrainer(vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, show_progress=False)
    return models.Unigram(), trainer


def _repeatable(backend: Tokenizer) -> models.Unigram:
    """The trainer adds up in parallel, so the last digits of scores and their order differ from run to run."""
    vocab = [(piece, round(score, 9)) for piece, score in json.loads(backend.to_str())["model"]["vocab"]]
    special, words = vocab[: len(SPECIAL_TOKENS)], vocab[len(SPECIAL_TOKENS) :]
    return models.Unigram(special + sorted(words, key=lambda word: (-word[1], word[0])))


@dataclass(frozen=True)
class CurvePoint:
    """One size of the vocabulary and what it makes of texts that it was not trained on."""

    vocab_size: int
    tokens_per_word: float
    bytes_per_token: float
    saving: float | None
    """Part of the tokens that this size saves against the one before it, which has half as many tokens."""


def curve_vocab_size(
    kind: str, texts: Callable[[], Iterable[str]], least_saving: float = LEAST_SAVING
) -> tuple[int, list[CurvePoint]]:
    """The smallest size whose doubling saves less than `least_saving` of the tokens, and the curve up to there.
    `texts()` is read twice."""
    learned, measured = _sample(texts)
    words = sum(len(text.split()) for text in measured)
    size_in_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in measured)
    if not words:
        raise UserError("there is no text to choose a vocabulary size by. Give a number as vocab_size.")
    curve, before = [], None
    for size in CURVE_SIZES:
        tokenizer = train_tokenizer(kind, learned, size)
        tokens = _count_tokens(tokenizer, measured)
        saving = None if before is None else 1 - tokens / before
        curve.append(CurvePoint(size, tokens / words, size_in_bytes / tokens, saving))
        if saving is not None and saving < least_saving:
            return curve[-2].vocab_size, curve
        if len(tokenizer) < size:  # all words of the data are tokens
            return size, curve
        before = tokens
    return CURVE_SIZES[-1], curve


def _sample(texts: Callable[[], Iterable[str]]) -> tuple[list[str], list[str]]:
    """Texts to learn from, and others to measure on, together about CURVE_CHARACTERS at most. A text's checksum
    decides, so that equal texts are on the same side."""
    step = max(1, math.ceil(sum(map(len, texts())) / CURVE_CHARACTERS))
    learned, measured = [], []
    for text in texts():
        if _checksum(text) // HELD_OUT % step == 0:
            (measured if is_held_out(text) else learned).append(text)
    return learned, measured or learned  # a handful of texts can only be measured on themselves


def is_held_out(text: str) -> bool:
    """One text in HELD_OUT, the same ones every time."""
    return _checksum(text) % HELD_OUT == 0


def _checksum(text: str) -> int:
    return zlib.crc32(text.encode("utf-8", "surrogatepass"))


def _count_tokens(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> int:
    """Without the eos of each text."""
    backend = tokenizer.backend_tokenizer
    batches = (texts[start : start + 1000] for start in range(0, len(texts), 1000))
    return sum(
        len(encoding.ids) for batch in batches for encoding in backend.encode_batch(batch, add_special_tokens=False)
    )


TRAINERS = {"bpe": _bpe, "unigram": _unigram}
