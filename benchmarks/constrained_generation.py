"""What it costs to write in a given form: the same model, the same number of tokens, with and without a grammar.

    python benchmarks/constrained_generation.py             one core, about ten minutes
    python benchmarks/constrained_generation.py --smoke     every part, small: its figures mean nothing

Random weights, 60 million each, 32,000 tokens of byte-level BPE: T5-small's shape, and a Diptych as wide and as deep.
Each writes exactly 64 tokens, greedily, for 1, 8 and 32 sources. The contestants take turns. Printed: CPU time a step
in ms (medians), and × without a grammar. `any text` masks nothing; `json` is an array of objects with strings, numbers
and lists.
"""

import argparse
import json
import random
import statistics
import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedConfig

import diptych.modeling  # noqa: F401  registers Diptych with AutoConfig
from diptych.data_prep.reading.sources import SAMPLES_FOLDER
from diptych.data_prep.text_to_ids.train_tokenizer import train_tokenizer
from diptych.finetune.inference.constraints import grammar_of
from diptych.finetune.inference.generation import generate_outputs
from diptych.finetune.model.loaded_model import LoadedModel

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def tokenizer_of(size: int) -> Any:
    """Sentences, code and random words, so that there is enough for so many tokens."""
    draw = random.Random(0)
    words = [
        " ".join("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(40)) for _ in range(2500)
    ]
    lines = (SAMPLES_FOLDER / "tatoeba_eng_kor.tsv").read_text(encoding="utf-8").splitlines()
    rows = [
        json.dumps({"name": line[:20], "age": place, "tags": line.split()[:3]}) for place, line in enumerate(lines)
    ]
    return train_tokenizer("bpe", [*lines, *rows, *words], size)


def models_of(tokenizer: Any, width: int, layers: int) -> dict[str, PreTrainedConfig]:
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids |= {"decoder_start_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
    t5 = {"d_model": width, "d_ff": 4 * width, "num_layers": layers, "num_heads": width // 64, "d_kv": 64}
    panel = {"hidden_size": width, "num_attention_heads": width // 64, "num_hidden_layers": layers}
    panel |= {"intermediate_size": width * 8 // 3}
    return {"t5": AutoConfig.for_model("t5", **t5, **ids), "diptych": AutoConfig.for_model("diptych", **panel, **ids)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="every part, small: its figures mean nothing")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    vocabulary, width, layers, tokens = (2000, 64, 1, 16) if given.smoke else (32_000, 512, 6, 64)
    torch.set_num_threads(1)
    tokenizer = tokenizer_of(vocabulary)
    grammars = {
        "free": None,
        "any text": grammar_of(regex="(?s:.)*"),
        "json": grammar_of({"type": "array", "items": PERSON, "minItems": 100}),
    }
    for name, config in models_of(tokenizer, width, layers).items():
        torch.manual_seed(0)
        loaded = LoadedModel.of(AutoModelForSeq2SeqLM.from_config(config).eval(), tokenizer)
        for rows in (1, 8, 32):
            sources = [[5 + row, 6, 7, 8, 9] * 6 + [tokenizer.eos_token_id] for row in range(rows)]
            found: dict[str, list[float]] = {kind: [] for kind in grammars}
            for _ in range(1 if given.smoke else given.rounds + 1):
                for kind, grammar in grammars.items():
                    limits = {"max_new_tokens": tokens, "min_new_tokens": tokens, "batch_size": rows}
                    started = time.process_time()
                    generate_outputs(loaded, sources, **limits, **({"grammar": grammar} if grammar else {}))
                    found[kind].append((time.process_time() - started) / tokens * 1000)
            medians = {
                kind: statistics.median(times[1:] or times) for kind, times in found.items()
            }  # the first warms up
            shown = [f"{kind} {ms:.2f} ms (× {ms / medians['free']:.2f})" for kind, ms in medians.items()]
            print(f"{name}, {rows} rows: {', '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
