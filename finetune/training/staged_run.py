"""Several trainings one after the other, in one run folder; each begins with the model that the one before it made.

    stages:
      - {name: warm-up, trainable: cross_attention, max_steps: 1000, patience: 2}
      - {name: heal, data: prepared-text, teacher: my-llm, max_steps: 5000}
      - {name: instruct, epochs: 2, learning_rate: 5.0e-5}

    runs/a/  config.yaml, status.json, .lock    of the whole
             stages/1-warm-up/                  a run folder like any other
             stages/2-heal/  stages/3-instruct/
             final/                             the last one's

A stage is the recipe with its own settings over it. It is trained by the same loop, with an optimizer and a schedule
of its own, so that a run which is killed goes on as any run does: stages that have ended are passed over, the one that
was cut goes on, and the end is the same to the bit.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from diptych.data_prep.command_line.arguments import instead_of, parse
from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.commands.exits import DONE, STOPPED, is_main_rank
from diptych.finetune.commands.stop_signals import StopRequest
from diptych.finetune.run_files.run_folder import CONFIG, STAGES, Status, claimed, holds_nothing, read_status
from diptych.finetune.training.recipe import TrainRecipe

OF_THE_WHOLE = ("out", "resume", "stages", "model", "model_overrides", "debug")
"""Settings that a stage cannot have: its model is what the stage before it made."""


def run_stages(recipe: TrainRecipe, stop: StopRequest, status: Status) -> int:
    """DONE, or STOPPED where `stop` asked for it. UserError before anything is written for stages that cannot be."""
    stages = list(stage_recipes(recipe))
    if is_main_rank():  # the others may be so late that they find what it has written already
        _check_folder(recipe)
    out = Path(recipe.out)
    from diptych.finetune.run_files import whole_folders  # torch takes seconds; mistakes are told before
    from diptych.finetune.training.loop import run
    from diptych.finetune.training.resuming import as_it_began, compare_recipes, recipe_of, say_changes, to_yaml

    if is_main_rank():
        whole_folders.write_text(out / CONFIG, yaml.safe_dump(to_yaml(recipe), sort_keys=False))
    status.begin()
    if not all(_has_ended(Path(stage.out)) for _, stage in stages):
        whole_folders.check_own(out / "final")
    auto = "auto"  # what it became in the first stage that has it: later stages take the same
    for number, (name, stage) in enumerate(stages, start=1):
        status.update(stage=name)
        folder = Path(stage.out)
        is_auto = stage.precision == "auto"
        stage = as_it_began(stage)
        stage = replace(stage, precision=auto) if stage.precision == "auto" else stage
        if _has_ended(folder):
            compare_recipes(stage, folder)
            say_changes(stage, folder)
            auto = stage.precision if is_auto else auto
            continue
        if is_main_rank():
            print(f"stage {number} of {len(stages)}: {name}", flush=True)
        stop.begin_stage(name)
        with claimed(folder, bool(stage.resume)) as own:
            code = run(stage, stop, own, is_last=number == len(stages))
            own.end(code)
        if code == STOPPED:
            return STOPPED
        auto = recipe_of(folder)["precision"] if is_auto else auto
    if is_main_rank():
        whole_folders.copy_folder(Path(stages[-1][1].out) / "final", out / "final")
        print(f"final model: {out / 'final'}, of stage {stages[-1][0]}", flush=True)
    return DONE


def stage_recipes(recipe: TrainRecipe) -> Iterator[tuple[str, TrainRecipe]]:
    """The name of each stage, and its recipe, checked as any recipe is."""
    from diptych.finetune.training.resuming import to_yaml

    common = to_yaml(recipe) | {"stages": []}
    model, names = recipe.model, set()
    for number, changes in enumerate(recipe.stages, start=1):
        name = _name(number, changes, names)
        if common["method"] == "lora" or changes.get("method") == "lora":
            if number < len(recipe.stages):
                raise UserError(f"stage {name} makes an adapter, and the next would need a model. Only the last may.")
        settings = common | {key: value for key, value in changes.items() if key != "name"}
        for given in changes:
            for other in instead_of(TrainRecipe, given):
                if other not in changes:
                    settings.pop(other, None)
        folder = Path(recipe.out) / STAGES / f"{number}-{name}"
        settings |= {"model": model, "out": str(folder), "resume": folder.exists()}
        if number > 1:
            settings["model_overrides"] = {}
        yield name, _parsed(settings, name)
        model = str(folder / "final")


def _name(number: int, changes: dict[str, Any], names: set[str]) -> str:
    name = changes.get("name")
    if not isinstance(name, str) or not name.replace("-", "").replace("_", "").isalnum():
        raise UserError(f"stage {number} has the name {name!r}. Give it one of letters, digits, - and _: name: …")
    if name in names:
        raise UserError(f"two stages are called {name}. Give each a name of its own.")
    names.add(name)
    if taken := [key for key in OF_THE_WHOLE if key in changes]:
        raise UserError(f"stage {name} has {taken[0]}, which is the whole run's. Take it out of the stage.")
    return name


def _parsed(settings: dict[str, Any], name: str) -> TrainRecipe:
    """As from a recipe of its own, so that a misspelt or impossible setting is told as ever."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        yaml.safe_dump(settings, file)
        file.flush()
        try:
            return parse(TrainRecipe, "diptych train", ["--config", file.name])
        except UserError as error:
            raise UserError(f"stage {name}: {str(error).replace(file.name, 'its settings')}") from error


def _check_folder(recipe: TrainRecipe) -> None:
    out = Path(recipe.out)
    is_empty = holds_nothing(out)
    if isinstance(recipe.resume, str):
        raise UserError(
            "resume names a checkpoint, and the run has stages. Give true, or train the stage's own recipe."
        )
    if not is_empty and not recipe.resume:
        raise UserError(f"{out} is not empty. Give `out` a new folder, or go on with the run in it: --resume true")
    if not is_empty and not (out / CONFIG).is_file():
        raise UserError(f"{out} has no config.yaml, so there is no run to resume. Give `out` the folder of a run.")


def _has_ended(folder: Path) -> bool:
    status = read_status(folder) if folder.is_dir() else None
    return status is not None and status["exit_code"] == DONE and (folder / "final").is_dir()
