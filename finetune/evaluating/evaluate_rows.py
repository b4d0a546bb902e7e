"""How well a model does on a prepared split: loss on every row, and metrics on what it generates.

    evaluate_rows(model, tokenizer, split, metrics=["chrf"], batch_size=16).figures
    -> {"rows": 300, "loss": 1.873, "target_tokens": 4310, "sources": 292, "chrf": 41.2, "exact_match_rows": 9.3,
        "unfinished": 2, "max_new_tokens": 45}

The loss is in nats per target token, sum over sum, by the objective that training uses. For the metrics each different
source text is generated once, and the targets of all rows that share it are its references: "Go." has five good
translations among the pairs of Tatoeba, and four of them would count as wrong if each row were asked alone.
`exact_match_rows` is that stricter figure: the percentage of rows whose own target came out. `unfinished` counts the
outputs that reached the cap on new tokens without ending. The decoder prefix of the template that made the rows is
forced, and its stop strings end an output; the references end there too.

`diptych evaluate MODEL --data prepared --split test --out report.json` prints this as a table, each figure with its
interval (confidence.py), and writes the report and report.predictions.jsonl (source, references, prediction, finished,
nats, target_tokens), of which `diptych compare` makes tests. Of several test sets with names, each has a table and a
report. Every row counts once, in order; the same model, data and machine give the same figures. On several ranks
(`torchrun … -m diptych.finetune.evaluation`, on CPUs with ACCELERATE_USE_CPU=true) whole batches are dealt, the same
ones whatever the number of ranks, so that with as many threads in each process the figures are those of one rank, to
the last digit.
"""

import hashlib
import json
import math
import random
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diptych.data_prep.command_line.arguments import choose_from
from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.command_line.own_files import check_overwrite
from diptych.data_prep.rows.language_names import SOURCE_COLUMNS, TARGET_COLUMNS
from diptych.data_prep.rows.named_splits import kind_of, name_in, splits_of
from diptych.data_prep.rows.records import Languages
from diptych.data_prep.text_to_ids.languages import codes_of
from diptych.data_prep.text_to_ids.templates import Template, carried_template
from diptych.data_prep.text_to_ids.two_vocabularies import all_tokens
from diptych.finetune.batches.padded_rows import (
    PaddedRows,
    check_rows_fit,
    drop_repeated_start,
    longest_first,
    padded_rows,
)
from diptych.finetune.commands import cli
from diptych.finetune.commands.exits import NotFiniteError
from diptych.finetune.commands.ranks import join_ranks
from diptych.finetune.evaluating.confidence import LEVEL_PERCENT, RESAMPLES, bootstrap_intervals
from diptych.finetune.evaluating.evaluate_settings import EvaluateSettings
from diptych.finetune.evaluating.metrics import (
    Statistics,
    check_metric_names,
    count_texts,
    figures_and_signatures,
    ratio,
    score_texts,
)
from diptych.finetune.inference.generation_config import check_generation_names, warn_once
from diptych.finetune.inference.outputs import GenerationBar, Output
from diptych.finetune.inference.scoring import chosen_outputs
from diptych.finetune.inference.targets import given_tokens
from diptych.finetune.model.families import decoder_start_token
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.loading import load_checkpoint, load_tokenizer, pick_device, position_limit
from diptych.finetune.model.loss import Seq2SeqObjective
from diptych.finetune.model.speed import keep_memory
from diptych.finetune.model.untrusted_files import open_prepared
from diptych.finetune.run_files.whole_folders import MANIFEST, read_json

Batch = TypeVar("Batch")
Found = TypeVar("Found")

LANGUAGE_COLUMNS = (SOURCE_COLUMNS[0], TARGET_COLUMNS[0])
"""Of prepared rows."""

LOWER_IS_BETTER = frozenset({"loss", "unfinished", "token_error_rate"})

# The cap on new tokens is the longest target and a quarter more: room for another wording, not for endless repetition.
CAP_OVER_LONGEST_TARGET = 1.25


class Prediction(NamedTuple):
    """One source text, the targets of all rows that have it, in their order, and what the model made of it. Rows of
    another direction have another source, though its text may be the same."""

    source: str
    references: list[str]
    prediction: str
    finished: bool
    nats: float
    """Summed loss of the rows with this source, and their target tokens: those evaluated, where there is a limit."""
    target_tokens: int
    direction: str = ""
    """`eng_Latn-kor_Hang`, where rows have languages."""

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in self._asdict().items() if name != "direction" or value}


