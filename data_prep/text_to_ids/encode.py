"""From rendered texts to token ids, for any tokenizer, such that text is always text.

    split_sources(tokenizer, ["Go.", "a </s> b"])    each an Encoding: what the tokenizer puts before, text, and after
    split_targets(tokenizer, ["가."], ["kor_Hang"])   Encoding([kor_Hang], [632, 17], [</s>]); the last one is eos
    split_sources(nllb, ["가."], languages=[Languages("kor_Hang", "eng_Latn")])    Encoding([kor_Hang], …, [</s>])
    fit(encoding, 512, "drop")                       its ids, or None where they are more than 512

Control tokens come from the tokenizer and from the template, never from the fields of a row: where a text holds the
characters `</s>`, it gets tokens of these characters. Control tokens are all special ones and all added ones, but for
those that are words of text (`text_tokens`). A text from a template is `Rendered`: it knows which of its pieces are
the template's own, and `<extra_id_0>` in one of these is that token. A plain str holds no control token at all.

transformers' `split_special_tokens=True` is not enough for that. Unigram tokenizers (T5, mT5, mBART, XLM-R) keep
`</s>` among the words of the model itself, where the best way to write the text `</s>` is the word `</s>`: a T5
tokenizer still gave the eos id in the middle of `"a </s> b"` (transformers 5.23). So everything is encoded by a copy
of the tokenizer in which each control token has another name, one that begins with a character that no text may hold.
What cannot be spelled cannot come out, and the frame's own tokens are spelled by these names. The copy encodes 40,000
pairs of short sentences a second on one core, `tokenizer(texts)` 20,000, with the same ids.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import tokenizers

from diptych.data_prep.command_line.errors import UserError, nearest
from diptych.data_prep.rows.records import broken_character
from diptych.data_prep.text_to_ids.languages import Languages, codes_of, own_languages
from diptych.data_prep.text_to_ids.two_vocabularies import source_side, target_side

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from diptych.data_prep.text_to_ids.templates import Template

FRAME_MARK = "\U0010fffe"
"""Stands before and after each piece of a rendered text that is the template's own, in `Rendered.marked`."""
UNSPELLABLE = "\U0010ffff"
"""The first character of each control token's other name. Both are noncharacters: Unicode promises that they stand in
no text, and a text in which they do stand is refused."""

PROBE = "a. 1"
"""A text that shows what a tokenizer puts around it."""
TEXT_TOKENS_KEY = "diptych_text_tokens"
"""The key in tokenizer_config.json under which a vocabulary that was extended lists its new words of text."""

Treatment = Literal["error", "drop", "cut"]


class Rendered(str):
    """A rendered text as a person reads it, which knows which of its pieces are the template's own.

    Rendered("⟨FRAME_MARK⟩Fill: ⟨FRAME_MARK⟩a </s> b") == "Fill: a </s> b"

    It survives pickling, but not a file or a table: there, keep `marked(text)`, and make `from_marked` of it.
    """

    marked: str

    def __new__(cls, marked: str) -> Rendered:
        text = super().__new__(cls, marked.replace(FRAME_MARK, ""))
        text.marked = marked
        return text

    def __reduce__(self) -> tuple[type[Rendered], tuple[str]]:
        return Rendered, (self.marked,)


def marked(text: str) -> str:
    """The text with its marks, if it has any, for a file or a table."""
    return text.marked if isinstance(text, Rendered) else text


def from_marked(text: str) -> str:
    """What `marked` was made of. Only for texts of one's own: a mark that a stranger wrote would be believed."""
    return Rendered(text) if FRAME_MARK in text else text


class Encoding(NamedTuple):
    """One encoded text. Only `content` comes from the text; the rest is the tokenizer's own, language codes, and what
    a template's `decoder_prefix` names."""

    prefix: list[int]
    content: list[int]
    suffix: list[int]

    @property
    def token_count(self) -> int:
        return len(self.prefix) + len(self.content) + len(self.suffix)

    def ids(self, max_tokens: int | None = None, end_after_cut: bool = True) -> list[int]:
        """All ids; where they are too many, the end of the content goes, never the special tokens.

        Without `end_after_cut`, what was cut ends where it was cut: its suffix, which says that it is over, goes too.
        """
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


