"""Tokens added to a tokenizer get rows: the mean of their old pieces, in every family, in full and with LoRA."""

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.text_to_ids.encode import encode_sources, encode_targets
from diptych.data_prep.text_to_ids.extend_tokenizer import add_new_tokens, learn_new_tokens, pieces_of_new_tokens
from diptych.data_prep.text_to_ids.train_tokenizer import train_tokenizer
from diptych.finetune.batches.padded_rows import pad_batch
from diptych.finetune.model.adapters import fill_rows_with_means, resize_embeddings
from diptych.finetune.model.families import decoder_start_token, vocabulary_tables
from diptych.finetune.model.loading import load_checkpoint
from diptych.finetune.model.loss import Seq2SeqObjective
from diptych.finetune.training.recipe import TrainRecipe
from diptych.finetune.training.saving import save_model
from diptych.finetune.training.starting_model import starting_model

FAMILIES = ["t5", "bart", "diptych"]
UNTIED = {"tie_word_embeddings": False}
PAIRS = [
    ("I am a student.", "나는 학생이다."),
    ("Hello, my friend!", "안녕, 내 친구야!"),
    ("He is my good friend.", "그는 내 좋은 친구야."),
    ("I am going to school.", "나는 학교에 간다."),
    ("He is a good student.", "그는 좋은 학생이다."),
]
TEXTS = [text for pair in PAIRS for text in pair]


@pytest.fixture(scope="module")
def old_tokenizer():
    """Little more than bytes."""
    return train_tokenizer("bpe", TEXTS, 265)


@pytest.fixture(scope="module")
def tokenizer(old_tokenizer):
    return add_new_tokens(old_tokenizer, learn_new_tokens(old_tokenizer, lambda: TEXTS, 40, minimum_frequency=2))


def batch_of(tokenizer, model) -> dict[str, torch.Tensor]:
    sources = encode_sources(tokenizer, [source for source, _ in PAIRS])
    targets = encode_targets(tokenizer, [target for _, target in PAIRS])
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in zip(sources, targets, strict=True)]
    return pad_batch(rows, tokenizer.pad_token_id, decoder_start_token(model))


def loss_of(model, tokenizer) -> torch.Tensor:
    """Mean over the target tokens."""
    batch = batch_of(tokenizer, model)
    return Seq2SeqObjective(model)(batch, int((batch["labels"] != -100).sum()))


def train(model, tokenizer, steps: int, learning_rate: float = 3e-3) -> None:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, learning_rate, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        loss_of(model, tokenizer).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def logits_of(model, tokenizer) -> torch.Tensor:
    batch = batch_of(tokenizer, model)
    return model(**{name: ids for name, ids in batch.items() if name != "labels"}).logits


@pytest.fixture(scope="module", params=[*FAMILIES, "t5gemma", "diptych untied"])
def checkpoint(request, new_model, old_tokenizer, tmp_path_factory):
    """A model that has learned the pairs with the old tokenizer, saved with it. T5Gemma has two tables, and an untied
    Diptych three."""
    family, _, untied = request.param.partition(" ")
    small = {"t5": {"initializer_factor": 0.3}, "bart": {"init_std": 0.1}, "diptych": {"initializer_range": 0.1}}
    small["t5gemma"] = {"initializer_range": 0.1}
    changes = small[family] | (UNTIED if untied else {"tie_word_embeddings": True})
    changes["vocab_size"] = len(old_tokenizer)
    if family in ("diptych", "t5gemma"):  # the two panels have these settings too
        panels = {name: new_model(family).config.to_dict()[name] | changes for name in ("encoder", "decoder")}
        changes |= {name: without_ties(panel) for name, panel in panels.items()}
    model = new_model(family, **changes)
    *_, decoder_table, head = tables_of(model)
    assert (decoder_table is head) != bool(untied)
    train(model, old_tokenizer, 80)
    folder = tmp_path_factory.mktemp("old") / request.param.replace(" ", "-")
    save_model(model, old_tokenizer, folder)
    return folder


def without_ties(panel: dict) -> dict:
    return {name: value for name, value in panel.items() if name != "tie_word_embeddings"}


def tables_of(model) -> list[torch.Tensor]:
    """Of the model, the encoder, the decoder, and the head, tied or not."""
    inputs = [part.get_input_embeddings().weight for part in (model, model.get_encoder(), model.get_decoder())]
    return [*inputs, model.get_output_embeddings().weight]


def recipe_for(checkpoint, **settings) -> TrainRecipe:
    settings = {"grow_vocabulary": True} | settings
    return TrainRecipe(model=str(checkpoint), data="not read", out="not written", max_steps=1, **settings)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_new_rows_are_the_means_of_their_pieces(checkpoint, tokenizer, old_tokenizer, method):
    model = starting_model(recipe_for(checkpoint, method=method), tokenizer, None)
    model = model.get_base_model() if method == "lora" else model
    old_tables = tables_of(AutoModelForSeq2SeqLM.from_pretrained(checkpoint))
    pieces = pieces_of_new_tokens(tokenizer)
    assert len(pieces) == len(tokenizer) - len(old_tokenizer) > 20
    for table, old_table in zip(tables_of(model), old_tables, strict=True):
        assert table.shape[0] == len(tokenizer)
        assert torch.equal(table[: len(old_tokenizer)], old_table)
        for token, old_tokens in pieces.items():
            torch.testing.assert_close(table[token], old_table[old_tokens].mean(0), rtol=0, atol=1e-6)


