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
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import datasets
import numpy
import transformers
from datasets import DatasetDict
from transformers import PreTrainedTokenizerBase

from diptych.data_prep.command_line.errors import UserError, counted
from diptych.data_prep.command_line.run_command import run_command
from diptych.data_prep.pipeline.checkpoint_tokenizer import check_decoder_start, load_tokenizer_and_template
from diptych.data_prep.pipeline.dataset_tables import (
    PackingPlan,
    direction_counts,
    packed_table,
    plan_packing,
    split_tables,
    token_counts,
)
from diptych.data_prep.pipeline.gather import Gathered, collect, encode, gather
from diptych.data_prep.pipeline.inputs import Inputs, fatal_kinds, fingerprint_of, make_stages, open_inputs
from diptych.data_prep.pipeline.parts import Work, merged
from diptych.data_prep.pipeline.prepare_settings import PrepareSettings, parse_settings
from diptych.data_prep.pipeline.prepared_folder import (
    CONFLICTS,
    PACKED,
    REJECTS,
    TOKENIZER,
    beside,
    code_version,
    find_reusable,
    put_in_place,
    save_quietly,
)
from diptych.data_prep.pipeline.selection import REMOVED, Selection, conflict_rows, mixed_train, select
from diptych.data_prep.pipeline.workers import cores
from diptych.data_prep.reading.files import fixed_part
from diptych.data_prep.report import facts
from diptych.data_prep.report.page import write_report
from diptych.data_prep.report.summary import (
    cut_off_warnings,
    own_sets_warnings,
    packing_lines,
    packing_warnings,
    shortened,
    splits_line,
    summary_lines,
    usage_warnings,
)
from diptych.data_prep.rows.named_splits import KINDS, named
from diptych.data_prep.rows.records import Rejects
from diptych.data_prep.text_to_ids.decoder_start import decoder_start_of
from diptych.data_prep.text_to_ids.encode import from_marked
from diptych.data_prep.text_to_ids.templates import Template, attach_template
from diptych.data_prep.text_to_ids.train_tokenizer import (
    curve_vocab_size,
    table_vocab_size,
    train_tokenizer,
    why_fewer,
)
from diptych.data_prep.text_to_ids.two_vocabularies import has_two_vocabularies, target_side

TRAIN = KINDS[0]

TASKS_PER_WORKER = 4
"""Of datatrove, unless told: so much is lost and done again when one fails."""

BYTES_PER_WORKER = 4_000_000
"""For less data than this a second process costs more than it saves; fast tokenizers have threads of their own."""


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("error", parse_settings, run, argv)


def run(settings: PrepareSettings) -> int:
    datasets.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    prepare(settings)
    return 0


