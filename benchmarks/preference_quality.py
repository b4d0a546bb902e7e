"""Does it help? A model that was tuned supervised is tuned on for its own metric, by each objective of preferences
and, for as long, supervised.

    python benchmarks/preference_quality.py --out preference_quality            two cores, about two hours
    python benchmarks/preference_quality.py --out smoke --smoke                 all of it, small; figures mean nothing

Tasks: pronunciation (20,000 words of CMU's dictionary; phoneme error rate) and English and Korean (Tatoeba's pairs;
chrF), with the demo's model. The first model of each is trained past its best epoch, by this metric on the validation
split, and is that checkpoint. Eight samples to each of some thousand training prompts are ranked by the metric, and
the best and the worst make a pair: for dpo, simpo, cpo and orpo. mrt and grpo sample themselves. Each run may take
--seconds of CPU time for its steps, as a short trial measured them; `supervised` may take that and the time of
sampling, on the same rows as the first model. The rate of each method is the best of its `rates` by the metric on the
validation split with the first seed, and so is the checkpoint of each run.

Printed: the metric of the test split, and its difference from the first model with a 95 % interval over the sources
(paired bootstrap), for each seed. Finished runs in --out are not repeated.
"""

import argparse
import json
import os
import random
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow
import torch
import yaml

import diptych
from diptych.data_prep.reading import sources
from diptych.finetune.commands import cli
from diptych.finetune.evaluating.compare_runs import CompareSettings, compare_reports, load_side

RECIPE = Path(__file__).parents[1] / "finetune" / "recipes" / "demo.yaml"
SEEDS, SAMPLES, POINTS = (0, 1, 2), 8, 4
PAIRED = {
    "dpo": {"beta": 0.1, "supervised_weight": 0.2},
    "simpo": {"beta": 2.0, "gamma": 1.0, "supervised_weight": 0.2},
    "cpo": {},
    "orpo": {},
}
ONLINE = {"mrt": {"sharpness": 1.0}, "grpo": {}}


@dataclass(frozen=True)
class Task:
    data: str
    metric: str
    prepare: dict[str, Any]
    first: dict[str, Any]
    """What the first model's recipe has beside the demo's shape."""
    prompts: int
    sources: int
    """In a step of mrt and grpo."""
    rows: int
    """Packed rows in a step of the others."""
    rates: dict[str, tuple[float, ...]]
    """Of each method, those to try; where only one stands here, it is known from shorter trials."""
    recipe: dict[str, Any] = field(default_factory=dict)
    drawn: int = 0
    """Only so many rows of the data, so that the first model reaches its best in minutes; 0: all."""


TASKS = {
    "pronunciation": Task(
        "cmudict",
        "token_error_rate",
        {
            "split_by": "source",
            "vocab_size": 400,
            "packed_source_tokens": 60,
            "packed_target_tokens": 56,
            "test_fraction": 0.2,
            "forward": "Pronounce:",
        },
        {"epochs": 14, "batch_size": 8, "learning_rate": 2e-3},
        2500,
        32,
        16,
        dict.fromkeys(("supervised", "mrt", "grpo", "cpo", "orpo"), (3e-5,))
        | dict.fromkeys(("dpo", "simpo"), (3e-6,)),
        {"attention": "eager"},
        20000,
    ),
    "korean": Task(
        "tatoeba",
        "chrf",
        {"vocab_size": 4000},
        {"epochs": 14, "batch_size": 4, "learning_rate": 2e-3},
        600,
        32,
        4,
        dict.fromkeys(("supervised", "mrt", "grpo", "cpo", "orpo"), (1e-4,))
        | dict.fromkeys(("dpo", "simpo"), (1e-5,)),
    ),
}


def words(task: Task, folder: Path) -> Path:
    """Some lines of a sample that ships packed, as a file."""
    sample = Path(sources.__file__).parent / "samples" / f"{task.data}.tsv.zst"
    lines = pyarrow.input_stream(str(sample), compression="zstd").read().decode().splitlines()
    place = folder / "words.tsv"
    place.write_text("\n".join(random.Random(0).sample(lines, task.drawn)) + "\n", encoding="utf-8")
    return place


