"""Which sample MBR takes, and that nothing but the seed decides which samples there are."""

import json

import pytest
import sacrebleu
import torch

from diptych.data_prep.text_to_ids.templates import Template
from diptych.finetune.commands import cli
from diptych.finetune.inference.generation import generate_outputs
from diptych.finetune.inference.scoring import (
    EPSILON_SAMPLING,
    choice_outputs,
    chosen_outputs,
    mbr_outputs,
    most_expected,
)
from diptych.finetune.model.families import decoder_start_token
from diptych.finetune.model.loaded_model import LoadedModel


def test_the_text_that_is_most_like_all_others_is_taken():
    texts = ["a dog barks", "the cat sat on the mat", "the cat sat on a mat", "a cat sat on the mat", "xyz"]
    chrf = sacrebleu.CHRF()
    utilities = [sum(chrf.sentence_score(text, [other]).score for other in texts) for text in texts]
    assert most_expected(texts) == utilities.index(max(utilities)) not in (0, 4)


def test_what_was_drawn_often_counts_often_and_the_first_of_equals_is_taken():
    assert most_expected(["cat", "dog", "dog"]) == 1
    assert most_expected(["cat", "dog"]) == 0
    assert most_expected(["same"] * 5) == 0
    assert most_expected(["", ""]) == 0


def test_each_source_gets_the_choice_among_its_own_samples(loaded_t5, eight_prepared_rows):
    sources = [row["input_ids"] for row in eight_prepared_rows]
    sources += [[9, 40, 12, 1], [30, 31, 1]]  # that nobody learned, so that samples differ
    settings = {"batch_size": 4, "max_new_tokens": 12}
    before = torch.get_rng_state()
    chosen = mbr_outputs(loaded_t5, sources, samples=5, seed=3, **settings)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    drawn = generate_outputs(loaded_t5, sources, num_return_sequences=5, **EPSILON_SAMPLING, **settings)
    groups = [drawn[first : first + 5] for first in range(0, len(drawn), 5)]
    assert max(len({output.text for output in group}) for group in groups) > 1, "the samples are all the same"
    assert chosen == [group[most_expected([output.text for output in group])] for group in groups]
    assert [output.text for output in chosen[:8]] == [row["target"] for row in eight_prepared_rows]
    others = [mbr_outputs(loaded_t5, sources, samples=5, seed=seed, **settings) for seed in (4, 5, 6)]
    assert any(other != chosen for other in others)


def test_a_file_is_generated_by_it_with_the_same_bytes_also_where_it_goes_on(t5_checkpoint, tmp_path, capsys):
    rows = [{"instruction": "Translate English to Korean:", "input": text} for text in ("Go.", "cat", "Yes.", "dog")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(out, *more):
        files = ["--in_file", str(tmp_path / "prompts.jsonl"), "--out_file", str(out)]
        settings = ["--mbr_samples", "4", "--batch_size", "1", "--max_new_tokens", "12", "--device", "cpu"]
        return cli.run("generate", [str(t5_checkpoint), *files, *settings, *more])

    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    assert run(whole) == 0 == run(killed)
    assert [json.loads(line)["prediction"] for line in whole.read_text().splitlines()][::2] == ["가.", "네."]
    killed.write_bytes(killed.read_bytes()[:100])
    assert run(killed) == 0
    assert killed.read_bytes() == whole.read_bytes()
    assert run(whole, "--mbr_samples", "5") == 2
    assert "mbr_samples was 4, is now 5" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["1"], ["4", "--num_beams", "2"], ["4", "--temperature", "0.5"]])
def test_settings_that_do_not_go_with_it_are_refused(t5_checkpoint, more, capsys):
    assert cli.run("generate", [str(t5_checkpoint), "--instruction", "Add.", "--mbr_samples", *more]) == 2
    assert "drop num_beams, num_return_sequences and temperature" in capsys.readouterr().err


