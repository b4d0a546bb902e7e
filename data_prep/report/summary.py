"""What a person is told when a dataset is prepared.

    Read       2,017 rows from codealpaca_2k.json: 2,015 kept, 2 rejected
    Rejected   2 × empty output, the first in codealpaca_2k.json:238
    Split      train 1,813 | validation 101 | test 101 | 1,917 groups of examples, no text in two of them
    Source     in all splits: median 57 tokens, 90 % up to 82, 99 % up to 123, longest 228 | none over 512
    Packing    train: 1,813 examples in 192 rows of 576 + 544 tokens, 9.4 a row | filled: source 99.5 %, target …

One line for each thing that went in or came out, then a warning for each thing that was given and is not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from diptych.data_prep.command_line.errors import counted
from diptych.data_prep.pipeline.prepare_settings import PrepareSettings
from diptych.data_prep.pipeline.prepared_folder import CONFLICTS, REJECTS
from diptych.data_prep.pipeline.row_stages import Counts
from diptych.data_prep.rows.records import CUT_OFF, Rejects
from diptych.data_prep.rows.valid_text import shown_name
from diptych.data_prep.text_to_ids.templates import Template

NEXT_TO_ALONE = 1.05
"""Examples a row: with fewer, packing saves hardly any row."""

DIRECTIONS_SHOWN = 6
NAMES_SHOWN = 4
REASON_CHARACTERS = 120
FIELDS_SHOWN = 40
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thoughts")
"""What data sets call the part of an answer that is written before it."""
CONFLICT = f"one source with different targets, which stay: {CONFLICTS} lists them"

STARTS = {
    "setting": "as decoder_start_token_id says",
    "model config": "as the config beside the tokenizer has it",
    "bos_token_id": "bos, as generation has it: the config beside the tokenizer names no decoder_start_token_id",
    "eos_token_id": "eos, as its family has it: the config beside the tokenizer names no decoder_start_token_id",
    "pad_token_id": "padding, as its family has it: the config beside the tokenizer names no decoder_start_token_id",
    "assumed": "the padding token, assumed as T5 and Diptych have it; --decoder_start_token_id sets another",
}


def summary_lines(folder: Path, manifest: dict[str, Any]) -> list[str]:
    rows, tokens, names = manifest["rows"], manifest["tokens"], [source["name"] for source in manifest["inputs"]]
    named = ", ".join(names) if len(names) <= NAMES_SHOWN else f"{len(names):,} sources"
    return [
        f"Read       {_read(rows)} from {named}: {rows['kept']:,} kept, {rows['rejected']:,} rejected",
        *(
            f"Rejected   {count:,} × {kind}, the first in {manifest['first_rejected'][kind]}"
            for kind, count in manifest["rejected_by_kind"].items()
        ),
        *mixture_lines(manifest),
        *sensitive_lines(manifest),
        splits_line(manifest),
        *direction_lines(manifest),
        *own_sets_lines(manifest),
        *([f"Conflicts  {manifest['conflicts']:,} × {CONFLICT}"] if manifest["conflicts"] else []),
        f"Source     {_lengths(tokens['source'])}",
        f"Target     {_lengths(tokens['target'])}",
        *packing_lines(manifest),
        f"Template   {manifest['template']['name']}, saved with the tokenizer",
        f"Tokenizer  {manifest['tokenizer']['from']}, {_vocabulary(manifest['tokenizer'])} tokens",
        f"Report     {folder / 'report.html'}",
        f"Prepared   {folder}" + (f" (rows not kept: {folder / REJECTS})" if rows["rejected"] else ""),
    ]


def _vocabulary(tokenizer: dict[str, Any]) -> str:
    """`600`; `150 + 600` where sources and targets have one each."""
    return " + ".join(f"{tokenizer[name]:,}" for name in ("tokens", "target_tokens") if name in tokenizer)


def _read(rows: dict[str, int]) -> str:
    """Rows of several turns, instances or directions give an example for each."""
    more = f", {counted(rows['examples'], 'example')} in them," if rows["examples"] != rows["read"] else ""
    return counted(rows["read"], "row") + more


def sensitive_lines(manifest: dict[str, Any]) -> Iterator[str]:
    if manifest["sensitive"] is not None:
        found = ", ".join(f"{count:,} × {kind}" for kind, count in manifest["sensitive"].items())
        yield f"Sensitive  {found + ' (masked in the report; nothing was changed)' if found else 'nothing was found'}"


def mixture_lines(manifest: dict[str, Any]) -> Iterator[str]:
    """Of several sources, what each gave to train."""
    if manifest["settings"]["mixture"] is None:
        return
    for source in manifest["inputs"]:
        share = f"{source['share']:.1%}".replace("%", " %")
        yield f"Mixture    {share} of train, {counted(source['mixed'], 'row')}: {source['name']}"


def shortened(reason: str) -> str:
    return reason if len(reason) <= REASON_CHARACTERS else reason[:REASON_CHARACTERS] + " …"


def splits_line(manifest: dict[str, Any]) -> str:
    splits = " | ".join(f"{name} {count:,}" for name, count in manifest["splits"].items())
    if manifest["groups"] is None:
        return f"Split      {splits}"
    shared = "input" if manifest["settings"]["split_by"] == "source" else "text"
    groups = counted(manifest["groups"], "group")
    held_out = " of those held out by fractions" if manifest["own_sets"] else ""
    return f"Split      {splits} | {groups} of examples, no {shared} in two of them{held_out}"


def direction_lines(manifest: dict[str, Any]) -> Iterator[str]:
    """The most frequent directions of translation, where rows have languages."""
    counts = manifest["directions"]
    shown = [f"{direction} {count:,}" for direction, count in list(counts.items())[:DIRECTIONS_SHOWN]]
    if counts:
        more = f" | {len(counts) - DIRECTIONS_SHOWN} more" if len(counts) > DIRECTIONS_SHOWN else ""
        yield f"Languages  {' | '.join(shown)}{more}"


def own_sets_lines(manifest: dict[str, Any]) -> Iterator[str]:
    """Of the user's own validation and test sets: how much of each stands in train, and what repeats in it."""
    if not (own := manifest["own_sets"]):
        return
    done = {"drop": "dropped from train", "keep": "kept in train"}.get(own["on_both_sides"])
    same = {"rows": "", "source": " (by input)", "both": " (by input or output)"}[own["compared"]]
    if "train" in manifest["splits"]:
        for name, found in own["sets"].items():
            rows = f"{found['in_train']:,} of its {counted(found['rows'], 'row')}"
            if not found["train_rows"]:
                yield f"Overlap    {name}: none of its {counted(found['rows'], 'row')} is in train{same}"
                continue
            train_row, held_out_row = found["examples"][0]
            yield (
                f"Overlap    {name}: {rows} also in train{same}: {counted(found['train_rows'], 'train row')} {done},"
                f" the first {train_row}, which is {held_out_row}"
            )
    if own["validation_in_test"]:
        yield f"Overlap    {counted(own['validation_in_test'], 'validation row')} also in test{same}, and kept in both"
    for name, found in own["sets"].items():
        if found["repeated"]:
            rows = f"{found['repeated']:,} of its {counted(found['rows'], 'row')}"
            yield f"Repeated   {name}: {rows} repeat others of it, and stay"


