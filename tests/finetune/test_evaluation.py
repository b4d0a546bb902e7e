"""The figures of an evaluation, checked by hand on a small real model and real prepared rows."""

import json
import re
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoTokenizer

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.text_to_ids.templates import Template, attach_template
from diptych.finetune.batches.padded_rows import padded_rows
from diptych.finetune.commands import cli
from diptych.finetune.commands.exit_codes import NOT_FINITE, NotFiniteError
from diptych.finetune.evaluating.confidence_intervals import bootstrap_intervals
from diptych.finetune.evaluating.evaluate_rows import cap_from_targets, draw, evaluate_rows, row_losses
from diptych.finetune.evaluating.evaluate_split import data_identity, format_table
from diptych.finetune.evaluating.metrics import METRICS, compute_metrics, is_improvement, selectable_figures
from diptych.finetune.inference.generation import generate_outputs
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.loss import Seq2SeqObjective

pytestmark = pytest.mark.usefixtures("no_mecab")

METRIC_NAMES = ["exact_match", "token_f1", "rouge", "bleu", "chrf"]


@pytest.fixture
def split(eight_prepared_rows):
    return datasets.Dataset.from_list(eight_prepared_rows)


@pytest.fixture
def split_with_alternatives(eight_prepared_rows):
    """Ten rows, eight sources: "Go." with two more translations, the last of them what the model does not say."""
    go = eight_prepared_rows[0]
    others = [go | {"target": text, "labels": [*go["labels"][:-1], 9, 1]} for text in ("가!", "가라.")]
    return datasets.Dataset.from_list([*eight_prepared_rows, *others])


def loss_by_hand(model, rows):
    """Each row alone, nothing padded: the model's own mean loss, weighed by the row's target tokens."""
    nats = tokens = 0
    with torch.no_grad():
        for row in rows:
            loss = model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
            nats += loss.item() * len(row["labels"])
            tokens += len(row["labels"])
    return nats / tokens, tokens


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_loss_is_nats_per_target_token_of_every_row(loaded, learned, split_with_alternatives, batch_size):
    expected, tokens = loss_by_hand(learned, split_with_alternatives)
    figures = evaluate_rows(loaded, split_with_alternatives, batch_size=batch_size).figures
    assert figures["loss"] == pytest.approx(expected, rel=1e-4)
    assert (figures["rows"], figures["target_tokens"]) == (10, tokens)


def test_rows_that_share_a_source_are_generated_once_and_their_targets_are_its_references(
    loaded, split_with_alternatives
):
    result = evaluate_rows(loaded, split_with_alternatives, metrics=METRIC_NAMES, batch_size=4)
    assert [row.source for row in result.predictions] == split_with_alternatives["source"][:8]
    assert result.predictions[0].references == ["가.", "가!", "가라."]
    assert result.predictions[0].prediction == "가."
    assert result.figures["sources"] == 8
    assert result.figures["exact_match"] == 100
    assert result.figures["exact_match_rows"] == 80  # two of ten rows wanted another translation of "Go."
    assert result.figures["chrf"] == pytest.approx(100)
    assert "nrefs:var" in result.signatures["chrf"] and "tok:char" in result.signatures["bleu"]


def test_metrics_are_those_of_the_texts_that_were_generated(loaded, split, eight_prepared_rows):
    figures = evaluate_rows(loaded, split, metrics=METRIC_NAMES, batch_size=8, max_new_tokens=5).figures
    outputs = generate_outputs(loaded, split["input_ids"], batch_size=8, max_new_tokens=5)
    expected = compute_metrics(
        METRIC_NAMES, [output.text for output in outputs], [[target] for target in split["target"]]
    )
    assert {name: figures[name] for name in expected} == pytest.approx(expected)
    assert figures["max_new_tokens"] == 5
    assert figures["unfinished"] == sum(len(row["labels"]) > 5 for row in eight_prepared_rows) > 0


