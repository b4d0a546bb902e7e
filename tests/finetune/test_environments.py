"""What commands print and do in odd places: names and texts that act on a terminal, streams that are closed, full or
not UTF-8, a folder that is gone. All with real files and processes."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import unicodedata

import pytest

from diptych.data_prep.command_line.errors import CONTROLS, LONGEST_LINE, UserError, escaped, excerpt
from diptych.finetune.commands import cli

DIPTYCH = [sys.executable, "-m", "diptych.finetune.commands.cli"]
EVIL = "x\x1b[2J\x9b5m\u202e\r\nFORGED: done\u2028\x07"
"""Clears a terminal, turns the line around, and begins a line that looks like one of ours."""
LETTERS = "שלום العربية می‌خواهم 한국어 👨‍👩‍👧 🏴󠁧󠁢󠁥󠁮󠁧󠁿 é ẞ Ā 中文 🏳️‍🌈"


def test_controls_are_escaped_and_letters_of_all_scripts_stay():
    assert escaped(LETTERS) == LETTERS
    bidi = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    every = "".join(map(chr, range(0x110000)))
    acts = {it for it in every if unicodedata.category(it) in ("Cc", "Zl", "Zp", "Cs")} | set("\u061c\u200e\u200f")
    acts |= {it for it in every if unicodedata.bidirectional(it) in bidi}
    assert set(re.findall(CONTROLS, every)) == acts
    assert escaped("a\x1b\u2066\n\udcff") == r"a\x1b\u2066\n\udcff"


def test_a_message_has_the_lines_that_the_code_gave_it_and_keeps_what_to_do():
    error = UserError(f"{EVIL} is no model.", "Name one.")
    assert str(error).splitlines() == [f"{escaped(EVIL)} is no model.", "Name one."]
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    long = str(UserError(f"{'a' * 10**6} is no model. Name one."))
    assert long.startswith("aaa") and long.endswith("Name one.") and len(long) < LONGEST_LINE + 10
    assert excerpt("b" * 10**6) == "b" * 200 + " …"


def said_by(arguments, log, nursery, folder, code):
    ended = nursery.run(arguments, log, folder=folder).wait(120)
    said = log.read_bytes().decode("utf-8")
    log.unlink()
    assert ended == code, said
    without_bars = re.sub(r"\r|\x1b\[A", "\n", said)
    assert not re.search(CONTROLS, without_bars.replace("\n", "").replace("\t", "")), said
    assert "Traceback" not in said and not re.search("^FORGED", without_bars, re.MULTILINE), said
    assert max(map(len, without_bars.split("\n"))) < LONGEST_LINE + 100, said
    return said


def test_no_name_or_text_of_a_file_acts_on_a_terminal(nursery, t5_checkpoint, prepared_folder, tmp_path):
    rows = [{"instruction": f"Do {n}.", "input": "", "output": f"It is {n}."} for n in range(4)]
    sources = {
        "field.jsonl": (0, [row | {EVIL: "v", "n" * 10**5: "v"} for row in rows]),
        "role.jsonl": (2, [{"messages": [{"role": EVIL, "content": EVIL}]}] * 4),
        "names.jsonl": (2, [{EVIL: "v"}] * 4),
        "value.jsonl": (2, [{"instruction": "Go.", "output": {EVIL: EVIL * 10**4}}] * 4),
        f"{EVIL}.jsonl": (0, [*rows, {"instruction": "Go.", "output": 1}]),
        "member.json": (2, {EVIL: [{"a": 1}], f"{EVIL}2": [{"a": 1}]}),
    }
    commands = [
        (2, ["prepare", "--data", EVIL, "--tokenizer", str(t5_checkpoint)]),
        (2, ["generate", EVIL]),
        (2, [EVIL]),
    ]
    for number, (name, (code, content)) in enumerate(sources.items()):
        lines = content if isinstance(content, list) else [content]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        words = ["prepare", "--data", name, "--tokenizer", str(t5_checkpoint), "--out", f"out{number}"]
        commands.append((code, words))
    (tmp_path / "c.yaml").write_text(json.dumps({EVIL: 1}))
    commands.append((2, ["train", "--config", "c.yaml"]))
    commands.append((0, ["tokenizer", "report", str(t5_checkpoint), "--data", f"{EVIL}.jsonl"]))
    for number, change in enumerate([{"hidden_size": EVIL}, {"model_type": EVIL}, {"auto_map": {"AutoConfig": EVIL}}]):
        folder = shutil.copytree(t5_checkpoint, tmp_path / f"{number}{EVIL}")
        config = json.loads((folder / "config.json").read_text()) | change
        (folder / "config.json").write_text(json.dumps(config))
        commands.append((0 if "auto_map" in change else 2, ["generate", folder.name, "--instruction", "Go."]))
    commands.append((2, ["evaluate", str(t5_checkpoint), "--data", str(prepared_folder), "--split", EVIL]))
    said = [said_by(words, tmp_path / "log", nursery, tmp_path, code) for code, words in commands]
    assert sum(escaped("\x1b[2J") in it for it in said) >= len(said) - 2


def test_an_answer_stays_as_it_is_for_a_program_and_is_escaped_on_a_terminal(nursery, t5_checkpoint, tmp_path):
    """In this tokenizer the token "2" is the byte of Escape."""
    folder = shutil.copytree(t5_checkpoint, tmp_path / "t5")
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary, escape = content["model"]["vocab"], chr(0x100 + 0x1B)
    vocabulary["2"], vocabulary[escape] = vocabulary[escape], vocabulary["2"]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    words = ["generate", str(folder), "--instruction", "Add.", "--input", "1 + 1", "--device", "cpu"]
    assert nursery.run(words, tmp_path / "log").wait(120) == 0
    assert (tmp_path / "log").read_bytes() == b"\x1b\n"
    terminal, side = os.openpty()
    assert nursery.run(words, os.ttyname(side)).wait(120) == 0
    assert os.read(terminal, 1000).endswith(b"\n\\x1b\r\n")  # behind what is left of a bar


def ended(script, tmp_path, **environment):
    """A shell's script, in which `$0` is Python and `diptych` the command."""
    script = f'diptych() {{ {" ".join(DIPTYCH)} "$@"; }}; {script}'
    variables = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ} | environment
    return subprocess.run(
        ["sh", "-c", script, sys.executable], cwd=tmp_path, env=variables, capture_output=True, timeout=120
    )


