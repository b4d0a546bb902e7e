"""What a paired model's training begins with: cross-attention alone, and an encoder that opens step by step."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.train import run_recipe
from diptych.finetune.training.starting_model import open_encoder, train_cross_attention_alone


@pytest.fixture
def recipe(short_run, packed_folder):
    return partial(
        short_run, data=str(packed_folder(0)), max_steps=4, batch_size=1, learning_rate=5e-3, logging_every=1
    )


READS = {
    "diptych": ("cross_attn", "cross_attention_layernorm"),
    "t5": ("EncDecAttention", "layer.1.layer_norm"),
    "bart": ("encoder_attn",),
    "t5gemma": ("cross_attn",),
}


@pytest.mark.parametrize("family", READS)
def test_cross_attention_is_trained_alone(family, recipe, packed_folder, checkpoint_of, new_model, tmp_path):
    model = new_model(family)
    train_cross_attention_alone(model)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained and all(any(part in name for part in READS[family]) for name in trained)
    assert not any(".encoder." in name for name in trained)
    data = str(packed_folder(2 if family == "t5gemma" else 0))
    run_recipe(recipe(family, trainable="cross_attention", data=data))
    before, after = (
        load_file(folder / "model.safetensors") for folder in (checkpoint_of(family), tmp_path / "run/final")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and changed <= set(trained)


def test_a_merged_hinge_has_nothing_to_warm_up(recipe):
    with pytest.raises(UserError, match="with merged cross-attention, no weights are new. Set trainable: all"):
        run_recipe(recipe("diptych_merged", trainable="cross_attention"))
    with pytest.raises(UserError, match="but method is lora"):
        recipe("diptych", trainable="cross_attention", method="lora")


def test_the_encoder_opens_from_nothing_to_everything(new_model):
    model, seen = new_model("diptych"), []
    for step in range(6):
        open_encoder(model, step, 4, [3, 40, 7])
        seen.append(model.config.encoder.lookahead)
    assert seen == [0, 10, 20, 30, None, None]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["diptych", "diptych_merged"])
def test_an_opening_run_is_trained_saved_and_gone_on_with_as_far_as_it_is_open(family, recipe, tmp_path):
    whole = recipe(family, max_steps=6, open_encoder_steps=4, save_every=2, keep_last=9, schedule="constant")
    run_recipe(whole)
    found = {
        folder.name: json.loads((folder / "model/config.json").read_text())["encoder"]["lookahead"]
        for folder in sorted((tmp_path / "run/checkpoints").glob("step-*"))
    }
    longest = 32  # of a packed row
    assert found == {"step-000002": longest // 2, "step-000004": None, "step-000006": None}
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run/final").config.encoder.lookahead is None

    cut = replace(whole, out=str(tmp_path / "cut"))
    run_recipe(replace(cut, max_steps=3, save_every=3))
    run_recipe(replace(cut, resume=True))
    one, other = (load_file(tmp_path / name / "final/model.safetensors") for name in ("run", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("run", "cut")]
    losses = [[json.loads(line)["loss"] for line in entries] for entries in lines]
    assert losses[0] == losses[1]
    run_recipe(replace(whole, out=str(tmp_path / "open"), open_encoder_steps=0))
    entries = (tmp_path / "open" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(entries[0])["loss"] != losses[0][0], "a causal encoder reads otherwise"


@pytest.mark.slow
def test_two_ranks_open_as_one(packed_folder, checkpoint_of, nursery, tmp_path):
    base = {"model": str(checkpoint_of("diptych_merged")), "data": str(packed_folder(0)), "max_steps": 4}
    base |= {"open_encoder_steps": 3, "precision": "fp32", "epsilon": 1e-2, "rank_timeout": 60.0}
    for ranks in (1, 2):
        settings = base | {"out": str(tmp_path / str(ranks)), "batch_size": 2 // ranks}
        file = tmp_path / f"{ranks}.json"
        file.write_text(json.dumps(settings))
        processes = nursery.train(["--config", str(file)], tmp_path / f"log-{ranks}", ranks)
        ended = [process.wait(120) for process in processes]
        assert ended == [0] * ranks, (tmp_path / f"log-{ranks}.0").read_text()
    one, two = (load_file(tmp_path / ranks / "final/model.safetensors") for ranks in ("1", "2"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-5)


def test_an_encoder_that_is_always_open_is_no_diptychs(recipe):
    with pytest.raises(UserError, match="the encoder of a t5 is always open"):
        run_recipe(recipe("t5", open_encoder_steps=3))
