"""Log-probabilities of all answers by the reference model, computed once, before the first step.

    values = answer_log_probabilities(objective, rows, batch_size, accelerator)      (answers,) in fp64
    rows = with_reference(rows, values)                   a column `reference`, which the batches carry
    store_reference(run_folder, {"train": values})        stored_reference(run_folder, …) reads it again

The reference is the model that the run starts from; for LoRA, the base without an adapter. It is read once, before
training changes it, so a run takes no more memory than supervised training. `reference.safetensors` in the run folder
keeps the numbers for a run that is resumed. A checkpoint knows their hash: with others, the run is refused.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import xxhash
from accelerate import Accelerator
from datasets import Dataset
from safetensors.numpy import load_file, save
from tqdm import tqdm

from diptych.data_prep.command_line.errors import UserError, library_errors
from diptych.finetune.batches.packed_rows import REFERENCE, PackedRows
from diptych.finetune.batches.padded_rows import label_columns, row_lengths
from diptych.finetune.batches.preference_rows import ANSWERS, PairedRows, items_of
from diptych.finetune.commands.exit_codes import NotFiniteError, say_once
from diptych.finetune.evaluating.evaluate_rows import over_ranks
from diptych.finetune.inference.generation import in_eval_mode
from diptych.finetune.preferences.losses import AnswerFigures
from diptych.finetune.preferences.objective import PreferenceObjective
from diptych.finetune.run_files import atomic_folders

FILE = "reference.safetensors"
FAR_APART = 2.0
"""Nats per token: answers of a model and of the reference that it was tuned from hardly differ more in the mean."""

Rows = PairedRows | PackedRows


def answer_log_probabilities(
    objective: PreferenceObjective,
    rows: Rows,
    batch_size: int,
    accelerator: Accelerator,
    what: str = "",
    before_each: Callable[[], None] | None = None,
) -> np.ndarray:
    """Of all answers in the order of the rows, (answers,), the same on all ranks. With `what`, a bar says so."""
    count = len(rows.lengths.target_tokens)
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    is_shown = what and accelerator.is_main_process
    with tqdm(total=len(batches), desc=what, unit="batch", disable=None if is_shown else True) as bar:

        def work(numbers: Sequence[int]) -> list[float]:
            batch = {name: tensor.to(accelerator.device) for name, tensor in rows.tensors(numbers).items()}
            bar.update(accelerator.num_processes)
            return objective.answer_log_probabilities(batch).double().cpu().tolist()

        with in_eval_mode(objective):
            found = over_ranks(work, batches, accelerator, before_each)
    values = np.array([value for of_batch in found for value in of_batch])
    if len(bad := np.flatnonzero(~np.isfinite(values))):
        raise NotFiniteError(
            f"{what or 'validation'}: the log-probability of {len(bad)} of {len(values)} answers is infinite or no"
            f" number, first that of answer {bad[0] + 1}. Try precision: fp32, or look at the weights of this model."
        )
    return values


def answers_of_rows(
    objective: PreferenceObjective,
    rows: PairedRows,
    batch_size: int,
    accelerator: Accelerator,
    before_each: Callable[[], None] | None = None,
) -> AnswerFigures:
    """Of a whole split, in fp64 on the CPU."""
    log_probabilities = answer_log_probabilities(objective, rows, batch_size, accelerator, before_each=before_each)
    tokens = [row_lengths(rows.split, name).target_tokens for name in label_columns(rows.split)]
    marks = rows.marks(range(len(rows.split)))
    reference = np.array(rows.split[REFERENCE]).flatten() if REFERENCE in rows.split.column_names else None
    found = [log_probabilities, np.stack(tokens, axis=1).flatten(), marks, reference]
    return AnswerFigures(*(values if values is None else torch.as_tensor(values).double() for values in found))


def hash_of(reference: Mapping[str, np.ndarray]) -> str:
    digest = xxhash.xxh3_128()
    for name, values in sorted(reference.items()):
        digest.update(name.encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def stored_reference(folder: Path, rows: Mapping[str, Rows]) -> dict[str, np.ndarray] | None:
    """Of an earlier start of this run; None if there is none. UserError if it is of other rows."""
    file = folder / FILE
    if not file.is_file():
        return None
    with library_errors(f"{file} cannot be read", "Delete it: it is computed again."):
        reference = load_file(file)
    counts = {name: ANSWERS * int(items_of(of_split).examples.sum()) for name, of_split in rows.items()}
    if {name: len(values) for name, values in reference.items()} != counts:
        raise UserError(f"{file} has log-probabilities of other rows than this run's. Delete it, or begin anew.")
    return reference


def store_reference(folder: Path, reference: dict[str, np.ndarray]) -> None:
    atomic_folders.write_bytes(folder / FILE, save(reference))


def with_reference(rows: Rows, values: np.ndarray) -> Rows:
    """The rows with a column of these log-probabilities."""
    ends = ANSWERS * np.cumsum(items_of(rows).examples)
    column = [of_row.tolist() for of_row in np.split(values, ends[:-1])]
    if isinstance(rows, PairedRows):
        return replace(rows, split=with_column(rows.split, column))
    return replace(rows, packed=with_column(rows.packed, column))


def with_column(split: Dataset, column: list[list[float]]) -> Dataset:
    kind = split.format["type"]
    return split.with_format(None).add_column(REFERENCE, column).with_format(kind)


def say_if_far(reference: Mapping[str, np.ndarray], own: Mapping[str, np.ndarray], tokens: Mapping[str, int]) -> None:
    """A reference of another origin than the model gives its answers other probabilities from the start."""
    for name in reference:
        difference = float(np.abs(own[name] - reference[name]).sum()) / tokens[name]
        if difference > FAR_APART:
            say_once(
                f"warning: the reference and the model differ by {difference:.1f} nats per token of {name} before the"
                f" first step, so this model was hardly tuned from that reference. Leave `reference` out to take the"
                f" model itself."
            )
            return
