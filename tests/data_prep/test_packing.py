"""Packing: every example once and whole, rows that are full, arrays as the literals say, refusals by name."""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.packing import budgets
from diptych.data_prep.packing.budgets import choose_budget
from diptych.data_prep.packing.fill_rows import pack
from diptych.data_prep.packing.packed_row import (
    MARKS_COLUMN,
    PACKED_COLUMNS,
    SHARED_COLUMN,
    Budget,
    assemble_row,
    repeated_start,
)
from diptych.data_prep.pipeline.prepared_folder import read_manifest
from diptych.data_prep.prepare import main

CODEALPACA = Path(__file__).parents[2].parent / "shared/data/codealpaca_2k.json"
PERCENTILES = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100)
CODEALPACA_SOURCES = (35, 37, 39, 41, 44, 57, 73, 83, 92, 125, 228)  # of its train split, with 8,000 tokens of BPE
CODEALPACA_TARGETS = (2, 2, 7, 11, 20, 43, 78, 122, 154, 250, 469)


def like_codealpaca(pairs, seed):
    draw = np.random.default_rng(seed)
    sides = (CODEALPACA_SOURCES, CODEALPACA_TARGETS)
    return [np.interp(draw.uniform(0, 100, pairs), PERCENTILES, side).astype(int) for side in sides]


def of_lengths(draw, kind, pairs):
    """(source lengths, target lengths) of many kinds of data, up to 512 tokens."""
    uniform = draw.integers(1, 513, pairs)
    heavy = np.clip(draw.lognormal(4, 1.2, pairs), 1, 512).astype(int)
    short = np.clip(draw.lognormal(2.5, 0.5, pairs), 1, 512).astype(int)
    near = np.clip(short + draw.integers(-2, 3, pairs), 1, 512)
    return {
        "uniform": (uniform, draw.integers(1, 513, pairs)),
        "heavy tails": (heavy, np.clip(draw.lognormal(4.5, 1, pairs), 1, 512).astype(int)),
        "translation": (short, near),
        "opposed": (uniform, 513 - uniform),
        "summaries": (draw.integers(200, 513, pairs), short),
        "labels": (heavy, np.full(pairs, 2)),
        "constant": (np.full(pairs, 100), np.full(pairs, 30)),
        "one outlier": (np.append(short[:-1], 512), np.append(near[:-1], 512)),
    }[kind]


KINDS = ("uniform", "heavy tails", "translation", "opposed", "summaries", "labels", "constant", "one outlier")


def filled(rows, source_lengths, target_lengths, budget):
    source = sum(source_lengths[row].sum() for row in rows) / (len(rows) * budget.source_tokens)
    target = sum(target_lengths[row].sum() for row in rows) / (len(rows) * budget.target_tokens)
    return float(source), float(target)


def as_lists(rows):
    return [row.tolist() for row in rows]


# Which examples stand together


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pairs", [1, 2, 7, 60, 900])
def test_every_example_stands_in_one_row_and_no_row_is_too_full(kind, pairs):
    draw = np.random.default_rng([KINDS.index(kind), pairs])
    sources, targets = of_lengths(draw, kind, pairs)
    longest = Budget(int(sources.max()), int(targets.max()))
    wide = Budget(*(tokens + int(draw.integers(1, 700)) for tokens in longest))
    for budget in (longest, wide, choose_budget(sources, targets)):
        rows = pack(sources, targets, budget, seed=pairs)
        assert sorted(chain.from_iterable(as_lists(rows))) == list(range(pairs))
        assert max(sources[row].sum() for row in rows) <= budget.source_tokens
        assert max(targets[row].sum() for row in rows) <= budget.target_tokens


def test_rows_too_long_for_tables_of_single_tokens_are_not_too_full():
    draw = np.random.default_rng(0)
    sources, targets = draw.integers(1, 5002, 400), draw.integers(1, 9000, 400)
    sources[:2], targets[:2] = 5001, 8999
    budget = Budget(5001, 8999)
    rows = pack(sources, targets, budget)
    assert sorted(chain.from_iterable(as_lists(rows))) == list(range(400))
    assert max(sources[row].sum() for row in rows) == 5001
    assert max(targets[row].sum() for row in rows) == 8999


@pytest.mark.parametrize("seed", range(3))
def test_data_like_codealpaca_fills_95_percent_of_sources_and_92_of_targets(seed):
    sources, targets = like_codealpaca(1_800, seed)
    budget = choose_budget(sources, targets)
    source_fill, target_fill = filled(pack(sources, targets, budget), sources, targets, budget)
    assert source_fill > 0.97 and target_fill > 0.97, (budget, source_fill, target_fill)
    assert max(budget) < 700  # rows no longer than they have to be: the longest target has 469 tokens


