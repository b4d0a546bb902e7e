"""What a person is told when a dataset is prepared.

    Read       2,017 rows from codealpaca_2k.json: 2,015 kept, 2 rejected
    Rejected   2 × empty output, the first in codealpaca_2k.json:238
    Split      train 1,813 | validation 101 | test 101 rows, from 1,917 groups that share no text
    Source     in all splits: median 57 tokens, 90 % up to 82, 99 % up to 123, longest 228 | none cut at 512
    Packing    train: 1,813 examples in 205 rows of 544 + 512 tokens, 8.8 a row | filled: source 98.7 %, target …

One line for each thing that went in or came out, then a warning for each thing that was given and is not used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from diptych.data_prep.prepared import REJECTS
from diptych.data_prep.records import Record, Rejects
from diptych.data_prep.templates import Template

NEXT_TO_ALONE = 1.05
"""Examples a row: with fewer, packing saves hardly any row."""

STARTS = {
    "setting": "as decoder_start_token_id says",
    "model config": "as the config beside the tokenizer has it",
    "assumed": "the padding token, assumed as T5 and Diptych have it; --decoder_start_token_id sets another",
}


def summary_lines(folder: Path, manifest: dict[str, Any], rejects: Rejects) -> list[str]:
    rows, tokens = manifest["rows"], manifest["tokens"]
    names = ", ".join(source["name"] for source in manifest["inputs"])
    first_of = {reject.kind: reject.origin for reject in reversed(rejects.rows)}
    return [
        f"Read       {rows['read']:,} rows from {names}: {rows['kept']:,} kept, {rows['rejected']:,} rejected",
        *(
            f"Rejected   {count:,} × {kind}, the first in {first_of[kind]}"
            for kind, count in manifest["rejected_by_kind"].items()
        ),
        splits_line(manifest),
        f"Source     {_lengths(tokens['source'])}",
        f"Target     {_lengths(tokens['target'])}",
        *packing_lines(manifest),
        f"Template   {manifest['template']['name']}, saved with the tokenizer",
        f"Tokenizer  {manifest['tokenizer']['from']}, {manifest['tokenizer']['tokens']:,} tokens",
        f"Prepared   {folder}" + (f" (rows not kept: {folder / REJECTS})" if rejects.rows else ""),
    ]


def splits_line(manifest: dict[str, Any]) -> str:
    rows = " | ".join(f"{name} {count:,}" for name, count in manifest["splits"].items())
    shared = "text" if manifest["settings"]["split_by"] == "both" else "input"
    return f"Split      {rows} rows, from {manifest['groups']:,} groups that share no {shared}"


def packing_lines(manifest: dict[str, Any]) -> Iterator[str]:
    packing = manifest["packing"]
    if packing is None:
        yield "Packing    none: every row of a batch will be one example, padded to the longest"
        return
    per_row = packing["examples"] / packing["rows"]
    sources = "each source encoded for itself"
    if packing["share_sources"]:
        sources = f"{packing['shared']:,} examples read a source that is encoded for another"
    yield (
        f"Packing    train: {packing['examples']:,} examples in {packing['rows']:,} rows of"
        f" {packing['max_source_tokens']:,} + {packing['max_target_tokens']:,} tokens,"
        f" {per_row:.1f} a row | filled: source {packing['source_fill']:.1%},"
        f" target {packing['target_fill']:.1%} | {sources}"
        + (" | packing gains nothing: next to every row holds one example alone" if per_row < NEXT_TO_ALONE else "")
    ).replace("%", " %")
    yield f"Decoder    starts with token {packing['decoder_start_token_id']}, {STARTS[packing['decoder_start_from']]}"


def packing_warnings(manifest: dict[str, Any]) -> Iterator[str]:
    packing = manifest["packing"]
    if packing is None or packing.get("better_budget") is None:
        return
    given = [name for name in ("packed_source_tokens", "packed_target_tokens") if manifest["settings"][name]]
    source, target = packing["better_budget"]
    yield (
        f"packed rows of {packing['max_source_tokens']:,} + {packing['max_target_tokens']:,} tokens are filled to"
        f" {packing['source_fill']:.1%} and {packing['target_fill']:.1%}; the rest is padding, which costs time and"
        f" memory. Drop {' and '.join(given)}: rows of {source:,} + {target:,} tokens would be chosen."
    ).replace("%", " %")


def usage_warnings(
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    records: list[Record],
    unused_fields: Counter,
) -> Iterator[str]:
    """What was given and is not used, or not as one might expect."""
    if unused_fields:
        yield f"fields that are not used: {', '.join(name for name, _ in unused_fields.most_common())}."
    with_input = sum(bool(record.input) for record in records)
    if with_input and "input" not in template.source_variables():
        yield f"template {template.name} leaves out the input, and {with_input:,} rows have one."
    if "output" not in template.target_variables():
        yield f"template {template.name} leaves out the output: every target is the same."
    special_in_template = [
        token for token in tokenizer.all_special_tokens if token in template.source + template.target
    ]
    if special_in_template:
        yield (
            f"template {template.name} holds {', '.join(special_in_template)}. Text is always text here, special"
            " tokens are added by the tokenizer alone; so this is encoded as its characters."
        )


def _lengths(tokens: dict[str, int]) -> str:
    cut = f"{tokens['cut']:,} cut at {tokens['limit']:,}" if tokens["cut"] else f"none cut at {tokens['limit']:,}"
    return (
        f"in all splits: median {tokens['p50']:,} tokens, 90 % up to {tokens['p90']:,}, 99 % up to {tokens['p99']:,},"
        f" longest {tokens['p100']:,} | {cut}"
    )
