"""Steps of DPO, side by side in one run: each answer with an encoding of its own, as TRL's trainers computed it for
encoder-decoders, against Diptych's objective, which encodes a source once for all its answers.

    python benchmarks/preference_throughput.py                           60M on two cores, about half an hour
Each measurement is a process of its own, and the sides take turns. All compute the same loss of the same pairs with
the same weights (the loss of the first step is shown), with log-probabilities of the reference computed beforehand, in
the faster of bf16 and fp32, with AdamW. Four answers, two pairs, to each source; all sources have one length and all
answers 64 tokens, so padding plays no part.

    two encodings    input_ids repeated for each answer, all logits in fp32, log_softmax
    padded           the encoder's states repeated for each answer; logits in chunks
    packed           the answers are decoder segments that read one encoder segment

With --sampling instead: the share of a step of mrt that sampling and scoring (chrF) take, with as many answers of as
many tokens. An answer has no end, since the weights are random, so all have the full length.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch.utils.flop_counter import FlopCounterMode
from train_throughput import SIZES, VOCABULARY, make_model
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from diptych.data_prep.packing.packed_row import MARKS_COLUMN
from diptych.finetune.batches.packed_rows import REFERENCE, pack_examples
from diptych.finetune.batches.padded_rows import Items, pad_sources, pad_targets
from diptych.finetune.model.device_speed import keep_memory, training_pace
from diptych.finetune.model.families import SOURCE_ROWS, decoder_start_token, family_of
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.preferences.losses import PreferenceLoss
from diptych.finetune.preferences.objective import PreferenceObjective, switch_off_dropout
from diptych.finetune.preferences.objective_settings import checked_settings
from diptych.finetune.preferences.online import OnlineObjective, SampledRows
from diptych.finetune.training.training_batches import set_attention

SIDES = ("two encodings", "padded", "packed")
ANSWERS, TARGET_TOKENS, BETA = 4, 64, 0.1


def examples_of(sources: int, source_tokens: int) -> list[dict]:
    """Answers to one source stand next to each other: chosen, rejected, chosen, rejected."""
    draw = torch.Generator().manual_seed(0)

    def ids(tokens: int) -> list[int]:
        return [*torch.randint(3, VOCABULARY, (tokens - 1,), generator=draw).tolist(), 1]

    texts = [ids(source_tokens) for _ in range(sources)]
    return [{"input_ids": text, "labels": ids(TARGET_TOKENS)} for text in texts for _ in range(ANSWERS)]


def batch_of(side: str, examples: list[dict]) -> dict[str, torch.Tensor]:
    marks = torch.tensor([1, -1]).repeat(len(examples) // 2)
    reference = torch.zeros(len(examples), dtype=torch.float64) - 600.0
    if side == "packed":
        batch = pack_examples(examples, 0, 0, share_sources=True)
        lengths = torch.tensor([len(example["labels"]) for example in examples])
        return batch | {MARKS_COLUMN: marks.repeat_interleave(lengths)[None], REFERENCE: reference}
    rows = examples if side == "two encodings" else examples[::ANSWERS]
    batch = pad_sources([row["input_ids"] for row in rows], 0) | pad_targets(examples, 0, 0)
    own = {SOURCE_ROWS: torch.arange(len(rows)).repeat_interleave(ANSWERS)} if side == "padded" else {}
    return batch | own | {MARKS_COLUMN: marks, REFERENCE: reference}


def plain_loss(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    names = ("input_ids", "attention_mask", "decoder_input_ids")
    logits = model(**{name: batch[name] for name in names}, use_cache=False).logits.float()
    of_tokens = logits.log_softmax(-1).gather(2, batch["labels"].clamp(min=0)[..., None])[..., 0]
    ratios = (of_tokens * (batch["labels"] >= 0)).sum(1) - batch[REFERENCE]
    return -F.logsigmoid(BETA * (ratios[0::2] - ratios[1::2])).mean().float()


def measure(side: str, folder: str, sources: int, source_tokens: int, steps: int, dtype: str) -> dict:
    keep_memory()
    off = {"t5": {"dropout_rate": 0.0}, "bart": {"dropout": 0.0}, "diptych": {"residual_dropout": 0.0}}
    kind = AutoConfig.from_pretrained(folder).model_type  # dropout would draw other numbers for each side
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, **off[kind]).train()
    set_attention(model, "auto", dtype, torch.device("cpu"), is_packed=side == "packed")
    objective = PreferenceObjective(model, PreferenceLoss.of("dpo", {"beta": BETA}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    batch = batch_of(side, examples_of(sources, source_tokens))
    pairs = len(batch[REFERENCE]) // 2
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, losses = [], []
    for _ in range(steps + 1):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = plain_loss(model, batch) if side == "two encodings" else objective(batch, Items(pairs, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        losses.append(loss.item())
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": statistics.median(seconds[1:]), "loss": losses[0], "memory": (after - before) / 2**20}


def sampling(folder: str, sources: int, source_tokens: int, steps: int, dtype: str) -> dict:
    keep_memory()
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w2")), pad_token="w0", eos_token="w1"
    )
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).train()
    switch_off_dropout(model)
    set_attention(model, "auto", dtype, torch.device("cpu"), is_packed=False)
    loaded = LoadedModel(model, tokenizer, None, family_of(model), decoder_start_token(model), 0)
    texts = [example["input_ids"] for example in examples_of(sources, source_tokens)[::ANSWERS]]
    names = ("source", "target", "input_ids", "labels")
    targets = [example["labels"] for example in examples_of(sources, source_tokens)[::ANSWERS]]
    columns = ([f"{place}" for place in range(sources)], ["w7 w8"] * sources, texts, targets)
    split = Dataset.from_dict(dict(zip(names, columns, strict=True)))
    settings = checked_settings("mrt", {"samples": ANSWERS, "with_target": False})
    rows = SampledRows(split, 0, 0, loaded=loaded, settings=settings, metric_settings={}, max_new_tokens=TARGET_TOKENS)
    objective = OnlineObjective(model, "mrt", settings, TARGET_TOKENS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    seconds = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            batch = rows.tensors(range(sources))
            loss = objective(batch, Items(sources, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds[1:]), "sampling": statistics.median(rows.seconds[1:])}


def in_a_process(*arguments: object) -> dict:
    call = [sys.executable, __file__, "--measure", json.dumps(arguments)]
    return json.loads(subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def compare(options: argparse.Namespace) -> None:
    cpu = torch.device("cpu")
    faster = training_pace(cpu, torch.bfloat16) > training_pace(cpu, torch.float32)
    dtype = "bf16" if faster else "fp32"
    print(f"{options.size}, {dtype}, {options.sources} sources of {ANSWERS} answers a step; times are medians")
    columns = "side | seconds a step | times as fast | GiB more | first loss"
    if options.sampling:
        columns = "seconds a step | of these, sampling and scoring"
    print(f"| family | source tokens | {columns} |")
    for family in options.families:
        with tempfile.TemporaryDirectory() as folder:
            make_model(family, options.size, Path(folder))
            for source_tokens in options.source_tokens:
                own = (folder, options.sources, source_tokens, options.steps, dtype)
                if options.sampling:
                    found = in_a_process("sampling", *own)
                    share = found["sampling"] / found["seconds"]
                    print(f"| {family} | {source_tokens} | {found['seconds']:.2f} | {share:.0%} |", flush=True)
                    continue
                rounds = [{side: in_a_process(side, *own) for side in SIDES} for _ in range(options.rounds)]
                for side in SIDES:
                    ratios = [found[SIDES[0]]["seconds"] / found[side]["seconds"] for found in rounds]
                    of_side = {name: statistics.median(it[side][name] for it in rounds) for name in rounds[0][side]}
                    print(
                        f"| {family} | {source_tokens} | {side} | {of_side['seconds']:.2f} | "
                        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
                        f"{of_side['memory']:.2f} | {of_side['loss']:.4f} |",
                        flush=True,
                    )


def bounds(size: str, source_tokens: int) -> tuple[float, float]:
    """How many times the products of two encodings are those of one, padded and packed, for a T5: torch's own count of
    a forward pass. The optimizer's update and all that is no product come on top, on both sides."""
    shape = SIZES[size]
    depth = {"num_layers": shape["layers"], "num_heads": shape["heads"], "d_ff": shape["t5_ff"]}
    with torch.device("meta"):
        config = T5Config(vocab_size=VOCABULARY, d_model=shape["d"], **depth, decoder_start_token_id=0)
        model = T5ForConditionalGeneration(config).eval()
        sources = torch.zeros(1, source_tokens, dtype=torch.long)
        answers = torch.zeros(1, TARGET_TOKENS, dtype=torch.long)

    def operations(call: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    encoder = operations(lambda: model.encoder(input_ids=sources))
    whole = operations(lambda: model(input_ids=sources, decoder_input_ids=answers))
    keys_and_values = shape["layers"] * 2 * 2 * source_tokens * shape["d"] ** 2
    padded = encoder + ANSWERS * (whole - encoder)
    return ANSWERS * whole / padded, ANSWERS * whole / (padded - (ANSWERS - 1) * keys_and_values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--families", nargs="*", default=["t5", "bart", "diptych"])
    parser.add_argument("--source_tokens", nargs="*", type=int, default=[64, 256, 1024])
    parser.add_argument("--sources", type=int, default=4, help="in a step")
    parser.add_argument("--steps", type=int, default=4, help="measured after the first one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sampling", action="store_true", help="the share of a step of mrt that sampling takes")
    parser.add_argument("--bounds", action="store_true", help="count products instead, of a T5 of each size")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        side, *own = json.loads(options.measure)
        print(json.dumps(sampling(*own) if side == "sampling" else measure(side, *own)))
    elif options.bounds:
        for size in SIZES:
            for tokens in options.source_tokens:
                padded, packed = bounds(size, tokens)
                print(f"{size}, {tokens} source tokens: {padded:.2f} x padded, {packed:.2f} x packed")
    else:
        compare(options)


if __name__ == "__main__":
    main()
