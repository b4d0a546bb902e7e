"""Outputs that must fit a JSON schema or a regular expression, token by token, by llguidance.

    grammar = grammar_of(json_schema={"type": "object", …})     or regex="[0-9]{4}"
    generate_outputs(loaded, [[12, 7, 1]], grammar=grammar, …)   -> [Output('{"year": 1999}', finished=True, …)]

Before each token all tokens are masked after which no text of the grammar is possible any more. llguidance was chosen
because it takes any vocabulary as bytes, has no dependencies, and refuses keywords of JSON Schema that it cannot
enforce. It knows what a sequence may be followed by, from the sequence alone, so beams and several samples of a source
work as without it.

The limit on new tokens can cut an output. `finished` is False then, unless nothing can be added to its text.

B rows, T tokens so far, V vocabulary.
"""

import json
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from diptych.data_prep.command_line.errors import UserError, excerpt
from diptych.data_prep.rows.json_schema import reason_of_llguidance
from diptych.data_prep.text_to_ids.two_vocabularies import target_side
from diptych.finetune.inference.target_tokens import target_ids, text_of
from diptych.finetune.model.loaded_model import LoadedModel

INSTALL = "pip install 'diptych[structured]'"
BYTE_OF = {char: byte for byte, char in bytes_to_unicode().items()}
"""The bytes that the characters of byte-level BPE stand for."""
WHITE_SPACE = {"whitespace_pattern": r" ?|\n[ \t]{0,16}"}
"""Between the parts of JSON: that of json.dumps, with or without indentation. Unlimited, it is what models go on with
for ever."""
SAMPLES = ('{"a": [1.5, "b c"], "d": null}', "It's 7 (seven), isn't it?", "Él tomó té.", "서울에 갔다.", "日本語")
"""Texts by which a tokenizer is tried. Characters that it does not know are left out."""


ENDED, BROKEN = "ended", "broken"


class Grammar(NamedTuple):
    """What every output has to be. Equal ones can share a batch."""

    kind: str
    """json_schema or regex."""
    text: str
    """The schema in one line of JSON, or the expression, which has to match the whole output."""


def grammar_of(json_schema: Mapping[str, Any] | bool | None = None, regex: str | None = None) -> Grammar | None:
    """The grammar of one of the two; None of neither.

    UserError: there are both, or the grammar fits no text, has a part that cannot be enforced, or is too complex.
    """
    if json_schema is not None and regex is not None:
        raise UserError("json_schema and regex exclude each other: an output has one form. Drop one of them.")
    if json_schema is None and regex is None:
        return None
    if json_schema is not None:
        given = {"x-guidance": WHITE_SPACE} | json_schema if isinstance(json_schema, Mapping) else json_schema
        grammar = Grammar("json_schema", json.dumps(given, ensure_ascii=False))
    else:
        grammar = Grammar("regex", _without_anchors(regex))
        if not grammar.text:
            raise UserError(
                f"regex is {regex!r}, which only an empty output fits. Give an expression, or leave it out."
            )
    matcher = _llguidance().LLMatcher
    wrong, messages = matcher.validate_grammar_with_warnings(_lark(grammar, may_begin_with_space=False))
    if wrong:
        raise UserError(
            f"{_named(grammar)} cannot be enforced: {excerpt(reason_of_llguidance(messages[0]), 300)}. Change it."
        )
    return grammar


def _without_anchors(regex: str) -> str:
    """`^a$` → `a`: the whole output has to match anyway, and llguidance knows no anchors."""
    before_end = regex[:-1]
    is_anchor = regex.endswith("$") and (len(before_end) - len(before_end.rstrip("\\"))) % 2 == 0
    return (before_end if is_anchor else regex).removeprefix("^")


def _named(grammar: Grammar) -> str:
    return "the JSON schema" if grammar.kind == "json_schema" else f"the regular expression {excerpt(grammar.text)!r}"


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise UserError(f"llguidance is not installed, which outputs of a given form need: {INSTALL}") from error
    return llguidance


def _lark(grammar: Grammar, may_begin_with_space: bool) -> str:
    """llguidance's form. Left to itself it would force a text's tokens to be those of the tokenizer's `encode`, which
    may begin with a space."""
    space = " ?" if may_begin_with_space else ""
    if grammar.kind == "regex":
        found = json.loads(_llguidance().LLMatcher.grammar_from_regex(f"{space}(?:{grammar.text})"))
        start = found["grammars"][0]["lark_grammar"]
    else:
        start = f"start: {f'/{space}/ ' if space else ''}value\nvalue: %json {grammar.text}\n"
    return f'%llguidance {{"no_forcing": true}}\n{start}'


class WritableTokens(NamedTuple):
    """A tokenizer's tokens as llguidance has them."""

    tokens: Any
    """LLTokenizer."""
    size: int
    drops_first_space: bool
    """Whether decoding leaves out a space at the beginning of a text, as sentencepiece does."""
    can_write: frozenset[int]
    """The bytes that are in some token."""


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> WritableTokens:
    """UserError: a text is not the sum of its tokens, as where decoding puts a space between words."""
    tokenizer = target_side(tokenizer)
    return _vocabulary_of(tokenizer, len(tokenizer), tuple(ends))


