"""Cross-entropy over a large vocabulary, both passes: plain, torch's linear_cross_entropy, and ours in chunks.

    python benchmarks/loss.py     seconds (best of three; of large ones one) and what the process grew by, all cores

Each way runs in a process of its own, because memory that was once asked for is not given back.
"""

import json
import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from diptych.finetune.model.loss import Extras, Head, _SummedLoss, cross_entropy, default_chunk

# tokens, width, vocabulary, dtype
SIZES = [
    (500, 256, 8000, "float32"),
    (544, 512, 32128, "bfloat16"),
    (2048, 512, 32128, "bfloat16"),
    (2048, 512, 250000, "bfloat16"),
    (8192, 512, 128256, "float32"),
]


def plain(states, weight, labels):
    return F.cross_entropy(F.linear(states, weight).float(), labels, reduction="sum")


def fused(states, weight, labels):
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(states, weight, labels, reduction="sum", options=options)


def chunked(states, weight, labels):
    head = Head({"weight": weight}, lambda chunk, given: F.linear(chunk, given["weight"]), default_chunk(len(weight)))
    return _SummedLoss.apply(states, labels, head, cross_entropy(Extras()), True, weight)


def measure(way: str, tokens: int, width: int, vocabulary: int, dtype: str) -> dict:
    torch.manual_seed(0)
    states = torch.randn(tokens, width).to(getattr(torch, dtype)).requires_grad_()
    weight = (torch.randn(vocabulary, width) * 0.02).to(getattr(torch, dtype)).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,))
    weight.grad, states.grad = torch.zeros_like(weight), torch.zeros_like(states)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(3 if tokens * vocabulary < 2**29 else 1):
        started = time.perf_counter()
        loss = WAYS[way](states, weight, labels)
        loss.backward()
        seconds.append(time.perf_counter() - started)
    mebibytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": round(min(seconds), 2), "mebibytes": round(mebibytes), "loss": round(loss.item() / tokens, 4)}


WAYS = {"plain": plain, "linear_cross_entropy": fused, "chunked": chunked}


def main() -> None:
    results = []
    print(f"{'tokens × width × vocabulary':36}" + "".join(f"{way:>30}" for way in WAYS))
    for size in SIZES:
        line = f"{' × '.join(map(str, size[:3]))}, {size[3]}".ljust(36)
        for way in WAYS:
            command = [sys.executable, __file__, way, *map(str, size)]
            found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            results.append({"way": way, "size": size} | found)
            line += f"{found['seconds']:>16.2f} s {found['mebibytes']:>8} MiB"
        print(line, flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        print(json.dumps(measure(sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5])))