class Evaluation(NamedTuple):
    figures: dict[str, float]
    """Flat numbers, for a log or a table."""
    signatures: dict[str, str]
    """What sacrebleu says a figure was computed with; figures with different signatures cannot be compared."""
    predictions: list[Prediction]
    """One for each different source, in the order of their first rows; none where no metric was asked."""
    statistics: dict[str, Statistics]
    """What was counted for each of these sources: of it, confidence.py makes intervals."""
    directions: dict[str, dict[str, float]] = {}
    """The figures of each direction, where rows are of several: one BLEU over two languages says little."""


def evaluate_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    metrics: Sequence[str] = (),
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    limit: int | None = None,
    progress: bool = False,
    bleu_tokenize: str | None = None,
    template: Template | None = None,
    accelerator: Accelerator | None = None,
    mbr_samples: int = 0,
    seed: int = 0,
    before_each: Callable[[], None] | None = None,
    objective: Seq2SeqObjective | None = None,
    **generation_kwargs: Any,
) -> Evaluation:
    """Loss and, where metrics are asked, scores, of all rows or of `limit` rows drawn from everywhere in the split.

    Files are often sorted, so the first rows would tell of the shortest ones. References come from the whole split.
    `max_new_tokens` is taken from the longest target unless given, `template` from the tokenizer. With an
    `accelerator` all its ranks must call this; they share the work, and each returns the same. With `mbr_samples` the
    output is the best of so many samples (reranking.py), drawn by `seed`. All ranks call `before_each` before each of
    their batches, and equally often; what it raises ends the evaluation. `objective` is that of the model, where
    there is one: a sharded model is whole in its passes alone. The model may be in training mode; it is put back.
    NotFiniteError where a row's loss is no number.
    """
    check_metric_names(metrics)
    rows = dataset if limit is None else draw(dataset, limit)
    if not len(rows):
        raise UserError("the split to evaluate has no rows. Choose another split, or a limit of 1 or more.")
    keys = source_keys(rows)
    source_of_row = _places(keys)
    objective = objective or Seq2SeqObjective(model)
    losses = row_losses(
        objective, padded_rows(LoadedModel.of(model, tokenizer), rows), batch_size, accelerator, before_each
    )
    nats, target_tokens = (np.bincount(source_of_row, weights=column) for column in losses.T)
    statistics = {"loss": ratio("loss", nats, target_tokens)}
    figures = {"rows": len(rows)} | statistics["loss"].figures() | {"target_tokens": int(target_tokens.sum())}
    directions = [languages.direction for _, languages in dict.fromkeys(keys)]
    rows_of_source = np.bincount(source_of_row)
    if not metrics:
        return Evaluation(figures, {}, [], statistics, _by_direction(directions, rows_of_source, statistics))

    cap = max_new_tokens or cap_from_targets(rows, position_limit(model))
    _say_if_targets_are_shorter(model, rows, generation_kwargs)
    template = template or carried_template(tokenizer, check=False)  # loading has checked it
    source_ids = dict(zip(keys, rows["input_ids"], strict=True))
    given_of = {it: given_tokens(model, tokenizer, template, it if any(it) else None) for _, it in source_ids}
    outputs = predict(
        model,
        tokenizer,
        list(source_ids.values()),
        batch_size=batch_size,
        progress=progress,
        accelerator=accelerator,
        before_each=before_each,
        mbr_samples=mbr_samples,
        seed=seed,
        max_new_tokens=cap,
        template=template,
        given=[given_of[languages] for _, languages in source_ids],
        **generation_kwargs,
    )
    references = references_of(source_ids, dataset, template)
    predictions = [
        Prediction(source, targets, output.text, output.finished, float(of_source), int(tokens), languages.direction)
        for ((source, languages), targets), output, of_source, tokens in zip(
            references.items(), outputs, nats, target_tokens, strict=True
        )
    ]
    counted = count_texts(
        metrics, [row.prediction for row in predictions], [row.references for row in predictions], bleu_tokenize
    )
    scores, signatures = figures_and_signatures(list(counted.values()))
    own = [
        predictions[source].prediction == _cut(target, template)
        for source, target in zip(source_of_row, rows["target"], strict=True)
    ]
    statistics |= counted
    statistics["exact_match_rows"] = ratio(
        "exact_match_rows", np.bincount(source_of_row, weights=own), rows_of_source, scale=100
    )
    figures |= {"sources": len(predictions)} | scores | statistics["exact_match_rows"].figures()
    figures |= {"unfinished": sum(not row.finished for row in predictions), "max_new_tokens": cap}
    found = _by_direction(directions, rows_of_source, statistics, predictions, bleu_tokenize)
    return Evaluation(figures, signatures, predictions, statistics, found)