def fit(
    encoding: Encoding, max_tokens: int, treatment: Treatment = "drop", end_after_cut: bool = True
) -> list[int] | None:
    """The ids of an encoding; where they are more than `max_tokens`: None to drop it, less of its text, or UserError.

    A source that is cut keeps the tokenizer's last tokens; one from a template had better be `shortened` before, which
    keeps the template's last words too. A target should keep its end only if the user says so (`end_after_cut`): from
    an eos in the middle of a sentence a model learns to stop there.
    """
    if encoding.token_count <= max_tokens or treatment == "cut":
        return encoding.ids(max_tokens, end_after_cut)
    if treatment == "drop":
        return None
    raise UserError(
        f"it has {encoding.token_count:,} tokens, and the limit is {max_tokens:,}. Raise the limit, or have longer"
        f" rows dropped or cut."
    )


def shortened(
    tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int, languages: Languages | None = None
) -> str:
    """A rendered source with less of its longest fields, such that it has at most `max_tokens`, special ones included.

    What a template says after the fields (`### Response:`) stays: without it a model would not know what to do. All
    fields are cut to one length, so that a short instruction stays whole beside a long text. Where the template alone
    is too long, the fields come out empty.
    """
    tokenizer = source_side(tokenizer)
    around = sum(map(len, _around_source(tokenizer, languages or own_languages(tokenizer))))
    pieces = _pieces(text)

    def cut(length: int) -> Rendered:
        return Rendered(FRAME_MARK.join(it if place % 2 else it[:length] for place, it in enumerate(pieces)))

    def tokens(length: int) -> int:
        return around + len(_contents(tokenizer, [cut(length)])[0])

    return cut(_longest_that_fits(tokens, max(map(len, pieces[::2])), max_tokens))


def _longest_that_fits(tokens: Callable[[int], int], length: int, most: int) -> int:
    """The largest number of characters, at most `length`, of which `tokens` makes at most `most`; 0 where none is.

    Tokens are nearly proportional to characters: each other try lies on the line between the two last ones, so that a
    long text takes five or so.
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
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_source_tokens: int | None = None,
    languages: Sequence[Languages] | None = None,
) -> list[list[int]]:
    """`input_ids` of each text, with the special tokens that the tokenizer gives to sources."""
    return [encoding.ids(max_source_tokens) for encoding in split_sources(tokenizer, texts, languages)]


def encode_targets(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_target_tokens: int | None = None,
    decoder_prefix: Sequence[str] = (),
    languages: Sequence[Languages] | None = None,
) -> list[list[int]]:
    """`labels` of each text, with the special tokens that the tokenizer gives to targets; the last one is eos."""
    return [encoding.ids(max_target_tokens) for encoding in split_targets(tokenizer, texts, decoder_prefix, languages)]


def encode_examples(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    sources: Sequence[str],
    targets: Sequence[str],
    languages: Sequence[Languages] | None = None,
) -> tuple[list[Encoding], list[Encoding]]:
    """What the template rendered, encoded: sources, and targets that begin with its decoder prefix."""
    encoded_targets = split_targets(tokenizer, targets, template.decoder_prefix, languages)
    return split_sources(tokenizer, sources, languages), encoded_targets


def split_sources(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], languages: Sequence[Languages] | None = None
) -> list[Encoding]:
    """`languages` are those of each text, as `resolved` gives them; the tokenizer's own unless given."""
    if not texts:
        return []
    tokenizer = source_side(tokenizer)
    around = _language_cache(lambda of_row: _around_source(tokenizer, of_row), tokenizer, texts, languages)
    contents = _contents(tokenizer, texts)
    return [Encoding(before, content, after) for (before, after), content in zip(around, contents, strict=True)]


def split_targets(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    decoder_prefix: Sequence[str] = (),
    languages: Sequence[Languages] | None = None,
) -> list[Encoding]:
    """Some tokenizers put nothing after a target, mBART puts a language code after eos: generation must end at eos."""
    tokenizer = target_side(tokenizer)
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError("the tokenizer has no eos token, and a target must end in one. Set tokenizer.eos_token first.")
    if not texts:
        return []
    own_suffix = [] if codes_of(tokenizer).is_around_texts else _around(tokenizer, "text_target")[1]
    suffix = [*_before(eos, own_suffix), eos]
    before = _language_cache(
        lambda of_row: label_prefix(tokenizer, decoder_prefix, of_row), tokenizer, texts, languages
    )
    contents = _contents(tokenizer, texts)
    return [Encoding(prefix, content, suffix) for prefix, content in zip(before, contents, strict=True)]


