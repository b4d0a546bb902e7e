"""Writing, side by side in one run: HF's `generate` on T5 and BART, on Diptych, Diptych's own decoding, CTranslate2.

    python benchmarks/generate_throughput.py                two cores, about 25 minutes
    python benchmarks/generate_throughput.py --smoke        every part, small: its figures mean nothing

Random weights, 61 million each, a head of 32,128 tokens: T5-small's shape; Diptych 6+6, which is the same with SwiGLU;
Diptych 12+2, twelve layers that read and two that write (arXiv 2006.10369); and Diptych 6+2, in which those that write
are three times as wide. The last two have half as many key heads. Each contestant writes exactly 64 tokens, greedily,
to the same random sources; they take turns, so that a slow minute of the machine meets them all; what is compiled has
been, for the very shapes. Medians: milliseconds a token (of a whole batch, reading the source included), tokens a
second, and × HF's generate on T5 in fp32. "reads" is the encoder alone, on the same scale.

Then one row whose tokens are guessed, by looking them up or by a small draft model (6+1 layers): ms a token where all
guesses are right, because a rule makes both models copy the source, and where they are as random as the weights.
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import ctranslate2
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CompileConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging

from diptych.finetune.exporting.export_ctranslate2 import write as write_ctranslate2
from diptych.finetune.inference.fast_decode import fast_decode, read_fast
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.modeling import DiptychConfig, DiptychForConditionalGeneration


@dataclass(frozen=True)
class Size:
    vocabulary: int = 32128
    width: int = 512
    layers: int = 6
    heads: int = 8
    t5_ff: int = 2048
    diptych: tuple[tuple[int, int, int, int, int], ...] = (
        (6, 6, 8, 1408, 1408),
        (12, 2, 4, 1472, 1472),
        (6, 2, 4, 2048, 5632),
    )
    """Layers that read, layers that write, key heads, and the feed-forward widths of both, for each of DIPTYCHS."""
    batches: tuple[int, ...] = (1, 8, 32)
    sources: tuple[int, ...] = (64, 512)
    tokens: int = 64
    rounds: int = 3


FULL = Size()
SMOKE = replace(FULL, vocabulary=500, width=64, layers=2, heads=4, t5_ff=128, batches=(2,), sources=(16,), tokens=8)
SMOKE = replace(SMOKE, rounds=1, diptych=((2, 2, 4, 96, 96), (3, 1, 2, 96, 96), (2, 1, 2, 96, 192)))
COMPILED = "Diptych 6+6, generate, static cache, compiled"
DIPTYCHS = ("Diptych 6+6", "Diptych 12+2", "Diptych 6+2")
IDS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}

Writer = Callable[[torch.Tensor, int], torch.Tensor | None]
"""Sources (B, S) and a number of tokens, that are then written to each."""


def make_models(size: Size) -> dict[str, PreTrainedModel]:
    torch.manual_seed(0)
    ids = IDS | {"vocab_size": size.vocabulary}
    depth = {"num_layers": size.layers, "num_heads": size.heads}
    t5 = T5Config(d_model=size.width, d_kv=size.width // size.heads, d_ff=size.t5_ff, **depth, **ids)
    panels = {f"{panel}_layers": size.layers for panel in ("encoder", "decoder")}
    panels |= {f"{panel}_attention_heads": size.heads for panel in ("encoder", "decoder")}
    panels |= {f"{panel}_ffn_dim": size.t5_ff for panel in ("encoder", "decoder")}
    bart = BartConfig(d_model=size.width, **panels, **ids, bos_token_id=2, forced_eos_token_id=None)
    classes = (T5ForConditionalGeneration, BartForConditionalGeneration)
    found = {"T5": classes[0](t5), "BART": classes[1](bart)}
    found |= {name: make_diptych(size, *shape) for name, shape in zip(DIPTYCHS, size.diptych, strict=True)}
    return {name: model.eval() for name, model in found.items()}


def make_diptych(
    size: Size, reads: int, writes: int, key_heads: int, reading_ff: int, writing_ff: int
) -> PreTrainedModel:
    config = DiptychConfig(
        hidden_size=size.width,
        num_attention_heads=size.heads,
        num_key_value_heads=key_heads,
        encoder={"num_hidden_layers": reads, "intermediate_size": reading_ff},
        decoder={"num_hidden_layers": writes, "intermediate_size": writing_ff},
        initializer_range=size.width**-0.5,
        vocab_size=size.vocabulary,
        **IDS,
    )
    return DiptychForConditionalGeneration(config).eval()


def by_reading(model: PreTrainedModel) -> Writer:
    is_ours = isinstance(model, DiptychForConditionalGeneration)
    encode = partial(read_fast, model) if is_ours else model.get_encoder()

    def read(ids: torch.Tensor, tokens: int) -> None:
        encode(input_ids=ids, attention_mask=torch.ones_like(ids))

    return read


def by_generate(model: PreTrainedModel, **settings) -> Writer:
    def write(ids: torch.Tensor, tokens: int) -> torch.Tensor:
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            eos_token_id=model.config.vocab_size,  # which nobody writes
            do_sample=False,
            num_beams=1,
            **settings,
        )
        assert written.shape == (len(ids), tokens + 1), written.shape
        return written

    return write


def by_own_decoding(model: PreTrainedModel) -> Writer:
    """As `diptych generate` has it."""

    def write(ids: torch.Tensor, tokens: int) -> torch.Tensor:
        read = read_fast(model, ids, torch.ones_like(ids))
        return by_generate(model, encoder_outputs=read, custom_generate=fast_decode)(ids, tokens)

    return write


def by_ctranslate2(model: PreTrainedModel, precision: str, folder: Path) -> Writer:
    """Through the export, with as many threads as torch."""
    names = {f"t{number}": number for number in range(model.config.vocab_size)}
    backend = Tokenizer(models.WordLevel(names, unk_token="t2"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="t0", eos_token="t1", unk_token="t2")
    folder.mkdir()
    write_ctranslate2(LoadedModel.of(copy.deepcopy(model), tokenizer), folder, precision)
    translator = ctranslate2.Translator(str(folder), compute_type=precision, intra_threads=torch.get_num_threads())

    def write(ids: torch.Tensor, tokens: int) -> None:
        sources = [[f"t{number}" for number in row] for row in ids.tolist()]
        found = translator.translate_batch(
            sources, beam_size=1, min_decoding_length=tokens, max_decoding_length=tokens, max_input_length=0
        )
        assert all(len(it.hypotheses[0]) == tokens for it in found)

    return write


def contestants(size: Size, folder: Path) -> dict[str, Writer]:
    found = {}
    made = make_models(size)
    for name, model in made.items():
        print(f"{name}: {model.num_parameters() / 1e6:.1f}M weights")
        found[f"{name}, generate, fp32"] = by_generate(model)
    for name in ("T5", *DIPTYCHS):
        found[f"{name}, reads, fp32"] = by_reading(made[name])
    half = {name: copy.deepcopy(made[name]).to(torch.bfloat16) for name in ("T5", *DIPTYCHS)}
    found["T5, generate, bf16"] = by_generate(half["T5"])
    found["Diptych 6+6, generate, bf16"] = by_generate(half["Diptych 6+6"])
    static = {"cache_implementation": "static"}
    found["Diptych 6+6, generate, static cache"] = by_generate(made["Diptych 6+6"], **static)
    compiling = CompileConfig()
    compiling._compile_all_devices = True  # else a CPU's is left as it is
    found[COMPILED] = by_generate(made["Diptych 6+6"], **static, compile_config=compiling)
    for name in DIPTYCHS:
        found[f"{name}, own decoding, fp32"] = by_own_decoding(made[name])
        found[f"{name}, own decoding, bf16"] = by_own_decoding(half[name])
    precisions = [it for it in ("float32", "bfloat16", "int8") if it in ctranslate2.get_supported_compute_types("cpu")]
    print(f"CTranslate2 computes here in {', '.join(precisions)}")
    for name in ("T5", *DIPTYCHS):
        for precision in precisions:
            found[f"{name}, CTranslate2, {precision}"] = by_ctranslate2(
                made[name], precision, folder / f"{name}-{precision}"
            )
    return found


@torch.no_grad()
def measure(size: Size) -> list[dict]:
    """One row for each batch and source length: contestant → seconds of each round."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        writers = contestants(size, Path(folder))
        for write in writers.values():
            write(torch.full((1, 8), 5), 4)
        for batch in size.batches:
            for source in size.sources:
                ids = torch.randint(3, size.vocabulary, (batch, source))
                writers[COMPILED](ids, size.tokens)
                seconds = {name: [] for name in writers}
                for _ in range(size.rounds):
                    for name, write in writers.items():
                        began = time.perf_counter()
                        write(ids, size.tokens)
                        seconds[name].append(time.perf_counter() - began)
                rows.append({"batch": batch, "source": source, "tokens": size.tokens, "seconds": seconds})
                print(json.dumps(rows[-1]), flush=True)
    return rows


