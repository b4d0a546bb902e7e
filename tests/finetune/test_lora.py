"""LoRA on every family: what is trained, what is saved, and that loaded and merged it is what was trained."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM

from diptych.data_prep.records import UserError
from diptych.finetune.batches import pad_batch
from diptych.finetune.families import FAMILIES, decoder_start_token, vocabulary_tables
from diptych.finetune.lora import add_adapter, grow_embeddings, load_adapter, merge_adapter, save_adapter
from diptych.finetune.objectives import Seq2SeqObjective

NEW_TOKEN = 370
ROWS = [
    {"input_ids": [12, 7, NEW_TOKEN, 1], "labels": [31, NEW_TOKEN + 1, 1]},
    {"input_ids": [5, 8, 1], "labels": [22, 1]},
]
GROWN = NEW_TOKEN + 2


def train(model: PeftModel, steps: int = 5) -> None:
    """Far enough from its start that a mistake in loading or merging is seen."""
    objective = Seq2SeqObjective(model).train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, 1e-2, weight_decay=0.0)
    for _ in range(steps):
        objective(batch_for(model), 5).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def batch_for(model) -> dict[str, torch.Tensor]:
    rows = model.get_input_embeddings().weight.shape[0]
    kept = [{name: [min(token, rows - 1) for token in ids] for name, ids in row.items()} for row in ROWS]
    return pad_batch(kept, 0, decoder_start_token(model))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(**{name: ids for name, ids in batch_for(model).items() if name != "labels"}).logits


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """1e-5 of the logits' size: the random heads of mT5 and T5Gemma have logits in the hundreds."""
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("vocabulary", ["as it is", "grown", "trained"])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_adapter_loads_exactly_and_merges(family, vocabulary, new_model, tmp_path):
    new_model(family).save_pretrained(tmp_path / "base")

    def base():
        model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
        if vocabulary == "grown":
            grow_embeddings(model, GROWN)
        return model

    settings = {"rank": 4, "alpha": 8, "train_embeddings": vocabulary == "trained"}
    settings |= {"new_rows": GROWN - 368 if vocabulary == "grown" else 0}
    model = add_adapter(base(), str(tmp_path / "base"), **settings)
    before = logits(model.eval())
    train(model)
    trained = logits(model)
    assert (trained - before).abs().max() > 0.01
    save_adapter(model, tmp_path / "adapter")

    resumed = add_adapter(base(), str(tmp_path / "base"), **settings).eval()
    load_adapter(resumed, tmp_path / "adapter")
    assert torch.equal(logits(resumed), trained)

    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()  # peft alone, as anyone would
    assert torch.equal(logits(loaded), trained)

    merged = merge_adapter(loaded)
    assert_close(logits(merged), trained)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(again), logits(merged))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_both_panels_gets_an_adapter(family, new_model):
    model = new_model(family)
    tables = {id(weight) for weight in vocabulary_tables(model).values()}
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and id(module.weight) not in tables
    }
    adapted = add_adapter(model, "base", rank=2, alpha=4)
    found = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
        for name, weight in adapted.named_parameters()
        if weight.requires_grad and "lora_A" in name
    }
    assert found == linear


@pytest.mark.parametrize("family", ["t5", "bart", "t5gemma", "diptych"])
def test_only_the_new_rows_of_a_grown_vocabulary_move(family, new_model):
    model = new_model(family)
    grow_embeddings(model, GROWN)
    adapted = add_adapter(model, "base", rank=2, alpha=4, new_rows=GROWN - 368)
    tables = vocabulary_tables(model)
    before = {name: table.detach().clone() for name, table in tables.items()}
    train(adapted)
    for name, table in tables.items():
        assert torch.equal(table[:368], before[name][:368]), name
        assert not torch.equal(table[NEW_TOKEN:], before[name][NEW_TOKEN:]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_grown_checkpoint_loads_again(family, new_model, tmp_path):
    model = new_model(family).eval()
    grow_embeddings(model, GROWN)
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


def test_wrong_targets_are_refused(new_model):
    with pytest.raises(UserError, match="no adapter could be added.*qproj.*lora_targets"):
        add_adapter(new_model("t5"), "base", rank=2, alpha=4, targets=["qproj"])
