"""Intervals and tests against what they stand for: texts scored anew, every exchange enumerated, sacrebleu's own."""

import itertools
import math
import random

import numpy as np
import pytest
import sacrebleu
from sacrebleu.significance import PairedTest

from diptych.finetune.evaluating.confidence_intervals import bootstrap_intervals, paired_tests
from diptych.finetune.evaluating.metrics import METRICS, count_texts, means, score_texts

WORDS = "the a cat dog house student good bad sits runs on in at school mat".split()

OF_TEXTS = [name for name in METRICS if name != "json"]  # whose references have to be JSON


def made_texts(sources: int, errors: float, seed: int) -> tuple[list[str], list[list[str]]]:
    """References of random words, and outputs in which a share of the words is another one."""
    chosen = random.Random(0)
    references = [[" ".join(chosen.choices(WORDS, k=chosen.randint(3, 12)))] for _ in range(sources)]
    noise = random.Random(seed)
    outputs = [
        " ".join(noise.choice(WORDS) if noise.random() < errors else word for word in row[0].split())
        for row in references
    ]
    return outputs, references


def test_intervals_are_percentiles_of_the_figures_of_resampled_texts():
    """The slow way: draw the same sources, put their texts together, and score them all anew."""
    predictions, references = made_texts(30, 0.3, 1)
    names = OF_TEXTS
    intervals = bootstrap_intervals(count_texts(names, predictions, references), resamples=40, seed=7)
    generator = np.random.default_rng(7)
    drawn = []
    for _ in range(40):
        rows = generator.integers(30, size=30)
        drawn.append(score_texts(names, [predictions[row] for row in rows], [references[row] for row in rows])[0])
    assert set(intervals) == set(drawn[0])
    for name, interval in intervals.items():
        assert interval == pytest.approx(np.percentile([figures[name] for figures in drawn], [2.5, 97.5])), name


def test_the_interval_of_a_share_is_as_wide_as_its_standard_error_says():
    statistics = means(["share"], [[float(source < 120)] for source in range(400)])
    low, high = bootstrap_intervals({"share": statistics})["share"]
    error = 100 * math.sqrt(0.3 * 0.7 / 400)
    assert (low, high) == pytest.approx((30 - 1.96 * error, 30 + 1.96 * error), abs=0.5)


def test_the_seed_decides_and_one_source_has_no_spread():
    predictions, references = made_texts(20, 0.3, 1)
    counted = count_texts(["chrf"], predictions, references)
    assert bootstrap_intervals(counted, seed=1) == bootstrap_intervals(counted, seed=1)
    assert bootstrap_intervals(counted, seed=1) != bootstrap_intervals(counted, seed=2)
    one = count_texts(["chrf"], predictions[:1], references[:1])
    assert bootstrap_intervals(one) == {} == paired_tests(one, one)


def test_the_p_value_is_the_share_of_all_exchanges_that_differ_as_much():
    a, b = [0.1, 0.5, 0.4, 0.9, 0.2, 0.3, 0.7], [0.3, 0.6, 0.4, 0.8, 0.6, 0.5, 0.9]
    differences = np.array(b) - np.array(a)
    exchanged = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=7)]
    exact = np.mean(np.array(exchanged) >= abs(differences.sum()) - 1e-9)
    ours, theirs = (means(["score"], [[value] for value in values]) for values in (a, b))
    test = paired_tests({"score": ours}, {"score": theirs})["score"]
    assert test.p == pytest.approx(exact, abs=0.01)
    assert test.b - test.a == pytest.approx(100 * differences.mean())
    assert test.low < test.b - test.a < test.high


def test_p_values_and_figures_are_those_of_sacrebleus_own_test():
    (a, references), (b, _) = made_texts(120, 0.3, 1), made_texts(120, 0.25, 2)
    ours = paired_tests(*(count_texts(["bleu", "chrf"], texts, references) for texts in (a, b)))
    scorers = {"BLEU": sacrebleu.BLEU(), "chrF2": sacrebleu.CHRF()}
    stream = [[row[0] for row in references]]
    _, theirs = PairedTest([("a", a), ("b", b)], scorers, stream, test_type="ar", n_samples=4000)()
    for name, key in (("bleu", "BLEU"), ("chrf", "chrF2")):
        assert (ours[name].a, ours[name].b) == pytest.approx([result.score for result in theirs[key]])
        assert ours[name].p == pytest.approx(theirs[key][1].p_value, abs=0.02)


def test_the_same_outputs_differ_by_nothing_and_much_better_ones_do_not_by_chance():
    (poor, references), (good, _) = made_texts(60, 0.6, 1), made_texts(60, 0.1, 2)
    ours, theirs = (count_texts(OF_TEXTS, texts, references) for texts in (poor, good))
    for test in paired_tests(ours, ours, trials=200).values():
        assert (test.p, test.low, test.high) == (1, 0, 0)
    for name, test in paired_tests(ours, theirs, trials=500).items():
        better = (-test.high, -test.low) if name == "token_error_rate" else (test.low, test.high)
        assert test.p == pytest.approx(1 / 501) and 0 < better[0] < better[1], name


def test_of_equal_models_one_in_ten_is_found_to_differ_at_ten_percent():
    """What a p-value promises. 200 pairs of models that draw their scores alike."""
    generator = np.random.default_rng(3)
    found = 0
    for _ in range(200):
        a, b = (means(["score"], generator.random((25, 1)).tolist()) for _ in range(2))
        found += paired_tests({"score": a}, {"score": b}, trials=200)["score"].p <= 0.1
    assert 8 <= found <= 34  # 20 expected; beyond this once in a thousand times
