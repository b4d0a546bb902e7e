"""Each format is recognised, gives exactly these records, and says of each faulty row what is wrong with it."""

import ast
import json
import pickle
import re
import shlex
import time
from dataclasses import replace

import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.reading.sources import SAMPLES_FOLDER
from diptych.data_prep.rows.conversations import MAX_TURNS
from diptych.data_prep.rows.convert_rows import Converter, Directions
from diptych.data_prep.rows.format_table import FORMATS
from diptych.data_prep.rows.recognise_format import (
    converter_for,
    named,
    need_direction,
    parse_mapping,
)
from diptych.data_prep.rows.records import Languages, Origin, Record, Reject, Row, Tokenised

BOTH = Directions("To Korean:", "To English:")
GOOD = {"instruction": "a", "output": "b"}


def row(fields, number=1):
    return Row(fields, Origin("rows.jsonl", number), json.dumps(fields, default=str))


def rows(*all_fields):
    return [row(fields, number) for number, fields in enumerate(all_fields, start=1)]


def results(*all_fields, **options):
    """What becomes of rows, whose format the rows themselves decide."""
    options.setdefault("directions", BOTH)
    read = rows(*all_fields)
    converter = converter_for(read, "rows.jsonl", **options)
    return [result for it in read for result in converter.records(it)]


def recognise(read, source="rows.jsonl", **options):
    return converter_for(read, source, directions=BOTH, **options).format


def unused(fields, **options):
    return converter_for(rows(fields), "f", **options).unused_fields(row(fields))


def record(instruction, input, output, number=1, instance=0, **more):
    origin = Origin("rows.jsonl", number, instance)
    return Record(instruction=instruction, input=input, output=output, origin=origin, **more)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def late(fields, *first, **options):
    """The reject that a row gives after first rows of another kind."""
    options.setdefault("directions", BOTH)
    converter = converter_for(rows(*first), "rows.jsonl", **options)
    [result] = converter.records(row(fields, 200))
    assert isinstance(result, Reject) and result.origin.row == 200
    return result


# Each format by example