def test_limit_draws_the_same_rows_from_the_whole_split_with_all_their_references(loaded, split_with_alternatives):
    drawn = draw(split_with_alternatives, 4)
    assert drawn["source"] == draw(split_with_alternatives, 4)["source"] != split_with_alternatives["source"][:4]
    assert draw(split_with_alternatives, 99)["target"] == split_with_alternatives["target"]
    result = evaluate_rows(loaded, split_with_alternatives, metrics=["exact_match"], limit=9)
    alternatives = {row.source: row.references for row in result.predictions}
    assert alternatives[split_with_alternatives["source"][0]] == ["가.", "가!", "가라."]  # also those not drawn


def test_a_limited_evaluation_puts_training_mode_back(loaded, learned, split):
    learned.train()
    try:
        result = evaluate_rows(loaded, split, metrics=["chrf"], limit=3)
        assert learned.training
    finally:
        learned.eval()
    assert result.figures["rows"] == 3


def test_the_cap_is_a_quarter_over_the_longest_target_within_the_models_positions():
    split = datasets.Dataset.from_dict({"labels": [[5] * 9 + [1], [5, 1]]})
    assert cap_from_targets(split, limit=None) == 13
    assert cap_from_targets(split, limit=12) == 12
    assert cap_from_targets(split, limit=8) == 10


def test_without_metrics_nothing_is_generated(loaded, split):
    assert set(evaluate_rows(loaded, split).figures) == {"rows", "loss", "target_tokens"}


def test_targets_shorter_than_any_output_may_be_are_said_and_the_setting_can_be_given(
    t5_checkpoint, prepared_folder, tmp_path, capsys
):
    folder = shutil.copytree(t5_checkpoint, tmp_path / "t5")
    settings = json.loads((folder / "generation_config.json").read_text()) | {"min_length": 7}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    asked = [str(folder), f"--data={prepared_folder}", "--metrics=exact_match"]
    assert cli.run("evaluate", asked) == 0
    said = capsys.readouterr()
    assert re.search(r"exact_match +[0-7]\d\.", said.out)
    shorter = sum(len(labels) < 7 for labels in datasets.load_from_disk(prepared_folder)["test"]["labels"])
    assert (
        f"{shorter} of 8 targets have fewer tokens than the 7 that each output has at least, by min_length" in said.err
    )
    assert cli.run("evaluate", [*asked, "--generation.min_length=0"]) == 0
    said = capsys.readouterr()
    assert re.search(r"exact_match +100\.00", said.out) and "min_length" not in said.err


def test_an_empty_split_is_refused(loaded_t5, split):
    with pytest.raises(UserError, match="has no rows"):
        evaluate_rows(loaded_t5, split.select([]))


def test_the_table_has_a_line_for_each_figure_with_its_unit(loaded, split):
    evaluated = evaluate_rows(loaded, split, metrics=["rouge", "chrf"], max_new_tokens=5)
    intervals = bootstrap_intervals(evaluated.statistics)
    table = format_table(evaluated, intervals)
    lines = {line.split()[0]: line for line in table.splitlines()}
    assert list(lines) == [
        "rows", "sources", "loss", "rouge1", "rouge2", "rougeL", "chrf", "exact_match_rows", "unfinished", "[low,",
    ]  # fmt: skip
    assert "nats/token over" in lines["loss"]
    low, high = intervals["chrf"]
    assert low < evaluated.figures["chrf"] < high
    assert f"[{low:.2f}, {high:.2f}]" in lines["chrf"]
    assert "never ended and were stopped at 5 tokens" in lines["unfinished"]
    assert not any(line.startswith("[low") for line in format_table(evaluated, {}).splitlines())


