"""Rows in which two answers read one source, as tensors.

    input_ids      12  7  9  1      →      labels   31 40  1     marks   1   source_rows   0     chosen
    labels         31 40  1                         31 22  1            -1                 0     rejected
    other_labels   31 22  1

A row of a split has its second answer in `other_labels`: the rejected one or, where answers are marked one by one
(`mark`), the answer to another source. In packed rows they are two decoder segments, one after the other. The column
`reference` has the log-probabilities of a row's answers by the reference model, see preferences/reference.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import torch

from diptych.data_prep.packing.packed_row import MARKS_COLUMN
from diptych.finetune.batches.packed_rows import REFERENCE, ROWS_AT_ONCE, PackedRows
from diptych.finetune.batches.padded_rows import (
    OTHER_LABELS,
    Items,
    PaddedRows,
    RowLengths,
    pad_sources,
    pad_targets,
    row_lengths,
)
from diptych.finetune.model.families import SOURCE_ROWS
from diptych.finetune.model.loaded_model import LoadedModel

MARK = "mark"
ANSWERS = 2


@dataclass(frozen=True)
class PairedRows(PaddedRows):
    """Padded rows of one source and two answers: B rows are input_ids (B, S) and labels (2 · B, T)."""

    @property
    def lengths(self) -> RowLengths:
        """Target tokens of both answers."""
        lengths = row_lengths(self.split)
        return lengths._replace(
            target_tokens=lengths.target_tokens + row_lengths(self.split, OTHER_LABELS).target_tokens
        )

    def tensors(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        if not len(rows):
            return super().tensors(rows) | {
                SOURCE_ROWS: torch.zeros(1, dtype=torch.long),
                MARKS_COLUMN: torch.zeros(1, dtype=torch.long),
            }
        columns = self.split[rows]
        starts = columns.get("decoder_start", [self.decoder_start_token_id] * len(rows))
        targets = [
            {"labels": labels, "decoder_start": start}
            for *pair, start in zip(columns["labels"], columns[OTHER_LABELS], starts, strict=True)
            for labels in pair
        ]
        batch = pad_sources(columns["input_ids"], self.pad_token_id)
        batch |= pad_targets(targets, self.pad_token_id, self.decoder_start_token_id)
        batch |= {MARKS_COLUMN: self.marks(rows), SOURCE_ROWS: torch.arange(len(rows)).repeat_interleave(ANSWERS)}
        return batch | (
            {REFERENCE: torch.tensor(columns[REFERENCE], dtype=torch.float64).flatten()}
            if REFERENCE in columns
            else {}
        )

    def marks(self, rows: Sequence[int]) -> torch.Tensor:
        """Of both answers of each row, (2 · rows,)."""
        if MARK in self.split.column_names:
            return torch.tensor([[mark, 0] for mark in self.split[rows][MARK]]).flatten()
        return torch.tensor([1, -1]).repeat(len(rows))


def paired_rows(loaded: LoadedModel, split: datasets.Dataset) -> PairedRows:
    return PairedRows(split, loaded.pad_token_id, loaded.decoder_start_token_id)


def items_of(rows: PairedRows | PackedRows) -> Items:
    """Of each row, (rows,)."""
    if not isinstance(rows, PackedRows):
        tokens = row_lengths(rows.split).target_tokens
        is_chosen = np.array(rows.split[MARK]) > 0 if MARK in rows.split.column_names else np.ones(len(tokens), bool)
        return Items(np.ones(len(tokens), dtype=np.int64), tokens * is_chosen)
    examples, chosen = [], []
    for start in range(0, len(rows.packed), ROWS_AT_ONCE):
        columns = rows.packed[start : start + ROWS_AT_ONCE]
        examples.append(columns["decoder_segment_ids"].max(axis=1) // ANSWERS)
        chosen.append((columns[MARKS_COLUMN] > 0).sum(axis=1))
    return Items(np.concatenate(examples), np.concatenate(chosen))
