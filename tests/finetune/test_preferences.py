"""Samples of a real model, and what ranks them: pairs, scores and reports against sacrebleu's own sentence scores."""

import json
from pathlib import Path

import datasets
import pytest
import sacrebleu
import torch

from diptych.finetune.commands import cli
from diptych.finetune.inference.target_tokens import text_of
from diptych.finetune.model.loading import load_checkpoint

REFERENCE = "the cat sat on the mat"
ANSWERS = ["the cat sat on a mat", "the cat", "dogs", "the cat sat on the mat", "the cat"]


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def sampled(*answers, finished=None, **fields):
    return {
        "row": 1,
        "prediction": list(answers),
        "finished": finished or [True] * len(answers),
        "source_cut": False,
        "log_probability": [-1.0] * len(answers),
        "input": "Say it.",
        "output": REFERENCE,
    } | fields


@pytest.fixture
def rank(tmp_path, capsys):
    """`rank(rows, *options)`: the pairs and the report; `rank(rows, *options, code=2)`: what was said."""

    def run(rows, *options, code=0):
        capsys.readouterr()
        words = [str(write_rows(tmp_path / "samples.jsonl", *rows)), "--out", str(tmp_path / "pairs.jsonl"), *options]
        assert cli.run("rank", [*words, "--overwrite", "true"]) == code
        if code:
            return capsys.readouterr().err
        return read_rows(tmp_path / "pairs.jsonl"), json.loads((tmp_path / "pairs.jsonl.report.json").read_text())

    return run


def chrf(text):
    return sacrebleu.sentence_chrf(text, [REFERENCE]).score


def test_a_model_s_samples_become_pairs_that_prepare_reads(tmp_path, t5_checkpoint, eight_prepared_rows, capsys):
    rows = [
        {name: row[name] for name in ("instruction", "input")} | {"output": row["target"]}
        for row in eight_prepared_rows
    ]
    data, out = write_rows(tmp_path / "rows.jsonl", *rows), tmp_path / "samples.jsonl"
    shared = ["--max_new_tokens", "12", "--batch_size", "3", "--device", "cpu", "--seed", "7"]
    drawn = ["--temperature", "3", "--top_k", "40"]
    words = [str(t5_checkpoint), "--data", str(data), "--samples", "4", *shared]
    assert cli.run("sample", [*words, "--out", str(out), *drawn]) == 0
    files = ["--in_file", str(data), "--out_file", str(tmp_path / "same.jsonl")]
    of_generate = ["--num_return_sequences", "4", "--scores", "true", "--temperature", "3", "--generation.top_k", "40"]
    assert cli.run("generate", [str(t5_checkpoint), *files, *shared, *of_generate, "--generation.top_p", "1.0"]) == 0
    assert out.read_bytes() == (tmp_path / "same.jsonl").read_bytes()
    samples = read_rows(out)
    assert all(len(row["prediction"]) == len(row["log_probability"]) == 4 for row in samples)
    assert any(len(set(row["prediction"])) > 1 for row in samples)

    pairs = tmp_path / "pairs.jsonl"
    assert cli.run("rank", [str(out), "--out", str(pairs), "--unfinished", "true"]) == 0
    for row in read_rows(pairs):
        scores = [sacrebleu.sentence_chrf(row[side], [row["output"]]).score for side in ("chosen", "rejected")]
        assert (
            scores == pytest.approx([row["chosen_score"], row["rejected_score"]], abs=1e-5) and scores[0] > scores[1]
        )
    capsys.readouterr()
    assert cli.run("rank", [str(out), "--out", str(pairs)]) == 2
    assert f"{pairs} is there already. Name another --out" in capsys.readouterr().err

    prepared = ["--data", str(pairs), "--map", "output=chosen", "--tokenizer", str(t5_checkpoint)]
    prepared += ["--validation_fraction", "0", "--test_fraction", "0", "--out", str(tmp_path / "prepared")]
    assert cli.run("prepare", prepared) == 0
    learned = datasets.load_from_disk(tmp_path / "prepared")["train"]
    assert set(learned["target"]) == {row["chosen"] for row in read_rows(pairs)}


def test_beams_are_the_likeliest_answers(tmp_path, t5_checkpoint, eight_prepared_rows):
    data = write_rows(tmp_path / "rows.jsonl", {"instruction": "Add.", "input": "1 + 1"})
    out = tmp_path / "beams.jsonl"
    words = [str(t5_checkpoint), "--data", str(data), "--out", str(out), "--samples", "3", "--beams", "true"]
    assert cli.run("sample", [*words, "--max_new_tokens", "8", "--device", "cpu"]) == 0
    (row,) = read_rows(out)
    assert len(set(row["prediction"])) == 3
    assert row["log_probability_per_token"] == sorted(row["log_probability_per_token"], reverse=True)


