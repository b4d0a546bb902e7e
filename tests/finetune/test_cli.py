"""The command as a person uses it: quick help, nearest names, exit codes, and a session through a real pipe."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version

import pytest

import diptych
from diptych.finetune.commands import cli

DIPTYCH = [sys.executable, "-m", "diptych.finetune.commands.cli"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}


def test_help_names_every_command_and_imports_nothing_heavy():
    code = (
        "import sys; from diptych.finetune.commands import cli; cli.main(['--help']); cli.main(['--version'])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'evaluate', 'jsonargparse'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for command in cli.COMMANDS:
        assert f"\n  {command} " in shown
    assert "accelerate launch -m diptych.finetune.train" in shown
    ours, *others = [line.split() for line in shown.splitlines()[-6:]]
    assert ours == ["diptych", diptych.__version__] and others[1:] == [[it, version(it)] for it in cli.REPORTED]


HEAVY = {"torch", "transformers", "datasets", "accelerate", "peft", "evaluate", "matplotlib"}
ANSWERED_AT_ONCE = [
    *([*command, "--help"] for command in [[name] for name in cli.COMMANDS] + [["tokenizer", "report"]]),
    *([*command, "--no_such_option", "1"] for command in [[name] for name in cli.COMMANDS if name != "tokenizer"]),
    *([name, "no/such/place", "--out", "o"] for name in ("pair", "merge", "export")),
    *([name, "no/such/place"] for name in ("generate", "demo", "serve", "doctor")),
    ["compare", "no/such/place", "b"],
    ["inspect", "no/such/place", "--instruction", "Add."],
    ["evaluate", "no/such/place", "--data", "d"],
    ["publish", "no/such/place", "--to", "me/mine"],
    ["prepare", "--data", "no/such/place", "--tokenizer", "t"],
    ["prepare", "--data", "tatoeba", "--tokenizer", "no/such/place"],
    ["denoise", "--data", "no/such/place", "--tokenizer", "t", "--out", "o"],
    ["tokenizer", "report", "no/such/place"],
    *([name, ""] for name in ("doctor", "demo", "serve")),
    ["prepare", "--data", "", "--tokenizer", "t"],
    ["train", "--model", "diptych-8m", "--data", "no/such/place", "--out", "o", "--epochs", "1"],
    ["train", "--model", "no/such/place", "--data", "d", "--out", "o", "--epochs", "1"],
]


def test_help_and_mistakes_are_answered_before_anything_heavy_is_imported(tmp_path):
    """All in one process, whose modules add up."""
    code = (
        "import json, sys; from diptych.finetune.commands import cli\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    try: code = cli.main(words)\n"
        "    except SystemExit as ended: code = ended.code\n"
        "    heavy = set(json.loads(sys.argv[2])) & set(sys.modules)\n"
        "    assert code == (0 if '--help' in words else 2) and not heavy, (words, code, heavy)\n"
    )
    arguments = [sys.executable, "-c", code, json.dumps(ANSWERED_AT_ONCE), json.dumps(sorted(HEAVY))]
    ended = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr and ended.stderr.count("no/such/place") >= 17
    assert ended.stderr.count(" is empty. Give it a name") == 4


def test_an_unknown_command_names_the_nearest_and_none_shows_the_help(capsys):
    assert cli.main(["trian"]) == 2
    said = capsys.readouterr().err
    assert "there is no command 'trian'. Did you mean train?" in said
    assert cli.main([]) == 2
    assert "usage: diptych COMMAND" in capsys.readouterr().err


def test_every_command_has_settings_and_work():
    for command in cli.COMMANDS.values():
        assert callable(cli.imported(command.settings)) and callable(cli.imported(command.work)) and command.summary


def test_exit_codes_and_arguments_are_passed_through(t5_checkpoint, tmp_path, capsys):
    assert cli.main(["generate", str(tmp_path / "nothing"), "--instruction", "x"]) == 2
    assert "diptych generate: there is no folder" in capsys.readouterr().err
    arguments = ["--instruction", "Translate English to Korean:", "--input", "Go.", "--device", "cpu"]
    assert cli.main(["generate", str(t5_checkpoint), *arguments]) == 0
    assert capsys.readouterr().out == "가.\n"


def test_two_beams_print_their_outputs_one_on_each_line(t5_checkpoint, capsys):
    arguments = ["--instruction", "Add.", "--input", "1 + 1", "--num_beams", "2", "--num_return_sequences", "2"]
    assert cli.main(["generate", str(t5_checkpoint), *arguments, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "2"


@pytest.mark.slow
def test_a_session_through_a_pipe_prints_answers_alone_and_ends_with_the_input(t5_checkpoint):
    lines = "Translate English to Korean:\nHello!\n\nYes.\nAdd.\n1 + 1\n"
    ended = subprocess.run(
        [*DIPTYCH, "generate", str(t5_checkpoint), "--device", "cpu"],
        input=lines, capture_output=True, text=True, encoding="utf-8", env=ENVIRONMENT, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["안녕!", "네.", "2"]
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_an_interrupt_at_the_prompt_leaves_the_session_without_a_traceback(t5_checkpoint):
    session = subprocess.Popen(
        [*DIPTYCH, "generate", str(t5_checkpoint), "--device", "cpu"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
        env=ENVIRONMENT,
    )  # fmt: skip
    session.stdin.write("Translate English to Korean:\nGo.\n")
    session.stdin.flush()
    assert session.stdout.readline() == "가.\n"  # it waits for the next line now
    session.send_signal(signal.SIGINT)
    _, errors = session.communicate(timeout=120)
    assert session.returncode == 0
    assert "Traceback" not in errors


@pytest.mark.slow
def test_an_interrupted_command_ends_with_130(t5_checkpoint, tmp_path):
    rows = [{"instruction": f"Add {number}."} for number in range(3000)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out_file = tmp_path / "out.jsonl"
    running = subprocess.Popen(
        [*DIPTYCH, "generate", str(t5_checkpoint), "--in_file", str(tmp_path / "in.jsonl"), "--device", "cpu",
         "--out_file", str(out_file), "--batch_size", "1"],
        stderr=subprocess.PIPE, text=True, encoding="utf-8", env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (out_file.exists() and out_file.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    kept = out_file.read_bytes().count(b"\n")
    said = f"diptych generate: interrupted: {out_file} has {kept} rows; the same command goes on after them\n"
    assert errors.endswith(said) and "Traceback" not in errors


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "dataset_dict.json").write_text("{}")
    out = tmp_path / "file" / "report.json"
    assert cli.main(["evaluate", str(tmp_path), "--data", str(tmp_path / "prepared"), "--out", str(out)]) == 2
    assert "this is a file. Choose another place." in capsys.readouterr().err


PLACES = {
    "/": "is there already",
    "~nobody-of-this-name/x": "there is no such user",
    "a_link": "Choose another place.",
}


@pytest.mark.parametrize("out", PLACES)
def test_a_place_that_is_none_is_one_message(out, t5_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_link").symlink_to("a_link")
    assert cli.main(["merge", str(t5_checkpoint), "--out", out]) == 2
    said = capsys.readouterr().err
    assert PLACES[out] in said and said.count("\n") == 1
