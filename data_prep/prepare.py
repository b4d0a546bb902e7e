"""`diptych prepare`: from files to a prepared dataset, in steps that a person can follow on the screen.

    diptych prepare --data my.jsonl --tokenizer path/to/checkpoint --out prepared
    diptych prepare --data tatoeba --template translate --train_tokenizer bpe --vocab_size 4000 --out prepared

recognise the formats → read, check, render and encode in one pass (stages.py, gather.py) → leave out duplicates,
split, mix (selection.py) → pack → report → write. A tokenizer that is trained here is trained after the split, and
encodes in a pass of its own. A second run with the same inputs, settings and code finds its result and ends.

Exit codes: 0 when a dataset was written or is used again, with a summary of the rows that were not kept if there are
any; 2 with one message when a person has to mend something first.
"""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import datasets
import numpy
import transformers
from datasets import DatasetDict
from transformers import PreTrainedTokenizerBase

from diptych.data_prep import facts
from diptych.data_prep.checkpoint_tokenizer import check_decoder_start, decoder_start_of, load_tokenizer_and_template
from diptych.data_prep.decontaminate import Decontaminate, EvalIndex
from diptych.data_prep.filters import LanguageFilter
from diptych.data_prep.formats import Converter, Directions, converter_for, named, parse_mapping
from diptych.data_prep.gather import Gathered, collect, encode, first_rows, gather
from diptych.data_prep.mixture import check_mixture
from diptych.data_prep.parts import Work, merged
from diptych.data_prep.prepared import (
    CONFLICTS,
    PACKED,
    REJECTS,
    TOKENIZER,
    beside,
    code_version,
    find_reusable,
    fingerprint,
    put_in_place,
    save_quietly,
    tokenizer_digest,
)
from diptych.data_prep.readers import Limits, Source, open_sources
from diptych.data_prep.records import Record, Reject, Rejects, UserError
from diptych.data_prep.report import write_report
from diptych.data_prep.selection import REMOVED, Selection, conflict_rows, mixed_train, select, shingles_of
from diptych.data_prep.sensitive import require_detectors
from diptych.data_prep.settings import PrepareSettings, parse_settings
from diptych.data_prep.stages import Check, Lengths, Stages
from diptych.data_prep.summary import (
    packing_lines,
    packing_warnings,
    shortened,
    splits_line,
    summary_lines,
    usage_warnings,
)
from diptych.data_prep.tables import (
    PackingPlan,
    packed_table,
    plan_packing,
    split_tables,
    token_counts,
)
from diptych.data_prep.templates import Template, attach_template
from diptych.data_prep.train_tokenizer import curve_vocab_size, table_vocab_size, train_tokenizer
from diptych.data_prep.workers import cores

TASKS_PER_WORKER = 4
"""Of datatrove, unless told: so much is lost and done again when one fails."""

BYTES_PER_WORKER = 4_000_000
"""For less data than this a second process costs more than it saves; fast tokenizers have threads of their own."""


def main(argv: Sequence[str] | None = None) -> int:
    datasets.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    try:
        prepare(parse_settings(sys.argv[1:] if argv is None else argv))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def prepare(settings: PrepareSettings) -> Path:
    """The whole way, told in order. Returns the folder of the prepared dataset."""
    folder = Path(settings.out).expanduser().resolve()
    inputs = open_inputs(settings)
    tokenizer, template = load_tokenizer_and_template(settings, default_template(settings, inputs))
    wanted = fingerprint_of(settings, inputs, tokenizer, template)
    if (manifest := find_reusable(folder, wanted)) is not None:
        print(f"Reused     {folder}: nothing has changed since it was prepared")
        print("\n".join([splits_line(manifest), *packing_lines(manifest)]))
        _warn(packing_warnings(manifest["packing"], settings))
        return folder
    with beside(folder) as partial, (partial / REJECTS).open("w", encoding="utf-8") as file:
        manifest = _prepare(settings, inputs, tokenizer, template, wanted, partial, file)
        file.close()
        put_in_place(partial, folder, {"fingerprint": wanted, **manifest})
    shutil.rmtree(_parts_folder(folder), ignore_errors=True)
    _rejects_beside(folder).unlink(missing_ok=True)  # of an earlier run of which nothing could be kept
    print("\n".join(summary_lines(folder, manifest)))
    _warn(manifest["warnings"])
    return folder


