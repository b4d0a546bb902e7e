"""Outputs of a given form, from untrained models, which would write anything: each fits, with every tokenizer."""

import copy
import json
import re
import string

import jsonschema
import openai
import pytest
import torch
from datasets import load_from_disk
from listening import listening
from small_families import family_configs
from transformers import AutoModelForSeq2SeqLM, pipeline

import diptych
from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.json_schema import as_written, fault_of
from diptych.data_prep.text_to_ids.templates import Template
from diptych.finetune.commands import cli
from diptych.finetune.evaluating.metrics import compute_metrics
from diptych.finetune.inference.constraints import FitsGrammar, grammar_of
from diptych.finetune.inference.generation import generate_outputs
from diptych.finetune.inference.pipelines import register_pipelines
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
    "empty": ({"regex": ""}, "regex is '', which only an empty output fits"),
    "nothing but anchors": ({"regex": "^$"}, "only an empty output fits"),
    "a reason alone": (
        {"json_schema": {"type": "array", "uniqueItems": True}},
        'the JSON schema cannot be enforced: Unimplemented keys: ["uniqueItems"]. Change it.',
    ),
    "a reason of an expression alone": ({"regex": "(a"}, "'(a' cannot be enforced: unclosed group. Change it."),
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
    for family in ("t5", "bart"):  # the one lacks characters, the other none
        with pytest.raises(UserError, match="no text fits the regular expression"):
            written(loaded_with(tokenizers_by_family[family], family), regex=r"[^\s\S]")
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


# As commands


CAPITALS = [(country, {"country": country, "letters": len(country)}) for country in ("France", "Peru", "Chad", "Oman")]


@pytest.fixture(scope="module")
def extraction(tmp_path_factory, byte_level):
    """Rows of texts and the JSON in them, one of which does not fit its schema, prepared; and an untrained T5."""
    folder = tmp_path_factory.mktemp("extraction")
    schema = {"type": "object", "properties": {"country": {"type": "string", "maxLength": 8}}, "required": ["country"]}
    schema["properties"]["letters"] = {"type": "integer", "maximum": 99, "minimum": 0}
    (folder / "schema.json").write_text(json.dumps(schema | {"additionalProperties": False}), encoding="utf-8")
    rows = [{"instruction": "Extract.", "input": text, "output": json.dumps(value)} for text, value in CAPITALS]
    bad = rows[0] | {"input": "Two", "output": '{"country": 2}'}
    for name, these in {"train": [*rows, bad], "test": rows}.items():
        lines = "".join(json.dumps(row) + "\n" for row in these)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    loaded_with(byte_level, "t5").model.save_pretrained(folder / "model")
    byte_level.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def byte_level(tokenizers_by_family):
    return tokenizers_by_family["diptych-bpe"]


@pytest.fixture(scope="module")
def prepared(extraction):
    command = ["prepare", "--data", str(extraction / "train.jsonl"), "--test", str(extraction / "test.jsonl")]
    command += ["--tokenizer", str(extraction / "model"), "--out", str(extraction / "prepared"), "--template", "plain"]
    assert cli.main([*command, "--on_both_sides", "keep", "--json_schema", str(extraction / "schema.json")]) == 0
    return extraction / "prepared"


