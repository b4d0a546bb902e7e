"""Packed rows of a prepared folder: checked against the model that is to read them, and as tensors.

    input_ids     12  7  9  1 |  5  8  1 |  0      labels              31 40  1 | 22  1 | -100
    segment_ids    1  1  1  1 |  2  2  2 |  0      decoder_input_ids    0 31 40 |  0 22 |    0
    position_ids   0  1  2  3 |  0  1  2 |  0      decoder_segment_ids  1  1  1 |  2  2 |    0

A row in which examples see each other, or a label in padding, would spoil training without an error. So every row is
checked before the first step.

R rows, S source tokens, T target tokens; S and T are the same in every row.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from transformers import PreTrainedModel

from diptych.data_prep.command_line.errors import UserError, library_errors
from diptych.data_prep.packing.packed_row import MARKS_COLUMN, PACKED_COLUMNS, SHARED_COLUMN, Budget, assemble_row
from diptych.data_prep.rows.records import IGNORE_INDEX
from diptych.finetune.batches.padded_rows import RowLengths
from diptych.finetune.model.families import decoder_start_token, embedding_rows, table_positions
from diptych.finetune.model.untrusted_files import open_prepared

SOURCE_COLUMNS = ("input_ids", "segment_ids", "position_ids")
DECODER_COLUMNS = ("decoder_input_ids", "decoder_segment_ids", "decoder_position_ids")
FURTHER_COLUMNS = (SHARED_COLUMN, MARKS_COLUMN)
TARGET_COLUMNS = tuple(name for name in PACKED_COLUMNS if name not in SOURCE_COLUMNS)
REFERENCE = "reference"
"""(answers of the row,): their log-probabilities by the reference model, where rows have preferences."""
ROWS_AT_ONCE = 1000

Columns = Mapping[str, np.ndarray]


class Packing(NamedTuple):
    """What rows were packed for, by the manifest."""

    max_source_tokens: int
    max_target_tokens: int
    share_sources: bool
    pad_token_id: int
    decoder_start_token_id: int
    vocabulary: int
    """One more than the largest id of the tokenizer; of its source side where it has two vocabularies."""
    positions: int
    """One more than the largest position in a row."""
    language_starts: Sequence[int] = ()
    """Language codes that an example may start with instead (mBART-cc25)."""
    target_vocabulary: int = 0
    """`vocabulary` of the target side."""

    @classmethod
    def from_manifest(cls, entry: Mapping[str, Any]) -> "Packing":
        with library_errors("packing in manifest.json is not what was written", "Run `diptych prepare` again."):
            packing = cls(**{it: entry[it] for it in cls._fields if it in entry or it not in cls._field_defaults})
            for value in (*packing[:7], *packing.language_starts, packing.target_vocabulary):
                operator.index(value)  # TypeError for what is no whole number
        return packing


def load_packed(folder: Path) -> datasets.Dataset:
    """`packed/` of a prepared folder, with columns as numpy arrays."""
    table = open_prepared(folder / "packed")
    names = [name for name in (*PACKED_COLUMNS, *FURTHER_COLUMNS, "attention_mask") if name in table.column_names]
    if missing := [name for name in PACKED_COLUMNS if name not in names]:
        raise UserError(f"{folder / 'packed'} has no column {missing[0]}. Run `diptych prepare` again.")
    return table.select_columns(names).with_format("numpy")


@dataclass(frozen=True)
class PackedRows:
    """Rows of several examples each, all of one shape."""

    packed: datasets.Dataset
    packing: Packing
    rows_at_least: int = 1
    """In a batch: the last one of an epoch is filled up with empty rows, because a compiled model wants one shape."""

    @property
    def row_tokens(self) -> int:
        return self.packing.max_source_tokens + self.packing.max_target_tokens

    @property
    def lengths(self) -> RowLengths:
        """Tokens of every row, padding left out."""
        source, target = [], []
        for start in range(0, len(self.packed), ROWS_AT_ONCE):
            columns = self.packed[start : start + ROWS_AT_ONCE]
            source.append((columns["segment_ids"] > 0).sum(1))
            target.append((columns["labels"] != IGNORE_INDEX).sum(1))
        return RowLengths(np.concatenate(source), np.concatenate(target))

    def tensors(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        batch = packed_batch(self.packed[rows]) if len(rows) else {}
        missing, shape = self.rows_at_least - len(rows), self.packing
        if missing <= 0:
            return batch
        # Rows of padding, whose loss is zero: also for a rank for which no row is left.
        empty = {name: torch.zeros((missing, shape.max_source_tokens), dtype=torch.long) for name in SOURCE_COLUMNS}
        empty |= {name: torch.zeros((missing, shape.max_target_tokens), dtype=torch.long) for name in TARGET_COLUMNS}
        empty["labels"].fill_(IGNORE_INDEX)
        for name in ("input_ids", "decoder_input_ids"):
            empty[name].fill_(shape.pad_token_id)
        empty |= {name: empty["decoder_segment_ids"] for name in FURTHER_COLUMNS if name in self.packed.column_names}
        whole = {name: torch.cat((batch[name], column)) if batch else column for name, column in empty.items()}
        return batch | whole


def packed_batch(rows: Columns) -> dict[str, torch.Tensor]:
    """Columns of some rows, (R, S) or (R, T) -> the same as tensors, int64."""
    names = [name for name in (*PACKED_COLUMNS, *FURTHER_COLUMNS) if name in rows]
    batch = {name: torch.as_tensor(np.asarray(rows[name]), dtype=torch.long) for name in names}
    return batch | ({REFERENCE: torch.as_tensor(np.concatenate(rows[REFERENCE]))} if REFERENCE in rows else {})


def pack_examples(
    examples: Sequence[Mapping[str, Any]], pad_token_id: int, decoder_start_token_id: int, share_sources: bool = False
) -> dict[str, torch.Tensor]:
    """These examples, each with `input_ids` and `labels`, as one packed row that has no padding."""
    sources = [tuple(example["input_ids"]) for example in examples]
    budget = Budget(
        sum(map(len, set(sources) if share_sources else sources)), sum(len(example["labels"]) for example in examples)
    )
    row = assemble_row(examples, budget, pad_token_id, decoder_start_token_id, share_sources)
    return packed_batch({name: column[None] for name, column in row.items()})


def check_packing_fits(model: PreTrainedModel, packing: Packing, folder: str) -> None:
    """UserError where rows were packed for another model: both values are in it."""
    start = decoder_start_token(model)
    if packing.decoder_start_token_id != start:
        raise UserError(
            f"{folder} was packed for a decoder that starts with token {packing.decoder_start_token_id}, but this "
            f"model's starts with {start}. Prepare the data again with --decoder_start_token_id {start}, or train on "
            f"its rows as they are, with --packed false."
        )
    for tokens, rows in zip((packing.vocabulary, packing.target_vocabulary), embedding_rows(model), strict=True):
        if tokens > rows:
            raise UserError(
                f"{folder} was packed with a vocabulary of {tokens} tokens, but this model has {rows} embedding rows. "
                f"Prepare the data again with the model's own tokenizer."
            )
    limit = min(filter(None, table_positions(model)), default=None)
    if limit is not None and packing.positions > limit:
        raise UserError(
            f"{folder} holds examples of {packing.positions} positions, but this model has {limit}. Prepare the data "
            f"again with --max_source_tokens {limit} --max_target_tokens {limit}."
        )


def check_packed_rows(packed: datasets.Dataset, packing: Packing, model: PreTrainedModel, folder: str) -> None:
    """UserError that names the first row that is not packed as shown above."""
    positions, vocabularies = min(filter(None, table_positions(model)), default=None), embedding_rows(model)
    for start in range(0, len(packed), ROWS_AT_ONCE):
        columns = packed[start : start + ROWS_AT_ONCE]
        for is_wrong, reason in _faults(columns, packing, positions, vocabularies):
            if is_wrong.any():
                row = start + int(np.argmax(is_wrong))
                raise UserError(f"{folder}/packed, row {row}: {reason}. Run `diptych prepare` again.")


def _faults(
    columns: Columns, packing: Packing, positions: int | None, vocabularies: tuple[int, int]
) -> Iterator[tuple[np.ndarray, str]]:
    """What can be wrong with rows: (R,) whether it is, and how to say it. Later checks rely on the earlier ones."""
    sizes = packing.max_source_tokens, packing.max_target_tokens
    length_of = dict.fromkeys(SOURCE_COLUMNS, sizes[0])
    length_of |= dict.fromkeys((*TARGET_COLUMNS, *FURTHER_COLUMNS), sizes[1])
    wrong = [[len(row) != size for row in columns[name]] for name, size in length_of.items() if name in columns]
    yield np.any(wrong, axis=0), f"it is not {sizes[0]} + {sizes[1]} tokens long"
    for names, size, vocabulary in zip((SOURCE_COLUMNS, DECODER_COLUMNS), sizes, vocabularies, strict=True):
        ids, segments, places = (columns[name] for name in names)
        limit = size if positions is None else min(size, positions)
        yield _misnumbered(segments), f"{names[1]} do not count 1, 2, 3 … with 0 at the end alone"
        yield (places >= limit).any(1), f"{names[2]} run past the limit of {limit} positions"
        yield _misplaced(segments, places), f"{names[2]} do not restart at 0 in each segment"
        unknown = f"{names[0]} hold a token that is none of the {vocabulary} that the model has"
        yield ((ids < 0) | (ids >= vocabulary)).any(1), unknown
    source, target, labels = columns["segment_ids"], columns["decoder_segment_ids"], columns["labels"]
    if "attention_mask" in columns:  # rows that others packed may have one; ours have segments alone
        yield ((source > 0) != (columns["attention_mask"] > 0)).any(1), "segment_ids do not match attention_mask"
    is_target = labels != IGNORE_INDEX
    yield ((target == 0) & is_target).any(1), "a label stands in a padding slot"
    yield ~is_target.any(1), "no label is a target, so there is nothing to learn"
    unknown = f"labels hold a token that is none of the {vocabularies[1]} that the model has"
    yield (is_target & ((labels < 0) | (labels >= vocabularies[1]))).any(1), unknown
    starts = [packing.decoder_start_token_id, *packing.language_starts]
    wrong_start = f"decoder_input_ids do not begin with the start token {starts[0]} in each segment"
    yield (_begins(target) & ~np.isin(columns["decoder_input_ids"], starts)).any(1), wrong_start
    read = columns.get(SHARED_COLUMN, target)
    goes_back = (np.maximum.accumulate(read, axis=1) > read) & (target > 0)
    misread = goes_back.any(1) | (read.max(1) > source.max(1)) | ((read > 0) != (target > 0)).any(1)
    yield misread, "decoder segments do not read the encoder segments one after another"
    if MARKS_COLUMN in columns:
        marks, is_second = columns[MARKS_COLUMN], (target > 0) & (target % 2 == 0)
        yield (target.max(1) % 2 > 0), "its answers do not come in pairs"
        first = np.where(_begins(target) & ~is_second, marks, 0)  # the mark of a pair's first answer
        yield (np.abs(marks) > 1).any(1) | ((marks != 0) & ~is_target).any(1), "marks are not 1, 0 and -1 of answers"
        same = (target[:, 1:] == target[:, :-1]) | _begins(target)[:, 1:] & ~is_second[:, 1:] | (target[:, 1:] == 0)
        yield ((read[:, 1:] != read[:, :-1]) & ~same).any(1), "the answers of a pair do not read one source"
        changed = (marks[:, 1:] != marks[:, :-1]) & (target[:, 1:] == target[:, :-1])
        yield changed.any(1) | ((first == 0) & _begins(target) & ~is_second).any(1), "an answer has no mark of its own"


def _begins(segments: np.ndarray) -> np.ndarray:
    """Where a segment, not padding, begins: (R, L)."""
    before = np.pad(segments, ((0, 0), (1, 0)))[:, :-1]
    return (segments != before) & (segments > 0)


def _misnumbered(segments: np.ndarray) -> np.ndarray:
    is_padding = segments == 0
    resumes = is_padding[:, :-1] & ~is_padding[:, 1:]
    return resumes.any(1) | (np.where(is_padding, 0, _begins(segments).cumsum(1)) != segments).any(1)


def _misplaced(segments: np.ndarray, positions: np.ndarray) -> np.ndarray:
    index = np.arange(segments.shape[1])
    starts = np.maximum.accumulate(np.where(_begins(segments), index, 0), axis=1)
    return (np.where(segments > 0, index - starts, 0) != positions).any(1)
