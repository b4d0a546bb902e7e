"""`diptych evaluate MODEL --data prepared --split test --out report.json`: evaluates one split, or all test sets.

It prints a table of figures with their intervals (confidence_intervals.py) and writes a report, one per test set, with
the predictions in report.predictions.jsonl beside it, from which `diptych compare` computes its tests. The report
holds their hash, and what identifies the model and the split. Every row counts once, in order: the same model, data
and machine give the same figures.
Several ranks: `torchrun … -m diptych.finetune.evaluating` (on CPUs with ACCELERATE_USE_CPU=true).
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
from datasets import Dataset, Value

from diptych.data_prep.command_line.arguments import choose_from
from diptych.data_prep.command_line.errors import UserError, counted, excerpt
from diptych.data_prep.command_line.overwrite_checks import check_overwrite
from diptych.data_prep.rows.named_splits import kind_of, name_in, splits_of
from diptych.data_prep.rows.records import Languages
from diptych.data_prep.rows.terms import read_terms
from diptych.data_prep.text_to_ids.languages import LanguageCodes, codes_of
from diptych.data_prep.text_to_ids.templates import carried_template
from diptych.finetune.batches.padded_rows import (
    check_ids_fit,
    check_rows_fit,
    check_same_tokenizer,
    drop_repeated_start,
    open_splits,
)
from diptych.finetune.commands import cli
from diptych.finetune.commands.model_settings import split_names
from diptych.finetune.commands.ranks import several_ranks
from diptych.finetune.evaluating.calibration import Calibrated, calibrated, parse_right, plot_risk, right_of, table_of
from diptych.finetune.evaluating.confidence_intervals import LEVEL_PERCENT, RESAMPLES, bootstrap_intervals
from diptych.finetune.evaluating.evaluate_documents import documents_to_evaluate
from diptych.finetune.evaluating.evaluate_rows import (
    CHOSEN_LIKELIER,
    Evaluation,
    Group,
    column_values,
    evaluate_rows,
    liked_rows,
    source_keys,
)
from diptych.finetune.evaluating.evaluate_settings import EvaluateSettings
from diptych.finetune.evaluating.metrics import (
    METRICS,
    compute_metrics,
    figures_and_signatures,
    find_metrics,
    lower_is_better,
)
from diptych.finetune.evaluating.own_metrics import parse_metric_name
from diptych.finetune.inference.engine import weights_sha256
from diptych.finetune.inference.generate_settings import GenerateSettings, asked_form
from diptych.finetune.inference.generation_config import check_generation_names
from diptych.finetune.inference.output_confidence import CALIBRATION
from diptych.finetune.model.device_speed import keep_memory
from diptych.finetune.model.loading import load_checkpoint, load_tokenizer, pick_device
from diptych.finetune.run_files.atomic_folders import MANIFEST, read_json, write_text

Intervals = Mapping[str, tuple[float, float]]
COUNTS = {"rows", "loss", "target_tokens", "sources", "unfinished", "max_new_tokens", "source_pieces", "terms"}
"""Figures that are not scores."""
NOTES = {
    "exact_match_rows": "of rows gave their own target",
    "terms_honoured": "of the terms of sources are in the outputs",
    CHOSEN_LIKELIER: "of pairs: the chosen answer is more probable per token than the rejected one",
}
WHOLLY_RIGHT = ("exact_match", "superni_exact_match", "json_valid", "json_exact")
"""Figures of which an output is right or wrong, without a score to be named."""
MOST_GROUPS = 200
FEW_SOURCES = 30
"""A group with fewer is marked."""
REPORT_KEYS = {"figures", "signatures", "settings"}
"""By which a file is known to be a report."""


def run(settings: EvaluateSettings) -> int:
    metrics, metric_settings = checked_metrics(settings), settings.all_metric_settings
    check_generation_names(settings.generation)
    form = asked_form(settings) | ({"scores": True} if settings.confidence else {})
    terms = read_terms(settings.terms) if settings.terms else None
    keep_memory()
    splits = load_splits(settings.data, settings.split)
    for name in splits if settings.out else ():  # before hours of work
        check_report_files(report_file(settings.out, name, len(splits)))
    accelerator = several_ranks()
    is_main = accelerator is None or accelerator.is_main_process
    device = accelerator.device if accelerator and settings.device == "auto" else pick_device(settings.device)
    if is_torch := settings.engine == "torch":
        loaded = load_checkpoint(settings.model, settings.dtype, device)
    else:
        loaded = cli.imported(cli.ENGINES[settings.engine])(settings.model, settings.dtype, device)
        settings_of_search = {"mbr_samples": settings.mbr_samples, "num_beams": settings.num_beams}
        loaded.check(GenerateSettings(settings.model, **settings_of_search, generation=settings.generation))
    prepared = load_tokenizer(str(Path(settings.data) / "tokenizer"))
    check_same_tokenizer(settings.data, prepared, settings.model, loaded.tokenizer)
    # rendered and cut by the template that made the rows
    template, codes = carried_template(prepared, check=False) or loaded.template, codes_of(loaded.tokenizer)
    loaded = replace(loaded, template=template) if is_torch else loaded.with_template(template)
    splits = {name: of_languages(name, split, settings, codes) for name, split in splits.items()}
    for name, split in splits.items():
        splits[name] = liked_rows(split)
        if not_liked := len(split) - len(splits[name]):
            print(
                f"{name}: {counted(not_liked, 'answer')} that are not liked are no references: left out",
                file=sys.stderr,
            )
    if is_torch:
        check_rows_fit(loaded.model, splits)
    else:
        tokens = len(loaded.source_tokens), len(loaded.tokens)
        check_ids_fit(splits, tokens, (loaded.max_source_tokens, loaded.max_target_tokens))
    documents = documents_to_evaluate(settings, loaded, terms)
    by = {name: group_columns(name, split, split_names(settings.by)) for name, split in splits.items()}
    faults: dict[str, str] = {}
    for name, split in splits.items():
        if is_main:
            print(f"{settings.model} on {settings.data}, split {name}", file=sys.stderr)
        evaluation = evaluate_rows(
            loaded,
            drop_repeated_start(split, loaded.decoder_start_token_id, codes.starts),
            metrics=metrics,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            limit=settings.limit,
            progress=True,
            metric_settings=metric_settings,
            by=by[name],
            accelerator=accelerator,
            mbr_samples=settings.mbr_samples,
            seed=settings.seed,
            num_beams=settings.num_beams,
            compare_answers=True,
            documents=documents,
            **settings.generation,
            **form,
        )
        faults |= evaluation.faults
        if is_main:
            faults |= tell(replace(settings, split=name), evaluation, split, len(splits), loaded)
    if accelerator:
        accelerator.end_training()
    if faults and is_main:
        raise UserError(*faults.values())
    return UserError.exit_code if faults else 0


def tell(
    settings: EvaluateSettings, evaluation: Evaluation, split: Dataset, splits: int, loaded: Any
) -> dict[str, str]:
    """Prints the figures of one split, and writes its report. Returns what was asked of its confidence and could not
    be had, which must not cost the report."""
    intervals = bootstrap_intervals(evaluation.statistics, seed=settings.seed)
    groups = {
        column: {value: facts_of(group, evaluation, settings.seed) for value, group in of_column.items()}
        for column, of_column in evaluation.groups.items()
    }
    table = format_table(evaluation, intervals, groups)
    print(table if splits == 1 else f"{settings.split}\n{table}\n")
    if settings.out:
        settings = replace(settings, out=str(report_file(settings.out, settings.split, splits)))
    trust, fault = None, ""
    try:
        trust = confidence_of(settings, evaluation) if settings.confidence else None
    except UserError as error:  # of a metric that is not built in
        fault = str(error)
    if settings.out:
        write_report(settings, evaluation, intervals, groups, split, trust.figures if trust else {})
    if trust:
        fault = finish_confidence(settings, trust, len(evaluation.outputs), loaded)
    return {f"confidence in {settings.split}": f"{settings.split}: {fault}"} if fault else {}


def checked_metrics(settings: EvaluateSettings) -> list[str]:
    """The metrics, with that of `confidence`. UserError: it is none, or does not say which outputs are right."""
    metrics = settings.all_metrics
    find_metrics(metrics, settings.all_metric_settings)
    name, least = parse_right(settings.confidence)
    own = [it.figure for it in map(parse_metric_name, metrics) if it is not None]
    is_own = any(f"{name}.".startswith(f"{figure}.") for figure in own)
    if name and lower_is_better(name, metrics):
        raise UserError(
            f"confidence is {settings.confidence!r}, and a lower {name} is better. Name a metric whose high scores are"
            " right: exact_match, or chrf:60."
        )
    if not name or is_own:  # its figures are known when it was applied
        return metrics
    figures = {figure: metric for metric in METRICS for figure in compute_metrics([metric], ["1"], [["1"]])}
    metric = "json" if name.startswith("json_exact.") else figures.get(name)
    if metric is None:
        known = [*(figure for figure in figures if not lower_is_better(figure)), *own]
        raise UserError(f"confidence is {settings.confidence!r}: no such figure. {choose_from(name, known)}")
    if least is None and not name.startswith(WHOLLY_RIGHT):
        raise UserError(
            f"confidence is {settings.confidence!r}, which does not say from which score on an output is right. Give"
            f" the score: {name}:60."
        )
    return list(dict.fromkeys([*metrics, metric]))


def confidence_of(settings: EvaluateSettings, evaluation: Evaluation) -> Calibrated:
    """Prints how well confidence tells right from wrong. UserError: the metric has no such figure, or none of a row
    alone."""
    metric, least = parse_right(settings.confidence)
    scored = next((it for it in evaluation.statistics.values() if metric in it.figures()), None)
    if scored is None:
        of_metrics = [name for it in evaluation.statistics.values() for name in it.figures()]
        raise UserError(f"confidence is {settings.confidence!r}. {choose_from(metric, of_metrics)}")
    found = calibrated(evaluation.outputs, right_of(metric, least, scored, len(evaluation.outputs)), settings.seed)
    print("\n".join(["", *table_of(found, settings.confidence)]))
    return found


def finish_confidence(settings: EvaluateSettings, found: Calibrated, outputs: int, loaded: Any) -> str:
    """Plots it beside the report, and stores the fit if asked to. Returns why it could not be stored."""
    if settings.out:
        plot_risk(found, Path(settings.out).with_suffix(".risk.png"), settings.confidence)
    if not settings.calibrate or found.not_fitted:
        if found.not_fitted and not settings.calibrate:
            print(f"warning: {found.not_fitted}", file=sys.stderr)
        return f"no {CALIBRATION} was written: {found.not_fitted}" if settings.calibrate else ""
    file = Path(settings.model).expanduser() / CALIBRATION
    stored = {"weights": found.weights, "right": settings.confidence, "figures": found.figures}
    stored["form"] = form.text if (form := asked_form(settings).get("grammar")) else ""
    stored |= {"weights_sha256": weights_sha256(loaded.model), "split": settings.split}
    write_text(file, json.dumps(stored | {"outputs": outputs}, indent=1) + "\n")
    print(f"written: {file}")
    if warning := found.warning:
        print(f"warning: {warning}", file=sys.stderr)
    return ""


def load_splits(data: str, split: str) -> dict[str, Dataset]:
    """The split of this name; for `test` all test sets if they have names."""
    splits = open_splits(data)
    chosen = [split] if split in splits else splits_of(split, splits)
    if not chosen:
        known = dict.fromkeys([*map(kind_of, splits), *splits])
        raise UserError(f"{data} has no split {split!r}. {choose_from(split, list(known))}")
    return {name: splits[name] for name in chosen}


def of_languages(name: str, split: Dataset, settings: EvaluateSettings, codes: LanguageCodes) -> Dataset:
    """The rows of a split in the languages of the settings."""
    asked = codes.checked(Languages(settings.source_language, settings.target_language))
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


def group_columns(name: str, split: Dataset, by: list[str]) -> list[str]:
    """The columns by which figures are grouped: also the direction if there are several, since one BLEU over two
    languages says little."""
    known = [column for column, feature in split.features.items() if isinstance(feature, Value)]
    for column in by:
        if column not in (*known, "direction"):
            raise UserError(
                f"by is {column!r}, and split {name} has no such column. {choose_from(column, ['direction', *known])} "
                f"`diptych prepare --keep_columns {column}` stores a column of your rows."
            )
        if (groups := len(set(column_values(split, column)))) > MOST_GROUPS:
            raise UserError(
                f"by is {column!r}, of which split {name} has {groups:,} values. At most {MOST_GROUPS} are allowed."
            )
    has_directions = len(set(column_values(split, "direction"))) > 1
    return list(dict.fromkeys(["direction"] * has_directions + by))


def facts_of(group: Group, evaluation: Evaluation, seed: int) -> dict[str, Any]:
    """What the report says of a group. Its signatures are there where they are not those of all rows."""
    figures, signatures = figures_and_signatures(group.statistics.values())
    intervals = bootstrap_intervals(group.statistics, seed=seed)
    sources = group.statistics["loss"].sources
    return {
        "rows": group.rows,
        "sources": sources,
        "has_few_sources": sources < FEW_SOURCES,
        "figures": figures,
        "intervals": {name: list(interval) for name, interval in intervals.items()},
        "signatures": {name: it for name, it in signatures.items() if it != evaluation.signatures.get(name)},
    }


def format_table(
    evaluation: Evaluation, intervals: Intervals, groups: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None
) -> str:
    """A line per figure: its value, its interval, its unit. Of each group the values in a line, and the intervals
    below."""
    figures = evaluation.figures

    def line(name: str, note: str, form: str = ",") -> str:
        spread = "[{:{form}}, {:{form}}]".format(*intervals[name], form=form) if name in intervals else ""
        return f"{name:20}{figures[name]:>9{form}} {spread:17} {note}".rstrip()

    lines = [line("rows", "")]
    if evaluation.predictions:
        lines.append(line("sources", "different; scores are over these, and built-in ones are 0 to 100"))
    lines.append(line("loss", f"nats/token over {figures['target_tokens']:,} target tokens", ".3f"))
    for name in [name for name in figures if name not in COUNTS]:
        lines.append(line(name, NOTES.get(name) or excerpt(evaluation.signatures.get(name, "")), ".2f"))
    if evaluation.predictions:
        lines += [f"{name:20}{'missing':>9}" for name in evaluation.faults]
        lines += [line("terms", "in the sources")] if "terms" in figures else []
        lines += [line("source_pieces", "were generated")] if "source_pieces" in figures else []
        lines.append(line("unfinished", f"outputs never ended and were stopped at {figures['max_new_tokens']} tokens"))
    if intervals:
        lines.append(
            f"[low, high]: {LEVEL_PERCENT} % intervals over other sources ({RESAMPLES:,} bootstrap resamples)"
        )
    for column, facts in (groups or {}).items():
        lines += ["", *group_lines(column, facts)]
    return "\n".join(lines)


def group_lines(column: str, groups: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A column for each figure, and two lines for each group."""
    names = list(dict.fromkeys(name for facts in groups.values() for name in facts["figures"]))
    width = max(20, *(len(excerpt(value, 60)) + 3 for value in groups))
    rows = [[column, "rows", *names]]
    for value, facts in groups.items():
        digits = {name: 3 if name == "loss" else 2 for name in names}
        figures, bounds = facts["figures"], facts["intervals"]
        cells = [f"{figures[name]:.{digits[name]}f}" if name in figures else "missing" for name in names]
        rows.append([excerpt(value, 60) + " *" * facts["has_few_sources"], f"{facts['rows']:,}", *cells])
        if bounds:
            spread = ["..".join(f"{it:.{digits[name] - 1}f}" for it in bounds.get(name, ())) for name in names]
            rows.append(["", "", *spread])
    widths = [max(len(row[place]) for row in rows) + 2 for place in range(1, len(names) + 2)]
    lines = [
        f"{row[0]:{width}}" + "".join(f"{cell:>{it}}" for cell, it in zip(row[1:], widths, strict=True))
        for row in rows
    ]
    if any(facts["has_few_sources"] for facts in groups.values()):
        lines.append(
            f"* fewer than {FEW_SOURCES} different sources: these figures are uncertain, and so are their intervals"
        )
    return [line.rstrip() for line in lines]


def write_report(
    settings: EvaluateSettings,
    evaluation: Evaluation,
    intervals: Intervals,
    groups: Mapping[str, Mapping[str, Mapping[str, Any]]],
    split: Dataset,
    trust: Mapping[str, float],
) -> None:
    """Writes settings.out, after the predictions beside it, whose hash it holds."""
    out, manifest = Path(settings.out), Path(settings.model).expanduser() / MANIFEST
    report = {
        "figures": evaluation.figures,
        "groups": groups,
        "faults": evaluation.faults,
        "intervals": {name: list(interval) for name, interval in intervals.items()},
        "confidence": {"level_percent": LEVEL_PERCENT, "resamples": RESAMPLES, "seed": settings.seed},
        "signatures": evaluation.signatures,
        **({"risk": trust} if trust else {}),
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
    write_text(out, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
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
