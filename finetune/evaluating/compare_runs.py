"""`diptych compare`: two runs or two reports side by side: settings, losses, metrics, and tests of the differences.

    diptych compare runs/full runs/lora              each a run folder, with the reports that were written into it
    diptych compare full.json lora.json              each a report of `diptych evaluate --out`

    test                    A                      B                    B - A                p
    chrf                41.20 [39.10, 43.30]   42.00 [39.80, 44.20]     0.80 [-0.30, 1.90]   0.1621

Tests need the outputs of both for the same texts: reports of the same split (by its hash), and the unchanged
predictions beside them. If one of these is missing, a note says which, and nothing is tested. Sources that only one
report has (another --limit) are left out and counted.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.command_line.overwrite_checks import check_overwrite
from diptych.data_prep.rows.named_splits import splits_of
from diptych.finetune.commands.model_settings import split_names
from diptych.finetune.evaluating.confidence_intervals import LEVEL_PERCENT, Paired, Scored, paired_tests, ratio
from diptych.finetune.evaluating.evaluate_settings import CompareSettings
from diptych.finetune.evaluating.evaluate_split import REPORT_KEYS, has_keys, predictions_file
from diptych.finetune.evaluating.metrics import bleu_tokenize_in, count_texts, is_improvement
from diptych.finetune.evaluating.own_metrics import parse_metric_name
from diptych.finetune.run_files.atomic_folders import read_json_lines, write_text
from diptych.finetune.run_files.run_folder import last_training, settings_of


class EvaluationReport(NamedTuple):
    path: Path
    content: dict[str, Any]

    @property
    def split(self) -> str:
        return self.content["settings"]["split"]


class Side(NamedTuple):
    """One of the two that are compared. A report alone has no recipe and no entries."""

    name: str
    recipe: dict[str, Any]
    entries: list[dict[str, Any]]
    """The lines of the run's metrics.jsonl."""
    reports: dict[str, EvaluationReport]
    """The newest report of each split."""


class SplitComparison(NamedTuple):
    a: EvaluationReport
    b: EvaluationReport
    tests: dict[str, Paired]
    sources: int
    """The number of sources that were tested."""
    notes: list[str]
    """Why a test is missing, and what was left out."""


def load_side(name: str) -> Side:
    """UserError if `name` is neither a run folder nor a report."""
    path = Path(name)
    if path.is_dir():
        last = last_training(path)
        metrics, config = last / "metrics.jsonl", last / "config.yaml"
        if not metrics.is_file() or not config.is_file():
            missing = metrics.name if config.is_file() else config.name
            raise UserError(f"{name} is no run folder (it has no {missing}). Name the `out` of a run, or a report.")
        found = [report for file in path.glob("*.json") if (report := _report(file))]
        newest_last = sorted(found, key=lambda report: report.path.stat().st_mtime)
        return Side(
            name, settings_of(last), read_json_lines(metrics), {report.split: report for report in newest_last}
        )
    if not path.is_file():
        raise UserError(f"there is no {name}. Name a run folder, or a report of `diptych evaluate --out`.")
    report = _report(path)
    if report is None:
        raise UserError(f"{name} is no report of `diptych evaluate --out`. Name one, or a run folder.")
    return Side(name, {}, [], {report.split: report})


def _report(path: Path) -> EvaluationReport | None:
    """None for other JSON, which a run folder has, too."""
    content = path.read_bytes()
    return EvaluationReport(path, json.loads(content)) if has_keys(content, REPORT_KEYS) else None


def differing(a: Mapping[str, Any], b: Mapping[str, Any], without: Sequence[str] = ()) -> dict[str, tuple[Any, Any]]:
    names = [name for name in {**a, **b} if name not in without]
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}


def run_figures(side: Side) -> dict[str, Any]:
    """Of a run's metrics.jsonl: steps, epochs, tokens, the last training loss, and the best validation figures."""
    train = [entry for entry in side.entries if entry["split"] == "train"]
    figures: dict[str, Any] = {}
    if train:
        figures |= {"steps": train[-1]["step"], "epochs": train[-1]["epoch"], "tokens": train[-1]["tokens"]}
        figures["last training loss"] = train[-1]["loss"]
    names = dict.fromkeys(["loss", side.recipe.get("best_metric", "loss").rpartition("/")[2]])
    metrics = split_names(side.recipe.get("metrics", ""))
    for split in splits_of("validation", dict.fromkeys(entry["split"] for entry in side.entries)):
        for name in names:
            best = None
            for entry in side.entries:
                is_of_it = entry["split"] == split and name in entry
                if is_of_it and is_improvement(name, entry[name], best and best[name], metrics):
                    best = entry
            if best:
                figures |= {f"best {split} {name}": best[name], f"… {split} {name} at step": best["step"]}
    return figures