@pytest.mark.parametrize("variables", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}])
def test_a_stream_that_is_not_utf_8_gets_escapes(variables, tmp_path):
    """--help has an ellipsis."""
    shown = ended("diptych train --help", tmp_path, PYTHONUTF8="0", **variables)
    assert shown.returncode == 0 and b"\\u2026" in shown.stdout and not shown.stderr
    shown = ended("diptych compare 없음 b", tmp_path, PYTHONUTF8="0", **variables)
    assert shown.returncode == 2 and shown.stderr.startswith(b"diptych compare: ") and shown.stderr.count(b"\n") == 1


def test_the_name_of_a_file_that_is_not_utf_8_is_one_message(nursery, tmp_path):
    (tmp_path / "rows").mkdir()
    shutil.copy(__file__, os.fsencode(tmp_path) + b"/rows/\xff.jsonl")
    for data in ("rows", "rows/\udcff.jsonl"):
        words = ["prepare", "--data", data, "--train_tokenizer", "bpe"]
        said = said_by(words, tmp_path / "log", nursery, tmp_path, 2)
        assert (
            said.startswith("diptych prepare: rows/\\udcff.jsonl is not UTF-8. Rename the file")
            and said.count("\n") == 1
        )


def test_a_working_folder_that_is_gone_is_one_message(tmp_path):
    gone = "mkdir gone; cd gone; rmdir ../gone; diptych"
    for command in ("compare a b", "prepare --data tatoeba --train_tokenizer bpe"):
        shown = ended(f"{gone} {command}", tmp_path)
        assert shown.returncode == 2 and shown.stderr.count(b"\n") == 1
        assert b"the folder that this process works in was removed" in shown.stderr
    assert ended(f"{gone} train --help", tmp_path).returncode == 0


def test_a_full_disk_behind_stdout_is_one_message(tmp_path):
    shown = ended("diptych train --help >/dev/full", tmp_path)
    assert shown.returncode == 4 and shown.stderr.count(b"\n") == 1
    assert shown.stderr.startswith(b"diptych train: stdout: No space left on device")


def test_a_name_with_a_line_break_is_given_to_no_new_file(tmp_path, capsys):
    words = ["prepare", "--data", "tatoeba", "--train_tokenizer", "bpe", "--out", str(tmp_path / "a\nb")]
    assert cli.main(words) == 2 and "a\\nb has a line break" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_bars_stay_and_colours_of_libraries_go(tmp_path):
    code = (
        "import sys; from diptych.data_prep.command_line.run_command import guard_streams; guard_streams();"
        r" [sys.stderr.write(it) for it in ('\x1b[1mREPORT\x1b[0m of \x1b[2J\n', '\r 50%', '\x1b[A', 'a\r\x1b[A')];"
        r" print('\x1b[1mname\x1b[0m')"
    )
    (tmp_path / "code.py").write_text(code)
    shown = ended('"$0" code.py', tmp_path)
    assert shown.stderr == rb"REPORT of \x1b[2J" + b"\n\r 50%\x1b[A" + rb"a\r\x1b[A"
    assert shown.stdout == rb"\x1b[1mname\x1b[0m" + b"\n"


def test_a_library_that_quotes_a_strangers_file_says_one_short_line(tmp_path):
    code = (
        "import logging, warnings; from diptych.data_prep.command_line.run_command import guard_streams; "
        "guard_streams(); logging.basicConfig(format='%(message)s'); text = EVIL * 10**4; warnings.warn(text); "
        "logging.getLogger('transformers.x').warning('it is %s', text); logging.getLogger('diptych.x').error('a\\nb')"
    )
    (tmp_path / "code.py").write_text(f"EVIL = {EVIL!r}; {code}")
    warned, logged, *ours = ended('"$0" code.py', tmp_path).stderr.decode().splitlines()
    assert warned.startswith(r"UserWarning: x\x1b[2J") and logged.startswith(r"it is x\x1b[2J")
    assert max(len(warned), len(logged)) < 2000 and ours == ["a", "b"]


def test_a_named_pipe_is_read_and_it_is_told_what_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for words in ("train --config pipe", "sweep pipe --out out"):
        shown = ended(f"timeout 60 cp /dev/null pipe & diptych {words}", tmp_path)
        assert shown.returncode == 2 and shown.stdout == b""
        assert b" pipe is a pipe: waiting for a process that opens its other end." in shown.stderr


def test_closed_streams_are_taken_by_no_file_of_ours(tmp_path):
    code = (
        "import sys; from diptych.data_prep.command_line.run_command import guard_streams; guard_streams();"
        " file = open('file', 'w'); print('said', flush=True); print('said', file=sys.stderr);"
        " file.write(f'{file.fileno() > 2} {sys.stderr.isatty()} {sys.stdin.isatty()}')"
    )
    (tmp_path / "code.py").write_text(code)
    assert ended('"$0" code.py <&- >&- 2>&-', tmp_path).returncode == 0
    assert (tmp_path / "file").read_text() == "True False False"
