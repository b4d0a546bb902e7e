"""An LLM as an encoder-decoder: which way of making one keeps what it knows, how soon each learns instructions, and
where it then writes faster than the LLM.

    python benchmarks/adaptation.py --data codealpaca_2k.json --plot adaptation.png       two cores, about half an hour
    python benchmarks/adaptation.py --data codealpaca_2k.json --smoke                               all of it, a minute

One small decoder-only LM (Qwen3's blocks, byte-level BPE of its own) is trained on Python's standard library, its
docstrings and its language reference. Each method makes a model of it, and each model is tuned on the same pairs, in
the same order and batches, for as many target tokens, with the loss on the targets alone:

    lm                 the LM itself; source and target are one text. What a pair has to reach
    merged causal      the merged hinge, the encoder causal: the LM, computed in two panels
    merged             the same with a bidirectional encoder
    separate copied    cross-attention begins as a copy of self-attention (T5Gemma, arXiv 2504.06225)
    separate zeroed    … and writes nothing at first
    separate warmed    cross-attention is random, and for the first quarter of the steps trained alone
    scratch            the same encoder-decoder with random weights

The learning rate is the best of three for each method, by the loss on a validation part after a quarter of the steps
with the first seed; it is constant after ten steps, so that each point of a curve is what a run of that length gives.
Seeds differ in the order of the data and in what is random in a model; the LM is one. Each core tunes a model of its
own.

Printed: held-out loss, exact match and token F1 of greedy outputs, target tokens until the tuned LM's loss is reached
(between two measurements: on the line between them), as means over the seeds ± half their range; then the seconds of
greedy writing, with caches and random weights of a larger size, medians of runs that take turns.
"""

import argparse
import copy
import json
import multiprocessing
import os
import random
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config
from transformers.utils import logging

from diptych.finetune.evaluating.metrics import compute_metrics
from diptych.finetune.model.device_speed import keep_memory
from diptych.finetune.model.donor_llm import DonorWeights
from diptych.finetune.pairing.paired_weights import evenly_spaced, paired_config, weight_origins
from diptych.finetune.training.starting_model import train_cross_attention_alone
from diptych.modeling import DiptychForConditionalGeneration

Pair = tuple[list[int], list[int]]
"""Source and target, which ends with END."""
Curve = list[tuple[int, int, float]]
"""(step, target tokens seen, held-out loss), from step 0 on."""

PAD, END = 0, 1
METHODS = (
    "lm",
    "merged causal",
    "merged",
    "separate copied",
    "separate zeroed",
    "separate warmed",
    "scratch",
)


@dataclass(frozen=True)
class Shape:
    """Of an LM."""

    vocabulary: int
    width: int
    layers: int


@dataclass(frozen=True)
class Size:
    """How much is done."""

    files: int | None = None
    """Of the standard library; all if None."""
    lm: Shape = Shape(vocabulary=4096, width=256, layers=4)
    lm_batch: tuple[int, int] = (16, 256)
    """Rows, and the tokens of each."""
    lm_steps: int = 600
    longest: int = 96
    """Tokens of a source, and of a target; longer pairs are left out."""
    batch: int = 8
    """Pairs."""
    steps: int = 320
    seeds: int = 3
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    validation: int = 100
    """Pairs that choose the learning rate."""
    held_out: int = 200
    """Pairs that the loss is measured on."""
    written: int = 100
    """Of them, the pairs whose outputs are written and compared."""
    large: Shape = Shape(vocabulary=8192, width=640, layers=12)
    """The latency's LM: 64 million weights."""
    sources: tuple[int, ...] = (64, 256, 1024, 2048)
    batches: tuple[int, ...] = (1, 8)
    output: int = 64
    repeats: int = 3


FULL = Size()
SMOKE = replace(
    FULL,
    files=60,
    lm_steps=4,
    longest=32,
    steps=16,
    seeds=2,
    rates=(1e-3,),
    validation=8,
    held_out=16,
    written=4,
    large=Shape(vocabulary=4096, width=128, layers=4),
    sources=(64,),
    repeats=1,
)
"""Every part of the program; its figures mean nothing."""