def compare_reports(a: EvaluationReport, b: EvaluationReport, settings: CompareSettings) -> SplitComparison:
    """The tests of two reports of one split, as far as they are possible."""
    try:
        for report in (a, b):
            if "data" not in report.content:
                raise _NotComparable(f"{report.path} does not say what texts it is of; evaluate once more")
        if a.content["data"] != b.content["data"]:
            rows = " and ".join(f"{report.content['data']['rows']:,}" for report in (a, b))
            raise _NotComparable(f"the splits hold other texts ({rows} rows); evaluate both on one")
        ours, theirs = (_predictions(report) for report in (a, b))
        shared = [source for source in ours if source in theirs]
        notes = []
        if len(shared) < max(len(ours), len(theirs)):
            notes = [f"tested on the {len(shared)} sources that both have, of {len(ours)} and {len(theirs)}"]
        if len(shared) < 2:
            return SplitComparison(a, b, {}, len(shared), [*notes, "not tested: two sources or more are needed"])
        if any(ours[source]["references"] != theirs[source]["references"] for source in shared):
            raise _NotComparable("the references of some sources differ, because other stop strings cut them")
    except _NotComparable as reason:
        return SplitComparison(a, b, {}, 0, [f"not tested: {reason}"])
    sides = ([side[source] for source in shared] for side in (ours, theirs))
    statistics, more = _statistics(a, b, *sides, settings)
    notes += more
    tests = paired_tests(*statistics, settings.trials, settings.seed, notes)
    return SplitComparison(a, b, tests, len(shared), notes)


class _NotComparable(Exception):
    """Why two reports cannot be tested."""


def _predictions(report: EvaluationReport) -> dict[tuple[str, int], dict[str, Any]]:
    """By source text and how often it came before: rows of two directions may have the same text, and two tokenizers
    may have different names for these directions."""
    if "predictions_sha256" not in report.content:
        raise _NotComparable(f"{report.path} has no predictions, since it was made without metrics")
    beside = predictions_file(report.path)
    if not beside.is_file():
        raise _NotComparable(f"{beside} is not beside its report")
    content = beside.read_bytes()
    if hashlib.sha256(content).hexdigest() != report.content["predictions_sha256"]:
        raise _NotComparable(f"{beside} is not what was written with {report.path.name}; evaluate once more")
    seen: Counter[str] = Counter()
    found = {}
    for row in map(json.loads, content.decode("utf-8").splitlines()):
        found[row["source"], seen[row["source"]]] = row
        seen[row["source"]] += 1
    return found


def _statistics(
    a: EvaluationReport,
    b: EvaluationReport,
    ours: list[dict[str, Any]],
    theirs: list[dict[str, Any]],
    allowed: CompareSettings,
) -> tuple[list[dict[str, Scored]], list[str]]:
    """The counts of both sides for all metrics that both have and that are comparable; notes on the others."""
    notes = []
    sides: list[dict[str, Scored]] = [{}, {}]
    tokens = [[row["target_tokens"] for row in rows] for rows in (ours, theirs)]
    if tokens[0] == tokens[1]:
        for side, rows in zip(sides, (ours, theirs), strict=True):
            side["loss"] = ratio("loss", [row["nats"] for row in rows], tokens[0])
    else:
        notes.append("loss not tested: it is per token, and the two tokenizers make other tokens of the targets")
    asked = [split_names(report.content["settings"]["metrics"]) for report in (a, b)]
    for name in [name for name in asked[0] if name in asked[1]]:
        own = parse_metric_name(name)
        known = [_signature(report, own.figure if own else name) for report in (a, b)]
        settings = {}
        try:
            if name == "bleu":
                tokenize = [bleu_tokenize_in(signature) for signature in known]
                settings, known = {"bleu": {"tokenize": tokenize[0]}}, known if tokenize[0] != tokenize[1] else []
            elif own:
                if name not in split_names(allowed.metrics):
                    raise UserError(f"it would run code. If you trust this code, allow it: --metrics {name}")
                settings = {key: it for key, it in allowed.metric_settings.items() if key in (name, own.figure)}
            else:
                known = []
            if known and known[0] != known[1]:
                raise UserError(f"{known[0] or 'a missing figure'} is not {known[1] or 'a missing figure'}")
            counted = [
                count_texts(
                    [name], *([row[key] for row in rows] for key in ("prediction", "references", "source")), settings
                )
                for rows in (ours, theirs)
            ]
            if known and known[0] != counted[0][name].signature:
                raise UserError(f"it has changed since: {known[0]} is not {counted[0][name].signature}")
        except UserError as reason:
            notes.append(f"{name} not tested: {reason}")
            continue
        for side, of_side in zip(sides, counted, strict=True):
            side |= of_side
    return sides, notes


