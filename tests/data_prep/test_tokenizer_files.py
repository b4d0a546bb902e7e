"""A stranger's tokenizer loads in seconds, or is refused with its file and key; published ones are none too large."""

import json
import shutil
import time

import pytest

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.text_to_ids.regex_cost import RUN, regex_cost
from diptych.data_prep.text_to_ids.templates import TOKENIZER_KEY, template_of
from diptych.data_prep.text_to_ids.tokenizer_files import MOST_TRIES, open_tokenizer

CONFIG, BACKEND, MAP = "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"
TOKEN = {"special": True, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
DOUBLING = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}
PREPENDING = {"type": "Prepend", "prepend": "x" * 900}
PUBLISHED = [
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ll)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{Lm}\p{M}]+(?i:'s|'t)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
    r"\d{1,3}(?=(?:\d{3})*\b)",
    r"(?=(\d{3})+(?!\d))",
    r" {2,}",
    r"[\p{Lu}\p{M}&&[^\p{Han}]]*[\p{Ll}&&[^\p{Han}]]+|[一-龥ࠀ-一]+",
]


def normalizers(*parts):
    return {"normalizer": {"type": "Sequence", "normalizers": list(parts)}}


def split(pattern):
    return {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}}


def added(number, **changes):
    return {
        "added_tokens": [TOKEN | {"id": 600 + place, "content": f"<{place}>"} | changes for place in range(number)]
    }


@pytest.fixture
def refusal(bpe_folder, tmp_path):
    """Changes one file of a valid tokenizer, and returns the message."""

    def of(file, changes):
        folder = shutil.copytree(bpe_folder, tmp_path / "tokenizer")
        if isinstance(changes, dict):
            found = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
            changes = json.dumps(found | changes)
        (folder / file).write_text(changes)
        began = time.process_time()
        with pytest.raises(UserError) as caught:
            template_of(open_tokenizer(str(folder)))
        assert time.process_time() - began < 5
        return str(caught.value)

    return of


PIECE = {"SpecialToken": {"id": "</", "type_id": 0}}
UNKNOWN_PIECE = {"type": "TemplateProcessing", "single": [PIECE], "pair": [], "special_tokens": {}}


@pytest.mark.parametrize(
    "file, changes, said",
    [
        (BACKEND, normalizers(*[DOUBLING] * 22), "normalizer makes texts 4,194,304 times longer"),
        (BACKEND, normalizers(*[PREPENDING] * 20), "normalizer makes texts"),
        (BACKEND, normalizers(DOUBLING | {"pattern": {"Regex": "x*"}}), "is found between any two characters"),
        (BACKEND, normalizers({"type": "Precompiled", "precompiled_charsmap": "/////w=="}), "that is damaged"),
        (BACKEND, normalizers(*[{"type": "NFC"}] * 9999), "normalizer has more than 10,000 values"),
        (BACKEND, split(r"(\w+\s?)+:$|x"), r"'(\\w+\\s?)+:$|x', which may search for years"),
        (BACKEND, split(r"[^x]*[^x]*x"), "which may search for years"),
        (BACKEND, split(r"((a{1000}){1000}){1000}"), "which may search for years"),
        (BACKEND, split("((a"), "pre_tokenizer has the regular expression '((a', in which something is not"),
        (BACKEND, {"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "(tokenizer.json: pre_tokenizer)"),
        (BACKEND, {"decoder": 1}, "(tokenizer.json: decoder)"),
        (BACKEND, {"post_processor": UNKNOWN_PIECE}, "inserts '</', which is not in its special_tokens"),
        (BACKEND, added(30_000), "added_tokens has 30,000 tokens; 20,000 are allowed"),
        (BACKEND, added(1, id=2**32), "added_tokens holds the id 4294967296"),
        (BACKEND, added(1, content="x" * 9999), "of up to 1,000 characters each"),
        (BACKEND, {"added_tokens": None}, "added_tokens is 0, and a list"),
        (BACKEND, {"model": {"type": "BPE", "vocab": {"a": 10**9}, "merges": []}}, "model holds the id 1000000000"),
        (BACKEND, {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", float("nan")]]}}, "model is"),
        (BACKEND, {"model": []}, "model is []"),
        (BACKEND, "[" * 10**5, "tokenizer.json of"),
        (BACKEND, "7", "it holds 7, where settings by name are due"),
        (CONFIG, "null", "tokenizer_config.json of"),
        (CONFIG, {"extra_ids": 10**9}, "extra_ids is 1000000000, and a whole number up to 20,000 is needed"),
        (CONFIG, {"model_max_length": float("nan")}, "model_max_length is nan, and a number of tokens is needed"),
        (CONFIG, {"model_max_length": "long"}, "model_max_length is 'long'"),
        (CONFIG, {"eos_token": {"content": 5}}, "eos_token is {'content': 5}"),
        (CONFIG, {"eos_token": ["</s>"]}, "eos_token is ['</s>']"),
        (CONFIG, {"unk_token": "x" * 10**6}, "a text of up to 1,000 characters is needed"),
        (CONFIG, {"tokenizer_class": 5}, "tokenizer_class is 5, and a text is needed"),
        (CONFIG, {"added_tokens_decoder": {"9" * 40: {"content": "a"}}}, "added_tokens_decoder holds the id"),
        (CONFIG, {"extra_special_tokens": {"a": [1]}}, "extra_special_tokens is {'a': [1]}"),
        (CONFIG, {"chat_template": [{"name": 5, "template": []}]}, "chat_template is"),
        (CONFIG, {"chat_template": "x" * 10**6}, "chat_template has 1,000,000 characters; 200,000 are allowed"),
        (CONFIG, {"auto_map": 5}, "(tokenizer_config.json)"),
        (CONFIG, {"self": 1}, "self is 1, and nothing is needed"),
        (CONFIG, {TOKENIZER_KEY: 5}, "the template in tokenizer_config.json is not one"),
        (CONFIG, {TOKENIZER_KEY: {"name": "a", "source": 7}}, "its source is 7"),
        (CONFIG, {TOKENIZER_KEY: {"name": "a", "source": "", "golden": [{"fields": 5}]}}, "example 1 is damaged"),
        (MAP, {"eos_token": 5}, "special_tokens_map.json of"),
        ("added_tokens.json", '{"a": "b"}', "added_tokens.json of"),
        ("chat_template.jinja", "x" * 10**6, "chat_template.jinja of"),
    ],
)
def test_a_tokenizer_that_asks_for_too_much_or_is_none_is_refused_by_file_and_key(refusal, file, changes, said):
    assert said in refusal(file, changes)


def test_a_folder_without_a_tokenizer_says_what_is_missing(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UserError, match="has no tokenizer: none of tokenizer.json, .* Name the checkpoint whose"):
        open_tokenizer(str(tmp_path))


@pytest.mark.parametrize("pattern", PUBLISHED)
def test_regular_expressions_of_published_tokenizers_are_allowed(pattern):
    assert regex_cost(pattern).tries <= MOST_TRIES


def test_the_cost_of_a_regular_expression_is_its_runs_before_what_can_fail():
    assert [regex_cost(it).tries for it in ("a+b", "a+b*", "a*b*c", "(?:a|b){2}c")] == [RUN, 1, RUN**2, 4]
    assert regex_cost(r"(?:ab){2,3}[^\]c]\p{L}?").least == 5
    for unknown in (r"(a)\1", "(?#x)", "(?x)a", r"\g<0>", "a)", "[a", "[]a]", "*", "a(?i)b|c"):
        with pytest.raises(ValueError):
            regex_cost(unknown)
