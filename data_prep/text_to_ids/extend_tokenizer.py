"""More tokens for a checkpoint's tokenizer, learned from texts of a new language or domain.

    new = learn_new_tokens(tokenizer, texts, tokens=2000)      NewTokens(pieces={"▁안녕하세요": (812, 94, 3051), …}, …)
    extended = add_new_tokens(tokenizer, new)
    extended("안녕하세요")["input_ids"]                           [32100, 1] instead of [812, 94, 3051, 1]

Every old token keeps its id. A new one joins old tokens that often stand side by side in a word: the tokenizer's BPE
training goes on with the new texts ("continued BPE training", Purason et al. 2025, arXiv 2512.03989), so that each new
token saves the most tokens after those before it. It becomes a word of the model, and not an "added token", which
would be matched in the middle of other words too, and would cut the text in two there (▁ marks come and go, spaces are
lost):

    BPE        merges are appended: they join what the old merges leave, and text without new tokens is cut as before.
    Unigram    the score is the sum of the old pieces' scores and SAVING_SCORE for each token saved: the best cut of a
               word stays the best, written with fewer tokens.

Characters that a tokenizer has no token for (unknown, or written as bytes) become tokens first. 2,000 tokens for a T5
tokenizer from Tatoeba's Korean take half a second.

The tokenizer keeps in tokenizer_config.json of which old ids each new token is made, and training starts its embedding
row from the mean of their rows ("diptych_new_tokens"; Gee et al. 2022, Fast Vocabulary Transfer).
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import models, trainers
from transformers import AddedToken, AutoTokenizer

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.text_to_ids.encode import vocabulary_size
from diptych.data_prep.text_to_ids.languages import codes_of
from diptych.data_prep.text_to_ids.templates import attach_template, carried_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MINIMUM_FREQUENCY = 5
"""A token that is rarer in the new texts has nothing to train its row."""

NEW_TOKENS_KEY = "diptych_new_tokens"
"""The key in tokenizer_config.json: {new token: [ids of the old tokens it stands for]}."""

SAVING_SCORE = 0.01
"""Scores are logarithms of probabilities, mostly between -5 and -15: this is enough to win over the same cut in old
pieces, and too little to win over another cut."""

UNREACHABLE = "\U000ffffe"
"""A noncharacter: begins the names of ids that belong to no token."""

BYTE = re.compile(r"<0x([0-9A-F]{2})>")
BATCH = 1000
MERGES_TRIED = 1.5
"""Merges learned for each token asked for: some give a token that exists."""
FIRST_SURROGATE, SURROGATES = 0xD800, 0x800


@dataclass(frozen=True)
class NewTokens:
    """What to add. `pieces` has the new tokens in the order of their ids, `merges` how BPE makes them."""

    pieces: dict[str, tuple[int, ...]] = field(default_factory=dict)
    merges: list[tuple[str, str]] = field(default_factory=list)


def learn_new_tokens(
    tokenizer: PreTrainedTokenizerBase,
    texts: Callable[[], Iterable[str]],
    tokens: int,
    minimum_frequency: int = MINIMUM_FREQUENCY,
) -> NewTokens:
    """At most `tokens` of them, fewer of little text. `texts()` is read twice; in memory are its distinct words."""
    check_extensible(tokenizer)
    cutter = _Cutter(tokenizer)
    characters = cutter.missing_characters(texts(), tokens // 2, minimum_frequency)
    # The trainer joins characters: each old token, and each new character, is written to it as one private character.
    spelling = [*cutter.tokens, *characters]
    old_ids = [*((token_id,) for token_id in range(len(cutter.tokens))), *characters.values()]
    number_of = {letter: len(cutter.tokens) + place for place, letter in enumerate(characters)}

    def spelled(symbols: str) -> str:
        return "".join(spelling[_number(symbol)] for symbol in symbols)

    merges = _learn_merges(
        (run for word in cutter.words(texts()) for run in _runs(word, number_of)),
        alphabet=[_symbol(number) for number in range(len(spelling))],
        merges=int(MERGES_TRIED * (tokens - len(characters))) + 1,
        minimum_frequency=minimum_frequency,
    )
    taken = set(tokenizer.get_vocab())
    pieces, kept_merges = dict(characters), []
    for left, right in merges:
        if not all(len(part) == 1 or spelled(part) in pieces for part in (left, right)):
            continue  # it joins a token that was left out
        piece = spelled(left + right)
        if piece in taken:
            continue
        if piece not in pieces:
            if len(pieces) >= tokens:
                break
            pieces[piece] = tuple(chain.from_iterable(old_ids[_number(symbol)] for symbol in left + right))
        kept_merges.append((spelled(left), spelled(right)))
    return NewTokens(pieces, kept_merges)


def check_extensible(tokenizer: PreTrainedTokenizerBase) -> None:
    """UserError for a tokenizer whose vocabulary cannot be added to."""
    model = tokenizer.backend_tokenizer.model if tokenizer.is_fast else None
    is_bpe = isinstance(model, models.BPE)
    mark = is_bpe and (model.end_of_word_suffix or model.continuing_subword_prefix)
    if model is None:
        why = f"({type(tokenizer).__name__}) is written in Python"
    elif mark:
        why = f"is a BPE that marks parts of words with {mark!r}"
    elif not is_bpe and not isinstance(model, models.Unigram):
        why = f"is {type(model).__name__}"
    else:
        return
    raise UserError(
        f"the tokenizer of {tokenizer.name_or_path or type(tokenizer).__name__} {why}, and its vocabulary cannot be"
        f" extended. Use a checkpoint whose tokenizer has a tokenizer.json of byte-level or sentencepiece BPE, or of"
        f" Unigram, such as T5, mT5, BART, mBART, NLLB or Gemma."
    )


class _Cutter:
    """Texts as the tokenizer cuts them: words, as old ids and the characters that it has no token for.

    "안녕 쀍" → [[812, 94], [5, "쀍"]]
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.backend.no_truncation()
        self.backend.no_padding()
        self.tokens = tokenizer.convert_ids_to_tokens(range(vocabulary_size(tokenizer)))
        self.added = set(tokenizer.added_tokens_decoder)
        self.unknown = {token_id for token_id, token in enumerate(self.tokens) if token == tokenizer.unk_token}
        self.unknown_id = tokenizer.unk_token_id
        """The one that the model gives, where a vocabulary has `<unk>` twice."""
        self.bytes = {}
        if getattr(self.backend.model, "byte_fallback", False):
            found = {token_id: BYTE.fullmatch(token or "") for token_id, token in enumerate(self.tokens)}
            self.bytes = {token_id: bytes.fromhex(match[1]) for token_id, match in found.items() if match}

    def words(self, texts: Iterable[str]) -> Iterator[list[int | str]]:
        """Words end where the tokenizer's own pre-tokenisation says, before each ▁ (Gemma's takes a whole text for one
        word), and at control tokens, which are in no word."""
        texts = iter(texts)
        while batch := list(islice(texts, BATCH)):
            for text, encoding in zip(batch, self.backend.encode_batch(batch, add_special_tokens=False), strict=True):
                yield from filter(None, self._words(text, encoding))

    def _words(self, text: str, encoding: tokenizers.Encoding) -> Iterator[list[int | str]]:
        word: list[int | str] = []
        in_bytes, previous = b"", None
        for token_id, word_id, (start, end) in zip(encoding.ids, encoding.word_ids, encoding.offsets, strict=True):
            if in_bytes and token_id not in self.bytes:
                word.extend(in_bytes.decode(errors="ignore"))
                in_bytes = b""
            if word_id != previous or self.tokens[token_id].startswith("▁"):
                yield word
                word = []
            previous = word_id
            if token_id in self.unknown:
                self.unknown_id, normalizer = token_id, self.backend.normalizer
                unknown = text[start:end]
                word.extend(normalizer.normalize_str(unknown) if normalizer else unknown)
            elif token_id in self.bytes:
                in_bytes += self.bytes[token_id]
            elif token_id in self.added:
                yield word
                word = []
            else:
                word.append(token_id)
        word.extend(in_bytes.decode(errors="ignore"))
        yield word

    def missing_characters(self, texts: Iterable[str], limit: int, minimum_frequency: int) -> dict[str, tuple]:
        """The most frequent characters without a token of their own, with the old ids that now stand for each; at most
        `limit`, because the rest of the new tokens is for words."""
        if not (self.unknown or self.bytes):
            return {}
        counts = Counter(part for word in self.words(texts) for part in word if isinstance(part, str))
        ids_of_bytes = {byte: token_id for token_id, byte in self.bytes.items()}
        saved, known = {}, set(self.tokens)
        for character, count in counts.items():
            size = len(character.encode("utf-8", "surrogatepass"))
            if count >= minimum_frequency and character not in known and not (self.bytes and size == 1):
                saved[character] = count * (size - 1 if self.bytes else 1)
        chosen = sorted(saved, key=lambda character: (-saved[character], character))[:limit]
        if self.bytes:
            return {letter: tuple(ids_of_bytes[bytes([byte])] for byte in letter.encode()) for letter in chosen}
        return {letter: (self.unknown_id,) for letter in chosen}