def test_the_command_writes_a_report_and_the_predictions_in_order(
    t5_checkpoint, prepared_folder, eight_prepared_rows, tmp_path, capsys
):
    out = tmp_path / "reports" / "report.json"
    arguments = [str(t5_checkpoint), "--data", str(prepared_folder), "--metrics", "chrf,bleu", "--out", str(out)]
    assert cli.run("evaluate", [*arguments, "--device", "cpu"]) == 0
    assert "chrf" in capsys.readouterr().out
    report = json.loads(out.read_text())
    assert report["figures"]["rows"] == 8 and report["figures"]["chrf"] == pytest.approx(100)
    assert report["settings"]["split"] == "test" and "tok:char" in report["signatures"]["bleu"]
    lines = [json.loads(line) for line in (tmp_path / "reports" / "report.predictions.jsonl").read_text().splitlines()]
    assert lines == [
        {"source": row["source"], "references": [row["target"]], "prediction": row["target"], "finished": True}
        | {"nats": pytest.approx(line["nats"]), "target_tokens": len(row["labels"])}
        for line, row in zip(lines, eight_prepared_rows, strict=True)
    ]
    nats = sum(line["nats"] for line in lines) / sum(line["target_tokens"] for line in lines)
    assert nats == pytest.approx(report["figures"]["loss"])
    assert report["intervals"].keys() == {"loss", "chrf", "bleu", "exact_match_rows"}
    assert report["intervals"]["chrf"] == pytest.approx([100, 100])
    low, high = report["intervals"]["loss"]
    assert low < report["figures"]["loss"] < high
    assert report["figures"]["unfinished"] == 0 and report["figures"]["max_new_tokens"] > 0


def test_each_test_set_has_a_table_and_a_report_of_its_own(
    t5_checkpoint, prepared_folder, eight_prepared_rows, tmp_path, capsys
):
    folder = tmp_path / "prepared"
    rows = datasets.Dataset.from_list(eight_prepared_rows)
    sets = {"test/news": rows.select(range(3)), "test/law": rows.select([6, 1])}
    datasets.DatasetDict(sets).save_to_disk(folder)
    shutil.copytree(Path(prepared_folder) / "tokenizer", folder / "tokenizer")
    arguments = [str(t5_checkpoint), "--data", str(folder), "--metrics", "chrf", "--device", "cpu"]
    assert cli.run("evaluate", [*arguments, "--out", str(tmp_path / "all.json")]) == 0
    tables = capsys.readouterr().out
    assert re.findall(r"^test/\w+$|^rows +\d+", tables, flags=re.MULTILINE) == [
        "test/news", f"rows{3:25}", "test/law", f"rows{2:25}",
    ]  # fmt: skip
    assert cli.run("evaluate", [*arguments, "--split", "tst"]) == 2
    assert "no split 'tst'. Did you mean test? Choose from: test, test/news, test/law." in capsys.readouterr().err
    assert cli.run("evaluate", [*arguments, "--split", "test/law", "--out", str(tmp_path / "one.json")]) == 0
    of_all, alone = (json.loads((tmp_path / name).read_text()) for name in ("all.law.json", "one.json"))
    del of_all["settings"]["out"], alone["settings"]["out"]
    assert of_all == alone and of_all["settings"]["split"] == "test/law" and of_all["data"]["rows"] == 2
    predictions = (tmp_path / "all.news.predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["source"] for line in predictions] == [row["source"] for row in eight_prepared_rows[:3]]
    assert cli.run("evaluate", [*arguments, "--split", "law"]) == 2
    assert "has no split 'law'. Choose from: test, test/news, test/law." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--split", "tset"], "has no split 'tset'. Did you mean test?"),
        (["--metrics", "blue"], "no metric 'blue'. Did you mean bleu?"),
        (["--limit", "0"], "limit is 0; it must be 1 or more"),
        (["--nun_beams", "2"], "Did you mean --num_beams?"),
        (["--mbr_samples", "4", "--num_beams", "2"], "--mbr_samples 16 --num_beams 1"),
    ],
)
def test_mistakes_end_with_code_2_and_one_message(t5_checkpoint, prepared_folder, more, message, capsys):
    assert cli.run("evaluate", [str(t5_checkpoint), "--data", str(prepared_folder), *more]) == 2
    assert message in capsys.readouterr().err


