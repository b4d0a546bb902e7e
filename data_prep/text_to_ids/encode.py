"""From rendered texts to token ids, for any tokenizer, such that text is always text.

    split_sources(tokenizer, ["Go.", "a </s> b"])    each an Encoding: what the tokenizer puts before, text, and after
    split_targets(tokenizer, ["가."], ["kor_Hang"])   Encoding([kor_Hang], [632, 17], [</s>]); the last one is eos
    split_sources(nllb, ["가."], languages=[Languages("kor_Hang", "eng_Latn")])    Encoding([kor_Hang], …, [</s>])
    encoding.ids(512)                                its ids, at most 512: the end of the text is left out

Control tokens come from the tokenizer and from the template, never from the fields of a row: where a text holds the
characters `</s>`, it gets tokens of these characters. Control tokens are all special and all added tokens, except
those that are words of text (`text_tokens`). Of a text from a template (rendered_text.py), the template's own pieces
may have control tokens; a plain str has none.

transformers' `split_special_tokens=True` is not enough for that: Unigram tokenizers (T5, mT5, mBART, XLM-R) keep
`</s>` in the vocabulary of the model itself, so a T5 tokenizer still gave the eos id in the middle of `"a </s> b"`
(transformers 5.23). So texts are encoded by a copy of the tokenizer in which each control token has another name,
which begins with a character that no text may hold. The template's own tokens are spelled by these names. The copy
encodes 40,000 pairs of short sentences a second on one core, `tokenizer(texts)` 20,000, with the same ids.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import tokenizers

from diptych.data_prep.command_line.errors import UserError, excerpt, library_errors, nearest
from diptych.data_prep.rows.records import broken_character
from diptych.data_prep.text_to_ids.languages import Languages, codes_of, own_languages
from diptych.data_prep.text_to_ids.rendered_text import FRAME_MARK, UNSPELLABLE, Rendered, check_characters, pieces
from diptych.data_prep.text_to_ids.two_vocabularies import source_side, target_side

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "a. 1"
"""A text that shows what a tokenizer puts around it."""
TEXT_TOKENS_KEY = "diptych_text_tokens"
"""The key in tokenizer_config.json under which a vocabulary that was extended lists its new words of text."""


class Encoding(NamedTuple):
    """One encoded text. `content` comes from the text; the rest are the tokenizer's own tokens, language codes, and
    the tokens of a template's `decoder_prefix`."""

    prefix: list[int]
    content: list[int]
    suffix: list[int]

    @property
    def token_count(self) -> int:
        return len(self.prefix) + len(self.content) + len(self.suffix)

    def ids(self, max_tokens: int | None = None, end_after_cut: bool = True) -> list[int]:
        """All ids. Where they are more than `max_tokens`, the end of the content is left out, never the special
        tokens; without `end_after_cut`, also the suffix: from a cut target that ends in eos, a model learns to stop
        early."""
        if max_tokens is None or self.token_count <= max_tokens:
            return [*self.prefix, *self.content, *self.suffix]
        suffix = self.suffix if end_after_cut else []
        special = len(self.prefix) + len(suffix)
        room = max_tokens - special
        if room < 1 <= len(self.content):
            raise UserError(
                f"a limit of {max_tokens} tokens leaves no room for text beside {special} special tokens. Raise it."
            )
        return [*self.prefix, *self.content[: max(room, 0)], *suffix]


def shortened(
    tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int, languages: Languages | None = None
) -> str:
    """A rendered source with less of its longest fields, such that it has at most `max_tokens`, special ones included.

    The template's own text stays whole. All fields are cut to one length, so that a short instruction stays whole
    beside a long text. Where the template alone is too long, the fields are empty.
    """
    tokenizer = source_side(tokenizer)
    around = sum(map(len, _around_source(tokenizer, languages or own_languages(tokenizer))))
    parts = pieces(text)

    def cut(length: int) -> Rendered:
        return Rendered(FRAME_MARK.join(it if place % 2 else it[:length] for place, it in enumerate(parts)))

    def tokens(length: int) -> int:
        return around + len(_contents(tokenizer, [cut(length)])[0])

    return cut(_longest_that_fits(tokens, max(map(len, parts[::2])), max_tokens))


