"""Mixtures of experts: what their routers add to the loss in training, however a step is divided, and experts to which
no token is routed. (That one batch has the loss that the model computes is in test_own_loss.py.)
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from diptych.finetune.batches.padded_rows import pad_batch
from diptych.finetune.inference.generation import generate_outputs
from diptych.finetune.model.families import decoder_start_token
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.loss import Seq2SeqObjective

MIXTURES = ("switch_transformers", "nllb-moe")
WITHOUT = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}


def own_loss(model, batch, **more) -> float:
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        return model(**given, **more).loss.item()


@pytest.mark.parametrize("family", MIXTURES)
def test_each_micro_batch_adds_its_routers_loss_by_its_share_of_targets(family, new_model, eight_prepared_rows):
    """2 + 6 rows: cross-entropy is that of all targets, and the routers' part a mean over the step."""
    model = new_model(family, router_aux_loss_coef=0.5).eval()
    start, total = decoder_start_token(model), sum(len(row["labels"]) for row in eight_prepared_rows)
    objective, expected, found = Seq2SeqObjective(model).train(), 0.0, 0.0
    model.eval()
    for rows in (eight_prepared_rows[:2], eight_prepared_rows[2:], []):  # a rank without rows adds nothing
        batch = pad_batch(rows, 0, start)
        found += objective(batch, total).item()
        share = sum(len(row["labels"]) for row in rows) / total
        if rows:
            expected += share * own_loss(model, batch, output_router_logits=True)
    assert found == pytest.approx(expected, rel=1e-5)
    batch = pad_batch(eight_prepared_rows, 0, start)
    validated = objective.eval()(batch, total).item()
    assert validated == pytest.approx(own_loss(model, batch), rel=1e-5) and found - validated > 0.1


@pytest.mark.parametrize("family", MIXTURES)
def test_rows_of_a_batch_do_not_compete_for_experts_in_training(family, new_model):
    """Of 240 tokens in a batch, no expert of an NLLB-MoE would take more than 64."""
    model = new_model(family, **WITHOUT).train()
    ids = torch.randint(3, 360, (8, 30), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row.tolist(), "labels": row.flip(0).tolist()} for row in ids]
    objective, start = Seq2SeqObjective(model).train(), decoder_start_token(model)
    together = objective(pad_batch(rows, 0, start), ids.numel())
    alone = sum(objective(pad_batch([row], 0, start), ids.numel()) for row in rows)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*MIXTURES, "led", "encoder-decoder"])
def test_two_ranks_take_the_steps_of_one_and_wait_for_no_unused_weight(
    family, nursery, new_model, training_folder, tmp_path
):
    """With experts to which the rows of a rank send no token, global attention, and a pooler that nobody reads. On one
    rank the same batches are two micro-batches of a step."""
    new_model(family, **({"num_experts": 16} if family in MIXTURES else {})).save_pretrained(tmp_path / "model")
    found = []
    for ranks in (1, 2):
        out, log = tmp_path / f"run{ranks}", tmp_path / f"log{ranks}"
        train = ["--model", tmp_path / "model", "--data", training_folder, "--out", out, "--max_steps", 2]
        train += ["--batch_size", 4, "--gradient_accumulation_steps", 2 // ranks, "--precision", "fp32"]
        train += ["--group_by_length", "false", "--epsilon", 1e-2, "--rank_timeout", 60, "--logging_every", 1]
        ended = [process.wait(120) for process in nursery.train(list(map(str, train)), log, ranks)]
        assert ended == [0] * ranks, (tmp_path / f"log{ranks}.0").read_text()
        losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        found.append((losses, load_file(out / "final" / "model.safetensors")))
    (losses, weights), (others, other_weights) = found
    assert losses == pytest.approx(others, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["switch_transformers", "t5"])
def test_a_decoder_that_is_deeper_than_its_encoder_generates(family, new_model, tiny_tokenizer, eight_prepared_rows):
    model = new_model(family, num_decoder_layers=4).eval()
    sources = [eight_prepared_rows[2]["input_ids"]]
    loaded = LoadedModel.of(model, tiny_tokenizer)
    (output,) = generate_outputs(loaded, sources, batch_size=1, max_new_tokens=6)
    (beams,) = generate_outputs(loaded, sources, batch_size=1, max_new_tokens=6, num_beams=2)
    for settings, found in (({}, output), ({"num_beams": 2}, beams)):
        expected = model.generate(
            torch.tensor(sources), max_new_tokens=6, do_sample=False, use_cache=False, **settings
        )
        assert list(found.ids) == expected[0, 1:].tolist()


@pytest.mark.parametrize("family", MIXTURES)
def test_checkpointed_layers_give_the_same_gradients(family, new_model, eight_prepared_rows):
    """The routers' logits come out of layers that are computed twice."""
    found = []
    for is_checkpointed in (False, True):
        model = new_model(family, router_aux_loss_coef=0.5).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = Seq2SeqObjective(model).train()(pad_batch(eight_prepared_rows, 0, decoder_start_token(model)), 50)
        loss.backward()
        found.append((loss, {name: weight.grad for name, weight in model.named_parameters()}))
    (loss, gradients), (other, others) = found
    torch.testing.assert_close(other, loss)
    assert sum("router" in name and gradient is not None for name, gradient in gradients.items()) == 2
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-5)
