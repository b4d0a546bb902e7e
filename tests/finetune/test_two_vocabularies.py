"""Models with a vocabulary for each side: Marian's with `separate_vocabs`, and FSMT's. Every command, on a model that
has learned its pairs, against what plain transformers does with the same checkpoint.
"""

import importlib.util
import json
import re
import shutil
import sys
from types import SimpleNamespace

import datasets
import openai
import pytest
import sentencepiece
import torch
from listening import listening
from transformers import (
    FSMTConfig,
    FSMTForConditionalGeneration,
    FSMTTokenizer,
    MarianConfig,
    MarianMTModel,
    MarianTokenizer,
)

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.reading.sources import SAMPLES_FOLDER
from diptych.data_prep.rows.records import Languages
from diptych.data_prep.text_to_ids.two_vocabularies import source_side, target_side
from diptych.finetune.commands.cli import main as diptych
from diptych.finetune.evaluating.evaluate_rows import evaluate_rows
from diptych.finetune.exporting.publish import ALLOWED
from diptych.finetune.inference.generation import generate_outputs
from diptych.finetune.inference.pipeline_diptych import DiptychPipeline
from diptych.finetune.inference.pipelines import TranslationPipeline, travelling_pipeline
from diptych.finetune.inference.prompts import Prompt, Prompter, template_for
from diptych.finetune.inspecting import doctor, inspection_facts
from diptych.finetune.inspecting.doctor_checks import CHECKS, examine
from diptych.finetune.inspecting.doctor_settings import DoctorSettings
from diptych.finetune.inspecting.inspection import Reader
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.loading import load_checkpoint, load_tokenizer

PAIRS = [
    ("Go.", "가."),
    ("Yes.", "네."),
    ("I am a student.", "나는 학생이다."),
    ("He is my friend.", "그는 내 친구야."),
    ("He is a good friend.", "그는 좋은 친구야."),
    ("It is raining again today.", "오늘 또 비가 온다."),
    ("Where is my book?", "내 책은 어디에 있어?"),
    ("The train is late.", "기차가 늦는다."),
]
SIZES = {"d_model": 48, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "dropout": 0.0, "attention_dropout": 0.0}
SIZES |= {f"{panel}_{part}": 2 for panel in ("encoder", "decoder") for part in ("layers", "attention_heads")}
SIZES |= {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "max_position_embeddings": 64, "init_std": 0.1}