@pytest.mark.parametrize("kind", KINDS)
def test_other_data_fills_its_rows_too(kind):
    sources, targets = of_lengths(np.random.default_rng(1), kind, 1_500)
    budget = choose_budget(sources, targets)
    source_fill, target_fill = filled(pack(sources, targets, budget), sources, targets, budget)
    assert source_fill > 0.94 and target_fill > 0.88, (budget, source_fill, target_fill)


def test_with_much_data_rows_are_as_full():
    sources, targets = like_codealpaca(30_000, 0)
    budget = choose_budget(sources, targets)
    assert min(filled(pack(sources, targets, budget), sources, targets, budget)) > 0.96


@pytest.mark.parametrize("vocab_size", [2_000, 32_000])
@pytest.mark.skipif(not CODEALPACA.is_file(), reason="CodeAlpaca's rows do not lie beside the repository")
def test_codealpaca_itself_fills_95_percent_of_sources_and_92_of_targets(vocab_size, tmp_path):
    arguments = ["--data", str(CODEALPACA), "--train_tokenizer", "bpe", "--vocab_size", str(vocab_size)]
    assert main([*arguments, "--out", str(tmp_path / "prepared")]) == 0
    entry = read_manifest(tmp_path / "prepared")["packing"]
    assert entry["source_fill"] >= 0.97 and entry["target_fill"] >= 0.97, entry


def test_the_same_seed_gives_the_same_rows_and_another_one_others_as_full():
    sources, targets = like_codealpaca(2_000, 0)
    budget = Budget(544, 544)
    rows = pack(sources, targets, budget, seed=0)
    assert as_lists(rows) == as_lists(pack(sources, targets, budget, seed=0))
    others = pack(sources, targets, budget, seed=1)
    assert sorted(map(sorted, as_lists(rows))) != sorted(map(sorted, as_lists(others)))
    assert abs(len(rows) - len(others)) <= 1


def test_rows_do_not_come_in_the_order_of_their_making():
    """The longest example opens the first row that is made: a run that reads rows in order would meet it first."""
    sources, targets = like_codealpaca(2_000, 0)
    first = [max(targets[row].max(), sources[row].max()) for row in pack(sources, targets, Budget(544, 544))]
    assert np.corrcoef(first, np.arange(len(first)))[0, 1] == pytest.approx(0, abs=0.25)


def test_rows_and_budgets_are_those_of_the_docstrings():
    assert as_lists(pack([4, 3, 7, 1], [3, 2, 1, 4], Budget(8, 5))) == [[0, 1], [2, 3]]
    sides = [100] * 50 + [30] * 50, [20] * 50 + [60] * 50
    assert choose_budget(*sides) == (144, 88)
    assert choose_budget(*sides, source_tokens=512) == (512, 304)


def test_no_examples_make_no_rows():
    assert pack([], [], Budget(8, 8)) == []


# Budgets


def test_budgets_hold_the_longest_example_and_are_round():
    for kind in KINDS:
        sources, targets = of_lengths(np.random.default_rng(2), kind, 300)
        budget = choose_budget(sources, targets)
        assert budget.source_tokens >= sources.max() and budget.target_tokens >= targets.max()
        for tokens in budget:
            assert tokens % (64 if tokens >= 1024 else 32 if tokens >= 512 else 16 if tokens >= 256 else 4) == 0


def test_a_given_budget_stays_and_the_other_is_chosen_to_suit():
    sources, targets = like_codealpaca(1_500, 0)
    ratio = targets.sum() / sources.sum()
    assert choose_budget(sources, targets, 700, 900) == (700, 900)
    source_tokens, target_tokens = choose_budget(sources, targets, source_tokens=1_000)
    assert source_tokens == 1_000 and target_tokens == pytest.approx(1_000 * ratio, rel=0.06)
    source_tokens, target_tokens = choose_budget(sources, targets, target_tokens=1_000)
    assert target_tokens == 1_000 and source_tokens == pytest.approx(1_000 / ratio, rel=0.06)


def test_a_sample_chooses_as_all_examples_would(monkeypatch):
    sources, targets = like_codealpaca(12_000, 0)
    chosen = choose_budget(sources, targets)
    monkeypatch.setattr(budgets, "SAMPLE_FOR_BUDGET", 12_000)
    best = choose_budget(sources, targets)
    slots = [len(pack(sources, targets, budget)) * sum(budget) for budget in (chosen, best)]
    assert slots[0] <= 1.02 * slots[1]


