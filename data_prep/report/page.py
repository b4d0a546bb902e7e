"""What a preparation did, as a page to look at: facts in; report.html and report.json out.

    write_report(folder, {"name": "codealpaca_2k", "rows": {"read": 2017, "kept": 2015, "rejected": 2}, …})

The page is one file without a script. It asks nothing of any network, and its Content-Security-Policy forbids it to;
texts of rows are escaped, and characters that would not show, or would turn the line around, stand there by number
(U+202E). Every fact may be missing: then its part of the page is. Facts are counts and a few examples, so that the
page of 100,000 rows, 330 kB in 0.2 s, is about as large as that of 2,000.

Lengths have a long tail, and so are shown on logarithmic axes, in bins that widen with the length. A bar's area, not
its height, is its number of rows: bins of whole tokens cannot all be equally wide.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy

from diptych.data_prep.report.text_shown import FRAMES, prose, shortened, token_markup, visible

PAGE = "report.html.jinja"

STAGES = {"check": "checks", "clean": "cleaning", "template": "template", "length": "length limits"}
"""Where a row can be lost, in the order in which it passes them, and what the page calls them."""

BINS, JOINT_BINS = 40, 28
PERCENTILES = (50, 90, 99, 100)

TOKENS_SHOWN = 160
"""Of each side of a sample."""


def write_report(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes report.html and report.json into a folder that exists."""
    text = _as_json(_ordered(facts))
    facts = json.loads(text)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8", newline="\n")
    (folder / "report.html").write_text(render_page(facts), encoding="utf-8", newline="\n")


# Facts that are the report's own to count


def length_facts(lengths: numpy.ndarray, limit: int | None = None, treatment: str = "drop") -> dict[str, Any]:
    """`facts["lengths"]["source"]` or `["target"]`, from the lengths before anything was cut or dropped, (rows,)."""
    percentiles = numpy.percentile(lengths, PERCENTILES, method="higher") if len(lengths) else ()
    return {
        **histogram(lengths, limit),
        **{f"p{p}": int(value) for p, value in zip(PERCENTILES, percentiles, strict=False)},
        "total": int(numpy.sum(lengths)),
        "limit": limit,
        "over_limit": int(numpy.sum(numpy.asarray(lengths) > limit)) if limit else 0,
        "treatment": treatment,
    }


def histogram(lengths: numpy.ndarray, limit: int | None = None) -> dict[str, list[int]]:
    """`counts[i]` lengths are at least `edges[i]` and below `edges[i + 1]`; no bin holds lengths on both sides of the
    limit. [1, 1, 2, 9] → {"edges": [1, 2, 3, …, 9, 10], "counts": [2, 1, 0, …, 1]}."""
    edges = _edges(lengths, BINS, limit)
    return {"edges": edges, "counts": numpy.histogram(lengths, edges)[0].tolist() if edges else []}


def joint_histogram(source: numpy.ndarray, target: numpy.ndarray) -> dict[str, list]:
    """`counts[i][j]` rows have a source in the i-th bin of `source_edges` and a target in the j-th of the other."""
    edges = [_edges(source, JOINT_BINS), _edges(target, JOINT_BINS)]
    counts = numpy.histogram2d(source, target, edges)[0].astype(int).tolist() if all(edges) else []
    return {"source_edges": edges[0], "target_edges": edges[1], "counts": counts}


def padded_fill(lengths: numpy.ndarray, batch_size: int, seed: int = 0) -> float:
    """The part of random batches, each padded to its longest row, that is no padding: [2, 4] in one batch → 0.75."""
    if not len(lengths):
        return 0.0
    shuffled = numpy.random.default_rng(seed).permutation(lengths)
    starts = numpy.arange(0, len(shuffled), batch_size)
    rows = numpy.diff([*starts, len(shuffled)])
    return float(shuffled.sum() / (numpy.maximum.reduceat(shuffled, starts) * rows).sum())


