"""What repeats an earlier row goes, nothing else does, and each row that goes is like one that stays."""

import multiprocessing
import random
import unicodedata

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.data_prep.cleaning import duplicates as deduplicate
from diptych.data_prep.cleaning.duplicates import (
    _jaccard,
    choose_bands,
    compared_text,
    conflicts,
    exact_duplicates,
    exact_key,
    near_duplicates,
    shingle_hashes,
    shingles_of,
    signatures,
)
from diptych.data_prep.cleaning.splits import normalise, text_key
from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.records import Origin, Record


@pytest.fixture(scope="module")
def edited(pairs):
    """600 different pairs of Tatoeba and an edited copy of each, shuffled."""
    draw = random.Random(3)
    texts = draw.sample(list({normalise(text): text for text in map("\n".join, pairs)}.values()), 600)
    copies = []
    for text in texts:
        for _ in range(draw.randint(1, 5)):
            place = draw.randrange(len(text) + 1)
            text = text[:place] + draw.choice(["", "a", "는", " "]) + text[place + draw.randint(0, 1) :]
        copies.append(text)
    return draw.sample([*texts, *copies], 1200)


def slow_near_duplicates(texts, threshold):
    sets, kept, found = [shingles_of(text) for text in texts], [], []
    for row, own in enumerate(sets):
        alike = [other for other in kept if len(own & sets[other]) / len(own | sets[other]) >= threshold]
        found.append(alike[0] if alike else -1)
        if not alike:
            kept.append(row)
    return found


def keys_of(rows):
    return numpy.array([[exact_key(text) for text in row] for row in rows], dtype=numpy.uint64)


def test_only_how_unicode_composes_a_character_makes_no_other_text():
    assert exact_key("안녕, café.") == exact_key(unicodedata.normalize("NFD", "안녕, café."))
    different = ["paris", "Paris", "paris ", "ｐａｒｉｓ", "  paris"]
    assert len({exact_key(text) for text in different}) == len(different)


@settings(deadline=None, max_examples=50)
@given(st.text(), st.text())
def test_texts_have_one_key_exactly_if_they_are_the_same(a, b):
    same = unicodedata.normalize("NFC", a) == unicodedata.normalize("NFC", b)
    assert (exact_key(a) == exact_key(b)) == same


def test_the_literal_of_the_docstring():
    rows = [("a", "b"), ("c", "d"), ("a", "b"), ("e", "f"), ("a", "b")]
    assert exact_duplicates(keys_of(rows)).tolist() == [-1, -1, 0, -1, 0]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=40))
def test_exact_duplicates_are_those_of_a_dictionary(rows):
    first, expected = {}, []
    for place, row in enumerate(rows):
        expected.append(first.setdefault(row, place) if row in first else -1)
        first.setdefault(row, place)
    keys = numpy.array(rows, dtype=numpy.uint64).reshape(-1, 2)
    assert exact_duplicates(keys).tolist() == expected


def test_tatoeba_has_no_pair_twice_and_every_copy_is_found(pairs):
    assert (exact_duplicates(keys_of(pairs)) == -1).all()
    doubled = [*pairs, *((source, unicodedata.normalize("NFD", target)) for source, target in pairs)]
    assert exact_duplicates(keys_of(doubled)).tolist() == [-1] * len(pairs) + list(range(len(pairs)))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), max_size=30))
def test_conflicts_are_those_of_a_dictionary(rows):
    groups = {}
    for place, (source, _) in enumerate(rows):
        groups.setdefault(source, []).append(place)
    expected = [group for group in groups.values() if len({rows[place][1] for place in group}) > 1]
    keys = numpy.array(rows, dtype=numpy.uint64).reshape(-1, 2)
    assert conflicts(keys[:, 0], keys[:, 1]) == sorted(expected)


def test_tatoeba_has_sources_with_several_targets(pairs):
    keys = numpy.array([[text_key(side) for side in pair] for pair in pairs], dtype=numpy.uint64)
    found = conflicts(keys[:, 0], keys[:, 1])
    targets = {}
    for source, target in pairs:
        targets.setdefault(normalise(source), set()).add(normalise(target))
    assert len(found) == sum(len(several) > 1 for several in targets.values()) == 218
    assert all(len({normalise(pairs[row][0]) for row in group}) == 1 for group in found)


def test_shingles_are_runs_of_characters():
    assert shingles_of("Hi  there") == {"hi th", "i the", " ther", "there"}
    assert shingles_of("hi") == {"hi"}
    assert shingles_of("가", 3) == {"\u1100\u1161"}  # decomposed
    assert shingles_of("각 가") == shingles_of("\u1100\u1161\u11a8 \u1100\u1161")


@pytest.mark.parametrize("size", [5, 3])
def test_equal_shingles_are_equal_hashes(size, pairs):
    """MinHash is given the shingles of `shingles_of`, no more and no fewer."""
    for text in [*(pair[0] for pair in pairs[-300:]), "", "a", "안"]:
        assert len(set(shingle_hashes(text, size).tolist())) == len(shingles_of(text, size))


def test_signatures_estimate_the_jaccard_similarity(edited):
    rows = 400
    found = signatures(edited[:rows], permutations=256)
    draw, errors = random.Random(0), []
    sets = [shingles_of(text) for text in edited[:rows]]
    for _ in range(2000):
        a, b = draw.randrange(rows), draw.randrange(rows)
        errors.append((found[a] == found[b]).mean() - len(sets[a] & sets[b]) / len(sets[a] | sets[b]))
    assert abs(numpy.mean(errors)) < 0.002
    assert max(map(abs, errors)) < 5 * 0.5 / 256**0.5