def first_model(task: Task, folder: Path, is_smoke: bool) -> tuple[Path, Path]:
    """Prepared data, and the model that was tuned supervised."""
    data, run = folder / "data", folder / "first"
    settings = {"template": "translate", "validation_fraction": 0.05, "test_fraction": 0.1} | task.prepare
    diptych.prepare(words(task, folder) if task.drawn else task.data, out=data, train_tokenizer="bpe", **settings)
    shape = {
        name: it for name, it in yaml.safe_load(RECIPE.read_text()).items() if name in ("model", "model_overrides")
    }
    length = {"max_steps": 8} if is_smoke else {}
    own = {name: it for name, it in task.first.items() if not (is_smoke and name == "epochs")}
    if not (run / "final").is_dir():
        diptych.train(
            **shape, **own, **length, **task.recipe, data=data, out=run, resume=run.exists(), precision="fp32",
            schedule="linear", warmup_ratio=0.05, betas=[0.9, 0.98], weight_decay=0.0, keep_last=1,
            metrics=task.metric, metrics_limit=1000, best_metric=task.metric, eval_batch_size=64,
        )  # fmt: skip
    return data, run / "final"


def pairs_of(task: Task, data: Path, model: Path, folder: Path, is_smoke: bool) -> tuple[Path, float]:
    """Prepared pairs, and the CPU seconds that samples and ranks took."""
    import datasets

    prompts, samples, pairs = (folder / f"{name}.jsonl" for name in ("prompts", "samples", "pairs"))
    prepared, kept = folder / "pairs", folder / "sampling.json"
    if kept.is_file():
        return prepared, json.loads(kept.read_text())["seconds"]
    rows = datasets.load_from_disk(str(data))["train"].shuffle(seed=0).select(range(50 if is_smoke else task.prompts))
    lines = [{name: row[name] for name in ("instruction", "input")} | {"output": row["target"]} for row in rows]
    prompts.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    started = time.process_time()
    for command in (
        f"sample {model} --data {prompts} --samples {SAMPLES} --out {samples} --batch_size 64 --max_new_tokens 48",
        f"rank {samples} --by {task.metric} --out {pairs}",
    ):
        name, *arguments = command.split()
        assert cli.run(name, [*arguments, "--overwrite", "true"]) == 0, command
    seconds = time.process_time() - started
    shutil.rmtree(prepared, ignore_errors=True)
    diptych.prepare(pairs, out=prepared, tokenizer=model, validation_fraction=0.0, test_fraction=0.0)
    kept.write_text(json.dumps({"seconds": seconds}))
    return prepared, seconds


def with_validation(pairs: Path, data: Path, folder: Path) -> Path:
    """The pairs to train on. Checkpoints are chosen by the metric on the validation split of the first data."""
    import datasets

    place = folder / "pairs-and-validation"
    if not place.is_dir():
        shutil.copytree(pairs, place)
        tables = datasets.load_from_disk(str(pairs))
        columns = tables["train"].column_names
        validation = datasets.load_from_disk(str(data))["validation"]
        other = validation.add_column("other_labels", validation["labels"]).add_column(
            "rejected", validation["target"]
        )
        tables["validation"] = other.select_columns([name for name in columns if name in other.column_names])
        beside = folder / "beside"
        tables.save_to_disk(str(beside))
        shutil.copytree(beside, place, dirs_exist_ok=True)
        shutil.rmtree(beside)
    return place


