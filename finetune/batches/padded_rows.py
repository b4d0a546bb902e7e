"""A prepared dataset in; the rows of every optimizer step, dealt to ranks and micro-batches, and padded tensors out.

    rows    input_ids          12  7  9  1   →   attention_mask      1  1  1  1     labels              31 40  1
                                5  8  1                              1  1  1  0                         22  1 -100
            labels             31 40  1          input_ids          12  7  9  1     decoder_input_ids    0 31 40
                               22  1                                 5  8  1  0                          0 22  1

The order of rows depends on (seed, epoch) alone: any step can be computed from its number, on any rank. So a resumed
run replays nothing, and a step's target tokens are known before its first forward without asking other ranks. Every
row comes once in an epoch: the last batches are smaller, and a rank for which no row is left gets a row without
targets, which contributes zero.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diptych.data_prep.command_line.errors import UserError, library_errors
from diptych.data_prep.packing.packed_row import repeated_start
from diptych.data_prep.rows.records import IGNORE_INDEX
from diptych.data_prep.text_to_ids.two_vocabularies import all_tokens
from diptych.finetune.model.families import embedding_rows, table_positions
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.untrusted_files import open_prepared

OTHER_LABELS = "other_labels"
"""The second answer of a row with preferences."""
BATCHES_SORTED_TOGETHER = 50
"""Rows are sorted by length within so many batches: enough for little padding, and another mix each epoch."""


def pad_batch(
    rows: Sequence[Mapping[str, Any]], pad_token_id: int, decoder_start_token_id: int
) -> dict[str, torch.Tensor]:
    """Rows with `input_ids` and `labels`, of different lengths, as the tensors (B, S) and (B, T) shown above.

    Decoder inputs are the labels, one place to the right. There is no decoder_attention_mask: padding stands after all
    targets, where causal attention never looks. A row may bring its own `decoder_start`. No rows give one row without
    targets.
    """
    rows = rows or [{"input_ids": [decoder_start_token_id], "labels": [IGNORE_INDEX]}]
    targets = pad_targets(rows, pad_token_id, decoder_start_token_id)
    return pad_sources([row["input_ids"] for row in rows], pad_token_id) | targets


def pad_targets(
    rows: Sequence[Mapping[str, Any]], pad_token_id: int, decoder_start_token_id: int
) -> dict[str, torch.Tensor]:
    """The decoder's half of `pad_batch`, (B, T)."""
    labels = [torch.as_tensor(row["labels"], dtype=torch.long) for row in rows]
    labels = pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)
    decoder_input_ids = labels.roll(1, dims=1)
    decoder_input_ids[:, 0] = torch.tensor([row.get("decoder_start", decoder_start_token_id) for row in rows])
    decoder_input_ids[decoder_input_ids == IGNORE_INDEX] = pad_token_id
    return {"decoder_input_ids": decoder_input_ids, "labels": labels}