LITERALS = {
    "alpaca": ({"instruction": "Add.", "input": "1 + 1", "output": "2"}, [record("Add.", "1 + 1", "2")]),
    "dolly": (
        {"instruction": "Who?", "context": "Ann wrote it.", "response": "Ann.", "category": "closed_qa"},
        [record("Who?", "Ann wrote it.", "Ann.", category="closed_qa")],
    ),
    "prompt_completion": ({"prompt": "The sky is", "completion": " blue."}, [record("The sky is", "", " blue.")]),
    "messages": (
        {"messages": [system("Be brief."), user("Hi."), assistant("Hello."), user("You?"), assistant("A model.")]},
        [
            record("Hi.", "", "Hello.", instance=1, system="Be brief."),
            record("You?", "", "A model.", instance=2, system="Be brief.", history=(("Hi.", "Hello."),)),
        ],
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Hi."},
                {"from": "gpt", "value": "Hello."},
            ]
        },
        [record("Hi.", "", "Hello.", system="Be brief.")],
    ),
    "natural_instructions": (
        {
            "Definition": ["Add the numbers."],
            "Categories": ["Maths", "Sums"],
            "Positive Examples": [{"input": "1 + 2", "output": "3", "explanation": "It is the sum."}],
            "Negative Examples": [{"input": "2 + 2", "output": "5"}],
            "Instances": [
                {"id": "t-1", "input": "1 + 1", "output": ["2", "two"]},
                {"id": "t-2", "input": "2 + 2", "output": ["4"]},
            ],
        },
        [
            record("Add the numbers.", "1 + 1", "2", instance=1, category="Maths, Sums"),
            record("Add the numbers.", "1 + 1", "two", instance=2, category="Maths, Sums"),
            record("Add the numbers.", "2 + 2", "4", instance=3, category="Maths, Sums"),
        ],
    ),
    "self_instruct": (
        {"instruction": "Add.", "instances": [{"input": "1 + 1", "output": "2"}, {"output": "4"}]},
        [record("Add.", "1 + 1", "2", instance=1), record("Add.", "", "4", instance=2)],
    ),
    "parallel": (
        {"first": "Go.", "second": "가.", "third": "CC-BY"},
        [record("To Korean:", "Go.", "가.", instance=1), record("To English:", "가.", "Go.", instance=2)],
    ),
    "summarisation": (
        {"document": "It rained all day.", "summary": "Rain."},
        [record("Summarize the following text.", "It rained all day.", "Rain.")],
    ),
    "preference": (
        {"prompt": "Add.", "input": "1 + 1", "chosen": "2", "rejected": "3"},
        [record("Add.", "1 + 1", "2", rejected="3")],
    ),
    "marked": ({"prompt": "Add 1 + 1.", "completion": "3", "label": False}, [record("Add 1 + 1.", "", "3", mark=-1)]),
    "rated": (
        {
            "instruction": "Add.",
            "completions": [
                {"response": "3", "overall_score": 2.5},
                {"response": "2", "overall_score": 9},
                {"response": "4", "overall_score": 1},
            ],
        },
        [record("Add.", "", "2", rejected="4")],
    ),
    "edits": ({"src": "Go.", "mt": "가요.", "pe": "가."}, [record("To Korean:", "Go.", "가.", rejected="가요.")]),
    "tokenised": (
        {"input_ids": [12, 7, 0], "labels": [-100, 40, 1]},
        [Tokenised(input_ids=(12, 7, 0), labels=(-100, 40, 1), origin=Origin("rows.jsonl", 1))],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_recognised_and_gives_exactly_these_records(name):
    fields, expected = LITERALS[name]
    assert recognise(rows(fields), "rows.jsonl") is FORMATS[name]
    assert results(fields) == expected
    assert results(fields, name=name) == expected


@pytest.mark.parametrize("name", FORMATS)
def test_a_converter_can_be_sent_to_another_process(name):
    fields, expected = LITERALS[name]
    converter = converter_for(rows(fields), "rows.jsonl", directions=BOTH)
    assert converter.used_fields  # computed before it is sent
    sent = pickle.loads(pickle.dumps(converter))
    assert sent == converter
    assert sent.records(row(fields)) == expected


def test_the_columns_that_a_format_needs_are_said_shortly():
    assert FORMATS["summarisation"].needs == "document/article/text/dialogue, summary/highlights"
    assert FORMATS["parallel"].needs == "first, second or source, target or translation"


def test_rejects_of_readers_pass_through():
    reject = Reject(Origin("rows.jsonl", 3), None, "broken JSON", "broken JSON: …", "{")
    assert Converter(FORMATS["alpaca"]).records(reject) == [reject]


@pytest.mark.parametrize("fields", [{**GOOD, "input": None}, {**GOOD, "input": ""}, GOOD])
def test_a_null_or_absent_input_is_no_input(fields):
    assert results(fields) == [record("a", "", "b")]
    dolly = {"instruction": "a", "context": "c", "response": "b"}
    assert late_records({"instruction": "a", "context": None, "response": "b"}, dolly) == [record("a", "", "b", 200)]


def late_records(fields, *first, **options):
    return converter_for(rows(*first), "rows.jsonl", **options).records(row(fields, 200))


@pytest.mark.parametrize("fields, expected", LITERALS.values(), ids=LITERALS)
def test_texts_are_kept_to_the_byte(fields, expected):
    odd = "  {{ 7*7 }} </s>\r\n\t가\u1100\u1161\u11a8\u2028\ufeff🙂\x01 "

    def put(value):
        if isinstance(value, dict):
            kept = ("role", "from", "id", "Categories")
            return {name: inner if name in kept else put(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [put(inner) for inner in value]
        return odd if isinstance(value, str) else value

    found = results(put(fields))
    assert len(found) == len(expected)
    for result in found:
        if isinstance(result, Record):
            assert result.output == odd
            assert odd in (result.instruction, result.input)
            assert result.history in ((), ((odd, odd),))


# Recognition


def test_more_columns_decide_for_the_format_that_has_them():
    assert recognise(rows({**GOOD, "input": "x", "context": "c"}), "f").name == "alpaca"
    assert recognise(rows({"instruction": "a", "context": "", "response": "b"}), "f").name == "dolly"
    assert recognise(rows({"prompt": "a", "prompt_id": "b", "messages": []}), "f").name == "messages"
    assert recognise(rows({"source": "wiki", **GOOD}), "f").name == "alpaca"
    assert recognise(rows({**GOOD, "messages": None, "input_ids": None, "labels": None}), "f").name == "alpaca"


def test_turns_say_themselves_whether_they_are_messages_or_sharegpt():
    turns = [user("Hi."), assistant("Hello.")]
    assert recognise(rows({"conversations": turns}), "f").name == "messages"
    assert results({"conversations": turns, "id": 1}) == [record("Hi.", "", "Hello.")]
    shared = [{"from": "user", "value": "Hi."}, {"from": "assistant", "value": "Hello."}]
    assert results({"messages": shared}) == [record("Hi.", "", "Hello.")]
    assert recognise(rows({"conversations": []}), "f").name == "sharegpt"


@pytest.mark.parametrize("document", ["document", "article", "text", "dialogue"])
@pytest.mark.parametrize("summary", ["summary", "highlights"])
def test_summaries_go_by_several_names(document, summary):
    converter = converter_for(
        rows({document: "Long.", summary: "Short.", "id": 1}), "f", summary_instruction="Shorten:"
    )
    assert converter.records(row({document: "Long.", summary: "Short."})) == [record("Shorten:", "Long.", "Short.")]
    [reject] = converter.records(row({document: "", summary: "Short."}))
    assert (reject.field, reject.kind) == (document, f"empty {document}")
    assert converter.unused_fields(row({document: "Long.", summary: "Short.", "id": 1})) == ["id"]


def test_a_faulty_row_among_the_first_does_not_hide_the_format():
    assert recognise(rows({"x": 1}, {"ouput": "b"}, {**GOOD, "output": None}, GOOD), "f").name == "alpaca"
    assert recognise(rows(GOOD, GOOD, {"messages": []}), "f").name == "alpaca"
    assert recognise(rows({"instruction": "a", "output": None}), "f").name == "alpaca"  # every row says why


@pytest.mark.parametrize(
    "fields, names",
    [
        ([{**GOOD, "prompt": "p", "completion": "c"}], ["alpaca", "prompt_completion"]),
        ([{**GOOD, "context": "c", "response": "r"}], ["alpaca", "dolly"]),
        ([{**GOOD, "instances": []}], ["alpaca", "self_instruct"]),
        ([{**GOOD, "messages": []}], ["alpaca", "messages"]),
        ([{"input_ids": [1], "labels": [1], "source": "s", "target": "t"}], ["parallel", "tokenised"]),
        ([GOOD, {"messages": []}], ["alpaca", "messages"]),
    ],
)
def test_two_formats_are_an_error_that_format_decides(fields, names):
    with pytest.raises(UserError, match="f fits more than one format") as error:
        recognise(rows(*fields), "f")
    assert all(f"{name} (" in str(error.value) for name in names)
    assert f"--format NAME decides, for example --format {names[0]}." in str(error.value)
    assert recognise(rows(*fields), "f", name=names[1]) is FORMATS[names[1]]


def test_two_columns_for_one_field_are_an_error_that_map_decides():
    fields = {"article": "a", "text": "t", "summary": "s"}
    with pytest.raises(UserError, match="--map document=article summary=summary"):
        recognise(rows(fields), "f")
    assert results(fields, mapping={"document": "text"}) == [record("Summarize the following text.", "t", "s")]


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"instrution": "a", "output": "b"}, "If 'instrution' is the instruction, --map instruction=instrution makes"),
        ({"instruction": "a", "response": "b"}, "If 'response' is the output, --map output=response makes it alpaca."),
        (
            {"question": "a", "answer": "b", "context": "c"},
            "--map instruction=question output=answer input=context makes it alpaca.",
        ),
        ({"prompt": "a", "response": "b"}, "--map completion=response makes it prompt_completion."),
        ({"text": "a", "label": "b"}, "Columns there are 'text', 'label'. Columns with other names are mapped"),
        ({"translation": "a"}, "first, second or source, target or translation"),
        ({}, "Columns there are none."),
    ],
)
def test_rows_of_no_format_name_what_was_found_and_what_would_mend_it(fields, words):
    with pytest.raises(UserError, match="^f: no known format") as error:
        recognise(rows(fields), "f")
    assert words in str(error.value)
    assert "dolly: instruction, context, response;" in str(error.value)