def test_prepare_leaves_out_targets_that_are_not_of_the_schema(extraction, prepared, capsys):
    rejects = [json.loads(line) for line in (prepared / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["kind"], row["reason"]) for row in rejects] == [
        ("target not of the JSON schema", "The target is not of it: at country: 2 is not of type 'string'.")
    ]
    (extraction / "no.json").write_text('{"type": "strin"}', encoding="utf-8")
    for name, says in {"train.jsonl": "cannot be read", "no.json": "is no JSON schema: $.type: 'strin'"}.items():
        command = ["--data", "seed_tasks", "--tokenizer", str(extraction / "model"), "--out", str(extraction / "none")]
        assert cli.run("prepare", [*command, "--json_schema", str(extraction / name)]) == 2
        assert says in capsys.readouterr().err


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "jobs": {"type": "array", "items": {"$ref": "#/$defs/job"}},
        "address": {"anyOf": [{"$ref": "#/$defs/street"}, {"$ref": "#/$defs/box"}]},
        "size": {"type": "number"},
        "kind": {"enum": ["é", 1, {"x": 1.0, "a": 2}]},
    },
    "$defs": {
        "job": {"properties": {"title": {}, "boss": {"$ref": "#/$defs/job"}}, "required": ["title"]},
        "street": {"properties": {"street": {"type": "string"}, "city": {}}, "required": ["street"]},
        "box": {"properties": {"box": {"type": "integer"}, "city": {}}, "required": ["box"]},
    },
    "required": ["name"],
}
for inner in PERSON["$defs"].values():
    inner |= {"type": "object", "additionalProperties": False}
AS_WRITTEN = {
    '{"name":"a"}': '{"name":"a"}',
    '{\n  "name": "a",\n  "age": 12345678901234567890123\n}': '{\n  "name": "a",\n  "age": 12345678901234567890123\n}',
    ' {"name":   "a"}\n': '{"name": "a"}',
    '{"age": 5.0, "name": "Jos\\u00e9 \\/ \\u001f"}': '{"name": "José / \\u001f", "age": 5}',
    '{"jobs": [{"boss": {"title": "b"}, "title": "c"}], "name": "n", "size": 1.50E+3}': (
        '{"name": "n", "jobs": [{"title": "c", "boss": {"title": "b"}}], "size": 1.50E+3}'
    ),
    '{"address": {"city": "q", "box": 7e1}, "name": "z", "other": {"b": 1, "a": 2}}': (
        '{"name": "z", "address": {"box": 70, "city": "q"}, "other": {"b": 1, "a": 2}}'
    ),
    '{"name": "a", "kind": {"a": 2, "x": 1.0}}': '{"name": "a", "kind": {"x": 1, "a": 2}}',
}


@pytest.mark.parametrize("text", AS_WRITTEN)
def test_targets_get_the_form_that_outputs_of_the_schema_have(text, byte_level):
    written, loaded = as_written(text, json.dumps(PERSON)), loaded_with(byte_level, "t5")
    assert written == AS_WRITTEN[text] and json.loads(written) == json.loads(text)
    fits = FitsGrammar(loaded, grammar_of(json_schema=PERSON), 1, [byte_level.eos_token_id])
    deep = '{"name": "x", "more":  ' + "[" * 700 + "]" * 700 + "}"
    assert as_written(deep, json.dumps(PERSON)) == deep
    is_whole = {
        it: fits.finished(byte_level(it, add_special_tokens=False)["input_ids"], True) for it in (written, text)
    }
    assert is_whole == {written: True, text: written == text}


def test_prepare_says_how_many_targets_it_gave_that_form(extraction, tmp_path, capsys):
    (tmp_path / "schema.json").write_text(json.dumps(PERSON), encoding="utf-8")
    rows = [{"instruction": f"Who is {n}?", "output": target} for n, target in enumerate(AS_WRITTEN)]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    command = ["--data", str(tmp_path / "rows.json"), "--tokenizer", str(extraction / "model"), "--template", "plain"]
    command += ["--validation_fraction", "0", "--test_fraction", "0", "--out", str(tmp_path / "out")]
    assert cli.run("prepare", [*command, "--json_schema", str(tmp_path / "schema.json")]) == 0
    assert set(load_from_disk(str(tmp_path / "out"))["train"]["target"]) == set(AS_WRITTEN.values())
    assert "Changed    5 × target in the form" in capsys.readouterr().out
    (tmp_path / "schema.json").write_text(json.dumps(PERSON | {"not": {"required": ["x"]}}), encoding="utf-8")
    assert cli.run("prepare", [*command, "--json_schema", str(tmp_path / "schema.json")]) == 0
    assert 'schema.json: Unimplemented keys: ["not"]. Change it' in capsys.readouterr().err


