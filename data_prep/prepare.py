"""`diptych prepare`: from rows to a prepared dataset, as a command and as a function.

    diptych prepare --data my.jsonl --tokenizer path/to/checkpoint --out prepared
    diptych prepare --data tatoeba --template translate --train_tokenizer bpe --vocab_size 4000 --out prepared

The steps: recognise the formats; read, check, render and encode each row (row_stages.py, gather_rows.py); leave out
duplicates, split, mix (select_rows.py); pack; write the tables, the report and the manifest. A tokenizer that is
trained here learns from the train split, so encoding is then a pass of its own. A second run with the same inputs,
settings and code finds its result and ends.

Exit codes: 0 when a dataset was written or is used again; 2 with one message when a person has to correct something.
"""

import functools
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy
import transformers

from diptych.data_prep.command_line.errors import UserError, counted, message_line
from diptych.data_prep.command_line.run_command import run_command
from diptych.data_prep.packing.unpacked_families import why_not_packed
from diptych.data_prep.pipeline.checkpoint_tokenizer import check_decoder_start, load_tokenizer_and_template
from diptych.data_prep.pipeline.dataset_tables import packed_table, plan_packing, split_tables
from diptych.data_prep.pipeline.gather_rows import Gathered, collect, encode, gather
from diptych.data_prep.pipeline.parallel_parts import RowJob, merged
from diptych.data_prep.pipeline.prepare_inputs import Inputs, fatal_kinds, fingerprint_of, make_stages, open_inputs
from diptych.data_prep.pipeline.prepare_settings import PrepareSettings, check_settings, parse_settings
from diptych.data_prep.pipeline.prepared_folder import (
    CONFLICTS,
    PACKED,
    REJECTS,
    TOKENIZER,
    beside,
    check_apart,
    find_reusable,
    keep_rejects,
    parts_folder,
    put_in_place,
    remove_kept_rejects,
    without_bars,
)
from diptych.data_prep.pipeline.rows_in_memory import RowsInMemory
from diptych.data_prep.pipeline.select_rows import REMOVED, Selection, mixed_train, select, write_conflicts
from diptych.data_prep.pipeline.workers import cores
from diptych.data_prep.report.printed_summary import packing_lines, splits_line, summary_lines
from diptych.data_prep.report.report_facts import Results, manifest_of, report_facts
from diptych.data_prep.report.report_page import write_report
from diptych.data_prep.rows.named_splits import KINDS
from diptych.data_prep.rows.records import Rejects
from diptych.data_prep.text_to_ids.rendered_text import from_marked
from diptych.data_prep.text_to_ids.templates import attach_template
from diptych.data_prep.text_to_ids.train_tokenizer import curve_vocab_size, train_tokenizer, why_fewer

TRAIN = KINDS[0]

TASKS_PER_WORKER = 4
"""Of datatrove, unless `tasks` is set. A task that fails is run again as a whole, so it should not be too large."""

BYTES_PER_WORKER = 4_000_000
"""For less data than this a second process costs more than it saves; fast tokenizers have threads of their own."""


@dataclass(frozen=True)
class Prepared:
    """A dataset that `prepare` has written, or has found and reuses."""

    folder: Path
    manifest: dict[str, Any] = field(repr=False)
    """What manifest.json says: inputs, counts, template, tokenizer, packing, settings."""
    is_reused: bool = False
    """Whether the folder already held this dataset, so that nothing was written."""

    def __fspath__(self) -> str:
        return str(self.folder)

    @property
    def splits(self) -> dict[str, int]:
        """How many rows each split has: {"train": 1813, "validation": 101, "test": 101}."""
        return self.manifest["splits"]

    @property
    def rejected(self) -> int:
        """How many rows were not kept; `rejects_file` has each with its reason."""
        return self.manifest["rows"]["rejected"]

    @property
    def rejects_file(self) -> Path:
        return self.folder / REJECTS

    @property
    def warnings(self) -> list[str]:
        """What to look at, and how many rows were rejected, which the command prints among its figures."""
        rejected = [f"{counted(self.rejected, 'row')} not kept; why: {self.rejects_file}"] if self.rejected else []
        return self.manifest["warnings"] + rejected

    def __str__(self) -> str:
        """The lines that the command prints."""
        if self.is_reused:
            said = f"Reused     {self.folder}: nothing has changed since it was prepared"
            lines = [said, splits_line(self.manifest), *packing_lines(self.manifest)]
        else:
            lines = summary_lines(self.folder, self.manifest)
        return "\n".join(map(message_line, lines))


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("diptych prepare", parse_settings, run, argv)


