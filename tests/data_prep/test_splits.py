"""No text of a held-out row was seen in training, and the split is the same each time."""

import random

import numpy
import pytest

from diptych.data_prep.cleaning.splits import normalise, record_keys, split_rows
from diptych.data_prep.rows.named_splits import KINDS
from diptych.data_prep.rows.records import Origin, Record


def record(source, output, instruction="Do it."):
    return Record(instruction=instruction, input=source, output=output, origin=Origin("rows", 1))


def split_records(records, validation_fraction, test_fraction, seed, split_by="both"):
    """The split, and the name of each record's."""
    keys = numpy.array([record_keys(row) for row in records], dtype=numpy.uint64)
    split = split_rows(
        *keys.T, validation_fraction, test_fraction, seed, split_by, lambda row, side: getattr(records[row], side)
    )
    return split, [KINDS[place] for place in split.of_row]


def texts_by_split(records, names):
    texts = {"train": set(), "validation": set(), "test": set()}
    for row, name in zip(records, names, strict=True):
        texts[name] |= {normalise(row.input) or normalise(row.instruction), normalise(row.output)}
    return texts


def assert_no_text_is_shared(texts):
    assert texts["train"].isdisjoint(texts["validation"])
    assert texts["train"].isdisjoint(texts["test"])
    assert texts["validation"].isdisjoint(texts["test"])


def test_no_english_or_korean_side_of_tatoeba_is_in_two_splits(pairs):
    records = [record(*sides) for pair in pairs for sides in (pair, pair[::-1])]
    split, names = split_records(records, 0.05, 0.05, seed=0)
    assert_no_text_is_shared(texts_by_split(records, names))
    assert (names.count("validation"), names.count("test")) == (332, 332)
    assert (split.groups, split.warnings) == (3015, [])


def test_no_text_is_in_two_splits_however_rows_hang_together():
    draw = random.Random(0)
    for _ in range(100):
        words = [f"text {n}" for n in range(draw.randint(2, 80))]
        records = [
            record(draw.choice(["", *words]), draw.choice(words), instruction=draw.choice(words))
            for _ in range(draw.randint(1, 120))
        ]
        _, names = split_records(records, draw.random() / 2, draw.random() / 2, seed=draw.randrange(9))
        assert_no_text_is_shared(texts_by_split(records, names))
        assert "train" in names


def test_a_chain_of_shared_texts_is_one_group():
    """a → b, b → c (as an input), C → d: "b" links sides, "C " differs from "c" only in case and spacing."""
    records = [record("a", "b"), record("b", "c"), record(" C ", "d"), record("x", "y"), record("z", "w")]
    split, names = split_records(records, 0.2, 0.2, seed=0)
    assert split.groups == 3
    assert set(names[:3]) == {"train"}


def test_the_turns_of_a_conversation_are_one_group():
    turns = [("Hi.", "Hello."), ("And you?", "Fine.")]
    first = Record(instruction="Hi.", input="", output="Hello.", origin=Origin("rows", 1, 1))
    second = Record(instruction="And you?", input="", output="Fine.", history=(turns[0],), origin=Origin("rows", 1, 2))
    other = Record(instruction="And you?", input="", output="Well.", origin=Origin("rows", 2))
    assert split_records([first, second, other], 0, 0.4, seed=0)[0].groups == 2


def test_a_row_without_input_is_known_by_its_instruction():
    records = [record("", "1", instruction="Count."), record("", "2", instruction="count.")]
    assert split_records(records, 0, 0.5, seed=0)[0].groups == 1
    records = [record("a", "1"), record("b", "2")]  # one instruction for many inputs links nothing
    assert split_records(records, 0, 0.5, seed=0)[0].groups == 2


def test_the_same_rows_are_split_alike_in_any_order():
    records = [record(f"in {n // 2}", f"out {n}") for n in range(200)]
    names = split_records(records, 0.1, 0.1, seed=4)[1]
    order = random.Random(1).sample(range(200), 200)
    shuffled = split_records([records[n] for n in order], 0.1, 0.1, seed=4)[1]
    assert shuffled == [names[n] for n in order]
    assert split_records(records, 0.1, 0.1, seed=4)[1] == names
    assert split_records(records, 0.1, 0.1, seed=5)[1] != names


@pytest.mark.parametrize("validation, test", [(0.05, 0.05), (0.1, 0.0), (0.0, 0.2), (0.0, 0.0), (0.3, 0.3)])
def test_fractions_are_met(validation, test):
    records = [record(f"in {n}", f"out {n}") for n in range(1000)]
    names = split_records(records, validation, test, seed=0)[1]
    assert names.count("validation") == round(1000 * validation)
    assert names.count("test") == round(1000 * test)


def test_a_single_row_is_train():
    assert split_records([record("a", "b")], 0.5, 0.4, seed=0)[1] == ["train"]


def test_a_group_that_swallows_the_data_is_said_aloud():
    """Classification: every row shares its output with hundreds of others."""
    records = [record(f"review {n}", "good" if n % 10 else "bad") for n in range(300)]
    split, _ = split_records(records, 0.1, 0.1, seed=0)
    assert any("270 of 300 rows hang together" in text and "'good'" in text for text in split.warnings)
    assert any("--split_by source" in text for text in split.warnings)
    by_source, names = split_records(records, 0.1, 0.1, seed=0, split_by="source")
    assert (names.count("test"), by_source.warnings) == (30, [])


def test_texts_are_compared_without_case_width_and_spacing():
    assert normalise(" Ｈｉ \n there. ") == normalise("hi there.")
    assert normalise("가") == normalise("\u1100\u1161")