def _by_direction(
    directions: Sequence[str],
    rows_of_source: np.ndarray,
    statistics: Mapping[str, Statistics],
    predictions: Sequence[Prediction] = (),
    bleu_tokenize: str | None = None,
) -> dict[str, dict[str, float]]:
    """The figures of each of several directions. BLEU is counted anew, since its tokens depend on the script."""
    found: dict[str, dict[str, float]] = {}
    for direction in dict.fromkeys(directions) if len(set(directions)) > 1 else ():
        places = np.flatnonzero(np.array(directions) == direction)
        counted = {name: it._replace(counts=it.counts[places]) for name, it in statistics.items()}
        if "bleu" in counted:
            chosen = [predictions[place] for place in places]
            texts = [row.prediction for row in chosen], [row.references for row in chosen]
            counted |= count_texts(["bleu"], *texts, bleu_tokenize)
        figures = figures_and_signatures(list(counted.values()))[0]
        found[direction or "none"] = {"rows": int(rows_of_source[places].sum())} | figures
    return found


def source_keys(rows: Dataset) -> list[tuple[str, Languages]]:
    """What tells the sources of rows apart: the text, and the direction where there is one."""
    columns = [rows[name] if name in rows.column_names else [""] * len(rows) for name in LANGUAGE_COLUMNS]
    return [(source, Languages(*languages)) for source, *languages in zip(rows["source"], *columns, strict=True)]


def selectable_figures(metrics: Sequence[str]) -> list[str]:
    """The figures by which a checkpoint can be the best one, where these metrics are computed."""
    if not metrics:
        return ["loss"]
    return ["loss", *score_texts(metrics, ["a"], [["a"]])[0], "exact_match_rows", "unfinished"]


def selected_figure(best_metric: str, figures: Mapping[str, Mapping[str, float]]) -> float:
    """The figure that decides which checkpoint is best, of those of each validation split: `medical/chrf` is that of
    validation/medical; `chrf` is the mean over the splits, each of which counts the same."""
    name, _, figure = best_metric.rpartition("/")
    chosen = [of_split for split, of_split in figures.items() if not name or name_in(split) == name]
    return fmean(of_split[figure] for of_split in chosen)


def is_improvement(figure: str, value: float, best: float | None) -> bool:
    """Whether `value` is better than the best so far. What is no number never is."""
    if math.isnan(value):
        return False
    return best is None or (value < best if figure.rpartition("/")[2] in LOWER_IS_BETTER else value > best)


def draw(dataset: Dataset, limit: int) -> Dataset:
    """`limit` rows, the same ones each time, in their order."""
    chosen = random.Random(0).sample(range(len(dataset)), min(limit, len(dataset)))
    return dataset.select(sorted(chosen))


def _places(sources: Sequence[Hashable]) -> np.ndarray:
    """`["b", "a", "b"]` -> `[0, 1, 0]`: which of the different sources each row has, by their first rows."""
    places: dict[Hashable, int] = {}
    return np.array([places.setdefault(source, len(places)) for source in sources])


def over_ranks(
    work: Callable[[Batch], Found],
    batches: Sequence[Batch],
    accelerator: Accelerator | None,
    before_each: Callable[[], None] | None = None,
) -> list[Found]:
    """`work(batch)` of every batch, in their order, on every rank; batch n is worked on by rank n modulo ranks.

    All ranks work equally often, because a sharded model computes nothing on one rank alone: where no batch is left
    for a rank, it works on the last one too, and that is not counted.
    """
    ranks, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    found = []
    for first in range(0, len(batches), ranks):
        if before_each is not None:
            before_each()
        place = first + rank
        result = work(batches[min(place, len(batches) - 1)])
        if place < len(batches):
            found.append((place, result))
    gathered = dict(gather_object(found) if ranks > 1 else found)
    return [gathered[place] for place in range(len(batches))]