def _edges(lengths: numpy.ndarray, bins: int, limit: int | None = None) -> list[int]:
    """Whole numbers, each some per cent larger than the one before, up to one more than the longest."""
    if not len(lengths):
        return []
    shortest, longest = int(numpy.min(lengths)), int(numpy.max(lengths))
    grown = numpy.geomspace(max(shortest, 1), longest + 1, bins + 1).round().astype(int).tolist()
    edges = {*grown, shortest, longest + 1}
    if limit is not None and shortest < limit < longest:
        nearest = min(edges - {shortest, longest + 1} or {limit + 1}, key=lambda edge: abs(edge - limit - 1))
        edges = (edges - {nearest}) | {limit + 1}
    return sorted(edges)


# report.json


def _ordered(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The same facts in the same order, however many workers counted them: shares by size, removals by stage."""
    facts = _plain(facts)
    if facts.get("categories"):
        facts["categories"] = _by_size(facts["categories"])
    if facts.get("scripts"):
        facts["scripts"] = {side: _by_size(shares or {}) for side, shares in facts["scripts"].items()}
    if (facts.get("sensitive") or {}).get("counts"):
        facts["sensitive"]["counts"] = _by_size(facts["sensitive"]["counts"])
    if facts.get("removed"):
        order = list(STAGES)
        facts["removed"].sort(
            key=lambda removed: (
                order.index(removed.get("stage")) if removed.get("stage") in order else len(order),
                -(removed.get("count") or 0),
                str(removed.get("kind")),
            )
        )
    return facts


def _plain(value: Any) -> Any:
    """What JSON knows. Numbers and arrays of numpy become Python's, and what is not a number becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, numpy.ndarray | numpy.generic):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(entry) for entry in (sorted(value) if isinstance(value, set | frozenset) else value)]
    return str(value)


def _by_size(shares: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(shares.items(), key=lambda share: (-(share[1] or 0), share[0])))


def _as_json(facts: Mapping[str, Any]) -> str:
    text = json.dumps(facts, ensure_ascii=False, indent=2, allow_nan=False)
    # Numbers of one list on one line. Inside a string there is no line break, so no string is touched.
    text = re.sub(r"\[\n([-+.\deE,\s]*)\n\s*\]", lambda found: "[" + " ".join(found[1].split()) + "]", text)
    return re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)  # lone surrogates are no UTF-8


# report.html


def render_page(facts: dict[str, Any]) -> str:
    """report.html. `facts` are plain, as they come back from report.json."""
    drawings = {"flow": _flow(facts), "histograms": _histograms(facts), "joint": _joint(facts)}
    return _environment().get_template(PAGE).render(facts=facts, **drawings, stages=STAGES)


@functools.cache
def _environment() -> jinja2.Environment:
    """Whatever is not markup of the frame itself is made visible, then escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FRAMES),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        finalize=lambda value: visible(shortened(value)) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _number,
        "percent": _percent,
        "prose": prose,
        "token": token_markup,
        "written": _written,
        "share_rows": _share_rows,
        "zipped": lambda left, right: list(itertools.zip_longest(left or (), right or ())),
    }
    environment.globals |= {"tokens_shown": TOKENS_SHOWN}
    return environment


def _written(value: Any) -> str:
    """A setting, as a person would write it down: ["a.tsv", "b.tsv"] → "a.tsv, b.tsv"."""
    if isinstance(value, list):
        return ", ".join(map(_written, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _number(value: Any) -> str:
    """12345 → "12,345"; what is missing → "–"."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3g}"


def _percent(part: Any, whole: Any = 1) -> str:
    """0.987 → "98.7 %"; a part that is not nothing is never "0.0 %", and one that is not all never "100.0 %"."""
    if not isinstance(part, int | float) or not isinstance(whole, int | float) or not whole:
        return "–"
    share = part / whole
    if 0 < share < 0.001:
        return "< 0.1\u00a0%"
    if 0.999 < share < 1:
        return "> 99.9\u00a0%"
    return f"{share:.1%}".replace("%", "\u00a0%")


