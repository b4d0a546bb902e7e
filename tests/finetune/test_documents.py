"""Whole documents: cut into pieces, generated, joined; by both engines, from Python, in a cut run."""

import dataclasses
import json

import pytest

import diptych
from diptych.data_prep.rows.records import Languages
from diptych.data_prep.text_to_ids.sentences import Pieces
from diptych.data_prep.text_to_ids.templates import TEMPLATES
from diptych.finetune.commands import cli
from diptych.finetune.generating.documents import Documents, joined, seam
from diptych.finetune.inference.engine import TorchEngine
from diptych.finetune.inference.generate_settings import GenerateSettings
from diptych.finetune.inference.outputs import Output
from diptych.finetune.inference.prompts import Prompt, Prompter

TO_KOREAN = "Translate English to Korean:"
ENGLISH_TO_KOREAN = Languages("en", "ko")
KNOWN = {"Go.": "가.", "Hello!": "안녕!", "I am a student.": "나는 학생이다.", "Yes.": "네."}
DOCUMENT = "  # Hello!\n\n- Yes.  I am a student.\n- Go.\n\n***\nYes.\n"
TRANSLATED = "  # 안녕!\n\n- 네.  나는 학생이다.\n- 가.\n\n***\n네.\n"


def ask(text, **more):
    return {"instruction": TO_KOREAN, "input": text} | more


def generate(tmp_path, model, rows, *more, code=0):
    in_file, out_file = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    in_file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files = ["--in_file", str(in_file), "--out_file", str(out_file)]
    settings = ["--batch_size", "2", "--max_new_tokens", "24", "--device", "cpu"]
    assert cli.main(["generate", str(model), *files, *settings, *more]) == code
    return [json.loads(line) for line in out_file.read_text("utf-8").splitlines()] if out_file.exists() else None