def pieces(place, sentences, size, pad_first):
    """A sentencepiece model and, with other ids, a vocabulary of its pieces: the files of one side."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(place),
        vocab_size=size,
        character_coverage=1.0,
        minloglevel=2,
    )
    lines = place.with_suffix(".vocab").read_text(encoding="utf-8").splitlines()
    words = [line.split("\t")[0] for line in lines]
    words = ["</s>", "<unk>", *(word for word in words if word not in ("<s>", "</s>", "<unk>"))]
    words.insert(2 if pad_first else len(words), "<pad>")
    place.with_suffix(".json").write_text(json.dumps({word: row for row, word in enumerate(words)}))
    return str(place.with_suffix(".model")), str(place.with_suffix(".json"))


def samples(side):
    lines = (SAMPLES_FOLDER / "tatoeba_eng_kor.tsv").read_text(encoding="utf-8").splitlines()
    return [line.split("\t")[side] for line in lines[:600]] + [pair[side] for pair in PAIRS]


def marian(folder, languages, sizes, pad_first=False):
    """A new checkpoint. Unless they come first, the padding tokens are the last ones, each of another id."""
    (source, source_words), (target, target_words) = (
        pieces(folder / side, samples(language), size, pad_first)
        for side, language, size in zip(("source", "target"), languages, sizes, strict=True)
    )
    tokenizer = MarianTokenizer(source, target, source_words, target_words, separate_vocabs=True)
    config = MarianConfig(
        vocab_size=len(tokenizer.encoder),
        decoder_vocab_size=len(tokenizer.target_encoder),
        share_encoder_decoder_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=0,
        decoder_start_token_id=tokenizer.target_encoder["<pad>"],
        forced_eos_token_id=None,
        **SIZES,
    )
    torch.manual_seed(0)
    model = MarianMTModel(config)
    for saved in (model, tokenizer):
        saved.save_pretrained(folder / "base")
    return folder / "base"


def run(*arguments):
    return diptych(list(map(str, arguments)))


def learned(folder, base, pairs, *more):
    """final/ of a run that has learned these pairs, prepared and trained by the commands."""
    rows = [json.dumps(dict(zip(("source", "target"), pair, strict=True)), ensure_ascii=False) for pair in pairs]
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    prepare = ["prepare", "--data", folder / "rows.jsonl", "--tokenizer", base, "--out", folder / "prepared"]
    assert run(*prepare, "--template", "plain", "--forward", "", "--validation_fraction", 0, "--test_fraction", 0) == 0
    train = ["train", "--model", base, "--data", folder / "prepared", "--out", folder / "run", "--precision", "fp32"]
    train += ["--max_steps", 120, "--batch_size", 8, "--learning_rate", 5e-3]
    assert run(*train, "--eval_every", 1000, "--save_every", 1000, "--logging_every", 50, *more) == 0
    return folder / "run" / "final"


@pytest.fixture(scope="module")
def larger_target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("larger_target")
    return learned(folder, marian(folder, (0, 1), (150, 620)), PAIRS)


@pytest.fixture(scope="module")
def larger_source(tmp_path_factory):
    folder, pairs = tmp_path_factory.mktemp("larger_source"), [pair[::-1] for pair in PAIRS]
    return learned(folder, marian(folder, (1, 0), (620, 150), pad_first=True), pairs)


@pytest.fixture(scope="module", params=["larger_target", "larger_source"])
def learned_pairs(request):
    """(final/, its pairs)."""
    pairs = PAIRS if request.param == "larger_target" else [pair[::-1] for pair in PAIRS]
    return request.getfixturevalue(request.param), pairs


def ours(folder, pairs, **settings):
    loaded = load_checkpoint(folder)
    prompter = Prompter(loaded.tokenizer, template_for("", loaded.tokenizer), None)
    ids, _ = prompter.encode([prompter.render(Prompt("", source))[0] for source, _ in pairs])
    return generate_outputs(loaded, ids, batch_size=8, max_new_tokens=24, **settings)


def prepared_rows(folder):
    return datasets.load_from_disk(folder.parents[1] / "prepared")["train"]


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_loss_and_outputs_are_those_of_plain_transformers(learned_pairs, beams):
    folder, pairs = learned_pairs
    rows, sources, targets = prepared_rows(folder), *map(list, zip(*pairs, strict=True))
    model, tokenizer = MarianMTModel.from_pretrained(folder), MarianTokenizer.from_pretrained(folder)
    plain = tokenizer(sources, text_target=targets, return_tensors="pt", padding=True)
    for name, pad in (("input_ids", tokenizer.pad_token_id), ("labels", tokenizer.pad_token_id)):
        assert [[id for id in ids if id != pad] for ids in plain[name].tolist()] == rows[name]
    outputs = ours(folder, pairs, num_beams=beams)
    assert [output.text for output in outputs] == targets
    labels = plain.pop("labels")
    labels = labels.masked_fill(labels == tokenizer.pad_token_id, -100)
    written = model.generate(**plain, num_beams=beams, max_new_tokens=24).tolist()
    for ids, output in zip(written, outputs, strict=True):
        assert ids[: len(output.ids) + 1] == [model.config.decoder_start_token_id, *output.ids]
    figures = evaluate_rows(LoadedModel.of(model, load_tokenizer(str(folder))), rows, metrics=["exact_match"]).figures
    assert figures["exact_match_rows"] == 100
    assert figures["loss"] == pytest.approx(model(**plain, labels=labels).loss.item(), rel=1e-5)


def test_a_prepared_folder_counts_and_shows_each_side_in_its_vocabulary(learned_pairs):
    folder, pairs = learned_pairs
    prepared, rows = folder.parents[1] / "prepared", prepared_rows(folder)
    tokenizer = MarianTokenizer.from_pretrained(folder)
    packing = json.loads((prepared / "manifest.json").read_text())["packing"]
    sizes = len(tokenizer.encoder), len(tokenizer.target_encoder)
    assert (packing["vocabulary"], packing["target_vocabulary"]) == sizes
    start = packing["decoder_start_token_id"]
    assert packing["largest_target_id"] == max(start, packing["pad_token_id"], *map(max, rows["labels"]))
    assert packing["largest_source_id"] == max(packing["pad_token_id"], *map(max, rows["input_ids"]))
    shown = json.loads((prepared / "report.json").read_text())["samples"]
    for sample, pair in zip(shown, pairs, strict=True):
        sides = (sample[name] for name in ("input_tokens", "label_tokens"))
        assert tuple("".join(chip["text"] for chip in side) for side in sides) == tuple(f" {it}</s>" for it in pair)
        assert sample["decoder_input_tokens"][0]["text"] == "<pad>"


def test_ids_and_unknown_characters_are_looked_for_in_their_sides_vocabulary(larger_target, tmp_path, capsys):
    rows = [{"input_ids": [300, 0], "labels": [5, 0]}, {"input_ids": [5, 0], "labels": [300, 0]}]
    (tmp_path / "ids.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "texts.jsonl").write_text(
        '{"source": "Go 가", "target": "가."}\n{"source": "Go.", "target": "가 쀍."}'
    )
    found = {}
    for name in ("ids", "texts"):
        prepare = ["prepare", "--data", tmp_path / f"{name}.jsonl", "--tokenizer", larger_target]
        prepare += ["--forward", ""] if name == "texts" else []
        assert run(*prepare, "--out", tmp_path / name, "--validation_fraction", 0, "--test_fraction", 0) == 0
        found[name] = json.loads((tmp_path / name / "manifest.json").read_text())
    (rejected,) = (tmp_path / "ids" / "rejects.jsonl").read_text().splitlines()
    assert "holds the token 300, and the ids of the tokenizer end at 149" in rejected and '"row": 1' in rejected
    lost = found["texts"]["tokenizer"]["lost"]
    assert {kind: it["examples"] for kind, it in lost.items()} == {
        "unknown characters of the source": 1,
        "unknown characters of the target": 1,
    }
    assert "'가 쀍.' becomes '가 <unk> .'" in lost["unknown characters of the target"]["such as"]


def test_packed_and_padded_rows_train_alike(larger_target, tmp_path):
    found = []
    for packed in ("true", "false"):
        train = ["train", "--model", larger_target, "--data", larger_target.parents[1] / "prepared"]
        train += [
            "--packed",
            packed,
            "--out",
            tmp_path / packed,
            "--max_steps",
            1,
            "--batch_size",
            8,
            "--precision",
            "fp32",
        ]
        assert run(*train) == 0
        lines = map(json.loads, (tmp_path / packed / "metrics.jsonl").read_text().splitlines())
        found += [(line["loss"], line["gradient_norm"]) for line in lines if line["split"] == "train"]
    assert found[0] == pytest.approx(found[1], rel=1e-5) and len(found) == 2


@pytest.mark.parametrize(
    "check",
    [it for it in CHECKS if not it.startswith("HF Trainer") and it != "2 ranks = 1 rank"],  # as for every BART
)
def test_doctor_is_green(check, learned_pairs, tmp_path):
    folder, _ = learned_pairs
    with doctor.quiet():
        patient = doctor.admit(DoctorSettings(str(folder), data=str(folder.parents[1] / "prepared")), tmp_path)
        assert examine(check, patient).status == "green"


def test_every_way_to_generate_writes_the_targets_words(learned_pairs, tmp_path, capsys):
    folder, pairs = learned_pairs
    sources, targets = map(list, zip(*pairs, strict=True))
    (tmp_path / "in.txt").write_text("\n".join(sources), encoding="utf-8")
    capsys.readouterr()
    assert run("generate", folder, "--input", sources[4]) == 0  # as it comes
    assert run("generate", folder, "--input", sources[4], "--mbr_samples", 2) == 0
    choices = ["--choices", *targets[3:5]]
    assert run("generate", folder, "--input", sources[4], *choices) == 0
    assert capsys.readouterr().out.splitlines() == [targets[4]] * 3
    assert run("generate", folder, "--in_file", tmp_path / "in.txt", "--out_file", tmp_path / "out.jsonl") == 0
    lines = map(json.loads, (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines())
    assert [line["prediction"] for line in lines] == targets
    loaded = load_checkpoint(folder)
    model, tokenizer = loaded.model, loaded.tokenizer
    for pipe in (TranslationPipeline, DiptychPipeline):
        found = pipe(model=model, tokenizer=tokenizer)(sources)
        assert [text for it in found for text in (it[0] if isinstance(it, list) else it).values()] == targets
    if source_side(tokenizer).pad_token_id == target_side(tokenizer).pad_token_id:
        assert "custom_pipelines" in travelling_pipeline({}, tokenizer)[0]
    else:
        with pytest.raises(UserError, match="control tokens have other ids in the target's vocabulary"):
            travelling_pipeline({}, tokenizer)
    with listening(["serve", str(folder)], tmp_path / "log") as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(model="final", prompt=sources[4], max_tokens=24, stream=True)
        assert "".join(piece.choices[0].text for piece in stream) == targets[4]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ctranslate2", "onnx"])
def test_an_export_is_proven_and_writes_the_targets_words(engine, learned_pairs, tmp_path, capsys):
    folder, pairs = learned_pairs
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"input": source}) + "\n" for source, _ in pairs))
    export = ["export", folder, "--to", engine, "--rows", tmp_path / "rows.jsonl", "--out", tmp_path / "export"]
    assert run(*export) == 0
    facts = json.loads((tmp_path / "export" / "export.json").read_text())["float32"]
    assert facts["same_rows"] == facts["rows"] == len(pairs)
    if engine == "ctranslate2":
        capsys.readouterr()
        assert run("generate", tmp_path / "export", "--engine", engine, "--input", pairs[4][0]) == 0
        assert capsys.readouterr().out.strip() == pairs[4][1]


def test_inspect_shows_each_side_in_its_vocabulary(learned_pairs):
    folder, pairs = learned_pairs
    loaded = load_checkpoint(folder)
    tokenizer = loaded.tokenizer
    reader = Reader(loaded, Prompter(tokenizer, loaded.template, None), 24)
    passage = reader.passage(pairs[4][0], Languages())
    assert reader.text(passage) == pairs[4][1]
    steps = inspection_facts.steps(loaded, passage)
    assert "".join(step["chosen"]["text"] for step in steps) == f"␣{pairs[4][1]}</s>".replace(" ", "␣")
    near = inspection_facts.embeddings(loaded, passage.source_ids)
    known = {chip["text"] for chip in inspection_facts.chips(source_side(tokenizer), range(len(tokenizer)))}
    assert {chip["text"] for it in near for chip in it["neighbours"]} <= known


def test_an_adapter_trains_and_merges(larger_target, tmp_path):
    lora = ["train", "--model", larger_target, "--data", larger_target.parents[1] / "prepared", "--method", "lora"]
    assert run(*lora, "--out", tmp_path / "lora", "--max_steps", 2, "--batch_size", 8, "--precision", "fp32") == 0
    assert run("merge", tmp_path / "lora" / "final", "--out", tmp_path / "merged") == 0
    assert [output.text for output in ours(tmp_path / "merged", PAIRS)] == [target for _, target in PAIRS]


def test_what_needs_one_vocabulary_is_refused_by_name(larger_target, tmp_path, capsys):
    prepared, rows = larger_target.parents[1] / "prepared", larger_target.parents[1] / "rows.jsonl"
    out = ["--out", tmp_path / "out"]
    two = "has a vocabulary for sources and another one for targets"
    for words, message in (
        (["train", "--model", "diptych-8m", "--data", prepared, "--max_steps", 1], f"{two}, and diptych-8m has one"),
        (["tokenizer", "report", larger_target, "--data", rows], f"{two}, and a report is of one"),
        (["tokenizer", "extend", larger_target, "--data", rows, "--tokens", 5], "cannot be extended"),
        (["denoise", "--data", rows, "--tokenizer", larger_target], f"{two}, and both sides of these pairs are of"),
    ):
        assert run(*words, *out) == 2
        assert message in capsys.readouterr().err


def test_rows_of_another_target_vocabulary_are_noticed(larger_target, tmp_path, capsys):
    other = shutil.copytree(larger_target, tmp_path / "other")
    words = json.loads((other / "target_vocab.json").read_text())
    names = list(words)
    words[names[5]], words[names[6]] = words[names[6]], words[names[5]]
    (other / "target_vocab.json").write_text(json.dumps(words))
    prepared = larger_target.parents[1] / "prepared"
    for command in (
        ["train", "--max_steps", 1, "--out", tmp_path / "run", "--model"],
        ["evaluate", "--split", "train"],
    ):
        assert run(*command, other, "--data", prepared) == 2
        assert "was prepared with another tokenizer" in capsys.readouterr().err


class Moses:
    """What FSMT's tokenizer asks of sacremoses, where it is not installed: words apart from punctuation, and back."""

    def __init__(self, lang):
        pass

    def normalize(self, text):
        return text

    def tokenize(self, text, **settings):
        return re.findall(r"\w+|[^\w\s]", text)

    def detokenize(self, tokens):
        return re.sub(r" (?=[.?])", "", " ".join(tokens))