@torch.no_grad()
def test_diverse_beams_are_those_of_a_search_group_by_group(tmp_path, t5_checkpoint, eight_prepared_rows):
    """Against full forward passes, one answer after the other, each of which counts the tokens of those before it."""
    penalty, most = 3.0, 10
    prompts = [{name: row[name] for name in ("instruction", "input")} for row in eight_prepared_rows]
    data, out = write_rows(tmp_path / "rows.jsonl", *prompts), tmp_path / "out.jsonl"
    words = [str(t5_checkpoint), "--data", str(data), "--out", str(out), "--samples", "4", "--diversity", str(penalty)]
    assert cli.run("sample", [*words, "--max_new_tokens", str(most), "--batch_size", "3", "--device", "cpu"]) == 0
    loaded = load_checkpoint(str(t5_checkpoint), torch.float32, torch.device("cpu"))
    for row, prepared in zip(read_rows(out), eight_prepared_rows, strict=True):
        source, answers = torch.tensor([prepared["input_ids"]]), []
        for _ in range(4):
            answer = []
            while len(answer) < most and answer[-1:] != [1]:
                ids = torch.tensor([[loaded.decoder_start_token_id, *answer]])
                logits = loaded.model(input_ids=source, decoder_input_ids=ids).logits[0, -1]
                for other in answers:
                    if len(other) > len(answer):
                        logits[other[len(answer)]] -= penalty
                answer.append(int(logits.argmax()))
            answers.append(answer)
        assert row["prediction"] == [text_of(loaded.tokenizer, ids[: len(ids) - (ids[-1] == 1)]) for ids in answers]
        assert len(set(row["prediction"])) > 1
        assert row["finished"] == [ids[-1] == 1 for ids in answers]


def test_diversity_of_one_output_is_refused(t5_checkpoint, capsys):
    assert cli.run("generate", [str(t5_checkpoint), "--input", "Go.", "--diversity", "2"]) == 2
    assert "diversity is 2; it is above 0, for num_return_sequences of 2 or more" in capsys.readouterr().err


def test_the_best_and_the_worst_by_a_metric_of_each_sentence(rank):
    pairs, report = rank([sampled(*ANSWERS, id=5)])
    (pair,) = pairs
    assert (pair["chosen"], pair["rejected"]) == (REFERENCE, "dogs")
    assert pair["chosen_score"] == 100 and pair["rejected_score"] == pytest.approx(chrf("dogs"), abs=1e-6)
    assert (pair["id"], pair["input"], pair["output"]) == (5, "Say it.", REFERENCE)
    assert not {"prediction", "finished", "log_probability", "row", "source_cut"} & pair.keys()
    assert report["counts"]["answers"] == 5 and report["counts"]["answers that another one equals"] == 1
    assert report["characters"]["share of pairs whose chosen one is longer"] == 1
    assert report["score"]["of all answers"] == pytest.approx(sum(map(chrf, set(ANSWERS))) / 4)
    assert 0 < report["rank correlation of score and length"] <= 1


def test_bleu_is_that_of_sentences(rank):
    (pair,), _ = rank([sampled("the cat", "the cat sat on a mat")], "--by", "bleu")
    for side in ("chosen", "rejected"):
        expected = sacrebleu.sentence_bleu(pair[side], [REFERENCE]).score
        assert pair[f"{side}_score"] == pytest.approx(expected, abs=1e-6) and expected > 0


def test_all_pairs_random_ones_and_the_margin(rank):
    pairs, report = rank([sampled(*ANSWERS)], "--pairs", "all")
    assert len(pairs) == report["counts"]["pairs"] == 6
    assert all(pair["chosen_score"] > pair["rejected_score"] for pair in pairs)
    far, _ = rank([sampled(*ANSWERS)], "--pairs", "all", "--margin", "30")
    assert far == [pair for pair in pairs if pair["chosen_score"] - pair["rejected_score"] >= 30] and 0 < len(far) < 6
    rows = [sampled(*ANSWERS) for _ in range(20)]
    drawn, _ = rank(rows, "--pairs", "best_random")
    assert {pair["chosen"] for pair in drawn} == {REFERENCE} and len({pair["rejected"] for pair in drawn}) == 3
    assert drawn == rank(rows, "--pairs", "best_random")[0] != rank(rows, "--pairs", "best_random", "--seed", "1")[0]


