"""Which sample MBR takes, and that nothing but the seed decides which samples there are."""

import json

import pytest
import sacrebleu
import torch

from diptych.finetune import generate
from diptych.finetune.generate import generate_outputs
from diptych.finetune.reranking import EPSILON_SAMPLING, mbr_outputs, most_expected


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


def test_each_source_gets_the_choice_among_its_own_samples(learned_t5, tiny_tokenizer, eight_prepared_rows):
    sources = [row["input_ids"] for row in eight_prepared_rows]
    sources += [[9, 40, 12, 1], [30, 31, 1]]  # that nobody learned, so that samples differ
    settings = {"batch_size": 4, "max_new_tokens": 12}
    before = torch.get_rng_state()
    chosen = mbr_outputs(learned_t5, tiny_tokenizer, sources, samples=5, seed=3, **settings)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    drawn = generate_outputs(
        learned_t5, tiny_tokenizer, sources, num_return_sequences=5, **EPSILON_SAMPLING, **settings
    )
    groups = [drawn[first : first + 5] for first in range(0, len(drawn), 5)]
    assert max(len({output.text for output in group}) for group in groups) > 1, "the samples are all the same"
    assert chosen == [group[most_expected([output.text for output in group])] for group in groups]
    assert [output.text for output in chosen[:8]] == [row["target"] for row in eight_prepared_rows]
    others = [mbr_outputs(learned_t5, tiny_tokenizer, sources, samples=5, seed=seed, **settings) for seed in (4, 5, 6)]
    assert any(other != chosen for other in others)


def test_a_file_is_generated_by_it_with_the_same_bytes_also_where_it_goes_on(t5_checkpoint, tmp_path, capsys):
    rows = [{"instruction": "Translate English to Korean:", "input": text} for text in ("Go.", "cat", "Yes.", "dog")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(out, *more):
        files = ["--in_file", str(tmp_path / "prompts.jsonl"), "--out_file", str(out)]
        settings = ["--mbr_samples", "4", "--batch_size", "1", "--max_new_tokens", "12", "--device", "cpu"]
        return generate.main([str(t5_checkpoint), *files, *settings, *more])

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
    with pytest.raises(SystemExit, match="2"):
        generate.main([str(t5_checkpoint), "--instruction", "Add.", "--mbr_samples", *more])
    assert "drop num_beams, num_return_sequences and temperature" in capsys.readouterr().err
