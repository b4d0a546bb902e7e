"""How fast this machine computes in a precision, and how a process keeps its memory.

pace = training_pace(device, dtype)   1.2e11    operations a second of a small layer, forward and backward
keep_memory()                                   from a fifth to a third faster on a CPU
"""

import ctypes
import time

import torch
from torch import nn

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


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
        if device.type == "cuda":
            torch.cuda.synchronize(device)

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


def keep_memory() -> None:
    """Tells glibc to keep the pages that a step gives back: the next one asks for them again, and the system would
    fill each with zeros. A fifth to a third faster on a CPU; other systems have no such call."""
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    set_option(M_MMAP_MAX, 0)
    set_option(M_TRIM_THRESHOLD, -1)
