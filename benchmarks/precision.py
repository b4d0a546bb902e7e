"""fp32 and bf16 on this CPU: what `precision: auto` measures and takes, and what training then does.

    python benchmarks/precision.py                               as this CPU is
    ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/precision.py       as if it had no units for bf16, like AMD's Zen 3

Prints the kind of CPU; the pace of a small layer in both precisions, the choice that follows, and the time that it
took, three times; then tokens a second of training, for two shapes with random weights, in rows of
60 + 56 tokens, optimizer included: on one core and in CPU time, so that other work on the machine counts for little.
The best of three steps.
"""

import re
import time
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForSeq2SeqLM

from diptych.finetune.model.device_speed import keep_memory, training_pace
from diptych.finetune.model.loss import Seq2SeqObjective
from diptych.finetune.training.recipe import TrainRecipe
from diptych.finetune.training.training_batches import DTYPES, resolve_precision
from diptych.modeling import named_config

CPU = torch.device("cpu")
SOURCE, TARGET, ROWS, STEPS = 60, 56, 16, 3
DEMO = Path(__file__).parents[1] / "finetune" / "recipes" / "demo.yaml"
SHAPES = {
    "the demo's, 2.2M weights": yaml.safe_load(DEMO.read_text())["model_overrides"],
    "512 wide, 18M weights": {
        **{"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4},
        **{"encoder": {"num_hidden_layers": 3}, "decoder": {"num_hidden_layers": 2}},
    },
}


def main() -> None:
    keep_memory()
    print(f"{kind_of_cpu()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    recipe = TrainRecipe(model="m", data="d", out="o", epochs=1)
    for _ in range(3):
        started = time.perf_counter()
        chosen, _ = resolve_precision(recipe, CPU)
        seconds = time.perf_counter() - started
        paces = ", ".join(f"{name} {training_pace(CPU, DTYPES[name]) / 1e9:.1f}" for name in ("fp32", "bf16"))
        print(f"auto takes {chosen.precision} after {1000 * seconds:.0f} ms; GFLOP/s of the layer: {paces}")
    torch.set_num_threads(1)
    for name, shape in SHAPES.items():
        for precision in ("fp32", "bf16"):
            print(
                f"{name}, {precision}: {tokens_per_second(shape, replace(chosen, precision=precision)):,.0f} tokens/s"
            )


def kind_of_cpu() -> str:
    """As `lscpu` names it; "CPU" where there is no such file."""
    file = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.*)$", file.read_text(), re.MULTILINE) if file.is_file() else None
    return found[1] if found else "CPU"


def tokens_per_second(shape: dict, recipe: TrainRecipe) -> float:
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(named_config("diptych-8m", vocab_size=400, **shape))
    model.set_attn_implementation("eager")
    objective, optimizer = Seq2SeqObjective(model).train(), torch.optim.AdamW(model.parameters(), fused=True)
    batch = {
        "input_ids": torch.randint(3, 400, (ROWS, SOURCE)),
        "attention_mask": torch.ones(ROWS, SOURCE, dtype=torch.long),
        "decoder_input_ids": torch.randint(3, 400, (ROWS, TARGET)),
        "labels": torch.randint(3, 400, (ROWS, TARGET)),
    }
    dtype, best = DTYPES[recipe.precision], float("inf")
    for _ in range(STEPS + 1):
        started = time.process_time()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = objective(batch, ROWS * TARGET)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        best = min(best, time.process_time() - started)
    return ROWS * (SOURCE + TARGET) / best


if __name__ == "__main__":
    main()
