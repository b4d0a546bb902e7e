"""What a training step costs, what the machine can do, and where the time went.

    cost = cost_per_token(model)          TokenCost(source=1.3e8, target=2.3e8)    operations for a token, both passes
    peak = matmul_peak(device, dtype)     9.4e11    operations a second of a large matrix product, here and now
    mfu  = operations a second / peak     0.34      model-FLOP utilisation (arXiv 2204.02311, appendix B)

Only products with weights are counted. Attention's products of tokens with tokens are left out, so the figure is a
little too low, never too high; what is computed twice, or for padding, does not count.
"""

import os
import re
import resource
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.model.families import without_adapter

READS_SOURCE = re.compile(r"(EncDecAttention|encoder_attn|cross_attn)\.(k|v|k_proj|v_proj)\b")
"""In the decoder, the layers that are applied to source tokens."""
READS_BOTH = re.compile(r"self_attn\.(k_proj|v_proj)\b")
PROFILED_STEPS = (3, 3)
"""Steps before those that are profiled, and how many these are: the first ones are not like the rest."""
RECOMPILE_LIMIT = 64


class TokenCost(NamedTuple):
    """Floating-point operations in both passes, for one token."""

    source: float
    target: float


def cost_per_token(model: PreTrainedModel | PeftModel) -> TokenCost:
    """Two operations for each weight in the forward pass, two for the gradient of what came in, two for its own."""
    inner = without_adapter(model)
    encoder, decoder = _weights(inner.get_encoder()), _weights(inner.get_decoder())
    head = inner.get_output_embeddings().weight
    reads_source = {name: work for name, work in decoder.items() if READS_SOURCE.search(name)}
    source = sum(encoder.values()) + sum(reads_source.values())
    target = sum(decoder.values()) - sum(reads_source.values())
    if inner.config.model_type == "diptych" and inner.config.decoder.cross_attention == "merged":
        # one projection for both sides
        source += sum(work for name, work in decoder.items() if READS_BOTH.search(name))
    return TokenCost(source, target + _operations(head))


def _weights(panel: nn.Module) -> dict[str, float]:
    return {
        name: _operations(module.weight) for name, module in panel.named_modules() if isinstance(module, nn.Linear)
    }


def _operations(weight: torch.Tensor) -> float:
    return (6 if weight.requires_grad else 4) * weight.numel()


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.1) -> float:
    """Floating-point operations a second of square matrix products, the best of those that fit into `seconds`."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    left @ right  # the first one also asks for memory and picks a kernel
    best, until = 0.0, time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < until:
        _wait(device)
        started = time.perf_counter()
        left @ right
        _wait(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that this process held, on the GPU where it computes on one, else in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def compile_layers(model: PreTrainedModel | PeftModel, backend: str = "inductor") -> None:
    """torch.compile for each layer, which is the same code for all of a panel: seconds and not minutes. Where all
    batches have one shape, the first step compiles everything, and no other compiles anything."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"compile is true, but where the layers of a {model.config.model_type} are is not known here.")
    # dynamo counts by function, and transformers 5.24 wraps each forward in one and the same (`deprecate_kwarg`): with
    # its limit of 8, T5's layers would be left uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    for layer in layers:
        layer.compile(backend=backend)


def profiler(folder: Path) -> torch.profiler.profile:
    """Its `step()` is to be called after each step. Leaves trace.json (chrome://tracing) and table.txt in `folder`."""
    wait, active = PROFILED_STEPS
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it writes its own internals to the terminal

    def write(profile: torch.profiler.profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(folder / "trace.json"))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=60)
        (folder / "table.txt").write_text(f"{active} steps\n{table}\n", encoding="utf-8")

    schedule = torch.profiler.schedule(wait=wait, warmup=1, active=active, repeat=1)
    return torch.profiler.profile(schedule=schedule, on_trace_ready=write)