def _runs(word: list[int | str], number_of: dict[str, int]) -> Iterator[str]:
    """Symbols of the word, without the characters that stay without a token; one symbol alone has nothing to join."""
    run = ""
    for part in chain(word, [""]):
        number = number_of.get(part) if isinstance(part, str) else part
        if number is not None:
            run += _symbol(number)
            continue
        if len(run) > 1:
            yield run
        run = ""


def _symbol(number: int) -> str:
    return chr(number if number < FIRST_SURROGATE else number + SURROGATES)


def _number(symbol: str) -> int:
    return ord(symbol) if ord(symbol) < FIRST_SURROGATE else ord(symbol) - SURROGATES


def _learn_merges(
    words: Iterable[str], alphabet: list[str], merges: int, minimum_frequency: int
) -> list[tuple[str, str]]:
    """Pairs of symbols in the order in which BPE joins them, the most frequent first."""
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + merges,
        min_frequency=minimum_frequency,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    learner = tokenizers.Tokenizer(models.BPE())
    learner.train_from_iterator(words, trainer)
    return [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]


def add_new_tokens(tokenizer: PreTrainedTokenizerBase, new: NewTokens) -> PreTrainedTokenizerBase:
    """A saved and loaded copy of the tokenizer, with the new tokens at the ids after all old ones. UserError where the
    tokenizer's class does not keep its ids."""
    check_extensible(tokenizer)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    first = vocabulary_size(tokenizer)
    if isinstance(backend["model"]["vocab"], list):
        _extend_unigram(backend, new, first, tokenizer)
    else:
        _extend_bpe(backend, new, first)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        text = json.dumps(backend, ensure_ascii=False)
        (Path(folder) / "tokenizer.json").write_text(text, encoding="utf-8")
        extended = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    vocab = extended.get_vocab()  # some classes build their tokenizer anew when it is loaded
    is_whole = tokenizer.get_vocab().items() <= vocab.items()
    if not is_whole or any(vocab.get(piece) != first + place for place, piece in enumerate(new.pieces)):
        raise UserError(
            f"{type(tokenizer).__name__} does not keep its token ids when tokens are added and it is loaded again, so"
            f" that it cannot be extended. Use a checkpoint of another family."
        )
    extended.name_or_path = extended.init_kwargs["name_or_path"] = tokenizer.name_or_path
    earlier = tokenizer.init_kwargs.get(NEW_TOKENS_KEY, {})
    extended.init_kwargs[NEW_TOKENS_KEY] = earlier | {piece: list(ids) for piece, ids in new.pieces.items()}
    if template := carried_template(tokenizer):
        attach_template(extended, template)  # its examples have other ids now
    return extended