def test_data_prepared_with_another_tokenizer_is_refused(t5_checkpoint, prepared_folder, tmp_path, capsys):
    folder = shutil.copytree(prepared_folder, tmp_path / "prepared")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["낱말"])
    tokenizer.save_pretrained(folder / "tokenizer")
    assert cli.run("evaluate", [str(t5_checkpoint), "--data", str(folder)]) == 2
    assert "was prepared with another tokenizer" in capsys.readouterr().err
    assert cli.run("evaluate", [str(t5_checkpoint), "--data", str(tmp_path)]) == 2
    assert "is no prepared dataset" in capsys.readouterr().err


@pytest.mark.parametrize("language", ["<ko>", "<en>"])
def test_the_prefix_and_stop_of_the_template_that_made_the_rows_are_used(two_languages, language, tmp_path, capsys):
    model, tokenizer, rows = two_languages
    rows = [row for row in rows if row["language"] == language]
    split = datasets.Dataset.from_list(rows)
    prefix = Template("prefix", "{{ instruction }}", decoder_prefix=(language,))
    told = evaluate_rows(LoadedModel.of(model, tokenizer, prefix), split, metrics=["exact_match"])
    assert told.figures["exact_match"] == told.figures["exact_match_rows"] == 100
    assert told.figures["loss"] == pytest.approx(loss_by_hand(model, split)[0], rel=1e-4)

    stop = Template("stop", "{{ instruction }}", decoder_prefix=(language,), stop=("학생", "friend"))
    stopped = evaluate_rows(LoadedModel.of(model, tokenizer, stop), split, metrics=["exact_match"])
    last = stopped.predictions[-1]
    assert last.references == [last.prediction] == [{"<ko>": "나는 ", "<en>": "I am a "}[language]]
    assert last.finished and stopped.figures["exact_match_rows"] == 100

    # On the command line the template is that of the data, also where the checkpoint carries another one, or none.
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    datasets.DatasetDict({"test": split}).save_to_disk(tmp_path / "data")
    prepared = type(tokenizer).from_pretrained(tmp_path / "model")
    attach_template(prepared, stop)
    prepared.save_pretrained(tmp_path / "data" / "tokenizer")
    report = tmp_path / "report.json"
    arguments = [str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--out", str(report), "--device", "cpu"]
    assert cli.run("evaluate", [*arguments, "--metrics", "exact_match"]) == 0
    assert json.loads(report.read_text())["figures"]["exact_match_rows"] == 100
    lines = (tmp_path / "report.predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["prediction"] for line in lines] == [row.prediction for row in stopped.predictions]


def test_each_rows_loss_is_its_own_whatever_stands_beside_it(loaded, learned, split):
    found = row_losses(Seq2SeqObjective(learned), padded_rows(loaded, split), batch_size=3)
    for row, (nats, tokens) in zip(split, found, strict=True):
        mean, own_tokens = loss_by_hand(learned, [row])
        assert nats == pytest.approx(mean * own_tokens, rel=1e-4) and tokens == own_tokens


def test_rows_that_share_a_source_are_drawn_together_for_intervals(loaded, split_with_alternatives):
    result = evaluate_rows(loaded, split_with_alternatives, metrics=["chrf"])
    assert {name: len(each.counts) for name, each in result.statistics.items()} == {
        "loss": 8, "chrf": 8, "exact_match_rows": 8,
    }  # fmt: skip
    assert result.statistics["exact_match_rows"].counts[0].tolist() == [1, 3]  # of three targets of "Go." one came out
    assert result.predictions[0].target_tokens == sum(
        len(row["labels"]) for row in split_with_alternatives if row["source"] == result.predictions[0].source
    )


def test_a_loss_that_is_no_number_names_the_row(new_model, tiny_tokenizer, split, prepared_folder, tmp_path, capsys):
    model = new_model("t5", tie_word_embeddings=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[split[2]["input_ids"][-2]] = 3e38  # finite, as loading wants it
        model.encoder.final_layer_norm.weight.fill_(3e38)
    with pytest.raises(NotFiniteError, match=r"the loss of \d of 8 rows is infinite or no number, first that of row"):
        evaluate_rows(LoadedModel.of(model, tiny_tokenizer), split)
    model.save_pretrained(tmp_path / "broken")
    tiny_tokenizer.save_pretrained(tmp_path / "broken")
    assert (
        cli.run("evaluate", [str(tmp_path / "broken"), "--data", str(prepared_folder), "--metrics", ""]) == NOT_FINITE
    )
    assert "--dtype float32" in capsys.readouterr().err


def test_every_figure_that_can_choose_a_checkpoint_is_computed_and_has_a_direction(loaded, split):
    of_texts = [name for name in METRICS if name != "json"]  # whose targets have to be JSON
    figures = evaluate_rows(loaded, split, metrics=of_texts).figures
    selectable = selectable_figures(of_texts)
    assert set(selectable) <= set(figures) and {"superni_rougeL", "chrf", "loss", "unfinished"} <= set(selectable)
    assert selectable_figures([]) == ["loss"]
    for name in selectable:
        lower = name in ("loss", "unfinished", "token_error_rate")
        assert is_improvement(name, 2.0, None) and not is_improvement(name, 2.0, 2.0)
        assert is_improvement(name, 1.0, 2.0) == lower and is_improvement(name, 3.0, 2.0) != lower
        assert not is_improvement(name, float("nan"), None)


def test_the_identity_of_a_split_is_that_of_its_texts(split):
    other = split.map(lambda row: {"labels": row["labels"][:1]}, load_from_cache_file=False)
    assert data_identity(split) == data_identity(other)
    assert data_identity(split) != data_identity(split.select(range(7)))
    assert data_identity(split) != data_identity(split.select([1, 0, *range(2, 8)]))


def test_samples_are_drawn_by_the_seed_and_leave_torchs_own_random_state(loaded_t5, split):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again = (
        evaluate_rows(loaded_t5, split, metrics=["chrf"], batch_size=3, mbr_samples=4, seed=1) for _ in range(2)
    )
    assert first.predictions == again.predictions
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "more",
    [
        ["--batch_size", "3", "--metrics", "chrf,bleu,token_f1"],  # three batches: in the second round one is left
        ["--limit", "1", "--metrics", "chrf", "--mbr_samples", "3"],  # one row for two ranks
    ],
    ids=["eight rows", "one row"],
)
def test_two_ranks_are_one_rank_to_the_last_digit(t5_checkpoint, prepared_folder, more, nursery, tmp_path, capfd):
    def arguments(out):
        return [str(t5_checkpoint), "--data", str(prepared_folder), "--device", "cpu", "--out", str(out), *more]

    alone, shared = tmp_path / "alone.json", tmp_path / "shared.json"
    assert cli.run("evaluate", arguments(alone)) == 0
    printed = capfd.readouterr().out
    processes = nursery.launch(["evaluate", *arguments(shared)], tmp_path / "log", ranks=2)
    ended = [process.wait(200) for process in processes]
    said = [(tmp_path / f"log.{rank}").read_text() for rank in range(2)]
    assert ended == [0, 0], said
    assert printed.replace("alone", "shared") in said[0] and "nats/token" not in said[1], "one rank speaks"
    assert "nats/token" in printed
    reports = [json.loads(path.read_text()) for path in (alone, shared)]
    for report in reports:
        del report["settings"]["out"]
    assert reports[0] == reports[1]
    lines = [path.with_suffix(".predictions.jsonl").read_bytes() for path in (alone, shared)]
    assert lines[0] == lines[1] and lines[0].count(b"\n") == reports[0]["figures"]["rows"]
