"""Requests a second and latency under load: `diptych serve` against a plain FastAPI server, the same model in both.

    python benchmarks/serve_load.py                 two cores, about 15 minutes
    python benchmarks/serve_load.py --smoke         every part, small: its figures mean nothing
    python benchmarks/serve_load.py --in_process    no servers: the CPU time of generation alone, about 2 minutes

A Diptych of 23 million random weights. The plain server is what most people write first: a FastAPI route that
tokenizes, calls transformers' `generate`, and decodes. "threads" lets FastAPI run up to 40 of them at a time in its
threads, "one at a time" has a lock. `diptych serve` has its default settings. So many clients ask at a time; each
waits for its answer and asks again. A request is of 8 to 64 random words and asks for 8 to 48 tokens, which random
weights always write; the same requests for each server. The servers take turns, so that a slow minute of the machine
meets them all, and the medians over the rounds are shown: requests a second, milliseconds until half of the answers
(p50) and 99 of 100 (p99) have come, and the CPU time of the server for a request, which other work on the machine
changes least; and the ratios to the better plain server.
"""

import argparse
import contextlib
import json
import os
import queue
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from diptych.finetune.inference.prompts import template_for
from diptych.finetune.model.loading import load_checkpoint
from diptych.finetune.serving.request_batches import Decoding, Ended, Engine, Job
from diptych.modeling import DiptychConfig, DiptychForConditionalGeneration


@dataclass(frozen=True)
class Size:
    vocabulary: int = 16000
    width: int = 384
    heads: int = 6
    layers: tuple[int, int] = (4, 4)
    feed_forward: int = 1024
    clients: tuple[int, ...] = (1, 8, 32)
    words: tuple[int, int] = (8, 64)
    tokens: tuple[int, int] = (8, 48)
    seconds: float = 20.0
    """Of each server in each round, for each number of clients."""
    rounds: int = 3


FULL = Size()
SMOKE = replace(FULL, vocabulary=500, width=64, heads=4, layers=(2, 2), feed_forward=96, clients=(1, 4), seconds=1.0)
SMOKE = replace(SMOKE, rounds=1)
IDS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
EVERYTHING = {"threads": "plain, threads", "one": "plain, one at a time", "torch": "diptych serve"}
EVERYTHING |= {"ctranslate2": "diptych serve, CTranslate2"}
BASELINES = ("threads", "one")
BATCHES = (1, 8, 16, 32)


