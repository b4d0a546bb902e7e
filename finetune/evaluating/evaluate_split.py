"""`diptych evaluate MODEL --data prepared --split test --out report.json`: evaluates one split, or all test sets.

It prints a table of figures with their intervals (confidence_intervals.py) and writes a report
(evaluation_report.py), one per test set. Every row counts once, in order: the same model, data and machine give the
same figures.
Several ranks: `torchrun … -m diptych.finetune.evaluation` (on CPUs with ACCELERATE_USE_CPU=true).
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from diptych.data_prep.command_line.arguments import choose_from
from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.named_splits import kind_of, splits_of
from diptych.data_prep.rows.records import Languages
from diptych.data_prep.text_to_ids.templates import carried_template
from diptych.data_prep.text_to_ids.two_vocabularies import all_tokens
from diptych.finetune.batches.padded_rows import check_rows_fit, drop_repeated_start
from diptych.finetune.commands import cli
from diptych.finetune.commands.ranks import join_ranks
from diptych.finetune.evaluating.confidence_intervals import bootstrap_intervals
from diptych.finetune.evaluating.evaluate_rows import evaluate_rows, source_keys
from diptych.finetune.evaluating.evaluate_settings import EvaluateSettings
from diptych.finetune.evaluating.evaluation_report import check_report_files, format_table, report_file, write_report
from diptych.finetune.evaluating.metrics import check_metric_names
from diptych.finetune.inference.generation_config import check_generation_names
from diptych.finetune.model.device_speed import keep_memory
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.loading import load_checkpoint, load_tokenizer, pick_device
from diptych.finetune.model.untrusted_files import open_prepared


def run(settings: EvaluateSettings) -> int:
    check_metric_names(settings.metric_names())
    check_generation_names(settings.generation)
    keep_memory()
    splits = load_splits(settings.data, settings.split)
    for name in splits if settings.out else ():  # before hours of work
        check_report_files(report_file(settings.out, name, len(splits)))
    accelerator = join_ranks()
    is_main = accelerator is None or accelerator.is_main_process
    device = accelerator.device if accelerator and settings.device == "auto" else pick_device(settings.device)
    loaded = load_checkpoint(settings.model, settings.dtype, device)
    prepared = check_same_tokenizer(settings.model, loaded.tokenizer, settings.data)
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
            metrics=settings.metric_names(),
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


def check_same_tokenizer(model_name: str, tokenizer: PreTrainedTokenizerBase, data: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the rows. They are token ids, which another vocabulary would read as other words."""
    prepared = load_tokenizer(str(Path(data) / "tokenizer"))
    if all_tokens(prepared) != all_tokens(tokenizer):
        raise UserError(
            f"{data} was prepared with another tokenizer ({len(prepared)} tokens) than that of {model_name} "
            f"({len(tokenizer)} tokens). Prepare the data again with --tokenizer {model_name}."
        )
    return prepared


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


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run("evaluate", argv)


if __name__ == "__main__":
    raise SystemExit(main())