def teacher_forced(model, source: list[int], forced: list[int], written: tuple[int, ...]) -> float:
    """One row, no batch, the model's own logits."""
    decoder = torch.tensor([[decoder_start_token(model), *forced, *written]])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([source]), decoder_input_ids=decoder[:, :-1]).logits[0].double()
    logs = logits.log_softmax(-1)
    places = range(len(forced), len(forced) + len(written))
    return sum(float(logs[place, token]) for place, token in zip(places, written, strict=True))


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 3, "num_return_sequences": 3}, {"do_sample": True, "temperature": 3.0}, {"max_new_tokens": 2}],
)
def test_scores_are_the_models_log_probabilities(loaded, learned, eight_prepared_rows, settings):
    sources = [row["input_ids"] for row in eight_prepared_rows]
    torch.manual_seed(0)
    settings = {"batch_size": 3, "max_new_tokens": 24} | settings
    outputs = chosen_outputs(loaded, sources, seed=0, scores=True, **settings)
    each = len(outputs) // len(sources)
    assert any(len(output.ids) > 2 for output in outputs) or settings["max_new_tokens"] == 2
    for place, output in enumerate(outputs):
        expected = teacher_forced(learned, sources[place // each], [], output.ids)
        assert output.log_probability == pytest.approx(expected, abs=1e-4)


def test_what_is_forced_counts_for_nothing(two_languages):
    model, tokenizer, rows = two_languages
    template = Template("ko", "{{ instruction }}", decoder_prefix=("<ko>",))
    sources = [row["input_ids"] for row in rows[:3]]
    settings = {"seed": 0, "batch_size": 2, "max_new_tokens": 24, "scores": True}
    loaded = LoadedModel.of(model, tokenizer, template)
    ko = tokenizer.convert_tokens_to_ids("<ko>")
    for source, output in zip(sources, chosen_outputs(loaded, sources, **settings), strict=True):
        assert output.log_probability == pytest.approx(teacher_forced(model, source, [ko], output.ids), abs=1e-4)
        assert output.log_probability > -0.5  # with <ko> it would be a nat less
    (chosen, *_) = choice_outputs(loaded, sources, ["Go!", "가.", "네."], batch_size=2)
    assert chosen.text == "가." and chosen.log_probability > -0.5


def test_the_likeliest_choice_is_taken_and_all_are_weighed(loaded_t5, learned_t5, eight_prepared_rows):
    targets = [row["target"] for row in eight_prepared_rows]
    for row in eight_prepared_rows:
        found = choice_outputs(
            loaded_t5,
            [row["input_ids"]],
            targets,
            batch_size=3,
            num_return_sequences=len(targets),
        )
        assert found[0].text == row["target"]
        scores = [teacher_forced(learned_t5, row["input_ids"], [], output.ids) for output in found]
        assert [output.log_probability for output in found] == pytest.approx(scores, abs=1e-4)
        assert scores == sorted(scores, reverse=True) and {output.text for output in found} == set(targets)


def test_scores_and_choices_on_the_command_line(t5_checkpoint, tmp_path, capsys):
    asked = ["--instruction", "Translate English to Korean:", "--input", "Yes."]
    assert cli.run("generate", [str(t5_checkpoint), *asked, "--scores"]) == 0
    text, said = capsys.readouterr().out.strip().split("\t")
    assert text == "네." and said.endswith("a token") and said.startswith("-0.0")
    assert cli.run("generate", [str(t5_checkpoint), *asked, "--choices", "가.", "네.", "2"]) == 0
    assert capsys.readouterr().out.strip() == "네."
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "Add.", "input": "1 + 1"}\n\n{"instruction": "Add.", "input": "1 + 1"}\n')
    command = [str(t5_checkpoint), "--in_file", str(rows), "--out_file", str(tmp_path / "out.jsonl"), "--scores"]
    assert cli.run("generate", [*command, "--choices", "가.", "2", "--num_return_sequences", "2"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["prediction"] for line in lines] == [["2", "가."], ["", ""], ["2", "가."]]
    first, second = lines[0]["log_probability"]
    assert first > second and lines[0]["log_probability_per_token"][0] == pytest.approx(
        first / 2, abs=1e-5
    )  # 2 and its end
    assert lines[1]["log_probability"] == [None, None]
