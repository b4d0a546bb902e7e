"""What the teacher is asked, and which of its answers the student learns from.

    {"instruction": "Translate English to Korean:", "input": "Go.", "output": "가."}                 prompts.jsonl
    … "prediction": ["가라.", "가"], "finished": [true, true], "log_probability_per_token": […]       samples.jsonl
    {"instruction": "Translate English to Korean:", "input": "Go.", "output": "가라."}               written.jsonl

An answer is chosen by metrics, compared with the target of its row, or by its log-probability per token
(sequence-level distillation and interpolation: Kim and Rush, arXiv 1606.07947). Backward, the prompt is a real target,
and the answer becomes the source (back-translation: Sennrich et al., arXiv 1511.06709).
"""

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from diptych.data_prep.command_line.errors import UserError, excerpt
from diptych.data_prep.rows.language_names import SOURCE_COLUMNS, TARGET_COLUMNS
from diptych.data_prep.rows.records import Languages
from diptych.finetune.commands.model_settings import split_names
from diptych.finetune.evaluating.metrics import lower_is_better
from diptych.finetune.generating.prompt_files import read_prompts
from diptych.finetune.inference.prompts import Prompt, Prompter, template_for
from diptych.finetune.preferences.scores import scores_of
from diptych.finetune.run_files.atomic_folders import write_text
from diptych.finetune.several_runs.distil_settings import LOG_PROBABILITY, DistilSettings

LANGUAGES = (SOURCE_COLUMNS[0], TARGET_COLUMNS[0])
Row = dict[str, Any]


class Task(NamedTuple):
    """What all rows ask for, if they ask for one thing."""

    instruction: str
    languages: Languages

    def row(self, text: str, **more: str) -> Row:
        named = {name: code for name, code in zip(LANGUAGES, self.languages, strict=True) if code}
        return {"instruction": self.instruction, "input": text} | more | named


