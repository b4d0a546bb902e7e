"""The tables of a prepared dataset: each split, and the train split in packed rows.

    source       "Translate English to Korean: Go."     input_ids  [414, 2741, 1]    ends as the tokenizer ends sources
    target       "가."                                  labels     [632, 17, 1]      ends in eos; nothing is padded
    instruction  "Translate English to Korean:"         input "Go."                  origin "tatoeba_eng_kor.tsv:1"

In data of preferences, `target` and `labels` are the chosen answer of a pair, `rejected` and `other_labels` the other.
Marked answers have `mark` (1 or -1), and `other_labels` are the answer to another source of the same split, by which
KTO estimates how far the model is from its reference.

A packed row is one for each that fill_rows.py planned, its columns all of one length, and `examples`, their places in
train.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pyarrow.compute
from datasets import Dataset, DatasetDict, Features, List, Value
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.packing.budgets import choose_budget
from diptych.data_prep.packing.fill_rows import pack
from diptych.data_prep.packing.packed_row import (
    MARKS_COLUMN,
    PACKED_COLUMNS,
    SHARED_COLUMN,
    Budget,
    assemble_row,
    repeated_start,
)
from diptych.data_prep.pipeline.gather_rows import Gathered, taken, written
from diptych.data_prep.pipeline.prepare_settings import PrepareSettings
from diptych.data_prep.pipeline.prepared_folder import without_bars
from diptych.data_prep.pipeline.row_stages import FINAL_COLUMNS, LANGUAGE_FIELDS, NAMES_OF_JUDGED
from diptych.data_prep.rows.named_splits import HELD_OUT
from diptych.data_prep.rows.records import Languages, Preferences, Rejects
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
    gathered: Gathered, places: Mapping[str, numpy.ndarray], scratch: Path, settings: PrepareSettings
) -> DatasetDict:
    """FINAL_COLUMNS of the rows of each split, those of preferences, and those of `keep_columns`, written to a file in
    `scratch` and mapped from there. The columns of languages are left out where no row has one."""
    tables, examples = DatasetDict(), gathered.examples
    empty = [name for name in LANGUAGE_FIELDS if pyarrow.compute.unique(examples[name]).to_pylist() == [""]]
    columns = [name for name in FINAL_COLUMNS if len(empty) < len(LANGUAGE_FIELDS) or name not in empty]
    for name, rows in places.items():
        path = scratch / f"{name.replace('/', '.')}.arrow"
        kind = _preferences_of(gathered, rows)
        own = {"pairs": ["other_labels", "rejected"], "marks": ["mark"]}.get(kind, [])
        selected = examples.select([*columns, *own, *settings.kept])
        batches, schema = taken(selected, rows), selected.schema
        if kind == "marks":
            others = rows[_other_sources(gathered.column("source_key")[rows], name, settings.seed)]
            labels = Dataset(examples.select(["labels"])).with_format("arrow")
            batches = _with_other_labels(batches, labels, others)
            schema = schema.append(schema.field("labels").with_name("other_labels"))
        written(batches, schema, path)
        tables[name] = Dataset.from_file(str(path))
    return tables


def _preferences_of(gathered: Gathered, rows: numpy.ndarray) -> Preferences | None:
    """What the rows of a split say of their answers: all say the same, and a test set may say nothing."""
    kind = gathered.preferences
    column = {"pairs": "rejected", "marks": "mark"}.get(kind)
    return kind if kind and gathered.examples[column][int(rows[0])].as_py() else None


def _other_sources(source_keys: numpy.ndarray, split: str, seed: int) -> numpy.ndarray:
    """(rows,) for each row the place of one with another source, drawn from `seed`: in a drawn order of all rows, the
    next one that has another."""
    order = numpy.random.default_rng(seed).permutation(len(source_keys))
    keys = source_keys[order]
    last_of_run = numpy.flatnonzero(keys != numpy.roll(keys, -1))
    if not len(last_of_run):
        remedy = f"Hold out more (--{split}_fraction 0.2), or nothing (0)." if split in HELD_OUT else "Add others."
        raise UserError(
            f"all rows of {split} have one source, and each marked answer goes with the answer to another. {remedy}"
        )
    run = numpy.searchsorted(last_of_run, numpy.arange(len(order))) % len(last_of_run)
    others = numpy.empty_like(order)
    others[order] = order[(last_of_run[run] + 1) % len(order)]
    return others


def _with_other_labels(
    batches: Iterator[pyarrow.RecordBatch], labels: Dataset, others: numpy.ndarray
) -> Iterator[pyarrow.RecordBatch]:
    """The batches with one column more: `labels` at the places `others`."""
    start = 0
    for batch in batches:
        found = labels[others[start : start + batch.num_rows]]["labels"].combine_chunks()
        start += batch.num_rows
        yield batch.append_column("other_labels", found)


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
    """For source and target, and the rejected answers of pairs: percentiles of the lengths before cutting, and how
    many rows were over the limit."""
    rows = numpy.concatenate(list(places.values()))
    sides = {"source": settings.max_source_tokens, "target": settings.max_target_tokens}
    names = {"source": ("source",), "target": ("target", *NAMES_OF_JUDGED.values()), "rejected": ("rejected answer",)}
    if gathered.preferences == "pairs":
        sides["rejected"] = settings.max_target_tokens
    counts = {}
    for side, limit in sides.items():
        tokens = gathered.column(f"{side}_tokens")[rows]
        tokens = tokens[tokens > 0]  # rows of a test set may be no pairs
        percentiles = {f"p{p}": int(numpy.percentile(tokens, p, method="higher")) for p in PERCENTILES}
        counts[side] = {
            **percentiles,
            "total": int(tokens.sum()),
            "limit": limit,
            "cut": int((tokens > limit).sum()),
            "dropped": sum(rejects.kinds[f"{name} over the limit"] for name in names[side]),
        }
    return counts


def judged_counts(gathered: Gathered, places: Mapping[str, numpy.ndarray]) -> dict[str, int] | None:
    """Of all splits: how many pairs there are, and in how many of them each answer is the longer one; or how many
    answers are liked, and how many are not. None for plain data."""
    rows, kind = numpy.concatenate(list(places.values())), gathered.preferences
    if kind == "marks":
        marks = gathered.column("mark")[rows]
        return {"liked": int((marks > 0).sum()), "not_liked": int((marks < 0).sum())}
    if kind is None:
        return None
    chosen, rejected = (gathered.column(f"{side}_tokens")[rows] for side in ("target", "rejected"))
    is_pair = rejected > 0
    longer = {"chosen_longer": chosen > rejected, "rejected_longer": chosen < rejected}
    return {"pairs": int(is_pair.sum()), **{name: int((is_pair & it).sum()) for name, it in longer.items()}}


@dataclass(frozen=True)
class PackingPlan:
    """What stands in each packed row of the train split, before any is written."""

    ids: Dataset
    """`input_ids` and `labels` of the train split, and what else says of its answers."""
    rows: list[numpy.ndarray]
    """For each packed row, the places of its examples in the train split."""
    budget: Budget
    repeats_start: numpy.ndarray
    """(examples, answers) whether the first label is what the decoder starts with, which is then left out. There is
    one answer, or two in data of preferences."""
    entry: dict[str, Any]
    """What manifest.json says of it."""

    @property
    def answers(self) -> int:
        """Of each example: that many decoder segments, one after the other."""
        return self.repeats_start.shape[1]

    def segments(self, table: pyarrow.Table, repeats_start: numpy.ndarray) -> Iterator[dict[str, Any]]:
        """Each answer of some of `ids`, as `assemble_row` takes examples."""
        names = ("input_ids", "labels", "other_labels")[: 1 + self.answers]
        columns = (_id_arrays(table[name].combine_chunks()) for name in names)
        marks = table["mark"].to_numpy() if "mark" in table.column_names else None
        for place, (source, *answers) in enumerate(zip(*columns, strict=True)):
            own = [1, -1] if marks is None else [int(marks[place]), 0]
            for answer, mark, repeats in zip(answers, own, repeats_start[place], strict=False):
                example = {"input_ids": source, "labels": answer[1:] if repeats else answer}
                example |= {"decoder_start": answer[0]} if repeats else {}
                yield example | ({"mark": mark} if self.answers > 1 else {})


def plan_packing(
    train: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: PrepareSettings,
    preferences: Preferences | None = None,
) -> PackingPlan:
    table, pad_token_id, starts = train.data.table, padding_id(tokenizer), codes_of(tokenizer).starts
    decoder_start = decoder_start_of(settings.tokenizer, settings.decoder_start_token_id)
    start_id, start_from = decoder_start or (target_side(tokenizer).pad_token_id, "assumed")
    answers = ("labels", "other_labels") if preferences else ("labels",)
    firsts = [pyarrow.compute.list_element(table[name], 0).to_numpy() for name in answers]
    repeats_start = numpy.stack([repeated_start(first, start_id, starts) for first in firsts], axis=1)
    source_tokens, *of_answers = (
        pyarrow.compute.list_value_length(table[name]).to_numpy() for name in ("input_ids", *answers)
    )
    answer_tokens = numpy.stack(of_answers, axis=1) - repeats_start
    lengths = (source_tokens, answer_tokens.sum(axis=1))
    groups, share_sources = None, settings.share_sources or preferences is not None
    if share_sources:  # (examples,) a number for each different source
        number_of: dict[bytes, int] = {}
        sources = (ids.tobytes() for chunk in table["input_ids"].chunks for ids in _id_arrays(chunk))
        groups = numpy.array([number_of.setdefault(source, len(number_of)) for source in sources])
    given = (settings.packed_source_tokens, settings.packed_target_tokens)
    longest = int(lengths[1].argmax())
    if preferences and given[1] and lengths[1][longest] > given[1]:
        raise UserError(
            f"{train['origin'][longest]}: its two answers have {lengths[1][longest]:,} tokens together, and a packed"
            f" row has room for {given[1]:,}. Give packed_target_tokens >= {lengths[1][longest]}, or"
            f" max_target_tokens <= {given[1] // 2} to leave out what is longer."
        )
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
        for name in ("input_ids", *answers)
    }
    entry = {
        "max_source_tokens": budget.source_tokens,
        "max_target_tokens": budget.target_tokens,
        "rows": len(rows),
        "examples": len(train),
        "source_fill": fills[0],
        "target_fill": fills[1],
        "better_budget": None if better == budget else better,
        "share_sources": share_sources,
        "shared": len(train) - len(encoded),
        "decoder_start_token_id": start_id,
        "decoder_start_from": start_from,
        "pad_token_id": pad_token_id,
        "vocabulary": vocabularies[0],
        "target_vocabulary": vocabularies[1],
        "largest_source_id": max(largest["input_ids"], pad_token_id),
        "largest_target_id": max(pad_token_id, start_id, *(largest[name] for name in answers)),
        "positions": int(max(source_tokens.max(), answer_tokens.max())),
        "seed": settings.seed,
    }
    if starts:
        entry["language_starts"] = sorted(starts)
    columns = ["input_ids", *answers, *(["mark"] if preferences == "marks" else [])]
    return PackingPlan(train.select_columns(columns), rows, budget, repeats_start, entry)


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
    if plan.answers > 1:
        tokens[MARKS_COLUMN] = plan.budget.target_tokens
    features = {name: List(Value("int32"), length=length) for name, length in tokens.items()}
    examples = Features({"examples": List(Value("int32"))})
    with without_bars(), tqdm(total=len(plan.rows), unit=" rows", desc="Packing train") as bar:

        def assembled(batch: dict[str, list[list[int]]]) -> dict[str, numpy.ndarray]:
            """The columns of some packed rows, each (rows, S) or (rows, T)."""
            bar.update(len(batch["examples"]))
            places = numpy.concatenate(batch["examples"])
            table = plan.ids.with_format("arrow")[places]
            settings = [plan.entry[name] for name in ("pad_token_id", "decoder_start_token_id", "share_sources")]
            examples = plan.segments(table, plan.repeats_start[places])
            rows = [
                assemble_row([next(examples) for _ in range(len(row) * plan.answers)], plan.budget, *settings)
                for row in batch["examples"]
            ]
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
