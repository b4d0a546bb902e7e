"""How good a model is on a prepared split: the loss of every row, and metrics of what it generates.

    evaluate_rows(loaded, split, metrics=["chrf"], batch_size=16).figures
    -> {"rows": 300, "loss": 1.873, "target_tokens": 4310, "sources": 292, "chrf": 41.2, "exact_match_rows": 9.3,
        "unfinished": 2, "max_new_tokens": 45}

The loss is in nats per target token, sum over sum, by the objective of training. For the metrics each different source
is generated once, and the targets of all rows with that source are its references: "Go." has five good translations in
Tatoeba, and per row four of them would count as wrong. `exact_match_rows` is that stricter figure: the percentage of
rows whose own target was generated. Of pairs, the target is the chosen answer, and `chosen_likelier` the percentage in
which it is more probable per token than the rejected one; marked answers are targets if they are liked. `unfinished`
counts outputs that reached the limit on new tokens without an end. The decoder prefix of the rows' template is forced;
its stop strings end outputs and references.

With several ranks whole batches are distributed, the same ones for any number of ranks. So with as many threads per
process the figures are those of one rank, to the last digit. An export to CTranslate2 is evaluated in the same way.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import GenerationConfig

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.language_names import SOURCE_COLUMNS, TARGET_COLUMNS
from diptych.data_prep.rows.records import Languages
from diptych.data_prep.text_to_ids.templates import Template
from diptych.finetune.batches.padded_rows import OTHER_LABELS, PaddedRows, RowLengths, padded_rows, row_lengths
from diptych.finetune.batches.preference_rows import MARK
from diptych.finetune.commands.exit_codes import NotFiniteError
from diptych.finetune.commands.ranks import on_main_rank
from diptych.finetune.evaluating.confidence_intervals import MetricFault, Scored, ratio
from diptych.finetune.evaluating.evaluate_documents import document_figures, source_documents
from diptych.finetune.evaluating.metrics import count_texts, figures_and_signatures, find_metrics
from diptych.finetune.generating.documents import Answered, Documents, answered
from diptych.finetune.inference.engine import EncodedPrompt
from diptych.finetune.inference.generation import cut_at_stop, in_eval_mode
from diptych.finetune.inference.generation_config import warn_once
from diptych.finetune.inference.outputs import GenerationBar, Output, batches_by_length
from diptych.finetune.inference.scoring import chosen_outputs
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.loading import position_limit
from diptych.finetune.model.loss import Seq2SeqObjective

DIRECTION_COLUMNS = (SOURCE_COLUMNS[0], TARGET_COLUMNS[0])
"""Columns of prepared rows with the languages of source and target."""
CHOSEN_LIKELIER = "chosen_likelier"
CAP_OVER_LONGEST_TARGET = 1.25
"""The limit on new tokens is the longest target times this: room for other words, not for endless repetition."""
SourceKey = tuple[str, Languages]
"""Rows with the same text and the same languages have the same source."""


class Prediction(NamedTuple):
    """One source, the targets of all rows that have it, and the model's output."""

    source: str
    references: list[str]
    prediction: str
    finished: bool
    nats: float
    """Summed loss of the evaluated rows with this source."""
    target_tokens: int
    """Of these rows."""
    direction: str = ""
    """`eng_Latn-kor_Hang` if rows have languages."""

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in self._asdict().items() if name != "direction" or value}


class Group(NamedTuple):
    """The rows that have one value in a column. A source whose rows are in several groups counts in each."""

    rows: int
    statistics: dict[str, Scored]


class Evaluation(NamedTuple):
    figures: dict[str, float]
    signatures: dict[str, str]
    """sacrebleu's description of how a figure was computed. Figures with different signatures are not comparable."""
    predictions: list[Prediction]
    """One for each different source, in the order of their first rows; empty without metrics."""
    statistics: dict[str, Scored]
    """Counts per source, from which confidence_intervals.py makes intervals. Metrics are counted by the main rank."""
    groups: dict[str, dict[str, Group]] = {}
    """By column and value."""
    faults: dict[str, str] = {}
    """Why a metric of the user's own has no figure."""
    outputs: Sequence[Output] = ()
    """Of the predictions."""


