"""Two runs, or two reports of `diptych evaluate`, beside each other: what was set, what came out, whether by chance.

    diptych compare runs/full runs/lora              each a run folder, with what was evaluated into it
    diptych compare full.json lora.json              each a report of `diptych evaluate --out`

    out.png                                          both losses of both runs, beside --out

    test                    A                      B                    B - A                p
    chrf                41.20 [39.10, 43.30]   42.00 [39.80, 44.20]     0.80 [-0.30, 1.90]   0.1621

Tests need the outputs of both for the same texts: reports of the same split, by its hash, and the predictions beside
them as they were written. Where one of this is not so, it is said which, and nothing is tested. Sources that only one
report has (another --limit) are left out, and counted.
"""

import hashlib
import itertools
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.command_line.own_files import PICTURE_MARK, check_overwrite, is_own_picture
from diptych.data_prep.rows.named_splits import splits_of
from diptych.finetune.commands import cli
from diptych.finetune.evaluating.best_figure import is_improvement
from diptych.finetune.evaluating.confidence import LEVEL_PERCENT, Paired, paired_tests
from diptych.finetune.evaluating.evaluate_settings import CompareSettings
from diptych.finetune.evaluating.evaluation_report import predictions_file
from diptych.finetune.evaluating.metrics import METRICS, Statistics, count_texts, ratio
from diptych.finetune.run_files.run_folder import last_training, read_status


class Report(NamedTuple):
    """One report of `diptych evaluate`."""

    path: Path
    content: dict[str, Any]

    @property
    def split(self) -> str:
        return self.content["settings"]["split"]


class Side(NamedTuple):
    """One of the two that are compared."""

    name: str
    recipe: dict[str, Any]
    """Of a run; a report has none."""
    entries: list[dict[str, Any]]
    """The lines of its metrics.jsonl."""
    reports: dict[str, Report]
    """The newest of each split."""


class Comparison(NamedTuple):
    """One split that both were evaluated on."""

    a: Report
    b: Report
    tests: dict[str, Paired]
    sources: int
    """On which the tests are."""
    notes: list[str]
    """Why a test is missing, and what was left out."""


def load_side(name: str) -> Side:
    """UserError for what is neither a run folder nor a report."""
    path = Path(name)
    if path.is_dir():
        last = last_training(path)
        metrics, config = last / "metrics.jsonl", last / "config.yaml"
        if not metrics.is_file() or not config.is_file():
            missing = metrics.name if config.is_file() else config.name
            raise UserError(f"{name} is no run folder (it has no {missing}). Name the `out` of a run, or a report.")
        recipe = yaml.safe_load(config.read_text(encoding="utf-8"))
        found = [report for file in path.glob("*.json") if (report := _report(file))]
        newest_last = sorted(found, key=lambda report: report.path.stat().st_mtime)
        return Side(name, recipe, _entries(metrics), {report.split: report for report in newest_last})
    if not path.is_file():
        raise UserError(f"there is no {name}. Name a run folder, or a report of `diptych evaluate --out`.")
    report = _report(path)
    if report is None:
        raise UserError(f"{name} is no report of `diptych evaluate --out`. Name one, or a run folder.")
    return Side(name, {}, [], {report.split: report})


def _report(path: Path) -> Report | None:
    """None where the file is something else: a run folder has other JSON, too."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    if not isinstance(content, dict) or not {"figures", "signatures", "settings"} <= content.keys():
        return None
    return Report(path, content)


def _entries(metrics: Path) -> list[dict[str, Any]]:
    """All whole lines: of a run that is at work, the last one may be half written."""
    *lines, _ = metrics.read_text(encoding="utf-8").split("\n")
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            raise UserError(
                f"{metrics} line {number} is no JSON: {error}. Take the line out, or restore it."
            ) from error
    return entries


def differing(a: Mapping[str, Any], b: Mapping[str, Any], without: Sequence[str] = ()) -> dict[str, tuple[Any, Any]]:
    names = [name for name in {**a, **b} if name not in without]
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}


def run_figures(side: Side) -> dict[str, Any]:
    """What a run's metrics.jsonl comes down to."""
    train = [entry for entry in side.entries if entry["split"] == "train"]
    figures: dict[str, Any] = {}
    if train:
        figures |= {"steps": train[-1]["step"], "epochs": train[-1]["epoch"], "tokens": train[-1]["tokens"]}
        figures["last training loss"] = train[-1]["loss"]
    names = dict.fromkeys(["loss", side.recipe.get("best_metric", "loss").rpartition("/")[2]])
    for split in validation_splits(side):
        for name in names:
            best = None
            for entry in side.entries:
                if (
                    entry["split"] == split
                    and name in entry
                    and is_improvement(name, entry[name], best and best[name])
                ):
                    best = entry
            if best:
                figures |= {f"best {split} {name}": best[name], f"… {split} {name} at step": best["step"]}
    return figures


