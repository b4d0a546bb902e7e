"""The lines that are printed when a dataset is prepared, and the warnings.

    Read       2,017 rows from codealpaca_2k.json: 2,015 kept, 2 rejected
    Rejected   2 × empty output, the first in codealpaca_2k.json:238
    Split      train 1,813 | validation 101 | test 101 | 1,917 groups of examples, no text in two of them
    Source     in all splits: median 57 tokens, 90 % up to 82, 99 % up to 123, longest 228 | none over 512
    Packing    train: 1,813 examples in 192 rows of 576 + 544 tokens, 9.4 a row | filled: source 99.5 %, target …

The lines are made from the manifest. The warnings become part of it.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.compute

from diptych.data_prep.command_line.errors import counted, excerpt, nearest
from diptych.data_prep.pipeline.prepare_settings import PrepareSettings
from diptych.data_prep.pipeline.prepared_folder import CONFLICTS, REJECTS
from diptych.data_prep.pipeline.row_stages import WITH_PLACEHOLDERS, WITH_TERMS, Counts
from diptych.data_prep.rows.records import CUT_OFF, Rejects
from diptych.data_prep.text_to_ids.templates import Template

LONG_TOO_OFTEN = 0.65
"""If the chosen answer is the longer one in a larger share of pairs, length may be what a model learns of them."""
NEXT_TO_ALONE = 1.05
"""Examples per packed row; with fewer, packing saves hardly any row."""

JUDGED = ("chosen", "rejected")
DIRECTIONS_SHOWN = 6
NAMES_SHOWN = 4
FIELDS_SHOWN = 40
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thoughts")
"""Names that data sets give to the reasoning before an answer."""

NOT_NAMED = "the config beside the tokenizer names no decoder_start_token_id"
STARTS = {
    "setting": "as decoder_start_token_id says",
    "model config": "as the config beside the tokenizer has it",
    "bos_token_id": f"bos, as generation has it: {NOT_NAMED}",
    "eos_token_id": f"eos, as its family has it: {NOT_NAMED}",
    "pad_token_id": f"padding, as its family has it: {NOT_NAMED}",
    "assumed": "the padding token, assumed as T5 and Diptych have it; --decoder_start_token_id sets another",
}


def percent(share: float) -> str:
    """0.987 → "98.7 %"."""
    return f"{100 * share:.1f} %"


def summary_lines(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    rows, tokenizer, names = manifest["rows"], manifest["tokenizer"], [it["name"] for it in manifest["inputs"]]
    read = counted(rows["read"], "row")
    if rows["examples"] != rows["read"]:  # rows of several turns, instances or directions
        read += f", {counted(rows['examples'], 'example')} in them,"
    sources = ", ".join(names) if len(names) <= NAMES_SHOWN else f"{len(names):,} sources"
    yield f"Read       {read} from {sources}: {rows['kept']:,} kept, {rows['rejected']:,} rejected"
    for kind, count in manifest["rejected_by_kind"].items():
        yield f"Rejected   {count:,} × {kind}, the first in {manifest['first_rejected'][kind]}"
    for what, count in manifest.get("changed", {}).items():
        yield f"Changed    {count:,} × {what}"
    if manifest["settings"]["mixture"] is not None:
        for source in (it for it in manifest["inputs"] if it["split"] == "train"):
            mixed = counted(source["mixed"], "row")
            yield f"Mixture    {percent(source['share'])} of train, {mixed}: {source['name']}"
    if manifest["sensitive"] is not None:
        found = ", ".join(f"{count:,} × {kind}" for kind, count in manifest["sensitive"].items())
        yield f"Sensitive  {found + ' (masked in the report; nothing was changed)' if found else 'nothing was found'}"
    yield splits_line(manifest)
    if directions := manifest["directions"]:
        shown = [f"{direction} {count:,}" for direction, count in list(directions.items())[:DIRECTIONS_SHOWN]]
        more = [f"{len(directions) - DIRECTIONS_SHOWN} more"] if len(directions) > DIRECTIONS_SHOWN else []
        yield f"Languages  {' | '.join([*shown, *more])}"
    if manifest["own_sets"]:
        yield from _own_sets_lines(manifest["own_sets"], "train" in manifest["splits"])
    if conflicts := manifest["conflicts"]:
        what = "one source with different targets, which"
        if "judged" in manifest:
            what = "one source with answers that are judged both ways; the rows"
        yield f"Conflicts  {conflicts:,} × {what} stay: {CONFLICTS} lists them"
    judged = manifest.get("judged", {})
    if "pairs" in judged:
        shares = [f"{side} answer longer in {percent(judged[f'{side}_longer'] / judged['pairs'])}" for side in JUDGED]
        yield f"Pairs      {judged['pairs']:,} | {', '.join(shares)}"
    elif judged:
        yield f"Marks      {counted(judged['liked'], 'answer')} liked, {judged['not_liked']:,} not liked"
    for side, tokens in manifest["tokens"].items():
        labels = {"source": "Source", "target": "Chosen" if "pairs" in judged else "Target", "rejected": "Not chosen"}
        over = "none" if not tokens["dropped"] else f"{tokens['dropped']:,} dropped,"
        cut = f"{tokens['cut']:,} cut at" if tokens["cut"] else f"{over} over"
        yield (
            f"{labels[side]:<10} in all splits: median {tokens['p50']:,} tokens, 90 % up to {tokens['p90']:,},"
            f" 99 % up to {tokens['p99']:,}, longest {tokens['p100']:,} | {cut} {tokens['limit']:,}"
        )
    yield from packing_lines(manifest)
    yield f"Template   {manifest['template']['name']}, saved with the tokenizer"
    vocabularies = (f"{tokenizer[name]:,}" for name in ("tokens", "target_tokens") if name in tokenizer)
    yield f"Tokenizer  {tokenizer['from']}, {' + '.join(vocabularies)} tokens"
    yield f"Report     {folder / 'report.html'}"
    yield f"Prepared   {folder}" + (f" (rows not kept: {folder / REJECTS})" if rows["rejected"] else "")


def splits_line(manifest: dict[str, Any]) -> str:
    splits = " | ".join(f"{name} {count:,}" for name, count in manifest["splits"].items())
    if manifest["groups"] is None:
        return f"Split      {splits}"
    shared = "input" if manifest["settings"]["split_by"] == "source" else "text"
    groups = counted(manifest["groups"], "group")
    held_out = " of those held out by fractions" if manifest["own_sets"] else ""
    return f"Split      {splits} | {groups} of examples, no {shared} in two of them{held_out}"


def _own_sets_lines(own: dict[str, Any], has_train: bool) -> Iterator[str]:
    """For each validation and test set of the user: how many of its rows are in train, and how many repeat."""
    done = {"drop": "dropped from train", "keep": "kept in train"}.get(own["on_both_sides"])
    same = {"rows": "", "source": " (by input)", "both": " (by input or output)"}[own["compared"]]
    for name, found in own["sets"].items() if has_train else ():
        rows = counted(found["rows"], "row")
        if not found["train_rows"]:
            yield f"Overlap    {name}: none of its {rows} is in train{same}"
            continue
        train_row, held_out_row = found["examples"][0]
        yield (
            f"Overlap    {name}: {found['in_train']:,} of its {rows} also in train{same}:"
            f" {counted(found['train_rows'], 'train row')} {done}, the first {train_row}, which is {held_out_row}"
        )
    if own["validation_in_test"]:
        yield f"Overlap    {counted(own['validation_in_test'], 'validation row')} also in test{same}, and kept in both"
    for name, found in own["sets"].items():
        if found["repeated"]:
            rows = counted(found["rows"], "row")
            yield f"Repeated   {name}: {found['repeated']:,} of its {rows} repeat others of it, and stay"


def packing_lines(manifest: dict[str, Any]) -> Iterator[str]:
    packing = manifest["packing"]
    if "train" not in manifest["splits"]:
        yield "Packing    none: there are no rows to train on, only to evaluate"
        return
    if packing is None:
        why = f" ({manifest['not_packed']})" if manifest["not_packed"] else ""
        yield f"Packing    none: every row of a batch will be one example, padded to the longest{why}"
        return
    per_row = packing["examples"] / packing["rows"]
    sources = "each source encoded for itself"
    if packing["share_sources"]:
        reading = f"{counted(packing['shared'], 'example')} read{'s' * (packing['shared'] == 1)}"
        sources = f"{reading} a source that is encoded for another"
    alone = " | packing gains nothing: next to every row holds one example alone" if per_row < NEXT_TO_ALONE else ""
    yield (
        f"Packing    train: {counted(packing['examples'], 'example')} in {counted(packing['rows'], 'row')} of"
        f" {packing['max_source_tokens']:,} + {packing['max_target_tokens']:,} tokens, {per_row:.1f} a row | filled:"
        f" source {percent(packing['source_fill'])}, target {percent(packing['target_fill'])} | {sources}{alone}"
    )
    if "language_starts" in packing:
        yield "Decoder    starts with the language code of each example's target"
    else:
        start = STARTS[packing["decoder_start_from"]]
        yield f"Decoder    starts with token {packing['decoder_start_token_id']}, {start}"


# Warnings


def own_sets_warnings(own: dict[str, Any] | None, inputs: list[dict[str, Any]]) -> Iterator[str]:
    """Reasons why a metric on one of the user's own sets may mislead. `inputs` are those of the manifest."""
    for name, found in own["sets"].items() if own else ():
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