def test_a_table_of_very_many_columns_is_refused_soon():
    began = time.process_time()
    with pytest.raises(UserError, match="'c11' and 99,988 more"):
        recognise(rows({f"c{number}": "a" for number in range(100_000)}), "f")
    assert time.process_time() - began < 5  # comparing each name with each takes 15 s


def test_a_format_that_was_named_has_to_be_there():
    with pytest.raises(UserError, match="f: not dolly, as --format says.*If 'output' is the response, --map"):
        recognise(rows({**GOOD, "context": "c"}), "f", name="dolly")
    with pytest.raises(UserError, match="format 'alpacca' is not known.*Did you mean 'alpaca'"):
        named("alpacca")
    with pytest.raises(UserError, match="f: there is no row"):
        recognise([], "f")


# Mapping


def test_columns_can_be_mapped():
    mapping = parse_mapping(["output=answers.text.0", "instruction=question", "input=context", "category=meta.kind"])
    fields = {
        "question": "Who?",
        "context": "Ann did.",
        "answers": {"text": ["Ann", "Ann did"], "start": [0]},
        "meta": {"kind": "qa"},
        "id": 7,
    }
    converter = converter_for(rows(fields), "f", mapping=mapping)
    assert converter.records(row(fields)) == [record("Who?", "Ann did.", "Ann", category="qa")]
    assert converter.unused_fields(row(fields)) == ["id", "answers.start"]
    [reject] = converter.records(row({**fields, "answers": {"text": []}}))
    assert reject.field == "answers.text.0"
    assert "'answers.text.0' is missing; the row has 'question', 'context', 'answers', 'meta', 'id'." in reject.reason


def test_a_column_that_was_mapped_is_no_longer_what_its_name_says():
    fields = {"instruction": "a", "context": "c", "response": "b"}
    assert results(fields, mapping={"output": "response"}) == [record("a", "", "b")]
    both = {**GOOD, "answer": "c"}
    assert results(both, mapping={"output": "answer"}) == [record("a", "", "c")]


def test_a_column_with_a_dot_in_its_name_is_found_first():
    fields = {"instruction": "a", "out.text": "b", "out": {"text": "c"}}
    assert results(fields, mapping={"output": "out.text"}) == [record("a", "", "b")]


def test_a_system_prompt_can_be_mapped_in_any_format():
    fields = {**GOOD, "system_prompt": "Be brief."}
    assert results(fields, mapping={"system": "system_prompt"}) == [record("a", "", "b", system="Be brief.")]
    chat = {"messages": [system("And kind."), user("Hi."), assistant("Hello.")], "system": "Be brief."}
    expected = [record("Hi.", "", "Hello.", system="Be brief.\nAnd kind.")]
    assert results(chat, mapping={"system": "system"}) == expected


@pytest.mark.parametrize(
    "mapping, words",
    [
        (
            {"output": "anwser"},
            "there is no column 'anwser' in its first rows; columns there are 'question', 'answer'.",
        ),
        ({"output": "anwser"}, "Did you mean 'output=answer'?"),
        ({"outptu": "answer"}, "'outptu' is no field of any format. Did you mean 'output=answer'?"),
        ({"answer": "output"}, "The known name stands first, the data's column second."),
    ],
)
def test_a_mapping_that_names_what_is_not_there_is_an_error(mapping, words):
    with pytest.raises(UserError) as error:
        converter_for(rows({"question": "a", "answer": "b"}), "f", mapping=mapping)
    assert words in str(error.value)


def test_a_mapping_has_to_be_of_the_format_that_was_named():
    with pytest.raises(UserError, match="'completion' is no field of format alpaca"):
        converter_for(rows({**GOOD, "c": ""}), "f", name="alpaca", mapping={"completion": "c"})


@pytest.mark.parametrize(
    "entries, words",
    [
        (["output"], "--map output: a known name, '=' and a column are due"),
        (["=b"], "--map =b"),
        (["output=a", "output=b"], "--map gives 'output' two columns, 'a' and 'b'"),
        (["ouput=a"], "Did you mean 'output=a'?"),
    ],
)
def test_map_entries_are_checked_before_anything_is_read(entries, words):
    with pytest.raises(UserError) as error:
        parse_mapping(entries)
    assert words in str(error.value)
    assert parse_mapping(["output=a=b"]) == {"output": "a=b"}


# Rows at fault


@pytest.mark.parametrize(
    "fields, field, kind, words",
    [
        ({"instrution": "a", "output": "b"}, "instruction", "misspelt field 'instrution'", "is 'instrution' meant?"),
        ({"instruction": "a", "inptu": "i", "output": "b"}, "input", "misspelt field 'inptu'", "is 'inptu' meant?"),
        (
            {"prompt": "a", "output": "b"},
            "instruction",
            "missing field 'instruction'",
            "the row has 'prompt', 'output'",
        ),
        ({}, "instruction", "missing field 'instruction'", "the row has no fields"),
        ({**GOOD, "output": 5}, "output", "'output' is not a string", "a number (5), not a string"),
        ({**GOOD, "output": None}, "output", "'output' is null", "'output' is null; a string is due."),
        ({**GOOD, "input": {"b": 1}}, "input", "'input' is not a string", "an object"),
        ({**GOOD, "input": "\0"}, "input", "NUL in the text", "U+0000 at character 1"),
        ({**GOOD, "output": "\ufdd0"}, "output", "noncharacter in the text", "U+FDD0"),
        ({**GOOD, "output": "\ud800"}, "output", "broken Unicode", "U+D800"),
    ],
)
def test_a_faulty_row_is_one_reject_with_field_kind_and_reason(fields, field, kind, words):
    reject = late(fields, GOOD)
    assert (reject.field, reject.kind) == (field, kind)
    assert words in reject.reason
    assert reject.raw == json.dumps(fields)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"messages": [user("Hi."), assistant("Hello.")]}, "; this row looks like messages.)"),
        ({"prompt": "p", "completion": "c"}, "; this row looks like prompt_completion.)"),
        ({**GOOD, "output": ["b"]}, "'output' is a list (['b']), not a string"),
        ({"instruction": "a"}, "'output' is missing; the row has 'instruction'."),
    ],
)
def test_a_row_of_another_shape_late_in_the_file_says_what_the_file_is(fields, words):
    reject = late(fields, *[GOOD] * 100)
    assert words in reject.reason
    assert "(This source is read as alpaca, recognised from its first rows" in reject.reason
    assert "read as alpaca, as --format says" in late(fields, GOOD, name="alpaca").reason


