"""Models with language codes, in several directions: what is prepared, trained, generated and exported is what plain
transformers reads and writes with `src_lang` and `forced_bos_token_id`.
"""

import contextlib
import io
import json
import re
import urllib.error
import urllib.request

import datasets
import openai
import pytest
import torch
from listening import listening
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
    NllbTokenizer,
)

from diptych.data_prep.rows.records import Languages
from diptych.data_prep.text_to_ids.languages import codes_of
from diptych.finetune.commands.cli import main as diptych
from diptych.finetune.evaluating.evaluate_rows import DIRECTION_COLUMNS
from diptych.finetune.exporting.model_card import model_card
from diptych.finetune.inference.generation import generate_outputs
from diptych.finetune.inference.pipeline_diptych import DiptychPipeline
from diptych.finetune.inference.pipelines import TranslationPipeline, travelling_pipeline
from diptych.finetune.inference.prompts import Prompt, Prompter, template_for
from diptych.finetune.inference.target_tokens import given_tokens
from diptych.finetune.inspecting.doctor_checks import CHECKS, Patient
from diptych.finetune.inspecting.doctor_rows import rows_from
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.loading import load_checkpoint
from diptych.finetune.serving.request_batches import Engine
from diptych.finetune.serving.serve_settings import DemoSettings
from diptych.finetune.serving.served_model import load_served
from diptych.finetune.serving.web_demo import Asked, Contestant, answer_all, build_page

PAIRS = [
    ("Go.", "가.", "eng_Latn", "kor_Hang"),
    ("Yes.", "네.", "eng_Latn", "kor_Hang"),
    ("I am a student.", "나는 학생이다.", "eng_Latn", "kor_Hang"),
    ("He is a good friend.", "그는 좋은 친구야.", "eng_Latn", "kor_Hang"),
    ("Go.", "Va !", "eng_Latn", "fra_Latn"),
    ("Yes.", "Oui.", "eng_Latn", "fra_Latn"),
]
"""The same English in two languages: what is written depends on the code that the decoder is given."""

ASKED = [Prompt("", first, languages=Languages(*codes)) for first, _, *codes in PAIRS]
ASKED += [Prompt("", second, languages=Languages(*codes[::-1])) for _, second, *codes in PAIRS]
ANSWERS = [second for _, second, *_ in PAIRS] + [first for first, *_ in PAIRS]

SIZES = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "dropout": 0.0, "attention_dropout": 0.0}
SIZES |= {f"{panel}_{part}": 2 for panel in ("encoder", "decoder") for part in ("layers", "attention_heads")}
SIZES |= {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "max_position_embeddings": 64, "init_std": 0.1}
IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": None}


def learned(folder, tokenizer, model, pairs=PAIRS):
    """final/ of a run that has learned these pairs in both directions, prepared and trained by the commands."""
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    names = ("source", "target", "src_lang", "tgt_lang")
    rows = [json.dumps(dict(zip(names, pair, strict=True)), ensure_ascii=False) for pair in pairs]
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    prepare = [
        "prepare",
        "--data",
        folder / "rows.jsonl",
        "--tokenizer",
        folder / "base",
        "--out",
        folder / "prepared",
    ]
    prepare += ["--forward", "", "--backward", "", "--validation_fraction", 0, "--test_fraction", 0]
    assert diptych(list(map(str, prepare))) == 0
    train = ["train", "--model", folder / "base", "--data", folder / "prepared", "--out", folder / "run"]
    train += ["--max_steps", 150, "--batch_size", 8, "--learning_rate", 5e-3, "--precision", "fp32"]
    train += ["--eval_every", 1000, "--save_every", 1000, "--logging_every", 50]
    assert diptych(list(map(str, train))) == 0
    return folder / "run" / "final"


