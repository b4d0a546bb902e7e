"""Outputs of a given form, from untrained models, which would write anything: each fits, with every tokenizer."""

import copy
import json
import re
import string

import jsonschema
import pytest
import torch
from small_families import family_configs
from transformers import AutoModelForSeq2SeqLM

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.text_to_ids.templates import Template
from diptych.finetune.inference.constraints import grammar_of
from diptych.finetune.inference.generation import generate_outputs
from diptych.finetune.model.loaded_model import LoadedModel

SCHEMA = {
    "type": "object",
    "properties": {
        "who": {"type": "string", "maxLength": 5},
        "how many": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["man", "woman", None]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-c]{1,3}$"}, "maxItems": 2},
    },
    "required": ["who", "kind"],
    "additionalProperties": False,
}
PAIRED = {"diptych": "diptych-bpe", "bart": "bart", "m2m_100": "nllb", "t5gemma": "gemma", "t5": "t5", "umt5": "byt5"}
PAIRED |= {"diptych_merged": "diptych-unigram", "mbart": "mbart50"}
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 2},
}


def loaded_with(tokenizer, family):
    torch.manual_seed(3)
    config = family_configs(2000)[family]  # more than any of the tokenizers has
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config.update(ids | {"decoder_start_token_id": tokenizer.pad_token_id})
    return LoadedModel.of(AutoModelForSeq2SeqLM.from_config(config).eval(), tokenizer)


def with_ascii(tokenizer):
    """As `diptych tokenizer extend` does it: of SentencePiece's vocabularies, many have no braces."""
    tokenizer = copy.deepcopy(tokenizer)
    known = "".join(tokenizer.get_vocab())
    tokenizer.add_tokens([char for char in string.printable[:94] if char not in known])
    return tokenizer


def written(loaded, count=4, max_new_tokens=160, batch_size=2, **settings):
    sources = [[5 + row, 9, 17, loaded.tokenizer.eos_token_id] for row in range(count)]
    settings["grammar"] = grammar_of(settings.pop("json_schema", None), settings.pop("regex", None))
    return generate_outputs(loaded, sources, batch_size=batch_size, max_new_tokens=max_new_tokens, **settings)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", PAIRED)
def test_every_output_is_json_of_the_schema_or_said_to_be_cut(family, way, tokenizers_by_family):
    loaded = loaded_with(with_ascii(tokenizers_by_family[PAIRED[family]]), family)
    outputs = written(loaded, json_schema=SCHEMA, **WAYS[way])
    finished = [output for output in outputs if output.finished]
    assert len(finished) >= len(outputs) / 2
    for output in finished:
        jsonschema.validate(json.loads(output.text), SCHEMA)
    for output in set(outputs) - set(finished):
        assert len(output.ids) > 150 or way == "beams", output


@pytest.mark.parametrize("way", WAYS)
def test_every_output_matches_the_expression_as_a_whole_and_is_what_it_is_alone(way, tokenizers_by_family):
    loaded = loaded_with(tokenizers_by_family["t5"], "t5")  # whose first token begins with a space that is not decoded
    expression = r"^(?:am|pm) [a-d]{2,4}(?: [a-d]{2,4}){1,3}$"
    outputs = written(loaded, regex=expression, **WAYS[way])
    assert all(output.finished and re.search(expression, output.text) for output in outputs)
    assert way == "samples" or outputs == written(loaded, regex=expression, batch_size=1, **WAYS[way])


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3, "batch_size": 1}])
def test_a_form_that_the_answers_have_changes_nothing(settings, loaded, eight_prepared_rows):
    settings = {"batch_size": 3, "max_new_tokens": 32, "grammar": grammar_of(regex=r"(?s:.*)")} | settings
    outputs = generate_outputs(loaded, [row["input_ids"] for row in eight_prepared_rows], **settings)
    assert [output.text for output in outputs] == [row["target"] for row in eight_prepared_rows]
    assert all(output.finished for output in outputs)


def test_an_output_that_the_limit_cuts_is_said_to_be_so_and_one_that_is_whole_is_not(tokenizers_by_family):
    loaded = loaded_with(tokenizers_by_family["bart"], "bart")
    assert not any(output.finished for output in written(loaded, json_schema=SCHEMA, max_new_tokens=8))
    [whole] = written(loaded, count=1, regex="[a-c]{6}")
    assert whole.finished
    limit = len(whole.ids) - 1  # without a token for the end
    [cut] = written(loaded, count=1, regex="[a-c]{6}", max_new_tokens=limit)
    assert cut.finished
    assert cut.text == whole.text
    [cut] = written(loaded, count=1, regex="[a-c]{6}", max_new_tokens=limit - 1)
    assert not cut.finished
    [open_ended] = written(loaded, count=1, regex="[a-c]{6,}d", max_new_tokens=5)
    assert not open_ended.finished


WRONG = {
    "no text": ({"json_schema": False}, "Unsatisfiable"),
    "needs what is forbidden": (
        {"json_schema": {"type": "object", "required": ["a"], "properties": {}, "additionalProperties": False}},
        "'a' is unsatisfiable",
    ),
    "cannot be enforced": ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
    "of elsewhere": ({"json_schema": {"$ref": "https://example.org/schema"}}, "not fetch"),
    "no type": ({"json_schema": {"type": "strin"}}, "strin"),
    "no expression": ({"regex": "(a"}, "unclosed group"),
    "looks ahead": ({"regex": "(?=a)b"}, "look-around"),
    "refers back": ({"regex": r"(a)\1"}, "backreferences"),
    "two forms": ({"regex": "a", "json_schema": True}, "exclude each other"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_form_that_cannot_be_is_refused_before_anything_is_generated(name):
    form, says = WRONG[name]
    with pytest.raises(UserError, match=re.escape(says)):
        grammar_of(**form)


def test_what_a_tokenizer_cannot_write_is_named(tokenizers_by_family):
    with pytest.raises(UserError, match=r"after '' the JSON schema goes on .* lacks .*\{.* tokenizer extend"):
        written(loaded_with(tokenizers_by_family["m2m100"], "m2m_100"), json_schema=SCHEMA)
    with pytest.raises(UserError, match="after 'am' the regular expression .* goes on"):
        written(loaded_with(tokenizers_by_family["t5"], "t5"), regex="am#")
    with pytest.raises(UserError, match=r"BertTokenizer: decoding changes the text"):
        written(loaded_with(tokenizers_by_family["bert"], "bart"), regex="a")


def test_an_expression_that_explodes_ends_with_a_message(tokenizers_by_family):
    with pytest.raises(UserError, match="is too complex: .*too many expressions"):
        written(loaded_with(tokenizers_by_family["bart"], "bart"), regex="(?:(?:a|b)?c?){2000}{2000}{50}")


def test_a_template_with_text_around_outputs_is_refused(tokenizers_by_family):
    loaded = loaded_with(tokenizers_by_family["bart"], "bart")
    template = Template("answer", "{{ input }}", "Answer: {{ output }}")
    with pytest.raises(UserError, match="'answer' puts text around outputs"):
        written(LoadedModel.of(loaded.model, loaded.tokenizer, template), regex="a")