def packing_warnings(entry: dict[str, Any] | None, settings: PrepareSettings) -> Iterator[str]:
    """`entry` is what the manifest says of packing."""
    if entry and entry["better_budget"]:
        given = [name for name in ("packed_source_tokens", "packed_target_tokens") if getattr(settings, name)]
        source, target = entry["better_budget"]
        yield (
            f"packed rows of {entry['max_source_tokens']:,} + {entry['max_target_tokens']:,} tokens are filled to"
            f" {percent(entry['source_fill'])} and {percent(entry['target_fill'])}; the rest is padding, which costs"
            f" time and memory. Drop {' and '.join(given)}: rows of {source:,} + {target:,} tokens would be chosen."
        )


def judged_warnings(judged: dict[str, int] | None) -> Iterator[str]:
    """What a model may learn of judged answers beside what is meant."""
    if judged and "pairs" in judged and judged["chosen_longer"] > LONG_TOO_OFTEN * judged["pairs"]:
        yield (
            f"in {percent(judged['chosen_longer'] / judged['pairs'])} of pairs the chosen answer is the longer one: a"
            " model may learn to write long answers. Compare the lengths of its answers before and after training."
        )
    elif judged and not all(judged.get(name, 1) for name in ("liked", "not_liked")):
        missing, there = ("not liked", "liked") if judged["liked"] else ("liked", "not liked")
        yield f"all answers are {there}, and none is {missing}: there is nothing to tell them from."