def bpe():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([text for pair in PAIRS for text in pair[:2]], trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    return {"vocab": trained["vocab"], "merges": [tuple(merge) for merge in trained["merges"]]}


@pytest.fixture(scope="module")
def nllb(tmp_path_factory):
    tokenizer = NllbTokenizer(**bpe())
    torch.manual_seed(0)
    config = M2M100Config(vocab_size=len(tokenizer), **SIZES, **IDS, decoder_start_token_id=2)
    return learned(tmp_path_factory.mktemp("nllb"), tokenizer, M2M100ForConditionalGeneration(config))


def ours(folder, **settings):
    """What `diptych generate` writes to all that is asked, in one batch of all directions: texts, and tokens."""
    loaded = load_checkpoint(folder)
    model, tokenizer = loaded.model, loaded.tokenizer
    prompter = Prompter(tokenizer, template_for("", tokenizer), None)
    texts, languages = zip(*map(prompter.render, ASKED), strict=True)
    ids, _ = prompter.encode(list(texts), languages)
    given = [given_tokens(LoadedModel.of(model, tokenizer, prompter.template), of_row) for of_row in languages]
    return generate_outputs(
        LoadedModel.of(model, tokenizer), ids, given=given, batch_size=16, max_new_tokens=16, **settings
    )


@pytest.mark.parametrize("beams", [1, 4])
def test_a_tuned_nllb_writes_in_plain_transformers_what_generate_writes(nllb, beams):
    """Token by token, in every direction, and it has learned them."""
    outputs = ours(nllb, num_beams=beams)
    assert [output.text for output in outputs] == ANSWERS
    model = AutoModelForSeq2SeqLM.from_pretrained(nllb)
    for prompt, output in zip(ASKED, outputs, strict=True):
        tokenizer = AutoTokenizer.from_pretrained(nllb, src_lang=prompt.languages.source)
        code = tokenizer.convert_tokens_to_ids(prompt.languages.target)
        source = tokenizer(prompt.input, return_tensors="pt")
        (ids,) = model.generate(
            **source, forced_bos_token_id=code, num_beams=beams, do_sample=False, max_new_tokens=16
        ).tolist()
        assert ids == [2, code, *output.ids]


def test_the_card_of_a_tuned_nllb_shows_how_each_direction_is_asked_for(nllb):
    assert json.loads((nllb.parents[1] / "prepared" / "manifest.json").read_text())["directions"] == {
        "eng_Latn-kor_Hang": 4, "kor_Hang-eng_Latn": 4, "eng_Latn-fra_Latn": 2, "fra_Latn-eng_Latn": 2
    }  # fmt: skip
    card = model_card(nllb.parent, "me/nllb", {path.name: path for path in nllb.iterdir()})
    assert "eng_Latn-kor_Hang, kor_Hang-eng_Latn, eng_Latn-fra_Latn, fra_Latn-eng_Latn" in card
    assert 'prompt = "…"' in card and "--instruction" not in card
    snippet = card.split("```python\n")[1].split("```")[0].replace('"me/nllb"', repr(str(nllb)))
    snippet = re.sub("prompt = .*", 'prompt = "Go."', snippet)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(snippet, {})
    assert said.getvalue() == "가.\n"


def test_rows_of_a_file_a_prompt_and_lines_are_translated_as_their_languages_say(nllb, tmp_path, capsys):
    rows = [
        {"input": prompt.input, "src_lang": prompt.languages.source, "target_language": prompt.languages.target}
        for prompt in ASKED
    ]
    rows.append({"input": "Go.", "source_language": "en", "target_language": "kor_Kore"})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--in_file", str(tmp_path / "in.jsonl"), "--out_file", str(tmp_path / "out.jsonl")]
    assert diptych(["generate", str(nllb), *files]) == 0
    *lines, wrong = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["prediction"] for line in lines] == ANSWERS
    assert wrong["error"] == "'kor_Kore' is no language code of this tokenizer. Did you mean 'kor_Hang'?"

    to_french = ["--source_language", "en", "--target_language", "fr"]
    capsys.readouterr()
    assert diptych(["generate", str(nllb), "--input", "Go.", *to_french]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == "Va !" and "(eng_Latn to fra_Latn)" in said.err
    (tmp_path / "in.txt").write_text("Go.\nYes.\n")
    files = ["--in_file", str(tmp_path / "in.txt"), "--out_file", str(tmp_path / "lines.jsonl")]
    assert diptych(["generate", str(nllb), *files, *to_french]) == 0
    lines = [json.loads(line)["prediction"] for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert lines == ["Va !", "Oui."]
    assert diptych(["generate", str(nllb), "--input", "Go.", "--source_language", "en"]) == 2
    assert "that of the target is not given" in capsys.readouterr().err
    assert diptych(["generate", str(nllb), "--input", "Go.", *to_french, "--generation.forced_bos_token_id", "5"]) == 2
    assert "Remove it; --target_language" in capsys.readouterr().err
    assert diptych(["generate", str(nllb), "--input", "가.", "--target_language", "en"]) == 2
    assert "source and target are both in eng_Latn" in capsys.readouterr().err


def test_a_model_without_codes_is_told_in_words_where_there_is_no_instruction(tiny_tokenizer):
    prompter = Prompter(tiny_tokenizer, template_for("", tiny_tokenizer), None, Languages("en", "ko"))
    assert prompter.render(Prompt("", "Go."))[0] == "translate English to Korean: Go."
    assert prompter.render(Prompt("Say it:", "Go."))[0] == "Say it: Go."
    german = Prompt("", "Go.", languages=Languages("eng_Latn", "German"))
    assert prompter.render(german)[0] == "translate English to German: Go."


def test_pipelines_take_languages_and_travel_with_them(nllb, tmp_path):
    loaded = load_checkpoint(nllb)
    model, tokenizer = loaded.model, loaded.tokenizer
    translate = TranslationPipeline(model=model, tokenizer=tokenizer)
    assert translate("Go.", src_lang="eng_Latn", tgt_lang="kor_Hang") == [{"translation_text": "가."}]
    rows = [{"input": prompt.input, **dict(zip(("source_language", "target_language"), prompt.languages, strict=True))}
            for prompt in ASKED]  # fmt: skip
    assert [found["translation_text"] for found in translate(rows, batch_size=5)] == ANSWERS
    with pytest.raises(ValueError, match="Did you mean 'kor_Hang'"):
        translate("Go.", src_lang="en", tgt_lang="kor_Kore")

    config, _ = travelling_pipeline(json.loads((nllb / "config.json").read_text()), tokenizer)
    assert "custom_pipelines" in config
    travelling = DiptychPipeline(model=model, tokenizer=tokenizer)
    assert [found[0]["generated_text"] for found in travelling(rows)] == ANSWERS
    assert travelling("Yes.", src_lang="eng_Latn", tgt_lang="fra_Latn") == [{"generated_text": "Oui."}]
    with pytest.raises(ValueError, match="None is no language code"):
        travelling("Yes.")


def translated(url, status=200, **body):
    request = urllib.request.Request(f"{url}/v1/translations", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request) as answer:
            assert answer.status == status
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        assert error.code == status, error.read()
        return json.loads(error.read())["error"]


def are_translated(url):
    """By a server, in the form of vLLM's proposal."""
    whole = json.loads(translated(url, model="final", text="Yes.", target_language="fr", source_language="en"))
    usage, id, created = whole.pop("usage"), whole.pop("id"), whole.pop("created")
    assert whole == {"object": "translation", "model": "final", "translated_text": "Oui."} | {
        "finish_reason": "stop",
        "source_language": "en",
        "target_language": "fr",
    }
    cut = json.loads(
        translated(url, model="final", text="Yes.", target_language="fr", source_language="en", max_tokens=1)
    )
    assert cut["finish_reason"] == "length"
    assert id.startswith("transl-") and created > 1e9 and usage["completion_tokens"] > 0
    default = json.loads(translated(url, model="final", text="Yes.", target_language="ko", num_beams=2))
    assert (default["translated_text"], default["source_language"]) == ("네.", "en")
    events = translated(url, model="final", text="네.", target_language="en", source_language="ko", stream=True)
    *chunks, last = [line.removeprefix("data: ") for line in events.splitlines() if line]
    chunks = [json.loads(chunk) for chunk in chunks]
    assert last == "[DONE]" and {chunk["object"] for chunk in chunks} == {"translation.chunk"}
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["delta"]["translated_text"] for choice in choices) == "Yes."
    assert choices[-1]["finish_reason"] == "stop"
    right = {"model": "final", "text": "Yes.", "target_language": "fr"}
    for name, value in (
        ("text", " "),
        ("text", ["Yes."]),
        ("target_language", None),
        ("target_language", "kor_Kore"),
        ("source_language", "xx"),
        ("prompt_template", "{text}"),
        ("n", 2),
        ("model", "other"),
    ):
        error = translated(url, 404 if name == "model" else 400, **right | {name: value})
        assert error["param"] == name and error["message"], error


@pytest.mark.slow
def test_serve_demo_and_inspect_are_told_languages(nllb, tmp_path, capsys):
    with listening(
        ["serve", str(nllb), "--source_language", "en", "--target_language", "fr"], tmp_path / "log"
    ) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)

        def ask(text, **languages):
            settings = {"model": "final", "max_tokens": 16, "extra_body": languages}
            return client.completions.create(prompt=text, **settings).choices[0].text

        assert ask("Yes.") == "Oui."
        assert ask("Yes.", source_language="eng_Latn", target_language="kor_Hang") == "네."
        assert ask("네.", src_lang="ko", tgt_lang="en") == "Yes."
        chat = client.chat.completions.create(
            model="final", messages=[{"role": "user", "content": "Go."}], extra_body={"target_language": "ko"}
        )
        assert chat.choices[0].message.content == "가."
        with pytest.raises(openai.BadRequestError, match="Did you mean 'kor_Hang'"):
            ask("Yes.", target_language="kor_Kore")
        are_translated(served.url)

    served = load_served(DemoSettings(str(nllb), target_language="fr", device="cpu"), [str(nllb)])[0]
    contestant = Contestant("nllb", served, Engine(served.loaded, batch_size=1, queue_size=1, batch_wait_ms=0))
    dropdowns = [it for it in build_page([contestant], []).blocks.values() if type(it).__name__ == "Dropdown"]
    assert [it.value for it in dropdowns] == ["eng_Latn", "fra_Latn"] and len(dropdowns[0].choices) == 202
    for code, answer in (("fra_Latn", "Va !"), ("kor_Hang", "가.")):
        asked = Asked("", "Go.", "", 16, 1, 0, 1, 1, 0, "eng_Latn", code)
        (*_, (text, _, looks)) = answer_all([contestant], asked)
        assert text == answer and "<table>" in looks
    contestant.engine.close()

    page = tmp_path / "inspect.html"
    for code, answer in (("fr", "Va !"), ("ko", "가.")):
        languages = ["--source_language", "en", "--target_language", code]
        assert (
            diptych(["inspect", str(nllb), "--input", "Go.", "--target", answer, *languages, "--out", str(page)]) == 0
        )
        assert capsys.readouterr().out.splitlines()[0].endswith(answer)


