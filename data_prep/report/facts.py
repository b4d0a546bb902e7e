"""What the report shows, put together: plain numbers and short texts, from arrays and tables.

Texts are shortened here, so that a report of a million rows is as light as one of a hundred.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from diptych.data_prep.pipeline.gather import Gathered
from diptych.data_prep.pipeline.row_stages import Counts
from diptych.data_prep.pipeline.selection import ALSO_HELD_OUT, Selection, conflict_rows
from diptych.data_prep.report.page import joint_histogram, length_facts, padded_fill
from diptych.data_prep.report.text_shown import token_chips
from diptych.data_prep.rows.records import Reject, Rejects
from diptych.data_prep.text_to_ids.decoder_start import split_start
from diptych.data_prep.text_to_ids.templates import Template, golden_examples
from diptych.data_prep.text_to_ids.two_vocabularies import source_side, target_side

SAMPLES = 10
PADDED_BATCH = 32
"""Rows of the batches whose padding packing is compared with."""
CONFLICTS_SHOWN = SENSITIVE_SHOWN = 5
CATEGORIES_SHOWN = 30
SHOWN_CHARACTERS = 2_000

STAGE_OF = {
    "template failed": "template",
    "template empty": "template",
    "no tokens": "template",
    "source over the limit": "length",
    "target over the limit": "length",
}
CONTAMINATED = "overlaps the evaluation data"
CLEANING = (ALSO_HELD_OUT, "exact duplicate", "near duplicate", CONTAMINATED, "source ", "target ")
"""How the kinds begin that cleaning gives."""


def removed(rejects: Rejects) -> list[dict[str, Any]]:
    """Every kind of reject, the most frequent first, with some examples."""
    return [
        {
            "stage": _stage(kind),
            "kind": kind,
            "count": count,
            "examples": [_shown(reject) for reject in rejects.examples[kind]],
        }
        for kind, count in rejects.by_kind().items()
    ]


def _stage(kind: str) -> str:
    return STAGE_OF.get(kind) or ("clean" if kind.startswith(CLEANING) else "check")


def _shown(reject: Reject) -> dict[str, Any]:
    raw = reject.as_json()["raw"][:SHOWN_CHARACTERS]
    return {"origin": str(reject.origin), "field": reject.field, "reason": reject.reason, "raw": raw}


def lengths(gathered: Gathered, places: Mapping[str, numpy.ndarray], tokens: dict, too_long: str) -> dict[str, Any]:
    """Histograms of all splits; `tokens` is what `token_counts` gave."""
    rows = numpy.concatenate(list(places.values()))
    sides = {side: gathered.column(f"{side}_tokens")[rows] for side in ("source", "target")}
    found: dict[str, Any] = {}
    for side, values in sides.items():
        over = tokens[side]["cut"] + tokens[side]["dropped"]
        counted = length_facts(values, tokens[side]["limit"], too_long)
        found[side] = {**counted, **tokens[side], "over_limit": over}
    return {**found, "joint": joint_histogram(sides["source"], sides["target"])}


def packing(
    entry: dict[str, Any] | None, gathered: Gathered, train: numpy.ndarray | None, seed: int
) -> dict[str, Any] | None:
    """What manifest.json says of it, and how full padded batches would be."""
    if entry is None:
        return None
    fills = {
        f"padded_{side}_fill": padded_fill(gathered.column(f"{side}_tokens")[train], PADDED_BATCH, seed)
        for side in ("source", "target")
    }
    return {**entry, **fills, "batch_size": PADDED_BATCH}


def duplicates(gathered: Gathered, selection: Selection) -> dict[str, Any]:
    groups = [conflict_rows(gathered, group) for group in selection.conflicting[:CONFLICTS_SHOWN]]
    return {
        **selection.duplicates,
        "conflicts": len(selection.conflicting),
        "conflict_examples": [
            {"source": _short(group["source"]), "targets": [_short(row["target"]) for row in group["rows"]]}
            for group in groups
        ],
    }


def contamination(rejects: Rejects, against: Sequence[str]) -> dict[str, Any] | None:
    if not against:
        return None
    examples = [{"origin": str(it.origin), "ngram": it.reason} for it in rejects.examples.get(CONTAMINATED, ())]
    return {"removed": rejects.kinds[CONTAMINATED], "against": list(against), "examples": examples}


def sensitive(counts: Counts, was_looked_for: bool) -> dict[str, Any] | None:
    if not was_looked_for:
        return None
    shown: Counter[str] = Counter()
    examples = []
    for example in counts.sensitive_examples:
        shown[example["kind"]] += 1
        if shown[example["kind"]] <= SENSITIVE_SHOWN:
            examples.append(example)
    return {"counts": dict(counts.sensitive.most_common()), "examples": examples}


def golden(tokenizer: PreTrainedTokenizerBase, template: Template) -> list[str]:
    """The rows by which loading checks that a template still renders the same, as texts."""
    return [f"{row['source']}  →  {row['target']}" for row in golden_examples(tokenizer, template) if row["source"]]


def samples(rows: Dataset, tokenizer: PreTrainedTokenizerBase, decoder_start: int) -> list[dict[str, Any]]:
    """Some rows, evenly from all, as a model meets them, token by token."""
    places = numpy.unique(numpy.linspace(0, len(rows) - 1, SAMPLES).astype(int)).tolist()
    return [_sample(rows[place], tokenizer, decoder_start) for place in places]


def _sample(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, decoder_start: int) -> dict[str, Any]:
    start, labels = split_start(row["labels"], decoder_start, tokenizer)
    shifted = [start, *labels[:-1]]
    return {
        "origin": row["origin"],
        "source": _short(row["source"]),
        "target": _short(row["target"]),
        "input_tokens": token_chips(source_side(tokenizer), row["input_ids"]),
        "label_tokens": token_chips(target_side(tokenizer), labels),
        "decoder_input_tokens": token_chips(target_side(tokenizer), shifted),
    }


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " …"