def cut_off_warnings(rejects: Rejects) -> Iterator[str]:
    """These stand last, because most of a file may be missing."""
    shown = rejects.examples.get(CUT_OFF, [])
    for reject in shown:
        yield (
            f"{reject.origin.file} IS CUT OFF ({reject.reason.rstrip('.')}). What came after is missing from this"
            " dataset: get the whole file, and prepare it again."
        )
    if more := rejects.kinds[CUT_OFF] - len(shown):
        yield f"{counted(more, 'more file')} CUT OFF: rejects.jsonl has each, by its kind, '{CUT_OFF}'."


def kept_columns_warnings(kept: Iterable[str], examples: pyarrow.Table, unused: Iterable[str]) -> Iterator[str]:
    """`kept`: what keep_columns stored in `examples`."""
    for name in kept:
        if set(pyarrow.compute.unique(examples[name]).to_pylist()) <= {""}:
            near = nearest(name, unused)
            yield f"keep_columns {name}: no row has a value there.{f' Did you mean {near}?' if near else ''}"


def inline_warnings(settings: PrepareSettings, counts: Counts) -> Iterator[str]:
    if settings.terms and settings.inline_share and not counts.changed[WITH_TERMS]:
        yield (
            f"no example has a term of {settings.terms} in its source, as a whole word, and its translation in the"
            " target, in the languages of the file."
        )
    if settings.placeholders and settings.inline_share and not counts.changed[WITH_PLACEHOLDERS]:
        yield "no source and target share an address, a tag or a number, so none has placeholders."


def usage_warnings(template: Template, counts: Counts) -> Iterator[str]:
    """What was given and is not used, or is used in an unexpected way."""
    if counts.unused_fields:
        names = [name for name, _ in counts.unused_fields.most_common()]
        shown = [excerpt(name) or "(without a name)" for name in names[:FIELDS_SHOWN]]
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
    examples = {it["kind"]: f"{it['origin']}: {it['example']}" for it in counts.lost_examples}
    for kind, rows in counts.lost.most_common():
        looked_at = counts.looked_at[kind.rpartition(" of the ")[2]]
        yield (
            f"the tokenizer loses {kind} in {percent(rows / looked_at)} of examples ({rows:,} of {looked_at:,} looked"
            f" at), such as {examples[kind]}."
        )
    if counts.lost:
        yield (
            "a model cannot learn what the tokenizer loses. --lossy_text drop leaves such rows out, and --lossy_text"
            " error stops at the first; a tokenizer that writes bytes, as --train_tokenizer bpe makes one, loses none."
        )
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
