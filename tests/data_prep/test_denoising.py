"""Raw text as pairs: every token in its place again, shares as set, the same pairs whatever came before."""

import json
import re
import statistics

import numpy
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from diptych.data_prep.denoise import (
    MINIMUM,
    UL2_MIXTURE,
    Denoiser,
    DenoiseSettings,
    SpecialTokens,
    corrupt_spans,
    noise_and_spans,
    pairs_of,
    split_prefix,
    window_length,
)
from diptych.data_prep.text_to_ids.encode import split_sources
from diptych.finetune.commands.cli import main

SENTINELS = list(range(1000, 1100))
TEXTS = [
    f"This is line {number}, about {number * 7} things that are </s> or <extra_id_0>. " * 4 for number in range(60)
]


def restored(source, target, sentinels):
    """The window of which a pair was made."""
    spans, current = {}, []
    for token in target:
        if token in sentinels:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    if not spans:
        return [*source, *target]
    return [inner for token in source for inner in spans.get(token, [token])]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>", "[R]", "[S]", "[X]"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    return tmp_path / "corpus.txt"


def settings(**changes) -> DenoiseSettings:
    return DenoiseSettings(**({"data": ["x"], "tokenizer": "t", "out": "o"} | changes))


@given(length=st.integers(2, 300), density=st.floats(0.05, 0.9), mean=st.floats(1, 70), seed=st.integers(0, 2**32))
def test_a_window_is_restored_from_its_pair(length, density, mean, seed):
    tokens = list(range(length))
    denoiser = Denoiser("R", density, mean)
    sentinels = list(range(1000, 2000))
    source, target = corrupt_spans(tokens, denoiser, sentinels, numpy.random.default_rng(seed))
    assert restored(source, target, set(sentinels)) == tokens
    noise, spans = noise_and_spans(length, denoiser)
    assert len(target) == noise + spans and len(source) == length - noise + spans
    assert (
        [token for token in source if token >= 1000]
        == [token for token in target if token >= 1000]
        == sentinels[:spans]
    )


@given(length=st.integers(MINIMUM, 60), seed=st.integers(0, 2**32))
def test_a_prefix_and_the_rest_are_the_window_and_fit(length, seed):
    tokens = list(range(length))
    source, target = split_prefix(tokens, 0.25, 40, 30, numpy.random.default_rng(seed))
    assert source + target == tokens and 1 <= len(source) <= 40 and 1 <= len(target) <= 30


def test_shares_and_lengths_are_as_set():
    """T5's own setting, in 200 windows."""
    denoiser, tokens = Denoiser("R", 0.15, 3.0), list(range(400))
    generator = numpy.random.default_rng(0)
    spans, noise = [], 0
    for _ in range(200):
        _, target = corrupt_spans(tokens, denoiser, SENTINELS, generator)
        places = [place for place, token in enumerate(target) if token >= 1000] + [len(target)]
        spans += [end - start - 1 for start, end in zip(places, places[1:], strict=False)]
        noise += sum(token < 1000 for token in target)
    assert noise / (200 * 400) == pytest.approx(0.15, abs=0.002)
    assert statistics.mean(spans) == pytest.approx(3.0, abs=0.05) and min(spans) == 1 and max(spans) > 8


@pytest.mark.parametrize("objective", ["prefix_lm", "span_corruption", "ul2"])
def test_each_token_of_a_document_is_in_one_window(objective):
    asked = settings(objective=objective, max_source_tokens=64, max_target_tokens=48)
    special = SpecialTokens([], [7], [], [1], SENTINELS, {})
    tokens = list(range(2000, 3000))
    pairs, left = pairs_of(tokens, asked, special, key=5)
    assert all(len(source) <= 64 and len(target) <= 48 for source, target in pairs)
    assert all(source[-1] == 7 and target[-1] == 1 for source, target in pairs)
    windows = [restored(source[:-1], target[:-1], set(SENTINELS)) for source, target in pairs]
    assert [token for window in windows for token in window] == tokens[: len(tokens) - left]
    assert left < MINIMUM
    assert pairs_of(tokens, asked, special, key=5) == (pairs, left)
    assert pairs_of(tokens, asked, special, key=6)[0] != pairs


