"""Trained tokenizers give every text back exactly, also after they were saved and loaded."""

import json
import random
import unicodedata

import pytest
from transformers import AutoTokenizer

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.text_to_ids import train_tokenizer as train_tokenizer_module
from diptych.data_prep.text_to_ids.train_tokenizer import (
    CURVE_SIZES,
    EVERY_BYTE,
    curve_vocab_size,
    is_held_out,
    train_tokenizer,
)

TEXTS = {
    "hangul composed": "안녕하세요, 각하!",
    "hangul decomposed": unicodedata.normalize("NFD", "안녕하세요, 각하!"),
    "emoji": "👩‍👩‍👧‍👦 🙂 🇰🇷 café é",
    "spaces": "  two before, two  between, two after  ",
    "code": "def f(x):\n\tif x:\r\n        return  {'a': [1,2]}  # </s>\n\n",
    "controls": "\x00\x01\x7f\u2028\ufeff\u200b\U0010fffd",
    "punctuation": "don 't , n't . ! ?",  # what clean_up_tokenization_spaces would close up
    "empty": "",
}


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request, sentences, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    train_tokenizer(request.param, sentences, 1500).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", TEXTS)
def test_text_comes_back_exactly(trained, name):
    ids = trained(TEXTS[name], split_special_tokens=True)["input_ids"]
    assert ids[-1] == trained.eos_token_id
    assert trained.decode(ids[:-1]) == TEXTS[name]
    assert trained.decode(ids, skip_special_tokens=True) == TEXTS[name]


def test_all_shipped_korean_comes_back_exactly(trained, pairs):
    texts = [korean for _, korean in pairs]
    decoded = trained.batch_decode(trained(texts)["input_ids"], skip_special_tokens=True)
    assert decoded == texts


def test_random_unicode_comes_back_exactly(trained):
    draw = random.Random(0)
    for _ in range(200):
        codes = (
            draw.choice([draw.randrange(0x80), draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)])
            for _ in "x" * 30
        )
        text = "".join(map(chr, codes))
        assert trained.decode(trained(text, split_special_tokens=True)["input_ids"][:-1]) == text


def test_special_tokens_are_set_and_survive_saving(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for tokenizer in (trained, again):
        assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<pad>", "</s>", "<s>")
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
        assert tokenizer.clean_up_tokenization_spaces is False
        assert set(tokenizer("Go.")) == {"input_ids", "attention_mask"}  # generate() refuses token_type_ids
        assert tokenizer("Go.")["input_ids"][-1] == tokenizer(text_target="가.")["input_ids"][-1] == 1
    assert again.get_vocab() == trained.get_vocab()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_twice_gives_the_same_tokenizer(kind, sentences):
    first, second = (train_tokenizer(kind, sentences, 1500).backend_tokenizer.to_str() for _ in range(2))
    assert json.loads(first) == json.loads(second)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("texts", [[], ["a"], ["가"] * 3], ids=["none", "one letter", "one syllable"])
def test_the_smallest_data_still_gives_a_tokenizer_for_all_texts(kind, texts):
    tokenizer = train_tokenizer(kind, texts, 8000)
    assert len(tokenizer) < 300
    assert tokenizer.decode(tokenizer("안녕 🙂 x")["input_ids"][:-1]) == "안녕 🙂 x"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_vocabulary_is_as_large_as_asked_where_data_allows(kind, sentences):
    assert len(train_tokenizer(kind, sentences, 1200)) == 1200


def test_every_byte_is_every_byte_that_utf8_has():
    never = {0xC0, 0xC1, *range(0xF5, 0x100)}
    assert set("".join(EVERY_BYTE).encode()) == set(range(256)) - never


def test_a_wrong_kind_or_size_is_a_user_error():
    with pytest.raises(UserError, match="'bpq'; it can be bpe or unigram"):
        train_tokenizer("bpq", ["a"], 1000)
    with pytest.raises(UserError, match="vocab_size is 100,000,000,000; 10,000,000 tokens are the most"):
        train_tokenizer("bpe", [], 10**11)
    with pytest.raises(UserError, match="vocab_size is 100; bytes and special tokens alone are 259"):
        train_tokenizer("bpe", ["a"], 100)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_curve_ends_where_doubling_saves_too_little(kind, sentences):
    size, curve = curve_vocab_size(kind, lambda: iter(sentences), least_saving=0.1)
    assert curve_vocab_size(kind, lambda: iter(sentences), least_saving=0.1) == (size, curve)
    assert [point.vocab_size for point in curve] == list(CURVE_SIZES[: len(curve)])
    for before, after in zip(curve, curve[1:], strict=False):
        assert after.saving == pytest.approx(1 - after.tokens_per_word / before.tokens_per_word)
        assert after.saving == pytest.approx(1 - before.bytes_per_token / after.bytes_per_token)
    assert all(point.saving >= 0.1 for point in curve[1:] if point.vocab_size <= size)
    assert size == curve[-1].vocab_size or curve[-1].saving < 0.1


def test_a_smaller_least_saving_gives_no_smaller_vocabulary(pairs):
    texts = [text for pair in pairs for text in pair]
    sizes = [curve_vocab_size("bpe", lambda: texts, least_saving)[0] for least_saving in (0.3, 0.1, 0.05)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_the_curve_of_much_text_is_drawn_on_a_part(sentences, monkeypatch):
    monkeypatch.setattr(train_tokenizer_module, "CURVE_CHARACTERS", sum(map(len, sentences)) // 4)
    learned, measured = train_tokenizer_module._sample(lambda: iter(sentences))
    part = sum(map(len, [*learned, *measured])) / sum(map(len, sentences))
    assert 0.15 < part < 0.35 and len(measured) > 3
    assert all(map(is_held_out, measured)) and not any(map(is_held_out, learned))


def test_a_curve_needs_text():
    with pytest.raises(UserError, match="no text to choose a vocabulary size by"):
        curve_vocab_size("bpe", lambda: [""])