@torch.no_grad()
def row_losses(
    objective: Seq2SeqObjective,
    rows: PaddedRows,
    batch_size: int,
    accelerator: Accelerator | None = None,
    before_each: Callable[[], None] | None = None,
) -> np.ndarray:
    """Nats and target tokens of each row, (rows, 2), float64. Batches hold rows of like length, the longest first.

    NotFiniteError names the first row whose loss is infinite or no number.
    """
    device, was_training = objective.model.device, objective.training
    objective.eval()

    def work(numbers: np.ndarray) -> list[tuple[float, int]]:
        batch = {name: tensor.to(device) for name, tensor in rows.tensors(numbers).items()}
        nats = objective.token_losses(batch).cpu().double().sum(dim=1)
        return nats.tolist()

    lengths = rows.lengths
    batches = [numbers for (numbers,) in longest_first(lengths, batch_size, ranks=1)]
    try:
        found = over_ranks(work, batches, accelerator, before_each)
    finally:
        objective.train(was_training)
    nats = np.empty(len(lengths.target_tokens))
    nats[np.concatenate(batches)] = np.concatenate(found)
    if not np.isfinite(nats).all():
        bad = np.flatnonzero(~np.isfinite(nats))
        raise NotFiniteError(
            f"the loss of {len(bad)} of {len(nats)} rows is infinite or no number, first that of row {bad[0] + 1}. If "
            f"the weights are in float16, try --dtype float32; otherwise the checkpoint's weights are broken."
        )
    return np.column_stack([nats, lengths.target_tokens])


def cap_from_targets(rows: Dataset, limit: int | None) -> int:
    """A quarter more than the longest target, within the model's positions."""
    longest = max(len(labels) for labels in rows["labels"])
    cap = math.ceil(CAP_OVER_LONGEST_TARGET * longest)
    return cap if limit is None else max(longest, min(cap, limit))


def _say_if_targets_are_shorter(model: PreTrainedModel, rows: Dataset, settings: Mapping[str, Any]) -> None:
    """Than any output may be: BART for CNN's news writes 56 tokens at least."""
    own = model.generation_config
    for name, more in (("min_length", 0), ("min_new_tokens", 1)):  # the one counts the start token, the other no end
        least = (settings.get(name, getattr(own, name)) or 0) + more
        shorter = sum(len(labels) < least for labels in rows["labels"])
        if shorter:
            warn_once(
                f"({shorter} of {len(rows)} targets have fewer tokens than the {least} that each output has at least, "
                f"by {name}. Lower it in the checkpoint's generation_config.json, or in `diptych evaluate` and "
                f"`generate` by --generation.{name} 0.)"
            )


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source_ids: Sequence[Sequence[int]],
    *,
    batch_size: int,
    progress: bool,
    accelerator: Accelerator | None,
    before_each: Callable[[], None] | None,
    seed: int,
    given: Sequence[Sequence[int]],
    **settings: Any,
) -> list[Output]:
    """One output for each source, in order; `given` is what the decoder is given first for each, `settings` are those
    of `chosen_outputs`."""
    order = sorted(range(len(source_ids)), key=lambda place: -len(source_ids[place]))
    batches = list(enumerate(order[start : start + batch_size] for start in range(0, len(order), batch_size)))
    ranks = accelerator.num_processes if accelerator else 1
    shown = progress and (accelerator is None or accelerator.is_main_process)

    def work(batch: tuple[int, list[int]]) -> list[Output]:
        number, places = batch
        ids = [source_ids[place] for place in places]
        of_batch = settings | {"batch_size": batch_size, "progress": bar, "given": [given[place] for place in places]}
        # Seeded by the batch's number, so that it does not matter which rank has it.
        return chosen_outputs(model, tokenizer, ids, seed=seed + number, **of_batch)

    with GenerationBar(sum(len(places) for _, places in batches[::ranks]), shown=shown) as bar:  # this rank's share
        found = over_ranks(work, batches, accelerator, before_each)
    outputs = dict(zip(order, (output for batch in found for output in batch), strict=True))
    return [outputs[place] for place in range(len(source_ids))]


def references_of(
    sources: Iterable[tuple[str, Languages]], split: Dataset, template: Template | None
) -> dict[tuple[str, Languages], list[str]]:
    """For each source, in order, the targets of all rows of the split that have it, up to the template's stop."""
    references: dict[tuple[str, Languages], list[str]] = {source: [] for source in sources}
    for source, target in zip(source_keys(split), split["target"], strict=True):
        if source in references:
            references[source].append(_cut(target, template))
    return references