def test_figures_are_added_up_by_weight_and_lower_ones_are_better_where_they_are(rank):
    (pair,), _ = rank([sampled("the cat sat", "x")], "--by", "token_error_rate")
    assert (pair["chosen"], pair["chosen_score"], pair["rejected_score"]) == ("the cat sat", -50, -100)
    options = ["--by", "rouge,exact_match", "--weights", "{rougeL: 0.5, exact_match: 2}"]
    (pair,), _ = rank([sampled(REFERENCE, "the cat")], *options)
    assert (pair["chosen_score"], pair["rejected_score"]) == (250, 25)
    said = rank([sampled(*ANSWERS)], "--by", "rouge", code=2)
    assert "rouge has the figures rouge1, rouge2, rougeL. Say which count" in said
    said = rank([sampled(*ANSWERS)], "--weights", "{bleu: 1}", code=2)
    assert "weights are given for bleu, which is no figure of chrf" in said


def test_a_function_of_ones_own_needs_no_reference(rank, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("taste.py").write_text(
        "def short(predictions, references, sources):\n    return [-len(p) for p in predictions]\n"
    )
    row = sampled("aaa", "a", "aa")
    del row["output"]
    (pair,), report = rank([row], "--by", "taste:short", "--reference", "none")
    assert (pair["chosen"], pair["rejected"], pair["chosen_score"]) == ("a", "aaa", -1)
    assert report["rank correlation of score and length"] == -1
    assert "chrf compares with a reference, and reference is none" in rank([row], "--reference", "none", code=2)


def test_what_cannot_be_ranked_is_left_out_and_counted(rank):
    tie = sampled("x", "y", output="z")
    cut = sampled(REFERENCE, "the cat", "dogs", finished=[False, True, True])
    empty = sampled("", "dogs", output="")
    pairs, report = rank([tie, cut, sampled("a", "a"), {"row": 4, "error": "broken"}, empty], "--by", "token_f1")
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("the cat", "dogs")]
    assert report["counts"] == {
        "rows": 5,
        "answers": 9,
        "answers that the token limit ended": 1,
        "answers that another one equals": 1,
        "rows without two different answers": 1,
        "rows with an error in place of answers": 1,
        "rows without a pair, for ties or the margin": 2,
        "pairs": 1,
    }
    (pair,), _ = rank([cut], "--unfinished", "true")
    assert pair["chosen"] == REFERENCE


@pytest.mark.parametrize(
    ("row", "options", "said"),
    [
        ({"prediction": "one"}, [], 'line 1: `prediction` is "one", and a list of texts is due'),
        ({"finished": [True]}, [], "line 1: `finished` does not have an entry for each of 5 answers"),
        ({"output": 3}, [], "line 1: field 'output' is 3; a text, or a list of texts, is due"),
        ({}, ["--reference", "gold"], "line 1: there is no field 'gold'; a text, or a list of texts, is due"),
        ({"chosen": "x"}, [], "line 1: field 'chosen' is one that is written here"),
        ({"input": "", "messages": [{"role": "user"}]}, [], "line 1: "),  # no traceback for a broken conversation
        ({"prediction": "one"}, ["--by", "chfr"], "Did you mean chrf?"),
        ({}, ["--margin", "-1"], "margin is -1; it must be 0 or more"),
        ({}, ["--margin", "500"], "no two answers to a prompt differ by chrf enough"),
        ({"prediction": ["a"] * 5}, [], "has no row with two different answers"),
    ],
)
def test_mistakes_are_one_message(rank, row, options, said):
    found = rank([sampled(*ANSWERS) | row], *options, code=2)
    assert said in found and found.count("\n") == 1


def test_a_place_that_cannot_be_written_to_is_told_and_a_pipe_gets_the_pairs(tmp_path, capsys):
    samples = write_rows(tmp_path / "samples.jsonl", sampled(*ANSWERS))
    before = samples.read_bytes()
    for out, said in ((tmp_path, "is a folder"), (samples, "is the file of samples")):
        assert cli.run("rank", [str(samples), "--out", str(out), "--overwrite", "true"]) == 2
        assert said in capsys.readouterr().err and samples.read_bytes() == before
    assert cli.run("rank", [str(samples), "--out", "/dev/null"]) == 0
    assert not list(Path("/dev").glob("null.*"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--samples", "1"], "samples is 1; it takes 2 or more to rank them"),
        (["--temperature", "0"], "temperature is 0, at which all samples are the same"),
        (["--beams", "true", "--top_p", "0.9"], "beams are not sampled, and top_p is for samples"),
        (["--diversity", "1", "--temperature", "0.7"], "beams are not sampled, and temperature is for samples"),
        (
            ["--diversity", "1", "--beams", "true"],
            "and is no sampling and no other beam search",
        ),
        (["--out", ""], "out is not set"),
    ],
)
def test_what_cannot_be_sampled_is_told(tmp_path, t5_checkpoint, capsys, options, said):
    data = write_rows(tmp_path / "rows.jsonl", {"instruction": "Add.", "input": "1 + 1"})
    words = [str(t5_checkpoint), "--data", str(data), "--out", str(tmp_path / "out.jsonl"), *options]
    assert cli.run("sample", words) == 2 and said in capsys.readouterr().err