def _signature(report: EvaluationReport, figure: str) -> str:
    """Of a metric: that of its first figure; "" if the report has none."""
    found = report.content["signatures"].items()
    return next((it for name, it in found if f"{name}.".startswith(f"{figure}.")), "")


def format_tables(a: Side, b: Side, comparisons: Mapping[str, SplitComparison]) -> str:
    rows = [["", "A", "B"], ["", a.name, b.name], []]
    if a.recipe and b.recipe:
        changed = _changed_recipe(a, b) or {"none": (None, None)}
        rows += [["settings that differ"], *_pairs(changed), []]
    if a.entries or b.entries:
        ours, theirs = run_figures(a), run_figures(b)
        rows += [["training"], *_pairs({name: (ours.get(name), theirs.get(name)) for name in {**ours, **theirs}})]
    texts = [_aligned(rows), *(_split_table(split, comparison) for split, comparison in comparisons.items())]
    return "\n\n".join(texts)


def _changed_recipe(a: Side, b: Side) -> dict[str, tuple[Any, Any]]:
    return differing(a.recipe, b.recipe, without=("out", "resume")) if a.recipe and b.recipe else {}


def _pairs(values: Mapping[str, tuple[Any, Any]]) -> list[list[str]]:
    return [[name, _shown(ours), _shown(theirs)] for name, (ours, theirs) in values.items()]


def _split_table(split: str, comparison: SplitComparison) -> str:
    a, b, tests, sources, notes = comparison
    rows = [[split, "A", "B", "B - A", "p"], ["", str(a.path), str(b.path)]]
    changed = differing(a.content["settings"], b.content["settings"], without=("out", "model", "device"))
    rows += _pairs(changed | differing(a.content.get("versions", {}), b.content.get("versions", {})))
    for name in {**a.content["figures"], **b.content["figures"]}:
        row = [name]
        for report in (a, b):
            interval = report.content.get("intervals", {}).get(name)
            spread = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
            row.append(_shown(report.content["figures"].get(name)) + spread)
        if name in tests:
            test = tests[name]
            row += [f"{test.b - test.a:.3f} [{test.low:.3f}, {test.high:.3f}]", f"{test.p:.4f}"]
        rows.append(row)
    legend = f"[low, high]: {LEVEL_PERCENT} % over other sources"
    if tests:
        legend += f"; p: approximate randomisation on {sources:,} sources, two-sided"
    return "\n".join([_aligned(rows), *notes, legend])


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) >= 0.01 else f"{value:g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Every column as wide as its widest cell."""
    columns = zip_longest(*rows, fillvalue="")
    widths = [max(map(len, column)) for column in columns]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
    return "\n".join(lines).strip("\n")


def run(settings: CompareSettings) -> int:
    a, b = load_side(settings.run_a), load_side(settings.run_b)
    shared = [split for split in a.reports if split in b.reports]
    if not shared and not (a.entries and b.entries):
        raise UserError(
            f"{a.name} and {b.name} have nothing to compare: not two runs, nor reports of the same split. Evaluate "
            f"both: diptych evaluate MODEL --data FOLDER --split test --out REPORT.json"
        )
    if settings.out:
        keys = {"a", "b", "training", "splits"}
        check_overwrite(Path(settings.out), lambda it: has_keys(it, keys), "a comparison of `diptych compare`")
    comparisons = {split: compare_reports(a.reports[split], b.reports[split], settings) for split in shared}
    print(format_tables(a, b, comparisons))
    if settings.out:
        out = Path(settings.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(to_json(a, b, comparisons), indent=1, ensure_ascii=False) + "\n")
        print(f"written: {out}")
    if not shared:
        remedy = "For each: diptych evaluate RUN/final --data PREPARED --out RUN/test.json"
        print(f"no split was evaluated for both, so there is nothing to test. {remedy}", file=sys.stderr)
    return 0


def to_json(a: Side, b: Side, comparisons: Mapping[str, SplitComparison]) -> dict[str, Any]:
    return {
        "a": a.name,
        "b": b.name,
        "settings": _changed_recipe(a, b),
        "training": {"a": run_figures(a), "b": run_figures(b)},
        "splits": {
            split: {
                "reports": [str(found.a.path), str(found.b.path)],
                "figures": [found.a.content["figures"], found.b.content["figures"]],
                "intervals": [report.content.get("intervals", {}) for report in (found.a, found.b)],
                "tests": {name: test._asdict() for name, test in found.tests.items()},
                "sources": found.sources,
                "notes": found.notes,
            }
            for split, found in comparisons.items()
        },
    }