def write_checkpoint(size: Size, folder: Path) -> None:
    torch.manual_seed(0)
    config = DiptychConfig(
        hidden_size=size.width,
        num_attention_heads=size.heads,
        intermediate_size=size.feed_forward,
        encoder={"num_hidden_layers": size.layers[0]},
        decoder={"num_hidden_layers": size.layers[1]},
        initializer_range=size.width**-0.5,
        vocab_size=size.vocabulary,
        **IDS,
    )
    DiptychForConditionalGeneration(config).save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({f"t{number}": number for number in range(size.vocabulary)}, unk_token="t2"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A t1", special_tokens=[("t1", 1)])
    special = {"pad_token": "t0", "eos_token": "t1", "unk_token": "t2"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


def plain_server(folder: str, port: int, is_locked: bool) -> None:
    """Runs until it is killed."""
    import threading

    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    class Asked(BaseModel):
        prompt: str
        max_tokens: int

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    app, lock = FastAPI(), threading.Lock() if is_locked else contextlib.nullcontext()

    @app.post("/v1/completions")
    def complete(asked: Asked) -> dict[str, Any]:
        inputs = tokenizer(asked.prompt, return_tensors="pt")
        with lock, torch.inference_mode():
            ids = inputs.input_ids, inputs.attention_mask
            (written,) = model.generate(ids[0], attention_mask=ids[1], max_new_tokens=asked.max_tokens)
        text = tokenizer.decode(written, skip_special_tokens=True)
        return {"choices": [{"text": text}], "usage": {"completion_tokens": len(written) - 1}}

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    uvicorn.run(app, port=port, log_level="warning")


@contextlib.contextmanager
def started(name: str, folders: dict[str, Path], log: Path, threads: int) -> Iterator[tuple[str, psutil.Process]]:
    """A server's address and its process, until the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--plain", name, str(folders["torch"]), str(port)]
    if name not in BASELINES:
        engine = [] if name == "torch" else ["--engine", name]
        command = [sys.executable, "-m", "diptych", "serve", str(folders[name]), "--port", str(port), *engine]
        command += ["--template", "plain"]
    with log.open("wb") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=said, env=os.environ | {"OMP_NUM_THREADS": str(threads)}
        )
        url = f"http://127.0.0.1:{port}"
        try:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                assert process.poll() is None, log.read_text()
                time.sleep(0.2)
            yield url, psutil.Process(process.pid)
        finally:
            process.kill()
            process.wait()


def load(url: str, size: Size, clients: int, seconds: float) -> tuple[float, list[float]]:
    """Requests a second, and the seconds that each answer took. Those under way at the end count as well."""
    until = time.perf_counter() + seconds

    def client(number: int) -> list[float]:
        chosen, took = random.Random(number), []
        with httpx.Client(timeout=600) as session:
            while (began := time.perf_counter()) < until or not took:
                words = chosen.choices(range(3, size.vocabulary), k=chosen.randint(*size.words))
                tokens = chosen.randint(*size.tokens)
                body = {"prompt": " ".join(f"t{word}" for word in words), "max_tokens": tokens}
                answer = session.post(f"{url}/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                assert answer.json()["usage"]["completion_tokens"] == tokens, answer.text
                took.append(time.perf_counter() - began)
        return took

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        took = [one for of_client in threads.map(client, range(clients)) for one in of_client]
    return len(took) / (time.perf_counter() - began), took


def percentile(values: list[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def measure(size: Size, names: list[str], threads: int) -> list[dict[str, Any]]:
    """A row for each server, number of clients and round."""
    rows = []
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        folder = Path(place)
        folders = {"torch": folder / "model", "ctranslate2": folder / "export"}
        write_checkpoint(size, folders["torch"])
        if "ctranslate2" in names:
            words = ["export", str(folders["torch"]), "--to", "ctranslate2", "--out", str(folders["ctranslate2"])]
            subprocess.run([sys.executable, "-m", "diptych", *words], check=True, stdout=subprocess.DEVNULL)
        servers = {
            name: stack.enter_context(started(name, folders, folder / f"{name}.log", threads)) for name in names
        }
        for url, _ in servers.values():
            load(url, size, 2, 1.0)
        for number in range(size.rounds):
            for clients in size.clients:
                for name, (url, process) in servers.items():
                    before = process.cpu_times()
                    rate, took = load(url, size, clients, size.seconds)
                    spent = sum(process.cpu_times()[:2]) - sum(before[:2])
                    figures = {"p50": 1000 * percentile(took, 50), "p99": 1000 * percentile(took, 99)}
                    figures["cpu"] = 1000 * spent / len(took)
                    row = {"server": name, "clients": clients, "round": number, "requests": len(took)}
                    rows.append(row | {"rate": rate} | figures | {"load": os.getloadavg()[0], "nice": process.nice()})
                    print(json.dumps(rows[-1]), flush=True)
    return rows


def measure_in_process(size: Size, threads: int) -> str:
    """A table of the CPU time of a request: of transformers' `generate` for one at a time, and of the server's engine
    with batches of so many of them. In turns."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(size, Path(folder))
        loaded = load_checkpoint(folder)
    loaded = replace(loaded, template=template_for("plain", loaded.tokenizer))
    chosen = random.Random(0)
    asked = [
        ([*chosen.choices(range(3, size.vocabulary), k=chosen.randint(*size.words)), 1], chosen.randint(*size.tokens))
        for _ in range(max(BATCHES))
    ]

    def plain(count: int) -> None:
        for ids, tokens in asked[:count]:
            with torch.inference_mode():
                loaded.model.generate(
                    torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=tokens
                )

    def batched(rows: int, count: int) -> None:
        engine, ended = Engine(loaded, batch_size=rows, queue_size=count, batch_wait_ms=0), queue.Queue()
        engine.submit([Job(ids, Decoding(tokens), ended.put) for ids, tokens in asked[:count]])
        assert all(isinstance(ended.get(), Ended) for _ in range(count))
        engine.close()

    spent: dict[int, list[float]] = {0: [], **{rows: [] for rows in BATCHES}}
    for _ in range(size.rounds + 1):  # the first round is thrown away
        for rows in spent:
            count = max(8, rows)
            began = time.process_time()
            batched(rows, count) if rows else plain(count)
            spent[rows].append(1000 * (time.process_time() - began) / count)
    lines = ["| | CPU time of a request | |", "|---|---|---|"]
    middle = {rows: statistics.median(it[1:]) for rows, it in spent.items()}
    for rows, found in middle.items():
        name = f"the server's engine, batches of {rows}" if rows else "generate, one at a time"
        lines.append(f"| {name} | {found:,.0f} ms | {middle[0] / found:.2f} × |")
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """Medians, and throughput and p50 as ratios to the plain server that has the better throughput there."""
    names, numbers = (
        list(dict.fromkeys(it["server"] for it in rows)),
        list(dict.fromkeys(it["clients"] for it in rows)),
    )

    def middle(name: str, clients: int, figure: str) -> float:
        return statistics.median(it[figure] for it in rows if (it["server"], it["clients"]) == (name, clients))

    best = {it: max(set(BASELINES) & set(names), key=lambda name: middle(name, it, "rate")) for it in numbers}
    lines = ["| | " + " | ".join(f"{number} clients" for number in numbers) + " |", "|---" * (len(numbers) + 1) + "|"]
    for name in names:
        cells = []
        for clients in numbers:
            rate, p50, p99, cpu = (middle(name, clients, figure) for figure in ("rate", "p50", "p99", "cpu"))
            ratios = f"{rate / middle(best[clients], clients, 'rate'):.2f} ×"
            slower = f"{p50 / middle(best[clients], clients, 'p50'):.2f} ×"
            less = f"{middle(best[clients], clients, 'cpu') / cpu:.2f} ×"
            answers = f"{rate:.1f}/s, {ratios}; p50 {p50:,.0f} ms, {slower}; p99 {p99:,.0f} ms"
            cells.append(f"{answers}; {cpu:,.0f} ms of CPU, {less}")
        lines.append(f"| {EVERYTHING[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="every part, small: its figures mean nothing")
    parser.add_argument("--servers", default=",".join(EVERYTHING), help="which of them, separated by commas")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch or CTranslate2, in each server")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, help="of each server in each round, for each number of clients")
    parser.add_argument("--in_process", action="store_true", help="no servers: the CPU time of generation alone")
    parser.add_argument("--plain", nargs=3, metavar=("KIND", "FOLDER", "PORT"), help="run a plain server only")
    settings = parser.parse_args()
    if settings.plain:
        kind, folder, port = settings.plain
        plain_server(folder, int(port), is_locked=kind == "one")
        return
    size = SMOKE if settings.smoke else FULL
    size = replace(size, seconds=settings.seconds or size.seconds, rounds=settings.rounds or size.rounds)
    if settings.in_process:
        print(measure_in_process(size, settings.threads))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and no server is left behind
    rows = measure(size, settings.servers.split(","), settings.threads)
    (cpu,) = set(re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()))
    print(table(rows))
    machine = {"cpu": cpu, "cores": os.cpu_count(), "threads": settings.threads}
    print(json.dumps({"machine": machine, "size": asdict(size), "rows": rows}))


if __name__ == "__main__":
    main()
