"""Small real things for the tests of finetune: a byte-level tokenizer trained on eight rows, and T5 and BART models of
a few thousand weights that have learned these rows by heart (two seconds each), as checkpoint folders.
"""

import json
import math
from pathlib import Path

import datasets
import pytest
import torch
from small_families import family_configs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from diptych.data_prep.pipeline.prepare_settings import PrepareSettings
from diptych.data_prep.prepare import prepare
from diptych.data_prep.text_to_ids.encode import encode_sources, encode_targets
from diptych.data_prep.text_to_ids.templates import TEMPLATES, attach_template
from diptych.finetune.batches.padded_rows import pad_batch
from diptych.finetune.commands import cli
from diptych.finetune.evaluating import metrics
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.training.recipe import TrainRecipe

torch.set_num_threads(1)  # on a machine with other work, threads that wait for each other made 60 s out of 3 s

TO_KOREAN = "Translate English to Korean:"
EIGHT_ROWS = [
    (TO_KOREAN, "Go.", "가."),
    (TO_KOREAN, "Hello!", "안녕!"),
    (TO_KOREAN, "I am a student.", "나는 학생이다."),
    (TO_KOREAN, "He is my friend, and a good one.", "그는 내 친구야, 그것도 좋은 친구."),
    (TO_KOREAN, "Yes.", "네."),
    ("Translate Korean to English:", "나는 학생이다.", "I am a student."),
    ("Translate Korean to English:", "가.", "Go."),
    ("Add.", "1 + 1", "2"),
]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "</s>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text for row in EIGHT_ROWS for text in row], trainer)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", bos_token="<s>", model_max_length=10**9
    )
    attach_template(tokenizer, TEMPLATES["translate"])
    return tokenizer


tiny_tokenizer = pytest.fixture(scope="session", name="tiny_tokenizer")(byte_tokenizer)


@pytest.fixture(scope="session")
def eight_prepared_rows(tiny_tokenizer) -> list[dict]:
    """The eight rows with the columns of a prepared dataset."""
    template = TEMPLATES["translate"]
    sources = [template.render_source(instruction, text) for instruction, text, _ in EIGHT_ROWS]
    targets = [template.render_target(output) for _, _, output in EIGHT_ROWS]
    return [
        {
            "input_ids": ids,
            "labels": labels,
            "source": source,
            "target": target,
            "instruction": instruction,
            "input": text,
            "origin": f"eight.jsonl:{number}",
        }
        for number, (ids, labels, source, target, (instruction, text, _)) in enumerate(
            zip(
                encode_sources(tiny_tokenizer, sources),
                encode_targets(tiny_tokenizer, targets),
                sources,
                targets,
                EIGHT_ROWS,
                strict=True,
            ),
            start=1,
        )
    ]


def tiny_t5(vocab_size: int) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocab_size,
            d_model=48,
            d_kv=12,
            d_ff=96,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )


def tiny_bart(vocab_size: int) -> BartForConditionalGeneration:
    torch.manual_seed(0)
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=vocab_size,
            d_model=48,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            max_position_embeddings=128,
            dropout=0.0,
            init_std=0.1,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
            decoder_start_token_id=1,
            forced_eos_token_id=None,
        )
    )


def learn_by_heart(model, rows: list[dict], floor: float = 0.0) -> None:
    """The rows as one batch, padded on the right, until the loss is within 0.02 of what cannot be known."""
    batch = pad_batch(rows, 0, 0)
    del batch["decoder_input_ids"]  # the model makes them of the labels
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(400):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if loss < floor + 0.02:
            break
    assert loss < floor + 0.02, f"the fixture did not learn: loss {loss:.3f}"
    model.eval()


@pytest.fixture(scope="session", params=["t5", "bart"])
def learned(request, tiny_tokenizer, eight_prepared_rows):
    """A model that answers each of the eight rows with its target; once as T5, once as BART."""
    if request.param == "t5":
        return request.getfixturevalue("learned_t5")
    model = tiny_bart(len(tiny_tokenizer))
    learn_by_heart(model, eight_prepared_rows)
    return model


@pytest.fixture(scope="session")
def learned_t5(tiny_tokenizer, eight_prepared_rows):
    model = tiny_t5(len(tiny_tokenizer))
    learn_by_heart(model, eight_prepared_rows)
    return model


@pytest.fixture
def loaded(learned, tiny_tokenizer):
    return LoadedModel.of(learned, tiny_tokenizer)


@pytest.fixture
def loaded_t5(learned_t5, tiny_tokenizer):
    return LoadedModel.of(learned_t5, tiny_tokenizer)


@pytest.fixture(scope="session")
def two_languages(tiny_tokenizer, tmp_path_factory):
    """(model, tokenizer, rows): a T5 that answers each source in two ways, as its decoder is given <ko> or <en>."""
    folder = tmp_path_factory.mktemp("two_languages")
    tiny_tokenizer.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<ko>", "<en>"]})
    sources = ["Go.", "Yes.", "I am a student."]
    answers = {"<ko>": ["가.", "네.", "나는 학생이다."], "<en>": ["Go!", "Yes!", "I am a friend."]}
    rows = [
        {"input_ids": ids, "labels": labels, "source": source, "target": target, "language": language}
        for language, targets in answers.items()
        for ids, labels, source, target in zip(
            encode_sources(tokenizer, sources),
            encode_targets(tokenizer, targets, decoder_prefix=[language]),
            sources,
            targets,
            strict=True,
        )
    ]
    model = tiny_t5(len(tokenizer))
    # Which of the two begins a row nobody knows: ln 2 nats.
    learn_by_heart(model, rows, floor=len(rows) * math.log(2) / sum(len(row["labels"]) for row in rows))
    return model, tokenizer, rows