def test_a_long_text_has_the_signature_of_its_set(monkeypatch):
    text = " ".join(str(number) for number in range(3000))
    whole = signatures([text])[0]
    monkeypatch.setattr(deduplicate, "HASHES_AT_ONCE", 100)
    assert (signatures([text])[0] == whole).all()
    assert (signatures([f"{text} {text}"])[0] == whole).mean() > 0.98


def test_signatures_are_the_same_in_every_process_and_version(edited):
    """The literal is there to fail when a version of a library changes what a stored signature means."""
    assert signatures(["The same text everywhere."])[0][:4].tolist() == [42370313, 96291598, 50762054, 6276295]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.apply(signatures, (edited[:50],))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        forked = pool.apply(signatures, (edited[:50],))
    assert (there == signatures(edited[:50])).all() and (forked == there).all()


@pytest.mark.parametrize("threshold", [0.6, 0.8])
def test_with_texts_at_hand_the_slow_twin_removes_the_same_rows(edited, threshold):
    slow = numpy.array(slow_near_duplicates(edited, threshold))
    fast = near_duplicates(signatures(edited), threshold, texts=edited.__getitem__)
    assert (slow >= 0).sum() > 40
    assert ((slow >= 0) != (fast >= 0)).sum() <= 0.02 * (slow >= 0).sum()


@pytest.mark.parametrize("threshold", [0.6, 0.8])
@pytest.mark.parametrize("size", [5, 3])
def test_what_goes_is_like_an_earlier_row_that_stays(edited, threshold, size):
    found = near_duplicates(signatures(edited, size), threshold, edited.__getitem__, size)
    gone = numpy.flatnonzero(found >= 0)
    assert len(gone) > 20
    for row in gone.tolist():
        assert found[row] < row and found[found[row]] == -1
        assert _jaccard(shingles_of(edited[row], size), shingles_of(edited[found[row]], size)) >= threshold


def removed(texts, threshold, **settings):
    return near_duplicates(signatures(texts), threshold, texts.__getitem__, **settings).tolist()


def test_a_chain_does_not_pull_in_its_far_end():
    """a ~ b and b ~ c at 0.8, a and c share less: b goes, c stays."""
    words = [f"word{number}" for number in range(60)]
    texts = [" ".join(words[start : start + 50]) for start in (0, 4, 8)]
    likeness = [_jaccard(*(shingles_of(texts[place]) for place in pair)) for pair in ((0, 1), (1, 2), (0, 2))]
    assert min(likeness[:2]) >= 0.8 > likeness[2]
    assert removed(texts, 0.8) == [-1, 0, -1]


def test_equal_texts_are_near_duplicates_and_empty_ones_are_equal():
    texts = ["A sentence of some length.", "", "Another, wholly different thing.", "a SENTENCE of some  length.", " "]
    assert removed(texts, 1.0) == [-1, -1, -1, 0, 1]


def test_rows_that_are_gone_already_stand_for_nothing():
    considered = numpy.array([False, True, True, True])
    assert removed(["same", "same", "same", "other"], 0.8, considered=considered) == [-1, -1, 1, -1]


def test_a_memory_map_is_read_as_an_array_is(edited, tmp_path):
    marks = signatures(edited)
    numpy.save(tmp_path / "marks.npy", marks)
    mapped = numpy.load(tmp_path / "marks.npy", mmap_mode="r")
    text_of = edited.__getitem__
    assert (near_duplicates(mapped, 0.7, text_of) == near_duplicates(marks, 0.7, text_of)).all()


def test_boilerplate_shared_by_very_many_rows_hides_no_duplicate(monkeypatch):
    """Rows that share half their numbers share bands; a row is compared with those that share most."""
    draw = numpy.random.default_rng(0)
    marks = draw.integers(0, 2**32, (400, 128), dtype=numpy.uint32)
    marks[:, :60] = marks[0, :60]
    marks[300:] = marks[:100]
    monkeypatch.setattr(deduplicate, "MOST_COMPARED", 5)
    texts = [" ".join(map(str, row)) for row in marks.tolist()]
    assert near_duplicates(marks, 0.8, texts.__getitem__).tolist() == [-1] * 300 + list(range(100))


def test_no_rows_and_one_row():
    assert removed([], 0.8) == [] and removed(["a"], 0.8) == [-1]
    assert len(exact_duplicates(numpy.zeros((0, 2), dtype=numpy.uint64))) == 0


@settings(deadline=None, max_examples=50)
@given(st.floats(0.05, 0.999), st.sampled_from([16, 64, 128, 256]))
def test_bands_find_a_pair_at_the_threshold(threshold, permutations):
    bands, size = choose_bands(threshold, permutations)
    assert bands * size <= permutations
    assert 1 - (1 - threshold**size) ** bands >= 0.95 or size == 1
    assert choose_bands(0.8, 128) == (18, 7)


@pytest.mark.parametrize("threshold", [0, -1, 1.01, 80])
def test_a_threshold_is_a_fraction(threshold):
    with pytest.raises(UserError, match="at most 1"):
        removed(["a", "b"], threshold)


def test_a_shared_instruction_makes_no_rows_alike():
    instruction = "Translate the following sentence from English into Korean, and keep its tone. " * 3
    records = [
        Record(instruction=instruction, input=source, output=target, origin=Origin("rows", 1))
        for source, target in [("Where are you going?", "어디 가세요?"), ("I like rain.", "저는 비가 좋아요.")]
    ]
    assert removed([compared_text(record) for record in records], 0.5) == [-1, -1]
    only = Record(instruction="Count to three.", input=" ", output="1 2 3", origin=Origin("rows", 1))
    assert compared_text(only) == "Count to three.\n1 2 3"