class Sources:
    """The different sources of rows, in the order of their first rows. N sources, R rows."""

    def __init__(self, rows: Dataset):
        keys = source_keys(rows)
        self.ids: dict[SourceKey, list[int]] = dict(zip(keys, rows["input_ids"], strict=True))
        places = {key: place for place, key in enumerate(self.ids)}
        self.of_row = np.array([places[key] for key in keys])
        self.by_row: dict[str, tuple[np.ndarray, np.ndarray, float]] = {}
        """Figures that are counted by row: dividend and divisor of each (R,), and a scale."""

    def statistics(self, chosen: np.ndarray) -> dict[str, Scored]:
        """Of the rows that are `chosen` (R,), summed for each source that has one of them."""
        places = np.unique(self.of_row[chosen])

        def sums(values: np.ndarray) -> np.ndarray:
            return np.bincount(self.of_row, weights=values * chosen)[places]

        return {
            name: ratio(name, sums(top), sums(bottom), scale) for name, (top, bottom, scale) in self.by_row.items()
        }


def evaluate_rows(
    loaded: LoadedModel | Any,
    dataset: Dataset,
    *,
    metrics: Sequence[str] = (),
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    limit: int | None = None,
    progress: bool = False,
    metric_settings: Mapping[str, Mapping[str, Any]] | None = None,
    by: Sequence[str] = (),
    accelerator: Accelerator | None = None,
    before_each: Callable[[], None] | None = None,
    objective: Seq2SeqObjective | None = None,
    compare_answers: bool = False,
    documents: Documents | None = None,
    **generation: Any,
) -> Evaluation:
    """The loss and, with `metrics`, their scores, of all rows or of `limit` rows drawn from the whole split.

    `loaded` may be a CTranslate2Engine. `max_new_tokens` comes from the longest target by default. References come
    from the whole split. With an `accelerator` all its ranks must call this; they share the work, and each returns the
    same. All ranks call `before_each` before each of their batches, equally often; what it raises ends the evaluation.
    A sharded model must come with its `objective`, because it has full weights only inside `forward`. `by` are
    columns, or direction, of which each value is a group. With `compare_answers` pairs are compared. `documents` cut
    sources and write terms into them. `generation` are settings of `chosen_outputs` (mbr_samples, seed, num_beams …).

    Raises:
        UserError: there are no rows, or a metric is unknown.
        NotFiniteError: the loss of a row is infinite or NaN.
    """
    find_metrics(metrics, metric_settings)
    dataset = liked_rows(dataset)
    if not len(rows := dataset if limit is None else draw(dataset, limit)):
        raise UserError("the split to evaluate has no rows. Choose another split, or a limit of 1 or more.")
    sources = Sources(rows)
    shared = {"batch_size": batch_size, "accelerator": accelerator, "before_each": before_each}
    losses = _losses(loaded, rows, objective, **shared)
    sources.by_row["loss"] = (*losses.T, 1.0)
    all_rows = np.ones(len(rows), dtype=bool)
    if compare_answers and OTHER_LABELS in rows.column_names and MARK not in rows.column_names:
        rejected = rows.remove_columns("labels").rename_column(OTHER_LABELS, "labels")
        others = _losses(loaded, rejected, objective, **shared)
        sources.by_row[CHOSEN_LIKELIER] = (np.divide(*losses.T) < np.divide(*others.T), all_rows, 100.0)
    statistics = sources.statistics(all_rows)
    figures = {"rows": len(rows)} | figures_and_signatures(statistics.values())[0]
    figures["target_tokens"] = int(losses[:, 1].sum())
    if not metrics:
        return Evaluation(figures, {}, [], statistics, _groups(by, rows, sources))
    own, limit = _generation_limits(loaded)
    cap = max_new_tokens or cap_from_targets(rows, limit)
    _warn_of_longer_minimum(own, rows, generation)
    asked = source_documents(documents, rows, source_keys(rows), sources.ids, loaded)
    prompts = [prompt for document in asked for prompt in document.prompts]
    answers = answered(
        asked, generate_shared(loaded, prompts, progress=progress, max_new_tokens=cap, **shared, **generation)
    )
    predictions = _predictions(dataset, sources, answers, statistics["loss"].counts, loaded.template)
    hits = [  # rows whose own target was generated
        predictions[source].prediction == cut_at_stop(target, loaded.template)[0]
        for source, target in zip(sources.of_row, rows["target"], strict=True)
    ]
    sources.by_row["exact_match_rows"] = (np.array(hits), all_rows, 100.0)
    settings, counted = metric_settings or {}, {}

    def scores() -> tuple[dict[str, float], dict[str, str], dict[str, str]]:
        counted.update(_counts(metrics, predictions, settings, faults := {}))
        return *figures_and_signatures(counted.values()), faults

    # on one rank, since a function of the user's own may return something else on each
    found, signatures, faults = on_main_rank(accelerator, scores)
    statistics |= counted | sources.statistics(all_rows)
    figures |= {"sources": len(predictions)} | found | statistics["exact_match_rows"].figures()
    figures |= {"unfinished": sum(not row.finished for row in predictions), "max_new_tokens": cap}
    figures |= document_figures(documents, asked, answers)
    groups = _groups(by, rows, sources, counted, predictions, settings)
    written = [it.outputs[0] for it in answers]
    return Evaluation(figures, signatures, predictions, statistics, groups, faults, written)