def add_language_codes(tokenizer: PreTrainedTokenizerBase, alike: Mapping[str, str]) -> PreTrainedTokenizerBase:
    """A saved and loaded copy with new language codes, each of which starts as the code of a language that is like it:
    {"jje_Hang": "kor_Hang"}. UserError for a tokenizer without codes, and for a code that it has, or cannot have."""
    codes = codes_of(tokenizer)
    if not codes.tokens:
        raise UserError(
            "languages are given, and this tokenizer has no language codes: its rows name languages in words. Leave"
            " them out."
        )
    own, spelled = dict(tokenizer.init_kwargs.get(NEW_TOKENS_KEY, {})), {}
    for code, other in alike.items():
        known = codes.find(other)
        if code in codes.tokens:
            raise UserError(f"languages has {code}, which is a code of this tokenizer already. Leave it out.")
        spelled[code] = codes.spellings[known].replace(known, code)
        own[spelled[code]] = [codes.tokens[known]]
    before = tokenizer.get_vocab()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        added = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        added.add_tokens([AddedToken(it, special=True, normalized=False) for it in spelled.values()], True)
        added.save_pretrained(folder)
        added = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if bad := [code for code in spelled if code not in codes_of(added).tokens]:
        raise UserError(
            f"languages has {bad[0]}, which this tokenizer does not read as a language code. Write it like"
            f" {alike[bad[0]]}: small letters for the language, then the script or the region."
        )
    if not before.items() <= added.get_vocab().items():
        raise UserError(f"{type(tokenizer).__name__} does not keep its token ids when a code is added to it.")
    added.name_or_path = added.init_kwargs["name_or_path"] = tokenizer.name_or_path
    added.init_kwargs[NEW_TOKENS_KEY] = own
    return added