def run(settings: PrepareSettings) -> int:
    datasets.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    prepared = prepare(settings)
    print(prepared)
    for warning in prepared.manifest["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def prepare(
    settings: PrepareSettings, say: Callable[[str], Any] = print, rows: RowsInMemory | None = None
) -> Prepared:
    """Writes the dataset that the settings describe into `settings.out`.

        prepared = prepare(PrepareSettings(data=["my.jsonl"], tokenizer="t5-small", out="prepared"), say=logger.info)
        prepared = prepare(PrepareSettings(tokenizer="t5-small"), rows=[{"instruction": "Add.", "output": "2"}])
        prepared.splits["train"], prepared.rejected, prepared.warnings, prepared.folder

    Args:
        settings: what `diptych prepare` takes.
        say: is given each line that is said while the work goes on, such as which format was recognised;
            `lambda line: None` for silence. The summary is `str(prepared)`.
        rows: rows in memory, read beside what `settings.data` names: a list of dicts, a `datasets.Dataset`, a pandas
            frame, a dict of columns, or a dict or DatasetDict that has such rows for each split.

    Raises:
        UserError: what a person has to correct, in the settings or in the data.
    """
    check_settings(settings, has_rows=rows is not None)
    folder = Path(settings.out).expanduser().resolve()
    check_apart(folder, settings)
    inputs = open_inputs(settings, rows)

    def say_line(text: str) -> None:
        say(message_line(text))

    tokenizer, template = load_tokenizer_and_template(settings, inputs.default_template, say_line)
    fingerprint = fingerprint_of(settings, inputs, tokenizer, template)
    if (manifest := find_reusable(folder, fingerprint)) is not None:
        return Prepared(folder, manifest, is_reused=True)
    with beside(folder) as partial:
        scratch = partial / "scratch"
        scratch.mkdir()
        with (partial / REJECTS).open("w", encoding="utf-8") as file:
            stages = make_stages(settings, inputs, tokenizer, template, say_line)
            rejects = Rejects(file, settings.strict, fatal_kinds(settings))
            results = _make_tables(inputs, RowJob(inputs.sources, stages, fingerprint), rejects, partial)
        manifest = manifest_of(results)
        packed = packed_table(results.plan, scratch) if results.plan is not None else None
        with without_bars():
            results.tables.save_to_disk(partial)
            if packed is not None:
                packed.save_to_disk(partial / PACKED)
        results.stages.tokenizer.save_pretrained(partial / TOKENIZER)
        write_report(partial, report_facts(results, manifest))
        shutil.rmtree(scratch)
        manifest = put_in_place(partial, folder, {"fingerprint": fingerprint, **manifest})
    shutil.rmtree(parts_folder(folder), ignore_errors=True)
    remove_kept_rejects(folder)
    return Prepared(folder, manifest)