def own_sets_warnings(own: dict[str, Any] | None, inputs: list[dict[str, Any]]) -> Iterator[str]:
    """What makes a figure on one of the user's own sets mean something else than one might think. `inputs` are those
    of the manifest."""
    if own is None:
        return
    for name, found in own["sets"].items():
        if own["on_both_sides"] == "keep" and found["train_rows"]:
            yield (
                f"{found['in_train']:,} of the {found['rows']:,} rows of {name} are trained on, as on_both_sides keep"
                " asks: figures on it are too good."
            )
        read = sum(source["read"] for source in inputs if source["split"] == name)
        if found["rows"] < read:
            yield (
                f"{name} has {found['rows']:,} of its {counted(read, 'row')}, because the others cannot be kept"
                f" ({REJECTS} says why): figures on it are not those of the whole set."
            )


def packing_lines(manifest: dict[str, Any]) -> Iterator[str]:
    packing = manifest["packing"]
    if "train" not in manifest["splits"]:
        yield "Packing    none: there are no rows to train on, only to evaluate"
        return
    if packing is None:
        yield "Packing    none: every row of a batch will be one example, padded to the longest"
        return
    per_row = packing["examples"] / packing["rows"]
    sources = "each source encoded for itself"
    if packing["share_sources"]:
        reading = f"{counted(packing['shared'], 'example')} read{'s' * (packing['shared'] == 1)}"
        sources = f"{reading} a source that is encoded for another"
    yield (
        f"Packing    train: {counted(packing['examples'], 'example')} in {counted(packing['rows'], 'row')} of"
        f" {packing['max_source_tokens']:,} + {packing['max_target_tokens']:,} tokens,"
        f" {per_row:.1f} a row | filled: source {packing['source_fill']:.1%},"
        f" target {packing['target_fill']:.1%} | {sources}"
        + (" | packing gains nothing: next to every row holds one example alone" if per_row < NEXT_TO_ALONE else "")
    ).replace("%", " %")
    if "language_starts" in packing:
        yield "Decoder    starts with the language code of each example's target"
        return
    yield f"Decoder    starts with token {packing['decoder_start_token_id']}, {STARTS[packing['decoder_start_from']]}"