def _longest_that_fits(tokens: Callable[[int], int], length: int, most: int) -> int:
    """The largest number of characters, at most `length`, of which `tokens` makes at most `most`; 0 where none does.

    Tokens are nearly proportional to characters, so every other try is interpolated between the last two: a long text
    takes about five tries.
    """
    fits, fits_tokens, over, over_tokens = 0, tokens(0), length, tokens(length)
    if over_tokens <= most:
        return length
    if fits_tokens >= most:
        return 0
    while over - fits > 1 and fits_tokens < most:
        share = (most - fits_tokens) / (over_tokens - fits_tokens)
        middle = min(max(fits + round(share * (over - fits)), fits + 1), over - 1)
        for tried in (middle, (fits + over) // 2):
            if not fits < tried < over:
                continue
            if (count := tokens(tried)) <= most:
                fits, fits_tokens = tried, count
            else:
                over, over_tokens = tried, count
    return fits


def encode_sources(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], languages: Sequence[Languages] | None = None
) -> list[list[int]]:
    """`input_ids` of each text, with the special tokens that the tokenizer gives to sources."""
    return [encoding.ids() for encoding in split_sources(tokenizer, texts, languages)]


def encode_targets(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    decoder_prefix: Sequence[str] = (),
    languages: Sequence[Languages] | None = None,
) -> list[list[int]]:
    """`labels` of each text, with the special tokens that the tokenizer gives to targets; the last one is eos."""
    return [encoding.ids() for encoding in split_targets(tokenizer, texts, decoder_prefix, languages)]


def split_sources(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], languages: Sequence[Languages] | None = None
) -> list[Encoding]:
    """`languages` are those of each text, as `resolved` gives them; the tokenizer's own unless given."""
    if not texts:
        return []
    tokenizer = source_side(tokenizer)
    around = _language_cache(functools.partial(_around_source, tokenizer), tokenizer, texts, languages)
    contents = _contents(tokenizer, texts)
    return [Encoding(before, content, after) for (before, after), content in zip(around, contents, strict=True)]


def split_targets(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    decoder_prefix: Sequence[str] = (),
    languages: Sequence[Languages] | None = None,
) -> list[Encoding]:
    """Each target ends in eos, where generation stops: some tokenizers put nothing there, and mBART a code after
    it."""
    tokenizer = target_side(tokenizer)
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError("the tokenizer has no eos token, and a target must end in one. Set tokenizer.eos_token first.")
    if not texts:
        return []
    own_suffix = [] if codes_of(tokenizer).is_around_texts else _around(tokenizer, "text_target")[1]
    suffix = [*(own_suffix[: own_suffix.index(eos)] if eos in own_suffix else own_suffix), eos]
    prefix_of = functools.partial(label_prefix, tokenizer, decoder_prefix)
    before = _language_cache(prefix_of, tokenizer, texts, languages)
    contents = _contents(tokenizer, texts)
    return [Encoding(prefix, content, suffix) for prefix, content in zip(before, contents, strict=True)]


def _language_cache(
    of_languages: Callable[[Languages], Any],
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    languages: Sequence[Languages] | None,
) -> list[Any]:
    """The value of `of_languages` for each text, computed once for each direction."""
    languages = [own_languages(tokenizer)] * len(texts) if languages is None else languages
    found = {of_row: of_languages(of_row) for of_row in dict.fromkeys(languages)}
    return [found[of_row] for of_row in languages]


def _around_source(tokenizer: PreTrainedTokenizerBase, languages: Languages) -> tuple[list[int], list[int]]:
    """Ids before and after a source: the tokenizer's own, with the codes of the row."""
    codes = codes_of(tokenizer)
    before, after = _around(tokenizer, "text")
    if codes.layout == "source" and languages.target:
        # The tokenizer itself encodes the code with the text, because MADLAD's may have a blank before it.
        bare, with_code = (
            list(tokenizer(f"{spelling}{PROBE}", truncation=False, verbose=False)["input_ids"])
            for spelling in ("", f"{codes.spellings[languages.target]} ")
        )
        code, rest = codes.tokens[languages.target], bare[len(before) :]
        is_as_expected = with_code[len(with_code) - len(rest) :] == rest and code in with_code
        before = with_code[: len(with_code) - len(rest)] if is_as_expected else [code, *before]
    if not codes.is_around_texts or not languages.source:
        return before, after
    own = tokenizer.convert_tokens_to_ids(codes.spellings.get(tokenizer.src_lang, tokenizer.src_lang))
    wanted = codes.tokens[languages.source]
    return tuple([wanted if token == own else token for token in side] for side in (before, after))


def label_prefix(
    tokenizer: PreTrainedTokenizerBase, decoder_prefix: Sequence[str], languages: Languages | None = None
) -> list[int]:
    """The first ids of each target: the tokenizer's own (BART `<s>`), its language code, and `decoder_prefix`. A
    language code in `decoder_prefix` replaces the tokenizer's."""
    tokenizer = target_side(tokenizer)
    codes = codes_of(tokenizer)
    if codes.is_around_texts:
        source, target = languages or own_languages(tokenizer)
        own = [codes.tokens[target or source]] if target or source else []  # as transformers has it without a target
    else:
        own, _ = _around(tokenizer, "text_target")
    if not decoder_prefix:
        return own
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id}
    if codes.is_around_texts and not codes.named_by(decoder_prefix):
        named |= set(codes.tokens.values())
    ids = [_control_id(tokenizer, token) for token in decoder_prefix]
    kept = [token_id for token_id in own if token_id in named]
    return ids if kept == ids[: len(kept)] else [*kept, *ids]