def test_a_fault_in_one_instance_loses_no_other():
    fields = {
        "instruction": "a",
        "instances": [{"output": "b"}, 3, {"output": ""}, {"inptu": "", "output": "c"}, {"ouput": "d"}, {"input": ""}],
    }
    first, *rejects = results(fields)
    assert first == record("a", "", "b", instance=1)
    assert [(reject.field, reject.kind, reject.origin.instance) for reject in rejects] == [
        ("instances[1]", "'instances' is not an object", 2),
        ("instances[2].output", "empty instances.output", 3),
        ("instances[3].input", "misspelt field 'inptu'", 4),
        ("instances[4].output", "misspelt field 'ouput'", 5),
        ("instances[5].output", "missing field 'output'", 6),
    ]
    assert rejects[3].reason == "in 'instances[4]', 'output' is missing; is 'ouput' meant? Rename it to 'output'."
    for instances in ([], 3, None):
        [reject] = results({"instruction": "a", "instances": instances})
        assert reject.field == "instances"


def test_a_fault_in_one_output_of_a_task_loses_no_other():
    task = LITERALS["natural_instructions"][0]
    instances = [{"input": "i", "output": ["a", ""]}, {"input": 3, "output": ["b"]}, {"output": []}, {"output": "c"}]
    found = results({**task, "Instances": instances})
    assert [(it.field, it.origin.instance, it.raw) for it in found if isinstance(it, Reject)] == [
        ("Instances[0].output[1]", 2, '{"input": "i", "output": ["a", ""]}'),
        ("Instances[1].input", 3, '{"input": 3, "output": ["b"]}'),
        ("Instances[2].output", 4, '{"output": []}'),
    ]
    assert [(it.input, it.output, it.origin.instance) for it in found if isinstance(it, Record)] == [
        ("i", "a", 1),
        ("", "c", 5),
    ]
    [reject] = results({**task, "Definition": [" "]})
    assert (reject.field, reject.kind) == ("Definition", "empty Definition")


def test_examples_of_a_task_go_into_the_instruction_if_so_told():
    task = LITERALS["natural_instructions"][0]
    told = results(task, positive_examples=2, negative_examples=1)
    assert told[0].instruction == (
        "Add the numbers.\n\nPositive Example 1 -\nInput: 1 + 2\nOutput: 3\nExplanation: It is the sum."
        "\n\nNegative Example 1 -\nInput: 2 + 2\nOutput: 5"
    )
    [reject] = results({**task, "Positive Examples": [{"input": "1"}]}, positive_examples=1)
    assert reject.field == "Positive Examples[0].output"
    converter = converter_for(rows(task), "f")
    assert converter.unused_fields(row({**task, "Source": []})) == [
        *("Positive Examples", "Negative Examples", "Source"),
        "Instances.id",
    ]
    converter = converter_for(rows(task), "f", positive_examples=1)
    assert converter.unused_fields(row(task)) == ["Negative Examples", "Instances.id"]


@pytest.mark.parametrize(
    "fields, field, words",
    [
        ({"input_ids": [], "labels": [1]}, "input_ids", "'input_ids' is empty"),
        ({"input_ids": [1], "labels": []}, "labels", "'labels' is empty"),
        ({"input_ids": [1, -1], "labels": [1]}, "input_ids[1]", "'input_ids[1]' is a number (-1); a token id, from 0"),
        ({"input_ids": [-100], "labels": [1]}, "input_ids[0]", "a number (-100)"),
        ({"input_ids": [1], "labels": [1, -100, -1]}, "labels[2]", "a number (-1)"),
        ({"input_ids": [1], "labels": [-100, -100]}, "labels", "'labels' is -100 throughout"),
        ({"input_ids": [1, True], "labels": [1]}, "input_ids[1]", "true or false (True)"),
        ({"input_ids": [1, 2.0], "labels": [1]}, "input_ids[1]", "a number (2.0)"),
        ({"input_ids": [[1]], "labels": [1]}, "input_ids[0]", "a list ([1])"),
        ({"input_ids": [2**31], "labels": [1]}, "input_ids[0]", "a number (2147483648)"),
        ({"input_ids": "1 2", "labels": [1]}, "input_ids", "'input_ids' is a string ('1 2'), and a list is due."),
        ({"input_ids": [1]}, "labels", "'labels' is missing"),
    ],
)
def test_token_ids_that_are_none_are_named_by_position(fields, field, words):
    reject = late(fields, {"input_ids": [1], "labels": [1]})
    assert reject.field == field
    assert words in reject.reason


# Conversations


@pytest.mark.parametrize("turns", [1, 2, 3, 17])
def test_each_answer_is_an_example_after_all_before_it(turns):
    messages = [message for n in range(turns) for message in (user(f"question {n}"), assistant(f"answer {n}"))]
    found = results({"messages": messages})
    assert len(found) == turns
    pairs = tuple((f"question {n}", f"answer {n}") for n in range(turns))
    for n, it in enumerate(found):
        assert ((it.instruction, it.output), it.history) == (pairs[n], pairs[:n])
        assert it.origin.instance == (n + 1 if turns > 1 else 0)


def test_turns_of_one_speaker_and_parts_of_one_message_are_joined():
    parts = [{"type": "text", "text": "And "}, {"type": "text", "text": "this."}]
    messages = [system("A."), system("B."), user("Look."), user(parts), assistant("Yes.")]
    assert results({"messages": messages}) == [record("Look.\nAnd this.", "", "Yes.", system="A.\nB.")]