@pytest.fixture
def moses(monkeypatch):
    if importlib.util.find_spec("sacremoses") is None:
        stand_in = {f"Moses{name}": Moses for name in ("PunctNormalizer", "Tokenizer", "Detokenizer")}
        monkeypatch.setitem(sys.modules, "sacremoses", SimpleNamespace(**stand_in))


def fsmt(folder, pairs):
    """A new checkpoint, whose tokens are single letters."""
    files = {"merges_file": folder / "merges.txt"}
    for side, texts in zip(("src", "tgt"), zip(*pairs, strict=True), strict=True):
        letters = sorted({f"{letter}{end}" for letter in "".join(texts) for end in ("", "</w>") if letter != " "})
        words = {word: row for row, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *letters])}
        files[f"{side}_vocab_file"] = folder / f"{side}.json"
        files[f"{side}_vocab_file"].write_text(json.dumps(words))
    files["merges_file"].write_text("#version: 0.2\n")
    tokenizer = FSMTTokenizer(langs=["ko", "en"], **{name: str(file) for name, file in files.items()})
    sizes = {"src_vocab_size": len(tokenizer.encoder), "tgt_vocab_size": len(tokenizer.decoder)}
    torch.manual_seed(0)
    model = FSMTForConditionalGeneration(FSMTConfig(langs=["ko", "en"], **sizes, **SIZES))
    for saved in (model, tokenizer):
        saved.save_pretrained(folder / "base")
    return folder / "base", files


