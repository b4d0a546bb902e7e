"""How well a model does on a prepared split: loss on every row, and metrics on what it generates.

    evaluate_split(model, tokenizer, split, metrics=["chrf"], batch_size=16)
    -> {"rows": 300, "sources": 292, "loss": 1.873, "target_tokens": 4310, "chrf": 41.2, "exact_match_rows": 9.3,
        "unfinished": 2, "max_new_tokens": 45}

The loss is in nats per target token, sum over sum, by the objective that training uses. For the metrics each different
source text is generated once, and the targets of all rows that share it are its references: "Go." has five good
translations among the pairs of Tatoeba, and four of them would count as wrong if each row were asked alone.
`exact_match_rows` is that stricter figure: the percentage of rows whose own target came out. `unfinished` counts the
outputs that reached the cap on new tokens without ending. The decoder prefix of the template that made the rows is
forced, and its stop strings end an output; the references end there too.

`diptych evaluate MODEL --data prepared --split test --out report.json` prints this as a table, and writes the report
and report.predictions.jsonl (source, references, prediction, finished). Every row counts once, in order; the same
model, data and machine give the same figures.
"""

import json
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from datasets import Dataset, load_from_disk
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from diptych.data_prep.records import IGNORE_INDEX, UserError
from diptych.data_prep.templates import Template, carried_template
from diptych.finetune.batches import check_rows_fit, drop_repeated_start, longest_first, pad_batch, row_lengths
from diptych.finetune.cli import choose_from, parse_settings, report_errors
from diptych.finetune.families import decoder_start_token
from diptych.finetune.generate import generate_outputs
from diptych.finetune.loading import load_model_and_tokenizer, pick_device, position_limit
from diptych.finetune.metrics import check_metric_names, score_texts
from diptych.finetune.objectives import Seq2SeqObjective
from diptych.finetune.speed import keep_memory

# The cap on new tokens is the longest target and a quarter more: room for another wording, not for endless repetition.
CAP_OVER_LONGEST_TARGET = 1.25


class Prediction(NamedTuple):
    """One source text, the targets of all rows that have it, in their order, and what the model made of it."""

    source: str
    references: list[str]
    prediction: str
    finished: bool


class Evaluation(NamedTuple):
    figures: dict[str, float]
    """Flat numbers, for a log or a table."""
    signatures: dict[str, str]
    """What sacrebleu says a figure was computed with; figures with different signatures cannot be compared."""
    predictions: list[Prediction]
    """One for each different source, in the order of their first rows; none where no metric was asked."""


def evaluate_split(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    metrics: Sequence[str] = (),
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    limit: int | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """The figures of `evaluate_rows`, flat."""
    return evaluate_rows(
        model,
        tokenizer,
        dataset,
        metrics=metrics,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        limit=limit,
        progress=progress,
    ).figures


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
    **generation_kwargs: Any,
) -> Evaluation:
    """Loss and, where metrics are asked, scores, of all rows or of `limit` rows drawn from everywhere in the split.

    Files are often sorted, so the first rows would tell of the shortest ones. References come from the whole split.
    `max_new_tokens` is taken from the longest target unless given, `template` from the tokenizer. The model may be in
    training mode; it is put back.
    """
    check_metric_names(metrics)
    rows = dataset if limit is None else draw(dataset, limit)
    if not len(rows):
        raise UserError("the split to evaluate has no rows. Choose another split, or a limit of 1 or more.")
    figures = {"rows": len(rows)} | split_loss(model, tokenizer, rows, batch_size)
    if not metrics:
        return Evaluation(figures, {}, [])
    cap = max_new_tokens or cap_from_targets(rows, position_limit(model))
    template = template or carried_template(tokenizer, check=False)  # loading has checked it
    predictions = predict_rows(
        model, tokenizer, rows, dataset, batch_size, cap, progress, template, **generation_kwargs
    )
    said = {row.source: row.prediction for row in predictions}
    targets = [_cut(target, template) for target in rows["target"]]
    own = sum(said[source] == target for source, target in zip(rows["source"], targets, strict=True))
    scores, signatures = score_texts(
        metrics, [row.prediction for row in predictions], [row.references for row in predictions], bleu_tokenize
    )
    figures |= {"sources": len(predictions)} | scores
    figures |= {
        "exact_match_rows": 100 * own / len(rows),
        "unfinished": sum(not row.finished for row in predictions),
        "max_new_tokens": cap,
    }
    return Evaluation(figures, signatures, predictions)


