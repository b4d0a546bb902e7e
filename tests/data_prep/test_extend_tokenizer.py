"""Tokens added to tokenizers of every kind: text uses them, comes back as before, and nothing else is cut anew."""

import unicodedata

import pytest
from transformers import AutoTokenizer

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.text_to_ids.encode import split_sources, vocabulary_size
from diptych.data_prep.text_to_ids.extend_tokenizer import (
    NEW_TOKENS_KEY,
    add_language_codes,
    add_new_tokens,
    learn_new_tokens,
    pieces_of_new_tokens,
)
from diptych.data_prep.text_to_ids.languages import codes_of
from diptych.data_prep.tokenizer_tools.tokenizer_report import HARD_TEXTS, tokenizer_report

FAMILIES = ["diptych-bpe", "diptych-unigram", "t5", "mbart", "mbart50", "bart", "nllb", "gemma"]
LOSSLESS = ["diptych-bpe", "diptych-unigram", "bart", "gemma"]
TOKENS = 300


@pytest.fixture(scope="module")
def learned_texts(pairs):
    return [text for pair in pairs[600:2600] for text in pair]


@pytest.fixture(scope="module")
def unseen(pairs):
    return [text for pair in pairs[2600:] for text in pair]


@pytest.fixture(scope="module")
def extended_families(tokenizers_by_family, learned_texts, tmp_path_factory):
    """Each saved and loaded again, as `diptych train` gets it."""
    folder = tmp_path_factory.mktemp("extended")
    for name in FAMILIES:
        tokenizer = tokenizers_by_family[name]
        new = learn_new_tokens(tokenizer, lambda: iter(learned_texts), TOKENS)
        add_new_tokens(tokenizer, new).save_pretrained(folder / name)
    return {name: AutoTokenizer.from_pretrained(folder / name) for name in FAMILIES}


@pytest.fixture(params=FAMILIES)
def both(request, tokenizers_by_family, extended_families):
    return tokenizers_by_family[request.param], extended_families[request.param]


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def test_old_tokens_keep_their_ids_and_new_ones_come_after_them(both):
    tokenizer, extended = both
    new = pieces_of_new_tokens(extended)
    assert tokenizer.get_vocab().items() <= extended.get_vocab().items()
    assert sorted(new) == list(range(vocabulary_size(tokenizer), vocabulary_size(extended)))
    assert len(new) == TOKENS
    assert type(extended) is type(tokenizer)
    assert {i: str(t) for i, t in extended.added_tokens_decoder.items()} == {
        i: str(t) for i, t in tokenizer.added_tokens_decoder.items()
    }
    assert extended("Go.")["input_ids"][-1] == tokenizer("Go.")["input_ids"][-1]


def test_unseen_text_takes_fewer_tokens_and_uses_the_new_ones(both, unseen):
    tokenizer, extended = both
    before, after = (
        tokenizer_report(which, [("", text) for text in unseen])["total"] for which in (tokenizer, extended)
    )
    assert after["tokens"] < 0.9 * before["tokens"]
    assert after["exact_rate"] >= before["exact_rate"]
    used = {token for text in unseen for token in ids_of(extended, text)}
    assert len(used & set(pieces_of_new_tokens(extended))) > 0.8 * TOKENS


def test_new_tokens_written_as_their_old_pieces_are_the_old_cut(both, unseen):
    """So no word is cut at other places than before. Where characters were unknown, they are now known instead."""
    tokenizer, extended = both
    pieces = pieces_of_new_tokens(extended)
    texts = [text for text in unseen if "<unk>" not in tokenizer.convert_ids_to_tokens(ids_of(tokenizer, text))]
    same = [
        [old for token in ids_of(extended, text) for old in pieces.get(token, [token])] == ids_of(tokenizer, text)
        for text in texts
    ]
    assert sum(same) >= 0.99 * len(texts) > 300
    if type(tokenizer.backend_tokenizer.model).__name__ == "BPE":
        assert all(same)