def test_an_example_longer_than_the_budget_is_refused_by_name():
    names = ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
    words = (
        r"a.jsonl:3: its target has 50 tokens, and a packed row has room for 32. 2 of 3 examples have a longer target"
        r" than that, this one the longest. Give packed_target_tokens >= 50, or max_target_tokens <= 32 to leave out"
    )
    with pytest.raises(UserError, match=words):
        pack([9, 9, 9], [9, 40, 50], Budget(32, 32), names=names)
    with pytest.raises(UserError, match="a.jsonl:3: its source has 33 tokens, and a packed row has room for 32. Give"):
        choose_budget([9, 9, 33], [9, 9, 9], source_tokens=32, names=names)
    with pytest.raises(UserError, match="example 1: its source has 33 tokens"):
        pack([9, 33], [9, 9], Budget(32, 32))


# Equal sources


def with_equal_sources(seed, sources=150, budget=None):
    draw = np.random.default_rng(seed)
    targets_of_each = draw.integers(1, 7, sources)
    groups = draw.permutation(np.repeat(np.arange(sources), targets_of_each))
    return draw.integers(5, 90, sources)[groups], draw.integers(2, 60, len(groups)), groups


@pytest.mark.parametrize("seed", range(4))
def test_equal_sources_count_once_and_stand_next_to_each_other(seed):
    sources, targets, groups = with_equal_sources(seed)
    budget = choose_budget(sources, targets, groups=groups)
    rows = pack(sources, targets, budget, groups=groups)
    assert sorted(chain.from_iterable(as_lists(rows))) == list(range(len(groups)))
    for row in rows:
        _, firsts = np.unique(groups[row], return_index=True)
        assert sources[row][firsts].sum() <= budget.source_tokens
        assert targets[row].sum() <= budget.target_tokens
        assert np.count_nonzero(np.diff(groups[row])) == len(firsts) - 1
    encoded = sum(len(np.unique(groups[row])) for row in rows)
    assert encoded == len(np.unique(groups))  # none had to be divided


def test_a_group_with_too_many_targets_is_divided():
    groups = np.array([0] * 10 + [1])
    sources, targets = np.where(groups == 0, 20, 5), np.full(11, 30)
    rows = pack(sources, targets, Budget(25, 100), groups=groups)
    assert sorted(chain.from_iterable(as_lists(rows))) == list(range(11))
    assert sorted(len(row) for row in rows) == [2, 3, 3, 3]
    assert all(targets[row].sum() <= 100 for row in rows)


def test_parts_of_a_divided_group_that_meet_again_are_one():
    [row] = pack([4, 4, 4, 1], [6, 6, 3, 1], Budget(20, 16), groups=[0, 0, 0, 1])
    assert set(row[:3]) == {0, 1, 2} or set(row[1:]) == {0, 1, 2}


# Arrays

EXAMPLES = [{"input_ids": [12, 7, 9, 1], "labels": [31, 40, 1]}, {"input_ids": [5, 8, 1], "labels": [22, 1]}]


def test_a_row_is_assembled_as_the_literal_says():
    row = assemble_row(EXAMPLES, Budget(8, 6), pad_token_id=0, decoder_start_token_id=0)
    assert tuple(row) == PACKED_COLUMNS
    assert {name: column.tolist() for name, column in row.items()} == {
        "input_ids": [12, 7, 9, 1, 5, 8, 1, 0],
        "segment_ids": [1, 1, 1, 1, 2, 2, 2, 0],
        "position_ids": [0, 1, 2, 3, 0, 1, 2, 0],
        "labels": [31, 40, 1, 22, 1, -100],
        "decoder_input_ids": [0, 31, 40, 0, 22, 0],
        "decoder_segment_ids": [1, 1, 1, 2, 2, 0],
        "decoder_position_ids": [0, 1, 2, 0, 1, 0],
    }
    assert {column.dtype for column in row.values()} == {np.dtype("int32")}


def test_padding_and_start_are_told_apart():
    row = assemble_row(EXAMPLES, Budget(9, 7), pad_token_id=3, decoder_start_token_id=2)
    assert row["input_ids"].tolist() == [12, 7, 9, 1, 5, 8, 1, 3, 3]
    assert row["decoder_input_ids"].tolist() == [2, 31, 40, 2, 22, 3, 3]
    assert row["labels"].tolist() == [31, 40, 1, 22, 1, -100, -100]
    assert row["decoder_position_ids"].tolist() == [0, 1, 2, 0, 1, 0, 0]


def test_a_full_row_has_no_padding():
    row = assemble_row(EXAMPLES, Budget(7, 5), pad_token_id=0, decoder_start_token_id=0)
    assert row["segment_ids"].tolist() == [1, 1, 1, 1, 2, 2, 2]
    assert row["decoder_input_ids"].tolist() == [0, 31, 40, 0, 22]


