"""Follows README and docs/ as a reader would, in a folder with small models and files of the names that they use.

    reader = Reader(folder, nursery)
    reader.follow(Path("docs/lora.md"))          every command, file and snippet of the page, in its order

What a fenced block is, is said by its first line:

    ```sh                       commands, each of which must succeed
    ```python                   runs; the blocks of a page share their names
    ```yaml title="a.yaml"      a file (likewise json, jinja); without a title it has to be well-formed
    ```text, or nothing         shown only: what is printed, or waits for a person
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from nursery import Nursery, free_port
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    NllbTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from diptych.data_prep.text_to_ids.templates import TOKENIZER_KEY
from diptych.data_prep.text_to_ids.train_tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
CAPITALS = {"France": "Paris", "Korea": "Seoul", "Japan": "Tokyo", "Peru": "Lima", "Italy": "Rome", "Cuba": "Havana"}
FENCE = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```', flags=re.MULTILINE | re.DOTALL)
LISTENING = "127.0.0.1:8000"


class Block(NamedTuple):
    language: str
    title: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(*found) for found in FENCE.findall(page.read_text(encoding="utf-8"))]


def commands(text: str) -> Iterator[str]:
    """One a line; a backslash at its end joins the next, and comments are left out."""
    for line in text.replace("\\\n", "").splitlines():
        if line.strip() and not line.startswith("#"):
            yield line


class Reader:
    def __init__(self, folder: Path, nursery: Nursery):
        self.folder, self.nursery, self.port, self.server, self.logs = folder, nursery, free_port(), None, 0
        make_files(folder)

    def follow(self, page: Path) -> None:
        names: dict[str, object] = {}
        for block in blocks(page):
            if block.title:
                (self.folder / block.title).write_text(block.text, encoding="utf-8")
            if block.language == "sh":
                for command in commands(block.text):
                    self.run(command)
            elif block.language == "python":
                exec(compile(block.text, str(page), "exec"), names)  # in the folder, which the test has gone to
            elif block.language == "json":
                rows = [block.text] if block.text.startswith("{\n") else block.text.splitlines()
                assert all(json.loads(row) for row in rows)
            elif block.language == "yaml":
                assert yaml.safe_load(block.text)
            else:
                assert block.language in ("", "text", "jinja"), f"{page}: nobody runs {block.language}"
        if self.server:
            os.kill(self.server.pid, signal.SIGTERM)
            assert self.server.wait(60) == 0
            self.server = None

    def run(self, command: str) -> None:
        """`make` is for CI, which runs it whole, and another test sees that each target exists."""
        command = command.replace(LISTENING, f"127.0.0.1:{self.port}").replace("--port 8000", f"--port {self.port}")
        command = command.replace("--trials 3", "--trials 1")  # each is a process that imports torch
        program, *words = shlex.split(command, comments=True)
        if program == "make":
            return
        if program != "diptych":
            return self.run_in_shell(command)
        self.logs += 1
        log = self.folder / f"log-{self.logs}"
        process = self.nursery.run(words, log, self.folder)
        if words[0] == "serve":
            self.server = process
            return self.wait_for_server()
        code = process.wait(300)
        said = log.read_text(encoding="utf-8")
        allowed = (0, 1) if words[0] == "doctor" else (0,)  # 1: something is red
        assert code in allowed and "Traceback" not in said, f"$ {command}\n{said}"

    def run_in_shell(self, command: str) -> None:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
        result = subprocess.run(
            command, shell=True, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=300
        )
        said = f"$ {command}\n{result.stdout}\n{result.stderr}"
        assert result.returncode == 0 and "Traceback" not in result.stderr and '"error"' not in result.stdout, said

    def wait_for_server(self) -> None:
        for _ in range(300):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health"):
                    return
            except OSError:
                time.sleep(0.1)
        raise AssertionError("the server does not answer")


def make_files(folder: Path) -> None:
    """Rows, texts, prompts, and small models under the names that the pages use."""
    (folder / "finetune").symlink_to(ROOT / "finetune")
    rows = [{"instruction": "Name the capital.", "input": land, "output": city} for land, city in CAPITALS.items()]
    rows += [{"instruction": f"Say {number}.", "input": "", "output": f"It is {number}."} for number in range(40)]
    lines = [json.dumps(row) for row in rows]
    for name in ("my-rows.jsonl", "train.jsonl", "rows.jsonl"):
        write_lines(folder / name, lines)
    more = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n)))} for n in range(3, 40)]
    write_lines(folder / "more-rows.jsonl", [json.dumps(row) for row in more])
    tasks = [row | {"task": row["instruction"].split()[0], "meta": {"source": "web"}} for row in rows]
    write_lines(folder / "tasks.jsonl", [json.dumps(row) for row in tasks])
    for place, name in enumerate(("dev", "test", "dev-news", "dev-medical", "test-news", "test-medical")):
        own = [{"instruction": f"Spell {place * 10 + n}.", "output": f"{name} {n}"} for n in range(8)]
        write_lines(folder / f"{name}.jsonl", [json.dumps(row) for row in own])
    (folder / "my-folder").mkdir()
    for name in ("train", "dev"):
        (folder / "my-folder" / f"{name}.jsonl").write_bytes((folder / f"{name}.jsonl").read_bytes())
    write_lines(folder / "prompts.jsonl", [json.dumps({"instruction": row["instruction"]}) for row in rows[:9]])
    write_lines(folder / "questions.csv", ["question,answer", *(f"What is {n}?,It is {n}." for n in range(40))])
    write_lines(folder / "bare.csv", [f"What is {n}?,It is {n}." for n in range(40)])
    english = [f"This is number {number}." for number in range(40)]
    korean = [f"이것은 {number}번이다." for number in range(40)]
    for name in ("my-text", "train", "wmt"):
        write_lines(folder / f"{name}.en", [f"{name}: {text}" for text in english])
        write_lines(folder / f"{name}.ko", [f"{name}: {text}" for text in korean])
    write_lines(folder / "pairs.tsv", ["\t".join(pair) for pair in zip(english, korean, strict=True)])
    write_lines(folder / "lines.txt", english[:4])
    write_lines(folder / "korean.txt", korean[:9])
    jejueo = [f"이건 {number}번이우다." for number in range(40)]
    write_lines(folder / "new-texts.txt", jejueo)
    for name, code, texts in (("new", "jje_Hang", jejueo), ("old", "kor_Hang", korean)):
        own = zip(english[20:30], texts[20:30], strict=True)
        codes = {"src_lang": "eng_Latn", "tgt_lang": code}
        write_lines(folder / f"{name}-test.jsonl", [json.dumps({"source": a, "target": b} | codes) for a, b in own])

    tokenizer = train_tokenizer("bpe", iter(lines), vocab_size=400)
    torch.manual_seed(0)
    config = T5Config(vocab_size=400, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    for name in ("my-checkpoint", "google/flan-t5-small", "Helsinki-NLP/opus-mt-en-de"):
        T5ForConditionalGeneration(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    llm = Qwen3ForCausalLM(Qwen3Config(vocab_size=400, **shape, num_key_value_heads=1, head_dim=16, pad_token_id=0))
    llm.save_pretrained(folder / "my-llm")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer.init_kwargs.pop(TOKENIZER_KEY, None)
    tokenizer.save_pretrained(folder / "my-llm")
    make_nllb(folder / "facebook/nllb-200-distilled-600M", [*english, *korean])


def make_nllb(folder: Path, texts: list[str]) -> None:
    """A small NLLB, with a vocabulary of these texts and the language codes of the real one."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    trained = json.loads(backend.to_str())["model"]
    tokenizer = NllbTokenizer(vocab=trained["vocab"], merges=[tuple(pair) for pair in trained["merges"]])
    tokenizer.save_pretrained(folder)
    shape = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 256}
    shape |= {f"{side}_{part}": 1 for side in ("encoder", "decoder") for part in ("layers", "attention_heads")}
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = M2M100Config(vocab_size=len(tokenizer), **shape, **ids, forced_eos_token_id=None)
    M2M100ForConditionalGeneration(config).save_pretrained(folder)


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