def test_a_window_is_the_longest_that_fits():
    for denoiser in UL2_MIXTURE:
        length = window_length(denoiser, 120, 60, 100)
        if denoiser.mean_span_length is None:
            assert length == 180
            continue
        noise, spans = noise_and_spans(length, denoiser)
        assert length - noise + spans <= 120 and noise + spans <= 60
        noise, spans = noise_and_spans(length + 1, denoiser)
        assert length + 1 - noise + spans > 120 or noise + spans > 60


def test_the_mixture_has_each_denoiser_as_often_and_says_its_mode():
    asked = settings(objective="ul2", mode_tokens=["a", "b", "c"], max_source_tokens=64, max_target_tokens=64)
    special = SpecialTokens([], [], [], [], SENTINELS, {"R": 1, "S": 2, "X": 3})
    modes = [pairs_of(range(2000, 2400), asked, special, key)[0][0][0][0] for key in range(900)]
    shares = [modes.count(mode) / len(modes) for mode in (1, 2, 3)]
    assert shares == pytest.approx([2 / 7, 1 / 7, 4 / 7], abs=0.05)


def test_a_file_becomes_packed_rows_of_which_every_text_can_be_read_again(tokenizer_folder, corpus, tmp_path, capsys):
    out = tmp_path / "pairs"
    command = ["denoise", "--data", str(corpus), "--tokenizer", str(tokenizer_folder), "--out", str(out)]
    lengths = ["--max_source_tokens", "60", "--max_target_tokens", "60"]
    assert main([*command, "--objective", "ul2", "--add_sentinels", "20", *lengths]) == 0
    said = capsys.readouterr().out
    assert "60 documents" in said and f"--data {out}/pairs.parquet --tokenizer {out}/tokenizer" in said
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
    sentinels = {tokenizer.convert_tokens_to_ids(f"<extra_id_{number}>") for number in range(20)}
    table = pyarrow.parquet.read_table(out / "pairs.parquet").to_pylist()
    windows = [restored(row["input_ids"], row["labels"][:-1], sentinels) for row in table]
    assert all(row["labels"][-1] == tokenizer.eos_token_id for row in table)
    for encoding in split_sources(tokenizer, TEXTS[:5]):
        whole, place = encoding.content, 0
        while len(whole) - place >= MINIMUM:  # its windows, in order
            window = next(it for it in windows if it == whole[place : place + len(it)] and len(it) >= MINIMUM)
            place += len(window)
    eos, sentinel = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<extra_id_0>")
    assert not any(eos in row["labels"][:-1] for row in table), "the text's own </s> is text"
    assert all(row["input_ids"].count(sentinel) <= 1 for row in table)

    prepared = tmp_path / "prepared"
    more = ["--tokenizer", str(out / "tokenizer"), "--out", str(prepared), "--deduplicate", "false"]
    assert main(["prepare", "--data", str(out / "pairs.parquet"), *more]) == 0
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert manifest["packing"]["examples"] > 50


def test_the_same_text_gives_the_same_pairs_in_any_order(tokenizer_folder, tmp_path):
    found = []
    for name, texts in (("one", TEXTS), ("other", TEXTS[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
        out = tmp_path / name
        data = ["--data", str(tmp_path / f"{name}.jsonl"), "--tokenizer", str(tokenizer_folder)]
        assert main(["denoise", *data, "--out", str(out)]) == 0
        rows = pyarrow.parquet.read_table(out / "pairs.parquet").to_pylist()
        found.append(sorted(json.dumps(row) for row in rows))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "more, message",
    [
        (["--objective", "ul2"], "has no sentinels .* --add_sentinels 100.* Or take prefix_lm"),
        (["--noise_density", "1.5"], "noise_density is 1.5; it must be above 0 and below 1"),
        (["--mode_tokens", "[R]", "[S]", "[X]"], "mode_tokens are three, .* of objective ul2"),
        (["--max_source_tokens", "2", "--max_target_tokens", "2"], "leave no room for text"),
        (["--out", ""], "out is not set"),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(more, message, tokenizer_folder, corpus, tmp_path, capsys):
    command = ["--data", str(corpus), "--tokenizer", str(tokenizer_folder), "--out", str(tmp_path / "out")]
    assert main(["denoise", *command, *more]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said, flags=re.DOTALL) and "Traceback" not in said


def test_a_file_may_be_one_document(tokenizer_folder, corpus, tmp_path, capsys):
    command = ["--data", str(corpus), "--tokenizer", str(tokenizer_folder), "--out", str(tmp_path / "out")]
    assert main(["denoise", *command, "--documents", "file"]) == 0
    assert " of 1 documents" in capsys.readouterr().out
