"""Text is always text: with tokenizers of every family, nothing that a row holds becomes a control token."""

import pytest
from transformers import AutoTokenizer

from diptych.data_prep.encode import encode_sources, encode_targets, split_sources, split_targets
from diptych.data_prep.records import UserError

FAMILIES = (
    "diptych-bpe diptych-unigram t5 mbart mbart50 bart nllb gemma bert byt5 m2m100".split()
)  # as in conftest.tokenizers_by_family
SPELLED = "a </s> b <pad> <s>[SEP][CLS] <extra_id_1> <unk> [UNK] ko_KR __ko__ <eos><bos> kor_Hang </s>"


@pytest.fixture(params=FAMILIES)
def tokenizer(request, tokenizers_by_family):
    return tokenizers_by_family[request.param]


def control_ids(tokenizer):
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special | set(tokenizer.all_special_ids)


@pytest.mark.parametrize("split", [split_sources, split_targets])
def test_spelled_special_tokens_never_become_control_tokens(tokenizer, split):
    for encoding in split(tokenizer, [SPELLED, "</s>", "</s></s>", " <pad>", tokenizer.eos_token, "ordinary"]):
        assert (control_ids(tokenizer) - {tokenizer.unk_token_id}).isdisjoint(encoding.content)


@pytest.mark.parametrize("family", ["diptych-bpe", "diptych-unigram", "bart", "byt5"])
def test_spelled_special_tokens_come_back_as_the_text_they_were(family, tokenizers_by_family):
    tokenizer = tokenizers_by_family[family]
    content = split_targets(tokenizer, [SPELLED])[0].content
    assert tokenizer.decode(content) == SPELLED


def test_split_special_tokens_alone_would_let_the_end_token_through(tokenizers_by_family):
    """Why encode.py does more: if this fails one day, transformers or tokenizers has mended it."""
    t5 = tokenizers_by_family["t5"]
    assert t5("a </s> b", split_special_tokens=True)["input_ids"].count(t5.eos_token_id) == 2
    assert encode_sources(t5, ["a </s> b"])[0].count(t5.eos_token_id) == 1


def test_ordinary_text_is_encoded_as_the_tokenizer_does(tokenizer, sentences):
    texts = sentences[:200]
    assert encode_sources(tokenizer, texts) == tokenizer(texts)["input_ids"]


def test_text_beside_a_spelled_special_token_is_encoded_as_ever(tokenizer):
    """The copy that cannot spell special tokens writes all other text as the tokenizer itself does."""
    alone = split_sources(tokenizer, ["I am a student. 나는 학생이다."])[0].content
    beside = split_sources(tokenizer, ["I am a student. 나는 학생이다. </s>"])[0].content
    assert beside[: len(alone)] == alone


def test_every_target_ends_in_its_only_eos(tokenizer, sentences):
    for ids in encode_targets(tokenizer, [*sentences[:50], SPELLED, ""]):
        assert ids[-1] == tokenizer.eos_token_id
        assert ids.count(tokenizer.eos_token_id) == 1


def test_the_special_tokens_that_a_tokenizer_adds_are_kept(tokenizers_by_family):
    def added(family, split):
        encoding = split(tokenizers_by_family[family], ["Go."])[0]
        names = tokenizers_by_family[family].convert_ids_to_tokens
        return names(encoding.prefix), names(encoding.suffix)

    assert added("bart", split_sources) == added("bart", split_targets) == (["<s>"], ["</s>"])
    assert added("t5", split_sources) == added("t5", split_targets) == ([], ["</s>"])
    assert added("mbart50", split_sources) == (["en_XX"], ["</s>"])
    assert added("mbart50", split_targets) == (["ko_KR"], ["</s>"])
    assert added("nllb", split_targets) == (["kor_Hang"], ["</s>"])
    assert added("m2m100", split_sources) == (["__en__"], ["</s>"])
    assert added("m2m100", split_targets) == (["__ko__"], ["</s>"])
    assert added("mbart", split_sources) == ([], ["</s>", "en_XX"])
    assert added("mbart", split_targets) == ([], ["</s>"])  # its own last token is the language, where eos has to be
    assert added("gemma", split_targets) == ([], ["<eos>"])  # it adds none


def test_a_cut_takes_the_end_of_the_text_and_no_special_token(tokenizer, sentences):
    text = " ".join(sentences[:40])
    for encode in (encode_sources, encode_targets):
        (whole,), (cut,) = encode(tokenizer, [text]), encode(tokenizer, [text], 12)
        assert len(cut) == 12
        split = (split_sources if encode is encode_sources else split_targets)(tokenizer, [text])[0]
        assert cut == [*split.prefix, *split.content[: 12 - len(split.prefix) - len(split.suffix)], *split.suffix]
        assert whole == [*split.prefix, *split.content, *split.suffix]


def test_a_text_as_long_as_the_limit_is_not_cut(tokenizers_by_family):
    tokenizer = tokenizers_by_family["diptych-bpe"]
    whole = encode_targets(tokenizer, ["안녕하세요"])[0]
    assert encode_targets(tokenizer, ["안녕하세요"], len(whole)) == [whole]


def test_a_limit_without_room_for_text_is_refused(tokenizers_by_family):
    with pytest.raises(UserError, match="leaves no room for text beside 2 special tokens"):
        encode_sources(tokenizers_by_family["bart"], ["Go."], 2)


def test_a_tokenizer_without_eos_is_refused(tokenizers_by_family, tmp_path):
    tokenizers_by_family["bart"].save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no eos token"):
        encode_targets(tokenizer, ["Go."])


def test_no_texts_are_no_ids(tokenizer):
    assert encode_sources(tokenizer, []) == encode_targets(tokenizer, []) == []


def test_a_word_added_later_is_seen(tokenizers_by_family, tmp_path):
    """The copy is made anew when the vocabulary has grown."""
    tokenizers_by_family["t5"].save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    encode_sources(tokenizer, ["x </s>"])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<new>"]})
    new_id = tokenizer.convert_tokens_to_ids("<new>")
    assert new_id not in encode_sources(tokenizer, ["x <new> </s>"])[0]
