"""transformers' pipelines for text to text, as `diptych generate` writes."""

import inspect
import json
import os
import queue
import shutil
import subprocess
import sys

import datasets
import pytest
import torch
from conftest import EIGHT_ROWS, TO_KOREAN
from small_families import family_configs
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, TextIteratorStreamer, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from diptych.data_prep.text_to_ids import template_sandbox
from diptych.data_prep.text_to_ids.templates import Template, attach_template
from diptych.finetune.commands.cli import main as diptych
from diptych.finetune.inference.pipelines import (
    TRAVELLING_CODE,
    SummarizationPipeline,
    Text2TextPipeline,
    register_pipelines,
    travelling_pipeline,
)

ROWS = [{"instruction": instruction, "input": text} for instruction, text, _ in EIGHT_ROWS]
ANSWERS = [output for _, _, output in EIGHT_ROWS]


@pytest.fixture(scope="module")
def write(t5_checkpoint):
    register_pipelines()
    return pipeline("text2text-generation", model=str(t5_checkpoint))


def test_transformers_has_none_until_they_are_registered():
    code = (
        "from transformers import pipeline\n"
        "import diptych.finetune.inference.pipelines as ours\n"
        "tasks = ours.PIPELINE_REGISTRY.get_supported_tasks\n"
        "assert 'summarization' not in tasks()\n"
        "ours.register_pipelines(); ours.register_pipelines()\n"
        "assert {'summarization', 'translation', 'text2text-generation'} <= set(tasks())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "already registered" not in done.stderr, done.stderr


def test_rows_texts_and_messages_are_answered_as_generate_does(write, t5_checkpoint, capsys):
    assert isinstance(write, Text2TextPipeline)
    for row, answer in zip(ROWS, ANSWERS, strict=True):
        assert write(row) == [{"generated_text": answer}]
        text = f"{row['instruction']} {row['input']}"
        assert write(text) == write([{"role": "user", "content": text}]) == [{"generated_text": answer}]
    assert diptych(["generate", str(t5_checkpoint), "--instruction", TO_KOREAN, "--input", "Yes."]) == 0
    assert capsys.readouterr().out.strip() == write({"instruction": TO_KOREAN, "input": "Yes."})[0]["generated_text"]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_several_come_back_in_order(write, batch_size):
    expected = [{"generated_text": answer} for answer in ANSWERS]
    assert write(ROWS, batch_size=batch_size) == expected
    assert list(write((row for row in ROWS), batch_size=batch_size)) == expected
    table = datasets.Dataset.from_list([{"text": f"{row['instruction']} {row['input']}"} for row in ROWS])
    assert list(write(KeyDataset(table, "text"), batch_size=batch_size)) == expected
    assert list(write(datasets.Dataset.from_list(ROWS), batch_size=batch_size)) == expected


def test_n_best_and_samples(write):
    three = write(ROWS[3], num_beams=3, num_return_sequences=3)
    assert len(three) == 3 and three[0] == {"generated_text": ANSWERS[3]}
    both = write(ROWS[:2], num_beams=3, num_return_sequences=3, batch_size=2)
    assert [len(found) for found in both] == [3, 3] and both[1][0] == {"generated_text": ANSWERS[1]}
    torch.manual_seed(0)
    assert write(ROWS[3], do_sample=True, temperature=5.0, max_new_tokens=8)[0]["generated_text"] != ANSWERS[3]


def test_tokens_come_as_they_are_written(write):
    streamer = TextIteratorStreamer(write.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    write(ROWS[3], streamer=streamer)
    pieces = list(streamer)
    assert "".join(pieces) == ANSWERS[3] and len([piece for piece in pieces if piece]) > 1
    with pytest.raises(queue.Empty):
        streamer.text_queue.get_nowait()


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"instruction": 3}, "'instruction' must be a string"),
        ({"question": "Go."}, "'instruction' is missing"),
        ([{"role": "king", "content": "Go."}], "king"),
        ({"instruction": "Go.", "system": "Be kind."}, "no place for a system prompt"),
        ("Go \ud800.", "holds U\\+D800"),
        (3, "was given a <class 'int'>"),
    ],
)
def test_what_cannot_be_read_is_said(write, inputs, message):
    with pytest.raises(ValueError, match=message):
        write(inputs)


