"""The tables of a prepared dataset: each split, and the train split in packed rows.

    source       "Translate English to Korean: Go."     input_ids  [414, 2741, 1]    ends as the tokenizer ends sources
    target       "가."                                  labels     [632, 17, 1]      ends in eos; nothing is padded
    instruction  "Translate English to Korean:"         input "Go."                  origin "tatoeba_eng_kor.tsv:1"

A packed row is one for each that fill_rows.py planned, its columns all of one length, and `examples`, their places in
train.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pyarrow.compute
from datasets import Dataset, DatasetDict, Features, List, Value
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from diptych.data_prep.packing.budgets import choose_budget
from diptych.data_prep.packing.fill_rows import pack
from diptych.data_prep.packing.packed_row import PACKED_COLUMNS, SHARED_COLUMN, Budget, assemble_row, repeated_start
from diptych.data_prep.pipeline.gather_rows import Gathered, taken, written
from diptych.data_prep.pipeline.prepare_settings import PrepareSettings
from diptych.data_prep.pipeline.prepared_folder import without_bars
from diptych.data_prep.pipeline.row_stages import FINAL_COLUMNS, LANGUAGE_FIELDS
from diptych.data_prep.rows.records import Languages, Rejects
from diptych.data_prep.text_to_ids.decoder_start import decoder_start_of
from diptych.data_prep.text_to_ids.encode import vocabulary_sizes
from diptych.data_prep.text_to_ids.languages import codes_of
from diptych.data_prep.text_to_ids.two_vocabularies import padding_id, target_side

PERCENTILES = (50, 90, 99, 100)

PACKED_AT_ONCE = 500  # rows: some ten megabytes
PACKED_TOGETHER = 100_000
"""Neighbouring examples that may share a row: some hundred megabytes, and enough for the fullest rows."""
POORLY_FILLED = 0.5
"""If a budget that was given is filled less than this, a warning names the one that would have been chosen."""


def split_tables(
    gathered: Gathered, places: Mapping[str, numpy.ndarray], scratch: Path, kept: Iterable[str] = ()
) -> DatasetDict:
    """FINAL_COLUMNS of the rows of each split, and `kept` ones, written to a file in `scratch` and mapped from there.
    The columns of languages are left out where no row has one."""
    tables = DatasetDict()
    empty = [name for name in LANGUAGE_FIELDS if pyarrow.compute.unique(gathered.examples[name]).to_pylist() == [""]]
    columns = [name for name in FINAL_COLUMNS if len(empty) < len(LANGUAGE_FIELDS) or name not in empty] + [*kept]
    for name, rows in places.items():
        path = scratch / f"{name.replace('/', '.')}.arrow"
        selected = gathered.examples.select(columns)
        written(taken(selected, rows), selected.schema, path)
        tables[name] = Dataset.from_file(str(path))
    return tables


def direction_counts(tables: DatasetDict) -> dict[str, int]:
    """`eng_Latn-kor_Hang` → examples of all splits, the most frequent first; nothing where rows have no languages."""
    counts: Counter[str] = Counter()
    for table in tables.values():
        if not set(LANGUAGE_FIELDS) <= set(table.column_names):
            return {}
        grouped = table.data.table.group_by(list(LANGUAGE_FIELDS)).aggregate([([], "count_all")]).to_pylist()
        for group in grouped:
            counts[Languages(*(group[name] for name in LANGUAGE_FIELDS)).direction] += group["count_all"]
    counts.pop("", None)  # rows that say one language or none
    return dict(counts.most_common())


def token_counts(
    gathered: Gathered, places: Mapping[str, numpy.ndarray], settings: PrepareSettings, rejects: Rejects
) -> dict[str, dict[str, Any]]:
    """For source and target: percentiles of the lengths before cutting, and how many rows were over the limit."""
    rows = numpy.concatenate(list(places.values()))
    counts = {}
    for side, limit in (("source", settings.max_source_tokens), ("target", settings.max_target_tokens)):
        tokens = gathered.column(f"{side}_tokens")[rows]
        percentiles = {f"p{p}": int(numpy.percentile(tokens, p, method="higher")) for p in PERCENTILES}
        counts[side] = {
            **percentiles,
            "total": int(tokens.sum()),
            "limit": limit,
            "cut": int((tokens > limit).sum()),
            "dropped": rejects.kinds[f"{side} over the limit"],
        }
    return counts


@dataclass(frozen=True)
class PackingPlan:
    """What stands in each packed row of the train split, before any is written."""

    ids: Dataset
    """`input_ids` and `labels` of the train split."""
    rows: list[numpy.ndarray]
    """For each packed row, the places of its examples in the train split."""
    budget: Budget
    repeats_start: numpy.ndarray
    """(examples,) whether the first label is what the decoder starts with, which is then left out."""
    entry: dict[str, Any]
    """What manifest.json says of it."""


def plan_packing(train: Dataset, tokenizer: PreTrainedTokenizerBase, settings: PrepareSettings) -> PackingPlan:
    table, pad_token_id, starts = train.data.table, padding_id(tokenizer), codes_of(tokenizer).starts
    decoder_start = decoder_start_of(settings.tokenizer, settings.decoder_start_token_id)
    start_id, start_from = decoder_start or (target_side(tokenizer).pad_token_id, "assumed")
    source_tokens, target_tokens = (
        pyarrow.compute.list_value_length(table[name]).to_numpy() for name in ("input_ids", "labels")
    )
    first_labels = pyarrow.compute.list_element(table["labels"], 0).to_numpy()
    repeats_start = repeated_start(first_labels, start_id, starts)
    lengths = (source_tokens, target_tokens - repeats_start)
    groups = None
    if settings.share_sources:  # (examples,) a number for each different source
        number_of: dict[bytes, int] = {}
        sources = (ids.tobytes() for chunk in table["input_ids"].chunks for ids in _id_arrays(chunk))
        groups = numpy.array([number_of.setdefault(source, len(number_of)) for source in sources])
    given = (settings.packed_source_tokens, settings.packed_target_tokens)
    budget = choose_budget(*lengths, *given, groups=groups, names=train["origin"])
    rows = list(_rows(lengths, budget, settings.seed, groups))
    encoded = numpy.concatenate(
        rows if groups is None else [row[numpy.unique(groups[row], return_index=True)[1]] for row in rows]
    )
    tokens = (int(lengths[0][encoded].sum()), int(lengths[1].sum()))
    fills = [total / (len(rows) * room) for total, room in zip(tokens, budget, strict=True)]
    is_poor = any(given) and min(fills) < POORLY_FILLED
    better = choose_budget(*lengths, groups=groups) if is_poor else budget
    vocabularies = vocabulary_sizes(tokenizer)
    largest = {
        name: pyarrow.compute.max(pyarrow.compute.list_flatten(table[name])).as_py()
        for name in ("input_ids", "labels")
    }
    entry = {
        "max_source_tokens": budget.source_tokens,
        "max_target_tokens": budget.target_tokens,
        "rows": len(rows),
        "examples": len(train),
        "source_fill": fills[0],
        "target_fill": fills[1],
        "better_budget": None if better == budget else better,
        "share_sources": settings.share_sources,
        "shared": len(train) - len(encoded),
        "decoder_start_token_id": start_id,
        "decoder_start_from": start_from,
        "pad_token_id": pad_token_id,
        "vocabulary": vocabularies[0],
        "target_vocabulary": vocabularies[1],
        "largest_source_id": max(largest["input_ids"], pad_token_id),
        "largest_target_id": max(largest["labels"], pad_token_id, start_id),
        "positions": int(max(side.max() for side in lengths)),
        "seed": settings.seed,
    }
    if starts:
        entry["language_starts"] = sorted(starts)
    return PackingPlan(train.select_columns(["input_ids", "labels"]), rows, budget, repeats_start, entry)


def _rows(
    lengths: Sequence[numpy.ndarray], budget: Budget, seed: int, groups: numpy.ndarray | None
) -> Iterator[numpy.ndarray]:
    """Only neighbours share a row: in a file larger than memory, examples from all over it would be read one by
    one."""
    for start in range(0, len(lengths[0]), PACKED_TOGETHER):
        neighbours = slice(start, start + PACKED_TOGETHER)
        sides = (side[neighbours] for side in lengths)
        for row in pack(*sides, budget, seed, None if groups is None else groups[neighbours]):
            yield row + start


def packed_table(plan: PackingPlan, scratch: Path) -> Dataset:
    """The packed rows, written to a file in `scratch` some hundred at a time and read from there."""
    tokens = dict.fromkeys(PACKED_COLUMNS[:3], plan.budget.source_tokens)
    tokens |= dict.fromkeys(PACKED_COLUMNS[3:], plan.budget.target_tokens)
    if plan.entry["share_sources"]:
        tokens[SHARED_COLUMN] = plan.budget.target_tokens
    features = {name: List(Value("int32"), length=length) for name, length in tokens.items()}
    examples = Features({"examples": List(Value("int32"))})
    with without_bars(), tqdm(total=len(plan.rows), unit=" rows", desc="Packing train") as bar:

        def assembled(batch: dict[str, list[list[int]]]) -> dict[str, numpy.ndarray]:
            """The columns of some packed rows, each (rows, S) or (rows, T)."""
            bar.update(len(batch["examples"]))
            places = numpy.concatenate(batch["examples"])
            table = plan.ids.with_format("arrow")[places]
            sources, labels = (_id_arrays(table[name].combine_chunks()) for name in ("input_ids", "labels"))
            examples = iter(
                {"input_ids": source, "labels": target[1:], "decoder_start": target[0]}
                if repeats
                else {"input_ids": source, "labels": target}
                for source, target, repeats in zip(sources, labels, plan.repeats_start[places], strict=True)
            )
            settings = [plan.entry[name] for name in ("pad_token_id", "decoder_start_token_id", "share_sources")]
            rows = [assemble_row([next(examples) for _ in row], plan.budget, *settings) for row in batch["examples"]]
            return {name: numpy.stack([row[name] for row in rows]) for name in rows[0]}

        return Dataset.from_dict({"examples": plan.rows}, features=examples).map(
            assembled,
            batched=True,
            batch_size=PACKED_AT_ONCE,
            writer_batch_size=PACKED_AT_ONCE,
            features=Features({**examples, **features}),
            cache_file_name=str(scratch / "rows.arrow"),
            new_fingerprint="packed-train",
        )


def _id_arrays(ids: pyarrow.ListArray) -> list[numpy.ndarray]:
    """Each row's token ids, without a copy of any."""
    values, starts = ids.values.to_numpy(), ids.offsets.to_numpy()
    return [values[start:end] for start, end in zip(starts[:-1], starts[1:], strict=True)]