def missing_lines(side: Side) -> str:
    """What the metrics.jsonl of a run that is over lacks; "" where it lacks nothing, or is not known."""
    folder = last_training(Path(side.name))
    status = read_status(folder)
    if status is None or status.get("state") != "done":
        return ""
    steps = [0, *sorted(entry["step"] for entry in side.entries)]
    every = side.recipe.get("logging_every", status["step"])
    gaps = [f"{start} and {end}" for start, end in itertools.pairwise(steps) if end - start > every]
    gaps += [f"{steps[-1]} and {status['step']}"] * (steps[-1] < status["step"])
    return f"{folder / 'metrics.jsonl'} lacks its lines between steps {', '.join(gaps)}" if gaps else ""


def validation_splits(side: Side) -> list[str]:
    return splits_of("validation", dict.fromkeys(entry["split"] for entry in side.entries))


def compare_reports(a: Report, b: Report, trials: int, seed: int) -> Comparison:
    """The tests of two reports of one split, as far as they can be made."""
    reason = _why_other_data(a, b)
    predictions = None if reason else [_predictions(report) for report in (a, b)]
    if predictions and (unusable := [found for found in predictions if isinstance(found, str)]):
        reason = unusable[0]
    if reason:
        return Comparison(a, b, {}, 0, [f"not tested: {reason}"])
    ours, theirs = map(_by_source, predictions)
    shared = [source for source in ours if source in theirs]
    notes = []
    if len(shared) < max(len(ours), len(theirs)):
        notes.append(f"tested on the {len(shared)} sources that both have, of {len(ours)} and {len(theirs)}")
    if len(shared) < 2:
        return Comparison(a, b, {}, len(shared), [*notes, "not tested: two sources or more are needed"])
    if any(ours[source]["references"] != theirs[source]["references"] for source in shared):
        reason = "the references of some sources differ, because other stop strings cut them"
        return Comparison(a, b, {}, len(shared), [*notes, f"not tested: {reason}"])
    rows = [[side[source] for source in shared] for side in (ours, theirs)]
    statistics, more = _statistics(a, b, *rows)
    return Comparison(a, b, paired_tests(*statistics, trials, seed), len(shared), notes + more)


def _by_source(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """By text and how often it came before: two directions may share one, and two tokenizers call them differently."""
    seen: Counter[str] = Counter()
    found = {}
    for row in rows:
        found[row["source"], seen[row["source"]]] = row
        seen[row["source"]] += 1
    return found


def _why_other_data(a: Report, b: Report) -> str:
    for report in (a, b):
        if "data" not in report.content:
            return f"{report.path} does not say what texts it is of; evaluate once more"
    data = [report.content["data"] for report in (a, b)]
    if data[0] != data[1]:
        return f"the splits hold other texts ({data[0]['rows']:,} and {data[1]['rows']:,} rows); evaluate both on one"
    return ""


def _predictions(report: Report) -> list[dict[str, Any]] | str:
    """The rows, or why they are not to be had."""
    if "predictions_sha256" not in report.content:
        return f"{report.path} has no predictions, since it was made without metrics"
    beside = predictions_file(report.path)
    if not beside.is_file():
        return f"{beside} is not beside its report"
    content = beside.read_bytes()
    if hashlib.sha256(content).hexdigest() != report.content["predictions_sha256"]:
        return f"{beside} is not what was written with {report.path.name}; evaluate once more"
    return [json.loads(line) for line in content.decode("utf-8").splitlines()]


def _statistics(
    a: Report, b: Report, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]
) -> tuple[list[dict[str, Statistics]], list[str]]:
    """What was counted on both sides, of the metrics that both have and that are comparable; and what is not."""
    notes = []
    sides: list[dict[str, Statistics]] = [{}, {}]
    tokens = [[row["target_tokens"] for row in rows] for rows in (ours, theirs)]
    if tokens[0] == tokens[1]:
        for side, rows in zip(sides, (ours, theirs), strict=True):
            side["loss"] = ratio("loss", [row["nats"] for row in rows], [row["target_tokens"] for row in rows])
    else:
        notes.append("loss not tested: it is per token, and the two tokenizers make other tokens of the targets")
    asked = [_metric_names(report) for report in (a, b)]
    for name in METRICS:
        if not all(name in names for names in asked):
            continue
        # superni's signature also counts, and that is the same for the same references
        signatures = [report.content["signatures"].get(name) for report in (a, b)]
        if name == "bleu" and _tokenisation(signatures[0]) != _tokenisation(signatures[1]):
            notes.append(f"bleu not tested: {signatures[0]} is not {signatures[1]}")
            continue
        tokenize = _tokenisation(signatures[0]) if name == "bleu" else None
        for side, rows in zip(sides, (ours, theirs), strict=True):
            predictions = [row["prediction"] for row in rows]
            side |= count_texts([name], predictions, [row["references"] for row in rows], tokenize)
    return sides, notes


def _metric_names(report: Report) -> list[str]:
    return [name.strip() for name in report.content["settings"]["metrics"].split(",")]


def _tokenisation(signature: str) -> str:
    """`nrefs:1|case:mixed|eff:no|tok:13a|…` -> `13a`."""
    return re.search(r"tok:([^|]+)", signature)[1]