def pad_sources(source_ids: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """`[[5, 6, 1], [7, 1]]` -> input_ids `[[5, 6, 1], [7, 1, 0]]`, attention_mask `[[1, 1, 1], [1, 1, 0]]`, (B, S).

    Always on the right, whatever the tokenizer's padding_side: BART counts positions from the row's start.
    """
    rows = [torch.as_tensor(ids, dtype=torch.long) for ids in source_ids]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    mask = pad_sequence([torch.ones_like(ids) for ids in rows], batch_first=True)
    return {"input_ids": input_ids, "attention_mask": mask}


@dataclass(frozen=True)
class PaddedRows:
    """Rows of one example each."""

    split: datasets.Dataset
    pad_token_id: int
    decoder_start_token_id: int
    row_tokens: int | None = None
    """Source and target tokens of each row as a tensor; None where it depends on the rows beside it."""

    @property
    def lengths(self) -> "RowLengths":
        return row_lengths(self.split)

    def tensors(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        columns = self.split[rows]
        names = [name for name in ("input_ids", "labels", "decoder_start") if name in columns]
        picked = [dict(zip(names, row, strict=True)) for row in zip(*(columns[name] for name in names), strict=True)]
        return pad_batch(picked, self.pad_token_id, self.decoder_start_token_id)


def padded_rows(loaded: LoadedModel, split: datasets.Dataset) -> PaddedRows:
    return PaddedRows(split, loaded.pad_token_id, loaded.decoder_start_token_id)


class PreparedData(NamedTuple):
    """A prepared folder: its splits, where it and its tokenizer lie, and the hash of its manifest."""

    folder: Path
    splits: Mapping[str, datasets.Dataset]
    tokenizer_folder: Path
    fingerprint: str
    packing: Mapping[str, Any] | None
    """What the manifest says of the packed rows, if there are any."""
    preferences: str | None = None
    """pairs, or marks, where rows have preferences."""


def open_splits(folder: str | Path) -> Mapping[str, datasets.Dataset]:
    """The splits of a prepared folder. UserError if it is none."""
    if not (Path(folder) / "dataset_dict.json").is_file():
        raise UserError(
            f"{folder} is no prepared dataset (it has no dataset_dict.json). Make one with `diptych prepare`."
        )
    return open_prepared(folder)


def load_prepared(folder: str) -> PreparedData:
    place, splits = Path(folder), open_splits(folder)
    if "train" not in splits or not len(splits["train"]):
        raise UserError(
            f"{folder} has no rows to train on: it is for evaluation alone, with {', '.join(splits)}. Prepare a "
            f"folder with --data."
        )
    manifest = place / "manifest.json"
    if not manifest.is_file():
        raise UserError(f"{folder} has no manifest.json, so its preparation did not end. Run `diptych prepare` again.")
    content = manifest.read_bytes()
    with library_errors(f"{manifest} cannot be read", "Run `diptych prepare` again."):
        entries = json.loads(content)
        found = entries.get("packing"), entries.get("preferences")
    return PreparedData(place, splits, place / "tokenizer", hashlib.sha256(content).hexdigest(), *found)


def check_same_tokenizer(
    data: str, prepared: PreTrainedTokenizerBase, name: str, other: PreTrainedTokenizerBase, may_grow: bool = False
) -> None:
    """UserError if the rows of `data`, which are token ids, would be other words to `other`, the tokenizer of `name`.
    With `may_grow` the rows may also have tokens that were added to it."""
    ours, theirs = all_tokens(prepared), all_tokens(other)
    if ours != theirs and not (may_grow and theirs.items() <= ours.items()):
        raise UserError(
            f"{data} was prepared with another tokenizer ({len(prepared)} tokens) than that of {name} ({len(other)} "
            f"tokens). Prepare the data again with --tokenizer {name}; or, if it is the same with tokens added, train "
            f"with grow_vocabulary."
        )


def drop_repeated_start(
    split: datasets.Dataset, decoder_start_token_id: int, language_starts: Collection[int] = ()
) -> datasets.Dataset:
    """The split with labels that do not begin with the token that the decoder starts with anyway, as in packed rows.

    (BART keeps its bos, since its decoder starts with eos.) With `language_starts` (mBART-cc25), the column
    `decoder_start` has the start of each row.
    """
    repeats = {}
    for name in label_columns(split):
        labels = split.select_columns(name).with_format("arrow")[:][name]
        first_labels = pc.list_element(labels, 0).to_numpy()
        repeats[name] = repeated_start(first_labels, decoder_start_token_id, language_starts)
    if not any(of_column.any() for of_column in repeats.values()):
        return split

    def without_start(row: Mapping[str, Any], place: int) -> dict[str, Any]:
        start = row["labels"][0] if repeats["labels"][place] else decoder_start_token_id
        others = {name: row[name][int(repeats[name][place]) :] for name in repeats}
        return others | ({"decoder_start": start} if language_starts else {})

    return split.map(without_start, with_indices=True, keep_in_memory=True, load_from_cache_file=False)


def label_columns(split: datasets.Dataset) -> list[str]:
    return [name for name in ("labels", OTHER_LABELS) if name in split.column_names]


class RowLengths(NamedTuple):
    """Tokens of every row of a split, each (rows,)."""

    source_tokens: np.ndarray
    target_tokens: np.ndarray


def row_lengths(split: datasets.Dataset, labels: str = "labels") -> RowLengths:
    """Target tokens are those of `labels`."""
    source_tokens, target_tokens = [], []
    for table in split.with_format("arrow").iter(batch_size=10_000):
        source_tokens.append(pc.list_value_length(table["input_ids"]).to_numpy())
        tokens = pc.list_value_length(table[labels]).to_numpy()
        is_target = pc.list_flatten(table[labels]).to_numpy() != IGNORE_INDEX
        target_tokens.append(np.add.reduceat(is_target, tokens.cumsum() - tokens, dtype=np.int64))
    return RowLengths(np.concatenate(source_tokens), np.concatenate(target_tokens))


class Items(NamedTuple):
    """What losses of preferences are divided by: examples (pairs, or marked answers), and the target tokens of chosen
    or liked answers. Of each row of a split, (rows,), or of an optimizer step."""

    examples: Any
    chosen_tokens: Any


class StepRows(NamedTuple):
    """The rows of one optimizer step, and their tokens."""

    batches: list[list[np.ndarray]]
    """Row numbers: batches[micro_batch][rank]."""
    source_tokens: int
    target_tokens: int
    padded_tokens: int
    """Size of these rows as tensors: longest row × rows, source and target, over all batches."""
    preferences: Items | None = None

    @property
    def num_items_in_batch(self) -> int | Items:
        """What the step's losses are divided by."""
        return self.preferences or self.target_tokens

    @property
    def weight(self) -> int:
        """Of the step's loss in a mean over steps."""
        return self.preferences.examples if self.preferences else self.target_tokens


@dataclass(frozen=True)
class BatchOrder:
    """Which rows stand in which step of which epoch."""

    lengths: RowLengths
    rows_per_batch: int
    """Rows on one rank in one micro-batch."""
    ranks: int
    batches_per_step: int
    """Micro-batches whose gradients are added up before an optimizer step."""
    seed: int
    group_by_length: bool = False
    row_tokens: int | None = None
    """Source and target tokens of each row as a tensor, where all have one length (packed rows)."""
    preferences: Items | None = None
    """Of each row, where rows have preferences."""

    @property
    def rows_per_step(self) -> int:
        return self.rows_per_batch * self.ranks * self.batches_per_step

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths.target_tokens) // self.rows_per_step)

    def rows_of(self, epoch: int) -> np.ndarray:
        """All rows in the order of this epoch."""
        generator = np.random.default_rng([self.seed, epoch])
        rows = generator.permutation(len(self.lengths.target_tokens))
        if not self.group_by_length:
            return rows
        together = self.rows_per_batch * self.ranks  # what the ranks compute at the same time
        tokens = self.lengths.source_tokens + self.lengths.target_tokens
        pools = np.split(
            rows, range(together * BATCHES_SORTED_TOGETHER, len(rows), together * BATCHES_SORTED_TOGETHER)
        )
        rows = np.concatenate([pool[np.argsort(tokens[pool], kind="stable")] for pool in pools])
        whole = len(rows) // together * together
        batches = rows[:whole].reshape(-1, together)
        return np.concatenate([batches[generator.permutation(len(batches))].reshape(-1), rows[whole:]])

    def step(self, rows: np.ndarray, index: int) -> StepRows:
        """Step `index` of an epoch whose rows are `rows`. Where rows run out, each rank gets its even share."""
        rows = rows[index * self.rows_per_step : (index + 1) * self.rows_per_step]
        together = self.rows_per_batch * self.ranks
        batches = [  # 7 rows on 2 ranks: [0 1 2] and [3 4 5 6]
            np.split(batch, [len(batch) * rank // self.ranks for rank in range(1, self.ranks)])
            for batch in (rows[start : start + together] for start in range(0, len(rows), together))
        ]
        source_tokens, target_tokens = self.lengths
        padded = sum(
            len(dealt) * (self.row_tokens or int(source_tokens[dealt].max() + target_tokens[dealt].max()))
            for batch in batches
            for dealt in batch
            if len(dealt)
        )
        counts = self.preferences and Items(*(int(of_rows[rows].sum()) for of_rows in self.preferences))
        return StepRows(batches, int(source_tokens[rows].sum()), int(target_tokens[rows].sum()), padded, counts)


def check_targets(splits: Mapping[str, datasets.Dataset]) -> None:
    """UserError that names the first row whose labels are empty, or left out of the loss throughout."""
    columns = [(name, split, column) for name, split in splits.items() for column in label_columns(split)]
    for name, split, column in columns:
        first = 0
        for table in split.select_columns(column).with_format("arrow").iter(batch_size=10_000):
            rows, labels = (call(table[column]) for call in (pc.list_parent_indices, pc.list_flatten))
            targets = np.bincount(rows.to_numpy()[labels.to_numpy() != IGNORE_INDEX], minlength=len(table))
            if not targets.all():
                raise UserError(
                    f"split {name}, row {first + np.argmin(targets)}: its {column} hold no target, so there is nothing"
                    f" to learn. Take the row out, and run `diptych prepare` again."
                )
            first += len(table)


def check_rows_fit(model: PreTrainedModel, splits: Mapping[str, datasets.Dataset]) -> None:
    """UserError for rows that this model cannot read: unknown token ids, or more tokens than it has positions; and for
    rows without a target."""
    check_ids_fit(splits, embedding_rows(model), table_positions(model))


def check_ids_fit(
    splits: Mapping[str, datasets.Dataset], tokens: tuple[int, int], tables: Sequence[int | None]
) -> None:
    """As `check_rows_fit`, for a model of so many tokens and positions on each side."""
    check_targets(splits)
    source_rows, target_rows = tokens
    for name, split in splits.items():
        labels = label_columns(split)
        for column, rows in {"input_ids": source_rows, **dict.fromkeys(labels, target_rows)}.items():
            for table in split.with_format("arrow").iter(batch_size=10_000):
                ids = pc.list_flatten(table[column]).to_numpy()
                unknown = ids[(ids >= rows) | ((ids < 0) & ((ids != IGNORE_INDEX) | (column == "input_ids")))]
                if not len(unknown):
                    continue
                raise UserError(
                    f"split {name} holds token id {unknown.max()}, but the model has {rows} embedding rows for"
                    f" {column}. Prepare the data with the model's own tokenizer."
                )
        lengths = [("input_ids", tables[0], row_lengths(split).source_tokens)]
        lengths += [(column, tables[1], row_lengths(split, column).target_tokens) for column in labels]
        for column, positions, tokens in lengths:
            if positions is not None and tokens.max() > positions:
                limit = "max_source_tokens" if column == "input_ids" else "max_target_tokens"
                raise UserError(
                    f"split {name} has a row with {tokens.max()} {column}, but the model has {positions} positions. "
                    f"Prepare the data with {limit} <= {positions}."
                )