@pytest.mark.parametrize(
    "no, yes",
    [
        ({"weight": 0}, {"weight": 1}),
        ({"weight": "0"}, {"weight": "1"}),
        ({"loss_weight": 0.0}, {"loss_weight": 1.0}),
        ({"loss": False}, {"loss": True}),
        ({"loss_mask": 0}, {"loss_mask": None}),
        ({"train": False}, {}),
        ({"training": "False"}, {"training": "True"}),
        ({"trainable": False, "weight": None}, {"weight": float("nan")}),
        ({"masked": True}, {"masked": False}),
    ],
)
def test_an_answer_that_is_marked_as_not_learned_from_is_history_only(no, yes):
    messages = [user("a"), assistant("b", **no), user("c"), assistant("d", **yes)]
    assert results({"messages": messages}) == [record("c", "", "d", history=(("a", "b"),))]
    sharegpt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", **no}]
    sharegpt += [{"from": "human", "value": "c"}, {"from": "gpt", "value": "d", **yes}]
    assert results({"conversations": sharegpt}) == [record("c", "", "d", history=(("a", "b"),))]
    assert unused({"messages": messages}) == []


@pytest.mark.parametrize(
    "marks, words",
    [
        (
            {"weight": 0.5},
            "'messages[1].weight' is a number (0.5); 1 or true is due",
        ),
        ({"loss_weight": "2"}, "'messages[1].loss_weight' is a string ('2'); 1 or true is due"),
        ({"train": "maybe"}, "'messages[1].train' is a string ('maybe'); 1 or true is due"),
        ({"masked": []}, "'messages[1].masked' is a list ([])"),
        ({"mask": 1}, "'messages[1].mask' can mean that the turn is learned from, or that it is not. Call it"),
        ({"train_detail": [{"begin_offset": 0}]}, "'messages[1].train_detail' marks parts of a turn"),
        ({"train": True, "weight": 0}, "'weight' and 'train' of 'messages[1]' contradict each other"),
    ],
)
def test_a_mark_that_is_not_understood_is_refused_by_name(marks, words):
    sound = {"messages": [user("a"), assistant("b")]}
    reject = late({"messages": [user("a"), assistant("b", **marks)]}, sound)
    assert words in reject.reason
    assert reject.field.removeprefix("messages[1].") in marks


def test_what_a_turn_or_an_instance_holds_besides_is_named():
    parts = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]
    turns = [
        {**system("Be brief."), "weight": 1},
        {**user(parts), "name": "Ann", "train": True, "images": []},
        assistant("b", reasoning_content="Hm.", thinking="", tool_calls=[], prefix=None),
    ]
    fields = {"messages": turns, "id": 1}
    names = ["id", "messages.content.cache_control", "messages.name", "messages.reasoning_content"]
    marks = ["messages.weight of system turns", "messages.train of user turns"]
    assert unused(fields) == [*names[:3], names[3], *marks]
    fields = {"prompt": [{**user("a"), "time": 3}], "completion": [assistant("b", reasoning="c")]}
    assert unused(fields) == ["prompt.time", "completion.reasoning"]
    fields = {"instruction": "a", "instances": [{"input": "", "output": "b", "hint": "c"}, {"output": "d"}]}
    assert unused(fields) == ["instances.hint"]
    fields = {"translation": {"en": "a", "de": "b", "fr": "c"}}
    converter = converter_for(rows(fields), "f", directions=BOTH, languages=("en", "de"))
    assert converter.unused_fields(row(fields)) == ["translation.fr"]


@pytest.mark.parametrize(
    "fields, field",
    [
        ({"messages": [{**user("See <image>."), "images": ["a.jpg"]}, assistant("A cat.")]}, "messages[0].images"),
        ({"messages": [user("Hear this."), assistant("Hm.", audio={"id": "x"})]}, "messages[1].audio"),
        ({"messages": [user("<image>\nWhat is it?"), assistant("A cat.")], "image": "a.jpg"}, "messages"),
        ({"messages": [user("See <|video_1|>."), assistant("A cat.")], "videos": ["a.mp4"]}, "messages"),
    ],
)
def test_a_conversation_about_a_picture_is_refused_by_name(fields, field):
    reject = late(fields, {"messages": [user("a"), assistant("b")]})
    assert (reject.field, reject.kind) == (field, "part that is no text")
    assert "only text is read" in reject.reason


def test_a_row_that_only_names_pictures_is_kept():
    about = {"instruction": "What does <image> mean in SVG?", "output": "A picture."}
    assert len(results(about, {**about, "image": None})) == 2
    reject = late({**about, "image": "a.jpg"}, about)
    assert reject.reason == (
        "'instruction' says <image>, which is what 'image' holds, and only text is read. Leave the row out."
    )


def test_lists_and_objects_may_be_json_text():
    turns = [user("a"), assistant("b", name="Ann")]
    expected = [record("a", "", "b")]
    fields = {"messages": json.dumps(turns)}
    assert results(fields) == results({"messages": [json.dumps(turn) for turn in turns]}) == expected
    assert unused(fields) == ["messages.name"]
    sharegpt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert results({"messages": json.dumps(sharegpt)}) == expected
    assert results({"prompt": json.dumps(turns[:1]), "completion": json.dumps(turns[1:])}) == expected
    assert results({"prompt": "[1]", "completion": '{"a": 2}'}) == [record("[1]", "", '{"a": 2}')]
    assert results({"instruction": "a", "instances": '[{"output": "b"}]'}) == expected
    pair = {"translation": '{"en": "Go.", "ko": "가."}'}
    assert results(pair, directions=Directions("x")) == [record("x", "Go.", "가.", languages=("en", "ko"))]
    ids = {"input_ids": "[1, 2]", "labels": "[3]"}
    assert results(ids) == [Tokenised(input_ids=(1, 2), labels=(3,), origin=Origin("rows.jsonl", 1))]


def test_lists_in_pythons_notation_are_told_from_json_and_the_advice_works(tmp_path):
    """As pandas writes them into csv."""
    turns = [user("It's me."), assistant("Hi.")]
    fields = {"messages": repr(turns)}
    told = late(fields, {"messages": turns}).reason
    assert "'messages' is a string (" in told and "it is no JSON" in told
    with pytest.raises(UserError, match="'translation' is text that begins as a list or an object does"):
        converter_for(rows({"translation": "{'en': 'Go.', 'ko': '가.'}"}), "f")
    advice = told[told.index("df[") : told.index(". (This source")]
    frame = pandas.DataFrame([fields])
    exec(advice.replace("rows.jsonl", str(tmp_path / "rows.jsonl")), {"df": frame, "ast": ast})
    assert json.loads((tmp_path / "rows.jsonl").read_text()) == {"messages": turns}


