"""`diptych evaluate MODEL --data prepared --split test --out report.json`: evaluates one split, or all test sets.

It prints a table of figures with their intervals (confidence_intervals.py) and writes a report, one per test set, with
the predictions in report.predictions.jsonl beside it, from which `diptych compare` computes its tests. The report
holds their hash, and what identifies the model and the split. Every row counts once, in order: the same model, data
and machine give the same figures.
Several ranks: `torchrun … -m diptych.finetune.evaluation` (on CPUs with ACCELERATE_USE_CPU=true).
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset

from diptych.data_prep.command_line.arguments import choose_from
from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.command_line.overwrite_checks import check_overwrite
from diptych.data_prep.rows.named_splits import kind_of, name_in, splits_of
from diptych.data_prep.rows.records import Languages
from diptych.data_prep.text_to_ids.templates import carried_template
from diptych.finetune.batches.padded_rows import check_rows_fit, check_same_tokenizer, drop_repeated_start, open_splits
from diptych.finetune.commands.model_settings import split_names
from diptych.finetune.commands.ranks import several_ranks
from diptych.finetune.evaluating.confidence_intervals import LEVEL_PERCENT, RESAMPLES, bootstrap_intervals
from diptych.finetune.evaluating.evaluate_rows import Evaluation, evaluate_rows, source_keys
from diptych.finetune.evaluating.evaluate_settings import EvaluateSettings
from diptych.finetune.evaluating.metrics import check_metric_names
from diptych.finetune.inference.generation_config import check_generation_names
from diptych.finetune.model.device_speed import keep_memory
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.loading import load_checkpoint, load_tokenizer, pick_device
from diptych.finetune.run_files.atomic_folders import MANIFEST, read_json

Intervals = Mapping[str, tuple[float, float]]
COUNTS = {"rows", "loss", "target_tokens", "sources", "unfinished", "max_new_tokens"}
"""Figures that are not scores."""
REPORT_KEYS = {"figures", "signatures", "settings"}
"""By which a file is known to be a report."""


def run(settings: EvaluateSettings) -> int:
    metrics = split_names(settings.metrics)
    check_metric_names(metrics)
    check_generation_names(settings.generation)
    keep_memory()
    splits = load_splits(settings.data, settings.split)
    for name in splits if settings.out else ():  # before hours of work
        check_report_files(report_file(settings.out, name, len(splits)))
    accelerator = several_ranks()
    is_main = accelerator is None or accelerator.is_main_process
    device = accelerator.device if accelerator and settings.device == "auto" else pick_device(settings.device)
    loaded = load_checkpoint(settings.model, settings.dtype, device)
    prepared = load_tokenizer(str(Path(settings.data) / "tokenizer"))
    check_same_tokenizer(settings.data, prepared, settings.model, loaded.tokenizer)
    # rendered and cut by the template that made the rows
    loaded = replace(loaded, template=carried_template(prepared, check=False) or loaded.template)
    splits = {name: of_languages(name, split, settings, loaded) for name, split in splits.items()}
    check_rows_fit(loaded.model, splits)
    for name, split in splits.items():
        if is_main:
            print(f"{settings.model} on {settings.data}, split {name}", file=sys.stderr)
        evaluation = evaluate_rows(
            loaded,
            drop_repeated_start(split, loaded.decoder_start_token_id, loaded.language_codes.starts),
            metrics=metrics,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            limit=settings.limit,
            progress=True,
            bleu_tokenize=settings.bleu_tokenize or None,
            accelerator=accelerator,
            mbr_samples=settings.mbr_samples,
            seed=settings.seed,
            num_beams=settings.num_beams,
            **settings.generation,
        )
        if is_main:
            intervals = bootstrap_intervals(evaluation.statistics, seed=settings.seed)
            table = format_table(evaluation, intervals)
            print(table if len(splits) == 1 else f"{name}\n{table}\n")
            if settings.out:
                of_split = replace(settings, split=name, out=str(report_file(settings.out, name, len(splits))))
                write_report(of_split, evaluation, intervals, split)
    if accelerator:
        accelerator.end_training()
    return 0


def load_splits(data: str, split: str) -> dict[str, Dataset]:
    """The split of this name; for `test` all test sets if they have names."""
    splits = open_splits(data)
    chosen = [split] if split in splits else splits_of(split, splits)
    if not chosen:
        known = dict.fromkeys([*map(kind_of, splits), *splits])
        raise UserError(f"{data} has no split {split!r}. {choose_from(split, list(known))}")
    return {name: splits[name] for name in chosen}


def of_languages(name: str, split: Dataset, settings: EvaluateSettings, loaded: LoadedModel) -> Dataset:
    """The rows of a split in the languages of the settings."""
    asked = loaded.language_codes.checked(Languages(settings.source_language, settings.target_language))
    if not any(asked):
        return split
    of_rows = [languages for _, languages in source_keys(split)]
    places = [
        place
        for place, languages in enumerate(of_rows)
        if all(code in ("", own) for code, own in zip(asked, languages, strict=True))
    ]
    if not places:
        found = ", ".join(dict.fromkeys(it.direction for it in of_rows if it.direction)) or "none that is known"
        raise UserError(
            f"split {name} has no rows of these languages ({asked.source or 'any'} to {asked.target or 'any'}). Its "
            f"directions are: {found}."
        )
    return split.select(places)


def format_table(evaluation: Evaluation, intervals: Intervals) -> str:
    """A line per figure: its value, its interval, its unit."""
    figures = evaluation.figures

    def line(name: str, note: str, form: str = ",") -> str:
        spread = "[{:{form}}, {:{form}}]".format(*intervals[name], form=form) if name in intervals else ""
        return f"{name:20}{figures[name]:>9{form}} {spread:17} {note}".rstrip()

    lines = [line("rows", "")]
    if evaluation.predictions:
        lines.append(line("sources", "different; scores are 0 to 100 over these"))
    lines.append(line("loss", f"nats/token over {figures['target_tokens']:,} target tokens", ".3f"))
    if evaluation.predictions:
        for name in [name for name in figures if name not in COUNTS]:
            note = "of rows gave their own target" if name == "exact_match_rows" else ""
            lines.append(line(name, note or evaluation.signatures.get(name, ""), ".2f"))
        lines.append(line("unfinished", f"outputs never ended and were stopped at {figures['max_new_tokens']} tokens"))
    if intervals:
        lines.append(
            f"[low, high]: {LEVEL_PERCENT} % intervals over other sources ({RESAMPLES:,} bootstrap resamples)"
        )
    if evaluation.directions:  # a line per direction, a column per figure
        names = list(next(iter(evaluation.directions.values())))
        forms = {name: ",d" if name == "rows" else ".3f" if name == "loss" else ".2f" for name in names}
        widths = {name: max(9, len(name) + 2) for name in names}
        lines += ["", f"{'direction':20}" + "".join(f"{name:>{widths[name]}}" for name in names)]
        for direction, of_it in evaluation.directions.items():
            lines.append(f"{direction:20}" + "".join(f"{of_it[name]:>{widths[name]}{forms[name]}}" for name in names))
    return "\n".join(lines)


def write_report(settings: EvaluateSettings, evaluation: Evaluation, intervals: Intervals, split: Dataset) -> None:
    """Writes settings.out, after the predictions beside it, whose hash it holds."""
    out, manifest = Path(settings.out), Path(settings.model).expanduser() / MANIFEST
    report = {
        "figures": evaluation.figures,
        "directions": evaluation.directions,
        "intervals": {name: list(interval) for name, interval in intervals.items()},
        "confidence": {"level_percent": LEVEL_PERCENT, "resamples": RESAMPLES, "seed": settings.seed},
        "signatures": evaluation.signatures,
        "settings": asdict(settings),
        # Sizes and hashes of its files, by which `diptych publish` knows whose scores these are.
        "model": read_json(manifest) if manifest.is_file() else None,
        "data": data_identity(split),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    written = str(out)
    if evaluation.predictions:
        beside = predictions_file(out)
        content = "".join(json.dumps(row.as_json(), ensure_ascii=False) + "\n" for row in evaluation.predictions)
        beside.write_bytes(content.encode("utf-8"))
        report["predictions_sha256"] = hashlib.sha256(content.encode("utf-8")).hexdigest()
        written += f" and {beside}"
    out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written: {written}")


def report_file(out: str, split: str, splits: int) -> Path:
    """The file of one split. With several splits it carries the name: report.json, test/news -> report.news.json."""
    file = Path(out)
    return file if splits == 1 else file.with_name(f"{file.stem}.{name_in(split)}{file.suffix}")


def predictions_file(report: Path) -> Path:
    return report.with_suffix(".predictions.jsonl")


def check_report_files(report: Path) -> None:
    """UserError if the report or its predictions would overwrite files of another kind. Makes their folder."""
    check_overwrite(report, lambda content: has_keys(content, REPORT_KEYS), "a report of `diptych evaluate`")
    check_overwrite(
        predictions_file(report),
        lambda content: has_keys(content.split(b"\n", 1)[0], {"source", "references", "prediction"}),
        "the predictions of a report",
    )
    report.parent.mkdir(parents=True, exist_ok=True)


def has_keys(content: bytes, keys: set[str]) -> bool:
    """Whether the content is a JSON object with these keys."""
    try:
        return keys <= json.loads(content).keys()
    except (ValueError, AttributeError):
        return False


def data_identity(split: Dataset) -> dict[str, Any]:
    """Number of rows and a hash of their texts in order, the same for any tokenizer."""
    digest = hashlib.sha256()
    for rows in split.select_columns(["source", "target"]).iter(batch_size=10_000):
        for pair in zip(rows["source"], rows["target"], strict=True):
            digest.update(json.dumps(pair).encode())
    return {"rows": len(split), "texts_sha256": digest.hexdigest()}
