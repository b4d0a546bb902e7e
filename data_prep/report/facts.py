"""What the report shows, put together: plain numbers and short texts, from arrays and tables.

Texts are shortened here, so that a report of a million rows is as light as one of a hundred.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy
import transformers
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from diptych.data_prep.pipeline.dataset_tables import PackingPlan, direction_counts, token_counts
from diptych.data_prep.pipeline.gather import Gathered
from diptych.data_prep.pipeline.inputs import Inputs
from diptych.data_prep.pipeline.prepare_settings import PrepareSettings
from diptych.data_prep.pipeline.prepared_folder import code_version
from diptych.data_prep.pipeline.row_stages import Counts
from diptych.data_prep.pipeline.selection import ALSO_HELD_OUT, REMOVED, Selection, conflict_rows
from diptych.data_prep.report.page import joint_histogram, length_facts, padded_fill
from diptych.data_prep.report.summary import (
    cut_off_warnings,
    own_sets_warnings,
    packing_warnings,
    shortened,
    usage_warnings,
)
from diptych.data_prep.report.text_shown import token_chips
from diptych.data_prep.rows.named_splits import KINDS
from diptych.data_prep.rows.records import Reject, Rejects
from diptych.data_prep.text_to_ids.decoder_start import split_start
from diptych.data_prep.text_to_ids.templates import Template, golden_examples
from diptych.data_prep.text_to_ids.two_vocabularies import has_two_vocabularies, source_side, target_side

TRAIN = KINDS[0]
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


@dataclass(frozen=True)
class Results:
    """What a preparation has made, when nothing of it is written yet."""

    settings: PrepareSettings
    inputs: Inputs
    template: Template
    tokenizer: PreTrainedTokenizerBase
    gathered: Gathered
    """All rows that were encoded."""
    selection: Selection
    duplicates: dict[str, Any]
    """What `duplicate_facts` gave."""
    places: Mapping[str, numpy.ndarray]
    """Of the rows of each split, in `gathered`."""
    tables: DatasetDict
    plan: PackingPlan | None
    """None where nothing is packed."""
    rejects: Rejects
    too_few_tokens: str | None
    """A warning that a trained tokenizer is smaller than asked for."""


def duplicate_facts(gathered: Gathered, selection: Selection) -> dict[str, Any]:
    groups = [conflict_rows(gathered, group) for group in selection.conflicting[:CONFLICTS_SHOWN]]
    return {
        **selection.duplicates,
        "conflicts": len(selection.conflicting),
        "conflict_examples": [
            {"source": _short(group["source"]), "targets": [_short(row["target"]) for row in group["rows"]]}
            for group in groups
        ],
    }


def _input_facts(results: Results) -> list[dict[str, Any]]:
    """Of each source: how it was read, and how much of it there is."""
    inputs, gathered, selection = results.inputs, results.gathered, results.selection
    train = results.places.get(TRAIN, numpy.zeros(0, int))
    number = gathered.column("source_number")
    kept = numpy.bincount(number[selection.split_of_row != REMOVED], minlength=len(inputs.sources)).tolist()
    mixed = numpy.bincount(number[train], minlength=len(inputs.sources)).tolist()
    return [
        {
            "name": source.name,
            "digest": source.digest,
            "split": source.split,
            "format": inputs.converters[place].format.name,
            "read": gathered.examples_read[place],
            "kept": kept[place],
            "rejected": gathered.examples_read[place] - kept[place],
            "mixed": mixed[place] if results.settings.mixture is not None else None,
            "share": mixed[place] / len(train) if len(train) else 0.0,
        }
        for place, source in enumerate(inputs.sources)
    ]


def _tokenizer_facts(results: Results) -> dict[str, Any]:
    tokenizer, counts = results.tokenizer, results.gathered.counts
    lost = {
        it["kind"]: {"examples": counts.lost[it["kind"]], "such as": f"{it['origin']}: {it['example']}"}
        for it in counts.lost_examples
    }
    return {
        "from": results.settings.tokenizer or f"{results.settings.train_tokenizer} trained on the train split",
        "class": type(tokenizer).__name__,
        "tokens": len(tokenizer),
        **({"target_tokens": len(target_side(tokenizer))} if has_two_vocabularies(tokenizer) else {}),
        "lost": lost,
    }


def manifest_of(results: Results) -> dict[str, Any]:
    """What manifest.json says; the fingerprint, the format and the sizes of the files are added when it is written."""
    settings, selection, rejects = results.settings, results.selection, results.rejects
    counts, examples_read = results.gathered.counts, sum(results.gathered.examples_read)
    assert selection.kept + rejects.count == examples_read, (selection.kept, rejects.count, examples_read)
    inputs, packing = _input_facts(results), results.plan.entry if results.plan else None
    warnings = [
        *usage_warnings(results.template, results.tokenizer, counts),
        *results.inputs.warnings,
        *selection.warnings,
        *own_sets_warnings(selection.own_sets, inputs),
        *packing_warnings(packing, settings),
        *cut_off_warnings(rejects),
        *filter(None, [results.too_few_tokens]),
    ]
    return {
        "rows": {
            "read": counts.rows,
            "examples": examples_read,
            "kept": selection.kept,
            "rejected": rejects.count,
        },
        "rejected_by_kind": rejects.by_kind(),
        "first_rejected": {
            kind: f"{examples[0].origin}: {shortened(examples[0].reason)}"
            for kind, examples in rejects.examples.items()
        },
        "splits": {name: len(table) for name, table in results.tables.items()},
        "directions": direction_counts(results.tables),
        "groups": selection.groups,
        "own_sets": selection.own_sets,
        "conflicts": len(selection.conflicting),
        "sensitive": dict(counts.sensitive.most_common()) if settings.sensitive else None,
        "tokens": token_counts(results.gathered, results.places, settings, rejects),
        "packing": packing,
        "inputs": inputs,
        "template": asdict(results.template),
        "tokenizer": _tokenizer_facts(results),
        "settings": asdict(settings),
        "warnings": warnings,
        "code": code_version(),
        "versions": {"datasets": datasets.__version__, "transformers": transformers.__version__},
    }


def report_facts(results: Results, manifest: dict[str, Any]) -> dict[str, Any]:
    """What report.html shows and report.json says: much of the manifest, and examples."""
    settings, gathered, rejects = results.settings, results.gathered, results.rejects
    counts, tokenizer, plan = gathered.counts, results.tokenizer, results.plan
    start = plan.decoder_start_token_id if plan else target_side(tokenizer).pad_token_id
    return {
        "name": Path(settings.out).name,
        "rows": {**manifest["rows"], "read": manifest["rows"]["examples"]},
        **{name: manifest[name] for name in ("splits", "groups", "own_sets", "tokenizer", "warnings")},
        "template": {**manifest["template"], "golden": golden(tokenizer, results.template)},
        "sources": manifest["inputs"],
        "removed": removed(rejects),
        "lengths": lengths(gathered, results.places, manifest["tokens"], settings.too_long),
        "packing": packing(manifest["packing"], gathered, results.places.get(TRAIN), settings.seed),
        "duplicates": results.duplicates,
        "contamination": contamination(rejects, settings.decontaminate),
        "sensitive": sensitive(counts, settings.sensitive),
        "scripts": {
            "source": dict(counts.source_scripts.most_common()),
            "target": dict(counts.target_scripts.most_common()),
        },
        "categories": dict(counts.categories.most_common(CATEGORIES_SHOWN)),
        "samples": samples(next(iter(results.tables.values())), tokenizer, start),
        "settings": manifest["settings"],
    }


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
