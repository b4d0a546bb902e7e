"""How many rows a batch has if it is to have so many tokens, or as many as the memory holds.

    rows_in_batch(8192, rows)        8192 // (512 + 512) = 8 packed rows
    largest_batch(trial, most)       the most rows with which trial(rows) does not run out of memory

Every batch has this number of rows, so the rows of a step remain a function of its number. Of padded rows it is the
batch of the longest source and the longest target that has batch_tokens; others have less padding, and fewer tokens.
"""

from collections.abc import Callable

import numpy as np
from accelerate.utils import find_executable_batch_size
from accelerate.utils.memory import should_reduce_batch_size

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.batches.packed_rows import PackedRows
from diptych.finetune.batches.padded_rows import PaddedRows, RowLengths


def rows_in_batch(batch_tokens: int, rows: PaddedRows | PackedRows) -> int:
    """UserError if that is less than one row."""
    longest = [int(tokens.max()) for tokens in rows.lengths]
    row_tokens = rows.row_tokens or sum(longest)
    if batch_tokens < row_tokens:
        what = "a packed row has" if rows.row_tokens else f"the longest source and target, {longest}, have"
        raise UserError(
            f"batch_tokens is {batch_tokens}, but {what} {row_tokens} tokens. Give {row_tokens} or more, or prepare "
            f"the data with shorter rows."
        )
    return batch_tokens // row_tokens


def longest_rows(lengths: RowLengths, count: int) -> np.ndarray:
    """So many row numbers, with repetitions, that make as large a batch as there can be."""
    source_tokens, target_tokens = lengths
    longest = [source_tokens.argmax(), target_tokens.argmax()]
    return np.resize(longest if count > 1 else [(source_tokens + target_tokens).argmax()], count)


def largest_batch(trial: Callable[[int], None], most: int) -> int:
    """`trial(rows)` raises torch.OutOfMemoryError where memory is too small. The result may be a tenth too low:
    doubled as long as it fits, then lowered by accelerate. UserError if not even one row fits."""
    upper = 1
    while upper < most and _fits(trial, upper):
        upper = min(2 * upper, most)

    @find_executable_batch_size(starting_batch_size=upper)
    def first_that_fits(batch_size: int) -> int:
        trial(batch_size)
        return batch_size

    try:
        return first_that_fits()
    except RuntimeError as error:
        if "No executable batch size" not in str(error):
            raise
        raise UserError(
            "batch_tokens is auto, but not even one row fits into the memory. Set gradient_checkpointing, method: "
            "lora or weights: bf16, or prepare the data with shorter rows."
        ) from error


def _fits(trial: Callable[[int], None], rows: int) -> bool:
    try:
        trial(rows)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        return False
    return True