def _prepare(
    settings: PrepareSettings,
    inputs: Inputs,
    tokenizer: PreTrainedTokenizerBase | None,
    template: Template,
    wanted: str,
    partial: Path,
    rejects_file: IO[str],
) -> dict[str, Any]:
    """Everything but the manifest, written into `partial`; and what the manifest says."""
    scratch = partial / "scratch"
    scratch.mkdir()
    rejects = Rejects(rejects_file, settings.strict, fatal_kinds(settings))
    stages, formats = make_stages(settings, inputs, tokenizer, template)
    workers = settings.workers or min(cores(), 1 + sum(it.bytes or 0 for it in inputs.sources) // BYTES_PER_WORKER)
    gathered = _gather(settings, Work(inputs.sources, stages, wanted), rejects, scratch, workers)
    _need_rows(gathered.examples.num_rows, rejects, partial, settings.out)

    selection = select(gathered, settings, rejects)
    duplicates = facts.duplicates(gathered, selection)
    _write_conflicts(partial / CONFLICTS, gathered, selection)
    if tokenizer is None:
        tokenizer = _trained_tokenizer(settings, functools.partial(_train_texts, gathered, selection))
        attach_template(tokenizer, template)
        check_decoder_start(settings, tokenizer)  # of little data fewer tokens are made than asked for
        rows = numpy.flatnonzero(selection.split_of_row != REMOVED)
        gathered = encode(gathered, rows, tokenizer, template, stages.lengths, rejects, scratch, workers)
        of_row = selection.split_of_row[gathered.column("place")] if gathered.examples.num_rows else ()
        selection = replace(selection, split_of_row=numpy.asarray(of_row))
    places = selection.places()
    _need_rows(len(places.get("train", ())), rejects, partial, settings.out)
    rows_read = sum(gathered.rows_read)
    assert selection.kept + rejects.count == rows_read, (selection.kept, rejects.count, rows_read)
    if settings.mixture is not None:
        names = (inputs.entries, settings.mixture, settings.seed)
        places["train"] = mixed_train(gathered, places["train"], *names)
    tables = split_tables(gathered, places, scratch)

    plan = None
    if settings.packing:
        budget = (settings.packed_source_tokens, settings.packed_target_tokens)
        start = decoder_start_of(settings) or (tokenizer.pad_token_id, "assumed")
        plan = plan_packing(tables["train"], tokenizer, start, budget, settings.share_sources, settings.seed)
    tokens = token_counts(gathered, places, stages.lengths, rejects)
    warnings = [
        *usage_warnings(template, tokenizer, gathered.counts),
        *selection.warnings,
        *packing_warnings(plan.entry if plan else None, settings),
    ]
    manifest = {
        "rows": {"read": rows_read, "kept": selection.kept, "rejected": rejects.count},
        "rejected_by_kind": rejects.by_kind(),
        "first_rejected": {
            kind: f"{examples[0].origin}: {shortened(examples[0].reason)}"
            for kind, examples in rejects.examples.items()
        },
        "splits": {name: len(table) for name, table in tables.items()},
        "groups": selection.groups,
        "conflicts": len(selection.conflicting),
        "sensitive": dict(gathered.counts.sensitive.most_common()) if settings.sensitive else None,
        "tokens": tokens,
        "packing": plan.entry if plan else None,
        "inputs": _input_facts(inputs, formats, gathered, selection, places["train"], settings),
        "template": asdict(template),
        "tokenizer": {
            "from": settings.tokenizer or f"{settings.train_tokenizer} trained on the train split",
            "class": type(tokenizer).__name__,
            "tokens": len(tokenizer),
        },
        "settings": asdict(settings),
        "warnings": warnings,
        "code": code_version(),
        "versions": {"datasets": datasets.__version__, "transformers": transformers.__version__},
    }
    _write_tables(partial, tables, plan, tokenizer, scratch)
    start = plan.decoder_start_token_id if plan else tokenizer.pad_token_id
    write_report(
        partial,
        {
            "name": Path(settings.out).name,
            **{name: manifest[name] for name in ("rows", "splits", "groups", "tokenizer", "warnings")},
            "template": {**manifest["template"], "golden": facts.golden(tokenizer, template)},
            "sources": manifest["inputs"],
            "removed": facts.removed(rejects),
            "lengths": facts.lengths(gathered, places, tokens, settings.too_long),
            "packing": facts.packing(manifest["packing"], gathered, places["train"], settings.seed),
            "duplicates": duplicates,
            "contamination": facts.contamination(rejects, settings.decontaminate),
            "sensitive": facts.sensitive(gathered.counts, settings.sensitive),
            "scripts": {
                "source": dict(gathered.counts.source_scripts.most_common()),
                "target": dict(gathered.counts.target_scripts.most_common()),
            },
            "categories": dict(gathered.counts.categories.most_common(facts.CATEGORIES_SHOWN)),
            "samples": facts.samples(tables["train"], tokenizer, start),
            "settings": manifest["settings"],
        },
    )
    shutil.rmtree(scratch)
    return manifest


def _gather(settings: PrepareSettings, work: Work, rejects: Rejects, scratch: Path, workers: int) -> Gathered:
    """By whatever engine, the same rows in the same order."""
    if settings.gathered is None and settings.engine == "local":
        return gather(work.sources, work.stages, rejects, scratch, workers)
    folder = Path(settings.gathered or "")
    if settings.engine == "datatrove":
        try:
            from diptych.data_prep.datatrove_rows import run_tasks
        except ModuleNotFoundError as error:
            raise UserError(
                f"--engine datatrove needs {error.name}, which is not installed: pip install 'diptych[datatrove]'."
            ) from None
        tasks = settings.tasks or TASKS_PER_WORKER * workers
        folder = _parts_folder(Path(settings.out).expanduser().resolve()) / f"{work.fingerprint[:16]}-{tasks}"
        run_tasks(work, folder, tasks, workers)
    return collect(merged(work, folder), len(work.sources), work.stages, rejects, scratch)


def _parts_folder(folder: Path) -> Path:
    """Of tasks that have ended, when a run breaks off; beside the dataset, since what is half written goes."""
    return folder.with_name(f".{folder.name}.parts")


def _write_tables(
    partial: Path, tables: DatasetDict, plan: PackingPlan | None, tokenizer: PreTrainedTokenizerBase, scratch: Path
) -> None:
    save_quietly(tables, partial)
    if plan is not None:
        save_quietly(packed_table(plan, scratch), partial / PACKED)
    tokenizer.save_pretrained(partial / TOKENIZER)


def _write_conflicts(path: Path, gathered: Gathered, selection: Selection) -> None:
    """Only where there are any."""
    if selection.conflicting:
        with path.open("w", encoding="utf-8") as file:
            for group in selection.conflicting:
                file.write(json.dumps(conflict_rows(gathered, group), ensure_ascii=False) + "\n")


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


@dataclass(frozen=True)
class Inputs:
    """What will be read."""

    sources: list[Source]
    entries: list[str]
    """For each source, the entry of `data` that it belongs to: a folder is one entry and several sources."""
    evaluation: list[Source]
    """What training must not hold."""


def limits_of(settings: PrepareSettings) -> Limits:
    return Limits(
        max_row_bytes=int(settings.max_row_megabytes * 1_000_000), max_unpacked_ratio=settings.max_unpacked_ratio
    )


def open_inputs(settings: PrepareSettings) -> Inputs:
    limits = limits_of(settings)
    sources = open_sources(settings.data, settings.aligned, limits)
    entries = [source.entry or source.name for source in sources]
    if settings.mixture is not None:
        check_mixture(settings.mixture, list(dict.fromkeys(entries)))
    return Inputs(sources, entries, open_sources(settings.decontaminate, [], limits))


def make_stages(
    settings: PrepareSettings, inputs: Inputs, tokenizer: PreTrainedTokenizerBase | None, template: Template
) -> tuple[Stages, list[str]]:
    """The stages, and the format of each source, which is said aloud where it was recognised."""
    converters, formats = [], []
    for source in inputs.sources:
        for note in source.notes:
            print(f"Note       {note}")
        converter = make_converter(settings, source)
        converters.append(converter)
        formats.append(converter.format.name)
        print(f"Format     {source.name}: {converter.format.name}, {'given' if settings.format else 'recognised'}")
    lengths = Lengths(
        settings.max_source_tokens, settings.max_target_tokens, settings.too_long, settings.end_cut_targets
    )
    if settings.sensitive:
        require_detectors()
    checks = tuple(_checks(settings, inputs))
    shingles = shingles_of(settings) if settings.near_duplicates is not None else None
    return Stages(tuple(converters), template, tokenizer, lengths, checks, shingles, settings.sensitive), formats


def default_template(settings: PrepareSettings, inputs: Inputs) -> str:
    """Conversations need one that has a place for what was said before."""
    if settings.template:
        return settings.template
    converters = [make_converter(settings, source) for source in inputs.sources]
    has_turns = any(it.conversational or it.format.name in ("messages", "sharegpt") for it in converters)
    return "chat" if has_turns else "alpaca"


def make_converter(settings: PrepareSettings, source: Source) -> Converter:
    """What its first rows say it is. A source without a single row to read has only rejects, of whatever format."""
    rows = first_rows(source)
    if not rows:
        return Converter(named(settings.format or "alpaca"))
    return converter_for(
        rows,
        source.name,
        settings.format,
        parse_mapping(settings.map),
        directions_for(settings, source),
        settings.languages,
        settings.summary_instruction,
        settings.positive_examples,
        settings.negative_examples,
    )


def directions_for(settings: PrepareSettings, source: Source) -> Directions:
    """A sample's own, unless one direction or both are given."""
    if settings.forward or settings.backward:
        return Directions(settings.forward, settings.backward)
    return Directions(source.forward, source.backward)


def _checks(settings: PrepareSettings, inputs: Inputs) -> Iterator[Check]:
    if settings.lengths is not None:
        yield settings.lengths
    if settings.source_languages or settings.target_languages:
        languages = tuple(settings.source_languages), tuple(settings.target_languages)
        yield LanguageFilter(*languages, settings.language_confidence)
    if inputs.evaluation:
        yield Decontaminate(
            EvalIndex.from_records(_evaluation_records(settings, inputs), settings.decontaminate_ngram)
        )


def _evaluation_records(settings: PrepareSettings, inputs: Inputs) -> Iterator[Record]:
    for source in inputs.evaluation:
        rows = first_rows(source)
        if not rows:
            raise UserError(f"{source.name} has no row that training could be compared with.")
        both = Directions("Translate:", "Translate:")  # so that both sides of a pair are looked at
        converter = converter_for(rows, source.name, directions=both)
        results = (result for row in source.rows() for result in converter.records(row))
        bad: list[Reject] = []
        for result in results:
            if isinstance(result, Record):
                yield result
            elif isinstance(result, Reject):
                bad.append(result)
        if bad:
            print(
                f"warning: {len(bad):,} rows of {source.name} cannot be read, so training is not compared with them;"
                f" the first, {bad[0].origin}: {bad[0].reason}",
                file=sys.stderr,
            )


def fatal_kinds(settings: PrepareSettings) -> tuple[str, ...]:
    """Kinds of rejects of which one ends the run."""
    return ("source over the limit", "target over the limit") if settings.too_long == "error" else ()


def fingerprint_of(
    settings: PrepareSettings, inputs: Inputs, tokenizer: PreTrainedTokenizerBase | None, template: Template
) -> str:
    """The same for the same result."""
    start = decoder_start_of(settings) if settings.packing else None
    return fingerprint({**facts_that_decide(settings, inputs, tokenizer, template), "decoder_start": start})


def facts_that_decide(
    settings: PrepareSettings, inputs: Inputs, tokenizer: PreTrainedTokenizerBase | None, template: Template
) -> dict[str, Any]:
    """What decides the result. Inputs, template and tokenizer count by content, wherever the tokenizer lies."""
    no_decision = {"data", "aligned", "decontaminate", "out", "template", "tokenizer", "strict"}
    no_decision |= {"workers", "engine", "tasks", "gathered"}
    return {
        "inputs": [(source.name, source.digest) for source in inputs.sources],
        "entries": inputs.entries,
        "evaluation": [(source.name, source.digest) for source in inputs.evaluation],
        "template": asdict(template),
        "tokenizer": tokenizer_digest(tokenizer) if tokenizer else None,
        "settings": {name: value for name, value in asdict(settings).items() if name not in no_decision},
    }


def _input_facts(
    inputs: Inputs,
    formats: Sequence[str],
    gathered: Gathered,
    selection: Selection,
    train: numpy.ndarray,
    settings: PrepareSettings,
) -> list[dict[str, Any]]:
    """Of each source: how it was read, and how much of it there is."""
    number = gathered.column("source_number")
    kept = numpy.bincount(number[selection.split_of_row != REMOVED], minlength=len(inputs.sources)).tolist()
    mixed = numpy.bincount(number[train], minlength=len(inputs.sources)).tolist()
    return [
        {
            "name": source.name,
            "digest": source.digest,
            "format": formats[place],
            "read": gathered.rows_read[place],
            "kept": kept[place],
            "rejected": gathered.rows_read[place] - kept[place],
            "mixed": mixed[place] if settings.mixture is not None else None,
            "share": mixed[place] / len(train),
        }
        for place, source in enumerate(inputs.sources)
    ]


def _need_rows(rows: int, rejects: Rejects, partial: Path, out: str) -> None:
    """Without a row to train on there is no dataset, but what was wrong with each row is still written down."""
    if rows:
        return
    if not rejects.count:
        raise UserError("there are no rows in what was read.")
    kinds = "; ".join(f"{count:,} × {kind}" for kind, count in list(rejects.by_kind().items())[:3])
    first = next(iter(rejects.examples.values()))[0]
    reasons = _rejects_beside(Path(out).expanduser().resolve())
    rejects.file.flush()
    shutil.copyfile(partial / REJECTS, reasons)
    raise UserError(
        f"none of the {rejects.count:,} rows can be kept ({kinds}). The first, {first.origin}: {first.reason}"
        f" Mend the rows or the settings, and prepare them again. All of them: {reasons}"
    )


def _rejects_beside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.rejects.jsonl")


def _trained_tokenizer(settings: PrepareSettings, texts: Callable[[], Iterator[str]]) -> PreTrainedTokenizerBase:
    kind, tokens = settings.train_tokenizer, settings.vocab_size
    if tokens == "auto":
        tokens, _ = curve_vocab_size(kind, texts)
    elif tokens == "table":
        tokens = table_vocab_size(sum(map(len, texts())))
    return train_tokenizer(kind, texts(), tokens)


def _train_texts(gathered: Gathered, selection: Selection) -> Iterator[str]:
    """What a tokenizer may learn from: held-out texts are unseen for it too."""
    start = 0
    for batch in gathered.examples.select(["source", "target"]).to_batches():
        is_train = selection.split_of_row[start : start + batch.num_rows] == 0
        start += batch.num_rows
        for source, target, is_learned in zip(
            *(column.to_pylist() for column in batch.columns), is_train, strict=True
        ):
            if is_learned:
                yield source
                yield target


if __name__ == "__main__":
    sys.exit(main())