def _make_tables(inputs: Inputs, job: RowJob, rejects: Rejects, partial: Path) -> Results:
    """From the inputs to the rows of each split, and what is packed of them."""
    stages, settings, scratch = job.stages, job.stages.settings, partial / "scratch"
    workers = settings.workers or min(cores(), 1 + sum(it.bytes or 0 for it in inputs.sources) // BYTES_PER_WORKER)
    gathered = _gather(job, rejects, scratch, workers)
    _need_rows(gathered.examples.num_rows, rejects, settings)

    selection = select(gathered, [source.split for source in inputs.sources], settings, rejects)
    write_conflicts(partial / CONFLICTS, gathered, selection)
    too_few_tokens = None
    if stages.tokenizer is None:
        texts, tokens = functools.partial(_train_texts, gathered, selection), settings.vocab_size
        if tokens == "auto":
            tokens, _ = curve_vocab_size(settings.train_tokenizer, texts)
        tokenizer = train_tokenizer(settings.train_tokenizer, texts(), tokens)
        too_few_tokens = why_fewer(tokenizer, tokens) if tokens == settings.vocab_size else None
        attach_template(tokenizer, stages.template)
        check_decoder_start(settings, tokenizer)  # little text gives fewer tokens than were asked for
        stages = replace(stages, tokenizer=tokenizer)
        kept = numpy.flatnonzero(selection.split_of_row != REMOVED)
        gathered = encode(gathered, kept, stages, rejects, scratch, workers)
        selection = selection.of_rows(gathered)
    places = selection.places()
    for split in inputs.splits:
        _need_rows(len(places.get(split, ())), rejects, settings, split if len(inputs.splits) > 1 else "")
    if settings.mixture is not None:
        places[TRAIN] = mixed_train(gathered, places[TRAIN], inputs.entries, settings.mixture, settings.seed)
    tables = split_tables(gathered, places, scratch, settings)
    is_packed = settings.packing and TRAIN in tables and not why_not_packed(settings.tokenizer)
    plan = plan_packing(tables[TRAIN], stages.tokenizer, settings, stages.preferences) if is_packed else None
    return Results(inputs, stages, gathered, selection, places, tables, plan, rejects, too_few_tokens)


def _gather(job: RowJob, rejects: Rejects, scratch: Path, workers: int) -> Gathered:
    """Runs the stages over all rows; every engine gives the same rows in the same order."""
    settings = job.stages.settings
    if settings.gathered is None and settings.engine == "local":
        return gather(job.sources, job.stages, rejects, scratch, workers)
    folder = Path(settings.gathered or "")
    if settings.engine == "datatrove":
        try:  # an extra, which few have installed
            from diptych.data_prep.pipeline.datatrove_rows import run_tasks
        except ModuleNotFoundError as error:
            raise UserError(
                f"--engine datatrove needs {error.name}, which is not installed: pip install 'diptych[datatrove]'."
            ) from None
        tasks = settings.tasks or TASKS_PER_WORKER * workers
        folder = parts_folder(Path(settings.out).expanduser().resolve()) / f"{job.fingerprint[:16]}-{tasks}"
        run_tasks(job, folder, tasks, workers)
    return collect(merged(job, folder), len(job.sources), job.stages, rejects, scratch)


def _need_rows(rows: int, rejects: Rejects, settings: PrepareSettings, split: str = "") -> None:
    """Raises UserError where the dataset, or a split that was named, has no row. The rejects are then written beside
    `settings.out`, which is not written."""
    if rows:
        return
    if not rejects.count:
        raise UserError(f"there are no rows in what was read{split and f' for {split}'}.")
    kinds = "; ".join(f"{count:,} × {kind}" for kind, count in rejects.kinds.most_common(3))
    kinds += f"; and {counted(more, 'more kind')}" if (more := len(rejects.kinds) - 3) > 0 else ""
    first = next(iter(rejects.examples.values()))[0]
    what = f"of {counted(rejects.count, 'row')}, none can be kept"
    if split:
        what = f"nothing is left for {split}: {counted(rejects.count, 'row')} cannot be kept"
    raise UserError(
        f"{what} ({kinds}). The first, {first.origin}: {first.reason} Correct the rows or the settings, and prepare"
        f" them again. All of them: {keep_rejects(rejects, Path(settings.out).expanduser().resolve())}"
    )


def _train_texts(gathered: Gathered, selection: Selection) -> Iterator[str]:
    """Sources and targets of the train split alone, without the marks that the template sets around a row's texts."""
    start, sides = 0, ["source", "target", *(["rejected"] if gathered.preferences == "pairs" else [])]
    for batch in gathered.examples.select(sides).to_batches():
        is_train = selection.split_of_row[start : start + batch.num_rows] == 0
        start += batch.num_rows
        for pair in zip(*(column.to_pylist() for column in batch.filter(is_train).columns), strict=True):
            yield from (str(from_marked(text)) for text in pair)