def _share_rows(shares: Mapping[str, int] | None, at_most: int = 12) -> list[dict[str, Any]]:
    """{"greek": 3, "latin": 9} → rows of a bar chart, the largest first, the smallest ones added up in a last one."""
    ranked = [(name, count) for name, count in _by_size(shares or {}).items() if count]
    total = sum(count for _, count in ranked)
    shown, rest = (ranked, []) if len(ranked) <= at_most else (ranked[: at_most - 1], ranked[at_most - 1 :])
    rows = [{"name": name, "count": count, "share": count / total if total else 0} for name, count in shown]
    if rest:
        count = sum(count for _, count in rest)
        rows.append({"name": None, "others": len(rest), "count": count, "share": count / total if total else 0})
    return rows


# Drawings of the page: the places of bars, cells and lines, in the units of an SVG's viewBox


FLOW_HEIGHT, FLOW_LABEL, FLOW_GAP = 150, 22, 6

MOST_TICKS = 9

LIMIT_IN_VIEW = 4
"""A limit that is further from the longest row than this many times is told, not drawn."""


class _Scale(NamedTuple):
    """A logarithmic axis: lengths from `low` to `high` lie between `start` and `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, length: float) -> float:
        part = (_log(length) - _log(self.low)) / (_log(self.high) - _log(self.low))
        return round(self.start + part * (self.end - self.start), 2)

    def ticks(self) -> list[dict[str, Any]]:
        """1, 2, 5, 10, 20 … where there is room for them, or some even steps where lengths hardly differ."""
        round_lengths = [m * 10**e for e in range(10) for m in (1, 2, 5) if self.low <= m * 10**e < self.high]
        if len(round_lengths) > MOST_TICKS:
            round_lengths = [length for length in round_lengths if str(length)[0] == "1"]
        if len(round_lengths) < 3:
            round_lengths = sorted({round(self.low + part * (self.high - 1 - self.low) / 3) for part in range(4)})
        return [{"at": self(length), "length": length} for length in round_lengths]


def _log(length: float) -> float:
    return math.log(max(length, 0.5))  # a length of 0 has its place left of 1


def _flow(facts: dict[str, Any]) -> dict[str, Any] | None:
    """Streams from one block of all examples read to where they ended: splits, then the stages that removed some."""
    rows, splits = facts.get("rows") or {}, facts.get("splits") or {}
    read = rows.get("read")
    if not read:
        return None
    ends = [{"kind": "kept", "name": name, "count": count} for name, count in splits.items() if count]
    if not ends and rows.get("kept"):
        ends = [{"kind": "kept", "name": "kept", "count": rows["kept"]}]
    for stage, removed in itertools.groupby(facts.get("removed") or (), key=lambda removed: removed.get("stage")):
        if count := sum(entry.get("count") or 0 for entry in removed):
            ends.append({"kind": "removed", "name": STAGES.get(stage, stage), "count": count})
    whole = max(read, sum(end["count"] for end in ends))  # one row can give several examples
    thickness = [max(FLOW_HEIGHT * end["count"] / whole, 1.5) for end in ends]
    slots = [max(thick, FLOW_LABEL) + FLOW_GAP for thick in thickness]
    height = max(sum(slots), FLOW_HEIGHT)
    left = (height - sum(thickness)) / 2
    flow = {"read": read, "height": round(height), "top": round(left, 1), "thickness": round(sum(thickness), 1)}
    top, streams = (height - sum(slots)) / 2, []
    for end, thick, slot in zip(ends, thickness, slots, strict=True):
        right = top + (slot - thick) / 2
        curve = f"M0 {left:.1f}C50 {left:.1f} 50 {right:.1f} 100 {right:.1f}v{thick:.1f}"
        curve += f"C50 {right + thick:.1f} 50 {left + thick:.1f} 0 {left + thick:.1f}z"
        streams.append({**end, "path": curve, "middle": round(top + slot / 2, 1), "thickness": round(thick, 1)})
        left, top = left + thick, top + slot
    return {**flow, "streams": streams}


def _histograms(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """One drawing for each side that has lengths, in a viewBox of 420 × 190."""
    sides = facts.get("lengths") or {}
    found = {side: sides.get(side) or {} for side in ("source", "target")}
    return [_histogram(side, it) for side, it in found.items() if it.get("edges") and it.get("counts")]


def _histogram(side: str, lengths: dict[str, Any]) -> dict[str, Any]:
    edges, limit = lengths["edges"], lengths.get("limit")
    limit_is_drawn = bool(limit) and limit + 1 <= LIMIT_IN_VIEW * edges[-1]
    x = _Scale(edges[0], max(edges[-1], (limit + 1) * 1.05) if limit_is_drawn else edges[-1], 6, 414)
    bars = [
        {
            "x": x(start),
            "width": round(x(end) - x(start), 2),
            "density": count / (_log(end) - _log(start)),
            "is_over": bool(limit) and start > limit,
            "tokens": _bin_name(start, end),
            "count": count,
        }
        for (start, end), count in zip(itertools.pairwise(edges), lengths["counts"], strict=True)
        if count
    ]
    highest = max((bar["density"] for bar in bars), default=1)
    for bar in bars:
        bar["height"] = max(round(126 * bar["density"] / highest, 2), 1)
    return {
        "side": side,
        "bars": bars,
        "ticks": x.ticks(),
        "limit": x(limit + 1) if limit_is_drawn else None,
        "over_is_drawn": any(bar["is_over"] for bar in bars),
        "median": x(lengths["p50"] + 0.5) if lengths.get("p50") else None,
        "facts": lengths,
    }


def _bin_name(start: int, end: int) -> str:
    return f"{start:,}" if end == start + 1 else f"{start:,} to {end - 1:,}"


def _joint(facts: dict[str, Any]) -> dict[str, Any] | None:
    """Cells of a heat grid in a viewBox of 420 × 372: the more rows, the stronger, on a logarithmic scale."""
    packing, lengths = facts.get("packing") or {}, facts.get("lengths") or {}
    joint = lengths.get("joint") or {}
    source_edges, target_edges, counts = (joint.get(name) for name in ("source_edges", "target_edges", "counts"))
    if not (source_edges and target_edges and counts):
        return None
    x = _Scale(source_edges[0], source_edges[-1], 54, 412)
    y = _Scale(target_edges[0], target_edges[-1], 332, 12)
    most = max(map(max, counts)) or 1
    cells = []
    for i, j in itertools.product(range(len(source_edges) - 1), range(len(target_edges) - 1)):
        if counts[i][j]:
            left, right = x(source_edges[i]), x(source_edges[i + 1])
            bottom, top = y(target_edges[j]), y(target_edges[j + 1])
            cells.append(
                {
                    "x": left,
                    "y": top,
                    "width": round(right - left, 2),
                    "height": round(bottom - top, 2),
                    "strength": _strength(counts[i][j], most),
                    "source": _bin_name(source_edges[i], source_edges[i + 1]),
                    "target": _bin_name(target_edges[j], target_edges[j + 1]),
                    "count": counts[i][j],
                }
            )
    ratio = None
    if packing.get("max_source_tokens") and packing.get("max_target_tokens"):
        per_source = packing["max_target_tokens"] / packing["max_source_tokens"]
        low, high = source_edges[0] or 0.5, source_edges[-1]
        ratio = {"x1": x(low), "y1": y(low * per_source), "x2": x(high), "y2": y(high * per_source)}
    limits = {side: (lengths.get(side) or {}).get("limit") for side in ("source", "target")}
    return {
        "cells": cells,
        "most": most,
        "scale": [{"count": count, "strength": _strength(count, most)} for count in _round_counts(most)],
        "x_ticks": x.ticks(),
        "y_ticks": y.ticks(),
        "ratio": ratio,
        "source_limit": x(limits["source"] + 1) if limits["source"] and limits["source"] + 1 < x.high else None,
        "target_limit": y(limits["target"] + 1) if limits["target"] and limits["target"] + 1 < y.high else None,
    }


def _strength(count: int, most: int) -> float:
    return round(0.14 + 0.86 * (math.log(count) / math.log(most) if most > 1 else 1), 3)


def _round_counts(most: int) -> list[int]:
    """The counts in the legend of the heat grid: 1, 10, 100 … and the most."""
    return sorted({10**power for power in range(12) if 10**power < most} | {most})
