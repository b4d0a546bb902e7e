"""Packing pairs as long as CodeAlpaca's: seconds, rows, and what part of them is filled.

    python benchmarks/packing.py         one core; 10,000, 100,000 and 1,000,000 pairs (--up_to 100000 for fewer)

Lengths are drawn from percentiles of CodeAlpaca's train split with 8,000 tokens of BPE.
"""

import argparse
import json
import time
from itertools import chain

import numpy as np

from diptych.data_prep.packing.budgets import choose_budget
from diptych.data_prep.packing.fill_rows import pack

PAIRS = (10_000, 100_000, 1_000_000)
PERCENTILES = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100)
SOURCES = (35, 37, 39, 41, 44, 57, 73, 83, 92, 125, 228)
TARGETS = (2, 2, 7, 11, 20, 43, 78, 122, 154, 250, 469)


def lengths(pairs: int) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [np.interp(draw.uniform(0, 100, pairs), PERCENTILES, side).astype(int) for side in (SOURCES, TARGETS)]


def measure(pairs: int) -> dict:
    sources, targets = lengths(pairs)
    started = time.perf_counter()
    budget = choose_budget(sources, targets)
    chosen = time.perf_counter()
    rows = pack(sources, targets, budget)
    ended = time.perf_counter()
    assert sorted(chain.from_iterable(rows)) == list(range(pairs))
    return {
        "pairs": pairs,
        "budget": list(budget),
        "seconds_to_choose": round(chosen - started, 2),
        "seconds": round(ended - chosen, 2),
        "rows": len(rows),
        "source_fill": round(float(sources.sum() / (len(rows) * budget.source_tokens)), 4),
        "target_fill": round(float(targets.sum() / (len(rows) * budget.target_tokens)), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--up_to", type=int, default=max(PAIRS), help="leave out what has more pairs")
    up_to = parser.parse_args().up_to
    results = []
    print(f"{'pairs':>10}{'row':>12}{'choose':>9}{'pack':>9}{'rows':>9}{'source':>9}{'target':>9}")
    for pairs in (pairs for pairs in PAIRS if pairs <= up_to):
        found = measure(pairs)
        results.append(found)
        seconds = f"{found['seconds_to_choose']:>7.2f} s{found['seconds']:>7.2f} s"
        fill = f"{found['source_fill']:>9.1%}{found['target_fill']:>9.1%}"
        row = " + ".join(map(str, found["budget"]))
        print(f"{pairs:>10,}{row:>12}{seconds}{found['rows']:>9,}{fill}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
