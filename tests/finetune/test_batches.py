"""Padding, and the order of rows: every row once, the same for any rank at any time, and refusals that say why."""

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.batches.batch_tokens import largest_batch, rows_in_batch
from diptych.finetune.batches.padded_rows import (
    BatchOrder,
    PaddedRows,
    RowLengths,
    check_rows_fit,
    drop_repeated_start,
    load_prepared,
    pad_batch,
    row_lengths,
)
from diptych.finetune.model.loss import Seq2SeqObjective
from diptych.finetune.training.recipe import TrainRecipe
from diptych.finetune.training.training_batches import with_batch_size

GENERATOR = np.random.default_rng(0)
SOURCE_TOKENS = GENERATOR.integers(3, 60, 1003)
LENGTHS = RowLengths(SOURCE_TOKENS, SOURCE_TOKENS + GENERATOR.integers(-2, 8, 1003))  # translations are about as long


def order(**changes) -> BatchOrder:
    settings = {"rows_per_batch": 4, "ranks": 1, "batches_per_step": 1, "seed": 7, "group_by_length": False}
    return BatchOrder(LENGTHS, **(settings | changes))


def rows_of_steps(of: BatchOrder, epoch: int) -> list[list[int]]:
    rows = of.rows_of(epoch)
    steps = [of.step(rows, index) for index in range(of.steps_per_epoch)]
    return [[int(row) for batch in step.batches for dealt in batch for row in dealt] for step in steps]


def test_padded_batch_is_the_literal_of_the_file_head():
    rows = [{"input_ids": [12, 7, 9, 1], "labels": [31, 40, 1]}, {"input_ids": [5, 8, 1], "labels": [22, 1]}]
    batch = {name: tensor.tolist() for name, tensor in pad_batch(rows, 0, 0).items()}
    assert batch == {
        "input_ids": [[12, 7, 9, 1], [5, 8, 1, 0]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0]],
        "labels": [[31, 40, 1], [22, 1, -100]],
        "decoder_input_ids": [[0, 31, 40], [0, 22, 1]],
    }


@pytest.mark.parametrize("family", ["diptych", "t5", "bart", "m2m_100", "t5gemma"])
def test_rows_padded_together_lose_what_they_lose_alone(family, new_model):
    model = new_model(family).eval()
    rows = [{"input_ids": [12, 7, 9, 1], "labels": [31, 40, 35, 1]}, {"input_ids": [5, 1], "labels": [22, 1]}]
    objective = Seq2SeqObjective(model)
    together = objective(pad_batch(rows, 0, 2), 1)
    alone = sum(objective(pad_batch([row], 0, 2), 1) for row in rows)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("group_by_length", [False, True])
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("batches_per_step", [1, 4])
def test_every_row_comes_once_in_an_epoch(ranks, batches_per_step, group_by_length):
    of = order(ranks=ranks, batches_per_step=batches_per_step, group_by_length=group_by_length)
    for epoch in (0, 1):
        rows = [row for step in rows_of_steps(of, epoch) for row in step]
        assert sorted(rows) == list(range(1003))
    assert rows_of_steps(of, 0) != rows_of_steps(of, 1)


SPLIT = datasets.Dataset.from_dict(
    {
        "input_ids": [[5] * tokens for tokens in range(2, 42)],
        "labels": [[7] * (45 - tokens) for tokens in range(2, 42)],
    }
)
"""40 padded rows: the longest source has 41 tokens, the longest target 43."""


def test_batch_tokens_are_divided_by_the_longest_source_and_target():
    rows = PaddedRows(SPLIT, 0, 0)
    assert [rows_in_batch(tokens, rows) for tokens in (84, 167, 168, 1000)] == [1, 1, 2, 11]
    with pytest.raises(UserError, match=r"batch_tokens is 83, but the longest source and target, \[41, 43\], have 84"):
        rows_in_batch(83, rows)


@pytest.mark.parametrize("optimizer, fits", [("adamw", 1), ("muon", 11), ("adafactor", 40)])
def test_auto_finds_the_batch_that_fits_and_changes_no_weight(fits, optimizer, new_model):
    objective = Seq2SeqObjective(new_model("t5"))
    before = {name: weight.clone() for name, weight in objective.named_parameters()}
    widths = set()  # of batches of one row, and of all larger ones

    def run_out_of_memory(module, given):
        if len(given[0]["labels"]) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        widths.add(given[0]["input_ids"].shape[1] + given[0]["labels"].shape[1])

    objective.register_forward_pre_hook(run_out_of_memory)
    recipe = TrainRecipe(
        "t5", data="d", out="o", max_steps=1, precision="fp32", batch_tokens="auto", optimizer=optimizer
    )
    found = with_batch_size(recipe, PaddedRows(SPLIT, 0, 0), objective, Accelerator())
    assert widths == ({45} if fits == 1 else {45, 84})
    assert found.batch_tokens is None and fits * 0.9 - 1 < found.batch_size <= fits
    for name, weight in objective.named_parameters():
        assert torch.equal(weight, before[name]) and weight.grad is None


