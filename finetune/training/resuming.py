"""Whether a run may begin, or go on, in a folder; and from where.

    saved = choose_checkpoint(recipe, folder)     the checkpoint to go on from; None for a run that begins
    check_same_run(recipe, folder, before, now)   what decides the rows and weights of a step is as it was

Nothing begins anew in silence, and a run that goes on is the run that it was: what has changed is listed, key by key.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import xxhash
import yaml
from transformers import PreTrainedModel

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.batches.padded_rows import BatchOrder, Prepared
from diptych.finetune.commands.exits import CheckpointError, is_main_rank
from diptych.finetune.run_files import checkpoints
from diptych.finetune.run_files.run_folder import CONFIG, holds_nothing
from diptych.finetune.training.recipe import FIXED_IN_A_RUN, FREE_IN_A_RUN, TrainRecipe


def choose_checkpoint(recipe: TrainRecipe, folder: Path) -> Path | None:
    """UserError where the folder is taken by another run, or by something else; CheckpointError where its checkpoints
    are, or the one that was named is, damaged."""
    is_empty = holds_nothing(folder)
    if is_empty and not isinstance(recipe.resume, str):
        return None
    if not recipe.resume:
        raise UserError(f"{folder} is not empty. Give `out` a new folder, or go on with the run in it: --resume true")
    compare_recipes(recipe, folder)
    place = folder / "checkpoints"
    if isinstance(recipe.resume, str):
        chosen = Path(recipe.resume)
        checkpoints.check_checkpoint(chosen)
        if chosen.resolve().parent != place.resolve():
            raise UserError(f"{chosen} is no checkpoint of the run in {folder}. Name one of {place}.")
        _say([])
        return chosen
    found = checkpoints.latest_checkpoint(place)
    _say([f"passed over {fault}" for fault in found.passed_over])
    return found.path


def take_back(recipe: TrainRecipe, folder: Path, saved: Path) -> None:
    """Later checkpoints than the one that was named would be taken for this run's."""
    moved = checkpoints.set_aside(folder / "checkpoints", checkpoints.checkpoint_step(saved))
    if moved and isinstance(recipe.resume, str):
        _say([f"goes back to {saved.name}: {len(moved)} later checkpoints are in {moved[0].parent}"])


def to_yaml(recipe: TrainRecipe) -> dict[str, Any]:
    """The recipe as config.yaml has it: as of the beginning, however often the run was resumed."""
    return asdict(recipe) | {"betas": list(recipe.betas), "resume": False}


def as_it_began(recipe: TrainRecipe) -> TrainRecipe:
    """The recipe; where it resumes a run, `auto` is the precision that this run began with, on whatever machine."""
    if recipe.precision != "auto" or not recipe.resume or not (Path(recipe.out) / CONFIG).is_file():
        return recipe
    return replace(recipe, precision=recipe_of(Path(recipe.out)).get("precision", "auto"))


def recipe_of(folder: Path) -> dict[str, Any]:
    """What config.yaml of a run's folder holds: its recipe, as it was resolved. UserError where there is none."""
    config = folder / CONFIG
    if not config.is_file():
        raise UserError(f"{folder} has no config.yaml, so there is no run to resume. Give `out` the folder of a run.")
    try:
        found = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{config} is not the recipe of a run: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not {"model", "data", "seed"} <= found.keys():
        raise UserError(f"{config} is not the recipe of a run. Give `out` the folder of a run, or a new one.")
    return found


def compare_recipes(recipe: TrainRecipe, folder: Path) -> None:
    """UserError where the run in the folder is another one."""
    now, before = _now_and_before(recipe, folder)
    different = [name for name in FIXED_IN_A_RUN if before[name] != now[name]]
    if different:
        raise UserError(
            f"this is not the run in {folder}:\n{_changes(before, now, different)}\n"
            f"A run goes on as it began: set this back, or begin anew in another folder."
        )


def say_changes(recipe: TrainRecipe, folder: Path) -> None:
    """What the recipe has changed of the run in the folder, once it is known that the run may go on so."""
    now, before = _now_and_before(recipe, folder)
    changed = [name for name in now if before[name] != now[name] and name not in FREE_IN_A_RUN]
    if changed:
        _say([f"changed for the rest of the run: {_changes(before, now, changed)}"])


def _now_and_before(recipe: TrainRecipe, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    now = to_yaml(recipe)
    return now, now | recipe_of(folder)  # a setting that is younger than the run is as it is now


def _changes(before: dict[str, Any], now: dict[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name} {before[name]!r} -> {now[name]!r}" for name in names)


def run_facts(prepared: Prepared, order: BatchOrder, base_hash: str) -> dict[str, Any]:
    """What decides which rows a step has, and which weights they meet, beside the recipe."""
    return {
        "data, template or tokenizer": prepared.fingerprint,
        "rows in a step (batch_size × ranks × gradient_accumulation_steps)": order.rows_per_step,
        "rows together (batch_size × ranks)": order.rows_per_batch * order.ranks if order.group_by_length else None,
        "packed rows": order.row_tokens is not None,
        "weights of the base model": base_hash,
    }


def check_same_run(recipe: TrainRecipe, saved: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    if not isinstance(before, dict) or before.keys() != now.keys():
        raise CheckpointError(
            f"{saved / 'state.json'} is of another version of Diptych: it says {sorted(map(str, before))[:3]} … of its"
            f" run. Go on with the version that wrote it."
        )
    different = [name for name in now if before[name] != now[name]]
    if different:
        raise UserError(
            f"this is not the run of {saved}, with {recipe.data}:\n{_changes(before, now, different)}\n"
            f"Set this back, or begin anew in another folder. (Ranks may change if batch_size changes with them.)"
        )


def weights_hash(model: PreTrainedModel) -> str:
    """Of a frozen base, whose weights are in no checkpoint: an adapter means nothing on another one."""
    digest = xxhash.xxh3_128()
    frozen = [(name, weight) for name, weight in model.named_parameters() if not weight.requires_grad]
    for name, weight in sorted(frozen):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


def _say(lines: list[str]) -> None:
    if is_main_rank():
        for line in lines:
            print(line, flush=True)
