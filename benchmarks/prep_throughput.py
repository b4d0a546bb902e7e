"""Rows a second of the whole preparation, beside plain `datasets`: load_dataset("json") and a map that tokenises.

    python benchmarks/prep_throughput.py --data my.json --megabytes 50

The rows of `--data` (alpaca) are written again and again, each time with a number in front of instruction and output,
until the file has so many megabytes. Every figure is a process of its own; the two sides take turns. `datasets` gets
the same prompt by an f-string and the same tokenizer. Ours reads, checks, renders, encodes and writes the same columns
(checks alone), and then also does what the default and the most careful settings do. Prints a table, what each stage
costs in one process, the peak memory of each side, and a JSON line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKS_ALONE = ["--deduplicate=false", "--packing=false", "--validation_fraction=0", "--test_fraction=0"]
SIDES = {
    "datasets, 1 process": {"processes": 1},
    "datasets, 2 processes": {"processes": 2},
    "checks alone": {"arguments": CHECKS_ALONE},
    "default (duplicates, splits, packing, report)": {"arguments": []},
    "and near duplicates, languages, sensitive": {
        "arguments": ["--near_duplicates=0.9", "--source_languages", "en", "--sensitive=true"]
    },
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True, help="a .json file of alpaca rows")
    parser.add_argument("--megabytes", type=float, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", type=int, default=range(len(SIDES)), help="sides, by number from 0")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.side:
        print("figures", json.dumps(measure(settings.side, settings.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = write_inputs(settings.data, Path(folder), settings.megabytes)
        compare(rows, Path(folder), settings)


def write_inputs(data: Path, folder: Path, megabytes: float) -> int:
    from diptych.data_prep.text_to_ids.train_tokenizer import train_tokenizer

    originals = json.loads(data.read_text(encoding="utf-8"))
    texts = [row[name] for row in originals for name in ("instruction", "input", "output")]
    train_tokenizer("bpe", texts, 8000).save_pretrained(folder / "tokenizer")
    written, rows = 0, 0
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        while written < megabytes * 1e6:
            row = originals[rows % len(originals)]
            numbered = {name: f"{rows} {row[name]}" if name != "input" else row[name] for name in row}
            written += file.write(json.dumps(numbered, ensure_ascii=False) + "\n")
            rows += 1
    return rows


def compare(rows: int, folder: Path, settings: argparse.Namespace) -> None:
    sides = [list(SIDES)[number] for number in settings.only]
    figures = {side: [] for side in sides}
    for _ in range(settings.rounds):
        for side in sides:
            command = [sys.executable, __file__, "--data", "-", "--side", side, "--folder", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            figures[side].append(json.loads(done.stdout.split("figures")[-1]))
    size = (folder / "rows.jsonl").stat().st_size / 1e6
    print(f"{rows:,} rows, {size:,.0f} MB, {os.cpu_count()} cores; median of {settings.rounds}")
    report = {}
    base = None
    for side in sides:
        seconds = statistics.median(run["seconds"] for run in figures[side])
        base = base or seconds
        memory = max(run["memory_mb"] for run in figures[side])
        report[side] = {"rows_per_second": rows / seconds, "ratio": base / seconds, "memory_mb": memory}
        print(f"{side:48} {rows / seconds:9,.0f} rows/s   {base / seconds:5.2f} ×   peak {memory:6,.0f} MB")
    stages = stage_costs(folder)
    for name, microseconds in stages.items():
        print(f"  {name:46} {microseconds:7.1f} µs a row, one process")
    print(json.dumps({"benchmark": "prep_throughput", "rows": rows, **report, "stages_us": stages}))


def measure(side: str, folder: Path) -> dict[str, float]:
    work = SIDES[side]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        run = plain_datasets if "processes" in work else diptych
        with PeakMemory() as peak:
            seconds = run(folder, Path(scratch), **work)
    return {"seconds": seconds, "memory_mb": peak.megabytes}


def plain_datasets(folder: Path, scratch: Path, processes: int) -> float:
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer("warm")
    start = time.perf_counter()
    table = datasets.load_dataset(
        "json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=str(scratch / "cache")
    )

    def tokenise(batch: dict) -> dict:
        sources = [prompt(*row) for row in zip(batch["instruction"], batch["input"], strict=True)]
        ids = tokenizer(sources, truncation=True, max_length=512)["input_ids"]
        labels = tokenizer(text_target=batch["output"], truncation=True, max_length=512)["input_ids"]
        return {"input_ids": ids, "labels": labels, "source": sources}

    table.map(tokenise, batched=True, num_proc=processes if processes > 1 else None)
    return time.perf_counter() - start


def prompt(instruction: str, text: str) -> str:
    if text:
        return (
            "Below is an instruction that describes a task, paired with an input that provides further context. Write"
            " a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{text}\n\n### Response:"
        )
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Response:"
    )


def diptych(folder: Path, scratch: Path, arguments: list[str]) -> float:
    from diptych.data_prep.prepare import main as prepare

    settings = ["--data", str(folder / "rows.jsonl"), "--tokenizer", str(folder / "tokenizer")]
    start = time.perf_counter()
    assert prepare([*settings, *arguments, "--out", str(scratch / "prepared")]) == 0
    return time.perf_counter() - start


def stage_costs(folder: Path) -> dict[str, float]:
    """Each stage alone over the first rows, in this process, with one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from dataclasses import replace
    from itertools import islice

    from transformers import AutoTokenizer

    from diptych.data_prep.cleaning.duplicates import compared_text, signatures
    from diptych.data_prep.cleaning.filters import LanguageFilter, script_of
    from diptych.data_prep.cleaning.sensitive import find_in_record
    from diptych.data_prep.cleaning.splits import record_keys, text_key
    from diptych.data_prep.pipeline.prepare_settings import PrepareSettings
    from diptych.data_prep.pipeline.row_stages import Stages
    from diptych.data_prep.reading.sources import open_sources
    from diptych.data_prep.rows.recognise_format import converter_for
    from diptych.data_prep.text_to_ids.templates import TEMPLATES

    source = open_sources([str(folder / "rows.jsonl")])[0]
    chunks = list(islice(source.chunks(), 4))
    costs: dict[str, float] = {}

    def timed(name: str, work):
        start = time.perf_counter()
        result = work()
        costs[name] = time.perf_counter() - start
        return result

    rows = [row for chunk in chunks for row in chunk.rows()]
    converter = converter_for(rows[:100], source.name)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    whole = Stages((converter,), TEMPLATES["alpaca"], None, PrepareSettings(), (), (True,))
    with_tokenizer = replace(whole, tokenizer=tokenizer)
    texts = whole.run(chunks[0], 0).examples  # tables of scripts and compiled templates are made once
    with_tokenizer.encode(texts.slice(0, 8))
    timed("read and parse", lambda: [row for chunk in chunks for row in chunk.rows()])
    records = timed("convert and check", lambda: [result for row in rows for result in converter.records(row)])
    examples = timed("render", lambda: [TEMPLATES["alpaca"].render(record) for record in records])
    timed("keys", lambda: [(text_key(it[0]), *record_keys(of)) for it, of in zip(examples, records, strict=True)])
    timed("scripts", lambda: [(script_of(record.input), script_of(record.output)) for record in records])
    batches = timed("all of these, and to Arrow", lambda: [whole.run(chunk, 0).examples for chunk in chunks])
    timed("encode", lambda: [with_tokenizer.encode(batch) for batch in batches])
    timed("near duplicates: signatures", lambda: signatures([compared_text(record) for record in records]))
    language = LanguageFilter(("en",))
    timed("languages", lambda: [language.check(record) for record in records])
    timed("sensitive", lambda: [find_in_record(record) for record in records])
    return {name: 1e6 * seconds / len(rows) for name, seconds in costs.items()}


class PeakMemory:
    """The most that this process and its children held together, looked at every 50 ms: their own pages (Pss_Anon of
    /proc/PID/smaps_rollup: shared ones counted once). Mapped pages of files are the system's to take back."""

    def __enter__(self) -> "PeakMemory":
        import threading

        import psutil

        self.megabytes, self.done = 0.0, threading.Event()

        def watch() -> None:
            me = psutil.Process()
            while not self.done.wait(0.05):
                total = 0
                for process in [me, *me.children(recursive=True)]:
                    try:
                        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
                    except OSError:  # it has just ended
                        continue
                    total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))
                self.megabytes = max(self.megabytes, total / 1e3)

        self.thread = threading.Thread(target=watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.done.set()
        self.thread.join()


if __name__ == "__main__":
    main()