@lru_cache(maxsize=4)
def _vocabulary_of(tokenizer: PreTrainedTokenizerBase, size: int, ends: tuple[int, ...]) -> WritableTokens:
    llguidance = _llguidance()
    names = {row: name for name, row in tokenizer.get_vocab().items()}
    special = {*tokenizer.all_special_ids, *ends}
    added = {row: token.content.encode() for row, token in tokenizer.added_tokens_decoder.items()}
    size = max(size, *(row + 1 for row in names))
    for spell in (_byte_level, _sentencepiece, _bytes_alone):
        spelled = {row: added[row] if row in added else spell(name) for row, name in names.items()}
        spelled = _decoded_alike(tokenizer, spelled)
        drops = [_drops_first_space(tokenizer, spelled, text) for text in SAMPLES]
        if None not in drops:
            break
    else:
        raise UserError(
            f"outputs of a given form cannot be had from {type(tokenizer).__name__}: decoding changes the text between"
            " its tokens (spaces between words, capital letters). Use a model whose tokenizer keeps texts as they are."
        )

    class Tokens:
        eos_token_id, bos_token_id = ends[0], None
        # a special token stands for no text: 0xFF, with which no UTF-8 begins, marks it
        tokens = [
            b"\xff[%d]" % row if row in special else spelled.get(row) or b"\xff[%d]" % row for row in range(size)
        ]
        special_token_ids = [row for row, text in enumerate(tokens) if text[:1] == b"\xff" and len(text) > 1]

        def __call__(self, text: bytes) -> list[int]:  # is asked once, and not used
            return []

    tokens = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Tokens()), eos_token=list(ends))
    can_write = frozenset(byte for row, text in spelled.items() if row not in special for byte in text)
    return WritableTokens(tokens, size, any(drops), can_write)


def _byte_level(name: str) -> bytes:
    return bytes(BYTE_OF[char] for char in name) if all(char in BYTE_OF for char in name) else name.encode()


def _sentencepiece(name: str) -> bytes:
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes([int(name[3:5], 16)])
    return name.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


def _bytes_alone(name: str) -> bytes:
    """ByT5: each token is one byte."""
    return name.encode("latin-1") if len(name) == 1 and ord(name) < 256 else name.encode()


def _decoded_alike(tokenizer: PreTrainedTokenizerBase, spelled: Mapping[int, bytes]) -> dict[int, bytes]:
    """Those that decoding gives as they are spelled: NLLB's vocabulary may have `<0x7B>`, and its decoding leaves that
    as it is."""
    rows = list(spelled)
    texts = tokenizer.batch_decode([[row] for row in rows], clean_up_tokenization_spaces=False)
    found = {}
    for row, text in zip(rows, texts, strict=True):
        expected = spelled[row].decode(errors="replace")
        is_part = "\N{REPLACEMENT CHARACTER}" in expected  # of a character; ByT5 decodes it to nothing
        is_part = is_part and (not text or "\N{REPLACEMENT CHARACTER}" in text)
        if is_part or text in (expected, expected.removeprefix(" ")):
            found[row] = spelled[row]
    return found


def _drops_first_space(tokenizer: PreTrainedTokenizerBase, spelled: Mapping[int, bytes], text: str) -> bool | None:
    """None where a text is not the sum of its tokens as they are spelled."""
    known = set(tokenizer.get_vocab().values()) - {tokenizer.unk_token_id, *tokenizer.all_special_ids}
    ids = [row for row in tokenizer(text, add_special_tokens=False)["input_ids"] if row in known]
    if not spelled.keys() >= set(ids):
        return None
    joined, decoded = b"".join(spelled[row] for row in ids).decode(errors="replace"), text_of(tokenizer, ids)
    return None if joined not in (decoded, f" {decoded}") else joined != decoded