class Copies(LogitsProcessor):
    """A rule that makes any model write its source again."""

    def __init__(self, source: torch.Tensor):
        self.source = source

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place = (input_ids.shape[1] - 1) % self.source.shape[1]
        return scores.index_fill(1, self.source[0, place], 1e4)


@torch.no_grad()
def measure_guessing(size: Size) -> dict[str, dict[str, list[float]]]:
    """ "copies" and "random" → way → ms a token of each round, for one row."""
    torch.manual_seed(0)
    reads, _, *rest = size.diptych[0]
    model, draft = make_diptych(size, *size.diptych[0]), make_diptych(size, reads, 1, *rest)
    source = torch.randperm(size.vocabulary - 3)[None, : min(size.sources)] + 3
    guesses = {"num_assistant_tokens": 5, "num_assistant_tokens_schedule": "constant"}
    draft.generation_config.update(**guesses, assistant_confidence_threshold=0.0)
    own = {"custom_generate": fast_decode}
    ways = {
        "generate": {},
        "generate, looks up 5": {"prompt_lookup_num_tokens": 5},
        "generate, draft of 5": {"assistant_model": draft},
        "own decoding": own,
        "own decoding, looks up 5": own | {"prompt_lookup_num_tokens": 5},
        "own decoding, looks up 10": own | {"prompt_lookup_num_tokens": 10},
    }
    found = {}
    for rule, processors in {"copies": [Copies(source)], "random": []}.items():
        seconds, written = {way: [] for way in ways}, []
        for _ in range(size.rounds):
            for way, settings in ways.items():
                write = by_generate(model, logits_processor=LogitsProcessorList(processors), **settings)
                began = time.perf_counter()
                written.append(write(source, size.tokens))
                seconds[way].append(1000 * (time.perf_counter() - began) / size.tokens)
        assert all(torch.equal(tokens, written[0]) for tokens in written), "guessing changed what is written"
        found[rule] = seconds
    return found


