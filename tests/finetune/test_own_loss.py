"""What training minimises is what the model itself computes of `labels=` alone, in every family, whether its config
names the token that the decoder starts with or not. (FSMT would give its decoder the source then.)
"""

import json

import datasets
import pytest
import torch
from conftest import EIGHT_ROWS
from small_families import family_configs

from diptych.data_prep.text_to_ids.decoder_start import decoder_start_of
from diptych.finetune.batches.padded_rows import pad_batch
from diptych.finetune.commands.cli import main
from diptych.finetune.inference.generation import generate_outputs
from diptych.finetune.model.families import FAMILIES, decoder_start_token
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.loading import load_model
from diptych.finetune.model.loss import Seq2SeqObjective, left_out_of_loss

ROWS = [
    {"input_ids": [12, 7, 9, 1], "labels": [31, 40, 35, 22, 1]},
    {"input_ids": [5, 8, 1], "labels": [22, 1]},
    {"input_ids": [50, 1], "labels": [9, 9, 1]},
]
TARGET_TOKENS = 10
WRAPS = ("mbart", "plbart")
"""Their `labels=` put the last label in front, whatever the config says: eos, in rows without a language code."""
STARTS = {kind: {"decoder_start_token_id": 1} for kind in WRAPS}
STARTS |= {kind: {"decoder_start_token_id": 3} for kind in ("encoder-decoder", "bert_gpt2")}
"""transformers masks an EncoderDecoderModel's first token if it is the padding token, in training alone."""
REFUSING = ("longt5", "switch_transformers", "encoder-decoder")
"""Labels alone, where their config names no token to start with."""
OWN_HEAD = {"tie_word_embeddings": False, "scale_decoder_outputs": False}


@pytest.fixture
def new(new_model):
    def make(family, **changes):
        model = new_model(family, **changes).eval()
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
        return model

    return make


def assert_same_loss_and_gradients(model, label_smoothing=0.0):
    """In training as our objective has it, without the dropout of the model."""
    batch = pad_batch(ROWS, 0, decoder_start_token(model))
    losses, found = [], []
    given = ["input_ids", "attention_mask", "labels"] + ["decoder_input_ids"] * (model.config.model_type == "fsmt")
    routed = {"output_router_logits": True} if hasattr(model.config, "router_aux_loss_coef") else {}
    for loss in (
        Seq2SeqObjective(model, label_smoothing)(batch, TARGET_TOKENS),
        model(**{name: batch[name].clone() for name in given}, **routed, use_cache=False).loss,
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


@pytest.mark.parametrize("head", [{}, OWN_HEAD])
@pytest.mark.parametrize("family", family_configs(400))
def test_the_loss_is_the_models_own(family, head, new):
    assert_same_loss_and_gradients(new(family, **head, **STARTS.get(family, {})))


@pytest.mark.parametrize("changes", [{"ngram": 3, "eps": 0.1}, {"disable_ngram_loss": True}])
def test_a_prophetnet_is_trained_on_all_that_it_predicts_and_validated_on_the_next_token(changes, new):
    model, smoothing = new("prophetnet", **changes), changes.get("eps", 0.0)
    assert_same_loss_and_gradients(model, smoothing)
    batch = pad_batch(ROWS, 0, decoder_start_token(model))
    logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    next_token = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    torch.testing.assert_close(Seq2SeqObjective(model, smoothing).eval()(batch, TARGET_TOKENS), next_token)
    assert ("eps: 0.1" in left_out_of_loss(model.config, 0.0)) == bool(smoothing)
    assert left_out_of_loss(model.config, smoothing) == ""


@pytest.mark.parametrize(
    ("kind", "left_out"), [("nllb-moe", ""), ("prophetnet", "the loss leaves out eps: 0.1 of its config")]
)
def test_what_the_loss_leaves_out_is_said(kind, left_out, new, training_folder, tmp_path, capsys):
    new(kind, **({"eps": 0.1} if kind == "prophetnet" else {})).save_pretrained(tmp_path / kind)
    train = ["train", "--model", tmp_path / kind, "--data", training_folder, "--out", tmp_path / "run"]
    assert main(list(map(str, [*train, "--max_steps", 1, "--batch_size", 4, "--precision", "fp32"]))) == 0
    said = capsys.readouterr().out
    assert ("the loss leaves out" in said) == bool(left_out) and left_out in said


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


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind not in REFUSING])
def test_a_config_without_a_start_token_means_what_it_means_to_the_model(kind, new, tmp_path):
    large = {"vocab_size": 58_101, "decoder_vocab_size": 58_101} if kind == "marian" else {}  # its default is the last
    folder = without_start(new(kind, **large), tmp_path)
    model = load_model(str(folder), torch.float32).eval()
    named = decoder_start_of(str(folder))
    assert named[0] == decoder_start_token(model)
    if kind == "t5":  # refuses labels alone, and would generate from bos
        assert named == (2, "bos_token_id")
    else:
        assert_same_loss_and_gradients(model)


@pytest.mark.parametrize("kind", ["mbart", "plbart"])
def test_commands_start_a_decoder_as_the_model_does_where_its_config_names_no_start(
    kind, new, tiny_tokenizer, tmp_path, capsys
):
    model = new(kind)
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
    assert "packed rows" in capsys.readouterr().out
    logged = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    run("evaluate", folder, "--data", prepared, "--split", "train", "--metrics", "", "--out", report)
    assert (logged, json.loads(report.read_text())["figures"]["loss"]) == pytest.approx((own, own), rel=1e-5)

    source = batch["input_ids"][:1, : int(batch["attention_mask"][0].sum())]
    written = model.generate(source, decoder_start_token_id=1, max_new_tokens=8, do_sample=False)[0, 1:].tolist()
    loaded = load_model(str(folder), torch.float32).eval()
    (output,) = generate_outputs(
        LoadedModel.of(loaded, tiny_tokenizer), source.tolist(), batch_size=1, max_new_tokens=8
    )
    assert list(output.ids) == written