class FitsGrammar(LogitsProcessor):
    """Masks, for each row (B, T), the tokens (B, V) after which no text of the grammar is possible."""

    def __init__(self, loaded: LoadedModel, grammar: Grammar, given: int, ends: Sequence[int | None]):
        """`given` counts the forced tokens before the output.

        UserError: the tokenizer's texts are not the sums of its tokens, or it cannot write what the grammar begins
        with; or the template puts text around outputs.
        """
        template = loaded.template
        if template and template.render_target("1") != "1":
            raise UserError(
                f"template {template.name!r} puts text around outputs, which {_named(grammar)} does not have. Use a"
                f" template that does not."
            )
        self.grammar, self.given, self.tokenizer = grammar, given, loaded.tokenizer
        self.ends = tuple(end for end in ends if end is not None)
        self.vocabulary = vocabulary_of(loaded.tokenizer, self.ends)
        # What the tokenizer puts before targets, and the model therefore writes (BART's <s>).
        (_, labels), *_ = target_ids(loaded, ["1"])
        special = set(target_side(loaded.tokenizer).all_special_ids)
        self.first = labels[given - 1 : next(place for place, row in enumerate(labels) if row not in special)]
        self.start = _start(self.vocabulary, grammar)
        self.states: dict[tuple[int, ...], Any] = {}
        """What each row of the last call may be followed by: a matcher, or ENDED or BROKEN."""
        self._allowed([self.start], [()])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place = input_ids.shape[1] - self.given
        if place < 0:
            return scores  # a processor before this one forces the token
        if place < len(self.first):
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor(self.first[place]), 0.0)
        rows = [tuple(ids) for ids in input_ids[:, self.given + len(self.first) :].tolist()]
        goes_on = Counter(ids[:-1] for ids in set(rows))
        states: dict[tuple[int, ...], Any] = {}
        for ids in rows:
            if ids not in states:
                states[ids] = self._after(ids, is_shared=goes_on[ids[:-1]] > 1)
        self.states = states
        allowed = torch.from_numpy(self._allowed([states[ids] for ids in rows], rows)).to(scores.device)
        masked = torch.full_like(scores, -torch.inf)
        width = min(scores.shape[1], allowed.shape[1])
        masked[:, :width] = scores[:, :width].masked_fill(~allowed[:, :width], -torch.inf)
        # Where nothing is left, a processor before this one forces a token: BART's end token at the limit. An ended
        # row is padded whatever its scores are. A beam that broke the grammar has no scores.
        lost = masked.amax(1) == -torch.inf
        is_dead = torch.tensor([states[ids] == BROKEN for ids in rows], device=scores.device)
        return torch.where((lost & ~is_dead)[:, None], scores, masked)

    def finished(self, ids: Sequence[int], has_ended: bool) -> bool:
        """Whether an output (its tokens, without those given) is a whole text of the grammar: one that has ended, or
        to which nothing can be added."""
        written = [row for row in ids[len(self.first) :] if row not in self.ends]
        matcher = self.start.deep_copy()
        if not matcher.consume_tokens(written) or not matcher.is_accepting():
            return False
        return has_ended or matcher.is_stopped()

    def _after(self, ids: tuple[int, ...], is_shared: bool) -> Any:
        if not ids:
            return self.start.deep_copy()
        before = self.states.get(ids[:-1])
        if before in (ENDED, BROKEN):
            return before
        if ids[-1] in self.ends:
            return ENDED
        if before is None:
            matcher = self.start.deep_copy()
            return matcher if matcher.consume_tokens(list(ids)) else BROKEN
        matcher = before.deep_copy() if is_shared else before
        return matcher if matcher.consume_token(ids[-1]) else BROKEN

    def _allowed(self, states: Sequence[Any], rows: Sequence[tuple[int, ...]]) -> np.ndarray:
        """(B, size of the vocabulary), false everywhere in rows that ended or are broken. UserError: the grammar goes
        on, and the tokenizer has no token for it; or the grammar is too complex."""
        masks = np.zeros((len(states), -(-self.vocabulary.size // 32)), dtype=np.int32)
        for state, mask, ids in zip(states, masks, rows, strict=True):
            if state in (ENDED, BROKEN):
                continue
            state.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            if state.is_error():
                said = excerpt(state.get_error().split("\n")[0], 200)
                if said.startswith("NoExtension"):
                    raise self._dead_end(ids)
                raise UserError(f"{_named(self.grammar)} is too complex: {said}. Simplify it.")
        bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")
        return bits[:, : self.vocabulary.size].view(bool)

    def _dead_end(self, ids: Sequence[int]) -> UserError:
        if not ids and _fits_nothing(self.grammar):
            return UserError(f"no text fits {_named(self.grammar)}. Change it.")
        lacks = "".join(char for char in string.printable[:96] if ord(char) not in self.vocabulary.can_write)
        lacks += "" if ord("\n") in self.vocabulary.can_write else "\n"
        written = excerpt(text_of(self.tokenizer, ids))
        return UserError(
            f"after {written!r} {_named(self.grammar)} goes on with text that the tokenizer has no token for; of ASCII"
            f" it lacks {lacks!r}. Add tokens (`diptych tokenizer extend`) and train with them, or change it."
        )


@lru_cache(maxsize=16)
def _start(vocabulary: WritableTokens, grammar: Grammar) -> Any:
    return _llguidance().LLMatcher(vocabulary.tokens, _lark(grammar, vocabulary.drops_first_space), log_level=0)


def _fits_nothing(grammar: Grammar) -> bool:
    """Whether no text is of it, also for a tokenizer that can write all: one of single bytes."""
    llguidance = _llguidance()
    tokens = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokens, _lark(grammar, may_begin_with_space=False), log_level=0)
    mask = np.zeros(-(-tokens.vocab_size // 32), dtype=np.int32)
    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    return matcher.is_error()