def _language_cache(
    of_languages: Callable[[Languages], Any],
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    languages: Sequence[Languages] | None,
) -> list[Any]:
    """What stands around each text, asked once for each direction."""
    languages = [own_languages(tokenizer)] * len(texts) if languages is None else languages
    found = {of_row: of_languages(of_row) for of_row in dict.fromkeys(languages)}
    return [found[of_row] for of_row in languages]


def _around_source(tokenizer: PreTrainedTokenizerBase, languages: Languages) -> tuple[list[int], list[int]]:
    """What stands before and after a source: the tokenizer's own, with the codes of the row."""
    codes = codes_of(tokenizer)
    before, after = _around(tokenizer, "text")
    if codes.layout == "source" and languages.target:
        # The tokenizer itself puts it there, as MADLAD's may have a blank before it.
        own, told = (
            list(tokenizer(f"{spelling}{PROBE}", truncation=False, verbose=False)["input_ids"])
            for spelling in ("", f"{codes.spellings[languages.target]} ")
        )
        rest = own[len(before) :]
        is_as_expected = told[len(told) - len(rest) :] == rest and codes.tokens[languages.target] in told
        before = told[: len(told) - len(rest)] if is_as_expected else [codes.tokens[languages.target], *before]
    if not codes.is_around_texts or not languages.source:
        return before, after
    own = tokenizer.convert_tokens_to_ids(codes.spellings.get(tokenizer.src_lang, tokenizer.src_lang))
    wanted = codes.tokens[languages.source]
    return tuple([wanted if token == own else token for token in side] for side in (before, after))


def label_prefix(
    tokenizer: PreTrainedTokenizerBase, decoder_prefix: Sequence[str], languages: Languages | None = None
) -> list[int]:
    """What each target begins with: the tokenizer's own (BART `<s>`), its language code, and `decoder_prefix`.

    A template that names a decoder prefix says which language is written, so the tokenizer's own code gives way to it.
    """
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
    """The added tokens that are text like any other: blanks, and those that the tokenizer's config lists as words."""
    listed = set(tokenizer.init_kwargs.get(TEXT_TOKENS_KEY) or ())
    return {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if not token.special and (token.content in listed or not token.content.strip(" \t\r\n▁"))
    }


def spelled_added_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Counter[str]:
    """For each added token that is not special, and for each language code that stands before sources, how many texts
    spell it outside of the template's own pieces.

    They stay text, which is right for `<table>` and surprising for a word that was added to be used: add_tokens does
    not say which it is. Words that are to be used belong under TEXT_TOKENS_KEY.
    """
    words = text_tokens(tokenizer) | set(tokenizer.all_special_tokens)
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.special]
    counts: Counter[str] = Counter()
    codes = codes_of(tokenizer)
    added += codes.spellings.values() if codes.layout == "source" else ()
    if not (added := [token for token in dict.fromkeys(added) if token not in words]):
        return counts
    pattern = _pattern(tuple(added))
    for text in texts:
        counts.update({spelled for piece in _pieces(text)[::2] for spelled in pattern.findall(piece)})
    return counts


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id, which is not len(tokenizer) where ids have gaps, or where M2M100 has its languages
    beyond its vocabulary."""
    return 1 + max(*tokenizer.get_vocab().values(), *codes_of(tokenizer).tokens.values())


def vocabulary_sizes(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """`vocabulary_size` of the source's side and of the target's."""
    return vocabulary_size(source_side(tokenizer)), vocabulary_size(target_side(tokenizer))


def _before(eos: int, suffix: list[int]) -> list[int]:
    return suffix[: suffix.index(eos)] if eos in suffix else suffix


def _around(tokenizer: PreTrainedTokenizerBase, side: str) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text. `side` is the keyword of tokenizer(…): multilingual tokenizers
    add other special tokens to `text_target`.

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
        if UNSPELLABLE in text or FRAME_MARK in text:
            raise UserError(
                f"a text holds U+10FFFE or U+10FFFF, which are no characters. Remove them. The text: {text[:200]!r}"
            )
        if broken := broken_character(text):
            raise UserError(f"a text holds {broken} Take it out. The text: {text[:200]!r}")
    control = _control_tokens(tokenizer)
    pattern = _pattern(tuple(control))
    if not tokenizer.is_fast:
        return _python_contents(tokenizer, texts, control, pattern)
    renamed, spelled = _renamed(tokenizer, tuple(control.items())), [_spell(text, pattern) for text in texts]
    try:
        return [encoding.ids for encoding in renamed.encode_batch_fast(spelled, add_special_tokens=False)]
    except Exception as error:  # the type of all that tokenizers raises
        added = sorted({token.content for token in tokenizer.added_tokens_decoder.values() if not token.special})
        raise UserError(
            f"the tokenizer cannot write one of {len(texts):,} texts: {error}. Its added tokens are no words of text"
            f" ({', '.join(map(repr, added[:20])) or 'there are none'}); if one of them is to be one, list it in"
            f" tokenizer_config.json under {TEXT_TOKENS_KEY}."
        ) from error


@functools.lru_cache(maxsize=16)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern:
    """The longest token wins where several begin, as it does in tokenizers."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))


