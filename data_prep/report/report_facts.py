"""What manifest.json and the report say: plain numbers and short texts, from arrays and tables.

Texts are shortened here, so that a report of a million rows is as light as one of a hundred.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy
import transformers
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from diptych.data_prep.command_line.errors import excerpt, message_line
from diptych.data_prep.packing.unpacked_families import why_not_packed
from diptych.data_prep.pipeline.dataset_tables import PackingPlan, direction_counts, judged_counts, token_counts
from diptych.data_prep.pipeline.gather_rows import Gathered
from diptych.data_prep.pipeline.prepare_inputs import Inputs
from diptych.data_prep.pipeline.prepared_folder import code_version
from diptych.data_prep.pipeline.row_stages import OVER_THE_LIMIT, Stages
from diptych.data_prep.pipeline.select_rows import ALSO_HELD_OUT, REMOVED, Selection
from diptych.data_prep.report.printed_summary import (
    cut_off_warnings,
    inline_warnings,
    judged_warnings,
    kept_columns_warnings,
    own_sets_warnings,
    packing_warnings,
    usage_warnings,
)
from diptych.data_prep.report.visible_text import shortened, token_chips
from diptych.data_prep.rows.named_splits import KINDS
from diptych.data_prep.rows.records import Rejects
from diptych.data_prep.text_to_ids.decoder_start import split_start
from diptych.data_prep.text_to_ids.templates import golden_examples
from diptych.data_prep.text_to_ids.two_vocabularies import has_two_vocabularies, source_side, target_side

TRAIN = KINDS[0]
SAMPLES = 10
PADDED_BATCH = 32
"""Rows of the batches whose padding packing is compared with."""
SENSITIVE_SHOWN = 5
CATEGORIES_SHOWN = 30
REASON_CHARACTERS = 120

BINS = 40

STAGES = CHECKS, CLEANING, TEMPLATE, LENGTHS = ("checks", "cleaning", "template", "length limits")
"""Where a row can be rejected, in order."""
STAGE_OF = {
    **dict.fromkeys(("template failed", "template empty", "no tokens"), TEMPLATE),
    **dict.fromkeys(OVER_THE_LIMIT, LENGTHS),
}
CONTAMINATED = "overlaps the evaluation data"
CLEANED = (ALSO_HELD_OUT, "exact duplicate", "near duplicate", CONTAMINATED, "source ", "target ")
"""How the kinds of rejects begin that cleaning gives."""


@dataclass(frozen=True)
class Results:
    """All that a preparation has made, before it is written."""

    inputs: Inputs
    stages: Stages
    """With the tokenizer, even if it was trained here."""
    gathered: Gathered
    """All rows that were encoded."""
    selection: Selection
    places: Mapping[str, numpy.ndarray]
    """For each split, the places of its rows in `gathered`."""
    tables: DatasetDict
    plan: PackingPlan | None
    """None where nothing is packed."""
    rejects: Rejects
    too_few_tokens: str | None
    """A warning that a trained tokenizer is smaller than asked for."""

    def of_train(self, column: str) -> numpy.ndarray:
        """(train rows,) of a column of numbers."""
        return self.gathered.column(column)[self.places.get(TRAIN, numpy.zeros(0, int))]


def _input_facts(results: Results) -> list[dict[str, Any]]:
    """Of each source: how it was read, and how much of it there is."""
    inputs, gathered, selection = results.inputs, results.gathered, results.selection
    kept_rows = gathered.column("source_number")[selection.split_of_row != REMOVED]
    kept, mixed = (
        numpy.bincount(numbers, minlength=len(inputs.sources)).tolist()
        for numbers in (kept_rows, results.of_train("source_number"))
    )
    return [
        {
            "name": source.name,
            "digest": source.digest,
            "split": source.split,
            "format": inputs.converters[place].format.name,
            "read": gathered.examples_read[place],
            "kept": kept[place],
            "rejected": gathered.examples_read[place] - kept[place],
            "mixed": mixed[place] if results.stages.settings.mixture is not None else None,
            "share": mixed[place] / max(sum(mixed), 1),
        }
        for place, source in enumerate(inputs.sources)
    ]


def manifest_of(results: Results) -> dict[str, Any]:
    """What manifest.json says; the fingerprint, the format and the sizes of the files are added when it is written."""
    settings, selection, rejects = results.stages.settings, results.selection, results.rejects
    counts, examples_read = results.gathered.counts, sum(results.gathered.examples_read)
    assert selection.kept + rejects.count == examples_read, (selection.kept, rejects.count, examples_read)
    inputs, packing = _input_facts(results), results.plan.entry if results.plan else None
    tokenizer, judged = results.stages.tokenizer, judged_counts(results.gathered, results.places)
    warnings = [
        *usage_warnings(results.stages.template, counts),
        *kept_columns_warnings(settings.kept, results.gathered.examples, counts.unused_fields),
        *inline_warnings(settings, counts),
        *results.inputs.warnings,
        *selection.warnings,
        *own_sets_warnings(selection.own_sets, inputs),
        *packing_warnings(packing, settings),
        *judged_warnings(judged),
        *cut_off_warnings(rejects),
        *filter(None, [results.too_few_tokens]),
    ]
    return {
        "rows": {"read": counts.rows, "examples": examples_read, "kept": selection.kept, "rejected": rejects.count},
        "rejected_by_kind": dict(rejects.kinds.most_common()),
        "first_rejected": {
            kind: f"{examples[0].origin}: {excerpt(examples[0].reason, REASON_CHARACTERS)}"
            for kind, examples in rejects.examples.items()
        },
        "splits": {name: len(table) for name, table in results.tables.items()},
        "directions": direction_counts(results.tables),
        "groups": selection.groups,
        "own_sets": selection.own_sets,
        "conflicts": len(selection.conflicting),
        **({"changed": changed} if (changed := dict(+counts.changed)) else {}),
        "sensitive": dict(counts.sensitive.most_common()) if settings.sensitive else None,
        "tokens": token_counts(results.gathered, results.places, settings, rejects),
        "packing": packing,
        **({"preferences": results.stages.preferences, "judged": judged} if judged else {}),
        "not_packed": why_not_packed(settings.tokenizer) if settings.packing else "",
        "inputs": inputs,
        "template": asdict(results.stages.template),
        "tokenizer": {
            "from": settings.tokenizer or f"{settings.train_tokenizer} trained on the train split",
            "class": type(tokenizer).__name__,
            "tokens": len(tokenizer),
            **({"target_tokens": len(target_side(tokenizer))} if has_two_vocabularies(tokenizer) else {}),
            "lost": {
                it["kind"]: {"examples": counts.lost[it["kind"]], "such as": f"{it['origin']}: {it['example']}"}
                for it in counts.lost_examples
            },
        },
        "settings": asdict(settings),
        "warnings": list(map(message_line, warnings)),
        "code": code_version(),
        "versions": {"datasets": datasets.__version__, "transformers": transformers.__version__},
    }


def report_facts(results: Results, manifest: dict[str, Any]) -> dict[str, Any]:
    """What report.html shows and report.json says: the manifest, and examples."""
    settings, gathered, rejects = results.stages.settings, results.gathered, results.rejects
    counts, tokenizer, plan = gathered.counts, results.stages.tokenizer, results.plan
    start = plan.entry["decoder_start_token_id"] if plan else target_side(tokenizer).pad_token_id
    overlaps = [{"origin": str(it.origin), "ngram": it.reason} for it in rejects.examples.get(CONTAMINATED, ())]
    contamination = {"removed": rejects.kinds[CONTAMINATED], "against": settings.decontaminate, "examples": overlaps}
    sensitive = []
    for kind, _ in counts.sensitive.most_common():
        sensitive += [it for it in counts.sensitive_examples if it["kind"] == kind][:SENSITIVE_SHOWN]
    lengths, all_rows = {}, numpy.concatenate(list(results.places.values()))
    for side, tokens in manifest["tokens"].items():
        of_side = gathered.column(f"{side}_tokens")[all_rows]
        bins = histogram(of_side[of_side > 0], tokens["limit"])
        over = {"over_limit": tokens["cut"] + tokens["dropped"], "treatment": settings.too_long}
        lengths[side] = {**bins, **tokens, **over}
    padded_fills = {
        f"padded_{side}_fill": padded_fill(results.of_train(f"{side}_tokens"), settings.seed)
        for side in (("source", "target") if plan else ())
    }
    return {
        **manifest,
        "name": Path(settings.out).name,
        "golden": [f"{it['source']}  →  {it['target']}" for it in golden_examples(tokenizer, results.stages.template)],
        "removed": _removed(rejects),
        "lengths": lengths,
        "packing": plan and {**plan.entry, **padded_fills, "batch_size": PADDED_BATCH},
        "duplicates": results.selection.duplicates,
        "contamination": contamination if settings.decontaminate else None,
        "sensitive": {"counts": manifest["sensitive"], "examples": sensitive} if settings.sensitive else None,
        "scripts": {
            "source": dict(counts.source_scripts.most_common()),
            "target": dict(counts.target_scripts.most_common()),
        },
        "categories": dict(counts.categories.most_common(CATEGORIES_SHOWN)),
        "samples": list(_samples(next(iter(results.tables.values())), tokenizer, start)),
    }


def _removed(rejects: Rejects) -> list[dict[str, Any]]:
    """Every kind of reject with some examples, in the order of the stages, the most frequent first in each."""
    found = []
    for kind, count in rejects.kinds.most_common():
        stage = STAGE_OF.get(kind) or (CLEANING if kind.startswith(CLEANED) else CHECKS)
        examples = [
            {"origin": str(it.origin), "field": it.field, "reason": it.reason, "raw": shortened(it.as_json()["raw"])}
            for it in rejects.examples[kind]
        ]
        found.append({"stage": stage, "kind": kind, "count": count, "examples": examples})
    return sorted(found, key=lambda removed: STAGES.index(removed["stage"]))


def histogram(lengths: numpy.ndarray, limit: int) -> dict[str, list[int]]:
    """`counts[i]` lengths are at least `edges[i]` and below `edges[i + 1]`, which grow by some per cent; no bin has
    lengths on both sides of the limit. [1, 1, 2, 9] → {"edges": [1, 2, 3, …, 9, 10], "counts": [2, 1, 0, …, 1]}."""
    shortest, longest = int(lengths.min()), int(lengths.max())
    grown = numpy.geomspace(max(shortest, 1), longest + 1, BINS + 1).round().astype(int).tolist()
    edges = {*grown, shortest, longest + 1, *([limit + 1] if shortest < limit < longest else [])}
    return {"edges": sorted(edges), "counts": numpy.histogram(lengths, sorted(edges))[0].tolist()}


def padded_fill(lengths: numpy.ndarray, seed: int, batch_size: int = PADDED_BATCH) -> float:
    """The part of random batches, each padded to its longest row, that is no padding: [2, 4] in one batch → 0.75."""
    shuffled = numpy.random.default_rng(seed).permutation(lengths)
    starts = numpy.arange(0, len(shuffled), batch_size)
    rows = numpy.diff([*starts, len(shuffled)])
    return float(shuffled.sum() / (numpy.maximum.reduceat(shuffled, starts) * rows).sum())


def _samples(rows: Dataset, tokenizer: PreTrainedTokenizerBase, decoder_start: int) -> Iterator[dict[str, Any]]:
    """Some rows, evenly from all, as a model meets them, token by token."""
    for place in numpy.unique(numpy.linspace(0, len(rows) - 1, SAMPLES).astype(int)).tolist():
        row = rows[place]
        start, labels = split_start(row["labels"], decoder_start, tokenizer)
        yield {
            "origin": row["origin"],
            "source": shortened(row["source"]),
            "target": shortened(row["target"]),
            **{name: shortened(row[name]) for name in ("rejected", "mark") if name in row},
            "input_tokens": token_chips(source_side(tokenizer), row["input_ids"]),
            "label_tokens": token_chips(target_side(tokenizer), labels),
            "decoder_input_tokens": token_chips(target_side(tokenizer), [start, *labels[:-1]]),
        }
