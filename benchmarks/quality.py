"""How soon and how well a Diptych, a T5 and a BART learn the same rows from scratch: equal weights, equal real tokens.

    python benchmarks/quality.py --out quality --codealpaca codealpaca_2k.json      two cores, two to three hours
    python benchmarks/quality.py --out smoke --smoke                                all of it, a few minutes

Tasks: pronunciation (CMU's dictionary), English to Korean (Tatoeba's pairs), and with --codealpaca instructions for
code. The three models have the same tokenizer, width, depth (3 + 2 layers) and heads, and feed-forward widths with
which they have equally many weights. They train on the same packed rows in the same order, through our loop. The
learning rate of each is the best of three by validation loss with the first seed, and of others beyond these while the
best is at an end of what was tried; the other seeds train with it. Each run takes about 1.1 million tokens.

Printed for each task: the lowest validation loss (mean over the seeds ± half their range), metrics of the test split
with their intervals (first seed, the checkpoint with that loss), and the tokens and seconds until T5's lowest loss, as
shares of T5's own. Seconds are those of one core. Finished runs in --out are not repeated.
"""

import argparse
import json
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, PretrainedConfig

import diptych

WIDTH, HEADS, ENCODER_LAYERS, DECODER_LAYERS = 192, 6, 3, 2
MODELS, RATES, SEEDS, POINTS = ("diptych", "t5", "bart"), (5e-4, 1e-3, 2e-3), (0, 1, 2), 20


@dataclass(frozen=True)
class Task:
    data: str
    metrics: str
    steps: int
    batch_size: int
    """Packed rows in a step: some 2,000 tokens."""
    vocabulary: int
    prepare: dict[str, Any]


def tasks(codealpaca: Path | None) -> dict[str, Task]:
    short = {"split_by": "source", "packed_source_tokens": 60, "packed_target_tokens": 56}
    found = {
        "pronunciation": Task("cmudict", "token_error_rate,exact_match", 600, 16, 400, short),
        "korean": Task("tatoeba", "chrf", 600, 4, 4000, {}),
    }
    if codealpaca:
        found["code"] = Task(str(codealpaca), "chrf,rouge", 500, 2, 4000, {"template": "alpaca"})
    return found


def prepared(task: Task, folder: Path) -> Path:
    settings = {"template": "translate", "validation_fraction": 0.03, "test_fraction": 0.05} | task.prepare
    diptych.prepare(
        task.data,
        out=folder,
        train_tokenizer="bpe",
        vocab_size=task.vocabulary,
        **settings,
    )
    return folder