def draw(dataset: Dataset, limit: int) -> Dataset:
    """`limit` rows, the same ones each time, in their order."""
    chosen = random.Random(0).sample(range(len(dataset)), min(limit, len(dataset)))
    return dataset.select(sorted(chosen))


@torch.no_grad()
def split_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, batch_size: int
) -> dict[str, float]:
    """Sum of cross-entropy over all target tokens ÷ their number. Batches hold rows of like length."""
    objective, was_training = Seq2SeqObjective(model), model.training
    start_token = decoder_start_token(model)
    model.eval()
    nats, target_tokens = 0.0, 0
    try:
        for (numbers,) in longest_first(row_lengths(rows), batch_size, ranks=1):
            batch = pad_batch([rows[int(number)] for number in numbers], tokenizer.pad_token_id, start_token)
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            nats += objective(batch, num_items_in_batch=1).item()  # divided by 1: the sum
            target_tokens += int((batch["labels"] != IGNORE_INDEX).sum())
    finally:
        model.train(was_training)
    return {"loss": nats / target_tokens, "target_tokens": target_tokens}


def cap_from_targets(rows: Dataset, limit: int | None) -> int:
    """A quarter more than the longest target, within the model's positions."""
    longest = max(len(labels) for labels in rows["labels"])
    cap = math.ceil(CAP_OVER_LONGEST_TARGET * longest)
    return cap if limit is None else max(longest, min(cap, limit))


def predict_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    split: Dataset,
    batch_size: int,
    max_new_tokens: int,
    progress: bool = False,
    template: Template | None = None,
    **generation_kwargs: Any,
) -> list[Prediction]:
    """One prediction for each different source of `rows`, in order; all its targets in `split` are references."""
    source_ids = {row["source"]: row["input_ids"] for row in rows}
    references: dict[str, list[str]] = {source: [] for source in source_ids}
    for source, target in zip(split["source"], split["target"], strict=True):
        if source in references:
            references[source].append(_cut(target, template))
    outputs = generate_outputs(
        model,
        tokenizer,
        list(source_ids.values()),
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        template=template,
        progress=progress,
        **generation_kwargs,
    )
    return [
        Prediction(source, targets, output.text, output.finished)
        for (source, targets), output in zip(references.items(), outputs, strict=True)
    ]


def _cut(target: str, template: Template | None) -> str:
    return template.cut_at_stop(target) if template else target


