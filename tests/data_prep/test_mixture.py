"""How much of each source is taken, and that the draw is the same each time."""

import numpy
import pytest

from diptych.data_prep.cleaning.mixture import Mixture, check_mixture, mix, mixed_counts
from diptych.data_prep.command_line.errors import UserError

ROWS = {"a.jsonl": 9000, "b.jsonl": 1000}


@pytest.mark.parametrize(
    "mixture, counts",
    [
        (Mixture(), (9000, 1000)),
        (Mixture(temperature=2), (3000, 1000)),
        (Mixture(cap=2000), (2000, 1000)),
        (Mixture(weights={"b.jsonl": 3}), (3000, 1000)),
        (Mixture(temperature=2, rows=8000), (6000, 2000)),
        (Mixture(weights={"a.jsonl": 0}), (0, 1000)),
        (Mixture(temperature=1e9), (1000, 1000)),
        (Mixture(rows=20), (18, 2)),
    ],
)
def test_what_is_taken_of_each_source(mixture, counts):
    assert tuple(mixed_counts(mixture, ROWS).values()) == counts


def test_every_row_stands_as_often_as_its_source_is_taken():
    places = {"a": numpy.arange(0, 10), "b": numpy.arange(10, 14)}
    chosen = mix(Mixture(weights={"a": 0.5, "b": 2}, rows=15), places, seed=0)
    of_a, of_b = chosen[chosen < 10], chosen[chosen >= 10]
    assert len(of_a) + len(of_b) == 15 and numpy.all(numpy.diff(chosen) >= 0)
    assert len(set(of_a)) == len(of_a)
    assert set(numpy.bincount(of_b - 10)) <= {len(of_b) // 4, len(of_b) // 4 + 1}


def test_the_draw_depends_on_the_seed_and_on_nothing_else():
    places = {name: numpy.arange(start, start + rows) for name, start, rows in (("a", 0, 500), ("b", 500, 90))}
    one, same = (mix(Mixture(temperature=3), places, seed=1) for _ in range(2))
    assert numpy.array_equal(one, same)
    assert not numpy.array_equal(one, mix(Mixture(temperature=3), places, seed=2))
    turned = mix(Mixture(temperature=3), dict(reversed(places.items())), seed=1)
    assert numpy.array_equal(one, turned)


def test_every_row_once_is_what_no_setting_means():
    places = {"a": numpy.arange(7), "b": numpy.arange(7, 8), "empty": numpy.arange(0)}
    assert mix(Mixture(), places, seed=0).tolist() == list(range(8))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"temperature": 0}, "temperature is 0"),
        ({"cap": 0}, "mixture.cap is 0; it must be 1 or more"),
        ({"weights": {"a.json": 2}}, "'a.json', which is no source. Did you mean 'a.jsonl'?"),
        ({"weights": {"b.jsonl": -1}}, "a weight is 0 or more"),
        ({"weights": {"a.jsonl": 0, "b.jsonl": 0}}, "leaves no row"),
    ],
)
def test_what_makes_no_sense_is_said(settings, words):
    with pytest.raises(UserError) as error:
        check_mixture(Mixture(**settings), list(ROWS))
    assert words in str(error.value)