@pytest.mark.parametrize("family", ["diptych", "diptych_merged", "bart", "marian", "m2m_100", "t5gemma", "blenderbot"])
def test_every_family_writes(family, tiny_tokenizer, tmp_path):
    torch.manual_seed(0)
    AutoModelForSeq2SeqLM.from_config(family_configs(len(tiny_tokenizer))[family]).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    register_pipelines()
    found = pipeline("summarization", model=str(tmp_path))(ROWS[:2], max_new_tokens=4, batch_size=2)
    assert [set(row) for row in found] == [{"summary_text"}] * 2


def test_without_a_template_text_is_read_as_it_is(bare_checkpoint):
    register_pipelines()
    write = pipeline("text2text-generation", model=str(bare_checkpoint))
    assert write(f"{TO_KOREAN} Yes.") == [{"generated_text": "네."}]
    assert write(ROWS[4], template="translate") == [{"generated_text": "네."}]
    with pytest.raises(ValueError, match="carries no template"):
        write(ROWS[4])


def test_a_t5_config_says_how_its_tasks_begin(bare_checkpoint):
    register_pipelines()
    translate = pipeline("translation", model=str(bare_checkpoint))
    translate.model.config.task_specific_params = {
        "translation_en_to_ko": {"prefix": f"{TO_KOREAN} "},
        "summarization": {"prefix": f"{TO_KOREAN} "},
    }
    assert translate("Yes.", src_lang="en", tgt_lang="ko") == [{"translation_text": "네."}]
    summarize = SummarizationPipeline(model=translate.model, tokenizer=translate.tokenizer)
    assert summarize(["Yes.", "Go."]) == [{"summary_text": "네."}, {"summary_text": "가."}]


WITHOUT_DIPTYCH = """
import sys, json
sys.modules["diptych"] = None
from transformers import pipeline
write = pipeline("text2text-generation", model=sys.argv[1], trust_remote_code=True)
rows = json.loads(sys.argv[2])
found = [write(row) for row in rows] + [write(rows, batch_size=3)]
text = f"{rows[0]['instruction']} {rows[0]['input']}"
found += [write(text), write([{"role": "user", "content": text}]), write(rows[0], num_beams=2, num_return_sequences=2)]
try:
    write("a </s> b")
except ValueError as error:
    found.append(str(error))
print(json.dumps(found))
"""


@pytest.mark.parametrize("kind", ["t5", "forced and stopped"])
def test_a_pipeline_travels_to_where_diptych_is_not_installed(kind, t5_checkpoint, two_languages, tmp_path):
    folder, rows, answers = tmp_path / "published", ROWS, ANSWERS
    if kind == "t5":
        shutil.copytree(t5_checkpoint, folder)
    else:
        model, tokenizer, learned = two_languages
        attach_template(
            tokenizer, Template("ko", "{{ instruction }}{{ input }}", decoder_prefix=("<ko>",), stop=("생",))
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        rows = [{"instruction": row["source"], "input": ""} for row in learned[:3]]
        answers = [row["target"].split("생")[0] for row in learned[:3]]
    config, code = travelling_pipeline(
        json.loads((folder / "config.json").read_text()), AutoTokenizer.from_pretrained(folder)
    )
    (folder / "config.json").write_text(json.dumps(config))
    assert b"from diptych" not in code and inspect.getsource(template_sandbox.LimitedEnvironment).encode() in code
    (folder / TRAVELLING_CODE).write_bytes(code)
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DIPTYCH, str(folder), json.dumps(rows)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *alone, together, text, messages, two, refused = json.loads(done.stdout)
    assert [found[0]["generated_text"] for found in alone] == answers
    assert [found[0]["generated_text"] for found in together] == answers
    assert text[0]["generated_text"] == messages[0]["generated_text"] == two[0]["generated_text"] == answers[0]
    assert len(two) == 2 and "control token </s>" in refused
    register_pipelines()
    ours = pipeline(
        "text2text-generation", model=str(folder), trust_remote_code=False, pipeline_class=Text2TextPipeline
    )
    assert [found["generated_text"] for found in ours(rows)] == answers
