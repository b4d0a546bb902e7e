"""The whole chain on real data, command by command, as anyone could type it: four to ten minutes on two cores.

Main act: a model that pronounces English words. Prepares CMU's pronouncing dictionary as instruction rows, trains a
tokenizer and a small Diptych from scratch, evaluates it on words that were held out, copies the finished folder
elsewhere, and pronounces words that no dictionary has, in a process that cannot import diptych. Second act: sentence
pairs, packed, and what so few of them cannot teach. Ends with error rates beside published ones, and with exit code 1
if it has not learned to pronounce (a phoneme error rate of 20 % at most).

    python examples/demo.py [OUT]      OUT is runs/demo unless given; what it holds from an earlier demo is replaced
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets

from diptych.finetune.evaluating.metrics import compute_metrics

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parent / "finetune" / "recipes" / "demo.yaml"
SHARED_CORES = {"GOMP_SPINCOUNT": "10000"}
"""A thread that waits for another gives up its core after half a millisecond. OpenMP's own setting is to wait on it
much longer: with six other processes on two cores, a step of training took six times as long."""
INSTRUCTION = "Pronounce:"
NEW_WORDS = ["tokenizer", "chatbot", "emoji", "paywall", "sudoku", "diptych"]  # the dictionary has none of them
LEARNED = 20.0  # per cent: the highest phoneme error rate with which the demo succeeds
FEW_PAIRS = """\
Six thousand short sentences teach a model these sentences, not Korean: one that knew all of them by heart translated
0.7 % of unseen ones exactly. Spelling has few rules, and each stands in thousands of words; translation takes millions
of pairs, or a checkpoint that has read them (README: From your rows to answers)."""
# Errors, per cent: of phonemes and of words with stress marks, then of both without them.
PUBLISHED = {
    "Phonetisaurus, 8-grams [1]": (None, 32.5, None, 24.8),
    "Transformer, 2 layers, 256 wide [2]": (None, None, None, 31.0),
    "LSTM, 3 layers, an older edition [3]": (None, None, 5.5, 23.6),
}
SOURCES = """\
[1] github.com/balacoon/learn_to_pronounce  [2] github.com/cmusphinx/g2p-seq2seq  [3] arXiv 1506.00196: trained until
nothing improved, on other splits of the dictionary. Here and in [1] the nearest of a word's pronunciations counts."""


def run(*command: str | Path, cwd: Path | None = None) -> None:
    """Shows a command, runs it, and stops the demo with its exit code if it fails."""
    command = [str(part) for part in command]
    print(f"\n$ {shlex.join(command)}", flush=True)
    beside = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))  # this Python's commands
    code = subprocess.run(command, cwd=cwd, env=SHARED_CORES | os.environ | {"PATH": beside}).returncode
    if code:
        raise SystemExit(code)


def error_rates(rows: list[dict], with_stress: bool) -> tuple[float, float]:
    """Of phonemes and of whole words, per cent; of several pronunciations of a word the nearest one counts."""

    def shown(text: str) -> str:
        return text if with_stress else re.sub(r"\d", "", text)

    predictions = [shown(row["prediction"]) for row in rows]
    references = [[shown(reference) for reference in row["references"]] for row in rows]
    figures = compute_metrics(["token_error_rate", "exact_match"], predictions, references)
    return figures["token_error_rate"], 100 - figures["exact_match"]


def table(errors: dict[str, tuple[float | None, ...]]) -> str:
    lines = [f"{'errors, %':38}{'with stress':>19}{'without stress':>19}", f"{'':38}" + "   phonemes   words" * 2]
    for name, figures in errors.items():
        shown = ["–" if figure is None else f"{figure:.1f}" for figure in figures]
        lines.append("{:38}{:>11}{:>8}{:>11}{:>8}".format(name, *shown))
    return "\n".join(lines)


def word_of(source: str) -> str:
    return source.removeprefix(INSTRUCTION).replace(" ", "")


def show_held_out(rows: list[dict], count: int) -> None:
    """Words from everywhere in the test split, what the model says, and the dictionary, where that differs."""
    for row in rows[:: len(rows) // count][:count]:
        is_right = row["prediction"] in row["references"]
        beside = "right" if is_right else "dictionary: " + " or ".join(row["references"])
        print(f"  {word_of(row['source']):16}{row['prediction']:36}{beside}")


def show_packed_row(data: Path, count: int) -> None:
    """The first packed row of a prepared dataset: some of its examples, and how many there are."""
    numbers = datasets.load_from_disk(str(data / "packed"))[0]["examples"]
    train = datasets.load_from_disk(str(data))["train"]
    print(f"\nOne packed row holds {len(numbers)} of them, and none sees another:")
    for row in train.select(numbers[:count]):
        print(f"  {row['source']}\n    → {row['target']}")


def main(out: str = "runs/demo") -> int:
    started, folder = time.time(), Path(out)
    data, model, pairs = folder / "data", folder / "model", folder / "pairs"
    shutil.rmtree(model, ignore_errors=True)  # the prepared data is reused where nothing has changed

    run("diptych", "prepare", "--data", "cmudict", "--template", "translate", "--train_tokenizer", "bpe",
        "--vocab_size", "400", "--split_by", "source", "--validation_fraction", "0.02",
        "--packed_source_tokens", "60", "--packed_target_tokens", "56", "--out", data)  # fmt: skip
    threads = str(os.cpu_count())  # of which accelerate launch would take one
    run("accelerate", "launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--num_cpu_threads_per_process", threads, "-m", "diptych.finetune.train",
        "--config", RECIPE, "--data", data, "--out", model)  # fmt: skip
    run("diptych", "evaluate", model / "final", "--data", data, "--split", "test", "--batch_size", "100",
        "--metrics", "token_error_rate,exact_match", "--out", folder / "test.json")  # fmt: skip
    with tempfile.TemporaryDirectory() as elsewhere:
        copy = Path(elsewhere) / "published"
        shutil.copytree(model / "final", copy)
        spelled = [" ".join(word) for word in NEW_WORDS]
        run(sys.executable, HERE / "without_diptych.py", copy, INSTRUCTION, *spelled, cwd=Path(elsewhere))
        print("(The dictionary has none of these words.)")

    run("diptych", "prepare", "--data", "tatoeba", "--template", "translate", "--train_tokenizer", "bpe",
        "--vocab_size", "6000", "--out", pairs)  # fmt: skip
    show_packed_row(pairs, count=3)
    print(FEW_PAIRS)

    rows = [json.loads(line) for line in (folder / "test.predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    print(f"\nWords that it has never seen, of {len(rows):,} in the test split:")
    show_held_out(rows, count=8)
    errors = error_rates(rows, with_stress=True) + error_rates(rows, with_stress=False)
    print(f"\n{table({'this model, after one pass': errors} | PUBLISHED)}\n{SOURCES}")
    print(f"\nloss curve   {model / 'loss.png'}\ncheckpoint   {model / 'final'}")
    print(f"try it       diptych generate {model / 'final'} --instruction '{INSTRUCTION}' --input 'l l a m a'")
    print(f"{time.time() - started:.0f} s in all.")
    if errors[0] > LEARNED:
        print(f"NOT LEARNED: at most {LEARNED} % of phonemes were to be wrong.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