def test_an_fsmt_reads_and_writes_each_side_in_its_vocabulary(moses, tmp_path, capsys):
    pairs = [pair[::-1] for pair in PAIRS]
    base, files = fsmt(tmp_path, pairs)
    folder = learned(tmp_path, base, pairs)
    rows, (sources, targets) = prepared_rows(folder), zip(*pairs, strict=True)
    tokenizer = FSMTTokenizer.from_pretrained(base)
    files |= {"src_vocab_file": files["tgt_vocab_file"], "tgt_vocab_file": files["src_vocab_file"]}
    of_targets = FSMTTokenizer(langs=["en", "ko"], **{name: str(file) for name, file in files.items()})
    assert rows["input_ids"] == tokenizer(list(sources))["input_ids"]
    assert rows["labels"] == of_targets(list(targets))["input_ids"]
    outputs = ours(folder, pairs)
    assert [output.text for output in outputs] == list(targets)
    model = FSMTForConditionalGeneration.from_pretrained(folder)
    inputs = tokenizer(list(sources), return_tensors="pt", padding=True)
    for ids, output in zip(model.generate(**inputs, num_beams=1, max_new_tokens=24).tolist(), outputs, strict=True):
        assert ids[: len(output.ids) + 1] == [model.config.decoder_start_token_id, *output.ids]
    patient = doctor.admit(DoctorSettings(str(folder), data=str(tmp_path / "prepared")), tmp_path)
    for check in ("8 micro-batches = 1 batch", "tokenizer fits embeddings", "tied weights", "batched = alone"):
        assert examine(check, patient).status == "green"
    for engine, reason in (("ctranslate2", "it has no loader for fsmt"), ("onnx", "but not the masks of a fsmt")):
        assert run("export", folder, "--to", engine, "--out", tmp_path / engine) == 2
        assert reason in capsys.readouterr().err
    assert {file.name for file in folder.iterdir()} - {"manifest.json"} <= set(ALLOWED)


def test_without_sacremoses_an_fsmt_says_so_in_one_message(moses, monkeypatch, tmp_path, capsys):
    base, _ = fsmt(tmp_path, PAIRS)
    monkeypatch.setitem(sys.modules, "sacremoses", None)  # as if it were not installed
    (tmp_path / "rows.jsonl").write_text('{"source": "Go.", "target": "가."}')
    prepare = ["prepare", "--data", tmp_path / "rows.jsonl", "--forward", "", "--out", tmp_path / "prepared"]
    for command in ([*prepare, "--tokenizer", base], ["generate", base, "--input", "Go."]):
        assert run(*command) == 2
        assert "You need to install sacremoses" in capsys.readouterr().err.splitlines()[-1]