def config_of(kind: str, tokenizer: Any, feed_forward: int) -> PretrainedConfig:
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids |= {"decoder_start_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
    if kind == "diptych":
        return diptych.DiptychConfig(
            hidden_size=WIDTH,
            intermediate_size=feed_forward,
            num_attention_heads=HEADS,
            head_dim=WIDTH // HEADS,
            encoder={"num_hidden_layers": ENCODER_LAYERS},
            decoder={"num_hidden_layers": DECODER_LAYERS},
            **ids,
        )
    if kind == "t5":  # the first T5, with its dropout
        sizes = {"d_model": WIDTH, "d_kv": WIDTH // HEADS, "d_ff": feed_forward, "num_heads": HEADS}
        layers = {"num_layers": ENCODER_LAYERS, "num_decoder_layers": DECODER_LAYERS}
        return AutoConfig.for_model("t5", dropout_rate=0.0, **sizes, **layers, **ids)
    sizes = {"d_model": WIDTH, "encoder_ffn_dim": feed_forward, "decoder_ffn_dim": feed_forward, "dropout": 0.0}
    sizes |= {"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "forced_eos_token_id": None}
    return AutoConfig.for_model(
        "bart",
        encoder_layers=ENCODER_LAYERS,
        decoder_layers=DECODER_LAYERS,
        max_position_embeddings=512,
        **sizes,
        **ids,
    )


def weights_of(config: PretrainedConfig) -> int:
    with torch.device("meta"):
        return sum(weight.numel() for weight in AutoModelForSeq2SeqLM.from_config(config).parameters())


def equal_configs(tokenizer: Any) -> dict[str, PretrainedConfig]:
    """With the number of weights of a Diptych whose feed-forward layers are 512 wide, as near as steps of 8 come."""
    goal = weights_of(config_of("diptych", tokenizer, 512))
    return {
        kind: min(
            (config_of(kind, tokenizer, width) for width in range(256, 1200, 8)),
            key=lambda config: abs(weights_of(config) - goal),
        )
        for kind in MODELS
    }


def train(job: tuple[str, float, int], task: Task, data: Path, out: Path, steps: int) -> dict[str, Any]:
    """One run; what it measured is kept beside it."""
    kind, rate, seed = job
    name = f"{kind}-{rate:g}-{seed}"
    kept = out / f"{name}.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    config, model = equal_configs(tokenizer)[kind], out / f"{name}-start"
    torch.manual_seed(seed)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    run = diptych.train(
        model=model,
        data=data,
        out=out / name,
        max_steps=steps,
        batch_size=task.batch_size,
        learning_rate=rate,
        schedule="linear",
        warmup_ratio=0.05,
        betas=[0.9, 0.98],
        weight_decay=0.0,
        precision="fp32",
        seed=seed,
        eval_every=max(1, steps // POINTS),
        save_every=steps,
        keep_last=1,
        logging_every=max(1, steps // POINTS),
        resume=(out / name).exists(),
    )
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["split"] == "train"]
    seconds = 0.0
    clock = {0: 0.0}
    for before, line in zip([{"step": 0, "tokens": 0}, *trained], trained, strict=False):
        seconds += (line["tokens"] - before["tokens"]) / line["tokens_per_second"]
        clock[line["step"]] = seconds
    tokens = {line["step"]: line["tokens"] for line in trained}
    curve = [
        (line["step"], tokens[line["step"]], clock[line["step"]], line["loss"])
        for line in lines
        if line["split"] == "validation"
    ]
    found = {"model": kind, "rate": rate, "seed": seed, "weights": weights_of(config), "curve": curve}
    if seed == SEEDS[0]:
        report = diptych.evaluate(run, data, metrics=task.metrics, batch_size=64, limit=2000)
        found |= {"figures": dict(report.figures), "intervals": dict(report.intervals)}
    kept.write_text(json.dumps(found))
    return found


def lowest(run: dict[str, Any]) -> tuple[int, int, float, float]:
    """Step, tokens, seconds and validation loss, where that is lowest."""
    return min(run["curve"], key=lambda point: point[3])


def best_rate(kind: str, runs: list[dict[str, Any]]) -> float:
    return min((run for run in runs if run["model"] == kind), key=lambda run: lowest(run)[3])["rate"]


def beyond(best: dict[str, float], runs: list[dict[str, Any]]) -> list[tuple[str, float, int]]:
    """Half or twice the best rate of each model, if that is the lowest or the highest that was tried."""
    jobs = []
    for kind, rate in best.items():
        tried = [run["rate"] for run in runs if run["model"] == kind]
        if rate in (min(tried), max(tried)):
            jobs.append((kind, rate / 2 if rate == min(tried) else rate * 2, SEEDS[0]))
    return jobs


def until(curve: list[list[float]], goal: float) -> tuple[float, float] | None:
    """Tokens and seconds at which a loss is reached, on the line between two measurements; None if it never is."""
    before = None
    for _, tokens, seconds, loss in curve:
        if loss <= goal:
            if before is None:
                return tokens, seconds
            share = (before[3] - goal) / (before[3] - loss)
            return before[1] + share * (tokens - before[1]), before[2] + share * (seconds - before[2])
        before = (0, tokens, seconds, loss)
    return None


def table(name: str, runs: list[dict[str, Any]]) -> str:
    """Of a task: one line for each model."""
    t5 = [run for run in runs if run["model"] == "t5" and run["is_best"]]
    goal = statistics.fmean(lowest(run)[3] for run in t5)
    whole = [statistics.fmean(lowest(run)[place] for run in t5) for place in (1, 2)]
    lines = [
        f"{name}: loss in nats per target token; × is a share of T5's {whole[0]:,.0f} tokens and {whole[1]:.0f} s",
        "| model | weights | rate (losses of all) | lowest loss | tokens to T5's lowest | seconds | test split |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in MODELS:
        of_kind = [run for run in runs if run["model"] == kind]
        best = [run for run in of_kind if run["is_best"]]
        ends = [lowest(run)[3] for run in best]
        tried = ", ".join(f"{run['rate']:g}: {lowest(run)[3]:.3f}" for run in of_kind if run["seed"] == SEEDS[0])
        reached = [until(run["curve"], goal) for run in best]
        shares = [
            f"{statistics.fmean(it[place] for it in reached) / whole[place]:.2f} ×" if all(reached) else "not by all"
            for place in (0, 1)
        ]
        first = next(run for run in best if run["seed"] == SEEDS[0])
        figures = ", ".join(
            f"{metric} {first['figures'][metric]:.1f} [{low:.1f}, {high:.1f}]"
            for metric, (low, high) in first["intervals"].items()
            if metric != "loss"
        )
        spread = (max(ends) - min(ends)) / 2
        lines.append(
            f"| {kind} | {best[0]['weights']:,} | {best[0]['rate']:g} ({tried}) | {statistics.fmean(ends):.3f} ± "
            f"{spread:.3f} | {shares[0]} | {shares[1]} | {figures} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--codealpaca", type=Path, help="Alpaca rows, JSON")
    parser.add_argument("--tasks", nargs="*", help="some of them")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at the same time, a core each")
    parser.add_argument("--smoke", action="store_true", help="every part, small: its figures mean nothing")
    settings = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(settings.workers, mp_context=get_context("spawn")) as pool:
        for name, task in tasks(settings.codealpaca).items():
            if settings.tasks and name not in settings.tasks:
                continue
            data, out = prepared(task, settings.out / f"{name}-data"), settings.out / name
            out.mkdir(parents=True, exist_ok=True)
            one = partial(train, task=task, data=data, out=out, steps=POINTS if settings.smoke else task.steps)
            jobs, runs = [(kind, rate, SEEDS[0]) for kind in MODELS for rate in RATES], []
            while jobs:
                runs += pool.map(one, jobs)
                best = {kind: best_rate(kind, runs) for kind in MODELS}
                jobs = [] if settings.smoke else beyond(best, runs)
            runs += list(pool.map(one, [(kind, best[kind], seed) for seed in SEEDS[1:] for kind in MODELS]))
            for run in runs:
                run["is_best"] = run["rate"] == best[run["model"]]
            print(table(name, runs), flush=True)


if __name__ == "__main__":
    main()
