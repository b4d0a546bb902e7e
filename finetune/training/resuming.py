"""Whether a run may begin, or be resumed, in a folder; and from which checkpoint.

    saved = choose_checkpoint(recipe, folder)     the checkpoint to resume from; None for a run that begins
    state = saved_state(recipe, saved, facts)     its progress, if it is a checkpoint of this very run

A run is the same run if the settings of its config.yaml that are FIXED_IN_A_RUN, and the facts in its checkpoint's
state.json, are as they were. Otherwise it is refused, and each difference is named.
"""

import math
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from peft import PeftModel
from transformers import PreTrainedModel

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.batches.padded_rows import BatchOrder, PreparedData
from diptych.finetune.commands.exit_codes import CheckpointError, say_once
from diptych.finetune.run_files import atomic_folders, checkpoints
from diptych.finetune.run_files.run_folder import CONFIG, check_new, holds_nothing, settings_of
from diptych.finetune.training.recipe import FIXED_IN_A_RUN, FREE_IN_A_RUN, TrainRecipe
from diptych.finetune.training.run import Progress

YOUNGER = ("figures", "usual_figures")
"""Of the progress, which older checkpoints do not name."""


def choose_checkpoint(recipe: TrainRecipe, folder: Path) -> Path | None:
    """UserError if the folder holds another run or something else; CheckpointError if its checkpoints, or the one that
    was named, are damaged."""
    if holds_nothing(folder) and not isinstance(recipe.resume, str):
        return None
    check_resumes(recipe, folder)
    check_settings(recipe, folder)
    place = folder / "checkpoints"
    if isinstance(recipe.resume, str):
        chosen = Path(recipe.resume)
        if chosen.absolute().parent.resolve() != place.resolve():
            raise UserError(f"{chosen} is no checkpoint of the run in {folder}. Name one of {place}.")
        checkpoints.check_checkpoint(chosen, _fault_in)
        return chosen
    found = checkpoints.latest_checkpoint(place, _fault_in)
    for fault in found.passed_over:
        say_once(f"passed over {fault}")
    return found.path


def _fault_in(path: Path) -> str:
    """Also where the state has other values than training writes."""
    try:
        return checkpoints.checkpoint_fault(path) or _read_state(path / "state.json") and ""
    except CheckpointError as error:
        return str(error)


def check_resumes(recipe: TrainRecipe, folder: Path) -> None:
    """UserError unless the folder, which is not empty, has a run, and the recipe resumes it."""
    check_new(folder, bool(recipe.resume))
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} has no config.yaml, so there is no run to resume. Give `out` the folder of a run.")


def to_yaml(recipe: TrainRecipe) -> dict[str, Any]:
    """The recipe as config.yaml has it: as of the beginning, however often the run was resumed."""
    return asdict(recipe) | {"betas": list(recipe.betas), "resume": False}


def as_it_began(recipe: TrainRecipe) -> TrainRecipe:
    """If the recipe resumes a run: with the precision in place of `auto`, and the batch_size in place of batch_tokens,
    that this run began with, on whatever machine."""
    if not recipe.resume or not (Path(recipe.out) / CONFIG).is_file():
        return recipe
    begun = settings_of(Path(recipe.out))
    if recipe.precision == "auto":
        recipe = replace(recipe, precision=begun.get("precision", "auto"))
    has_rows = recipe.batch_tokens is not None and begun.get("batch_size") is not None
    return replace(recipe, batch_size=begun["batch_size"], batch_tokens=None) if has_rows else recipe


def check_settings(recipe: TrainRecipe, folder: Path) -> None:
    """UserError if the run in the folder was begun with other settings."""
    before = to_yaml(recipe) | settings_of(folder)  # a setting that is younger than the run counts as unchanged
    _check_unchanged(str(folder), before, to_yaml(recipe), FIXED_IN_A_RUN)


def say_changes(recipe: TrainRecipe, folder: Path) -> None:
    """Prints the settings that may change in a run and have."""
    now = to_yaml(recipe)
    if changes := _changes(now | settings_of(folder), now, now.keys() - FREE_IN_A_RUN):
        say_once(f"changed for the rest of the run: {changes}")


