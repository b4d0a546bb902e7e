"""Whole documents: cut into pieces, generated, joined; by both engines, from Python, in a cut run."""

import dataclasses
import json

import datasets
import pytest
from conftest import learn_by_heart, tiny_t5

import diptych
from diptych.data_prep.rows.records import Languages
from diptych.data_prep.text_to_ids.encode import encode_sources, encode_targets
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
            [ask("Go."), {"instruction": 7}, ask("Go. " * 300)],  # of prompts it is the second
            ["--max_source_tokens", "60"],
            "in.jsonl row 3: texts are cut at sentence ends",
        ),
        ([ask("Go.")], ["--long", "reduce"], "--max_source_tokens"),
        ([ask("Go.")], ["--choices", "a", "b"], "choices are given texts"),
    ],
)
def test_what_cannot_be_cut_is_an_error_before_anything_is_generated(
    tmp_path, t5_checkpoint, capsys, rows, more, said
):
    assert generate(tmp_path, t5_checkpoint, rows, "--long", "split", *more, code=2) is None
    assert said in capsys.readouterr().err


PROMISES = {
    "A cat [= 고양이].": "고양이.",
    "A cat [= 냥이].": "냥이.",
    "A cat.": "동물.",
    "No cat [= 냥이].": "개.",
    "See [#1].": "[#1] 보기.",
    "See [#1] and [#2].": "[#2]와 [#2].",
    "Go.": "가.",
}


@pytest.fixture(scope="session")
def obeying_checkpoint(tmp_path_factory, tiny_tokenizer):
    """A T5 that has learned PROMISES by heart."""
    model, folder = tiny_t5(len(tiny_tokenizer)), tmp_path_factory.mktemp("obeying") / "t5"
    sides = encode_sources(tiny_tokenizer, [*PROMISES]), encode_targets(tiny_tokenizer, [*PROMISES.values()])
    learn_by_heart(model, [{"input_ids": ids, "labels": labels} for ids, labels in zip(*sides, strict=True)])
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def terms_file(tmp_path):
    (tmp_path / "terms.tsv").write_text("cat\t냥이\n", encoding="utf-8")
    return str(tmp_path / "terms.tsv")


def test_terms_and_placeholders_are_written_into_sources_and_what_is_broken_is_told(
    tmp_path, capsys, obeying_checkpoint, terms_file
):
    texts = ["A cat.", "No cat.", "See http://a.b/c.", "See <b> and 12.", "Go.\n\nA cat. See {x}.\nNo cat."]
    rows = [{"input": text, "source_language": "en"} for text in texts]
    bare = tmp_path / "bare.jinja"
    bare.write_text("{{ input }}")
    inline = ["--terms", terms_file, "--placeholders", "true", "--template", str(bare)]
    split = ["--long", "split", "--max_source_tokens", "30"]
    lines = generate(tmp_path, obeying_checkpoint, rows, *inline, *split)
    assert [line["prediction"] for line in lines[:4]] == ["냥이.", "개.", "http://a.b/c 보기.", "12와 12."]
    assert [line["terms_missed"] for line in lines[:4]] == [[], ["냥이"], [], []]
    assert [line["placeholders_lost"] for line in lines[:4]] == [[], [], [], ["<b>", "12"]]
    assert lines[4]["source_pieces"] > 1  # over the limit with its marks
    said = capsys.readouterr().err
    for name, what in (("terms_missed", "that miss a term"), ("placeholders_lost", "that lost a placeholder's value")):
        assert f"{sum(any(line[name]) for line in lines)} {what}" in said
    whole = (tmp_path / "out.jsonl").read_bytes()
    generate(tmp_path, obeying_checkpoint, rows, *inline, *split)  # it has all rows
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    (tmp_path / "terms.tsv").write_text("cat\t고양이\n", encoding="utf-8")
    generate(tmp_path, obeying_checkpoint, rows, *inline, *split, code=2)  # other terms are another run


def test_a_single_answer_says_what_is_missing(obeying_checkpoint, terms_file, capsys):
    for text, out, err in [("No cat.", "개.", "(terms that are missing: 냥이)"), ("A cat.", "냥이.", "")]:
        asked = ["--instruction", text, "--terms", terms_file, "--device", "cpu"]
        assert cli.main(["generate", str(obeying_checkpoint), *asked]) == 0
        said = capsys.readouterr()
        assert said.out == out + "\n" and err in said.err and bool(err) == ("missing" in said.err)


def test_terms_that_contradict_each_other_are_an_error_before_the_model_is_loaded(tmp_path, terms_file, capsys):
    (tmp_path / "terms.tsv").write_text("cat\t냥이\ncat\t고양이\n", encoding="utf-8")
    assert cli.main(["generate", str(tmp_path), "--instruction", "A cat.", "--terms", terms_file]) == 2
    assert "line 2 translates 'cat' as '고양이', and line 1 as '냥이'" in capsys.readouterr().err


def test_evaluate_cuts_sources_and_counts_the_terms_that_are_honoured(
    tmp_path, capsys, obeying_checkpoint, tiny_tokenizer, terms_file
):
    texts = [("A cat.", "냥이."), ("No cat.", "냥이."), ("Go.\nGo.", "가.\n가."), ("Go.", "가.")]
    texts.append(
        ("[#1] A cat [= 냥이].", "[#1] 냥이.")
    )  # as prepared with placeholders: its instruction gives another
    rows = [
        {"input_ids": ids, "labels": labels, "source": source, "target": target, "input": ""}
        | {"instruction": source.replace("[#1]", "12")}
        | {"source_language": "en", "target_language": "ko", "origin": source}
        for ids, labels, (source, target) in zip(
            encode_sources(tiny_tokenizer, [source for source, _ in texts]),
            encode_targets(tiny_tokenizer, [target for _, target in texts]),
            texts,
            strict=True,
        )
    ]
    data, report = tmp_path / "data", tmp_path / "report.json"
    datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}).save_to_disk(data)
    tiny_tokenizer.save_pretrained(data / "tokenizer")
    command = ["evaluate", str(obeying_checkpoint), "--data", str(data), "--out", str(report), "--metrics", "chrf"]
    assert cli.main([*command, "--device", "cpu", "--terms", terms_file, "--long", "split"]) == 0
    assert {"terms": "3", "terms_honoured": "66.67"}.items() <= dict(
        line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("terms")
    ).items()
    figures = json.loads(report.read_text("utf-8"))["figures"]
    assert (figures["terms"], figures["terms_honoured"], figures["source_pieces"]) == (3, pytest.approx(200 / 3), 6)
    predictions = (tmp_path / "report.predictions.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["prediction"] for line in predictions[:4]] == ["냥이.", "개.", "가.\n가.", "가."]
    assert cli.main([*command, "--device", "cpu"]) == 0
    figures = json.loads(report.read_text("utf-8"))["figures"]
    assert not {"terms", "terms_honoured", "source_pieces"} & figures.keys()
