"""Training throughput, side by side in one run: transformers' Seq2SeqTrainer against Diptych's loop on packed rows.

    python benchmarks/train_throughput.py --data rows.json                       60M on a CPU, about half an hour
    python benchmarks/train_throughput.py --data rows.json --size base --batch 32 --tokens 2000000       on a GPU

Each measurement is a process of its own, and the sides take turns, so that a slow minute of the machine meets them
all. All train in bf16, with dropout, on the same prepared rows (at most 512 + 512 tokens), from the same random
weights of a family, at the same constant learning rate, on about as many examples a step: --batch for the Trainer, and
as many packed rows as hold so many. What counts is real tokens a second, source and target, padding left out, once the
first --warmup steps are done; and the loss after the same number of them: faster by being wrong does not count.

    trainer              Seq2SeqTrainer as it comes: random batches, padded to the longest
    trainer, grouped     with train_sampling_strategy="group_by_length"
    … same allocator     with glibc told to keep its pages, as Diptych's loop tells it
    packed trainer       diptych.PackedSeq2SeqTrainer: the Trainer's loop with packed rows and our loss
    packed               `diptych train`
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

SIZES = {
    "small": {"d": 512, "layers": 6, "heads": 8, "t5_ff": 2048, "diptych_ff": 1408},
    "base": {"d": 768, "layers": 12, "heads": 12, "t5_ff": 3072, "diptych_ff": 2048},
    "large": {"d": 1024, "layers": 24, "heads": 16, "t5_ff": 4096, "diptych_ff": 2816},
}
VOCABULARY = 32128  # T5's own; the tokenizer that is trained on the data has fewer
SAME_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
SIDES = {
    "trainer, T5": ("t5", "trainer", {}),
    "trainer, T5, grouped": ("t5", "grouped", {}),
    "trainer, BART": ("bart", "trainer", {}),
    "trainer, BART, grouped": ("bart", "grouped", {}),
    "trainer, T5, same allocator": ("t5", "trainer", SAME_ALLOCATOR),
    "trainer, T5, grouped, same allocator": ("t5", "grouped", SAME_ALLOCATOR),
    "packed trainer, T5": ("t5", "packed trainer", {}),
    "packed trainer, T5, same allocator": ("t5", "packed trainer", SAME_ALLOCATOR),
    "packed trainer, BART": ("bart", "packed trainer", {}),
    "packed T5": ("t5", "packed", {}),
    "packed BART": ("bart", "packed", {}),
    "packed Diptych": ("diptych", "packed", {}),
}
LEARNING_RATE = 3e-4


def make_model(family: str, size: str, folder: Path) -> None:
    """Random weights, the same ones for every side that trains this family."""
    import torch
    from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

    from diptych.modeling import DiptychConfig, DiptychForConditionalGeneration

    torch.manual_seed(0)
    shape = SIZES[size]
    ids = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    if family == "t5":
        depth = {"num_layers": shape["layers"], "num_heads": shape["heads"]}
        config = T5Config(d_model=shape["d"], d_kv=64, d_ff=shape["t5_ff"], **depth, **ids)
        model = T5ForConditionalGeneration(config)
    elif family == "bart":
        panels = {f"{panel}_layers": shape["layers"] for panel in ("encoder", "decoder")}
        panels |= {f"{panel}_attention_heads": shape["heads"] for panel in ("encoder", "decoder")}
        panels |= {f"{panel}_ffn_dim": shape["t5_ff"] for panel in ("encoder", "decoder")}
        config = BartConfig(d_model=shape["d"], **panels, **ids, bos_token_id=2, forced_eos_token_id=None)
        model = BartForConditionalGeneration(config)
    else:
        config = DiptychConfig(
            hidden_size=shape["d"],
            intermediate_size=shape["diptych_ff"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            initializer_range=shape["d"] ** -0.5,
            residual_dropout=0.1,
            **ids,
        )
        model = DiptychForConditionalGeneration(config)
    model.save_pretrained(folder)


def prepare_data(data: str, folder: Path) -> dict:
    from diptych.data_prep.pipeline.prepare_settings import PrepareSettings
    from diptych.data_prep.prepare import prepare

    prepare(PrepareSettings(data=[data], train_tokenizer="bpe", out=str(folder), test_fraction=0.0))
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def packing_of(data: Path) -> dict:
    return json.loads((data / "manifest.json").read_text(encoding="utf-8"))["packing"]


def packed_rows_of(data: Path, examples: int) -> int:
    """How many packed rows hold about so many examples."""
    packing = packing_of(data)
    return max(1, round(examples * packing["rows"] / packing["examples"]))


def run_trainer(model: Path, data: Path, way: str, batch: int, tokens: int) -> list[tuple[int, int, float, float]]:
    """Seq2SeqTrainer at its defaults, or ours. For each step: real tokens, tokens with padding, seconds, loss."""
    import datasets
    import torch
    from transformers import (
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Seq2SeqTrainer,
        TrainerCallback,
    )
    from transformers import Seq2SeqTrainingArguments as Arguments

    from diptych.finetune.training.packed_trainer import PackedSeq2SeqTrainer

    rows = datasets.load_from_disk(data)["train"].select_columns(["input_ids", "labels"])
    each = sum(map(len, rows["input_ids"][:])) + sum(map(len, rows["labels"][:]))
    max_steps = -(-tokens * len(rows) // (each * batch))
    is_packed = way == "packed trainer"
    if is_packed:
        batch = packed_rows_of(data, batch)
    steps, seen = [], []

    class Counting(PackedSeq2SeqTrainer if is_packed else Seq2SeqTrainer):
        def training_step(self, module, inputs, num_items_in_batch=None):
            source = inputs["segment_ids"] > 0 if is_packed else inputs["attention_mask"]
            seen.append(int(source.sum() + (inputs["labels"] != -100).sum()))
            seen.append(inputs["input_ids"].numel() + inputs["labels"].numel())
            loss = super().training_step(module, inputs, num_items_in_batch)
            seen.append(loss.item())
            return loss

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            real, padded, loss = seen[-3:]
            steps.append((real, padded, time.perf_counter() - self.started, loss))

    network = AutoModelForSeq2SeqLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    arguments = Arguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        max_steps=max_steps,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        train_sampling_strategy="group_by_length" if way == "grouped" else "random",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    made = {} if is_packed else {"data_collator": DataCollatorForSeq2Seq(tokenizer, model=network)}
    Counting(network, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[Clock()], **made).train()
    return steps


def run_packed(model: Path, data: Path, batch: int, tokens: int) -> list[tuple[int, int, float, float]]:
    """`diptych train`. For each step the same four figures, from its own log."""
    from diptych.finetune.commands.cli import run

    packing, rows = packing_of(data), packed_rows_of(data, batch)
    real = (
        packing["max_source_tokens"] * packing["source_fill"] + packing["max_target_tokens"] * packing["target_fill"]
    )
    out = Path(tempfile.mkdtemp()) / "run"
    settings = {
        "model": model, "data": data, "out": out, "batch_size": rows, "max_steps": -(-tokens // round(rows * real)),
        "precision": "bf16", "learning_rate": LEARNING_RATE, "schedule": "constant", "logging_every": 1,
        "eval_every": 10**6, "save_every": 10**6, "final": "last",
    }  # fmt: skip
    code = run("train", [word for name, value in settings.items() for word in (f"--{name}", str(value))])
    assert code == 0
    steps, before = [], 0
    for entry in map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()):
        if entry["split"] == "train":
            count = entry["tokens"] - before
            before = entry["tokens"]
            steps.append((count, round(count / entry["fill"]), count / entry["tokens_per_second"], entry["loss"]))
    return steps


def measure(side: str, models: Path, data: Path, batch: int, tokens: int, warmup: int) -> dict:
    """One process: figures of one run."""
    import torch
    from transformers import AutoModelForSeq2SeqLM

    from diptych.finetune.training.throughput import cost_per_token, matmul_peak, peak_memory

    family, way, _ = SIDES[side]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = AutoModelForSeq2SeqLM.from_pretrained(models / family)
    work, weights = cost_per_token(network), sum(weight.numel() for weight in network.parameters())
    del network
    peak = matmul_peak(device, torch.bfloat16, seconds=1.0)
    model = models / family
    steps = run_packed(model, data, batch, tokens) if way == "packed" else run_trainer(model, data, way, batch, tokens)
    measured = steps[warmup:]
    real, seconds = sum(step[0] for step in measured), sum(step[2] for step in measured)
    per_token = (work.source + work.target) / 2  # about as many source as target tokens
    last = steps[-max(1, len(steps) // 5) :]
    return {
        "side": side, "weights": weights, "tokens_per_second": real / seconds, "tokens": sum(s[0] for s in steps),
        "fill": real / sum(step[1] for step in measured), "mfu": real / seconds * per_token / peak,
        "peak_flops": peak, "memory_bytes": peak_memory(device), "steps": len(steps),
        "loss": statistics.fmean(step[3] for step in last), "tokens_per_step": sum(s[0] for s in steps) / len(steps),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a file of instruction rows, such as CodeAlpaca's json")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, default=8, help="examples a step; the Trainer's default is 8")
    parser.add_argument("--warmup", type=int, default=15, help="steps that are not timed")
    parser.add_argument("--tokens", type=int, default=40_000, help="real tokens that each run trains on")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=SIDES)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.measure:
        side, models, data = settings.measure
        print(json.dumps(measure(side, Path(models), Path(data), settings.batch, settings.tokens, settings.warmup)))
        return
    with tempfile.TemporaryDirectory() as folder:
        models, data = Path(folder) / "models", Path(folder) / "data"
        prepare_data(settings.data, data)
        for family in {SIDES[side][0] for side in settings.sides}:
            make_model(family, settings.size, models / family)
        results = {side: [] for side in settings.sides}
        for _ in range(settings.repeats):
            for side in settings.sides:
                results[side].append(in_a_process(side, models, data, settings))
                print(f"{side:40} {results[side][-1]['tokens_per_second']:10,.0f} tokens/s", flush=True)
    print(table(results))
    print(json.dumps(results))


def in_a_process(side: str, models: Path, data: Path, settings: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--data", settings.data, "--batch", str(settings.batch)]
    command += [
        "--tokens",
        str(settings.tokens),
        "--warmup",
        str(settings.warmup),
        "--measure",
        side,
        str(models),
        str(data),
    ]
    done = subprocess.run(command, env=os.environ | SIDES[side][2], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(results: dict[str, list[dict]]) -> str:
    """Medians; ratios to the Trainer on T5, as it comes and with the same allocator."""
    pace = {side: statistics.median(run["tokens_per_second"] for run in runs) for side, runs in results.items()}
    lines = [
        "| side | weights | tokens/s | × trainer, T5 | × same allocator | fill | MFU | memory | loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for side, runs in results.items():
        middle = {name: statistics.median(run[name] for run in runs) for name in runs[0] if name != "side"}
        ratios = [
            f"{pace[side] / pace[base]:.2f}" if base in pace else "–"
            for base in ("trainer, T5", "trainer, T5, same allocator")
        ]
        cells = [side, f"{middle['weights'] / 1e6:.0f}M", f"{pace[side]:,.0f}", *ratios, f"{middle['fill']:.0%}"]
        cells += [f"{middle['mfu']:.0%}", f"{middle['memory_bytes'] / 1e9:.1f} GB", f"{middle['loss']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    first = next(iter(results.values()))[0]
    return "\n".join([*lines, f"peak of a matrix product, bf16: {first['peak_flops'] / 1e9:,.0f} GFLOP/s"])


if __name__ == "__main__":
    main()
