"""What a step costs, what the machine can do, and where the time went.

    work = work_per_token(model)          TokenCost(source=1.3e8, target=2.3e8)    operations for a token, both passes
    peak = matmul_peak(device, dtype)     9.4e11    operations a second of a large matrix product, here and now
    mfu  = work done per second / peak    0.34      model-FLOP utilisation (arXiv 2204.02311, appendix B)
    pace = training_pace(device, dtype)   1.2e11    the same of a small layer in both passes, with autocast's copies

Products with weights only: attention's products of tokens with tokens are left out, which makes the figure a little
too low, never too high; what is computed twice, or for padding, does not count.
"""

import ctypes
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
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
PROFILED_STEPS = (3, 3)
"""Steps before those that are profiled, and how many these are: the first ones are not like the rest."""


class TokenCost(NamedTuple):
    """Floating-point operations in both passes, for one token."""

    source: float
    target: float


def work_per_token(model: PreTrainedModel | PeftModel) -> TokenCost:
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


def training_pace(device: torch.device, dtype: torch.dtype, seconds: float = 0.02) -> float:
    """Floating-point operations a second of a linear layer under autocast, forward and backward.

    It tells which precision trains faster, also where a product of large matrices would not: the copies that autocast
    makes are in it. On a CPU the layer is small, because a CPU without bf16 units needs 70 ms for it in bf16, and more
    than 2 s for a product of `matmul_peak`; one thread computes, and its own time is taken, because with other work on
    the machine the wall time of several threads was wrong by a factor of 100. The best of the passes that fit into
    `seconds`; at least one.
    """
    is_cpu = device.type == "cpu"
    tokens, width = (256, 256) if is_cpu else (4096, 2048)
    clock = time.thread_time if is_cpu else time.perf_counter
    layer = nn.Linear(width, width, bias=False, device=device)
    states = torch.randn(tokens, width, device=device, requires_grad=True)

    def both_passes(rows: int) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            written = layer(states[:rows])
        torch.autograd.backward(written, torch.ones_like(written))
        _wait(device)

    threads = torch.get_num_threads()
    if is_cpu:
        torch.set_num_threads(1)
    try:
        both_passes(rows=1)  # the first one also loads what computes
        best, until = 0.0, clock() + seconds
        while best == 0.0 or clock() < until:
            started = clock()
            both_passes(tokens)
            best = max(best, 6 * tokens * width**2 / (clock() - started))
    finally:
        torch.set_num_threads(threads)
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


def keep_memory() -> None:
    """Tells glibc to keep the pages that a step gives back: the next one asks for them again, and the system would
    fill each with zeros. A fifth to a third faster on a CPU; other systems have no such call."""
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    set_option(M_MMAP_MAX, 0)
    set_option(M_TRIM_THRESHOLD, -1)


RECOMPILE_LIMIT = 64


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