def real_rows(split: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Of a prepared split: what `prepare` made its rows of. UserError for rows with a history or a system prompt,
    whose parts it does not keep."""
    columns = ["instruction", "input", "target", "source", *(name for name in LANGUAGES if name in split.features)]
    prompter, rows = Prompter(tokenizer, template_for("", tokenizer), None), []
    for number, found in enumerate(split.select_columns(columns), start=1):
        row = Task(found["instruction"], Languages(*(found.get(name, "") for name in LANGUAGES))).row(
            found["input"], output=found["target"]
        )
        prompt = Prompt(row["instruction"], row["input"], languages=Languages(*(row.get(it, "") for it in LANGUAGES)))
        if prompter.render(prompt)[0] != found["source"]:
            raise UserError(
                f"row {number} of the data has more than an instruction and an input: earlier turns, a system prompt,"
                f" marks of terms or placeholders ({excerpt(found['source'], 60)!r}). Prepare rows without them."
            )
        rows.append(row)
    return rows


def task_of(rows: Sequence[Row], what: str) -> Task:
    """UserError if rows ask for different things, since then nobody knows what a bare text is to be asked for."""
    tasks = Counter(Task(row["instruction"], Languages(*(row.get(it, "") for it in LANGUAGES))) for row in rows)
    if len(tasks) > 1:
        shown = " and ".join(excerpt(task.instruction or task.languages.direction, 40) for task in list(tasks)[:2])
        raise UserError(
            f"the rows ask for different things ({shown}), so it is not known what {what} are for. Prepare data of"
            f" one direction (--prepare.forward alone)."
        )
    return next(iter(tasks))


def prompts_of(rows: Sequence[Row], settings: DistilSettings) -> list[Row]:
    """What the teacher is asked: sources of the train split, then the texts of `monolingual`. Each text once."""
    if settings.direction == "backward":
        source, target = task_of(rows, "the texts of monolingual").languages
        asked = Task(settings.backward_instruction, Languages(target, source))
        found = [asked.row(text) for text in _texts(settings.monolingual)]
        return distinct(found)
    chosen = list(rows)
    if settings.most_rows is not None and settings.most_rows < len(chosen):
        chosen = random.Random(settings.seed).sample(chosen, settings.most_rows)
    if settings.monolingual:
        task = task_of(rows, "the texts of monolingual")
        chosen += [task.row(text) for text in _texts(settings.monolingual)]
    return distinct(chosen)


def _texts(file: str) -> Iterator[str]:
    """UserError for a row that is no text: where one is wrong, others may be, too."""
    for number, row in enumerate(read_prompts(file, has_languages=True), start=1):
        if row.error:
            raise UserError(f"{file} row {number}: {row.error}. Correct it.")
        if row.prompt:  # it is not blank
            yield row.prompt.input or row.prompt.instruction


def distinct(rows: Sequence[Row]) -> list[Row]:
    """A source that has several targets is asked once; `references` has them all."""
    found: dict[tuple, Row] = {}
    for row in rows:
        output = row.get("output")
        key = tuple(row.get(name) for name in ("instruction", "input", *LANGUAGES))
        kept = found.setdefault(key, {name: value for name, value in row.items() if name != "output"})
        if output is not None:
            kept.setdefault("references", []).append(output)
    return list(found.values())


class WrittenAnswer(NamedTuple):
    prompt: Row
    text: str
    score: float | None
    """By the metrics; None without a target."""
    log_probability: float
    """Mean of a token, in nats."""


def best_answers(samples: Path, settings: DistilSettings, counts: Counter[str]) -> list[WrittenAnswer]:
    """Of each row with an answer that is whole and not empty, the best one."""
    candidates: list[tuple[Row, str, float]] = []
    of_row: list[int] = []
    for number, line in enumerate(samples.read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        counts["prompts"] += 1
        if "error" in row:
            counts["prompts with an error in place of answers"] += 1
            continue
        columns = [row[name] for name in ("prediction", "finished", "log_probability_per_token")]
        answers = list(zip(*((it if isinstance(it, list) else [it]) for it in columns), strict=True))
        whole = {text.strip(): nats for text, finished, nats in answers if finished and text.strip()}
        counts["answers"] += len(answers)
        counts["answers without an end, empty, or equal to another"] += len(answers) - len(whole)
        counts["prompts without a whole answer"] += not whole
        candidates += [(row, text, nats) for text, nats in whole.items()]
        of_row += [number] * len(whole)
    scores = _scores(candidates, settings)
    best: dict[int, WrittenAnswer] = {}
    for number, (row, text, nats), score in zip(of_row, candidates, scores, strict=True):
        answer = WrittenAnswer(row, text, score, nats)
        if number not in best or _rank(answer) > _rank(best[number]):
            best[number] = answer
    return list(best.values())


def _rank(answer: WrittenAnswer) -> tuple[float, float]:
    return (answer.score or 0.0, answer.log_probability)


def _scores(candidates: Sequence[tuple[Row, str, float]], settings: DistilSettings) -> list[float | None]:
    """Of each candidate, higher is better; None where the row has no target, or no metric is asked for."""
    places = [number for number, (row, _, _) in enumerate(candidates) if row.get("references")]
    scores: list[float | None] = [None] * len(candidates)
    if settings.by == LOG_PROBABILITY or not places:
        return scores
    rows, texts, _ = zip(*(candidates[place] for place in places), strict=True)
    references = [row["references"] for row in rows]
    sources = ["\n".join(filter(None, (row["instruction"], row["input"]))) for row in rows]
    found = scores_of(texts, references, sources, settings.by, settings.weights, settings.settings_of(settings.by))
    for place, score in zip(places, found.tolist(), strict=True):
        scores[place] = score
    return scores


def kept_answers(
    answers: Sequence[WrittenAnswer], settings: DistilSettings, counts: Counter[str]
) -> list[WrittenAnswer]:
    """Those that pass the bounds on score, log-probability and length."""
    ratios = [len(answer.text) / max(1, len(answer.prompt["input"])) for answer in answers]
    middle, kept = median(ratios) if ratios else 1.0, []
    names, worst = split_names(settings.by), settings.worst_score
    if worst is not None and all(lower_is_better(name, names) for name in names):
        worst = -worst  # as `scores_of` counts them
    for answer, ratio in zip(answers, ratios, strict=True):
        factor = max(ratio / middle, middle / ratio)
        if worst is not None and answer.score is not None and answer.score < worst:
            counts["dropped by worst_score"] += 1
        elif settings.most_nats is not None and -answer.log_probability > settings.most_nats:
            counts["dropped by most_nats"] += 1
        elif settings.length_factor and factor > settings.length_factor:
            counts["dropped by length_factor"] += 1
        else:
            kept.append(answer)
    return kept


def without_languages(rows: Sequence[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if name not in LANGUAGES} for row in rows]


def write_rows(samples: Path, real: Sequence[Row], settings: DistilSettings, out: Path) -> dict[str, Any]:
    """Writes the train rows, and returns their report. UserError if nothing is left."""
    counts: Counter[str] = Counter()
    answers = best_answers(samples, settings, counts)
    kept = kept_answers(answers, settings, counts)
    if settings.direction == "backward":
        task = task_of(real, "the texts of monolingual")
        rows = [task.row(answer.text, output=answer.prompt["input"]) for answer in kept]
    else:
        own = ("instruction", "input", *LANGUAGES)
        rows = [
            {name: answer.prompt[name] for name in own if name in answer.prompt} | {"output": answer.text}
            for answer in kept
        ]
    counts["written rows"], counts["real rows"] = len(rows), len(real) if settings.real else 0
    if not rows:
        raise UserError(
            f"nothing that the teacher wrote is left ({said(counts)}). Loosen the bounds, or raise samples."
        )
    write_jsonl(out, rows + (list(real) if settings.real else []))
    scores = [answer.score for answer in kept if answer.score is not None]
    return {
        "counts": dict(counts),
        "by": settings.by,
        "score of the chosen, mean": fmean(scores) if scores else None,
        "log-probability per token of the chosen, mean": float(np.mean([it.log_probability for it in kept])),
    }


def said(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {what}" for what, number in counts.items() if number)


def write_jsonl(file: Path, rows: Sequence[Row]) -> None:
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
