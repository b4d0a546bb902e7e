"""Several trainings one after the other, in one run folder; each begins with the model that the one before it made.

    stages:
      - {name: warm-up, trainable: cross_attention, max_steps: 1000, patience: 2}
      - {name: heal, data: prepared-text, teacher: my-llm, max_steps: 5000}
      - {name: instruct, epochs: 2, learning_rate: 5.0e-5}

    runs/a/  config.yaml, status.json, .lock    of the whole
             stages/1-warm-up/                  a run folder like any other
             stages/2-heal/  stages/3-instruct/
             final/                             the last one's

A stage is the recipe with its own settings over it, trained by the same loop with an optimizer and a schedule of its
own. When the run is resumed, stages that have ended are skipped, and the one that was cut is resumed, bit for bit.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import yaml

from diptych.data_prep.command_line.arguments import from_values, instead_of
from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.commands.exit_codes import DONE, STOPPED, is_main_rank, say_once
from diptych.finetune.run_files.run_folder import (
    CONFIG,
    STAGES,
    Status,
    claimed,
    holds_nothing,
    read_status,
    settings_of,
)
from diptych.finetune.training.recipe import NEEDED, TrainRecipe
from diptych.finetune.training.stop_signals import StopRequest

OF_THE_WHOLE = ("out", "resume", "stages", "model", "model_overrides", "debug")
"""Settings that a stage cannot have. Its model is the one that the stage before it made."""


def run_stages(recipe: TrainRecipe, stop: StopRequest, status: Status) -> int:
    """DONE, or STOPPED if `stop` asked for it. Stages that cannot be are a UserError before anything is written."""
    stages = list(stage_recipes(recipe))
    if isinstance(recipe.resume, str):
        raise UserError(
            "resume names a checkpoint, and the run has stages. Give true, or train the stage's own recipe."
        )
    # torch takes seconds to import: mistakes in the stages are told before
    from diptych.finetune.run_files import atomic_folders
    from diptych.finetune.training.loop import run
    from diptych.finetune.training.resuming import as_it_began, check_resumes, check_settings, say_changes, to_yaml

    out = Path(recipe.out)
    if is_main_rank():  # another rank may come so late that it finds what this one has written
        if not holds_nothing(out):
            check_resumes(recipe, out)
        atomic_folders.write_text(out / CONFIG, yaml.safe_dump(to_yaml(recipe), sort_keys=False))
    status.begin()
    if not all(_has_ended(Path(stage.out)) for _, stage in stages):
        atomic_folders.check_own(out / "final")
    measured = "auto"  # the precision that the first stage with `auto` measured; later ones take the same
    for number, (name, stage) in enumerate(stages, start=1):
        status.update(stage=name)
        folder, is_auto = Path(stage.out), stage.precision == "auto"
        if is_auto:
            stage = as_it_began(replace(stage, precision=measured))
        if _has_ended(folder):
            check_settings(stage, folder)
            say_changes(stage, folder)
        else:
            say_once(f"stage {number} of {len(stages)}: {name}")
            stop.begin_stage(name)
            with claimed(folder, bool(stage.resume)) as own:
                code = run(stage, stop, own, is_last=number == len(stages))
                own.end(code)
            if code == STOPPED:
                return STOPPED
        measured = settings_of(folder)["precision"] if is_auto else measured
    if is_main_rank():
        atomic_folders.copy_folder(folder / "final", out / "final")
        say_once(f"final model: {out / 'final'}, of stage {name}")
    return DONE


def stage_recipes(recipe: TrainRecipe) -> Iterator[tuple[str, TrainRecipe]]:
    """The name of each stage, and its recipe, checked as any recipe is."""
    common = asdict(recipe) | {"betas": list(recipe.betas), "stages": []}
    model, names = recipe.model, set()
    for number, changes in enumerate(recipe.stages, start=1):
        name = changes.get("name")
        if not isinstance(name, str) or not name.replace("-", "").replace("_", "").isalnum():
            raise UserError(f"stage {number} has the name {name!r}. Give it one of letters, digits, - and _: name: …")
        if name in names:
            raise UserError(f"two stages are called {name}. Give each a name of its own.")
        names.add(name)
        if taken := [key for key in OF_THE_WHOLE if key in changes]:
            raise UserError(f"stage {name} has {taken[0]}, which is the whole run's. Take it out of the stage.")
        is_adapter = "lora" in (common["method"], changes.get("method"))
        if is_adapter and number < len(recipe.stages):
            raise UserError(f"stage {name} makes an adapter, and the next would need a model. Only the last may.")
        replaced = {other for given in changes for other in instead_of(TrainRecipe, given)} - changes.keys()
        folder = Path(recipe.out) / STAGES / f"{number}-{name}"
        settings = {key: value for key, value in common.items() if key not in replaced} | changes
        settings |= {"model": model, "out": str(folder), "resume": folder.exists()}
        for needed, (without_effect, off) in NEEDED.items():  # they are for another stage
            inherited = without_effect.split() if settings[needed] == off else []
            settings = {key: value for key, value in settings.items() if key in changes or key not in inherited}
        if number > 1:
            settings["model_overrides"] = {}
        del settings["name"]
        try:  # the messages that a misspelt or impossible setting has in any recipe
            parsed = from_values(TrainRecipe, settings)
        except UserError as error:
            raise UserError(*(f"stage {name}: {line}" for line in error.args)) from error
        yield name, parsed
        model = str(folder / "final")


def _has_ended(folder: Path) -> bool:
    status = read_status(folder)
    return status is not None and status.get("exit_code") == DONE and (folder / "final").is_dir()