def test_the_first_loss_is_lower_than_from_random_rows(checkpoint, tokenizer):
    """Per target token of text that the new tokens write."""
    from_means = starting_model(recipe_for(checkpoint), tokenizer, None).eval()
    losses = []
    for seed in range(3):
        torch.manual_seed(seed)
        random = AutoModelForSeq2SeqLM.from_pretrained(checkpoint).eval()
        resize_embeddings(random, len(tokenizer))
        losses.append(loss_of(random, tokenizer).item())
    assert loss_of(from_means, tokenizer).item() < min(losses)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_trained_saved_and_loaded_gives_the_same_logits(checkpoint, tokenizer, method, tmp_path):
    model = starting_model(recipe_for(checkpoint, method=method), tokenizer, None)
    before = logits_of(model.eval(), tokenizer)
    train(model, tokenizer, 3, learning_rate=1e-2)
    trained = logits_of(model, tokenizer)
    assert (trained - before).abs().max() > 0.01
    save_model(model, tokenizer, tmp_path / "trained")

    resumed = starting_model(recipe_for(checkpoint, method=method), tokenizer, tmp_path / "trained").eval()
    assert torch.equal(logits_of(resumed, tokenizer), trained)

    loaded = load_checkpoint(tmp_path / "trained")
    saved_tokenizer = loaded.tokenizer
    assert saved_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert pieces_of_new_tokens(saved_tokenizer) == pieces_of_new_tokens(tokenizer)
    found = logits_of(loaded.model, saved_tokenizer)
    torch.testing.assert_close(found, trained, rtol=0, atol=1e-5 * max(1, trained.abs().max().item()))
    if method == "full":
        assert torch.equal(found, trained)


def test_with_lora_only_the_new_rows_of_the_tables_move(checkpoint, tokenizer, old_tokenizer):
    model = starting_model(recipe_for(checkpoint, method="lora"), tokenizer, None)
    tables = vocabulary_tables(model.get_base_model())
    before = {name: table.detach().clone() for name, table in tables.items()}
    train(model, tokenizer, 2)
    first = len(old_tokenizer)
    for name, table in tables.items():
        assert torch.equal(table[:first], before[name][:first])
        assert not torch.equal(table[first:], before[name][first:])


def test_rows_that_were_trained_are_not_filled_again(checkpoint, tokenizer, tmp_path):
    """A checkpoint whose own tokenizer has the new tokens starts from its rows, with no growth asked for."""
    model = starting_model(recipe_for(checkpoint), tokenizer, None)
    train(model, tokenizer, 2)
    save_model(model, tokenizer, tmp_path)
    again = starting_model(recipe_for(tmp_path, grow_vocabulary=False), tokenizer, None)
    assert all(map(torch.equal, tables_of(again), tables_of(model)))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_spare_rows_are_filled_and_trained_too(new_model, old_tokenizer, tokenizer, method, tmp_path):
    """T5 has more rows than tokens: the new ones find room, and are new all the same."""
    model = new_model("t5", vocab_size=len(tokenizer) + 8)
    save_model(model, old_tokenizer, tmp_path)
    started = starting_model(recipe_for(tmp_path, method=method), tokenizer, None)
    whole = started.get_base_model() if method == "lora" else started
    table, pieces = whole.get_input_embeddings().weight, pieces_of_new_tokens(tokenizer)
    assert table.shape[0] == len(tokenizer) + 8
    for token, old_tokens in pieces.items():
        torch.testing.assert_close(table[token], table[old_tokens].mean(0), rtol=0, atol=1e-6)
    before = table.detach().clone()
    train(started, tokenizer, 2)
    used = sorted(set(batch_of(tokenizer, whole)["input_ids"].flatten().tolist()) & set(pieces))
    assert used and not torch.isclose(table[used], before[used]).all(dim=1).any()


def test_tokens_extended_twice_are_filled_one_after_the_other(new_model):
    """Token 369 is made of 368, which is new itself."""
    model = new_model("t5")
    resize_embeddings(model, 370)
    fill_rows_with_means(model, {369: [368, 4], 368: [5, 6]})
    table = model.get_input_embeddings().weight
    middle = (table[5] + table[6]) / 2
    torch.testing.assert_close(table[369], (middle + table[4]) / 2)


def test_other_new_tokens_begin_as_the_mean_of_all(new_model, old_tokenizer, tmp_path):
    save_model(new_model("t5", vocab_size=len(old_tokenizer)), old_tokenizer, tmp_path / "old")
    old_tokenizer.save_pretrained(tmp_path / "plain")
    added = AutoTokenizer.from_pretrained(tmp_path / "plain")
    added.add_tokens(["<ko>", "<en>"])
    table = starting_model(recipe_for(tmp_path / "old"), added, None).get_input_embeddings().weight
    new, old = table[len(old_tokenizer) :], table[: len(old_tokenizer)]
    assert len(new) == 2 and not torch.equal(new[0], new[1])
    torch.testing.assert_close(new, old.mean(0).expand(2, -1), rtol=0, atol=1e-3 * old.std().item())


def test_growth_is_asked_for(checkpoint, tokenizer):
    with pytest.raises(UserError, match="set grow_vocabulary"):
        starting_model(recipe_for(checkpoint, grow_vocabulary=False), tokenizer, None)