def packing_warnings(entry: dict[str, Any] | None, settings: PrepareSettings) -> Iterator[str]:
    """`entry` is what the manifest says of packing."""
    if entry is None or entry.get("better_budget") is None:
        return
    given = [name for name in ("packed_source_tokens", "packed_target_tokens") if getattr(settings, name)]
    source, target = entry["better_budget"]
    yield (
        f"packed rows of {entry['max_source_tokens']:,} + {entry['max_target_tokens']:,} tokens are filled to"
        f" {entry['source_fill']:.1%} and {entry['target_fill']:.1%}; the rest is padding, which costs time and"
        f" memory. Drop {' and '.join(given)}: rows of {source:,} + {target:,} tokens would be chosen."
    ).replace("%", " %")


def cut_off_warnings(rejects: Rejects) -> Iterator[str]:
    """Last of all, for what is missing can be most of a file."""
    shown = rejects.examples.get(CUT_OFF, [])
    for reject in shown:
        yield (
            f"{reject.origin.file} IS CUT OFF ({reject.reason.rstrip('.')}). What came after is missing from this"
            " dataset: get the whole file, and prepare it again."
        )
    if more := rejects.kinds[CUT_OFF] - len(shown):
        yield f"{counted(more, 'more file')} CUT OFF: rejects.jsonl has each, by its kind, '{CUT_OFF}'."


def usage_warnings(template: Template, tokenizer: PreTrainedTokenizerBase, counts: Counts) -> Iterator[str]:
    """What was given and is not used, or not as one might expect."""
    if counts.unused_fields:
        names = [name for name, _ in counts.unused_fields.most_common()]
        shown = [shown_name(name) or "(without a name)" for name in names[:FIELDS_SHOWN]]
        more = f" and {len(names) - FIELDS_SHOWN:,} more" if len(names) > FIELDS_SHOWN else ""
        yield f"fields that are not used: {', '.join(shown)}{more}."
        if thoughts := [name for name in names if name.rpartition(".")[2] in THOUGHTS and "." in name]:
            yield (
                f"{' and '.join(thoughts)}: a model learns the text of an answer alone. Put the thoughts into that"
                " text if it is to write them."
            )
        if "system" in names:
            yield "--map system=system uses that field, with a template that has a place for it, such as chat."
    for name, rows in counts.given.items():
        if name not in template.source_variables():
            yield f"template {template.name} leaves out the {name}, and {rows:,} rows have one."
    if counts.spelled:
        tokens = ", ".join(repr(token) for token, _ in counts.spelled.most_common(5))
        yield (
            f"texts hold {tokens}, which the tokenizer has as added tokens. They are encoded as characters, since"
            " control tokens come from templates alone."
        )
    yield from lossy_warnings(counts)
    if counts.decomposed:
        files = ", ".join(name for name, _ in counts.decomposed.most_common(NAMES_SHOWN))
        yield (
            "text that is not in Unicode's form NFC, such as Hangul in single jamo, stands in"
            f" {counted(counts.decomposed.total(), 'example')} of {files}. It is kept as it is, and a tokenizer that"
            " does not compose it makes more tokens of it, and others. No setting changes texts: if it is not meant,"
            " compose them before, as Python's unicodedata.normalize('NFC', text) does."
        )
    if "output" not in template.target_variables():
        yield f"template {template.name} leaves out the output: every target is the same."


def lossy_warnings(counts: Counts) -> Iterator[str]:
    """Of each kind of text that the tokenizer loses: how often, and an example."""
    examples = {it["kind"]: f"{it['origin']}: {it['example']}" for it in counts.lost_examples}
    for kind, rows in counts.lost.most_common():
        looked_at = counts.looked_at[kind.rpartition(" ")[2]]
        yield (
            f"the tokenizer loses {kind} in {rows / looked_at:.1%}".replace("%", " %")
            + f" of examples ({rows:,} of {looked_at:,} looked at), such as {examples[kind]}."
        )
    if counts.lost:
        yield (
            "a model cannot learn what the tokenizer loses. --lossy_text drop leaves such rows out, and --lossy_text"
            " error stops at the first; a tokenizer that writes bytes, as --train_tokenizer bpe makes one, loses none."
        )


def _lengths(tokens: dict[str, int]) -> str:
    limit = f"{tokens['limit']:,}"
    cut = f"none over {limit}"
    if tokens["cut"]:
        cut = f"{tokens['cut']:,} cut at {limit}"
    elif tokens["dropped"]:
        cut = f"{tokens['dropped']:,} dropped, over {limit}"
    return (
        f"in all splits: median {tokens['p50']:,} tokens, 90 % up to {tokens['p90']:,}, 99 % up to {tokens['p99']:,},"
        f" longest {tokens['p100']:,} | {cut}"
    )