def _control_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    control = _control_tokens(tokenizer)
    if token in control:
        return control[token]
    token_id = tokenizer.convert_tokens_to_ids(token)
    if token_id not in (None, tokenizer.unk_token_id) and token not in tokenizer.get_vocab():
        return token_id  # M2M100's languages have ids beyond its vocabulary
    near = nearest(token, control)
    raise UserError(
        f"decoder_prefix names {token!r}, which is no special or added token of this tokenizer."
        f" {f'Did you mean {near!r}?' if near else 'Name one that it has, or add it to the tokenizer.'}"
    )


def text_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The added tokens that are ordinary text: blanks, and those that the tokenizer's config lists as words."""
    listed = set(tokenizer.init_kwargs.get(TEXT_TOKENS_KEY) or ())
    return {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if not token.special and (token.content in listed or not token.content.strip(" \t\r\n▁"))
    }


def spelled_added_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Counter[str]:
    """For each added token that is not special, and each language code that stands before sources, how many texts
    spell it in the row's own pieces, where it stays text. That is right for `<table>`, and wrong for a word that was
    added to be used: such words belong under TEXT_TOKENS_KEY."""
    words = text_tokens(tokenizer) | set(tokenizer.all_special_tokens)
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.special]
    counts: Counter[str] = Counter()
    codes = codes_of(tokenizer)
    added += codes.spellings.values() if codes.layout == "source" else ()
    if not (added := [token for token in dict.fromkeys(added) if token not in words]):
        return counts
    pattern = _pattern(tuple(added))
    for text in texts:
        counts.update({spelled for piece in pieces(text)[::2] for spelled in pattern.findall(piece)})
    return counts


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id + 1. That is not len(tokenizer) where ids have gaps, or for M2M100's languages."""
    return 1 + max(*tokenizer.get_vocab().values(), *codes_of(tokenizer).tokens.values())


