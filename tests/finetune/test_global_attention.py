"""A LED's global attention: in training, evaluating and generating alike, as saved with the model or its adapter."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.commands.cli import main
from diptych.finetune.inference.generation import generate_outputs
from diptych.finetune.model.families import GLOBAL_LAYERS
from diptych.finetune.model.global_attention import attend_globally
from diptych.finetune.model.loading import load_checkpoint, load_model

SOURCES = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 1], [12, 13, 1, 0, 0, 0, 0, 0]])


@pytest.fixture
def train(checkpoint_of, training_folder, tmp_path, capsys):
    """`train("first", …)`: a step of a small LED; the folder of the final model, and what was said."""

    def run(wanted: str, *more: str, code: int = 0, family: str = "led"):
        out = tmp_path / f"run-{wanted}-{len(more)}"
        words = ["train", "--model", checkpoint_of(family), "--data", training_folder, "--out", out]
        words += ["--max_steps", 1, "--batch_size", 8, "--precision", "fp32", "--global_attention", wanted, *more]
        assert main(list(map(str, words))) == code
        return out / "final", capsys.readouterr()

    return run


def mask_of(tokens: int) -> torch.Tensor:
    return ((torch.arange(SOURCES.shape[1]) < tokens) & (SOURCES != 0)).long()


@pytest.mark.parametrize(("wanted", "tokens"), [("auto", 1), ("first", 1), ("none", 0), ("3", 3), (5, 5)])
def test_so_many_tokens_of_each_source_attend_globally(wanted, tokens, checkpoint_of):
    plain = AutoModelForSeq2SeqLM.from_pretrained(checkpoint_of("led")).eval()
    model = load_model(str(checkpoint_of("led")), torch.float32).eval()
    attend_globally(model, wanted)
    given = {"input_ids": SOURCES, "attention_mask": (SOURCES != 0).long(), "decoder_input_ids": SOURCES[:, :4]}
    with torch.no_grad():
        found = model(**given).logits
        expected, others = (plain(**given, global_attention_mask=mask_of(n)).logits for n in (tokens, tokens + 1))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert (others - expected).abs().max() > 0.01
        torch.testing.assert_close(
            model(**given, global_attention_mask=mask_of(tokens + 1)).logits, others, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_was_trained_with_is_saved_and_generated_with(method, train, tiny_tokenizer):
    final, _ = train("3", "--method", method)
    loaded = load_checkpoint(final)
    given = {"input_ids": SOURCES[:1], "attention_mask": torch.ones_like(SOURCES[:1])}
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": 1}
    model = load_checkpoint(final).model
    three = model.generate(**given, global_attention_mask=mask_of(3)[:1], **settings)
    assert not torch.equal(three, model.generate(**given, global_attention_mask=mask_of(1)[:1], **settings))
    (output,) = generate_outputs(loaded, SOURCES[:1].tolist(), batch_size=1, max_new_tokens=6)
    assert list(output.ids) == three[0, 1:].tolist()
    assert json.loads((final / "generation_config.json").read_text())["global_attention_tokens"] == 3


def test_it_is_part_of_the_loss_that_is_trained(train):
    first, others = (
        json.loads((train(wanted)[0].parent / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        for wanted in ("first", "4")
    )
    assert abs(first - others) > 1e-4


def test_without_any_its_weights_stay_as_they_are_and_get_no_adapter(train, checkpoint_of):
    before, after = (load_file(place / "model.safetensors") for place in (checkpoint_of("led"), train("none")[0]))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    of_global = {name for name in before if GLOBAL_LAYERS & set(name.split("."))}
    assert len(of_global) == 12 and not moved & of_global and len(moved) > 30
    adapted = load_file(train("none", "--method", "lora")[0] / "adapter_model.safetensors")
    assert adapted and not any("_global" in name for name in adapted)
    assert any(
        "_global" in name for name in load_file(train("first", "--method", "lora")[0] / "adapter_model.safetensors")
    )


@pytest.mark.parametrize(
    ("wanted", "family", "message"),
    [("last", "led", "global_attention is 'last'. Set it to first"), ("first", "t5", "but a t5 has none to choose")],
)
def test_what_is_no_number_of_tokens_is_refused(wanted, family, message, train):
    _, said = train(wanted, code=2, family=family)
    assert message in said.err


def test_a_saved_number_that_is_none_is_refused(checkpoint_of, tmp_path):
    model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint_of("led"))
    model.save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    written = json.loads(file.read_text()) | {"_from_model_config": False, "global_attention_tokens": [1]}
    file.write_text(json.dumps(written))
    with pytest.raises(UserError, match=r"global_attention_tokens in generation_config.json is \[1\]"):
        load_model(str(tmp_path))