@pytest.mark.parametrize(
    "value", [["Los.", "Geh."], {"text": ["Geh."], "start": [0]}, [{"text": "Geh."}], {"n": 1, "b": {"de": "Geh."}}]
)
def test_the_map_that_is_advised_for_a_list_or_an_object_reads_it(value):
    with_text = {"instruction": "Go.", "answer": "Geh."}
    reject = late({"instruction": "Go.", "answer": value}, with_text, mapping={"output": "answer"})
    advice = re.search(r"--map (\S+) takes the string in it", reject.reason)[1]
    found = results({"instruction": "Go.", "answer": value}, mapping=parse_mapping([advice]))
    assert [it.output for it in found] in (["Los."], ["Geh."])


@pytest.mark.parametrize(
    "fields, mapping",
    [
        ({"dialog": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "conversations=dialog"),
        ({"chat": [user("a"), assistant("b")]}, "messages=chat"),
        (
            {"question": "a", "answers": {"text": ["b"], "answer_start": [1]}},
            "instruction=question output=answers.text.0",
        ),
        ({"article": "a", "abstract": "b"}, "summary=abstract"),
        ({"translations": {"en": "a", "ko": "b"}}, "translation=translations"),
        ({"src": "a", "tgt": "b"}, "first=src second=tgt"),
        ({"inputs": "a", "targets": "b"}, "prompt=inputs completion=targets"),
        ({"instruction": "a", "the output": "b"}, "'output=the output'"),
    ],
)
def test_the_map_that_is_advised_for_unknown_columns_reads_them(fields, mapping):
    with pytest.raises(UserError) as error:
        converter_for(rows(fields), "f")
    advised = re.search("--map (.*) makes it", str(error.value))[1]
    assert advised == mapping
    found = results(fields, mapping=parse_mapping(shlex.split(advised)), directions=Directions("To Korean:"))
    assert [(it.input or it.instruction, it.output) for it in found] == [("a", "b")]


def test_conversations_under_a_mapped_name_may_be_of_either_kind():
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    for name in ("messages", "conversations"):
        for written in (turns, [user("a"), assistant("b")]):
            assert results({"dialog": written}, mapping={name: "dialog"}) == [record("a", "", "b")]


def test_a_misspelt_column_is_read_by_the_map_that_is_advised():
    fields = {"instruction": "a", "inptu": "i", "output": "b"}
    [reject] = results(fields)
    assert reject.reason.endswith("Rename it to 'input'; if it is called so in all rows, --map input=inptu reads it.")
    assert results(fields, mapping=parse_mapping(["input=inptu"])) == [record("a", "i", "b")]


def test_a_missing_value_of_a_table_is_no_text_and_no_input():
    nan = float("nan")
    assert results({"instruction": "a", "input": nan, "output": "b"}) == [record("a", "", "b")]
    reject = late({"instruction": "a", "output": nan}, {"instruction": "a", "output": "b"})
    assert (reject.kind, "dropna or fillna" in reject.reason) == ("'output' is NaN", True)


def test_a_question_at_the_end_is_a_reject_beside_the_answers():
    answer, reject = results({"messages": [user("a"), assistant("b"), user("c")]})
    assert answer == record("a", "", "b", instance=1)
    assert (reject.field, reject.kind) == ("messages[2].content", "user turn without an answer")
    assert reject.origin == Origin("rows.jsonl", 1, 2)


@pytest.mark.parametrize(
    "messages, field, kind",
    [
        ([], "messages", "no assistant turn"),
        ([user("a")], "messages", "no assistant turn"),
        ([user("a"), assistant("b", weight=0)], "messages", "no assistant turn"),
        ([user("a"), assistant(" ")], "messages[1].content", "empty assistant turn"),
        ([user(""), assistant("b")], "messages[0].content", "empty user turn"),
        ([user("a"), assistant(None)], "messages[1].content", "'messages.content' is null"),
        ([user(["a"]), assistant("b")], "messages[0].content[0]", "part that is no text"),
        ([user([{"type": "image_url"}]), assistant("b")], "messages[0].content[0]", "part that is no text"),
        ([user([{"type": "text"}]), assistant("b")], "messages[0].content[0].text", "missing field 'text'"),
        ([user([]), assistant("b")], "messages[0].content", "empty user turn"),
        ([assistant("b"), user("a")], "messages[0].content", "bad order of turns"),
        ([user("a"), assistant("b"), assistant("c")], "messages[2].content", "bad order of turns"),
        ([user("a"), system("s"), assistant("b")], "messages[1].content", "bad order of turns"),
        ([user("a"), "b"], "messages[1]", "'messages' is not a turn"),
        ([user("a"), {"role": "assistant"}], "messages[1].content", "missing field 'content'"),
        ([user("a"), {"role": "assistant", "contnet": "b"}], "messages[1].content", "misspelt field 'contnet'"),
        ([user("a"), {"content": "b"}], "messages[1].role", "missing field 'role'"),
        ([user("a"), {"role": "asistant", "content": "b"}], "messages[1].role", "unknown role"),
        ([user("a"), {"role": ["assistant"], "content": "b"}], "messages[1].role", "unknown role"),
        ([user("a"), {"role": "tool", "content": "3"}, assistant("b")], "messages[1].role", "tool turn"),
        ([user("a"), assistant(None, tool_calls=[{"id": "1"}]), assistant("b")], "messages[1].role", "tool turn"),
        ([user("a"), {"role": "assistant", "function_call": {"name": "f"}}], "messages[1].role", "tool turn"),
        ([user("a\0"), assistant("b")], "messages[0].content", "NUL in the text"),
        ([user("a"), assistant("b")] * (MAX_TURNS + 1), "messages", "too many turns"),
        ("[user, assistant]", "messages", "'messages' is not a list"),
        (None, "messages", "'messages' is not a list"),
    ],
)
def test_a_conversation_with_a_fault_is_one_reject_that_names_the_turn(messages, field, kind):
    reject = late({"messages": messages}, {"messages": [user("a"), assistant("b")]})
    assert (reject.field, reject.kind) == (field, kind)


def test_faults_of_sharegpt_turns_are_named_in_its_words():
    good = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    reject = late({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]}, good)
    assert (reject.field, reject.kind) == ("conversations[1].value", "empty assistant turn")
    reject = late({"conversations": [{"from": "bot", "value": "a"}]}, good)
    assert reject.reason == (
        "'conversations[0].from' is a string ('bot'); known are system, human, user, gpt, assistant, chatgpt."
    )
    assert late({"conversations": [{"from": "observation", "value": "a"}]}, good).kind == "tool turn"