@pytest.fixture(scope="session")
def exported_t5(tmp_path_factory, t5_checkpoint):
    folder = tmp_path_factory.mktemp("exports") / "t5"
    assert cli.main(["export", str(t5_checkpoint), "--to", "ctranslate2", "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("engine", ["torch", "ctranslate2"])
def test_a_document_is_translated_sentence_by_sentence_and_keeps_its_form(tmp_path, request, capsys, engine):
    model = request.getfixturevalue("t5_checkpoint" if engine == "torch" else "exported_t5")
    rows = [
        ask(DOCUMENT, source_language="en", target_language="ko"),
        ask("Go.", source_language="en", target_language="ko"),
        ask("***", source_language="en", target_language="ko"),
        {"instruction": "Add.", "input": "1 + 1"},
    ]
    lines = generate(tmp_path, model, rows, "--engine", engine, "--long", "split")
    assert [line["prediction"] for line in lines] == [TRANSLATED, "가.", "***", "2"]
    assert [line["source_pieces"] for line in lines] == [5, 1, 0, 1]
    assert all(line["finished"] and not line["source_cut"] and not line["sentences_cut"] for line in lines)
    assert "1 cut into pieces, 6 pieces in all" in capsys.readouterr().err


def test_a_single_prompt_and_python_cut_as_files_do(t5_checkpoint, capsys):
    languages = ["--source_language", "en", "--target_language", "ko", "--long", "split", "--device", "cpu"]
    assert cli.main(["generate", str(t5_checkpoint), "--instruction", TO_KOREAN, "--input", DOCUMENT, *languages]) == 0
    out, err = capsys.readouterr()
    assert out == TRANSLATED + "\n" and "(1 cut into pieces, 5 pieces in all)" in err
    model = diptych.load(t5_checkpoint, device="cpu")
    asked = {"source_language": "en", "target_language": "ko", "long": "split"}
    assert model.generate([ask(DOCUMENT), ask("Yes.")], **asked) == [TRANSLATED, "네."]


def documents_of(loaded, most, long="split"):
    return Documents(Prompter(loaded.tokenizer, loaded.template, most), TorchEngine(loaded), long)


def test_other_texts_are_cut_only_over_the_limit_into_as_few_pieces_as_fit(loaded_t5):
    documents = documents_of(loaded_t5, 40)
    sentences = [*KNOWN] * 6
    short, long, odd, no_room = documents.encode(
        [
            Prompt("Add.", "One is. Two is.", languages=Languages("en")),
            Prompt("Add.", " ".join(sentences), languages=Languages("en")),
            Prompt("Add.", "Go. " + "x" * 90 + " y, z. Yes.", languages=Languages("en")),
            Prompt("Add, and add again, " * 20, "Go.", languages=Languages("en")),
        ]
    )
    assert len(short.prompts) == 1
    assert " ".join(long.pieces.texts) == " ".join(sentences) and 2 < len(long.prompts) < len(sentences) / 2
    assert all(len(prompt.source_ids) <= 40 for prompt in (*long.prompts, *odd.prompts))
    assert odd.pieces.cut_sentences == 1
    assert "".join("".join(odd.pieces.texts).split()) == "Go." + "x" * 90 + "y,z.Yes."
    assert "takes all of the 40 tokens" in no_room.error
    framed = documents_of(dataclasses.replace(loaded_t5, template=TEMPLATES["alpaca"]), 40)
    assert "has no input" in framed.encode([Prompt("Go. " * 50, languages=Languages("en"))])[0].error


def test_outputs_beams_and_scores_of_pieces_are_put_together(loaded_t5):
    settings = GenerateSettings("model", num_beams=2, num_return_sequences=2, scores=True, max_new_tokens=24)
    documents = documents_of(loaded_t5, None)
    whole, *alone = documents.encode(
        [Prompt(TO_KOREAN, text, (), "", ENGLISH_TO_KOREAN) for text in ("Go.\nYes.", "Go.", "Yes.")]
    )
    found, first, second = documents.generate([whole, *alone], settings, 0)
    for output, one, other in zip(found.outputs, first.outputs, second.outputs, strict=True):
        assert output.text == f"{one.text}\n{other.text}" and output.ids == one.ids + other.ids
        assert output.log_probability == pytest.approx(one.log_probability + other.log_probability, abs=1e-4)
        assert output.finished == (one.finished and other.finished)


def test_between_outputs_stands_what_stood_in_the_source_or_what_the_script_needs():
    assert [seam("Go.", "Stop."), seam("走。", "停。"), seam("가.", "멈춰."), seam("", "Go.")] == [" ", "", " ", ""]
    outputs = [Output(" Go. ", True), Output("Stop.", False)]
    assert joined(Pieces(["- ", "", "\n"], ["走。", "停。"]), outputs).text == "- Go. Stop.\n"
    assert not joined(Pieces(["- ", "", "\n"], ["走。", "停。"]), outputs).finished


def test_reduce_summarises_the_summaries_until_they_fit(loaded_t5):
    settings = GenerateSettings("model", max_new_tokens=24)
    documents = documents_of(loaded_t5, 30, "reduce")
    (asked,) = documents.encode([Prompt(TO_KOREAN, "I am a student. " * 80, languages=Languages("en"))])
    (answered,) = documents.generate([asked], settings, 0)
    text, rounds = asked.prompt.input, 1
    while True:  # by hand
        (again,) = documents.encode([Prompt(TO_KOREAN, text, languages=Languages("en"))])
        outputs = documents.engine.generate(again.prompts, settings, 0)
        if not again.reduces:
            break
        text, rounds = "\n".join(output.text.strip() for output in outputs), rounds + 1
        assert len(text) <= 0.9 * len(again.prompt.input)
    assert rounds > 2 and answered.rounds == rounds
    assert answered.outputs == outputs


def test_reduce_ends_where_outputs_are_not_shorter(loaded_t5):
    documents = documents_of(loaded_t5, 30, "reduce")
    (asked,) = documents.encode([Prompt(TO_KOREAN, "b. " * 100, languages=Languages("en"))])
    settings = GenerateSettings("model", max_new_tokens=200, generation={"min_new_tokens": 199})
    (answered,) = documents.generate([asked], settings, 0)
    assert answered.rounds == 1 and not answered.outputs[0].finished
    assert answered.outputs[0].text.count("\n") >= len(asked.prompts) - 1


def test_a_run_that_was_cut_goes_on_with_the_same_bytes(tmp_path, t5_checkpoint):
    rows = [ask(" ".join([*KNOWN][: number % 5]) or "Go.", id=number) for number in range(40)]
    long = ["--long", "split", "--source_language", "en", "--target_language", "ko", "--temperature", "1.5"]
    generate(tmp_path, t5_checkpoint, rows, *long)
    whole = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").write_bytes(whole[: len(whole) // 2])
    generate(tmp_path, t5_checkpoint, rows, *long)
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    generate(tmp_path, t5_checkpoint, rows, *long[2:], code=2)  # not what it was started with


@pytest.mark.parametrize(
    "rows, more, said",
    [
        ([ask("ខ្ញុំ។ ខ្ញុំ។", source_language="km", target_language="ko")], [], "no sentence splitter for Khmer"),
        (
            [ask("Go."), ask("Go. " * 300)],
            ["--max_source_tokens", "60"],
            "prompt 2 of 2: texts are cut at sentence ends",
        ),
        ([ask("Go.")], ["--long", "reduce"], "--max_source_tokens"),
        ([ask("Go.")], ["--choices", "a", "b"], "choices answer a whole prompt"),
    ],
)
def test_what_cannot_be_cut_is_an_error_before_anything_is_generated(
    tmp_path, t5_checkpoint, capsys, rows, more, said
):
    assert generate(tmp_path, t5_checkpoint, rows, "--long", "split", *more, code=2) is None
    assert said in capsys.readouterr().err