@dataclass(frozen=True)
class EvaluateSettings:
    """Loss and metrics of a checkpoint on one split of a prepared dataset."""

    model: str
    """Checkpoint folder (after training: RUN/final), adapter folder, or Hub id."""
    data: str = ""
    """Prepared dataset, the folder that `diptych prepare` wrote."""
    split: str = "test"
    """The split to evaluate."""
    metrics: str = "exact_match,token_f1,rouge,bleu,chrf"
    """Names, separated by commas; an empty string gives the loss alone, which is much faster."""
    out: str = ""
    """JSON file for the report; the predictions go beside it, into *.predictions.jsonl. Printed only unless given."""
    limit: int | None = None
    """Only so many rows, drawn from the whole split, the same ones each time."""
    batch_size: int = 16
    """Rows together. More is faster until memory is full."""
    max_new_tokens: int | None = None
    """No output gets longer than this; a quarter more than the longest target unless given."""
    num_beams: int = 1
    """Width of beam search; 1 is greedy."""
    bleu_tokenize: str = ""
    """sacrebleu's name of a tokenisation (13a, intl, char, ko-mecab …); chosen by the targets' script unless given."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights; `auto` is as the checkpoint was saved."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; `auto` takes an accelerator if there is one."""

    def __post_init__(self):
        if not self.data:
            raise UserError("data is not set. Name the folder that `diptych prepare` wrote: --data FOLDER.")
        check_metric_names(self.metric_names())
        for name in ("limit", "batch_size", "max_new_tokens", "num_beams"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 1 or more.")

    def metric_names(self) -> list[str]:
        return [name.strip() for name in self.metrics.split(",") if name.strip()]


def load_split(data: str, split: str) -> Dataset:
    if not (Path(data) / "dataset_dict.json").is_file():
        raise UserError(
            f"{data} is no prepared dataset (it has no dataset_dict.json). Make one with `diptych prepare`."
        )
    splits = load_from_disk(data)
    if split not in splits:
        raise UserError(f"{data} has no split {split!r}. {choose_from(split, list(splits))}")
    return splits[split]


def check_same_tokenizer(model_name: str, tokenizer: PreTrainedTokenizerBase, data: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the rows. They are token ids: read with another vocabulary they would be other words."""
    prepared = AutoTokenizer.from_pretrained(Path(data) / "tokenizer", trust_remote_code=False)
    if prepared.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{data} was prepared with another tokenizer ({len(prepared)} tokens) than that of {model_name} "
            f"({len(tokenizer)} tokens). Prepare the data again with --tokenizer {model_name}."
        )
    return prepared


def format_table(evaluation: Evaluation) -> str:
    """The figures as a person reads them, one on each line with its unit."""
    figures = evaluation.figures
    lines = [f"{'rows':18}{figures['rows']:>9,}"]
    lines += [f"{'loss':18}{figures['loss']:>9.3f} nats/token over {figures['target_tokens']:,} target tokens"]
    if not evaluation.predictions:
        return lines[0] + "\n" + lines[1]
    scores = set(figures) - {"rows", "loss", "target_tokens", "sources", "unfinished", "max_new_tokens"}
    for name in [name for name in figures if name in scores]:
        note = "of rows gave their own target" if name == "exact_match_rows" else evaluation.signatures.get(name, "")
        lines.append(f"{name:18}{figures[name]:>9.2f} {note}".rstrip())
    lines[1:1] = [f"{'sources':18}{figures['sources']:>9,} different; scores are 0 to 100 over these"]
    lines += [
        f"{'unfinished':18}{figures['unfinished']:>9,} outputs were stopped at {figures['max_new_tokens']} tokens"
    ]
    return "\n".join(lines)


def write_report(settings: EvaluateSettings, evaluation: Evaluation) -> None:
    """settings.out, and the predictions beside it."""
    out = Path(settings.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "figures": evaluation.figures,
        "signatures": evaluation.signatures,
        "settings": asdict(settings),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    written = str(out)
    if evaluation.predictions:
        beside = out.with_suffix(".predictions.jsonl")
        lines = [json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in evaluation.predictions]
        beside.write_text("".join(lines), encoding="utf-8")
        written += f" and {beside}"
    print(f"written: {written}")


def run(settings: EvaluateSettings) -> int:
    rows = load_split(settings.data, settings.split)
    model, tokenizer = load_model_and_tokenizer(settings.model, settings.dtype, pick_device(settings.device))
    prepared = check_same_tokenizer(settings.model, tokenizer, settings.data)
    check_rows_fit(model, {settings.split: rows})
    rows = drop_repeated_start(rows, model.config.decoder_start_token_id)
    print(f"{settings.model} on {settings.data}, split {settings.split}", file=sys.stderr)
    evaluation = evaluate_rows(
        model,
        tokenizer,
        rows,
        metrics=settings.metric_names(),
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        limit=settings.limit,
        progress=True,
        bleu_tokenize=settings.bleu_tokenize or None,
        template=carried_template(prepared, check=False),  # the one that made the rows
        num_beams=settings.num_beams,
    )
    print(format_table(evaluation))
    if settings.out:
        write_report(settings, evaluation)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    settings = parse_settings(EvaluateSettings, "diptych evaluate", argv)
    keep_memory()
    return report_errors("diptych evaluate", run, settings)


if __name__ == "__main__":
    raise SystemExit(main())
