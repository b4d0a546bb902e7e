"""`diptych distil` with a T5 that knows eight rows by heart: it writes, a new small model learns, and a table says how
good, large and fast each of them is. What is chosen of the answers, and what is left out."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import EIGHT_ROWS, TO_KOREAN
from safetensors.torch import load_file

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.commands.cli import main as diptych
from diptych.finetune.several_runs.distil_settings import STUDENTS, DistilSettings
from diptych.finetune.several_runs.stage_table import table
from diptych.finetune.several_runs.written_rows import prompts_of, write_rows
from diptych.modeling import DiptychForConditionalGeneration, named_config

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
SMALL |= {"encoder": {"num_hidden_layers": 2}, "decoder": {"num_hidden_layers": 1}}
KOREAN = [row for row in EIGHT_ROWS if row[0] == TO_KOREAN]


def write_lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def as_rows(rows) -> list[dict]:
    return [dict(zip(("instruction", "input", "output"), row, strict=True)) for row in rows]


@pytest.fixture
def recipe(tmp_path, t5_checkpoint):
    """`recipe(name, **changes)`: a recipe file of a distillation into tmp_path/name, and the words that run it."""
    train = write_lines(tmp_path / "train.jsonl", as_rows(KOREAN))
    test = write_lines(tmp_path / "test.jsonl", as_rows([(TO_KOREAN, "Go!", "가."), (TO_KOREAN, "Hello!", "안녕!")]))

    def make(name: str, **changes) -> list[str]:
        settings = {
            "teacher": str(t5_checkpoint),
            "student": "tiny",
            "data": [train],
            "out": str(tmp_path / name),
            "prepare": {"test": [test], "on_both_sides": "keep", "validation_fraction": 0.0},
            "samples": 2,
            "train": {"model_overrides": SMALL, "max_steps": 4, "batch_size": 1, "precision": "fp32", "save_every": 2},
            "device": "cpu",
            **changes,
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return ["distil", "--config", str(file)]

    return make


@pytest.mark.slow
def test_one_recipe_leads_to_a_folder_in_int8_and_a_table(recipe, t5_checkpoint, tmp_path, capsys):
    pytest.importorskip("ctranslate2")
    assert diptych(recipe("whole", baseline=True)) == 0
    out, said = tmp_path / "whole", capsys.readouterr().out
    assert "minutes in which the teacher writes 2 answers to 5 rows" in said
    assert said.index("about 0.") < said.index("diptych generate --config")
    written = read_lines(out / "written.jsonl")
    assert {row["input"]: row["output"] for row in written} == {row[1]: row[2] for row in KOREAN}, "it knows them"
    assert len(written) == 10, "what it wrote, and the real rows"

    told = yaml.safe_load((out / "recipes" / "student.yaml").read_text())
    assert (told["teacher"], told["distill_weight"]) == (str(t5_checkpoint), 0.5)
    stages = json.loads((out / "table.json").read_text())
    assert [it["model"] for it in stages] == ["teacher", "student without teacher", "student", "student int8"]
    teacher, alone, student, int8 = stages
    assert teacher["figures"]["chrf"] > 50 and 0 <= teacher["intervals"]["chrf"][0] <= teacher["figures"]["chrf"]
    assert student["weights"] == alone["weights"] == int8["weights"] < teacher["weights"]
    assert int8["megabytes"] < student["megabytes"] < teacher["megabytes"]
    assert all(it["rows_per_second"] > 0 and it["rows"] == 2 for it in stages)
    assert table(stages) in said and (out / "table.md").read_text().strip() == table(stages)
    assert not list(out.glob(".trial*"))

    real = load_file(out / "baseline/final/model.safetensors")
    assert any(not real[name].equal(it) for name, it in load_file(out / "student/final/model.safetensors").items())
    assert diptych(["generate", str(out / "int8"), "--engine", "ctranslate2", "--instruction", "Add."]) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    assert diptych(recipe("whole", baseline=True)) == 0
    changed = [path for path, at in before.items() if path.stat().st_mtime_ns != at]
    assert {path.name for path in changed} <= {"table.md", "table.json"}, "what is there is not made again"


@pytest.mark.slow
def test_a_distillation_that_is_killed_goes_on_with_the_same_bits(recipe, nursery, tmp_path):
    """Again and again, each time before a later change to the disk."""
    assert diptych(recipe("undisturbed")) == 0
    words, log, deaths = recipe("killed"), tmp_path / "log", 0
    for die_at in (15, 40, 40, 40, 80):
        deaths += nursery.run(words, log, tmp_path, die_at=die_at).wait(300) == -9
    assert deaths >= 3
    assert nursery.run(words, log, tmp_path).wait(300) == 0, log.read_text()
    whole, cut = tmp_path / "undisturbed", tmp_path / "killed"
    assert (whole / "samples.jsonl").read_text() == (cut / "samples.jsonl").read_text()
    ours, theirs = (load_file(it / "student/final/model.safetensors") for it in (whole, cut))
    assert ours.keys() == theirs.keys() and all(it.equal(theirs[name]) for name, it in ours.items())
    figures = [[it["figures"] for it in json.loads((at / "table.json").read_text())] for at in (whole, cut)]
    assert figures[0] == figures[1]


@pytest.mark.slow
def test_back_translation_writes_sources_for_real_targets(recipe, tmp_path, capsys):
    texts = tmp_path / "korean.txt"
    texts.write_text("나는 학생이다.\n\n가.\n", encoding="utf-8")
    backward = {"direction": "backward", "backward_instruction": "Translate Korean to English:"}
    assert diptych(recipe("back", monolingual=str(texts), temperature=0.0, samples=1, **backward)) == 0
    out = tmp_path / "back"
    written = read_lines(out / "written.jsonl")
    assert written[:2] == as_rows([(TO_KOREAN, "I am a student.", "나는 학생이다."), (TO_KOREAN, "Go.", "가.")])
    assert written[2:] == as_rows(KOREAN)
    assert "teacher" not in yaml.safe_load((out / "recipes" / "student.yaml").read_text()), "it writes the other way"
    assert [it["model"] for it in json.loads((out / "table.json").read_text())] == ["student", "student int8"]


@pytest.mark.slow
def test_the_hours_are_said_without_beginning(recipe, tmp_path, capsys):
    assert diptych(recipe("hours", hours_only=True)) == 0
    assert "of training" in capsys.readouterr().out and not (tmp_path / "hours" / "samples.jsonl").exists()


@pytest.mark.slow
def test_a_student_with_a_tokenizer_of_its_own_learns_from_texts_alone(recipe, tmp_path, capsys):
    assert diptych(recipe("own", vocab_size=300)) == 0
    assert "from texts alone: the student has a tokenizer of its own" in capsys.readouterr().out
    assert "teacher" not in yaml.safe_load((tmp_path / "own" / "recipes" / "student.yaml").read_text())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"precision": "int4"}, "precision is 'int4'"),
        ({"metrics": "chrff"}, "Did you mean chrf?"),
        ({"by": "blue"}, "Did you mean bleu?"),
    ],
)
def test_what_would_end_the_work_hours_later_is_said_at_once(changes, message, recipe, tmp_path, capsys):
    pytest.importorskip("ctranslate2")
    assert diptych(recipe("never", **changes)) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "never").exists()


def test_other_settings_do_not_go_on_in_a_folder(recipe, tmp_path, capsys):
    (tmp_path / "begun").mkdir()
    assert diptych(recipe("begun", prepare={"tokenizer": "nowhere"})) == 2
    assert diptych(recipe("begun", samples=3)) == 2
    assert "was begun with prepare: {'tokenizer': 'nowhere'}" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert diptych(recipe("other")) == 2
    assert "is of no distillation" in capsys.readouterr().err


@pytest.mark.parametrize("name, weights", [("tiny", 3.3e6), ("small", 8.3e6), ("medium", 31e6)])
def test_students_have_a_deep_encoder_and_two_decoder_layers(name, weights):
    import torch

    size, overrides = STUDENTS[name]
    with torch.device("meta"):
        model = DiptychForConditionalGeneration(named_config(size, vocab_size=1000, **overrides))
    assert model.num_parameters() - model.model.encoder.embed_tokens.weight.numel() == pytest.approx(weights, rel=0.05)
    encoder, decoder = model.config.encoder, model.config.decoder
    assert decoder.num_hidden_layers == 2 and encoder.num_hidden_layers >= 3 * decoder.num_hidden_layers


# What is asked, and what is chosen


def settings_with(**changes) -> DistilSettings:
    return DistilSettings("teacher", "tiny", data=["rows"], out="out", **changes)


def sample(text: str, answers: dict[str, float], finished=None, **fields) -> dict:
    return {
        "instruction": "Say.",
        "input": text,
        "prediction": list(answers),
        "finished": finished or [True] * len(answers),
        "log_probability_per_token": list(answers.values()),
    } | fields


@pytest.fixture
def chosen(tmp_path):
    """`chosen(samples, **settings)`: {input: output} of the written rows, and the counts."""

    def run(samples, **settings):
        file = Path(write_lines(tmp_path / "samples.jsonl", samples))
        found = write_rows(file, [], settings_with(**settings), tmp_path / "written.jsonl")
        return {row["input"]: row["output"] for row in read_lines(tmp_path / "written.jsonl")}, found["counts"]

    return run


def test_with_a_target_the_metric_chooses_and_without_one_the_probability(chosen):
    answers = {"the cat": -0.1, "the cat sat": -0.9, "a dog": -0.5}
    samples = [sample("one two", answers, references=["the dog", "the cat sat"]), sample("one more", answers)]
    assert chosen(samples)[0] == {"one two": "the cat sat", "one more": "the cat"}
    assert chosen(samples, by="log_probability")[0]["one two"] == "the cat"
    errors = chosen(samples, by="token_error_rate")[0]
    assert errors["one two"] == "the cat sat", "of errors, fewer are better"


def test_what_is_cut_empty_unlikely_wrong_or_of_another_length_is_left_out(chosen):
    same = {"references": ["aaaa"]}
    samples = [sample(f"text {n}", {f"aaaa {n}": -0.5}, **same) for n in range(6)]
    samples += [
        sample("cut", {"aaaa": -0.1, "aa": -3.0}, finished=[False, True], **same),
        sample("none", {" ": -0.1, "bbb": -0.2}, finished=[True, False], **same),
        sample("long", {"aaaa " * 20: -0.1}, **same),
        sample("wrong", {"zzzz": -0.1}, **same),
    ]
    rows, counts = chosen(samples, most_nats=2.0, worst_score=10.0)
    assert rows == {f"text {n}": f"aaaa {n}" for n in range(6)}
    dropped = {name: counts[f"dropped by {name}"] for name in ("worst_score", "most_nats", "length_factor")}
    assert dropped == {"worst_score": 1, "most_nats": 1, "length_factor": 1}
    assert counts["prompts without a whole answer"] == 1 and counts["written rows"] == 6
    with pytest.raises(UserError, match="nothing that the teacher wrote is left .*10 prompts"):
        chosen(samples, worst_score=101.0)


def test_of_errors_the_worst_score_is_the_highest(chosen):
    samples = [sample("a", {"b c d": -0.1}, references=["b c d"]), sample("b", {"b c e": -0.1}, references=["b c d"])]
    assert chosen(samples, by="token_error_rate", worst_score=20.0)[0] == {"a": "b c d"}


def test_a_source_is_asked_once_and_has_all_its_targets(tmp_path):
    rows = as_rows([("Say.", "a", "1"), ("Say.", "a", "2"), ("Say.", "b", "3")])
    asked = prompts_of(rows, settings_with())
    assert [row["references"] for row in asked] == [["1", "2"], ["3"]]
    assert len(prompts_of(rows, settings_with(most_rows=1))) == 1
    more = tmp_path / "more.txt"
    more.write_text("c\nb\n")
    asked = prompts_of(rows, settings_with(monolingual=str(more)))
    assert [row["input"] for row in asked] == ["a", "b", "c"] and asked[2] == {"instruction": "Say.", "input": "c"}
    with pytest.raises(UserError, match="ask for different things"):
        prompts_of([*rows, *as_rows([("Shout.", "d", "4")])], settings_with(monolingual=str(more)))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"direction": "backward"}, "no texts to write sources for"),
        ({"temperature": 0.0}, "all samples are the same"),
        ({"train": {"teacher": "x"}}, "train has teacher, which distil sets itself"),
        ({"prepare": {"terms": "x"}}, "prepare has terms, but the teacher is asked plain texts"),
        ({"length_factor": 0.5}, "length_factor is 0.5; it must be 0, or 1 or more"),
        ({"metrics": ""}, "metrics names none"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        settings_with(**changes)
