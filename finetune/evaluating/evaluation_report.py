"""An evaluation as a table to read and as files: report.json, and report.predictions.jsonl beside it.

Each line of the predictions has source, references, prediction, finished, nats and target_tokens; `diptych compare`
computes its tests from them. The report holds their hash, and what identifies the model and the split.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset

from diptych.data_prep.command_line.overwrite_checks import check_overwrite
from diptych.data_prep.rows.named_splits import name_in
from diptych.finetune.evaluating.confidence_intervals import LEVEL_PERCENT, RESAMPLES
from diptych.finetune.evaluating.evaluate_rows import Evaluation
from diptych.finetune.evaluating.evaluate_settings import EvaluateSettings
from diptych.finetune.run_files.atomic_folders import MANIFEST, read_json

Intervals = Mapping[str, tuple[float, float]]
COUNTS = {"rows", "loss", "target_tokens", "sources", "unfinished", "max_new_tokens"}
"""Figures that are not scores."""
REPORT_KEYS = {"figures", "signatures", "settings"}
"""By which a file is known to be a report."""


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
    if evaluation.directions:
        lines += ["", *_direction_lines(evaluation.directions)]
    return "\n".join(lines)


def _direction_lines(directions: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A line per direction, a column per figure."""
    names = list(next(iter(directions.values())))
    forms = {name: ",d" if name == "rows" else ".3f" if name == "loss" else ".2f" for name in names}
    widths = {name: max(9, len(name) + 2) for name in names}
    lines = [f"{'direction':20}" + "".join(f"{name:>{widths[name]}}" for name in names)]
    for direction, figures in directions.items():
        lines.append(f"{direction:20}" + "".join(f"{figures[it]:>{widths[it]}{forms[it]}}" for it in names))
    return lines


def write_report(settings: EvaluateSettings, evaluation: Evaluation, intervals: Intervals, split: Dataset) -> None:
    """Writes settings.out, after the predictions beside it, whose hash it holds."""
    out = Path(settings.out)
    report = {
        "figures": evaluation.figures,
        "directions": evaluation.directions,
        "intervals": {name: list(interval) for name, interval in intervals.items()},
        "confidence": {"level_percent": LEVEL_PERCENT, "resamples": RESAMPLES, "seed": settings.seed},
        "signatures": evaluation.signatures,
        "settings": asdict(settings),
        "model": model_identity(settings.model),
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


def model_identity(name: str) -> dict[str, Any] | None:
    """Sizes and hashes of the model's files, as training wrote them in its manifest: `diptych publish` knows by them
    whose scores these are. None without a manifest."""
    manifest = Path(name).expanduser() / MANIFEST
    return read_json(manifest) if manifest.is_file() else None


def data_identity(split: Dataset) -> dict[str, Any]:
    """Number of rows and a hash of their texts in order, the same for any tokenizer."""
    digest = hashlib.sha256()
    for rows in split.select_columns(["source", "target"]).iter(batch_size=10_000):
        for pair in zip(rows["source"], rows["target"], strict=True):
            digest.update(json.dumps(pair).encode())
    return {"rows": len(split), "texts_sha256": digest.hexdigest()}