@pytest.mark.parametrize("name", LOSSLESS)
def test_every_text_comes_back_exactly(name, extended_families, unseen):
    extended = extended_families[name]
    texts = [*unseen, *HARD_TEXTS.values()]
    texts += [unicodedata.normalize("NFD", text) for text in unseen]
    texts += [
        f"x{text}  {text}\n\t{text}" for text in unseen[:200]
    ]  # new tokens in the middle of words and after them
    for text in texts:
        assert extended.decode(ids_of(extended, text), clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("name", ["t5", "mbart", "mbart50", "nllb"])
def test_text_that_came_back_before_still_does(name, tokenizers_by_family, extended_families, unseen):
    tokenizer, extended = tokenizers_by_family[name], extended_families[name]
    texts = [*unseen, *(f"x{text} {text}" for text in unseen[:200]), *HARD_TEXTS.values()]
    came_back = [text for text in texts if tokenizer.decode(ids_of(tokenizer, text)) == text]
    assert len(came_back) > 300
    assert all(extended.decode(ids_of(extended, text)) == text for text in came_back)


def test_the_same_texts_give_the_same_tokens(tokenizers_by_family, learned_texts):
    tokenizer = tokenizers_by_family["t5"]
    first, second = (learn_new_tokens(tokenizer, lambda: iter(learned_texts), 100) for _ in range(2))
    assert first == second and list(first.pieces) == list(second.pieces)


def test_tokens_are_what_saves_most(tokenizers_by_family):
    """t5 cuts neither word into fewer than three; the frequent one becomes a token, the rare one stays as it is."""
    tokenizer = tokenizers_by_family["t5"]
    frequent, rare = "thermostat", "hippopotamus"
    assert len(ids_of(tokenizer, frequent)) > 2 and len(ids_of(tokenizer, rare)) > 2
    texts = [frequent] * 20 + [rare] * 4
    new = learn_new_tokens(tokenizer, lambda: texts, 100)
    assert f"▁{frequent}" in new.pieces
    extended = add_new_tokens(tokenizer, new)
    assert len(ids_of(extended, frequent)) == 1
    assert not any(piece.removeprefix("▁") and piece.removeprefix("▁") in rare for piece in new.pieces)


def test_characters_without_a_token_get_one(tokenizers_by_family):
    for name, old_pieces in (("gemma", 3), ("nllb", 1), ("t5", 1)):
        tokenizer = tokenizers_by_family[name]
        new = learn_new_tokens(tokenizer, lambda: ["쀍 쀍 x"] * 5, 10)
        assert len(new.pieces["쀍"]) == old_pieces
        extended = add_new_tokens(tokenizer, new)
        assert extended.decode(ids_of(extended, "x쀍 쀍")) == "x쀍 쀍"
        assert tokenizer.unk_token_id not in ids_of(extended, "쀍 쀍 x")


def test_control_tokens_stay_out_of_reach_of_text(both):
    """`</s>`, language codes and sentinels are in no new token, and no text is read as one of them."""
    tokenizer, extended = both
    texts = [f"a{token} {token}b" for token in map(str, tokenizer.added_tokens_decoder.values())] * 6
    control = set(tokenizer.added_tokens_decoder)
    new = learn_new_tokens(tokenizer, lambda: texts, 200, minimum_frequency=2)
    assert not any(control & set(ids) - {tokenizer.unk_token_id} for ids in new.pieces.values())
    assert not set(new.pieces) & set(tokenizer.get_vocab())
    for which in (extended, add_new_tokens(tokenizer, new)):
        for text in texts[:60]:
            content = set(split_sources(which, [text])[0].content)
            assert not control & content - {tokenizer.unk_token_id}


def test_extended_twice_keeps_all(tokenizers_by_family, extended_families, unseen):
    extended = extended_families["t5"]
    twice = add_new_tokens(extended, learn_new_tokens(extended, lambda: unseen, 50, minimum_frequency=2))
    assert extended.get_vocab().items() <= twice.get_vocab().items()
    first, both = pieces_of_new_tokens(extended), pieces_of_new_tokens(twice)
    assert len(both) == TOKENS + 50
    assert {token: both[token] for token in first} == first
    assert twice.init_kwargs[NEW_TOKENS_KEY] == {
        twice.convert_ids_to_tokens(token): list(old) for token, old in both.items()
    }


def test_little_text_gives_few_tokens_and_none_gives_none(tokenizers_by_family):
    tokenizer = tokenizers_by_family["bart"]
    assert learn_new_tokens(tokenizer, lambda: [], 100).pieces == {}
    assert learn_new_tokens(tokenizer, lambda: ["thermostat"] * 4, 100).pieces == {}
    assert 0 < len(learn_new_tokens(tokenizer, lambda: ["thermostat"] * 5, 100).pieces) < 10


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("byt5", r"ByT5Tokenizer\) is written in Python, and its vocabulary cannot be extended"),
        ("m2m100", r"M2M100Tokenizer\) is written in Python"),
        ("bert", "is WordPiece, and its vocabulary cannot be extended. Use a checkpoint"),
    ],
)
def test_what_cannot_be_extended_is_refused(name, message, tokenizers_by_family):
    with pytest.raises(UserError, match=message):
        learn_new_tokens(tokenizers_by_family[name], lambda: ["a"], 10)


@pytest.mark.parametrize("family, new, like", [("nllb", "jje_Hang", "ko"), ("mbart50", "jj_KR", "ko_KR")])
def test_a_new_language_code_stands_where_codes_stand_and_starts_as_one_that_it_is_like(
    family, new, like, tokenizers_by_family, learned_texts, tmp_path
):
    tokenizer = tokenizers_by_family[family]
    with_code = add_language_codes(tokenizer, {new: like})
    tokens = learn_new_tokens(with_code, lambda: iter(learned_texts), 20)
    add_new_tokens(with_code, tokens).save_pretrained(tmp_path)
    extended, before = AutoTokenizer.from_pretrained(tmp_path), codes_of(tokenizer)
    code = codes_of(extended).tokens[new]
    assert code == vocabulary_size(tokenizer) and codes_of(extended).layout == before.layout
    assert pieces_of_new_tokens(extended)[code] == [before.tokens[before.find(like)]]
    assert tokenizer.get_vocab().items() <= extended.get_vocab().items()
    extended.src_lang = new
    ids = extended(learned_texts[0])["input_ids"]
    assert ids[0] == code and extended.decode(ids, skip_special_tokens=True) == learned_texts[0]
    with pytest.raises(UserError, match=f"{new}, which is a code of this tokenizer already"):
        add_language_codes(extended, {new: like})


@pytest.mark.parametrize(
    "family, alike, message",
    [
        ("t5", {"jje_Hang": "kor_Hang"}, "this tokenizer has no language codes"),
        ("nllb", {"jje_Hang": "xxx_Yyyy"}, "'xxx_Yyyy' is no language code of this tokenizer"),
        ("nllb", {"Jeju!": "kor_Hang"}, "does not read as a language code. Write it like kor_Hang"),
    ],
)
def test_codes_that_cannot_be_added_are_refused(family, alike, message, tokenizers_by_family):
    with pytest.raises(UserError, match=message):
        add_language_codes(tokenizers_by_family[family], alike)