def test_auto_says_that_not_one_row_fits_and_passes_other_errors_on():
    def trial(rows):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    with pytest.raises(UserError, match="not even one row fits"):
        largest_batch(trial, 8)
    with pytest.raises(RuntimeError, match="shapes"):
        largest_batch(lambda rows: torch.ones(2) @ torch.ones(3, 3), 8)


def test_order_depends_on_seed_and_epoch_alone():
    before = rows_of_steps(order(), 3)
    np.random.seed(5)
    np.random.random(100)
    assert rows_of_steps(order(), 3) == before
    assert rows_of_steps(order(seed=8), 3) != before


def test_ranks_and_accumulation_share_the_rows_of_one_large_batch():
    large = [sorted(step) for step in rows_of_steps(order(rows_per_batch=12), 0)]
    for cut in ({"ranks": 3}, {"batches_per_step": 3}):
        assert [sorted(step) for step in rows_of_steps(order(**cut), 0)] == large


def test_last_rows_are_dealt_evenly_and_a_rank_may_get_none():
    lengths = RowLengths(np.full(10, 5), np.full(10, 3))
    of = BatchOrder(lengths, rows_per_batch=4, ranks=2, batches_per_step=2, seed=0)
    assert [[len(dealt) for dealt in batch] for batch in of.step(of.rows_of(0), 0).batches] == [[4, 4], [1, 1]]
    of = BatchOrder(lengths, rows_per_batch=3, ranks=3, batches_per_step=1, seed=0)
    assert [[len(dealt) for dealt in batch] for batch in of.step(of.rows_of(0), 1).batches] == [[0, 0, 1]]


def test_step_counts_its_tokens_before_they_are_read():
    of = order(batches_per_step=2)
    step = of.step(of.rows_of(0), 5)
    batches = [dealt for batch in step.batches for dealt in batch]
    rows = np.concatenate(batches)
    assert step.target_tokens == LENGTHS.target_tokens[rows].sum()
    assert step.source_tokens == LENGTHS.source_tokens[rows].sum()
    widths = [LENGTHS.source_tokens[dealt].max() + LENGTHS.target_tokens[dealt].max() for dealt in batches]
    assert step.padded_tokens == 4 * sum(widths)


def test_grouping_by_length_fills_batches():
    def fill(of: BatchOrder) -> float:
        rows = of.rows_of(0)
        steps = [of.step(rows, index) for index in range(of.steps_per_epoch)]
        tokens = sum(step.source_tokens + step.target_tokens for step in steps)
        return tokens / sum(step.padded_tokens for step in steps)

    assert fill(order()) < 0.75
    assert fill(order(group_by_length=True)) > 0.85


def test_lengths_are_those_of_the_rows(training_folder, eight_prepared_rows):
    lengths = row_lengths(load_prepared(str(training_folder)).splits["train"])
    assert lengths.source_tokens.tolist() == [len(row["input_ids"]) for row in eight_prepared_rows]
    assert lengths.target_tokens.tolist() == [len(row["labels"]) for row in eight_prepared_rows]


def test_folders_that_are_not_prepared_are_refused(tmp_path, training_folder):
    with pytest.raises(UserError, match=r"no prepared dataset .* Make one with `diptych prepare`"):
        load_prepared(str(tmp_path))
    datasets.load_from_disk(training_folder).save_to_disk(tmp_path / "halfway")
    with pytest.raises(UserError, match=r"no manifest.json, so its preparation did not end"):
        load_prepared(str(tmp_path / "halfway"))


def test_unknown_token_ids_are_refused(new_model):
    rows = datasets.Dataset.from_list([{"input_ids": [5, 400, 1], "labels": [7, 1]}])
    with pytest.raises(UserError, match=r"split train holds token id 400, but the model has 368 embedding rows"):
        check_rows_fit(new_model("t5"), {"train": rows})


@pytest.mark.parametrize("column, limit", [("input_ids", "max_source_tokens"), ("labels", "max_target_tokens")])
def test_rows_beyond_the_position_table_are_refused_where_there_is_one(column, limit, new_model):
    row = {"input_ids": [5, 1], "labels": [7, 1]} | {column: [5] * 129}
    rows = datasets.Dataset.from_list([row])
    check_rows_fit(new_model("t5"), {"train": rows})  # relative positions
    with pytest.raises(UserError, match=rf"129 {column}, but the model has 128 positions.*{limit} <= 128"):
        check_rows_fit(new_model("bart"), {"train": rows})


def test_labels_do_not_repeat_the_token_that_the_decoder_starts_with():
    gemma, bart = [2, 7, 8, 1], [0, 7, 8, 2]
    rows = datasets.Dataset.from_list(
        [{"input_ids": [5, 1], "labels": labels} for labels in (gemma, [2, 9, 1], [9, 1])]
    )
    assert drop_repeated_start(rows, decoder_start_token_id=2)["labels"] == [[7, 8, 1], [9, 1], [9, 1]]
    kept = datasets.Dataset.from_dict({"labels": [bart]})
    assert drop_repeated_start(kept, decoder_start_token_id=2)["labels"] == [bart]