def _pieces(text: str) -> list[str]:
    """Field, frame, field, frame … field; a str that is not Rendered is one field."""
    return text.marked.split(FRAME_MARK) if isinstance(text, Rendered) else [text]


def fields_in(text: str) -> list[str]:
    """What a rendered text has of the row, without what the template says."""
    return [piece for piece in _pieces(text)[::2] if piece]


def field_contents(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts that are parts of sources, with nothing before and after."""
    return _contents(source_side(tokenizer), texts) if texts else []


def _spell(text: str, pattern: re.Pattern) -> str:
    """The text in which the template's own control tokens have their other names."""
    pieces = _pieces(text)
    frames = [_spell_frame(piece, pattern) for piece in pieces[1::2]]
    if frames == pieces[1::2]:
        return str(text)
    pieces[1::2] = frames
    return "".join(pieces)


@functools.lru_cache(maxsize=1024)
def _spell_frame(piece: str, pattern: re.Pattern) -> str:
    return pattern.sub(lambda match: UNSPELLABLE + match[0], piece)


@functools.lru_cache(maxsize=4)
def _renamed(tokenizer: PreTrainedTokenizerBase, control: tuple[tuple[str, int], ...]) -> tokenizers.Tokenizer:
    """The same tokenizer with the same ids, its control tokens renamed to what no text can spell."""
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
        if token["id"] in name_of:  # not normalized: some normalizers delete what is no character
            token |= {"content": name_of[token["id"]], "normalized": False}
    backend["post_processor"] = backend["truncation"] = backend["padding"] = None
    return tokenizers.Tokenizer.from_str(json.dumps(backend))


def _parts(merge: str | list[str]) -> tuple[str, str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right, left + right


def _python_contents(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], control: dict[str, int], pattern: re.Pattern
) -> list[list[int]]:
    """ByT5, M2M100, Marian: what is between added tokens goes to the model alone, which knows no added tokens."""
    words = {token: tokenizer.convert_tokens_to_ids(token) for token in text_tokens(tokenizer)}
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    word_pattern = _pattern(tuple(words)) if words else None
    control_ids = set(control.values()) - {tokenizer.unk_token_id}

    def segments(text: str) -> list[str | int]:
        """Texts, and the ids of the template's control tokens and of words that were added."""
        found: list[str | int] = []
        for place, piece in enumerate(_pieces(text)):
            is_frame = place % 2 == 1
            for part in _cut(piece, pattern if is_frame else None):
                if is_frame and part in control:
                    found.append(control[part])
                    continue
                if found and isinstance(found[-1], str):  # what has no token in between is encoded together
                    part = found.pop() + part
                found.append(part)
        for place, segment in enumerate(found):  # as a tokenizer does where a token takes the blanks beside it
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
    """`a<x>b` → `a`, `<x>`, `b`: matches of the pattern apart from what lies between."""
    if pattern is None:
        return [text]
    ends = [0, *(end for match in pattern.finditer(text) for end in match.span()), len(text)]
    return [text[start:end] for start, end in zip(ends, ends[1:], strict=False) if start < end]


def _text_ids(tokenizer: PreTrainedTokenizerBase, piece: str, control_ids: set[int]) -> list[int]:
    """The ids of a piece of text by the model's own vocabulary; a piece that is a control token, by its characters."""
    token_id = tokenizer.convert_tokens_to_ids(piece)
    if token_id not in control_ids:
        return [token_id]
    ids = [tokenizer.convert_tokens_to_ids(character) for character in piece]
    return [tokenizer.unk_token_id if token_id in control_ids else token_id for token_id in ids]
