"""The whole chain on real data, command by command, as anyone could type it: four to six minutes on two cores.

Prepares the shipped English–Korean pairs in both directions, trains a tokenizer and a small Diptych from scratch,
evaluates it on what it has seen and on what it has not, copies the finished folder elsewhere, and translates with it
in a process that cannot import diptych. Ends with a table, and with exit code 1 if it has not learned its training
data (95 % of 300 sampled training targets, exactly).

    python examples/demo.py [OUT]      OUT is runs/demo unless given; what it holds from an earlier demo is replaced
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parent / "finetune" / "recipes" / "demo.yaml"
LEARNED = 95.0  # per cent of the sampled training targets
SAMPLE = 300
INSTRUCTION = "Translate English to Korean:"
UNSEEN = "I am a student."  # the sentence of every lecture on the Transformer; it is not among the pairs


def run(*command: str | Path, cwd: Path | None = None) -> None:
    """Shows a command, runs it, and stops the demo with its exit code if it fails."""
    command = [str(part) for part in command]
    print(f"\n$ {shlex.join(command)}", flush=True)
    beside = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))  # this Python's commands
    code = subprocess.run(command, cwd=cwd, env=os.environ | {"PATH": beside}).returncode
    if code:
        raise SystemExit(code)


def evaluate(model: Path, data: Path, split: str, out: Path) -> dict[str, float]:
    report = out / f"{split}.json"
    run("diptych", "evaluate", model, "--data", data, "--split", split, "--limit", str(SAMPLE), "--batch_size", "50",
        "--metrics", "exact_match,token_f1,chrf,bleu", "--out", report)  # fmt: skip
    return json.loads(report.read_text(encoding="utf-8"))["figures"]


def seen_sentences(predictions: Path, count: int) -> list[str]:
    """Some English sentences of the training data, of moderate length."""
    sources = [json.loads(line)["source"] for line in predictions.read_text(encoding="utf-8").splitlines()]
    english = [source.removeprefix(INSTRUCTION).strip() for source in sources if source.startswith(INSTRUCTION)]
    return [sentence for sentence in english if 15 <= len(sentence) <= 40][:count]


def table(figures: dict[str, dict[str, float]]) -> str:
    """One row a metric, one column a split."""
    rows = {"loss": "loss, nats/token", "exact_match": "exact match, %", "token_f1": "token F1", "chrf": "chrF"}
    lines = [f"{'':20}" + "".join(f"{split:>12}" for split in figures)]
    for key, title in (rows | {"bleu": "BLEU"}).items():
        lines.append(f"{title:20}" + "".join(f"{split[key]:>12.2f}" for split in figures.values()))
    return "\n".join(lines)


def main(out: str = "runs/demo") -> int:
    started, folder = time.time(), Path(out)
    data, model = folder / "data", folder / "model"
    shutil.rmtree(model, ignore_errors=True)  # the prepared data is reused where nothing has changed

    run("diptych", "prepare", "--data", "tatoeba", "--template", "translate", "--train_tokenizer", "bpe",
        "--vocab_size", "6000", "--out", data)  # fmt: skip
    threads = str(os.cpu_count())  # of which accelerate launch would take one
    run("accelerate", "launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--num_cpu_threads_per_process", threads, "-m", "diptych.finetune.train",
        "--config", RECIPE, "--data", data, "--out", model)  # fmt: skip
    figures = {split: evaluate(model / "final", data, split, folder) for split in ("train", "test")}

    with tempfile.TemporaryDirectory() as elsewhere:
        copy = Path(elsewhere) / "published"
        shutil.copytree(model / "final", copy)
        seen = seen_sentences(folder / "train.predictions.jsonl", count=3)
        run(sys.executable, HERE / "without_diptych.py", copy, INSTRUCTION, *seen, UNSEEN, cwd=Path(elsewhere))
        print(f"(It was trained on the first {len(seen)} of these, and has never seen the last.)")

    known, unknown = figures["train"]["exact_match"], figures["test"]["exact_match"]
    print(f"\n{table(figures)}\n")
    print(f"loss curve   {model / 'loss.png'}\nrun folder   {model}\ncheckpoint   {model / 'final'}")
    print(f"\nIt reproduces {known:.1f} % of {SAMPLE} sampled training targets exactly, and {unknown:.1f} % of unseen")
    print("ones: six thousand short sentences teach it those sentences, not Korean. Translation takes more data.")
    print(f"{time.time() - started:.0f} s in all.")
    if known < LEARNED:
        print(f"NOT LEARNED: at least {LEARNED} % of the training targets were due.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