def guessing_table(found: dict[str, dict[str, list[float]]]) -> str:
    middle = {rule: {way: statistics.median(it) for way, it in ways.items()} for rule, ways in found.items()}
    lines = ["| one row, Diptych 6+6, fp32 | all guesses right | random weights |", "|---|---|---|"]
    for way in middle["copies"]:
        cells = [f"{it[way]:.1f} ms, {it['generate'] / it[way]:.2f} ×" for it in middle.values()]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(rows: list[dict]) -> str:
    """ms a token (tokens a second), × HF's generate on T5 in fp32."""
    names = list(rows[0]["seconds"])
    lines = ["| | " + " | ".join(f"{row['batch']} × {row['source']}" for row in rows) + " |"]
    lines.append("|---" * (len(rows) + 1) + "|")
    for name in names:
        cells = []
        for row in rows:
            own, first = (statistics.median(row["seconds"][it]) for it in (name, names[0]))
            rate = row["batch"] * row["tokens"] / own
            cells.append(f"{1000 * own / row['tokens']:.1f} ms ({rate:,.0f}/s) {first / own:.2f} ×")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="every part, small: its figures mean nothing")
    settings = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    logging.set_verbosity_error()
    size = SMOKE if settings.smoke else FULL
    guessing = measure_guessing(size)
    print(guessing_table(guessing), flush=True)
    rows = measure(size)
    print(table(rows))
    print(json.dumps({"writing": rows, "guessing": guessing}))


if __name__ == "__main__":
    main()