def train(
    job: tuple[str, float, int], task: Task, data: dict[str, Path], model: Path, out: Path, seconds: dict, smoke: bool
):
    """One run; what it measured is kept beside it."""
    method, rate, seed = job
    name = f"{method}-{rate:g}-{seed}"
    kept = out / f"{name}.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    torch.set_num_threads(1)
    is_paired, is_online = method in PAIRED, method in ONLINE
    settings = {"objective": method, "objective_settings": PAIRED[method]} if is_paired else {}
    if is_online:
        settings = {
            "objective": method,
            "objective_settings": ONLINE[method] | {"reward": task.metric, "samples": SAMPLES},
        }
    own = {
        "model": model, "data": data["pairs" if is_paired else "rows"], "learning_rate": rate, "seed": seed,
        "batch_size": task.sources if is_online else task.rows, "precision": "fp32", "schedule": "linear",
        "warmup_ratio": 0.1, "weight_decay": 0.0, "logging_every": 20, **settings,
        **({} if is_online else task.recipe),
    }  # fmt: skip
    seconds_each = {}
    few, many = 3, 15 if is_online else 43  # the difference is of steps alone
    for steps in (few, few, many):  # the first also imports
        place = out / f"{name}-trial"
        started = time.process_time()
        diptych.train(**own, out=place, max_steps=steps, eval_batch_size=64, save_every=10**6)
        seconds_each[steps] = time.process_time() - started
        shutil.rmtree(place)
    step_seconds = max(1e-3, (seconds_each[many] - seconds_each[few]) / (many - few))
    steps = 12 if smoke else max(20, round(seconds["all" if method == "supervised" else "tuning"] / step_seconds))
    place = out / name
    shutil.rmtree(place, ignore_errors=True)
    run = diptych.train(
        **own, out=place, max_steps=steps, eval_every=-(-steps // POINTS), save_every=10**6, keep_last=1,
        metrics=task.metric, metrics_limit=1000, best_metric=task.metric, eval_batch_size=64,
    )  # fmt: skip
    report = out / f"{name}-test.json"
    report.unlink(missing_ok=True)
    of_test = {"split": "test", "metrics": task.metric, "batch_size": 64, "limit": 100 if smoke else None}
    diptych.evaluate(run.final, data["rows"], **of_test, out=report)
    best = [line[task.metric] for line in run.figures if line["split"] == "validation"]
    found = {"method": method, "rate": rate, "seed": seed, "steps": steps, "step_seconds": step_seconds}
    if is_online:
        found["sampling"] = share_of_sampling([line for line in run.figures if line["split"] == "train"])
    found |= {"validation": (min if task.metric == "token_error_rate" else max)(best), "report": str(report)}
    kept.write_text(json.dumps(found))
    return found


def share_of_sampling(lines: list[dict[str, Any]]) -> float:
    tokens = [0, *(line["tokens"] for line in lines)]
    seconds = sum((tokens[place + 1] - tokens[place]) / it["tokens_per_second"] for place, it in enumerate(lines))
    return sum(line["sampling_seconds"] for line in lines) / seconds


def table(name: str, task: Task, first: Path, runs: list[dict[str, Any]], sampling: float, seconds: float) -> str:
    a = load_side(str(first)).reports["test"]
    lines = [
        f"{name}: {task.metric} of the test split, first model {a.content['figures'][task.metric]:.2f}; {seconds:.0f}"
        f" CPU seconds each, sampling and ranking {sampling:.0f}",
        "| method | rate | steps | seconds a step | of it sampling | test, mean of seeds | difference from the first"
        " model, by seed |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(run["method"] for run in runs):
        tests, figures, own = [], [], [run for run in runs if run["method"] == method and run["is_best"]]
        sampled = f"{own[0]['sampling']:.0%}" if "sampling" in own[0] else "–"
        for run in own:
            b = load_side(run["report"]).reports["test"]
            test = compare_reports(a, b, CompareSettings(str(first), run["report"])).tests[task.metric]
            figures.append(b.content["figures"][task.metric])
            tests.append(f"{test.b - test.a:+.2f} [{test.low:+.2f}, {test.high:+.2f}]")
        lines.append(
            f"| {method} | {own[0]['rate']:g} | {own[0]['steps']} | {own[0]['step_seconds']:.2f} | "
            f"{sampled} | {sum(figures) / len(figures):.2f} | {'; '.join(tests)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--methods", nargs="*", default=["supervised", *ONLINE, *PAIRED])
    parser.add_argument("--seconds", type=float, default=90, help="CPU seconds of each run's steps")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at the same time, a core each")
    parser.add_argument("--smoke", action="store_true", help="every part, small: its figures mean nothing")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in options.tasks:
        task, folder = TASKS[name], options.out / name
        folder.mkdir(parents=True, exist_ok=True)
        rows, model = first_model(task, folder, options.smoke)
        first = folder / "first-test.json"
        if not first.is_file():
            of_test = {"split": "test", "metrics": task.metric, "limit": 100 if options.smoke else None}
            diptych.evaluate(model, rows, **of_test, batch_size=64, out=first)
        pairs, sampling = pairs_of(task, rows, model, folder, options.smoke)
        data = {"rows": rows, "pairs": with_validation(pairs, rows, folder)}
        seconds = {"tuning": options.seconds, "all": options.seconds + sampling}
        one = partial(train, task=task, data=data, model=model, out=folder, seconds=seconds, smoke=options.smoke)
        with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
            tried = [
                (method, rate, SEEDS[0])
                for method in options.methods
                for rate in task.rates[method][: 1 if options.smoke else None]
            ]
            runs = list(pool.map(one, tried))
            pick = min if task.metric == "token_error_rate" else max
            best = {
                method: pick((run for run in runs if run["method"] == method), key=lambda run: run["validation"])[
                    "rate"
                ]
                for method in options.methods
            }
            runs += pool.map(one, [(method, best[method], seed) for method in options.methods for seed in SEEDS[1:]])
        for run in runs:
            run["is_best"] = run["rate"] == best[run["method"]]
        print(table(name, task, first, runs, sampling, options.seconds), flush=True)


if __name__ == "__main__":
    main()