def test_only_the_completion_of_a_conversation_is_learned_from():
    fields = {
        "prompt": [system("Be brief."), user("a"), assistant("b"), user("c")],
        "completion": [assistant("d"), user("e"), assistant("f")],
    }
    assert results(fields) == [
        record("c", "", "d", instance=1, system="Be brief.", history=(("a", "b"),)),
        record("e", "", "f", instance=2, system="Be brief.", history=(("a", "b"), ("c", "d"))),
    ]
    assert late({"prompt": "a", "completion": "b"}, fields).kind == "'prompt' is not a list"
    assert late(fields, {"prompt": "a", "completion": "b"}).kind == "'prompt' is not a string"
    reject = late({**fields, "completion": [user("d")]}, fields)
    assert (reject.field, reject.kind) == ("completion", "no assistant turn")


# Parallel text


def test_a_direction_without_an_instruction_gives_no_rows():
    fields = {"first": "Go.", "second": "가."}
    assert results(fields, directions=Directions("To Korean:")) == [record("To Korean:", "Go.", "가.")]
    assert results(fields, directions=Directions(None, "To English:")) == [record("To English:", "가.", "Go.")]


def test_parallel_text_without_a_direction_is_refused():
    for fields in ({"first": "Go.", "second": "가."}, {"translation": {"en": "Go.", "ko": "가."}}):
        with pytest.raises(
            UserError, match="f is parallel text, and no direction has an instruction. Give one or both"
        ):
            converter_for(rows(fields), "f")
    with pytest.raises(UserError, match="a.tsv is parallel text"):
        need_direction("a.tsv", Directions())
    need_direction("a.tsv", Directions(None, "To English:"))
    need_direction("a.tsv", Directions("", None))


def test_pairs_of_source_and_target_need_no_direction():
    fields = {"source": "translate: Go.", "target": "가."}
    assert results(fields, directions=Directions()) == [record("translate: Go.", "", "가.")]
    assert results(fields, directions=Directions("To Korean:")) == [record("To Korean:", "translate: Go.", "가.")]


def test_a_translation_has_its_languages_in_order_or_as_told():
    fields = {"translation": {"en": "Go.", "ko": "가."}, "id": 1}
    there = Directions("x")
    assert results(fields, directions=there) == [record("x", "Go.", "가.", languages=("en", "ko"))]
    assert results(fields, directions=there, languages=("ko", "en")) == [
        record("x", "가.", "Go.", languages=("ko", "en"))
    ]
    three = {"translation": {"en": "Go.", "fr": "Va.", "ko": "가."}}
    with pytest.raises(UserError, match="has text in 'en', 'fr', 'ko', and pairs are of two.*--languages en fr"):
        results(three, directions=there)
    assert results(three, directions=there, languages=("fr", "ko")) == [
        record("x", "Va.", "가.", languages=("fr", "ko"))
    ]
    with pytest.raises(UserError, match="has no language 'kor'.*Did you mean 'ko'"):
        results(three, languages=("en", "kor"))
    with pytest.raises(UserError, match="--languages takes two different languages"):
        results(three, languages=("en", "en"))
    reject = late({"translation": {"en": "Go."}}, fields)
    assert reject.field == "translation.ko"
    assert late({"translation": {"en": "", "ko": "가."}}, fields).kind == "empty translation.en"
    assert unused(fields, directions=there) == ["id"]


def test_a_language_stands_for_its_regions_where_a_row_has_no_other_text_in_it():
    units = [
        {"en-GB": "Colour.", "de-DE": "Farbe."},
        {"en_us": "Color.", "DE": "Farbe."},
        {"en": "Go.", "en-GB": "Off you go.", "de-AT": "Geh."},
        {"en-GB": "Lorry.", "en-US": "Truck.", "en": None, "de": "Lkw."},
        {"eng": "Hi.", "de": "Hallo."},
    ]
    there, all_rows = Directions("x"), [{"translation": unit} for unit in units]
    *pairs, reject = results(*all_rows, directions=there, languages=("en", "de"))
    assert [(pair.origin.row, pair.input, pair.output) for pair in pairs] == [
        (1, "Colour.", "Farbe."),
        (2, "Color.", "Farbe."),
        (3, "Go.", "Geh."),
        (4, "Lorry.", "Lkw."),
        (4, "Truck.", "Lkw."),
    ]
    assert "has no text in 'en'; it has some in 'eng', 'de'" in reject.reason
    british = results(*all_rows, directions=there, languages=("EN-gb", "de"))
    assert [pair.input for pair in british if isinstance(pair, Record)] == ["Colour.", "Off you go.", "Lorry."]
    converter = converter_for(rows(*all_rows), "f", directions=there, languages=("en", "de"))
    assert [converter.unused_fields(it) for it in rows(*all_rows[:4])] == [[], [], ["translation.en-GB"], []]
    with pytest.raises(UserError, match=r"for example --languages en de \(en stands for en-GB and en-US as well\)"):
        results(*all_rows[:4], directions=there)
    with pytest.raises(UserError, match="has no language 'fr'"):
        results(*all_rows, directions=there, languages=("en", "fr"))


def test_a_column_for_each_language_is_parallel_text():
    table = {"en": "Go.", "ko": "가.", "id": "1"}
    back = {"languages": ("ko", "en")}
    assert results(table, directions=Directions("x"), **back) == [record("x", "가.", "Go.", **back)]
    assert results({"first": "a", "second": "b", **table}, languages=(), directions=Directions("x"))[0].input == "a"


