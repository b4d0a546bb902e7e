"""What is said of how far outputs can be trusted: the fit, its figures, and what stands beside an output."""

import json
import shutil
import string

import numpy as np
import openai
import pytest
import torch
from conftest import EIGHT_ROWS, TO_KOREAN, tiny_t5
from listening import listening

import diptych
from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.commands import cli
from diptych.finetune.evaluating.calibration import calibrated, parse_right
from diptych.finetune.inference.output_confidence import Calibration, repetition, unread_of
from diptych.finetune.inference.outputs import Output
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.serving.serve_settings import ServeSettings
from diptych.finetune.serving.served_model import load_served


def outputs_like(count: int, seed: int = 0) -> tuple[list[Output], np.ndarray]:
    """Outputs of which those with a higher mean log-probability are right more often, by a known function."""
    draw = np.random.default_rng(seed)
    means, ends = -draw.gamma(1.0, 0.5, count), draw.random(count) < 0.9
    outputs = [
        Output("a", bool(ended), tuple(range(10))).scored([mean] * 10) for mean, ended in zip(means, ends, strict=True)
    ]
    probability = 1 / (1 + np.exp(-(2.0 + 4.0 * means - 3.0 * ~ends)))
    return outputs, draw.random(count) < probability


def test_the_fit_finds_the_probability_from_which_outcomes_were_drawn():
    outputs, right = outputs_like(4000)
    found = calibrated(outputs, right, seed=0)
    calibration = Calibration(tuple(found.weights), "exact_match")
    for mean, ended in ((-0.1, True), (-0.5, True), (-1.0, True), (-0.2, False)):
        expected = 1 / (1 + np.exp(-(2.0 + 4.0 * mean - 3.0 * (not ended))))
        output = Output("a", ended, tuple(range(10))).scored([mean] * 10)
        assert calibration.probability(output) == pytest.approx(expected, abs=0.05)
    assert found.figures["calibration_error"] < 3
    assert found.figures["right_at_half_coverage"] > found.figures["right"] + 15
    assert found.risk[-1] == pytest.approx(1 - right.mean())
    # Of a confidence that says nothing, the surest half is no better than all.
    _, other = outputs_like(4000, seed=1)
    unrelated = calibrated(outputs, other, seed=0).figures
    assert abs(unrelated["right_at_half_coverage"] - unrelated["right"]) < 3
    assert not found.warning
    worse = found._replace(figures=found.figures | {"right_at_half_coverage": found.figures["right"]})
    assert "is not above right" in worse.warning


def test_outputs_that_are_all_right_cannot_be_fitted_and_broken_thresholds_are_said():
    outputs, right = outputs_like(200)
    assert "200 outputs of which 200 are right" in calibrated(outputs, np.ones(200, dtype=bool), seed=0).not_fitted
    few = calibrated(outputs[:30], right[:30], seed=0)
    assert "30 outputs" in few.not_fitted
    surest = sorted(range(30), key=lambda place: -outputs[place].log_probability)[:15]
    assert few.figures["right_at_half_coverage"] == pytest.approx(100 * np.mean([right[place] for place in surest]))
    assert few.figures.keys() == {"right", "right_at_half_coverage", "area_under_risk"}
    assert parse_right("chrf:60") == ("chrf", 60.0)
    with pytest.raises(UserError, match="'chrf:high'"):
        parse_right("chrf:high")


def test_repetition_is_the_part_that_occurred_before():
    assert repetition([1, 2, 3, 4, 5, 6]) == 0
    assert repetition([1, 2]) == 0
    assert repetition([7] * 23) == pytest.approx(1 - 1 / 20)


def test_what_no_target_token_looks_at_is_unread(tiny_tokenizer):
    """Of a T5 whose keys of cross-attention are large for the letters a to m, and small for n to z."""
    model = tiny_t5(len(tiny_tokenizer)).eval()
    letters = {row: text for text, row in tiny_tokenizer.get_vocab().items() if text in string.ascii_lowercase}
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if name.endswith((".o.weight", ".wo.weight", "q.weight", "k.weight")):
                weights.zero_()  # states are the embeddings
        model.shared.weight.mul_(0.01)[:, 0] = 1
        for row in letters:
            model.shared.weight[row, 1] = 1 if letters[row] < "n" else -1
        for block in model.decoder.block:
            attention = block.layer[1].EncDecAttention
            for head in range(model.config.num_heads):
                attention.q.weight[head * model.config.d_kv, 0] = 2
                attention.k.weight[head * model.config.d_kv, 1] = 2
    loaded = LoadedModel.of(model, tiny_tokenizer)
    source = tiny_tokenizer("abc xyz dee")["input_ids"]
    given, output = [loaded.decoder_start_token_id], Output("x", True, (40, 41, 1))
    assert unread_of(loaded, source, given, output) == ("xyz",)
    assert unread_of(loaded, source, given, Output("", True)) == ()