def test_equal_sources_stand_once_and_targets_say_which_they_read():
    shared = [EXAMPLES[0], {**EXAMPLES[1], "input_ids": [12, 7, 9, 1]}]
    row = assemble_row(shared, Budget(8, 6), 0, 0, share_sources=True)
    assert tuple(row) == (*PACKED_COLUMNS, SHARED_COLUMN)
    assert {name: column.tolist() for name, column in row.items()} == {
        "input_ids": [12, 7, 9, 1, 0, 0, 0, 0],
        "segment_ids": [1, 1, 1, 1, 0, 0, 0, 0],
        "position_ids": [0, 1, 2, 3, 0, 0, 0, 0],
        "labels": [31, 40, 1, 22, 1, -100],
        "decoder_input_ids": [0, 31, 40, 0, 22, 0],
        "decoder_segment_ids": [1, 1, 1, 2, 2, 0],
        "decoder_position_ids": [0, 1, 2, 0, 1, 0],
        "cross_segment_ids": [1, 1, 1, 1, 1, 0],
    }


def test_both_answers_of_an_example_stand_next_to_each_other_and_marks_tell_them_apart():
    pairs = [([12, 7, 9, 1], [31, 40, 1], [22, 1]), ([5, 8, 1], [50, 1], [61, 1])]
    answers = [
        {"input_ids": source, "labels": labels, "mark": mark}
        for source, chosen, rejected in pairs
        for labels, mark in ((chosen, 1), (rejected, -1))
    ]
    row = assemble_row(answers, Budget(8, 10), 0, 0, share_sources=True)
    assert tuple(row) == (*PACKED_COLUMNS, SHARED_COLUMN, MARKS_COLUMN)
    shown = {
        "input_ids": [12, 7, 9, 1, 5, 8, 1, 0],
        "segment_ids": [1, 1, 1, 1, 2, 2, 2, 0],
        "labels": [31, 40, 1, 22, 1, 50, 1, 61, 1, -100],
        "decoder_segment_ids": [1, 1, 1, 2, 2, 3, 3, 4, 4, 0],
        SHARED_COLUMN: [1, 1, 1, 1, 1, 2, 2, 2, 2, 0],
        MARKS_COLUMN: [1, 1, 1, -1, -1, 1, 1, -1, -1, 0],
    }
    assert {name: row[name].tolist() for name in shown} == shown


def test_targets_of_one_source_stand_next_to_each_other():
    a, b, c = [8, 1], [9, 1], [8, 9, 1]  # sources
    examples = [{"input_ids": ids, "labels": [20 + n, 1]} for n, ids in enumerate((b, a, b, c, a))]
    row = assemble_row(examples, Budget(8, 11), 0, 0, share_sources=True)
    assert row["input_ids"].tolist() == [*b, *a, *c, 0]
    assert row["labels"].tolist() == [20, 1, 22, 1, 21, 1, 24, 1, 23, 1, -100]
    assert row["decoder_segment_ids"].tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 0]
    assert row["cross_segment_ids"].tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 0]


def test_assembled_rows_hold_every_example_as_it_was():
    """Read back segment by segment, with ids that are numpy arrays as Arrow gives them."""
    draw = np.random.default_rng(0)
    sources, targets = of_lengths(draw, "heavy tails", 300)
    examples = [
        {"input_ids": draw.integers(3, 99, source), "labels": draw.integers(3, 99, target).astype(np.int32)}
        for source, target in zip(sources, targets, strict=True)
    ]
    budget = choose_budget(sources, targets)
    for places in pack(sources, targets, budget):
        row = assemble_row([examples[place] for place in places], budget, 0, 2)
        for segment, place in enumerate(places, start=1):
            here, there = row["segment_ids"] == segment, row["decoder_segment_ids"] == segment
            assert row["input_ids"][here].tolist() == examples[place]["input_ids"].tolist()
            assert row["labels"][there].tolist() == examples[place]["labels"].tolist()
            assert row["decoder_input_ids"][there].tolist() == [2, *examples[place]["labels"][:-1].tolist()]
            assert row["position_ids"][here].tolist() == list(range(sources[place]))
            assert row["decoder_position_ids"][there].tolist() == list(range(targets[place]))
        assert row["segment_ids"].max() == row["decoder_segment_ids"].max() == len(places)


def test_a_row_that_has_no_room_is_our_own_mistake():
    with pytest.raises(AssertionError):
        assemble_row(EXAMPLES, Budget(6, 6), 0, 0)


def test_labels_that_begin_with_the_decoders_start_are_known():
    assert repeated_start(np.array([2, 2, 5]), 2).tolist() == [True, True, False]  # Gemma's tokenizer, T5Gemma's start
    assert repeated_start(np.array([5, 2, 5]), 2).tolist() == [False, False, False]  # by chance
    assert repeated_start(np.array([0, 0]), 2).tolist() == [False, False]  # BART