def test_of_preferences_both_answers_get_that_form_and_the_one_that_is_not_liked_may_be_anything(extraction, tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps(PERSON), encoding="utf-8")
    settings = {"tokenizer": str(extraction / "model"), "template": "plain", "validation_fraction": 0}
    settings |= {"json_schema": str(tmp_path / "schema.json"), "test_fraction": 0}

    def prepared(names, rows):
        rows = [{"prompt": f"q{n}"} | dict(zip(names, row, strict=True)) for n, row in enumerate(rows)]
        (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        diptych.prepare(str(tmp_path / "rows.json"), out=tmp_path / names[0], **settings)
        manifest = json.loads((tmp_path / names[0] / "manifest.json").read_text(encoding="utf-8"))
        return load_from_disk(str(tmp_path / names[0]))["train"], manifest["rejected_by_kind"]

    right, other_order, other = '{"name": "a", "age": 5}', '{"age": 5, "name": "a"}', '{"age": 5, "name": "b"}'
    pairs = [(other_order, other), (other_order, "no JSON"), (right, other_order), ("no JSON", right)]
    data, kinds = prepared(("chosen", "rejected"), pairs)
    assert set(zip(data["target"], data["rejected"], strict=True)) == {
        (right, '{"name": "b", "age": 5}'),
        (right, "no JSON"),
    }
    assert kinds == {"same value in both answers": 1, "target not of the JSON schema": 1}
    marks = [(other_order, True), (other, False), ("no JSON", False), ("no JSON either", True)]
    data, kinds = prepared(("completion", "label"), marks)
    assert set(data["target"]) == {right, '{"name": "b", "age": 5}', "no JSON"}
    assert kinds == {"target not of the JSON schema": 1}


def test_a_file_of_prompts_gets_json_alone_and_a_run_of_another_schema_is_not_gone_on_with(extraction, capsys):
    files = ["--in_file", str(extraction / "test.jsonl"), "--out_file", str(extraction / "out.jsonl")]
    command = ["generate", str(extraction / "model"), *files, "--template", "plain"]
    assert cli.main([*command, "--json_schema", str(extraction / "schema.json")]) == 0
    rows = [json.loads(line) for line in (extraction / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    schema = json.loads((extraction / "schema.json").read_text(encoding="utf-8"))
    assert len(rows) == 4 and any(row["finished"] for row in rows)
    for row in rows:
        if row["finished"]:
            jsonschema.validate(json.loads(row["prediction"]), schema)
    assert cli.main([*command, "--json_schema", str(extraction / "schema.json")]) == 0  # there is nothing left to do
    assert cli.run("generate", [*command[1:], "--regex", "[ab]+"]) == 2
    assert "grammar" in capsys.readouterr().err
    for wrong in (
        ["--regex", "a", "--choices", "[a, b]"],
        ["--regex", "a", "--engine", "ctranslate2"],
        ["--regex", "("],
        ["--regex", ""],
        ["--json_schema="],
    ):
        assert cli.run("generate", [str(extraction / "model"), "--input", "Peru", *wrong]) == 2


def test_evaluate_counts_json_and_its_fields(extraction, prepared):
    report = extraction / "report.json"
    command = ["evaluate", str(extraction / "model"), "--data", str(prepared), "--out", str(report), "--metrics", ""]
    assert cli.main([*command, "--json_schema", str(extraction / "schema.json")]) == 0
    figures = json.loads(report.read_text(encoding="utf-8"))["figures"]
    assert figures["json_valid"] == 100 * (4 - figures["unfinished"]) / 4
    assert {"json_exact", "json_f1", "json_exact.country", "json_exact.letters"} <= figures.keys()


@pytest.mark.parametrize("schema", ['{"$ref": "https://example.org/a"}', '{"$ref": "#/$defs/a"}'])
def test_a_schema_that_cannot_be_applied_is_said_and_nothing_is_fetched(schema):
    with pytest.raises(UserError, match="the JSON schema cannot be applied"):
        fault_of('"a"', schema)


def test_json_is_compared_as_values(tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"required": ["a"]}', encoding="utf-8")
    references = ['{"a": 1, "b": [1, 2]}', '{"a": 2}', '{"a": {"c": true}}', '{"a": 3}']
    written = ['{"b": [2, 1],\n "a": 1}', '{"b": 2}', '{"a": {"c": 1}}', '{"a": 3, "a": 3}']
    found = compute_metrics(["json"], written, [[it] for it in references])
    # all of 3; another name; true is not 1; a name that stands twice is no JSON
    assert found["json_f1"] == pytest.approx(100 * 6 / (6 + 2 + 2 + 1))
    assert (found["json_valid"], found["json_exact"]) == (75, 0)
    assert (found["json_exact.a"], found["json_exact.b"]) == (25, 25)
    assert compute_metrics(["json"], ['{"a": 1.0}'], [['{"a": 1.0}', "[]"]])["json_exact"] == 100
    with pytest.raises(UserError, match="that of source 2 is not .*prepare --json_schema"):
        compute_metrics(["json"], ["1", "1"], [["1"], ["one"]])


def test_pipelines_and_loaded_models_take_a_form(extraction):
    schema = json.loads((extraction / "schema.json").read_text(encoding="utf-8"))
    register_pipelines()
    write = pipeline("text2text-generation", model=str(extraction / "model"))
    [found] = write("Peru", json_schema=schema, max_new_tokens=100)
    jsonschema.validate(json.loads(found["generated_text"]), schema)
    model = diptych.load(str(extraction / "model"))
    file = str(extraction / "schema.json")
    text = model.generate("Peru", template="plain", json_schema=file, max_new_tokens=100)
    jsonschema.validate(json.loads(text), schema)
    assert re.fullmatch("[0-9]{3}", model.generate("Peru", template="plain", regex="[0-9]{3}"))


def test_clients_get_answers_of_the_form_that_they_ask_for(extraction, tmp_path):
    with listening(["serve", str(extraction / "model"), "--template", "plain"], tmp_path / "log") as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)

        def ask(**settings):
            messages = [{"role": "user", "content": "Extract Peru."}]
            answer = client.chat.completions.create(model="model", messages=messages, max_tokens=100, **settings)
            return answer.choices[0]

        schema = json.loads((extraction / "schema.json").read_text(encoding="utf-8"))
        form = {"type": "json_schema", "json_schema": {"name": "capital", "schema": schema, "strict": True}}
        for settings in ({}, {"n": 2, "extra_body": {"num_beams": 2}}, {"temperature": 1, "seed": 1}):
            answer = ask(response_format=form, **settings)
            assert answer.finish_reason == "stop"
            jsonschema.validate(json.loads(answer.message.content), schema)
        assert ask(extra_body={"structured_outputs": {"choice": ["(a)", "b|c"]}}).message.content in ("(a)", "b|c")
        assert re.fullmatch("[0-9]{3}", ask(extra_body={"structured_outputs": {"regex": "[0-9]{3}"}}).message.content)
        assert ask(response_format={"type": "json_object"}).message.content.startswith("{")
        assert ask(response_format={"type": "text"}).message.content
        for says, wrong in (
            ("unclosed group", {"structured_outputs": {"regex": "(a"}}),
            ("one of json", {"structured_outputs": {"grammar": "root ::= 'a'"}}),
            ("uniqueItems", {"structured_outputs": {"json": '{"type": "array", "uniqueItems": true}'}}),
            ("another kind", {"structured_outputs": {"choice": []}}),
            ("has a type", {"response_format": {"type": "xml"}}),
            ("has a type", {"response_format": {"type": "json_schema"}}),
            ("has a type", {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": None}}}),
        ):
            with pytest.raises(openai.BadRequestError, match=says):
                ask(extra_body=wrong)