def corpus(most: int | None) -> list[str]:
    """The files of Python's standard library as it is installed here (PSF licence), in a random order. Among them is
    pydoc_data/topics.py, the language reference; tests and tables of encodings are left out."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [file.relative_to(folder) for file in sorted(folder.rglob("*.py"))]
    left_out = ("test", "site-packages", "encodings")
    files = [file for file in files if not any(word in str(file) for word in left_out)]
    random.Random(0).shuffle(files)
    return [(folder / file).read_text(encoding="utf-8", errors="replace") for file in files[:most]]


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def read_pairs(file: Path, tokenizer: Tokenizer, start: int, longest: int) -> list[Pair]:
    """Alpaca rows in a random order. A source does not end with the line's end: that is `start`, the target's first
    input."""
    found = []
    for row in json.loads(file.read_text(encoding="utf-8")):
        asked = f"{row['instruction']}\n{row['input']}".strip()
        source, target = tokenizer.encode(asked).ids, [*tokenizer.encode(row["output"].strip()).ids, END]
        if len(source) <= longest and 2 <= len(target) <= longest:
            found.append((source, target))
    random.Random(0).shuffle(found)
    return found


def lm_config(shape: Shape) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=3 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // 64,
        num_key_value_heads=shape.width // 128,
        head_dim=64,
        initializer_range=shape.width**-0.5,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
    )


def train_lm(texts: list[list[int]], size: Size) -> PreTrainedModel:
    """AdamW, a learning rate that falls to nothing. A fiftieth of the files is kept for the loss."""
    torch.manual_seed(0)
    rows, context = size.lm_batch
    kept = max(1, len(texts) // 50)
    read, unread = (torch.tensor([token for text in part for token in text]) for part in (texts[kept:], texts[:kept]))
    model = AutoModelForCausalLM.from_config(lm_config(size.lm), dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.1)
    losses = []
    for step in range(1, size.lm_steps + 1):
        ids = torch.stack([read[place : place + context] for place in torch.randint(len(read) - context, (rows,))])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        update(model, optimizer, 2e-3 * min(step / 50, 1 - (step - 1) / size.lm_steps))
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"LM, step {step}/{size.lm_steps}  loss {statistics.fmean(losses[-100:]):.3f}", flush=True)
    model.eval()
    with torch.no_grad():
        unread = unread[: len(unread) // context * context].view(-1, context)[:160]
        loss = statistics.fmean(model(input_ids=row, labels=row).loss.item() for row in unread.split(1))
    seen, weights = size.lm_steps * rows * context, sum(weight.numel() for weight in model.parameters())
    print(f"LM: {weights:,} weights, {seen:,} tokens of {len(read):,}; {loss:.3f} nats/token on unread files")
    return model


def update(model: PreTrainedModel, optimizer: torch.optim.Optimizer, rate: float) -> None:
    clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()


def make(method: str, lm: PreTrainedModel, folder: Path, start: int, seed: int) -> PreTrainedModel:
    """What a method begins with. `folder` is where the LM is saved."""
    if method == "lm":
        return copy.deepcopy(lm)
    hinge = "merged" if method.startswith("merged") else "separate"
    lookahead = 0 if method == "merged causal" else None
    special = {"pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": start}
    config = paired_config(lm.config, lm.config, hinge, lookahead=lookahead, **special)
    if method == "scratch":
        torch.manual_seed(seed)
        return DiptychForConditionalGeneration(config)
    init = {"separate warmed": "fresh", "separate zeroed": "zeroed"}.get(method, "copied")
    weights, generator = DonorWeights([folder / "model.safetensors"]), torch.Generator().manual_seed(seed)
    origins = weight_origins(config, weights, weights, cross_attention_init=init)
    state = {origin.name: origin.tensor(torch.float32, generator) for origin in origins}
    return DiptychForConditionalGeneration.from_pretrained(None, config=config, state_dict=state)


def summed_loss(model: PreTrainedModel, rows: list[Pair], start: int) -> torch.Tensor:
    """Nats, summed over the target tokens; padded on the right."""
    count = sum(len(target) for _, target in rows)
    if model.config.is_encoder_decoder:
        sources = [torch.tensor(source) for source, _ in rows]
        loss = model(
            input_ids=pad_sequence(sources, True, PAD),
            attention_mask=pad_sequence([torch.ones_like(source) for source in sources], True, 0),
            decoder_input_ids=pad_sequence([torch.tensor([start, *target[:-1]]) for _, target in rows], True, PAD),
            labels=pad_sequence([torch.tensor(target) for _, target in rows], True, -100),
        ).loss
    else:  # the library shifts by itself
        texts = [torch.tensor([*source, start, *target]) for source, target in rows]
        labels = [torch.tensor([-100] * (len(source) + 1) + target) for source, target in rows]
        loss = model(input_ids=pad_sequence(texts, True, PAD), labels=pad_sequence(labels, True, -100)).loss
    return loss * count


@torch.no_grad()
def mean_loss(model: PreTrainedModel, rows: list[Pair], start: int) -> float:
    """Nats a target token."""
    model.eval()
    rows = sorted(rows, key=lambda pair: len(pair[0]) + len(pair[1]))
    nats = sum(summed_loss(model, rows[place : place + 25], start).item() for place in range(0, len(rows), 25))
    return nats / sum(len(target) for _, target in rows)


def batches(rows: list[Pair], count: int, seed: int) -> Iterator[list[Pair]]:
    """Without end, epoch after epoch. What lies in one batch is about equally long, so that little is padding."""
    generator = random.Random(seed)
    while True:
        order = generator.sample(rows, len(rows))
        for place in range(0, len(order), 16 * count):
            chunk = sorted(order[place : place + 16 * count], key=lambda pair: (len(pair[1]), len(pair[0])))
            cut = [chunk[place : place + count] for place in range(0, len(chunk), count)]
            yield from generator.sample(cut, len(cut))


def tune(model, method: str, train: list[Pair], test: list[Pair], start: int, rate: float, size: Size, seed: int):
    """The `Curve`, measured at ever longer intervals."""
    steps = size.steps
    measured = {steps * part // 32 for part in (1, 2, 4, 8, 16, 24, 32)}
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    warm_up = steps // 4 if method == "separate warmed" else 0
    if warm_up:
        train_cross_attention_alone(model)
    curve, seen = [(0, 0, mean_loss(model, test, start))], 0
    for step, rows in zip(range(1, steps + 1), batches(train, size.batch, seed), strict=False):
        model.train()
        if step == warm_up + 1:
            model.requires_grad_(True)
        count = sum(len(target) for _, target in rows)
        (summed_loss(model, rows, start) / count).backward()
        update(model, optimizer, rate * min(1.0, step / 10))
        seen += count
        if step in measured:
            curve.append((step, seen, mean_loss(model, test, start)))
    return curve


@torch.no_grad()
def write(model: PreTrainedModel, tokenizer: Tokenizer, rows: list[Pair], start: int, most: int) -> dict[str, float]:
    """Exact match and token F1 of greedy outputs, in per cent."""
    model.eval()
    prompts = [source if model.config.is_encoder_decoder else [*source, start] for source, _ in rows]
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"max_new_tokens": most, "do_sample": False, "pad_token_id": PAD, "eos_token_id": END}
    written = model.generate(ids, attention_mask=mask, **settings)
    written = written[:, 1 if model.config.is_encoder_decoder else longest :]
    outputs = tokenizer.decode_batch(written.tolist(), skip_special_tokens=True)
    references = tokenizer.decode_batch([target for _, target in rows], skip_special_tokens=True)
    return compute_metrics(["exact_match", "token_f1"], outputs, [[reference] for reference in references])


@dataclass(frozen=True)
class Tuning:
    """What a core is given: everything that the runs have in common."""

    folder: Path
    """With the LM and its tokenizer."""
    start: int
    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]
    size: Size

    def of_rate(self, method: str, rate: float) -> float:
        """The loss on the validation part after a quarter of the steps."""
        size = replace(self.size, steps=self.size.steps // 4)
        return tune(self._model(method, 0), method, self.train, self.validation, self.start, rate, size, 0)[-1][2]

    def of_seed(self, method: str, rate: float, seed: int) -> dict:
        """The curve, and how the outputs score."""
        model = self._model(method, seed)
        curve = tune(model, method, self.train, self.test, self.start, rate, self.size, seed)
        tokenizer, rows = Tokenizer.from_file(str(self.folder / "tokenizer.json")), self.test[: self.size.written]
        weights = sum(weight.numel() for weight in model.parameters())
        scores = write(model, tokenizer, rows, self.start, self.size.longest)
        return {"weights": weights, "curve": curve, **scores}

    def _model(self, method: str, seed: int) -> PreTrainedModel:
        lm = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        return make(method, lm, self.folder, self.start, seed)


def prepare_core(threads: int) -> None:
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    keep_memory()


def tune_all(lm: PreTrainedModel, tokenizer: Tokenizer, pairs: list[Pair], start: int, size: Size) -> dict[str, dict]:
    judged = size.validation + size.held_out
    validation, test, train = pairs[: size.validation], pairs[size.validation : judged], pairs[judged:]
    targets = sum(len(target) for _, target in test)
    print(
        f"{len(train):,} pairs to tune on; {len(validation)} choose the rate; {len(test)}, {targets:,} tokens, judge"
    )
    spawn = multiprocessing.get_context("spawn")
    cores = ProcessPoolExecutor(os.cpu_count(), spawn, initializer=prepare_core, initargs=(1,))
    with tempfile.TemporaryDirectory() as folder, cores:
        lm.save_pretrained(folder)
        tokenizer.save(f"{folder}/tokenizer.json")
        tuning = Tuning(Path(folder), start, train, validation, test, size)
        tried = {
            method: {rate: cores.submit(tuning.of_rate, method, rate) for rate in size.rates} for method in METHODS
        }
        found = {}
        for method, runs in tried.items():
            losses = {rate: run.result() for rate, run in runs.items()}
            found[method] = {"rate": min(losses, key=losses.get), "rates": losses}
            print(f"{method}: {losses}", flush=True)
        tried = {
            method: [cores.submit(tuning.of_seed, method, result["rate"], seed) for seed in range(size.seeds)]
            for method, result in found.items()
        }
        for method, runs in tried.items():
            found[method]["runs"] = [run.result() for run in runs]
            print(json.dumps({method: found[method]}), flush=True)
    return found


def mean_curve(runs: list[dict]) -> list[tuple[float, float]]:
    """(target tokens, loss), means over the seeds."""
    points = zip(*(run["curve"] for run in runs), strict=True)
    return [tuple(statistics.fmean(run[value] for run in point) for value in (1, 2)) for point in points]


def tokens_until(goal: float, curve: list[tuple[float, float]]) -> float | None:
    """Target tokens until the loss is `goal`, on straight lines between measurements; None if it never is."""
    for (before, higher), (after, lower) in zip(curve, curve[1:], strict=False):
        if lower <= goal:
            return before + (after - before) * (higher - goal) / (higher - lower)
    return None


def spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.fmean(values):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"


def loss_table(found: dict[str, dict]) -> str:
    steps = [point[0] for point in found["lm"]["runs"][0]["curve"]]
    lines = [f"| method | weights | rate | {' | '.join(f'step {step}' for step in steps)} |"]
    lines.append("|---" * (len(steps) + 3) + "|")
    for method, result in found.items():
        losses = [[run["curve"][place][2] for run in result["runs"]] for place in range(len(steps))]
        cells = [
            method,
            f"{result['runs'][0]['weights'] / 1e6:.1f}M",
            f"{result['rate']:g}",
            *(spread(it, 3) for it in losses),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def goal_table(found: dict[str, dict]) -> str:
    """Tokens to where the tuned LM was at half of its steps, and at their end; and how well each writes."""
    lm = mean_curve(found["lm"]["runs"])
    half = found["lm"]["runs"][0]["curve"][-1][0] // 2
    at_half = next(place for place, point in enumerate(found["lm"]["runs"][0]["curve"]) if point[0] == half)
    goals = (lm[at_half][1], lm[-1][1])
    lines = [f"| method | tokens to {goals[0]:.3f} | tokens to {goals[1]:.3f} | exact match, % | token F1, % |"]
    lines.append("|---" * 5 + "|")
    for method, result in found.items():
        curve = mean_curve(result["runs"])
        reached = [tokens_until(goal, curve) for goal in goals]
        cells = [method, *("not reached" if tokens is None else f"{tokens:,.0f}" for tokens in reached)]
        cells += [spread([run[name] for run in result["runs"]], 1) for name in ("exact_match", "token_f1")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: dict[str, dict], file: Path) -> None:
    """On the left all of it; on the right what lies near the tuned LM."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    goal = mean_curve(found["lm"]["runs"])[-1][1]
    figure, (whole, near) = pyplot.subplots(1, 2, figsize=(12, 5.2), layout="constrained")
    for axes in (whole, near):
        for (method, result), marker in zip(found.items(), "os^Dv*X", strict=True):
            tokens, means = zip(*mean_curve(result["runs"]), strict=True)
            losses = list(zip(*([point[2] for point in run["curve"]] for run in result["runs"]), strict=True))
            thousands = [count / 1000 for count in tokens]
            (line,) = axes.plot(thousands, means, marker=marker, markersize=5, linewidth=1.4, label=method)
            band = [min(loss) for loss in losses], [max(loss) for loss in losses]
            axes.fill_between(thousands, *band, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.axhline(goal, color="black", linestyle="--", linewidth=1, label=f"the tuned LM at the end: {goal:.3f}")
        axes.set_xlabel("target tokens seen (thousands)")
        axes.grid(alpha=0.3)
    whole.set(ylabel="held-out loss (nats per target token)", title="all of it")
    near.set(ylim=(goal - 0.05, goal + 0.6), title="near the tuned LM")
    figure.legend(*whole.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def contestants(shape: Shape) -> dict[str, PreTrainedModel]:
    """Random weights. A merged pair has no encoder layer of the last depth: nobody would read what it writes."""
    torch.manual_seed(0)
    lm = lm_config(shape)
    half = evenly_spaced(shape.layers, shape.layers // 2)
    special = {"pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": 2}
    found = {"lm": AutoModelForCausalLM.from_config(lm, dtype=torch.float32).eval()}
    for hinge in ("merged", "separate"):
        for name, kept in ((hinge, None), (f"{hinge}, half", half)):
            config = paired_config(lm, lm, hinge, kept, **special)
            found[name] = DiptychForConditionalGeneration(config).eval()
    return found


@torch.no_grad()
def seconds_to_write(model: PreTrainedModel, ids: torch.Tensor, count: int) -> tuple[float, float]:
    """Until the first token, and until the last of `count`."""
    ends = []

    def clock(ids, scores, **_):
        ends.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)

    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "stopping_criteria": [clock]}
    began = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return ends[0] - began, ends[-1] - began


def latency(size: Size) -> list[dict]:
    """One row for each length and batch: contestant → [(seconds to the first token, in all), …]."""
    models = contestants(size.large)
    for name, model in models.items():
        print(f"{name}: {sum(weight.numel() for weight in model.parameters()) / 1e6:.0f}M weights")
        seconds_to_write(model, torch.full((1, 8), 5), size.output)
    found = []
    for source in size.sources:
        for batch in size.batches:
            ids = torch.randint(3, size.large.vocabulary, (batch, source))
            seconds = {name: [] for name in models}
            for _ in range(size.repeats):
                for name, model in models.items():
                    seconds[name].append(seconds_to_write(model, ids, size.output))
            found.append({"source": source, "batch": batch, "seconds": seconds})
            print(json.dumps(found[-1]), flush=True)
    return found


def latency_table(found: list[dict]) -> str:
    """Seconds in all, of which to the first token in brackets; × is how much faster than the LM."""
    names = list(found[0]["seconds"])
    lines = [f"| source | batch | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for row in found:
        first, whole = (
            {name: statistics.median(run[part] for run in runs) for name, runs in row["seconds"].items()}
            for part in (0, 1)
        )
        cells = [f"{whole[name]:.2f} ({first[name]:.2f}), {whole['lm'] / whole[name]:.2f} ×" for name in names]
        lines.append(f"| {row['source']:,} | {row['batch']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Alpaca rows, JSON")
    parser.add_argument("--plot", type=Path, help="where to draw the curves, a PNG")
    parser.add_argument("--parts", nargs="*", default=["tuning", "latency"], choices=["tuning", "latency"])
    parser.add_argument("--smoke", action="store_true", help="every part, small: its figures mean nothing")
    settings = parser.parse_args()
    size = SMOKE if settings.smoke else FULL
    prepare_core(os.cpu_count())
    results = {}
    if "tuning" in settings.parts:
        texts = corpus(size.files)
        tokenizer = train_tokenizer(texts, size.lm.vocabulary)
        start = tokenizer.encode("\n").ids[0]
        lm = train_lm([[*encoded.ids, END] for encoded in tokenizer.encode_batch(texts)], size)
        pairs = read_pairs(settings.data, tokenizer, start, size.longest)
        results["tuning"] = tune_all(lm, tokenizer, pairs, start, size)
        print(loss_table(results["tuning"]), goal_table(results["tuning"]), sep="\n\n")
        if settings.plot:
            plot(results["tuning"], settings.plot)
    if "latency" in settings.parts:
        results["latency"] = latency(size)
        print(latency_table(results["latency"]))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
