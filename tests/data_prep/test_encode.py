"""Text is always text: with tokenizers of every family, nothing that a row holds becomes a control token."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers
from transformers import AutoTokenizer

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.records import Origin, Record
from diptych.data_prep.text_to_ids.encode import (
    TEXT_TOKENS_KEY,
    Encoding,
    encode_sources,
    encode_targets,
    label_prefix,
    shortened,
    spelled_added_tokens,
    split_sources,
    split_targets,
    text_tokens,
)
from diptych.data_prep.text_to_ids.rendered_text import Rendered, from_marked, marked
from diptych.data_prep.text_to_ids.templates import TEMPLATES, Template

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
    assert added("mbart", split_targets) == (["ko_KR"], ["</s>"])  # not at the end, where eos has to be
    assert added("gemma", split_targets) == ([], ["<eos>"])  # it adds none


def test_a_cut_takes_the_end_of_the_text_and_no_special_token(tokenizer, sentences):
    text = " ".join(sentences[:40])
    for encode, split in ((encode_sources, split_sources), (encode_targets, split_targets)):
        (prefix, content, suffix), (cut,) = (
            split(tokenizer, [text])[0],
            [it.ids(12) for it in split(tokenizer, [text])],
        )
        assert cut == [*prefix, *content[: 12 - len(prefix) - len(suffix)], *suffix] and len(cut) == 12
        assert encode(tokenizer, [text]) == [[*prefix, *content, *suffix]]


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


ADDED = ["<table>", "낱말", "[USER]"]
TIGHT = Template(
    "tight", "{{ system }}{% for t in history %}{{ t[0] }}{{ t[1] }}{% endfor %}{{ instruction }}{{ input }}"
)
FRAMED = Template(
    "framed",
    "Sys<{{ system }}>{% for t in history %} {{ t[0] }} / {{ t[1] }} {% endfor %}| {{ instruction }} | {{ input }}",
    "Out: {{ output }}.",
)
FIELDS = ("instruction", "input", "output", "system", "first", "second")  # the last two are an earlier turn


@pytest.fixture(scope="session")
def grown_tokenizers(tokenizers_by_family, tmp_path_factory):
    """The same, with three added tokens that are not special, and one that is blank."""
    folder, grown = tmp_path_factory.mktemp("grown"), {}
    for name, tokenizer in tokenizers_by_family.items():
        tokenizer.save_pretrained(folder / name)
        grown[name] = AutoTokenizer.from_pretrained(folder / name)
        grown[name].add_tokens([*ADDED, "\n\n"])
    return grown


@pytest.fixture(params=FAMILIES)
def grown(request, grown_tokenizers):
    return grown_tokenizers[request.param]


def all_control_tokens(tokenizer):
    tokens = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
    return {token: token_id for token, token_id in tokens.items() if token.strip()}


def record_of(fields):
    fields = dict.fromkeys(FIELDS, "") | fields
    turn = (fields.pop("first"), fields.pop("second"))
    return Record(**fields, history=(turn,) if any(turn) else (), origin=Origin("a.jsonl", 1))


def control_ids_in(tokenizer, template, records):
    sources, targets = zip(*(template.render(record) for record in records), strict=True)
    control = set(all_control_tokens(tokenizer).values()) - {tokenizer.unk_token_id}
    encodings = split_sources(tokenizer, sources) + split_targets(tokenizer, targets)
    return [encoding for encoding in encodings if not control.isdisjoint(encoding.content)]


@pytest.mark.parametrize("template", [TIGHT, FRAMED, TEMPLATES["chat"]], ids=lambda template: template.name)
def test_no_special_or_added_token_in_any_field_becomes_a_control_token(grown, template):
    records = [
        record_of({field: text})
        for token in all_control_tokens(grown)
        for field in FIELDS
        for text in (token, f"a{token}", f"a {token} b")
    ]
    assert control_ids_in(grown, template, records) == []


@pytest.mark.parametrize("template", [TIGHT, FRAMED], ids=lambda template: template.name)
def test_no_token_that_is_split_over_two_fields_becomes_a_control_token(grown, template):
    neighbours = [("system", "first"), ("first", "second"), ("second", "instruction"), ("instruction", "input")]
    records = [
        record_of({left: "a " + token[:place], right: token[place:] + " b"})
        for token in all_control_tokens(grown)
        for left, right in neighbours
        for place in range(len(token) + 1)
    ]
    assert control_ids_in(grown, template, records) == []


def test_no_token_that_frame_and_field_spell_together_becomes_a_control_token(grown):
    for token in [grown.eos_token, *ADDED]:
        for place in range(1, len(token)):
            template = Template("half", token[:place] + "{{ instruction }}", "{{ output }}" + token[place:])
            record = record_of({"instruction": token[place:], "output": token[:place]})
            assert control_ids_in(grown, template, [record]) == []


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_text_around_any_tokens_becomes_no_control_token(grown_tokenizers, data):
    tokenizer = grown_tokenizers[data.draw(st.sampled_from(FAMILIES))]
    characters = st.characters(exclude_categories=("Cs", "Cn"))
    parts = st.one_of(st.text(characters, max_size=4), st.sampled_from(sorted(all_control_tokens(tokenizer))))
    texts = st.lists(parts, max_size=5).map("".join)
    fields = {field: data.draw(texts) for field in FIELDS}
    assert control_ids_in(tokenizer, FRAMED, [record_of(fields)]) == []


def test_control_tokens_of_the_frame_are_control_tokens(grown):
    for token, token_id in all_control_tokens(grown).items():
        template = Template("frame", "Fill " + token + " in: {{ input }}" + token, "a " + token + "{{ output }}")
        record = record_of({"input": f"b {token}", "output": token})
        source, target = template.render(record)
        (source_encoding,), (target_encoding,) = split_sources(grown, [source]), split_targets(grown, [target])
        if token_id != grown.unk_token_id:
            assert source_encoding.content.count(token_id) == 2
            assert target_encoding.content.count(token_id) == 1


def test_a_frame_is_encoded_as_the_tokenizer_itself_encodes_it(grown, sentences):
    for token in [*ADDED[::2], grown.eos_token, *grown.all_special_tokens[-1:]]:
        template = Template("frame", "Fill " + token + " in: {{ input }} " + token + " end")
        for sentence in sentences[:10]:
            source = template.render_source("", sentence)
            assert encode_sources(grown, [source])[0] == grown(str(source))["input_ids"]


def test_the_longest_control_token_of_a_frame_wins(tokenizers_by_family, tmp_path):
    tokenizers_by_family["bart"].save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<a>", "<a><b>"], special_tokens=True)
    (source,) = split_sources(tokenizer, [Template("t", "<a><b>{{ input }}<a>").render_source("", "x")])
    assert tokenizer.convert_ids_to_tokens(source.content) == ["<a><b>", "x", "<a>"]


def test_blank_and_listed_added_tokens_are_words_of_text(grown_tokenizers, tmp_path):
    for family in ("t5", "bart", "bert", "byt5", "m2m100"):
        grown_tokenizers[family].save_pretrained(tmp_path / family)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / family)
        assert text_tokens(tokenizer) == {"\n\n"}
        word, table = tokenizer.convert_tokens_to_ids(["낱말", "<table>"])
        assert word not in split_sources(tokenizer, ["이 낱말 뿐"])[0].content
        tokenizer.init_kwargs[TEXT_TOKENS_KEY] = ["낱말"]
        tokenizer.save_pretrained(tmp_path / family)
        again = AutoTokenizer.from_pretrained(tmp_path / family)
        assert text_tokens(again) == {"\n\n", "낱말"}
        content = split_sources(again, ["이 낱말 <table> 뿐"])[0].content
        assert content.count(word) == 1 and table not in content


def test_texts_that_spell_an_added_token_are_counted(grown_tokenizers):
    tokenizer = grown_tokenizers["t5"]
    source = Template("t", "<table> {{ input }}").render_source("", "a [USER] b")
    texts = ["<table> and <table>", "낱말</s>", source, "\n\n", "nothing"]
    assert spelled_added_tokens(tokenizer, texts) == {"<table>": 1, "낱말": 1, "[USER]": 1}
    tokenizer.init_kwargs[TEXT_TOKENS_KEY] = ["낱말"]
    try:
        assert spelled_added_tokens(tokenizer, texts) == {"<table>": 1, "[USER]": 1}
    finally:
        del tokenizer.init_kwargs[TEXT_TOKENS_KEY]


def test_a_rendered_text_survives_pickling_and_marks_survive_a_table():
    text = Template("t", "Fill <x>: {{ input }}").render_source("", "a")
    for copy in (pickle.loads(pickle.dumps(text)), from_marked(marked(text))):
        assert copy == "Fill <x>: a" and isinstance(copy, Rendered) and copy.marked == text.marked
    assert marked("plain") == from_marked("plain") == "plain"


def test_a_text_with_half_a_character_is_named(tokenizer):
    with pytest.raises(UserError, match=r"holds U\+D800 at character 4: half of a broken symbol"):
        split_sources(tokenizer, ["whole", "so \ud800"])


@pytest.mark.parametrize("character", ["\U0010fffe", "\U0010ffff"])
def test_a_text_with_a_noncharacter_cannot_spell_a_control_token(tokenizer, character):
    with pytest.raises(UserError, match="which are no characters"):
        split_sources(tokenizer, [f"a {character}</s>{character} b"])


def test_every_row_of_a_batch_is_what_it_is_alone(tokenizer, sentences):
    texts = [*sentences[:30], SPELLED, ""]
    assert split_sources(tokenizer, texts) == [split_sources(tokenizer, [text])[0] for text in texts]


def test_the_decoder_prefix_stands_before_the_text_and_replaces_a_language(tokenizers_by_family):
    def begins(family, *decoder_prefix):
        tokenizer = tokenizers_by_family[family]
        (ids,) = encode_targets(tokenizer, ["Go."], decoder_prefix=decoder_prefix)
        assert ids[: len(label_prefix(tokenizer, decoder_prefix))] == label_prefix(tokenizer, decoder_prefix)
        plain = split_targets(tokenizer, ["Go."])[0]
        assert ids[-len(plain.content) - 1 :] == [*plain.content, tokenizer.eos_token_id]
        return tokenizer.convert_ids_to_tokens(ids[: -len(plain.content) - 1])

    assert begins("t5", "<extra_id_0>") == ["<extra_id_0>"]
    assert begins("t5", "<extra_id_1>", "<extra_id_0>") == ["<extra_id_1>", "<extra_id_0>"]
    assert begins("nllb", "fra_Latn") == ["fra_Latn"]
    assert begins("nllb") == begins("nllb", "kor_Hang") == ["kor_Hang"]
    assert begins("mbart50", "en_XX") == ["en_XX"]
    assert begins("m2m100", "__en__") == ["__en__"]
    assert begins("bart", "<mask>") == ["<s>", "<mask>"]
    assert begins("bart", "<s>", "<mask>") == ["<s>", "<mask>"]


def test_a_decoder_prefix_that_the_tokenizer_does_not_know_is_refused(tokenizers_by_family):
    with pytest.raises(UserError, match="'<extra_id0>', which is no special .* Did you mean '<extra_id_0>'"):
        split_targets(tokenizers_by_family["t5"], ["Go."], ["<extra_id0>"])
    with pytest.raises(UserError, match="Name one that it has"):
        split_targets(tokenizers_by_family["t5"], ["Go."], ["나는"])


def test_what_is_too_long_is_cut():
    text = Encoding([7], [1, 2, 3], [8, 9])
    assert text.ids(6) == text.ids(6, end_after_cut=False) == [7, 1, 2, 3, 8, 9]
    assert text.ids(5) == [7, 1, 2, 8, 9]
    assert text.ids(5, end_after_cut=False) == [7, 1, 2, 3]
    with pytest.raises(UserError, match="leaves no room for text beside 3 special tokens"):
        text.ids(3)


def test_a_shortened_source_is_as_long_as_can_be(tokenizer, sentences):
    template = Template("t", "Sum up: {{ instruction }} | {{ input }} | In short:")
    told, given = sentences[0], " ".join(sentences[:60])
    text = template.render_source(told, given)
    length = split_sources(tokenizer, [text])[0].token_count
    for limit in (length, length - 1, length // 2, length // 3):
        short = shortened(tokenizer, text, limit)
        kept = short.removeprefix(f"Sum up: {told} | ").removesuffix(" | In short:")
        assert given.startswith(kept) and split_sources(tokenizer, [short])[0].token_count <= limit
        longer = [template.render_source(told, given[: len(kept) + more]) for more in range(1, 12)]
        counts = [encoding.token_count for encoding in split_sources(tokenizer, longer)]
        assert kept == given or max(counts) > limit


def test_fields_are_cut_to_one_length(tokenizers_by_family):
    template = Template("t", "Sum up: {{ instruction }} | {{ input }} | In short:")
    text, tokenizer = template.render_source("a b c d e f", "1 2 3 4 5 6 7 8 9 0"), tokenizers_by_family["byt5"]
    frame = len("Sum up:  |  | In short:") + 1  # its end token
    assert shortened(tokenizer, text, frame + 11 + 15) == "Sum up: a b c d e f | 1 2 3 4 5 6 7 8 | In short:"
    assert shortened(tokenizer, text, frame + 9) == "Sum up: a b  | 1 2  | In short:"
    assert shortened(tokenizer, text, 5) == "Sum up:  |  | In short:"


def test_a_cut_target_ends_in_eos_only_if_told_and_keeps_its_language(tokenizers_by_family, sentences):
    nllb = tokenizers_by_family["nllb"]
    (target,) = split_targets(nllb, [" ".join(sentences[:20])], ["kor_Hang"])
    told, untold = target.ids(10), target.ids(10, end_after_cut=False)
    assert told == [*target.prefix, *target.content[:8], nllb.eos_token_id]
    assert untold == [*target.prefix, *target.content[:9]]
    assert len(target.prefix) == 1


def test_a_normalizer_that_deletes_noncharacters_opens_no_door(tokenizers_by_family, tmp_path):
    tokenizers_by_family["diptych-bpe"].save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(r"\p{Cn}"), "")
    tokenizer.add_tokens(["<table>"])  # normalized, as added tokens are unless they are special
    (source,) = split_sources(tokenizer, [Template("t", "<table> {{ input }}").render_source("", "a <table> b")])
    assert source.content.count(tokenizer.convert_tokens_to_ids("<table>")) == 1


def tokenizer_is_of_bytes(tokenizer):
    return type(tokenizer).__name__ == "ByT5Tokenizer"


def test_a_letter_that_is_a_control_token_and_cannot_be_written_otherwise_is_named(tokenizers_by_family, tmp_path):
    tokenizers_by_family["diptych-unigram"].save_pretrained(tmp_path)
    grown = AutoTokenizer.from_pretrained(tmp_path)
    grown.add_tokens(["I"])
    with pytest.raises(UserError, match="added tokens are no words of text: .*'I'.*diptych_text_tokens"):
        split_sources(grown, ["I am a student."])
    grown.init_kwargs[TEXT_TOKENS_KEY] = ["I"]
    assert grown.convert_tokens_to_ids("I") in split_sources(grown, ["I am a student."])[0].content


def test_an_added_token_that_was_a_word_of_the_model_before_is_written_with_others(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    grown = AutoTokenizer.from_pretrained(tmp_path)
    before = split_sources(grown, ["I am a student."])[0].content
    shortest = 1 if tokenizer_is_of_bytes(grown) else 2  # one letter may be what all words of it are made of
    word = next(t for t in before if len(grown.convert_ids_to_tokens(t).strip("▁Ġ ")) >= shortest)
    grown.add_tokens([grown.convert_ids_to_tokens(word)])
    assert grown.convert_tokens_to_ids(grown.convert_ids_to_tokens(word)) == word
    after = split_sources(grown, ["I am a student."])[0].content
    assert word not in after and after[-1] == before[-1]
