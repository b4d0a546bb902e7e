"""Trained tokenizers give every text back exactly, also after they were saved and loaded."""

import json
import random
import unicodedata

import pytest
from transformers import AutoTokenizer

from diptych.data_prep.records import UserError
from diptych.data_prep.train_tokenizer import EVERY_BYTE, train_tokenizer

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
    with pytest.raises(UserError, match="vocab_size is 100; bytes and special tokens alone are 259"):
        train_tokenizer("bpe", ["a"], 100)