def prepare(settings: PrepareSettings) -> Path:
    """The whole way, told in order. Returns the folder of the prepared dataset."""
    folder = Path(settings.out).expanduser().resolve()
    _check_apart(folder, settings)
    inputs = open_inputs(settings)
    tokenizer, template = load_tokenizer_and_template(settings, inputs.default_template)
    wanted = fingerprint_of(settings, inputs, tokenizer, template)
    if (manifest := find_reusable(folder, wanted)) is not None:
        print(f"Reused     {folder}: nothing has changed since it was prepared")
        print("\n".join([splits_line(manifest), *packing_lines(manifest)]))
        _warn(manifest["warnings"])
        return folder
    with beside(folder) as partial, (partial / REJECTS).open("w", encoding="utf-8") as file:
        manifest = _prepare(settings, inputs, tokenizer, template, wanted, partial, file)
        file.close()
        put_in_place(partial, folder, {"fingerprint": wanted, **manifest})
    shutil.rmtree(_parts_folder(folder), ignore_errors=True)
    if _is_rejects(reasons := _rejects_beside(folder)):  # of an earlier run of which nothing could be kept
        reasons.unlink()
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
    stages = make_stages(settings, inputs, tokenizer, template)
    workers = settings.workers or min(cores(), 1 + sum(it.bytes or 0 for it in inputs.sources) // BYTES_PER_WORKER)
    gathered = _gather(settings, Work(inputs.sources, stages, wanted), rejects, scratch, workers)
    _need_rows(gathered.examples.num_rows, rejects, partial, settings.out)

    selection = select(gathered, [source.split for source in inputs.sources], settings, rejects)
    duplicates = facts.duplicates(gathered, selection)
    _write_conflicts(partial / CONFLICTS, gathered, selection)
    few = None
    if tokenizer is None:
        tokenizer, few = _trained_tokenizer(settings, functools.partial(_train_texts, gathered, selection))
        attach_template(tokenizer, template)
        check_decoder_start(settings, tokenizer)  # of little data fewer tokens are made than asked for
        rows = numpy.flatnonzero(selection.split_of_row != REMOVED)
        gathered = encode(gathered, rows, tokenizer, template, stages.lengths, rejects, scratch, workers)
        of_row = selection.split_of_row[gathered.column("place")] if gathered.examples.num_rows else ()
        selection = replace(selection, split_of_row=numpy.asarray(of_row))
    places = selection.places()
    for split in inputs.splits:
        _need_rows(len(places.get(split, ())), rejects, partial, settings.out, split if len(inputs.splits) > 1 else "")
    examples_read = sum(gathered.examples_read)
    assert selection.kept + rejects.count == examples_read, (selection.kept, rejects.count, examples_read)
    if settings.mixture is not None:
        names = (inputs.entries, settings.mixture, settings.seed)
        places[TRAIN] = mixed_train(gathered, places[TRAIN], *names)
    tables = split_tables(gathered, places, scratch)

    plan = None
    if settings.packing and TRAIN in tables:
        budget = (settings.packed_source_tokens, settings.packed_target_tokens)
        start = decoder_start_of(settings.tokenizer, settings.decoder_start_token_id) or (
            target_side(tokenizer).pad_token_id,
            "assumed",
        )
        plan = plan_packing(tables[TRAIN], tokenizer, start, budget, settings.share_sources, settings.seed)
    tokens = token_counts(gathered, places, stages.lengths, rejects)
    input_facts = _input_facts(inputs, gathered, selection, places.get(TRAIN, numpy.zeros(0, int)), settings)
    warnings = [
        *usage_warnings(template, tokenizer, gathered.counts),
        *inputs.warnings,
        *selection.warnings,
        *own_sets_warnings(selection.own_sets, input_facts),
        *packing_warnings(plan.entry if plan else None, settings),
        *cut_off_warnings(rejects),
        *filter(None, [few]),
    ]
    manifest = {
        "rows": {
            "read": gathered.counts.rows,
            "examples": examples_read,
            "kept": selection.kept,
            "rejected": rejects.count,
        },
        "rejected_by_kind": rejects.by_kind(),
        "first_rejected": {
            kind: f"{examples[0].origin}: {shortened(examples[0].reason)}"
            for kind, examples in rejects.examples.items()
        },
        "splits": {name: len(table) for name, table in tables.items()},
        "directions": direction_counts(tables),
        "groups": selection.groups,
        "own_sets": selection.own_sets,
        "conflicts": len(selection.conflicting),
        "sensitive": dict(gathered.counts.sensitive.most_common()) if settings.sensitive else None,
        "tokens": tokens,
        "packing": plan.entry if plan else None,
        "inputs": input_facts,
        "template": asdict(template),
        "tokenizer": {
            "from": settings.tokenizer or f"{settings.train_tokenizer} trained on the train split",
            "class": type(tokenizer).__name__,
            "tokens": len(tokenizer),
            **({"target_tokens": len(target_side(tokenizer))} if has_two_vocabularies(tokenizer) else {}),
            "lost": {
                it["kind"]: {
                    "examples": gathered.counts.lost[it["kind"]],
                    "such as": f"{it['origin']}: {it['example']}",
                }
                for it in gathered.counts.lost_examples
            },
        },
        "settings": asdict(settings),
        "warnings": warnings,
        "code": code_version(),
        "versions": {"datasets": datasets.__version__, "transformers": transformers.__version__},
    }
    _write_tables(partial, tables, plan, tokenizer, scratch)
    start = plan.decoder_start_token_id if plan else target_side(tokenizer).pad_token_id
    write_report(
        partial,
        {
            "name": Path(settings.out).name,
            "rows": {**manifest["rows"], "read": examples_read},
            **{name: manifest[name] for name in ("splits", "groups", "own_sets", "tokenizer", "warnings")},
            "template": {**manifest["template"], "golden": facts.golden(tokenizer, template)},
            "sources": manifest["inputs"],
            "removed": facts.removed(rejects),
            "lengths": facts.lengths(gathered, places, tokens, settings.too_long),
            "packing": facts.packing(manifest["packing"], gathered, places.get(TRAIN), settings.seed),
            "duplicates": duplicates,
            "contamination": facts.contamination(rejects, settings.decontaminate),
            "sensitive": facts.sensitive(gathered.counts, settings.sensitive),
            "scripts": {
                "source": dict(gathered.counts.source_scripts.most_common()),
                "target": dict(gathered.counts.target_scripts.most_common()),
            },
            "categories": dict(gathered.counts.categories.most_common(facts.CATEGORIES_SHOWN)),
            "samples": facts.samples(next(iter(tables.values())), tokenizer, start),
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
            from diptych.data_prep.pipeline.datatrove_rows import run_tasks
        except ModuleNotFoundError as error:
            raise UserError(
                f"--engine datatrove needs {error.name}, which is not installed: pip install 'diptych[datatrove]'."
            ) from None
        tasks = settings.tasks or TASKS_PER_WORKER * workers
        folder = _parts_folder(Path(settings.out).expanduser().resolve()) / f"{work.fingerprint[:16]}-{tasks}"
        run_tasks(work, folder, tasks, workers)
    return collect(merged(work, folder), len(work.sources), work.stages, rejects, scratch)


def _check_apart(folder: Path, settings: PrepareSettings) -> None:
    """What is written must not be among what is read, where the next run would find it."""
    held_out = [named(entry)[1] for entry in (*settings.validation, *settings.test)]
    for entry in (*settings.data, *held_out, *settings.decontaminate):
        read = Path(entry).expanduser()
        if read.resolve() == _rejects_beside(folder):
            raise UserError(f"{entry} is what an earlier run could not keep, and goes with the next. Rename it first.")
        if "**" in entry:
            read = fixed_part(entry)
        if read.is_dir() and folder.is_relative_to(read.resolve()):
            raise UserError(
                f"--out {settings.out} lies in {entry}, all of which is read: the next run would read what this one"
                f" writes. Choose a folder beside it, such as --out {read.resolve().parent / 'prepared'}."
            )


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


def _input_facts(
    inputs: Inputs,
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
            "split": source.split,
            "format": inputs.converters[place].format.name,
            "read": gathered.examples_read[place],
            "kept": kept[place],
            "rejected": gathered.examples_read[place] - kept[place],
            "mixed": mixed[place] if settings.mixture is not None else None,
            "share": mixed[place] / len(train) if len(train) else 0.0,
        }
        for place, source in enumerate(inputs.sources)
    ]


def _need_rows(rows: int, rejects: Rejects, partial: Path, out: str, split: str = "") -> None:
    """Without a row to train on, or of a set that was named, there is no dataset, but what was wrong with each row is
    still written down."""
    if rows:
        return
    if not rejects.count:
        raise UserError(f"there are no rows in what was read{split and f' for {split}'}.")
    kinds = "; ".join(f"{count:,} × {kind}" for kind, count in list(rejects.by_kind().items())[:3])
    first = next(iter(rejects.examples.values()))[0]
    reasons = _rejects_beside(Path(out).expanduser().resolve())
    rejects.file.flush()
    if os.path.lexists(reasons) and not _is_rejects(reasons):
        reasons = reasons.with_name(f"{reasons.stem}-{os.getpid()}.jsonl")  # the other is somebody else's
    shutil.copyfile(partial / REJECTS, reasons)
    what = f"of {counted(rejects.count, 'row')}, none can be kept"
    if split:
        what = f"nothing is left for {split}: {counted(rejects.count, 'row')} cannot be kept"
    raise UserError(
        f"{what} ({kinds}). The first, {first.origin}: {first.reason}"
        f" Mend the rows or the settings, and prepare them again. All of them: {reasons}"
    )


def _is_rejects(path: Path) -> bool:
    """Whether an earlier run wrote this file. A link, or a file of other rows, is left alone."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        first = file.readline()
    try:
        return {"file", "row", "kind", "reason", "raw"} <= json.loads(first).keys()
    except (ValueError, AttributeError):
        return False


def _rejects_beside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.rejects.jsonl")


def _trained_tokenizer(
    settings: PrepareSettings, texts: Callable[[], Iterator[str]]
) -> tuple[PreTrainedTokenizerBase, str | None]:
    """And why it has fewer tokens than the settings ask for, if it has."""
    kind, tokens = settings.train_tokenizer, settings.vocab_size
    if tokens == "auto":
        tokens, _ = curve_vocab_size(kind, texts)
    elif tokens == "table":
        tokens = table_vocab_size(sum(map(len, texts())))
    trained = train_tokenizer(kind, texts(), tokens)
    return trained, why_fewer(kind, trained, tokens) if tokens == settings.vocab_size else None


def _train_texts(gathered: Gathered, selection: Selection) -> Iterator[str]:
    """What a tokenizer may learn from: held-out texts are unseen for it too."""
    start = 0
    for batch in gathered.examples.select(["source", "target"]).to_batches():
        is_train = selection.split_of_row[start : start + batch.num_rows] == 0
        start += batch.num_rows
        for source, target, is_learned in zip(
            *(column.to_pylist() for column in batch.columns), is_train, strict=True
        ):
            if is_learned:  # as people read them: the template's marks are no text
                yield str(from_marked(source))
                yield str(from_marked(target))


if __name__ == "__main__":
    sys.exit(main())
