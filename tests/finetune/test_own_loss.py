"""What training minimises is what transformers' model computes of `labels=` alone: of every type that reads text and
writes text, with the token that its decoder starts with, in the config and left out of it.
"""

import json

import datasets
import pytest
import torch
from conftest import EIGHT_ROWS
from transformers import CONFIG_MAPPING, AutoModelForSeq2SeqLM, BertConfig

from diptych.data_prep.decoder_start import decoder_start_of
from diptych.data_prep.settings import PrepareSettings
from diptych.finetune.batches import pad_batch
from diptych.finetune.cli import main
from diptych.finetune.families import FAMILIES, decoder_start_token
from diptych.finetune.generate import generate_outputs
from diptych.finetune.loading import load_model
from diptych.finetune.objectives import Seq2SeqObjective, left_out_of_loss

WORDS = 50
IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 3}
ROWS = [
    {"input_ids": [12, 7, 9, 1], "labels": [31, 40, 35, 22, 1]},
    {"input_ids": [5, 8, 1], "labels": [22, 1]},
    {"input_ids": [50 - 1, 1], "labels": [9, 9, 1]},
]
TARGET_TOKENS = 10

T5 = {"vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4} | IDS
SPARSE = {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
BART = {"vocab_size": WORDS, "d_model": 32, "max_position_embeddings": 64, "init_std": 0.3} | IDS
BART |= {f"{panel}_{part}": 2 for panel in ("encoder", "decoder") for part in ("layers", "attention_heads")}
BART |= {f"{panel}_ffn_dim": 64 for panel in ("encoder", "decoder")}
LED = {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64, "attention_window": [8, 8]}
PANEL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GEMMA = {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 3}
GEMMA |= {**PANEL, "initializer_range": 0.3, "final_logit_softcapping": 2.0}
GEMMA_2 = GEMMA | {"layer_types": ["full_attention"] * 2}
PROPHET = {"vocab_size": WORDS, "hidden_size": 32, "max_position_embeddings": 64, "init_std": 0.3} | IDS
PROPHET |= {f"num_{panel}_{part}": 2 for panel in ("encoder", "decoder") for part in ("layers", "attention_heads")}
PROPHET |= {f"{panel}_ffn_dim": 64 for panel in ("encoder", "decoder")}
BERT = BertConfig(vocab_size=WORDS, **PANEL, initializer_range=0.3)
WRITES = {"is_decoder": True, "add_cross_attention": True}
SPEECH = {"speech_encoder_layers": 1, "speech_encoder_attention_heads": 2, "hidden_size": 32, "t2u_vocab_size": WORDS}
SPEECH |= {"t2u_encoder_layers": 1, "t2u_decoder_layers": 1}

CONFIGS = {
    **dict.fromkeys(("t5", "mt5", "umt5", "longt5"), T5),
    "switch_transformers": T5 | SPARSE,
    **dict.fromkeys(("bart", "mbart", "plbart", "m2m_100", "marian", "pegasus", "pegasus_x", "bigbird_pegasus"), BART),
    **dict.fromkeys(("blenderbot", "blenderbot-small", "mvp"), BART),
    "led": {name: value for name, value in BART.items() if name != "max_position_embeddings"} | LED,
    "nllb-moe": BART | {"num_experts": 4, "encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "prophetnet": PROPHET,
    "seamless_m4t": BART | SPEECH,
    "seamless_m4t_v2": BART | SPEECH,
    "t5gemma": {"encoder": GEMMA, "decoder": GEMMA, "vocab_size": WORDS},
    "t5gemma2": {
        "encoder": {"text_config": GEMMA_2, "vision_config": PANEL | {"image_size": 32, "patch_size": 16}},
        "decoder": GEMMA_2,
        "image_token_index": 4,
    },
    "encoder-decoder": {"encoder": BERT.to_dict(), "decoder": BERT.to_dict() | WRITES} | IDS,
}
"""FSMT is not here: transformers 5.24 gives its decoder the source in place of the labels."""
WRAPS = ("mbart", "plbart")
"""Their `labels=` put the last label in front, whatever the config says: eos, in rows without a language code."""


def new(kind: str, **changes):
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(CONFIG_MAPPING[kind].from_dict(CONFIGS[kind] | changes)).eval()
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return model


def assert_same_loss_and_gradients(model, label_smoothing=0.0):
    """In training as our objective has it, without the dropout of the model."""
    batch = pad_batch(ROWS, 0, decoder_start_token(model))
    losses, found = [], []
    for loss in (
        Seq2SeqObjective(model, label_smoothing)(batch, TARGET_TOKENS),
        model(**{name: batch[name].clone() for name in ("input_ids", "attention_mask", "labels")}).loss,
    ):
        loss.backward()
        losses.append(loss)
        found.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
        model.zero_grad()
    torch.testing.assert_close(*losses)
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    for name, gradient in found[1].items():
        scale = max(1.0, gradient.abs().max().item())  # fp32 itself is coarser than 1e-5 where they are large
        torch.testing.assert_close(found[0][name] / scale, gradient / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_loss_is_the_models_own(kind, is_tied):
    start = {"decoder_start_token_id": 1} if kind in WRAPS else {}
    model = new(kind, tie_word_embeddings=is_tied, **start)
    assert_same_loss_and_gradients(model)


@pytest.mark.parametrize("changes", [{"ngram": 3, "eps": 0.1}, {"disable_ngram_loss": True}])
def test_a_prophetnet_is_trained_on_all_that_it_predicts_and_validated_on_the_next_token(changes):
    model, smoothing = new("prophetnet", **changes), changes.get("eps", 0.0)
    assert_same_loss_and_gradients(model, smoothing)
    batch = pad_batch(ROWS, 0, decoder_start_token(model))
    logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    next_token = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    torch.testing.assert_close(Seq2SeqObjective(model, smoothing).eval()(batch, TARGET_TOKENS), next_token)
    assert ("eps: 0.1" in left_out_of_loss(model.config, 0.0)) == bool(smoothing)
    assert left_out_of_loss(model.config, smoothing) == ""


@pytest.mark.parametrize(
    ("kind", "left_out"), [("nllb-moe", "the routers' auxiliary loss"), ("prophetnet", "eps: 0.1 of its config")]
)
def test_what_the_loss_leaves_out_is_said(kind, left_out, training_folder, tmp_path, capsys):
    changes = {"vocab_size": 400, "max_position_embeddings": 128} | ({"eps": 0.1} if kind == "prophetnet" else {})
    new(kind, **changes).save_pretrained(tmp_path / kind)
    train = ["train", "--model", tmp_path / kind, "--data", training_folder, "--out", tmp_path / "run"]
    assert main(list(map(str, [*train, "--max_steps", 1, "--batch_size", 4, "--precision", "fp32"]))) == 0
    assert f"the loss leaves out {left_out}" in capsys.readouterr().out


def without_start(model, folder, tokenizer=None):
    """The model's folder, in whose configs no decoder_start_token_id stands."""
    model.save_pretrained(folder)
    for file in (folder / "config.json", folder / "generation_config.json"):
        written = json.loads(file.read_text())
        written.pop("decoder_start_token_id", None)
        file.write_text(json.dumps(written))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", [kind for kind in (*FAMILIES, "plbart") if kind in CONFIGS])
def test_a_config_without_a_start_token_means_what_it_means_to_the_model(kind, tmp_path):
    large = {"vocab_size": 58_101, "decoder_vocab_size": 58_101} if kind == "marian" else {}  # its default is the last
    folder = without_start(new(kind, **large), tmp_path)
    model = load_model(str(folder), torch.float32).eval()
    named = decoder_start_of(PrepareSettings(data=["rows.jsonl"], tokenizer=str(folder)))
    assert named[0] == decoder_start_token(model)
    if kind == "t5":  # refuses labels alone, and would generate from bos
        assert named == (2, "bos_token_id")
    else:
        assert_same_loss_and_gradients(model)


@pytest.mark.parametrize("kind", ["mbart", "plbart"])
def test_commands_start_a_decoder_as_the_model_does_where_its_config_names_no_start(
    kind, tiny_tokenizer, tmp_path, capsys
):
    """mBART is packed, PLBart padded."""
    size = {"vocab_size": len(tiny_tokenizer), "max_position_embeddings": 128}
    model = new(kind, **size, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
    folder = without_start(model, tmp_path / kind, tiny_tokenizer)
    rows = [{"instruction": told, "input": given, "output": output} for told, given, output in EIGHT_ROWS]
    (tmp_path / "rows.json").write_text(json.dumps(rows))

    def run(*arguments):
        assert main(list(map(str, arguments))) == 0

    prepared, report = tmp_path / "prepared", tmp_path / "report.json"
    none_held_out = ["--validation_fraction", 0, "--test_fraction", 0]
    run("prepare", "--data", tmp_path / "rows.json", "--tokenizer", folder, "--out", prepared, *none_held_out)
    assert "Decoder    starts with token 1, eos, as its family has it" in capsys.readouterr().out
    batch = pad_batch(datasets.load_from_disk(prepared)["train"].to_list(), 0, 1)
    own = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss.item()

    once = ["--max_steps", 1, "--batch_size", 8, "--learning_rate", 1e-9, "--precision", "fp32"]
    run("train", "--model", folder, "--data", prepared, "--out", tmp_path / "run", *once)
    assert ("trains on padded rows" in capsys.readouterr().out) == (kind == "plbart")
    logged = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    run("evaluate", folder, "--data", prepared, "--split", "train", "--metrics", "", "--out", report)
    assert (logged, json.loads(report.read_text())["figures"]["loss"]) == pytest.approx((own, own), rel=1e-5)

    source = batch["input_ids"][:1, : int(batch["attention_mask"][0].sum())]
    written = model.generate(source, decoder_start_token_id=1, max_new_tokens=8, do_sample=False)[0, 1:].tolist()
    loaded = load_model(str(folder), torch.float32).eval()
    (output,) = generate_outputs(loaded, tiny_tokenizer, source.tolist(), batch_size=1, max_new_tokens=8)
    assert list(output.ids) == written