def _losses(loaded: LoadedModel | Any, rows: Dataset, objective: Seq2SeqObjective | None, **shared: Any) -> np.ndarray:
    """As `row_losses`, also of an export."""
    if isinstance(loaded, LoadedModel):
        return row_losses(objective or Seq2SeqObjective(loaded.model), padded_rows(loaded, rows), **shared)
    return losses_by(lambda numbers: loaded.row_nats(rows[numbers]), row_lengths(rows), **shared)


def _generation_limits(loaded: LoadedModel | Any) -> tuple[GenerationConfig, int | None]:
    """The checkpoint's own generation config, and how many positions its decoder has."""
    if isinstance(loaded, LoadedModel):
        return loaded.model.generation_config, position_limit(loaded.model)
    return loaded.generation_config, loaded.max_target_tokens


def _predictions(
    dataset: Dataset,
    sources: Sources,
    answers: Sequence[Answered],
    losses: np.ndarray,
    template: Template | None,
) -> list[Prediction]:
    """One for each source, with the targets of all rows of the split that have it; `losses` are nats and tokens,
    (N, 2)."""
    references: dict[SourceKey, list[str]] = {source: [] for source in sources.ids}
    for source, target in zip(source_keys(dataset), dataset["target"], strict=True):
        if source in references:
            references[source].append(cut_at_stop(target, template)[0])
    return [
        Prediction(source, targets, output.text, output.finished, float(of_source), int(tokens), languages.direction)
        for ((source, languages), targets), ((output,), *_), (of_source, tokens) in zip(
            references.items(), answers, losses, strict=True
        )
    ]


def liked_rows(split: Dataset) -> Dataset:
    """Of marked answers those that are liked: nobody wants the others as references."""
    if MARK not in split.column_names:
        return split
    return split.select(np.flatnonzero(np.array(split[MARK]) > 0))


def _counts(
    metrics: Sequence[str],
    predictions: Sequence[Prediction],
    settings: Mapping[str, Any],
    faults: dict[str, str] | None = None,
) -> dict[str, Scored]:
    texts, references, sources = (
        [getattr(row, name) for row in predictions] for name in ("prediction", "references", "source")
    )
    return count_texts(metrics, texts, references, sources, settings, faults)


def _groups(
    by: Sequence[str],
    rows: Dataset,
    sources: Sources,
    counted: Mapping[str, Scored] | None = None,
    predictions: Sequence[Prediction] = (),
    settings: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Group]]:
    """By column and value. BLEU is counted anew: its tokens depend on the script."""
    groups: dict[str, dict[str, Group]] = {}
    for column in by:
        values = column_values(rows, column)
        for value in dict.fromkeys(values.tolist()):
            chosen = values == value
            places, of_rows = np.unique(sources.of_row[chosen]), sources.statistics(chosen)
            statistics = {"loss": of_rows["loss"]}
            for name, scored in (counted or {}).items():
                try:
                    statistics[name] = scored.at(places)
                    if name == "bleu":
                        of_bleu = {"bleu": settings["bleu"]} if "bleu" in settings else {}
                        statistics |= _counts(["bleu"], [predictions[place] for place in places], of_bleu)
                except MetricFault as fault:
                    warn_once(f"({column} {value} has no {name}: {fault})")
            groups.setdefault(column, {})[value] = Group(int(chosen.sum()), statistics | of_rows)
    return groups


def column_values(rows: Dataset, column: str) -> np.ndarray:
    """Of each row as text, (R,); "none" where there is none. The direction of its languages counts as a column."""
    found = [languages.direction for _, languages in source_keys(rows)] if column == "direction" else rows[column]
    return np.array(["none" if value in (None, "") else str(value) for value in found])


def source_keys(rows: Dataset) -> list[SourceKey]:
    columns = [rows[name] if name in rows.column_names else [""] * len(rows) for name in DIRECTION_COLUMNS]
    return [(source, Languages(*languages)) for source, *languages in zip(rows["source"], *columns, strict=True)]


