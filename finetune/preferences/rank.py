"""`diptych rank SAMPLES`: scores each answer by metrics, and writes pairs of a better and a worse one.

    {"row": 1, "prediction": ["네.", "예"], "finished": [true, true], "input": "Yes.", "output": "네."}     samples
    {"input": "Yes.", "output": "네.", "chosen": "네.", "rejected": "예", "chosen_score": 100.0, …}         out

Every answer is scored alone: by the counts of a metric where it has some for each text, else by the metric of this
text alone. The score is the sum of all figures by weight. Equal answers are one; empty ones are never chosen.

Metrics are gamed by length, so the report says how scores go with it: Spearman's rank correlation within the answers
to one prompt, and in how many pairs the chosen one is longer.
"""

import json
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr

from diptych.data_prep.command_line.errors import UserError, excerpt, message_line
from diptych.finetune.commands.model_settings import split_names
from diptych.finetune.evaluating.metrics import METRICS, find_metrics
from diptych.finetune.generating.prompt_files import json_object, lines_of, row_of
from diptych.finetune.inference.prompts import OUTPUT_FIELDS
from diptych.finetune.preferences.preference_settings import RankSettings
from diptych.finetune.preferences.scores import scores_of
from diptych.finetune.run_files.atomic_folders import write_json, write_text

REFERENCE_FIELDS = ("references", "reference", "output", "response", "completion", "target", "summary")
PAIR_FIELDS = ("chosen", "rejected", "chosen_score", "rejected_score")
NO_REFERENCE = "none"
LONG_TOO_OFTEN = 0.65
"""In a share of pairs above this, the chosen one is longer: more than a metric that is blind to length would give."""


class Answers(NamedTuple):
    """The different answers to one prompt, in their order in the file."""

    fields: Mapping[str, Any]
    """The row's own."""
    source: str
    references: list[str]
    texts: list[str]


class BetterAndWorse(NamedTuple):
    chosen: int
    rejected: int


def run(settings: RankSettings) -> int:
    out = Path(settings.out).expanduser()
    samples, report = os.path.expanduser(settings.samples), out.with_name(f"{out.name}.report.json")
    if out.is_dir() or out.resolve() == Path(samples).resolve():
        raise UserError(f"--out {out} is {'a folder' if out.is_dir() else 'the file of samples'}. Name another file.")
    if not settings.overwrite and (taken := next((it for it in (out, report) if it.is_file()), None)):
        raise UserError(f"{taken} is there already. Name another --out, or replace it with --overwrite true.")
    find_metrics(split_names(settings.by), settings.metric_settings)
    counts: Counter[str] = Counter()
    rows = list(read_answers(samples, settings, counts))
    if not rows:
        raise UserError(f"{samples} has no row with two different answers ({_said(counts)}). Sample more.")
    scores = score(rows, settings)
    pairs = [
        pairs_of(row, of_row, settings, f"{settings.seed}/{place}")
        for place, (row, of_row) in enumerate(zip(rows, scores, strict=True))
    ]
    counts["rows without a pair, for ties or the margin"] = sum(not of_row for of_row in pairs)
    lines = [
        json.dumps(_pair_row(row, of_row, pair), ensure_ascii=False) + "\n"
        for row, of_row, its in zip(rows, scores, pairs, strict=True)
        for pair in its
    ]
    if not lines:
        raise UserError(f"no two answers to a prompt differ by {settings.by} enough. Lower margin, or sample more.")
    out.parent.mkdir(parents=True, exist_ok=True)
    found = facts(rows, scores, pairs, counts) | {"by": settings.by, "weights": settings.weights}
    write_text(out, "".join(lines))
    if out.is_file():  # beside a pipe or a device is no place for it
        write_json(report, found)
    print("\n".join(_summary(out, found)))
    print(message_line(_said(counts)), file=sys.stderr)
    return 0


def read_answers(samples: str, settings: RankSettings, counts: Counter[str]) -> Iterator[Answers]:
    """Rows with two different answers or more; `counts` gets what was left out, and why."""
    for number, line in enumerate(lines_of(samples), start=1):
        counts["rows"] += 1
        where = f"{samples} line {number}"
        try:
            fields = json_object(line)
        except ValueError as error:
            raise UserError(f"{where}: {error}. Write the samples again.") from None
        if "error" in fields:
            counts["rows with an error in place of answers"] += 1
            continue
        texts, finished = fields.get("prediction"), fields.get("finished")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise UserError(
                f"{where}: `prediction` is {excerpt(json.dumps(texts), 60)}, and a list of texts is due: what `diptych"
                f" sample` writes, or `diptych generate` with several outputs for each prompt."
            )
        if not isinstance(finished, list) or len(finished) != len(texts):
            raise UserError(f"{where}: `finished` does not have an entry for each of {len(texts)} answers.")
        whole = [text for text, is_whole in zip(texts, finished, strict=True) if is_whole or settings.unfinished]
        counts["answers"] += len(texts)
        counts["answers that the token limit ended"] += len(texts) - len(whole)
        different = list(dict.fromkeys(whole))
        counts["answers that another one equals"] += len(whole) - len(different)
        if len(different) < 2:
            counts["rows without two different answers"] += 1
            continue
        own = {name: value for name, value in fields.items() if name not in OUTPUT_FIELDS}
        if taken := [name for name in PAIR_FIELDS if name in own]:
            raise UserError(f"{where}: field {taken[0]!r} is one that is written here. Rename it.")
        yield Answers(own, _source_of(own, where), _references_of(own, settings.reference, where), different)


