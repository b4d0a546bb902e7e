"""The report counts what a person could count, for tokenizers of every kind, and says what does not come back."""

import json
import random

import pytest

from diptych.data_prep.tokenizer_tools.tokenizer_report import HARD_TEXTS, table_of, tokenizer_report

FAMILIES = "diptych-bpe diptych-unigram t5 mbart mbart50 bart nllb gemma bert byt5 m2m100".split()


@pytest.fixture(scope="module")
def languages(pairs):
    return {"Latin": [english for english, _ in pairs[:200]], "Hangul": [korean for _, korean in pairs[:200]]}


def test_figures_can_be_counted_by_hand(tokenizers_by_family):
    """byt5 writes one token for each byte: 6 for "Go now", 4 for "가!", of which the whole vocabulary uses 10."""
    report = tokenizer_report(tokenizers_by_family["byt5"], [("Latin", "Go now"), ("Hangul", "가!")])
    latin, hangul = report["languages"]["Latin"], report["languages"]["Hangul"]
    assert (latin["tokens"], latin["words"], latin["characters"], latin["bytes"]) == (6, 2, 6, 6)
    assert (latin["tokens_per_word"], latin["tokens_per_character"], latin["bytes_per_token"]) == (3, 1, 1)
    assert (hangul["tokens_per_word"], hangul["tokens_per_character"]) == (4, 2)
    assert report["total"]["tokens_per_word"] == 10 / 3
    distinct = len(set(b"Go now") | set("가!".encode()))
    assert report["vocabulary_used"] == {"tokens": distinct, "share": distinct / len(tokenizers_by_family["byt5"])}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_tokenizer_has_a_report_that_json_can_hold(name, tokenizers_by_family, languages):
    tokenizer = tokenizers_by_family[name]
    pairs = [(language, text) for language, texts in languages.items() for text in texts]
    random.Random(0).shuffle(pairs)
    report = tokenizer_report(tokenizer, iter(pairs))
    assert json.loads(json.dumps(report)) == report
    for language, figures in report["languages"].items():
        ids = tokenizer(languages[language], add_special_tokens=False)["input_ids"]
        assert figures["tokens"] == sum(map(len, ids))
        assert figures["texts"] == 200
    assert [hard["name"] for hard in report["hard_texts"]] == list(HARD_TEXTS)
    assert "Hangul" in table_of(report) and f"{len(tokenizer):,} tokens" in table_of(report)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_comes_back_is_told_from_what_does_not(name, tokenizers_by_family):
    report = tokenizer_report(tokenizers_by_family[name], [])
    exact = {hard["name"] for hard in report["hard_texts"] if hard["exact"]}
    if name in ("diptych-bpe", "diptych-unigram", "bart", "gemma", "byt5"):
        assert exact == set(HARD_TEXTS)
    else:
        assert not exact & {"newlines", "emoji joined", "Hangul decomposed"}
        changed = next(hard for hard in report["hard_texts"] if hard["name"] == "newlines")
        assert changed["decoded"] != changed["text"]
        assert f"newlines: {changed['text']!r} → {changed['decoded']!r}" in table_of(report)


@pytest.mark.parametrize("name", ["t5", "mbart50", "nllb", "bert"])
def test_unknown_tokens_are_counted(name, tokenizers_by_family):
    """mbart50's vocabulary here holds <unk> twice, and its model gives the one that the tokenizer does not name."""
    report = tokenizer_report(tokenizers_by_family[name], [("rare", "𠮷"), ("plain", "a")])
    assert report["languages"]["rare"]["unknown_rate"] > 0
    assert report["languages"]["plain"]["unknown_rate"] == 0
    assert report["languages"]["rare"]["exact_rate"] == 0


def test_no_text_gives_no_ratio(tokenizers_by_family):
    report = tokenizer_report(tokenizers_by_family["bart"], [("empty", ""), ("some", "a")])
    assert list(report["languages"]) == ["empty", "some"]
    assert report["languages"]["empty"]["tokens_per_word"] is None
    assert " - " in table_of(report)