def draw(dataset: Dataset, limit: int) -> Dataset:
    """`limit` rows from the whole split (files are often sorted), the same ones each time, in their order."""
    chosen = random.Random(0).sample(range(len(dataset)), min(limit, len(dataset)))
    return dataset.select(sorted(chosen))


def over_ranks(
    work: Callable[[Any], Any],
    batches: Sequence[Any],
    accelerator: Accelerator | None,
    before_each: Callable[[], None] | None = None,
) -> list[Any]:
    """`work(batch)` of every batch, in their order, on every rank; batch n is computed by rank n modulo ranks.

    A sharded model computes only if all ranks do, so a rank without a batch repeats the last one and drops the result.
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
    """Nats and target tokens of each row, (R, 2), float64. Rows of similar length share a batch, the longest first.
    NotFiniteError names the first row whose loss is infinite or NaN."""
    device = objective.model.device

    def nats_of(numbers: list[int]) -> list[float]:
        batch = {name: tensor.to(device) for name, tensor in rows.tensors(numbers).items()}
        return objective.token_losses(batch).cpu().double().sum(dim=1).tolist()

    with in_eval_mode(objective):
        return losses_by(nats_of, rows.lengths, batch_size, accelerator, before_each)


def losses_by(
    nats_of: Callable[[list[int]], list[float]],
    lengths: RowLengths,
    batch_size: int,
    accelerator: Accelerator | None = None,
    before_each: Callable[[], None] | None = None,
) -> np.ndarray:
    """As `row_losses`, with `nats_of(row numbers)` for each batch."""
    batches = batches_by_length((lengths.source_tokens + lengths.target_tokens).tolist(), batch_size)
    found = over_ranks(nats_of, batches, accelerator, before_each)
    nats = np.empty(len(lengths.target_tokens))
    nats[np.concatenate(batches)] = np.concatenate(found)
    if len(bad := np.flatnonzero(~np.isfinite(nats))):
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


def _warn_of_longer_minimum(own: GenerationConfig, rows: Dataset, settings: Mapping[str, Any]) -> None:
    """If targets are shorter than every output must be (BART for CNN's news: 56 tokens)."""
    # min_length counts the start token, min_new_tokens does not count the end token
    for name, extra in (("min_length", 0), ("min_new_tokens", 1)):
        least = (settings.get(name, getattr(own, name)) or 0) + extra
        if shorter := sum(len(labels) < least for labels in rows["labels"]):
            warn_once(
                f"({shorter} of {len(rows)} targets have fewer tokens than the {least} that each output has at least, "
                f"by {name}. Lower it in the checkpoint's generation_config.json, or in `diptych evaluate` and "
                f"`generate` by --generation.{name} 0.)"
            )


def generate_shared(
    loaded: LoadedModel | Any,
    prompts: Sequence[EncodedPrompt],
    *,
    batch_size: int,
    progress: bool,
    accelerator: Accelerator | None,
    before_each: Callable[[], None] | None,
    seed: int = 0,
    **settings: Any,
) -> list[Output]:
    """One output for each prompt, in order; the ranks share the batches. `settings` are those of `chosen_outputs`."""
    batches = list(enumerate(batches_by_length([len(ids) for ids, _ in prompts], batch_size)))
    ranks = accelerator.num_processes if accelerator else 1
    shown = progress and (accelerator is None or accelerator.is_main_process)

    def work(batch: tuple[int, list[int]]) -> list[Output]:
        number, places = batch
        ids, forced = zip(*(prompts[place] for place in places), strict=True)
        # Seeded by the batch's number, so that it does not matter which rank computes it.
        if not isinstance(loaded, LoadedModel):
            asked = {name: value for name, value in settings.items() if name not in ("max_new_tokens", "mbr_samples")}
            rows = [EncodedPrompt(list(of_row), list(start)) for of_row, start in zip(ids, forced, strict=True)]
            outputs = loaded.write(rows, loaded.template, asked, settings["max_new_tokens"], seed + number)
            bar.advance(len(rows), outputs)
            return outputs
        more = {"seed": seed + number, "batch_size": batch_size, "bar": bar, "given": forced}
        return chosen_outputs(loaded, ids, **settings, **more)

    with GenerationBar(sum(len(places) for _, places in batches[::ranks]), shown=shown) as bar:  # this rank's rows
        found = over_ranks(work, batches, accelerator, before_each)
    outputs = {
        place: output
        for (_, places), of_batch in zip(batches, found, strict=True)
        for place, output in zip(places, of_batch, strict=True)
    }
    return [outputs[place] for place in range(len(prompts))]