def plot_curves(sides: Sequence[Side], picture: Path) -> None:
    """Training losses thin, validation losses with a mark at each evaluation, a colour for each run, and a mark for
    each validation set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for letter, side, colour in zip("AB", sides, ("tab:blue", "tab:orange"), strict=True):
        styles = {"train": {"linewidth": 1.0, "alpha": 0.55}}
        for split, marker in zip(validation_splits(side), itertools.cycle("os^vD"), strict=False):
            styles[split] = {"linewidth": 1.6, "marker": marker, "markersize": 3.5}
        for split, style in styles.items():
            points = [(entry["step"], entry["loss"]) for entry in side.entries if entry["split"] == split]
            if points:
                label = f"{letter} {side.name}, {'training' if split == 'train' else split}"
                axes.plot(*zip(*points, strict=True), color=colour, label=label, **style)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per target token)")
    axes.grid(alpha=0.3)
    axes.legend()
    beside = picture.with_name(f"{picture.stem}.partial.png")
    figure.savefig(beside, dpi=120, metadata=PICTURE_MARK)
    pyplot.close(figure)
    os.replace(beside, picture)


def format_tables(a: Side, b: Side, comparisons: Mapping[str, Comparison]) -> str:
    """All that is known of both, section by section."""
    sections = [[["", "A", "B"], ["", a.name, b.name]]]
    if a.recipe and b.recipe:
        changed = differing(a.recipe, b.recipe, without=("out", "resume"))
        rows = [[name, _shown(ours), _shown(theirs)] for name, (ours, theirs) in changed.items()]
        sections.append([["settings that differ", "", ""], *(rows or [["none", "", ""]])])
    if a.entries or b.entries:
        ours, theirs = run_figures(a), run_figures(b)
        rows = [[name, _shown(ours.get(name)), _shown(theirs.get(name))] for name in {**ours, **theirs}]
        sections.append([["training", "", ""], *rows])
    texts = [_aligned([row for section in sections for row in [*section, []]])]
    texts += [_split_table(split, comparison) for split, comparison in comparisons.items()]
    return "\n\n".join(texts)


def _split_table(split: str, comparison: Comparison) -> str:
    a, b, tests, sources, notes = comparison
    rows = [[split, "A", "B", "B - A", "p"], ["", str(a.path), str(b.path)]]
    changed = differing(a.content["settings"], b.content["settings"], without=("out", "model", "device"))
    changed |= differing(a.content.get("versions", {}), b.content.get("versions", {}))
    rows += [[name, _shown(ours), _shown(theirs)] for name, (ours, theirs) in changed.items()]
    for name in {**a.content["figures"], **b.content["figures"]}:
        row = [name, *(_with_interval(report, name) for report in (a, b))]
        if name in tests:
            test = tests[name]
            row += [f"{test.b - test.a:.3f} [{test.low:.3f}, {test.high:.3f}]", f"{test.p:.4f}"]
        rows.append(row)
    ends = [f"[low, high]: {LEVEL_PERCENT} % over other sources"]
    if tests:
        ends.append(f"p: approximate randomisation on {sources:,} sources, two-sided")
    return "\n".join([_aligned(rows), *notes, "; ".join(ends)])


def _with_interval(report: Report, name: str) -> str:
    value = _shown(report.content["figures"].get(name))
    interval = report.content.get("intervals", {}).get(name)
    return f"{value} [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else value


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) >= 0.01 else f"{value:g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell."""
    columns = max(map(len, rows))
    widths = [max((len(row[column]) for row in rows if column < len(row)), default=0) for column in range(columns)]
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
    out = Path(settings.out) if settings.out else None
    picture = out.with_suffix(".png") if out and a.entries and b.entries else None
    if out:
        check_overwrite(out, _is_comparison, "a comparison of `diptych compare`")
    if picture:
        check_overwrite(picture, is_own_picture, "a picture of `diptych compare`")
    comparisons = {
        split: compare_reports(a.reports[split], b.reports[split], settings.trials, settings.seed) for split in shared
    }
    print(format_tables(a, b, comparisons))
    for lacking in filter(None, map(missing_lines, (a, b))):
        print(f"{lacking}: a figure that only they had is not shown", file=sys.stderr)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(to_json(a, b, comparisons), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"written: {out}")
    if picture:
        plot_curves([a, b], picture)
        print(f"curves: {picture}")
    if not shared:
        print("no split was evaluated for both, so there is nothing to test; see --help", file=sys.stderr)
    return 0


def _is_comparison(content: bytes) -> bool:
    try:
        return {"a", "b", "training", "splits"} <= json.loads(content).keys()
    except (ValueError, AttributeError):
        return False


def to_json(a: Side, b: Side, comparisons: Mapping[str, Comparison]) -> dict[str, Any]:
    return {
        "a": a.name,
        "b": b.name,
        "settings": differing(a.recipe, b.recipe, without=("out", "resume")) if a.recipe and b.recipe else {},
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


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run("compare", argv)


if __name__ == "__main__":
    raise SystemExit(main())