def pieces_of_new_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, list[int]]:
    """{id of a new token: ids of the old tokens it stands for}, of all extensions of this tokenizer."""
    kept = tokenizer.init_kwargs.get(NEW_TOKENS_KEY, {})
    return dict(zip(tokenizer.convert_tokens_to_ids(list(kept)), kept.values(), strict=True))


def _extend_bpe(backend: dict[str, Any], new: NewTokens, first: int) -> None:
    """Added tokens that the model does not have get their ids there too: on loading they would be given those after
    the model's last one. No merge makes them."""
    vocab = backend["model"]["vocab"]
    for token in backend["added_tokens"]:
        vocab.setdefault(token["content"], token["id"])
    vocab.update((piece, first + place) for place, piece in enumerate(new.pieces))
    backend["model"]["merges"] += [list(merge) for merge in new.merges]


def _extend_unigram(backend: dict[str, Any], new: NewTokens, first: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """A Unigram model's ids are places in its list, so added tokens between the old and the new ones need a place
    there as well, with a score below that of their parts, so that no text is read as one of them. (Where their
    characters are unknown it may be; encode.py keeps control tokens out of texts.)"""
    vocab = backend["model"]["vocab"]
    scores = dict(vocab)
    lowest = min(score for _, score in vocab)
    added = {token["id"]: token["content"] for token in backend["added_tokens"]}
    for token_id in range(len(vocab), first):
        content = added.get(token_id, f"{UNREACHABLE}{token_id}")
        parts = tokenizer.backend_tokenizer.model.tokenize(content)
        vocab.append([content, sum(scores.get(token.value, lowest) for token in parts) - 10])
    old_scores = [score for _, score in vocab]
    unknown = backend["model"].get("unk_id")
    for piece, ids in new.pieces.items():
        parts = [lowest if token_id == unknown else old_scores[token_id] for token_id in ids]
        vocab.append([piece, sum(parts) + SAVING_SCORE * (len(parts) - 1)])
