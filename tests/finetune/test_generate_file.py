"""JSONL in, JSONL out: each row one line, and a run killed at any moment ends with the bytes of one that was not."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.commands import cli
from diptych.finetune.generating.generate_file import CHUNK_BATCHES
from diptych.finetune.generating.prompt_files import read_prompts


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def command(checkpoint, in_file, out_file, *more):
    files = ["--in_file", str(in_file), "--out_file", str(out_file)]
    return [str(checkpoint), *files, "--batch_size", "2", "--max_new_tokens", "24", "--device", "cpu", *more]


@pytest.fixture
def many_rows(tmp_path, eight_prepared_rows):
    """120 rows, more than seven chunks of 2 × CHUNK_BATCHES: the eight known ones, then many that are not."""
    rows = [
        {"id": number, "instruction": row["instruction"], "input": f"{number} " * (number > 8) + row["input"]}
        for number, row in enumerate(eight_prepared_rows * 15)
    ]
    return write_rows(tmp_path / "rows.jsonl", rows)


@pytest.mark.parametrize("more", [[], ["--num_beams", "2", "--num_return_sequences", "2", "--scores", "true"]])
def test_a_killed_run_ends_with_the_bytes_of_an_uninterrupted_one(tmp_path, t5_checkpoint, many_rows, nursery, more):
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    assert cli.run("generate", command(t5_checkpoint, many_rows, whole, *more)) == 0

    kill_after_lines(nursery, killed, 2 * CHUNK_BATCHES, command(t5_checkpoint, many_rows, killed, *more))
    first = killed.read_bytes()
    assert 0 < len(first) < len(whole.read_bytes())
    with killed.open("ab") as out:  # what a kill in the middle of a write leaves
        out.write(whole.read_bytes()[len(first) : len(first) + 700])
    assert cli.run("generate", command(t5_checkpoint, many_rows, killed, *more)) == 0
    assert killed.read_bytes() == whole.read_bytes()


def kill_after_lines(nursery, out_file, lines, arguments):
    """SIGKILL to a `diptych generate` once out_file has so many lines."""
    log = out_file.with_suffix(".log")
    process = nursery.run(["generate", *arguments], log)
    deadline = time.monotonic() + 60
    while not (out_file.exists() and out_file.read_bytes().count(b"\n") >= lines):
        assert process.is_alive() and time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL


@pytest.fixture
def on_two_ranks(nursery, tmp_path):
    """`on_two_ranks(arguments, code)`: what both said."""

    def run(arguments, code=0) -> str:
        log = tmp_path / "log"
        for earlier in tmp_path.glob("log.*"):
            earlier.unlink()
        processes = nursery.launch(["generate", *arguments], log, ranks=2)
        ended = [process.wait(200) for process in processes]
        said = "".join(file.read_text() for file in sorted(tmp_path.glob("log.*")))
        assert ended == [code, code], said
        return said

    return run


def test_two_ranks_write_the_bytes_of_one_and_go_on_where_it_was_cut(tmp_path, t5_checkpoint, many_rows, on_two_ranks):
    """Sampled, so that a chunk which another rank draws for would show; and once with one chunk for two ranks."""
    few = write_rows(tmp_path / "few.jsonl", read_lines(many_rows)[:3])
    for in_file in (many_rows, few):
        alone, shared = tmp_path / f"alone-{in_file.name}", tmp_path / f"shared-{in_file.name}"
        sampled = ["--temperature", "1.5", "--seed", "5"]
        assert cli.run("generate", command(t5_checkpoint, in_file, alone, *sampled)) == 0
        on_two_ranks(command(t5_checkpoint, in_file, shared, *sampled))
        assert shared.read_bytes() == alone.read_bytes()
    half = alone.with_name(f"alone-{many_rows.name}").read_bytes()
    shared = tmp_path / f"shared-{many_rows.name}"
    shared.write_bytes(half[: len(half) // 2])
    said = on_two_ranks(command(t5_checkpoint, many_rows, shared, *sampled))
    assert shared.read_bytes() == half and said.count("rows already; they are kept") == 1


def test_an_error_of_the_rank_that_writes_ends_all(finished_run, t5_checkpoint, on_two_ranks):
    before = finished_run[1].read_bytes()
    said = on_two_ranks(command(t5_checkpoint, *finished_run, "--seed", "9"), code=2)
    assert said.count("was started by a run that differs: seed was 0, is now 9") >= 1
    assert finished_run[1].read_bytes() == before


def test_rows_may_carry_a_system_prompt_and_earlier_turns(tmp_path, t5_checkpoint):
    frame = tmp_path / "frame.jinja"
    frame.write_text("{{ system }}{% for turn in history %} {{ turn[0] }} {{ turn[1] }}{% endfor %} {{ instruction }}")
    translate = "Translate English to Korean:"
    rows = [
        {"instruction": "Yes.", "system": translate},
        {"instruction": "am a student.", "history": [["English to", "Korean: I"]], "system": "Translate"},
        {"instruction": "Yes.", "system": 7},
        {"instruction": "Yes.", "systm": translate},
    ]
    in_file, out_file = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    assert cli.run("generate", command(t5_checkpoint, in_file, out_file, "--template", str(frame))) == 0
    lines = read_lines(out_file)
    assert [line.get("prediction") for line in lines] == ["네.", "나는 학생이다.", None, None]
    assert lines[0]["system"] == translate  # what a row has is kept
    assert lines[2]["error"] == "'system' must be a string, got a number (7)"
    assert "there is 'systm'" in lines[3]["error"]

    plain = tmp_path / "plain.jsonl"  # the checkpoint's own template has no place for it
    rows[2:] = [{"instruction": translate, "input": "Yes."}]
    assert cli.run("generate", command(t5_checkpoint, write_rows(in_file, rows), plain)) == 0
    lines = read_lines(plain)
    assert "'translate' has no place for a system prompt" in lines[0]["error"]
    assert "'translate' has no place for earlier turns" in lines[1]["error"]
    assert lines[2]["prediction"] == "네."


def test_a_files_outputs_end_at_the_templates_stop_and_a_run_with_another_is_refused(
    tmp_path, t5_checkpoint, eight_prepared_rows, capsys
):
    frame, out_file = tmp_path / "frame.jinja", tmp_path / "out.jsonl"
    row = {name: eight_prepared_rows[2][name] for name in ("instruction", "input")}
    in_file = write_rows(tmp_path / "rows.jsonl", [row])
    arguments = command(t5_checkpoint, in_file, out_file, "--template", str(frame))
    frame.write_text("{# stop: 이다 #}\n{{ instruction }} {{ input }}")
    assert cli.run("generate", arguments) == 0
    assert [(line["prediction"], line["finished"]) for line in read_lines(out_file)] == [("나는 학생", True)]
    frame.write_text("{{ instruction }} {{ input }}")
    assert cli.run("generate", arguments) == 2
    assert "stop was ['이다'], is now []" in capsys.readouterr().err


@pytest.mark.parametrize("kept_bytes", [1, 0.3, 0.99])
def test_sampling_goes_on_with_what_the_first_run_would_have_drawn(tmp_path, t5_checkpoint, many_rows, kept_bytes):
    sampled = command(t5_checkpoint, many_rows, tmp_path / "out.jsonl", "--temperature", "1.5", "--seed", "7")
    assert cli.run("generate", sampled) == 0
    whole = (tmp_path / "out.jsonl").read_bytes()
    cut = kept_bytes if isinstance(kept_bytes, int) else int(kept_bytes * len(whole))
    (tmp_path / "out.jsonl").write_bytes(whole[:cut])
    assert cli.run("generate", sampled) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    predictions = [line["prediction"] for line in read_lines(tmp_path / "out.jsonl")]
    assert len(set(predictions)) > len(predictions) / 2


def test_each_row_gets_one_line_in_its_place_and_a_bad_one_its_reason(
    tmp_path, t5_checkpoint, eight_prepared_rows, capsys
):
    good = [{"id": n, "instruction": r["instruction"], "input": r["input"]} for n, r in enumerate(eight_prepared_rows)]
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in good]
    bad = {
        b'{"instruction": "Go."': "broken JSON at column 22",
        b"{}": "'instruction' is missing; the row has no fields",
        b"[1, 2]": "a JSON object is needed, got list",
        b'{"instruction": "\xff"}': "invalid UTF-8 at byte 18 of the line",
        b'{"instruction": "\\ud800"}': "half of a surrogate pair",
        b'{"instrution": "Go."}': "there is 'instrution'. Rename it to 'instruction'",
        b'{"instruction": "Go.", "inptu": "x"}': "there is 'inptu'. Rename it to 'input'",
        b'{"text": "Go."}': "'instruction' is missing; the row has 'text'",
        b'{"instruction": "a", "instruction": "b"}': "'instruction' occurs twice in one object",
        b'{"instruction": "  "}': "must be a string that is not empty",
        b'{"instruction": "Go.", "input": 5}': "'input' must be a string, got a number (5)",
        b'{"instruction": "Go.", "history": "x"}': "'history' must be a list of",
        b'{"instruction": "Go.", "history": [["a", "b"]]}': "has no place for earlier turns",
        b'{"instruction": "Go.", "prediction": "x"}': "field 'prediction' is one that is written here",
    }
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join([*lines[:5], *bad, *lines[5:]]))
    assert cli.run("generate", command(t5_checkpoint, tmp_path / "in.jsonl", tmp_path / "out.jsonl")) == 0

    written = read_lines(tmp_path / "out.jsonl")
    assert [line["row"] for line in written] == list(range(1, 8 + len(bad) + 1))
    answered = written[:5] + written[5 + len(bad) :]
    assert [line["prediction"] for line in answered] == [row["target"] for row in eight_prepared_rows]
    assert answered[2] == {"row": 3, "prediction": "나는 학생이다.", "finished": True, "source_cut": False} | good[2]
    for line, reason in zip(written[5 : 5 + len(bad)], bad.values(), strict=True):
        assert reason in line["error"] and "prediction" not in line
    assert f"22 rows, {len(bad)} with an error in place of a prediction" in capsys.readouterr().err


KOREAN = "Translate English to Korean:"


@pytest.fixture
def chat_frame(tmp_path):
    """The template of the eight rows, with a place for what went before."""
    path = tmp_path / "chat.jinja"
    path.write_text("{{ system }}{% for told, said in history %} {{ told }} {{ said }}{% endfor %} {{ instruction }}")
    return str(path)


def turns(*said, keys=("role", "content")):
    return [dict(zip(keys, turn, strict=True)) for turn in said]


def test_a_conversation_is_asked_what_training_learned_from_it(tmp_path, t5_checkpoint, chat_frame):
    asked = [("system", KOREAN), ("user", "I"), ("assistant", "am"), ("user", "a student.")]
    shared = [("human", "Add. 1"), ("gpt", "+"), ("human", "1")]
    rows = [
        {"id": 7, "messages": turns(*asked)},
        {"messages": turns(*asked, ("assistant", "what training learned"))},
        {"messages": turns(*asked[1:]), "system": KOREAN},
        {"conversations": turns(*shared, keys=("from", "value")), "system": ""},
    ]
    in_file, out_file = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    prompts = [row.prompt[:4] for row in read_prompts(str(in_file))]
    assert prompts == 3 * [("a student.", "", (("I", "am"),), KOREAN)] + [("1", "", (("Add. 1", "+"),), "")]
    assert cli.run("generate", command(t5_checkpoint, in_file, out_file, "--template", chat_frame)) == 0
    lines = read_lines(out_file)
    assert [line["prediction"] for line in lines[:3]] == ["나는 학생이다."] * 3
    assert [line["row"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["messages"] == rows[0]["messages"] and lines[0]["id"] == 7


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, "'messages' has no user turn, so nothing is asked"),
        ({"messages": "Hi."}, "'messages' is a string ('Hi.'), and a list of turns is due"),
        ({"messages": turns(("assistant", "Hi."))}, "an assistant turn with no user turn before it"),
        ({"messages": turns(("bot", "Hi."))}, "known are system, developer, user, assistant"),
        ({"messages": turns(("user", "a")), "instruction": "b"}, "the row has both 'messages' and 'instruction'"),
        (
            {"messages": [*turns(("user", "a")), {"role": "assistant", "content": "b", "weight": 0}]},
            "'messages[1].content' is marked as history",
        ),
    ],
)
def test_a_conversation_that_asks_nothing_gets_its_reason(row, reason, tmp_path):
    first, second = read_prompts(str(write_rows(tmp_path / "rows.jsonl", [row, {"instruction": "Add."}])))
    assert reason in first.error and first.prompt is None and first.fields == row
    assert second.prompt.instruction == "Add."


def test_each_line_of_a_text_is_answered_in_its_place_and_a_blank_one_by_nothing(tmp_path, t5_checkpoint, capsys):
    in_file, out_file = tmp_path / "in.txt", tmp_path / "out.jsonl"
    in_file.write_bytes(b"Go.\r\n\r\n  \nYes.\nI am a student.\n\n")
    assert cli.run("generate", command(t5_checkpoint, in_file, out_file, "--instruction", KOREAN)) == 0
    lines = read_lines(out_file)
    assert [line["prediction"] for line in lines] == ["가.", "", "", "네.", "나는 학생이다.", ""]
    assert lines[0] == {"row": 1, "prediction": "가.", "finished": True, "source_cut": False, "input": "Go."}
    assert lines[1] == {"row": 2, "prediction": "", "finished": True, "source_cut": False}
    assert "6 rows, 3 blank, whose prediction is empty" in capsys.readouterr().err

    in_file.write_text(f"{KOREAN} Yes.\n\n")
    several = ["--num_beams", "2", "--num_return_sequences", "2", "--overwrite", "true"]
    assert cli.run("generate", command(t5_checkpoint, in_file, out_file, *several)) == 0
    first, blank = read_lines(out_file)
    assert first["prediction"][0] == "네." and first["instruction"] == f"{KOREAN} Yes."
    assert (blank["prediction"], blank["finished"]) == (["", ""], [True, True])


@pytest.mark.parametrize(("name", "mark"), [("in.csv", ","), ("in.tsv", "\t")])
def test_a_table_is_read_by_the_names_of_its_columns(tmp_path, t5_checkpoint, name, mark):
    rows = [["instruction", "input", "id"], [KOREAN, "Go.", "7"], ["", "", "8"], [KOREAN, "Yes.", "9"]]
    (tmp_path / name).write_text("\n".join(map(mark.join, rows)) + "\n")
    assert cli.run("generate", command(t5_checkpoint, tmp_path / name, tmp_path / "out.jsonl")) == 0
    first, bad, last = read_lines(tmp_path / "out.jsonl")
    assert (first["prediction"], first["id"], last["prediction"]) == ("가.", "7", "네.")
    assert "'instruction' must be a string that is not empty" in bad["error"]


def test_blank_lines_between_json_rows_keep_the_numbers_of_the_lines(tmp_path, t5_checkpoint, eight_prepared_rows):
    row = json.dumps({name: eight_prepared_rows[2][name] for name in ("instruction", "input")}) + "\n"
    empty = '{"input": " ", "id": 3}'  # is blank, too
    (tmp_path / "in.jsonl").write_text(f"\n{row}{empty}" + "\n" * 40 + row)
    assert cli.run("generate", command(t5_checkpoint, tmp_path / "in.jsonl", tmp_path / "out.jsonl")) == 0
    lines = read_lines(tmp_path / "out.jsonl")
    assert [line["row"] for line in lines if line["prediction"]] == [2, 43]
    assert [line["row"] for line in lines] == list(range(1, 44)) and not any("error" in line for line in lines)
    assert lines[2] == {"row": 3, "prediction": "", "finished": True, "source_cut": False, "input": " ", "id": 3}
    (tmp_path / "in.jsonl").write_text(empty)
    with pytest.raises(UserError, match="in.jsonl is empty"):
        read_prompts(str(tmp_path / "in.jsonl"))


def test_a_cut_prompt_is_marked(tmp_path, t5_checkpoint):
    rows = [{"instruction": "Add."}, {"instruction": "Add. " * 50}]
    write_rows(tmp_path / "in.jsonl", rows)
    arguments = command(t5_checkpoint, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--max_source_tokens", "20")
    assert cli.run("generate", arguments) == 0
    assert [line["source_cut"] for line in read_lines(tmp_path / "out.jsonl")] == [False, True]


@pytest.fixture
def finished_run(tmp_path, t5_checkpoint, eight_prepared_rows):
    rows = [{"instruction": row["instruction"], "input": row["input"]} for row in eight_prepared_rows]
    in_file, out_file = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert cli.run("generate", command(t5_checkpoint, in_file, out_file)) == 0
    return in_file, out_file


def test_a_finished_file_is_left_as_it_is(finished_run, t5_checkpoint, capsys):
    before = finished_run[1].read_bytes()
    assert cli.run("generate", command(t5_checkpoint, *finished_run)) == 0
    assert finished_run[1].read_bytes() == before
    assert "has 8 of 8 rows already" in capsys.readouterr().err


def test_other_settings_rows_or_weights_are_refused_unless_told_to_overwrite(
    finished_run, t5_checkpoint, learned_t5, tiny_tokenizer, tmp_path, capsys
):
    in_file, out_file = finished_run
    before = out_file.read_bytes()

    def refused(checkpoint, *more):
        assert cli.run("generate", command(checkpoint, in_file, out_file, *more)) == 2
        assert out_file.read_bytes() == before
        message = capsys.readouterr().err
        assert "--overwrite true" in message
        return message

    assert "num_beams was 1, is now 2" in refused(t5_checkpoint, "--num_beams", "2")
    assert "prompts_sha256 was" in refused(t5_checkpoint, "--template", "alpaca")
    other = tmp_path / "other"
    weights = {name: weight.clone() for name, weight in learned_t5.state_dict().items()}
    weights["shared.weight"][5, 5] += 0.01
    learned_t5.save_pretrained(other, state_dict=weights)
    tiny_tokenizer.save_pretrained(other)
    assert "weights_sha256 was" in refused(other)
    in_file.write_text('{"instruction": "Add."}\n', encoding="utf-8")
    assert "prompts_sha256 was" in refused(t5_checkpoint)

    assert cli.run("generate", command(t5_checkpoint, in_file, out_file, "--overwrite", "true")) == 0
    assert len(read_lines(out_file)) == 1


def test_a_file_of_unknown_origin_or_one_that_was_changed_is_never_touched(finished_run, t5_checkpoint, capsys):
    in_file, out_file = finished_run
    changed = out_file.read_bytes().replace(b'"row": 3', b'"row": 9')
    out_file.write_bytes(changed)
    assert cli.run("generate", command(t5_checkpoint, in_file, out_file)) == 2
    assert "line 3 is not the output of row 3" in capsys.readouterr().err
    assert out_file.read_bytes() == changed

    out_file.with_name("out.jsonl.run.json").unlink()
    assert cli.run("generate", command(t5_checkpoint, in_file, out_file)) == 2
    assert "it is not known what wrote it" in capsys.readouterr().err
    assert out_file.read_bytes() == changed


def test_files_without_a_prompt_are_refused_before_a_model_is_loaded(tmp_path, capsys):
    arguments = command(str(tmp_path), tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert cli.run("generate", arguments) == 2
    assert "in.jsonl" in capsys.readouterr().err
    (tmp_path / "in.jsonl").write_text("")
    assert cli.run("generate", arguments) == 2
    assert "in.jsonl is empty" in capsys.readouterr().err
    (tmp_path / "in.jsonl").write_text('[{"instruction": "a json array"}]')
    assert cli.run("generate", arguments) == 2
    assert "no row that is a prompt; row 1: a JSON object is needed, got list" in capsys.readouterr().err
    (tmp_path / "in.jsonl").write_text("\nTranslate this.\n")
    assert cli.run("generate", arguments) == 2
    assert (
        "row 2: broken JSON at column 1: Expecting value. What is read: a JSON object on each line (.jsonl), a table"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out.jsonl").exists()
    for content, said in (("가".encode("utf-16"), "is UTF-16, and"), (b"\n" + b" " * 10**7, "line 2 has 10,000,000")):
        (tmp_path / "in.jsonl").write_bytes(content)
        assert cli.run("generate", arguments) == 2
        assert said in capsys.readouterr().err
    arguments[arguments.index(str(tmp_path / "in.jsonl"))] = str(tmp_path)
    assert cli.run("generate", arguments) == 2
    assert "is a folder, and a file is needed" in capsys.readouterr().err


def test_a_pipe_gets_the_lines_of_a_file_and_stays_one(finished_run, t5_checkpoint, tmp_path):
    in_file, out_file = finished_run
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as reader:
        read = reader.submit((tmp_path / "pipe").read_bytes)
        assert cli.run("generate", command(t5_checkpoint, in_file, tmp_path / "pipe", "--overwrite", "true")) == 0
        assert read.result() == out_file.read_bytes()
    assert (tmp_path / "pipe").is_fifo()


def test_output_over_the_input_is_refused(finished_run, t5_checkpoint, capsys):
    assert cli.run("generate", command(t5_checkpoint, finished_run[0], finished_run[0])) == 2
    assert "one to write are the same" in capsys.readouterr().err
    assert len(read_prompts(str(finished_run[0]))) == 8