def test_an_object_of_lists_is_the_list_of_objects_that_datasets_made_it_of():
    turns = {"from": ["human", "gpt"], "value": ["Hi.", "Hello."], "note": [None, "x"]}
    assert results({"conversations": turns}) == [record("Hi.", "", "Hello.")]
    converter = converter_for(rows({"conversations": turns}), "f")
    assert converter.unused_fields(row({"conversations": turns})) == ["conversations.note"]
    prompt = {"role": ["user"], "content": ["Hi."]}
    completion = {"role": ["assistant"], "content": ["Hello."]}
    assert results({"prompt": prompt, "completion": completion}) == [record("Hi.", "", "Hello.")]
    instances = {"input": ["1 + 1", ""], "output": ["2", "3"]}
    assert results({"instruction": "Add.", "instances": instances}) == [
        record("Add.", "1 + 1", "2", instance=1),
        record("Add.", "", "3", instance=2),
    ]
    uneven = {"from": ["human"], "value": ["Hi.", "Hello."]}
    assert "a list of turns is due" in late({"conversations": uneven}, {"conversations": turns}).reason


def test_each_of_several_translations_makes_a_pair():
    several = {"translation": {"en": "Go.", "de": ["Geh.", "Los."]}}
    both = {"languages": ("en", "de")}
    pairs = [record("x", "Go.", "Geh.", instance=1, **both), record("x", "Go.", "Los.", instance=2, **both)]
    assert results(several, directions=Directions("x")) == pairs
    without = [replace(it, languages=Languages()) for it in pairs]
    assert results({"first": "Go.", "second": ["Geh.", "Los."]}, directions=Directions("x")) == without
    listed = {"translation": {"language": ["de", "en", "de"], "translation": ["Geh.", "Go.", "Los."]}}
    assert results(listed, directions=Directions("x"), languages=("en", "de")) == pairs
    assert len(results(listed, directions=BOTH)) == 4
    assert late({"translation": {"en": "Go.", "de": []}}, several, directions=BOTH).kind == "empty translation.de"
    lone = {"translation": {"language": ["en"], "translation": ["Go."]}}
    reject = late(lone, listed, directions=BOTH)
    assert reject.reason.startswith("'translation' has no text in 'de'; it has some in 'en'.")
    short = {"translation": {"language": ["en", "de"], "translation": ["Go."]}}
    assert late(short, listed, directions=BOTH).kind == "languages and translations differ in number"
    many = {"translation": {"en": ["a"] * 40, "de": ["b"] * 40}}
    assert late(many, several, directions=BOTH).kind == "too many pairs"


def test_an_empty_side_is_one_reject_for_both_directions():
    reject = late({"first": "Go.", "second": " "}, {"first": "a", "second": "b"})
    assert (reject.field, reject.kind) == ("second", "empty second")


def test_instructions_given_as_settings_are_texts_too():
    with pytest.raises(UserError, match="--forward: 'forward' holds a noncharacter"):
        converter_for(rows(GOOD), "f", directions=Directions("To \ufdd0"))
    with pytest.raises(UserError, match="--summary_instruction: 'summary_instruction' is empty"):
        converter_for(rows(GOOD), "f", summary_instruction=" ")


# The shipped samples


def test_the_shipped_samples_are_recognised_and_whole():
    lines = (SAMPLES_FOLDER / "self_instruct_seed_tasks.jsonl").read_text(encoding="utf-8").splitlines()
    found = results(*map(json.loads, lines))
    assert (len(found), {type(it) for it in found}) == (175, {Record})
    lines = (SAMPLES_FOLDER / "tatoeba_eng_kor.tsv").read_text(encoding="utf-8").splitlines()
    found = results(*(dict(zip(("first", "second", "third"), line.split("\t"), strict=True)) for line in lines))
    assert (len(found), {type(it) for it in found}) == (2 * 3318, {Record})


# Properties


NAMES = st.sampled_from(
    [
        *dict.fromkeys(name for format in FORMATS.values() for name in format.fields),
        *("role", "content", "from", "value", "type", "text", "weight", "tool_calls", "article", "source", "target"),
        *("en", "ko", "ouput", "explanation", "\ud800", ""),
    ]
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-101, 5),
    st.floats(),
    st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", "text", "", "a", "가", "\0", "\ufffe"]),
    st.text(st.characters(exclude_categories=()), max_size=5),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=4)),
    max_leaves=12,
)
ANY_FIELDS = st.dictionaries(NAMES, VALUES, max_size=6)
CONVERTERS = [
    converter_for(rows(fields), "f", directions=BOTH, positive_examples=1) for fields, _ in LITERALS.values()
] + [
    converter_for(rows({"prompt": [user("a")], "completion": [assistant("b")]}), "f"),
    converter_for(rows({"translation": {"en": "a", "ko": "b"}}), "f", directions=BOTH),
    converter_for(rows({"text": {"en": "a"}, **GOOD}), "f", mapping={"instruction": "text.en"}),
]


def shaped(fields, change):
    """A sound row with one value, somewhere inside, replaced."""
    places = []

    def walk(value, path):
        places.append(path)
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for name, it in inner:
            walk(it, [*path, name])

    copy = json.loads(json.dumps(fields))
    walk(copy, [])
    *path, last = change.draw(st.sampled_from(places[1:]))
    holder = copy
    for name in path:
        holder = holder[name]
    holder[last] = change.draw(VALUES)
    return copy


def assert_sound(converter, fields):
    found = converter.records(row(fields))
    assert found
    for it in found:
        if isinstance(it, Reject):
            json.dumps(it.as_json(), ensure_ascii=False).encode("utf-8")
            assert it.reason and it.kind
        elif isinstance(it, Record):
            assert it.output.strip() and it.instruction.strip()
            "".join([it.instruction, it.input, it.output, it.system, it.category, str(it.history)]).encode("utf-8")
        else:
            assert it.input_ids and it.labels


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(ANY_FIELDS)
def test_any_row_gives_a_record_or_a_reject_in_every_format(fields):
    for converter in CONVERTERS:
        assert_sound(converter, fields)


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_a_sound_row_with_one_value_changed_gives_a_record_or_a_reject(data):
    fields, _ = data.draw(st.sampled_from(list(LITERALS.values())))
    changed = shaped(fields, data)
    for converter in CONVERTERS:
        assert_sound(converter, changed)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(ANY_FIELDS, max_size=4), st.dictionaries(NAMES, NAMES.filter(str.isascii), max_size=2))
def test_recognition_of_any_rows_ends_in_a_converter_or_an_error_for_people(several, mapping):
    read = rows(*several)
    try:
        converter = converter_for(read, "f", mapping=mapping, directions=BOTH)
    except UserError as error:
        assert str(error)
    else:
        for it in read:
            assert_sound(converter, it.fields)