def vocabulary_sizes(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """`vocabulary_size` of the source's side and of the target's."""
    return vocabulary_size(source_side(tokenizer)), vocabulary_size(target_side(tokenizer))


def _around(tokenizer: PreTrainedTokenizerBase, side: str) -> tuple[list[int], list[int]]:
    """The special ids that the tokenizer puts before and after a text. `side` is the keyword of tokenizer(…), because
    multilingual tokenizers add others to `text_target`.

    ids  0 31 40 27 1        before [0]
    mask 1  0  0  0 1   →    after  [1]
    """
    encoded = tokenizer(
        **{side: [PROBE]},
        return_special_tokens_mask=True,
        return_attention_mask=False,
        truncation=False,
        verbose=False,
    )
    ids, mask = list(encoded["input_ids"][0]), list(encoded["special_tokens_mask"][0])
    if 0 not in mask:
        return [], ids
    return ids[: mask.index(0)], ids[len(mask) - mask[::-1].index(0) :]


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Every token that no field may spell, and its id."""
    words = text_tokens(tokenizer)
    control = {
        token.content: token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.content not in words
    }
    codes = codes_of(tokenizer)
    control |= {spelling: codes.tokens[code] for code, spelling in codes.spellings.items()}
    return control | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return set(_control_tokens(tokenizer).values())


def _contents(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    for text in texts:
        check_characters(text)
        if broken := broken_character(text):
            raise UserError(f"a text holds {broken} Take it out. The text: {excerpt(text)}")
    control = _control_tokens(tokenizer)
    pattern = _pattern(tuple(control))
    if not tokenizer.is_fast:
        return _python_contents(tokenizer, texts, control, pattern)
    renamed, spelled = _renamed(tokenizer, tuple(control.items())), [_spell(text, pattern) for text in texts]

    def added() -> str:
        found = sorted({token.content for token in tokenizer.added_tokens_decoder.values() if not token.special})
        return f" (its added tokens are no words of text: {', '.join(map(repr, found[:20])) or 'there are none'})"

    remedy = f"If an added token is to be a word of text, list it in tokenizer_config.json under {TEXT_TOKENS_KEY}."
    with library_errors(f"the tokenizer cannot write one of {len(texts):,} texts", remedy, added):
        return [encoding.ids for encoding in renamed.encode_batch_fast(spelled, add_special_tokens=False)]


@functools.lru_cache(maxsize=16)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern:
    """The longest token wins where several begin, as it does in tokenizers."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))


def field_contents(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts that are parts of sources, without special tokens around them."""
    return _contents(source_side(tokenizer), texts) if texts else []


def _spell(text: str, pattern: re.Pattern) -> str:
    """The text in which the template's own control tokens have their other names."""
    parts = pieces(text)
    parts[1::2] = [_spell_frame(piece, pattern) for piece in parts[1::2]]
    return "".join(parts)


@functools.lru_cache(maxsize=1024)
def _spell_frame(piece: str, pattern: re.Pattern) -> str:
    return pattern.sub(lambda match: UNSPELLABLE + match[0], piece)


@functools.lru_cache(maxsize=4)
def _renamed(tokenizer: PreTrainedTokenizerBase, control: tuple[tuple[str, int], ...]) -> tokenizers.Tokenizer:
    """The tokenizer with the same ids, and with names of control tokens that no text can spell."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    name_of = {token_id: UNSPELLABLE + token for token, token_id in control}
    model, vocab = backend["model"], backend["model"]["vocab"]
    if isinstance(vocab, list):  # Unigram: [piece, score] at the place of its id
        model["vocab"] = [[name_of.get(place, piece), score] for place, (piece, score) in enumerate(vocab)]
        renamed = {piece: name_of[place] for place, (piece, _) in enumerate(vocab) if place in name_of}
    else:
        model["vocab"] = {name_of.get(token_id, piece): token_id for piece, token_id in vocab.items()}
        renamed = {piece: name_of[token_id] for piece, token_id in vocab.items() if token_id in name_of}
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    if "merges" in model:  # none may build a control token from its characters
        model["merges"] = [merge for merge in model["merges"] if renamed.keys().isdisjoint(_parts(merge))]
    for token in backend["added_tokens"]:
        if token["id"] in name_of:  # not normalized, because some normalizers delete noncharacters
            token |= {"content": name_of[token["id"]], "normalized": False}
    backend["post_processor"] = backend["truncation"] = backend["padding"] = None
    return tokenizers.Tokenizer.from_str(json.dumps(backend))


def _parts(merge: str | list[str]) -> tuple[str, str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right, left + right


def _python_contents(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], control: dict[str, int], pattern: re.Pattern
) -> list[list[int]]:
    """ByT5, M2M100, Marian: the text between control tokens and added words goes to `tokenize`, which knows
    neither."""
    words = {token: tokenizer.convert_tokens_to_ids(token) for token in text_tokens(tokenizer)}
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    word_pattern = _pattern(tuple(words)) if words else None
    control_ids = set(control.values()) - {tokenizer.unk_token_id}

    def segments(text: str) -> list[str | int]:
        """Texts, and the ids of the template's control tokens and of words that were added."""
        found: list[str | int] = []
        for place, piece in enumerate(pieces(text)):
            is_frame = place % 2 == 1
            for part in _cut(piece, pattern if is_frame else None):
                if is_frame and part in control:
                    found.append(control[part])
                elif found and isinstance(found[-1], str):  # no token stands between: they are encoded together
                    found[-1] += part
                else:
                    found.append(part)
        for place, segment in enumerate(found):  # some tokens take the blanks beside them
            if isinstance(segment, str):
                before = added.get(tokenizer.convert_ids_to_tokens(found[place - 1])) if place else None
                after = added.get(tokenizer.convert_ids_to_tokens(found[place + 1])) if found[place + 1 :] else None
                segment = segment.lstrip() if before and before.rstrip else segment
                found[place] = segment.rstrip() if after and after.lstrip else segment
        return [
            words.get(part, part) if isinstance(part, str) else part
            for segment in found
            for part in (_cut(segment, word_pattern) if isinstance(segment, str) else [segment])
        ]

    def ids(segment: str | int) -> list[int]:
        if isinstance(segment, int):
            return [segment]
        pieces = tokenizer.tokenize(segment, split_special_tokens=True) if segment else []
        return [token_id for piece in pieces for token_id in _text_ids(tokenizer, piece, control_ids)]

    return [[token_id for segment in segments(text) for token_id in ids(segment)] for text in texts]


def _cut(text: str, pattern: re.Pattern | None) -> list[str]:
    """`a<x>b` → `a`, `<x>`, `b`: the matches of the pattern, and the texts between them."""
    if pattern is None:
        return [text]
    ends = [0, *(end for match in pattern.finditer(text) for end in match.span()), len(text)]
    return [text[start:end] for start, end in zip(ends, ends[1:], strict=False) if start < end]


def _text_ids(tokenizer: PreTrainedTokenizerBase, piece: str, control_ids: set[int]) -> list[int]:
    """The id of a piece of text; where the piece is a control token, the ids of its characters."""
    token_id = tokenizer.convert_tokens_to_ids(piece)
    if token_id not in control_ids:
        return [token_id]
    ids = [tokenizer.convert_tokens_to_ids(character) for character in piece]
    return [tokenizer.unk_token_id if token_id in control_ids else token_id for token_id in ids]
