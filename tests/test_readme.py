"""Every command and snippet of README.md runs as it stands there, in its order, on small files of the same names.

`make demo` and `make test` are the exception: they are what `.ci/run` runs, whole, and a test sees to it. Of the
commands of `diptych` the first one is started as a shell starts it, the others by the nursery, which is faster.
"""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, T5Config, T5ForConditionalGeneration

from diptych.data_prep.text_to_ids.templates import TOKENIZER_KEY
from diptych.data_prep.text_to_ids.train_tokenizer import train_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CAPITALS = {"France": "Paris", "Korea": "Seoul", "Japan": "Tokyo", "Peru": "Lima", "Italy": "Rome", "Cuba": "Havana"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """One a line; a backslash at its end joins the next."""
    return "".join(blocks("sh")).replace("\\\n", "").splitlines()


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """The folder of somebody who reads README: the clone, their rows, their text, their checkpoint."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "finetune").symlink_to(ROOT / "finetune")
    rows = [{"instruction": "Name the capital.", "input": land, "output": city} for land, city in CAPITALS.items()]
    rows += [{"instruction": f"Say {number}.", "input": "", "output": f"It is {number}."} for number in range(40)]
    write_lines(folder / "my-rows.jsonl", [json.dumps(row) for row in rows])
    write_lines(folder / "prompts.jsonl", [json.dumps({"instruction": row["instruction"]}) for row in rows[:9]])
    write_lines(folder / "my-text.en", [f"This is number {number}." for number in range(40)])
    write_lines(folder / "my-text.ko", [f"이것은 {number}번이다." for number in range(40)])

    tokenizer = train_tokenizer("bpe", (json.dumps(row) for row in rows), vocab_size=400)
    tokenizer.save_pretrained(folder / "my-checkpoint")
    torch.manual_seed(0)
    config = T5Config(vocab_size=400, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(folder / "my-checkpoint")

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    llm = Qwen3ForCausalLM(Qwen3Config(vocab_size=400, **shape, num_key_value_heads=1, head_dim=16, pad_token_id=0))
    llm.save_pretrained(folder / "my-llm")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer.init_kwargs.pop(TOKENIZER_KEY, None)
    tokenizer.save_pretrained(folder / "my-llm")
    return folder


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(reader: Path, command: list[str] | str) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    shell = isinstance(command, str)
    result = subprocess.run(
        command, shell=shell, cwd=reader, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, f"$ {command}\n{result.stdout}\n{result.stderr}"
    assert "Traceback" not in result.stderr


def test_commands_run_one_after_another_as_they_stand(reader, nursery):
    typed = [command for command in commands() if not command.startswith("make ")]
    assert len(typed) == 19, typed
    assert any(command.startswith("accelerate launch ") for command in typed)
    for number, command in enumerate(typed):
        program, *words = shlex.split(command)
        if program != "diptych" or not number:
            run(reader, command)
            continue
        log = reader / f"log-{number}"
        code = nursery.run(words, log, reader).wait(300)
        assert code == 0 and "Traceback" not in log.read_text(), f"$ {command}\n{log.read_text()}"
    assert (reader / "runs/full/loss.png").stat().st_size > 10_000
    assert {"loss", "chrf", "bleu"} <= json.loads((reader / "runs/full/test.json").read_text())["figures"].keys()
    assert len((reader / "answers.jsonl").read_text(encoding="utf-8").splitlines()) == 9


def test_the_python_snippet_runs(reader):
    (snippet,) = blocks("python")
    run(reader, [sys.executable, "-c", snippet])
    assert (reader / "my-diptych" / "modeling_diptych.py").is_file()


def test_make_commands_exist_and_ci_runs_the_two_that_everybody_runs():
    makes = {command for command in commands() if command.startswith("make ")}
    assert makes == {"make demo", "make test", "make install"}
    continuous = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert {line for line in continuous.splitlines() if line.startswith("make ")} >= {"make test", "make demo"}
    for command in makes:  # a dry run: every target resolves
        subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def test_the_demo_counts_errors_against_the_nearest_pronunciation_with_and_without_stress():
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    rows = [
        {"prediction": "T AH0 M AA1 T OW2", "references": ["T AH0 M EY1 T OW2", "T AH0 M AA1 T OW2"]},
        {"prediction": "AE0 B IY0", "references": ["AE1 B IY0"]},
    ]
    assert demo.error_rates(rows, with_stress=True) == (pytest.approx(100 / 9), 50)
    assert demo.error_rates(rows, with_stress=False) == (0, 0)
    assert demo.RECIPE.is_file()


def test_each_file_has_its_line():
    listed = set(re.findall(r"^\| `([^`]+)` \|", README, flags=re.MULTILINE))
    kept = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    files = {name for name in kept if name.startswith(("modeling/", "data_prep/", "finetune/", "examples/"))}
    files -= {name for name in files if name.endswith("__init__.py") or "/samples/" in name}
    assert files <= listed and listed <= set(kept) | {"data_prep/reading/samples/", "tests/"}