def test_what_evaluate_fits_says_how_far_generated_outputs_can_be_trusted(t5_checkpoint, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(t5_checkpoint, model)
    texts = [f"{row[1]} {number}" for number in range(8) for row in EIGHT_ROWS] + [row[1] for row in EIGHT_ROWS]
    rows = [{"instruction": TO_KOREAN, "input": text} for text in texts]
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = ["generate", str(model), "--in_file", str(asked), "--max_new_tokens", "24"]
    assert cli.main([*command, "--out_file", str(tmp_path / "plain.jsonl")]) == 0
    plain = [json.loads(line) for line in (tmp_path / "plain.jsonl").read_text(encoding="utf-8").splitlines()]
    # Every other output is made right: there is something to fit, and nothing to find.
    for number, (row, written) in enumerate(zip(rows, plain, strict=True)):
        row["output"] = written["prediction"] if number % 2 and written["prediction"].strip() else "다른 것"
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prepare = ["prepare", "--validation", str(data), "--tokenizer", str(model), "--out", str(tmp_path / "prepared")]
    assert cli.main(prepare) == 0
    left = [*command, "--out_file", str(tmp_path / "out.jsonl"), "--abstain_below", "0.5"]
    assert cli.run("generate", left[1:]) == 2
    assert "has no calibration.json" in capsys.readouterr().err
    evaluate = ["evaluate", str(model), "--data", str(tmp_path / "prepared"), "--split", "validation"]
    evaluate += ["--metrics", "", "--max_new_tokens", "24", "--out", str(tmp_path / "report.json")]
    for asked_for, says in {
        "exact_matches": "no such figure. Did you mean exact_match",
        "json": "no such figure. Did you mean json_",
        "rouge:50": "no such figure. Did you mean rougeL",
        "chrf": "Give the score: chrf:60",
        "token_error_rate:30": "lower token_error_rate is better",
    }.items():
        assert cli.run("evaluate", [*evaluate[1:], "--confidence", asked_for]) == 2
        said = capsys.readouterr().err
        assert says in said and "split validation" not in said
    # Too few are right: the report is written, and then the fit is said to have failed.
    few = [*evaluate, "--confidence", "bleu:99", "--limit", "12"]
    assert cli.main(few) == 0
    assert "warning: confidence cannot be fitted to 12 outputs" in capsys.readouterr().err
    for file in ("report.json", "report.predictions.jsonl"):
        (tmp_path / file).unlink()
    assert cli.main([*few, "--calibrate", "true"]) == 2
    assert "no calibration.json was written: confidence cannot be fitted" in capsys.readouterr().err
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["risk"].keys() >= {"area_under_risk"}
    assert (tmp_path / "report.predictions.jsonl").is_file() and not (model / "calibration.json").exists()
    assert cli.main([*evaluate, "--confidence", "exact_match", "--calibrate", "true"]) == 0
    printed = capsys.readouterr()
    assert "right_at_half_coverage" in printed.out
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["risk"]["right"] == report["figures"]["exact_match"]
    is_worthless = report["risk"]["right_at_half_coverage"] <= report["risk"]["right"]
    assert ("warning: right_at_half_coverage" in printed.err) == is_worthless
    assert (tmp_path / "report.risk.png").stat().st_size > 5000
    assert cli.main(left) == 0
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["prediction"] for row in found] == [row["prediction"] for row in plain]
    for row in found:
        facts = row["confidence"]
        assert facts["abstained"] == (facts["probability"] < 0.5)
        assert facts["lowest_log_probability"] <= facts["log_probability_per_token"] <= 0
        assert {"repetition", "language", "unread"} < facts.keys()
    assert cli.main([*command[:2], "--instruction", TO_KOREAN, "--input", texts[0], "--confidence", "true"]) == 0
    assert "probability 0." in capsys.readouterr().err
    pair = diptych.load(str(model)).generate(
        {"instruction": TO_KOREAN, "input": texts[0]}, confidence=True, max_new_tokens=24
    )
    assert (pair[0].text, pair[1]["unread"]) == (plain[0]["prediction"], found[0]["confidence"]["unread"])
    with listening(["serve", str(model)], tmp_path / "log") as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        extra = {"input": texts[0], "confidence": True}
        settings = {"model": "model", "prompt": TO_KOREAN, "max_tokens": 24}
        answer = client.completions.create(**settings, extra_body=extra).choices[0]
        assert answer.text == plain[0]["prediction"]
        said, expected = answer.model_extra["confidence"], found[0]["confidence"]
        assert said["probability"] == pytest.approx(expected["probability"], abs=1e-3)
        assert (said["unread"], said["language"]) == (expected["unread"], expected["language"])
        with pytest.raises(openai.BadRequestError, match="without 'stream'"):
            client.completions.create(**settings, stream=True, extra_body=extra)
        formed = client.completions.create(**settings, extra_body=extra | {"structured_outputs": {"regex": "[a-c]+"}})
        assert formed.choices[0].model_extra["confidence"]["probability"] is None
    of_form = [str(model), "--instruction", "Go.", "--regex", "[a-c]+", "--max_new_tokens", "8"]
    assert cli.run("generate", [*of_form, "--confidence", "true"]) == 0
    assert "fitted to outputs of another --json_schema or --regex" in capsys.readouterr().err
    assert cli.run("generate", [*of_form, "--abstain_below", "0.5"]) == 2
    assert "no calibration.json for outputs of this form" in capsys.readouterr().err
    stored = json.loads((model / "calibration.json").read_text(encoding="utf-8"))
    (model / "calibration.json").write_text(json.dumps(stored | {"form": "[a-c]+"}), encoding="utf-8")
    (served,) = load_served(ServeSettings(str(model)), [str(model)])
    assert served.calibration.form == "[a-c]+"  # for requests with this form
    assert stored["form"] == "" and cli.run("generate", [*of_form, "--abstain_below", "0.5"]) == 0
    assert "(probability " in capsys.readouterr().err
    (model / "calibration.json").write_text(json.dumps(stored | {"weights_sha256": "0"}), encoding="utf-8")
    assert cli.run("generate", [str(model), "--input", "Go.", "--confidence", "true"]) == 2
    assert "fitted for other weights" in capsys.readouterr().err