@pytest.fixture(scope="session")
def t5_checkpoint(tmp_path_factory, learned_t5, tiny_tokenizer):
    """A folder as training leaves it: weights, config, tokenizer with its template."""
    folder = tmp_path_factory.mktemp("checkpoints") / "t5"
    learned_t5.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def exported_t5(tmp_path_factory, t5_checkpoint):
    folder = tmp_path_factory.mktemp("exports") / "t5"
    assert cli.main(["export", str(t5_checkpoint), "--to", "ctranslate2", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def bare_checkpoint(tmp_path_factory, learned_t5, tiny_tokenizer):
    """The same with a tokenizer that carries no template."""
    folder = tmp_path_factory.mktemp("bare")
    learned_t5.save_pretrained(folder)
    tokens = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}
    PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, **tokens).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prepared_folder(tmp_path_factory, eight_prepared_rows, tiny_tokenizer):
    """A prepared dataset with the eight rows as its test split."""
    folder = tmp_path_factory.mktemp("data") / "prepared"
    datasets.DatasetDict({"test": datasets.Dataset.from_list(eight_prepared_rows)}).save_to_disk(folder)
    tiny_tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture
def no_mecab(monkeypatch):
    """BLEU's tokens of Korean and Japanese as where MeCab is not installed: characters."""
    monkeypatch.setattr(metrics, "_missing_for", lambda tokenize: "" if tokenize == "zh" else "as if it were missing")


# What the tests of training start from: the same eight rows as a prepared folder, and a small random model per family.


@pytest.fixture(scope="session")
def training_folder(tmp_path_factory, eight_prepared_rows, tiny_tokenizer):
    """A prepared dataset: the eight rows to train on, the first five of them again to validate."""
    folder = tmp_path_factory.mktemp("data") / "eight"
    rows = datasets.Dataset.from_list(eight_prepared_rows)
    datasets.DatasetDict({"train": rows, "validation": rows.select(range(5))}).save_to_disk(folder)
    tiny_tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "manifest.json").write_text('{"rows": 8}')
    return folder


@pytest.fixture(scope="session")
def packed_folder(tmp_path_factory, tiny_tokenizer):
    """`packed_folder(start, rows)`: what `diptych prepare` makes of rows, the eight ones unless given, packed for
    decoders that start with `start`, into rows of 32 + 16 tokens."""
    place = tmp_path_factory.mktemp("packed")
    tiny_tokenizer.save_pretrained(place / "tokenizer")
    made = {}

    def folder(start: int = 0, rows=tuple(EIGHT_ROWS), name: str = "eight", **settings) -> Path:
        key = (start, name, *settings.items())
        if key not in made:
            made[key] = place / f"{name}-{len(made)}"
            lines = [json.dumps(dict(zip(("instruction", "input", "output"), row, strict=True))) for row in rows]
            (place / f"{name}.jsonl").write_text("\n".join(lines))
            settings = {"packed_source_tokens": 32, "packed_target_tokens": 16, "validation_fraction": 0.0} | settings
            prepare(
                PrepareSettings(
                    data=[str(place / f"{name}.jsonl")],
                    tokenizer=str(place / "tokenizer"),
                    template="translate",
                    out=str(made[key]),
                    test_fraction=0.0,
                    decoder_start_token_id=start,
                    **settings,
                )
            )
        return made[key]

    return folder


@pytest.fixture(scope="session")
def new_model(tiny_tokenizer):
    """`new_model("t5")`: random weights, the same ones every time; `new_model("t5", tie_word_embeddings=False)`."""
    configs = family_configs(len(tiny_tokenizer))

    def make(family: str, **changes) -> PreTrainedModel:
        torch.manual_seed(0)
        return AutoModelForSeq2SeqLM.from_config(type(configs[family]).from_dict(configs[family].to_dict() | changes))

    return make


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory, new_model):
    """`checkpoint_of("t5")`: the folder of such a model."""
    folders = {}

    def folder(family: str):
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp("checkpoints") / family
            new_model(family).save_pretrained(folders[family])
        return folders[family]

    return folder


@pytest.fixture(scope="session")
def recipe_of(checkpoint_of):
    """`recipe_of("t5", folder, learning_rate=…)`: the recipe of a short run of a tiny model into this folder."""

    def make(family: str, out: Path, **changes) -> TrainRecipe:
        settings = {"model": str(checkpoint_of(family)), "out": str(out), "precision": "fp32"}
        settings |= {"batch_size": 4, "learning_rate": 2e-3, "save_every": 1000, "logging_every": 2}
        settings |= {} if "epochs" in changes else {"max_steps": 8}
        return TrainRecipe(**(settings | changes))

    return make


@pytest.fixture
def short_run(recipe_of, tmp_path):
    """`short_run("t5", data=folder, learning_rate=…)`: the same into a new folder."""
    return lambda family="t5", out="run", **changes: recipe_of(family, tmp_path / out, **changes)


@pytest.fixture
def in_fp64(monkeypatch):
    """T5 and T5Gemma compute norms in fp32 whatever the weights are, and T5Gemma its softmax: not so in this model."""

    def whole(model):
        for it in model.modules():
            if type(it).__name__ in ("T5LayerNorm", "T5GemmaRMSNorm"):
                eps, offset = (it.eps, 1.0) if hasattr(it, "eps") else (it.variance_epsilon, 0.0)

                def norm(hidden, weight=it.weight, eps=eps, offset=offset):
                    return (offset + weight) * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)

                monkeypatch.setattr(it, "forward", norm)
        softmax = functional.softmax
        monkeypatch.setattr(functional, "softmax", lambda x, dim=-1, dtype=None: softmax(x, dim=dim))
        return model.double()

    return whole