def _source_of(fields: dict[str, Any], where: str) -> str:
    row = row_of(fields)
    if row.prompt is None:
        raise UserError(f"{where}: {row.error}. Correct it, or write the samples again.")
    return "\n".join(filter(None, (row.prompt.instruction, row.prompt.input)))


def _references_of(fields: Mapping[str, Any], named: str, where: str) -> list[str]:
    """One or more; none if `named` says so."""
    if named == NO_REFERENCE:
        return []
    name = named or next((name for name in REFERENCE_FIELDS if name in fields), "")
    value = fields.get(name)
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not found or not all(isinstance(it, str) for it in found):
        what = f"field {name!r} is {excerpt(json.dumps(value), 60)}" if name in fields else "there is no reference"
        what = f"there is no field {named!r}" if named and named not in fields else what
        raise UserError(
            f"{where}: {what}; a text, or a list of texts, is due. Name its field, --reference FIELD; or, for metrics"
            f" of your own that need none, --reference none."
        )
    return found


def score(rows: Sequence[Answers], settings: RankSettings) -> list[np.ndarray]:
    """The score of each answer of each row; higher is better."""
    names = split_names(settings.by)
    if settings.reference == NO_REFERENCE and (needy := [name for name in names if name in METRICS]):
        raise UserError(f"{needy[0]} compares with a reference, and reference is none. Name a metric of your own.")
    totals = scores_of(
        [text for row in rows for text in row.texts],
        [row.references or [""] for row in rows for _ in row.texts],
        [row.source for row in rows for _ in row.texts],
        settings.by,
        settings.weights,
        settings.metric_settings,
    )
    return np.split(totals, np.cumsum([len(row.texts) for row in rows])[:-1])


def pairs_of(row: Answers, scores: np.ndarray, settings: RankSettings, seed: str) -> list[BetterAndWorse]:
    """Of places in `row.texts`. The first of equals is the better one."""
    order = np.argsort(-scores, kind="stable").tolist()
    found = [
        BetterAndWorse(better, worse)
        for better, worse in combinations(order, 2)
        if scores[better] > scores[worse]
        and scores[better] - scores[worse] >= settings.margin
        and row.texts[better].strip()
    ]
    if settings.pairs == "all" or not found:
        return found
    of_best = [pair for pair in found if pair.chosen == found[0].chosen]
    return [of_best[-1] if settings.pairs == "best_worst" else random.Random(seed).choice(of_best)]


def _pair_row(row: Answers, scores: np.ndarray, pair: BetterAndWorse) -> dict[str, Any]:
    values = (row.texts[pair.chosen], row.texts[pair.rejected], *(round(float(scores[it]), 6) for it in pair))
    return {**row.fields, **dict(zip(PAIR_FIELDS, values, strict=True))}


def facts(
    rows: Sequence[Answers],
    scores: Sequence[np.ndarray],
    pairs: Sequence[Sequence[BetterAndWorse]],
    counts: Mapping[str, int],
) -> dict[str, Any]:
    """What the report says: counts, scores, lengths in characters, margins."""
    flat = [(row, of_row, pair) for row, of_row, its in zip(rows, scores, pairs, strict=True) for pair in its]
    sides = [(len(row.texts[pair.chosen]), len(row.texts[pair.rejected])) for row, _, pair in flat]
    margins = [float(of_row[pair.chosen] - of_row[pair.rejected]) for _, of_row, pair in flat]
    correlations = [
        spearmanr(of_row, lengths).statistic
        for row, of_row in zip(rows, scores, strict=True)
        if np.ptp(of_row) and np.ptp(lengths := [len(text) for text in row.texts])
    ]
    return {
        "counts": dict(counts) | {"pairs": len(flat)},
        "score": {
            "of all answers": fmean(float(of_row.mean()) for of_row in scores),
            "of the best of each row": fmean(float(of_row.max()) for of_row in scores),
            "chosen": fmean(float(of_row[pair.chosen]) for _, of_row, pair in flat),
            "rejected": fmean(float(of_row[pair.rejected]) for _, of_row, pair in flat),
        },
        "margin": {"mean": fmean(margins), "median": median(margins), "least": min(margins), "most": max(margins)},
        "characters": {
            "chosen": fmean(chosen for chosen, _ in sides),
            "rejected": fmean(rejected for _, rejected in sides),
            "share of pairs whose chosen one is longer": fmean(chosen > rejected for chosen, rejected in sides),
            "share of pairs of equal length": fmean(chosen == rejected for chosen, rejected in sides),
        },
        "rank correlation of score and length": fmean(correlations) if correlations else None,
    }


def _summary(out: Path, found: Mapping[str, Any]) -> Iterator[str]:
    score, length, counts = found["score"], found["characters"], found["counts"]
    yield f"{message_line(out)}: {counts['pairs']:,} pairs of {counts['rows']:,} rows"
    yield (
        f"score       {score['chosen']:.2f} chosen, {score['rejected']:.2f} rejected; all answers"
        f" {score['of all answers']:.2f}, the best of each row {score['of the best of each row']:.2f}"
    )
    yield f"margin      {found['margin']['median']:.2f} in the median, {found['margin']['least']:.2f} at least"
    correlation = found["rank correlation of score and length"]
    longer = length["share of pairs whose chosen one is longer"]
    yield (
        f"characters  {length['chosen']:.1f} chosen, {length['rejected']:.1f} rejected; the chosen one is longer in"
        f" {longer:.0%} of pairs, as long in {length['share of pairs of equal length']:.0%}"
    )
    if longer > LONG_TOO_OFTEN:
        yield (
            "warning: chosen answers are mostly longer ones, so a model may learn from them to be long. Look at the"
            f" pairs (rank correlation of score and length: {correlation:.2f})."
        )


def _said(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {what}" for what, number in counts.items() if number)