def test_an_export_to_ctranslate2_writes_each_direction(nllb, tmp_path, capsys):
    rows = [{"input": it.input, **dict(zip(DIRECTION_COLUMNS, it.languages, strict=True))} for it in ASKED]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "korean.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    export = ["export", str(nllb), "--to", "ctranslate2", "--out", str(tmp_path / "exported")]
    assert diptych([*export, "--rows", str(tmp_path / "in.jsonl")]) == 2
    assert "rows of several languages" in capsys.readouterr().err
    assert diptych([*export, "--rows", str(tmp_path / "korean.jsonl")]) == 0
    files = ["--in_file", str(tmp_path / "in.jsonl"), "--out_file", str(tmp_path / "out.jsonl")]
    assert diptych(["generate", str(tmp_path / "exported"), "--engine", "ctranslate2", *files]) == 0
    lines = [json.loads(line)["prediction"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert lines == ANSWERS
    command = ["serve", str(tmp_path / "exported"), "--engine", "ctranslate2", "--name", "final"]
    with listening([*command, "--source_language", "en"], tmp_path / "log") as served:
        are_translated(served.url)


def test_evaluate_has_the_figures_of_each_direction(nllb, tmp_path, capsys):
    report = tmp_path / "report.json"
    command = ["evaluate", str(nllb), "--data", str(nllb.parents[1] / "prepared"), "--split", "train"]
    assert diptych([*command, "--metrics", "chrf,bleu", "--out", str(report)]) == 0
    table = capsys.readouterr().out
    directions = json.loads(report.read_text())["groups"]["direction"]
    assert list(directions) == ["eng_Latn-kor_Hang", "kor_Hang-eng_Latn", "eng_Latn-fra_Latn", "fra_Latn-eng_Latn"]
    assert [found["rows"] for found in directions.values()] == [4, 4, 2, 2]
    assert all(it["figures"]["chrf"] == it["figures"]["exact_match_rows"] == 100 for it in directions.values())
    assert "direction" in table and "eng_Latn-fra_Latn" in table
    predictions = [json.loads(line) for line in (tmp_path / "report.predictions.jsonl").read_text().splitlines()]
    assert {"eng_Latn-kor_Hang": "가.", "eng_Latn-fra_Latn": "Va !"} == {
        row["direction"]: row["prediction"] for row in predictions if row["source"] == "Go."
    }
    assert diptych([*command, "--metrics", "", "--target_language", "fr"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["rows", "2"]


def test_a_decoder_that_starts_with_the_code_does_so_in_each_direction(tmp_path, capsys):
    """mBART-cc25: plain transformers has `decoder_start_token_id` for it, and the code stands last in the source."""
    vocabulary = [(word, -float(place)) for place, word in enumerate(bpe()["vocab"])]
    tokenizer = MBartTokenizer(vocab=vocabulary)
    torch.manual_seed(0)
    model = MBartForConditionalGeneration(MBartConfig(vocab_size=len(tokenizer), **SIZES, **IDS))
    codes = {"eng_Latn": "en_XX", "kor_Hang": "ko_KR", "fra_Latn": "fr_XX"}
    pairs = [(first, second, codes[source], codes[target]) for first, second, source, target in PAIRS]
    final = learned(tmp_path, tokenizer, model, pairs)
    outputs = ours(final)
    assert [output.text for output in outputs] == ANSWERS
    model = AutoModelForSeq2SeqLM.from_pretrained(final)
    for prompt, output in zip(ASKED, outputs, strict=True):
        tokenizer = AutoTokenizer.from_pretrained(final, src_lang=codes[prompt.languages.source])
        start = tokenizer.convert_tokens_to_ids(codes[prompt.languages.target])
        source = tokenizer(prompt.input, return_tensors="pt")
        assert source.input_ids[0, -1] == tokenizer.convert_tokens_to_ids(codes[prompt.languages.source])
        (ids,) = model.generate(**source, decoder_start_token_id=start, do_sample=False, max_new_tokens=16).tolist()
        assert ids == [start, *output.ids]

    # Rows as transformers' tokenizer makes them, whose model moves the code from the end of the labels to the front
    tokenised = []
    for (first, second, *_), prompt in zip(PAIRS, ASKED, strict=False):
        tokenizer.src_lang, tokenizer.tgt_lang = (codes[it] for it in prompt.languages)
        tokenised.append(dict(tokenizer(first, text_target=second)))
    (tmp_path / "ids.json").write_text(json.dumps(tokenised))
    prepare = ["prepare", "--data", tmp_path / "ids.json", "--tokenizer", final, "--out", tmp_path / "tokenised"]
    assert diptych(list(map(str, [*prepare, "--validation_fraction", 0, "--test_fraction", 0]))) == 0
    assert "starts with the language code of each example's target" in capsys.readouterr().out
    labels = {tuple(row["labels"]) for row in datasets.load_from_disk(tmp_path / "tokenised")["train"]}
    assert labels <= {tuple(row["labels"]) for row in datasets.load_from_disk(tmp_path / "prepared")["train"]}
    for row in tokenised:
        (own,) = model.prepare_decoder_input_ids_from_labels(torch.tensor([row["labels"]])).tolist()
        assert tuple(own) in labels  # the start, and what is read after it

    given = rows_from(str(tmp_path / "prepared"), tokenizer)
    patient = Patient(str(final), model, tokenizer, given, model.config, tmp_path)
    starts = [row["decoder_start"] for row in patient.step.rows]
    assert {*starts} <= codes_of(tokenizer).starts and not codes_of(tokenizer).starts & {
        token for row in patient.step.rows for token in row["labels"]
    }
    assert CHECKS["packed = separate"](patient).status == "green"