def facts_of(
    prepared: PreparedData, order: BatchOrder, model: PreTrainedModel | PeftModel
) -> dict[str, str | int | bool | None]:
    """What decides, beside the recipe, which rows a step has, and which weights they meet."""
    return {
        "data, template or tokenizer": prepared.fingerprint,
        "rows in a step (batch_size × ranks × gradient_accumulation_steps)": order.rows_per_step,
        "rows together (batch_size × ranks)": order.rows_per_batch * order.ranks if order.group_by_length else None,
        "packed rows": order.row_tokens is not None,
        "seed": order.seed,
        "weights of the base model": frozen_hash(model) if isinstance(model, PeftModel) else "",
    }


def frozen_hash(model: PeftModel) -> str:
    """Of an adapter's base: its weights are in no checkpoint, and the adapter fits no other ones."""
    digest = xxhash.xxh3_128()
    frozen = [(name, weight) for name, weight in model.named_parameters() if not weight.requires_grad]
    for name, weight in sorted(frozen):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class SavedState(NamedTuple):
    """What state.json of a checkpoint holds beside the facts of its run."""

    progress: Progress
    written: dict[str, int]
    scaler: dict[str, Any]
    optimizer: dict[str, Any]
    facts: dict[str, Any] = {}


def saved_state(recipe: TrainRecipe, saved: Path | None, facts: dict[str, Any]) -> SavedState:
    """Of the checkpoint to resume from, or of a run that begins. CheckpointError if state.json holds something else;
    UserError if it is of a run with other facts."""
    if saved is None:
        return SavedState(Progress(), {}, {}, {})
    state = _read_state(saved / "state.json")
    state.facts.setdefault("seed", facts.get("seed"))  # which older checkpoints do not name
    if state.facts.keys() != facts.keys():
        raise CheckpointError(
            f"{saved / 'state.json'} is of another version of Diptych: it says {sorted(map(str, state.facts))[:3]} …"
            f" of its run. Go on with the version that wrote it."
        )
    _check_unchanged(f"{saved}, with {recipe.data}", state.facts, facts, facts)
    return state


def _read_state(file: Path) -> SavedState:
    """CheckpointError where a value has another type or sign than those that training writes."""
    try:
        state = atomic_folders.read_json(file)
        facts, written, scaler, optimizer = (dict(state[key]) for key in ("run", "written", "scaler", "optimizer"))
        known = asdict(Progress())
        given = {name: known[name] for name in YOUNGER} | dict(state["progress"])
        if different := known.keys() ^ given.keys():
            raise KeyError(*different)
        for name, value in (given | {f"bytes of {name}": size for name, size in written.items()}).items():
            default = known.get(name, 0)
            is_count = isinstance(default, int) or name == "best_step"
            several = list(value.values()) if isinstance(default, dict) else value
            for number in several if isinstance(default, list | dict) else [value]:
                if number is None and default is None:
                    continue
                if isinstance(number, bool) or not (isinstance(number, int) if is_count else math.isfinite(number)):
                    raise TypeError(f"its {name} is {str(value)[:80]!r}")
                if is_count and not 0 <= number < 2**63:
                    raise ValueError(f"its {name} is {str(value)[:80]!r}")
    except (ValueError, KeyError, TypeError, ArithmeticError, OSError) as error:
        raise CheckpointError(f"{file} is not the state of a run: {error!r}.") from error
    return SavedState(Progress(**given), written, scaler, optimizer, facts)


def take_back(recipe: TrainRecipe, folder: Path, saved: Path) -> None:
    """Moves away checkpoints that are later than the one that is resumed: they would be taken for this run's."""
    moved = checkpoints.set_aside(folder / "checkpoints", checkpoints.checkpoint_step(saved))
    if moved and isinstance(recipe.resume, str):
        say_once(f"goes back to {saved.name}: {len(moved)} later checkpoints are in {moved[0].parent}")
    elif moved:
        say_once(f"moved what was passed over: {', '.join(map(str, moved))}")


def _check_unchanged(where: str, before: dict[str, Any], now: dict[str, Any], names: Collection[str]) -> None:
    if changes := _changes(before, now, names):
        raise UserError(
            f"this is not the run in {where}:",
            changes,
            "A run goes on as it began: set this back, or begin anew in another folder. (The number of ranks may "
            "change if batch_size changes with it.)",
        )


def _changes(before: dict[str, Any], now: dict[str, Any], names: Collection[str]) -> str:
    changed = [name for name in now if name in names and before[name] != now[name]]
    return ", ".join(f"{name} {before[name]!r} -> {now[name]!r}" for name in changed)