def _cut(target: str, template: Template | None) -> str:
    return template.cut_at_stop(target) if template else target


def load_splits(data: str, split: str) -> dict[str, Dataset]:
    """The split of this name; of `test`, where test sets have names, all of them."""
    if not (Path(data) / "dataset_dict.json").is_file():
        raise UserError(
            f"{data} is no prepared dataset (it has no dataset_dict.json). Make one with `diptych prepare`."
        )
    splits = open_prepared(data)
    chosen = [split] if split in splits else splits_of(split, splits)
    if not chosen:
        known = dict.fromkeys([*map(kind_of, splits), *splits])
        raise UserError(f"{data} has no split {split!r}. {choose_from(split, list(known))}")
    return {name: splits[name] for name in chosen}


def of_languages(name: str, split: Dataset, settings: EvaluateSettings, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The rows of a split in the languages that the settings ask for."""
    asked = codes_of(tokenizer).checked(Languages(settings.source_language, settings.target_language))
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


def check_same_tokenizer(model_name: str, tokenizer: PreTrainedTokenizerBase, data: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the rows. They are token ids: read with another vocabulary they would be other words."""
    prepared = load_tokenizer(str(Path(data) / "tokenizer"))
    if all_tokens(prepared) != all_tokens(tokenizer):
        raise UserError(
            f"{data} was prepared with another tokenizer ({len(prepared)} tokens) than that of {model_name} "
            f"({len(tokenizer)} tokens). Prepare the data again with --tokenizer {model_name}."
        )
    return prepared


Intervals = Mapping[str, tuple[float, float]]


def format_table(evaluation: Evaluation, intervals: Intervals) -> str:
    """The figures as a person reads them, one on each line with its interval and unit."""
    figures = evaluation.figures

    def line(name: str, note: str, form: str = ",") -> str:
        spread = "[{:{form}}, {:{form}}]".format(*intervals[name], form=form) if name in intervals else ""
        return f"{name:20}{figures[name]:>9{form}} {spread:17} {note}".rstrip()

    lines = [line("rows", "")]
    if evaluation.predictions:
        lines.append(line("sources", "different; scores are 0 to 100 over these"))
    lines.append(line("loss", f"nats/token over {figures['target_tokens']:,} target tokens", ".3f"))
    if evaluation.predictions:
        counts = {"rows", "loss", "target_tokens", "sources", "unfinished", "max_new_tokens"}
        for name in [name for name in figures if name not in counts]:
            own = "of rows gave their own target" if name == "exact_match_rows" else ""
            lines.append(line(name, own or evaluation.signatures.get(name, ""), ".2f"))
        lines.append(line("unfinished", f"outputs never ended and were stopped at {figures['max_new_tokens']} tokens"))
    if intervals:
        lines.append(
            f"[low, high]: {LEVEL_PERCENT} % intervals over other sources ({RESAMPLES:,} bootstrap resamples)"
        )
    if evaluation.directions:
        lines += ["", *_direction_lines(evaluation.directions)]
    return "\n".join(lines)


def _direction_lines(directions: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A line for each direction, below the names of the figures."""
    names = list(next(iter(directions.values())))
    widths = [max(9, len(name) + 2) for name in names]
    forms = [",d" if name == "rows" else ".3f" if name == "loss" else ".2f" for name in names]
    head = "".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    lines = [f"{'direction':20}{head}"]
    for direction, figures in directions.items():
        columns = zip(figures.values(), widths, forms, strict=True)
        lines.append(f"{direction:20}" + "".join(f"{value:>{width}{form}}" for value, width, form in columns))
    return lines


def write_report(
    settings: EvaluateSettings, evaluation: Evaluation, intervals: Intervals, data: Mapping[str, Any]
) -> None:
    """settings.out, and the predictions beside it, which come first: the report holds their hash."""
    out = Path(settings.out)
    report = {
        "figures": evaluation.figures,
        "directions": evaluation.directions,
        "intervals": {name: list(interval) for name, interval in intervals.items()},
        "confidence": {"level_percent": LEVEL_PERCENT, "resamples": RESAMPLES, "seed": settings.seed},
        "signatures": evaluation.signatures,
        "settings": asdict(settings),
        "model": model_identity(settings.model),
        "data": data,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    written = str(out)
    if evaluation.predictions:
        beside = predictions_file(out)
        lines = [json.dumps(row.as_json(), ensure_ascii=False) + "\n" for row in evaluation.predictions]
        content = "".join(lines).encode("utf-8")
        beside.write_bytes(content)
        report["predictions_sha256"] = hashlib.sha256(content).hexdigest()
        written += f" and {beside}"
    out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written: {written}")


def report_file(out: str, split: str, splits: int) -> Path:
    """Of one of several splits, the file has its name: report.json, test/news → report.news.json."""
    file = Path(out)
    return file if splits == 1 else file.with_name(f"{file.stem}.{name_in(split)}{file.suffix}")


def _is_report(content: bytes) -> bool:
    try:
        return {"figures", "signatures", "settings"} <= json.loads(content).keys()
    except (ValueError, AttributeError):
        return False


def _are_predictions(content: bytes) -> bool:
    try:
        return {"source", "references", "prediction"} <= json.loads(content.split(b"\n", 1)[0]).keys()
    except (ValueError, AttributeError):
        return False


def predictions_file(report: Path) -> Path:
    return report.with_suffix(".predictions.jsonl")


def model_identity(name: str) -> dict[str, Any] | None:
    """What tells this model from others: sizes and hashes of its files, as training wrote them beside it; by these
    `diptych publish` knows whose scores they are. None where there are none."""
    manifest = Path(name).expanduser() / MANIFEST
    return read_json(manifest) if manifest.is_file() else None


def data_identity(split: Dataset) -> dict[str, Any]:
    """What tells this split from others, whatever tokenizer it was prepared with: a hash of its texts, in order."""
    digest = hashlib.sha256()
    for rows in split.select_columns(["source", "target"]).iter(batch_size=10_000):
        for pair in zip(rows["source"], rows["target"], strict=True):
            digest.update(json.dumps(pair).encode())
    return {"rows": len(split), "texts_sha256": digest.hexdigest()}


def run(settings: EvaluateSettings) -> int:
    check_metric_names(settings.metric_names())
    check_generation_names(settings.generation)
    keep_memory()
    splits = load_splits(settings.data, settings.split)
    for split in splits if settings.out else ():  # what cannot be written shows now, and not after hours
        report = report_file(settings.out, split, len(splits))
        check_overwrite(report, _is_report, "a report of `diptych evaluate`")
        check_overwrite(predictions_file(report), _are_predictions, "the predictions of a report")
        report.parent.mkdir(parents=True, exist_ok=True)
    accelerator = join_ranks()
    speaks = accelerator is None or accelerator.is_main_process
    device = accelerator.device if accelerator and settings.device == "auto" else pick_device(settings.device)
    loaded = load_checkpoint(settings.model, settings.dtype, device)
    model, tokenizer = loaded.model, loaded.tokenizer
    prepared = check_same_tokenizer(settings.model, tokenizer, settings.data)
    splits = {name: of_languages(name, split, settings, tokenizer) for name, split in splits.items()}
    check_rows_fit(model, splits)
    for name, split in splits.items():
        if speaks:
            print(f"{settings.model} on {settings.data}, split {name}", file=sys.stderr)
        evaluation = evaluate_rows(
            model,
            tokenizer,
            drop_repeated_start(split, decoder_start_token(model), codes_of(tokenizer).starts),
            metrics=settings.metric_names(),
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            limit=settings.limit,
            progress=True,
            bleu_tokenize=settings.bleu_tokenize or None,
            template=carried_template(prepared, check=False),  # the one that made the rows
            accelerator=accelerator,
            mbr_samples=settings.mbr_samples,
            seed=settings.seed,
            num_beams=settings.num_beams,
            **settings.generation,
        )
        if speaks:
            intervals = bootstrap_intervals(evaluation.statistics, seed=settings.seed)
            table = format_table(evaluation, intervals)
            print(table if len(splits) == 1 else f"{name}\n{table}\n")
            if settings.out:
                of_split = replace(settings, split=name, out=str(report_file(settings.out, name, len(splits))))
                write_report(of_split, evaluation, intervals, data_identity(split))
    if accelerator:
        accelerator.end_training()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run("evaluate", argv)


if __name__ == "__main__":
    raise SystemExit(main())
