"""`diptych sweep`: one recipe, trained many times with other settings, each in a run folder of its own.

    diptych sweep recipe.yaml --out sweep --trials 20
    20 trials: sweep/trial-000 to trial-019
    trial-003 | learning_rate 3.1e-04 | loss 1.873 | best so far

    sweep/  trial-000/, trial-000.yaml, trial-000.log   a run, its recipe, and what it printed
            study.log     Optuna's journal, from which a stopped sweep goes on
            trials.csv    values and figures of all trials        best.yaml   the recipe with the best values
            sweep.png     the figure over each setting that varies

A trial is a process of its own: `diptych train`, or what `launcher` says. Optuna's TPE sampler proposes the values.
Its seed depends on the number of earlier trials, so a sweep that was stopped tries what an undisturbed one would.
"""

import itertools
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import pandas
import yaml

from diptych.data_prep.command_line.arguments import from_values, instead_of
from diptych.data_prep.command_line.bounded_yaml import read_yaml, text_of
from diptych.data_prep.command_line.errors import UserError, library_errors, message_line
from diptych.data_prep.command_line.overwrite_checks import take_lock
from diptych.data_prep.rows.named_splits import kind_of
from diptych.finetune.commands.exit_codes import DONE, NOT_FINITE, STOPPED
from diptych.finetune.commands.model_settings import split_names
from diptych.finetune.evaluating.metrics import is_improvement, selected_figure
from diptych.finetune.run_files.atomic_folders import write_text
from diptych.finetune.run_files.run_folder import holds_nothing, last_training, read_status
from diptych.finetune.several_runs.sweep_settings import SweepSettings
from diptych.finetune.training.recipe import TrainRecipe
from diptych.finetune.training.starting_model import check_size

State = optuna.trial.TrialState
SECONDS_BETWEEN_LOOKS = 0.5
JOURNAL = "study.log"
THE_SAME = "out resume stages metrics metric_settings metrics_limit best_metric trackers debug".split()
LAST_LINES, CHECKED = 4, 20
Values = dict[str, Any]


def run(settings: SweepSettings) -> int:
    """DONE, STOPPED by a signal, or the exit code of a trial that failed. UserError for ranges that cannot be."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    out, recipe = Path(settings.out), read_recipe(settings)
    ranges = {name: as_distribution(name, given) for name, given in settings.search.items()}
    metric = check_values(recipe, ranges, out)
    if out.exists() and not out.is_dir() or not (out / JOURNAL).exists() and not holds_nothing(out):
        raise UserError(f"{out} is there already, and holds no sweep. Name another folder: --out FOLDER")
    out.mkdir(parents=True, exist_ok=True)
    take_lock(out / ".lock", lambda holder: f"{out} is in use by {holder}. Wait for it, or name another folder.")
    study = open_study(settings, recipe, ranges, metric)
    stop: list[str] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stop.append(signal.Signals(number).name))
    most = min(
        settings.trials, math.prod(len(getattr(it, "choices", range(settings.trials))) for it in ranges.values())
    )
    print(f"{most} trials: {out}/trial-000 to trial-{most - 1:03d}", flush=True)
    for trial in due_trials(study, settings, ranges, most):
        code = carry_out(trial, settings, recipe, metric, stop)
        if code != DONE:
            return code
        write_results(study, settings, recipe)
    print(f"\n{table(study).to_string(index=False)}")
    if not study.get_trials(states=[State.COMPLETE]):
        raise UserError(f"no trial has come to its end: each was not possible, or diverged. See {out}/trial-*.log.")
    print(f"\nbest recipe: {out / 'best.yaml'} | {out / 'sweep.png'}")
    return DONE


def read_recipe(settings: SweepSettings) -> Values:
    try:
        recipe = read_yaml(text_of(Path(settings.recipe)))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{settings.recipe} cannot be read as YAML: {error}. Correct it there.") from error
    if not isinstance(recipe, dict):
        raise UserError(f"{settings.recipe} holds no settings. Name a recipe of `diptych train`.")
    varied = {other for name in settings.search for other in (name, *instead_of(TrainRecipe, name))}
    return {name: value for name, value in recipe.items() if name not in varied or name in settings.search}


def as_distribution(name: str, given: Any) -> optuna.distributions.BaseDistribution:
    """UserError for what is neither a list of values nor a range, and for a setting that must be the same in all."""
    if name in THE_SAME:
        raise UserError(f"search names {name}, which has to be the same in all trials. Set it in the recipe.")
    try:
        if isinstance(given, list):
            return optuna.distributions.CategoricalDistribution(given)
        kinds = optuna.distributions.IntDistribution, optuna.distributions.FloatDistribution
        is_real = isinstance(getattr(TrainRecipe, name, None), float)
        is_whole = not is_real and all(isinstance(given[end], int) for end in ("low", "high"))
        return kinds[not is_whole](**given)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(
            f"search.{name} is {given}: {str(error).rstrip('.')}. Give a list of values, or a range: "
            f"{{low: 1, high: 8, step: 1}} or {{low: 1e-5, high: 1e-3, log: true}}."
        ) from error


def check_values(recipe: Values, ranges: dict[str, Any], out: Path) -> str:
    """The metric by which trials are compared. UserError where the recipe would be refused with an end of a range, or
    with all values of a list (of the first CHECKED, as each takes some ms); what is not possible together is left out
    later."""
    first = {name: it.choices[0] if hasattr(it, "choices") else it.low for name, it in ranges.items()}
    checked, refused = None, None
    for name, it in ranges.items():
        is_possible = False
        is_list = hasattr(it, "choices")
        for value in it.choices[:CHECKED] if is_list else (it.low, it.high):
            if is_list and is_possible:
                break
            try:
                checked = from_values(TrainRecipe, recipe | first | {name: value, "out": str(out)})
                check_size(checked.model)
                is_possible = True
            except UserError as error:
                if not is_list:
                    raise
                refused = error
        if not is_possible:
            raise refused
    return checked.best_metric


def open_study(settings: SweepSettings, recipe: Values, ranges: dict[str, Any], metric: str) -> optuna.Study:
    """A new one, or the one that is in the folder. UserError if that is of other settings."""
    journal = Path(settings.out) / JOURNAL
    if journal.is_file() and not (written := journal.read_bytes()).endswith(b"\n"):
        os.truncate(journal, written.rfind(b"\n") + 1)  # Optuna would write behind an entry that was cut
    direction = "minimize" if is_better(recipe, metric, 0.0, 1.0) else "maximize"
    with library_errors(f"{journal} cannot be read", "Restore it, or begin anew in another folder: --out FOLDER."):
        study = optuna.create_study(
            storage=optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal))),
            study_name="sweep",
            direction=direction,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4) if settings.prune else optuna.pruners.NopPruner(),
            load_if_exists=True,
        )
        own, trials = study.user_attrs, study.get_trials()
        if own.keys() & {"fixed", "metric"} and (own.get("metric"), study.direction.name.lower()) != (
            metric,
            direction,
        ):
            raise ValueError("it is of another metric")
        if any(it.value is not None and not math.isfinite(it.value) for it in trials):
            raise ValueError("it has figures that are no numbers")
        if not all(_is_within(value, it.distributions[name]) for it in trials for name, value in it.params.items()):
            raise ValueError("it has values outside of their ranges")
        if "fixed" not in own and any(journal.parent.glob("trial-*")):
            raise ValueError("there are trials that it does not know")
    fixed = {"recipe": recipe, "search": settings.search, "seed": settings.seed}
    before = own.get("fixed")
    if before is None:
        study.set_user_attr("fixed", fixed)
        study.set_user_attr("metric", metric)
        own = {name: recipe.get(name, getattr(TrainRecipe, name, None)) for name in ranges}
        if own := {name: value for name, value in own.items() if _is_within(value, ranges[name])}:
            study.enqueue_trial(own)
    elif before != json.loads(json.dumps(fixed)):
        before = before if isinstance(before, dict) else {}
        changed = [name for name in fixed if before.get(name) != json.loads(json.dumps(fixed[name]))]
        raise UserError(
            f"the sweep in {settings.out} was begun with another {' and another '.join(changed)}. Set it back to go "
            f"on, or begin anew in another folder. (The number of trials may change.)"
        )
    return study


def _is_within(value: Any, of: Any) -> bool:
    try:
        return of._contains(of.to_internal_repr(value))
    except (ValueError, TypeError):
        return False


def grid(ranges: dict[str, Any]) -> Iterator[Values]:
    """All combinations, if only lists of values are given: each is tried once. Otherwise none."""
    if all(hasattr(it, "choices") for it in ranges.values()):
        for values in itertools.product(*(it.choices for it in ranges.values())):
            yield dict(zip(ranges, values, strict=True))


def due_trials(
    study: optuna.Study, settings: SweepSettings, ranges: dict[str, Any], most: int
) -> Iterator[optuna.Trial]:
    """First those that were cut, then new ones."""
    for frozen in study.get_trials(deepcopy=False, states=[State.RUNNING]):
        if frozen.params.keys() == ranges.keys():
            yield optuna.Trial(study, frozen._trial_id)
        else:  # it was cut before it had its values
            study.tell(frozen.number, state=State.FAIL)
    while sum(trial.state.is_finished() for trial in study.trials) < most:
        tried = [it.system_attrs.get("fixed_params", it.params) for it in study.trials]
        if not study.get_trials(states=[State.WAITING]):
            for values in itertools.islice((it for it in grid(ranges) if it not in tried), 1):
                study.enqueue_trial(values)
        study.sampler = optuna.samplers.TPESampler(seed=settings.seed + len(study.trials))
        yield study.ask(ranges)


def carry_out(trial: optuna.Trial, settings: SweepSettings, recipe: Values, metric: str, stop: list[str]) -> int:
    """Trains with the trial's values and tells the study how it went. Another code than DONE: the sweep cannot go on,
    and the trial is carried on when it does."""
    folder = Path(settings.out) / f"trial-{trial.number:03d}"
    file, log = folder.with_suffix(".yaml"), folder.with_suffix(".log")
    write_text(file, yaml.safe_dump(recipe | trial.params | {"out": str(folder)}, sort_keys=False))
    what = f"{folder.name} | " + ", ".join(f"{name} {_shown(value)}" for name, value in trial.params.items())
    try:
        from_values(TrainRecipe, recipe | trial.params | {"out": str(folder)})
    except UserError as error:  # each value alone is allowed, and they are not together
        trial.study.tell(trial, state=State.FAIL)
        print(f"{what} | not possible: {message_line(error)}", flush=True)
        return DONE
    launcher = shlex.split(settings.launcher) or [sys.executable, "-m", "diptych.finetune.train"]
    with log.open("a", encoding="utf-8") as stream:
        process = subprocess.Popen(
            [*launcher, "--config", file, "--resume", "true"],
            stdout=stream,
            stderr=stream,
            env=os.environ | {"PYTHONSAFEPATH": "1"},  # as `diptych train`, which imports nothing from this folder
        )
    watched = watch(process, trial, folder, metric, stop)
    code, figures = watched.exit_code, watched.figures
    if code == NOT_FINITE or (watched.is_pruned and code == STOPPED and not stop):
        trial.study.tell(trial, state=State.PRUNED)
        last = f"stopped early at {metric} {figures[max(figures)]:.4g}" if watched.is_pruned else "no finite loss"
        print(f"{what} | {last}", flush=True)
        return DONE
    if code != DONE and stop:
        print(f"diptych sweep: stopped by {stop[0]}. Run the same command to go on.", file=sys.stderr)
        return STOPPED
    if code != DONE:
        ended = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        said = "\n".join(map(message_line, ended))
        print(f"diptych sweep: {what} ended with exit code {code}; {log} ends with:\n{said}", file=sys.stderr)
        return code if code > 0 else 128 - code  # as a shell says that a signal ended it
    if not figures:
        raise UserError(
            f"{folder} has no {metric} in its evaluations, by which to choose. Prepare the data with a validation "
            f"split; if it has one, {log} says why the figure is missing."
        )
    best = None
    for value in figures.values():
        best = value if is_better(recipe, metric, value, best) else best
    earlier = [it.value for it in trial.study.get_trials(states=[State.COMPLETE])]
    trial.study.tell(trial, best)
    is_best = all(is_better(recipe, metric, best, value) for value in earlier)
    print(f"{what} | {metric} {best:.4g}{' | best so far' * is_best}", flush=True)
    return DONE


def is_better(recipe: Values, metric: str, value: float, best: float | None) -> bool:
    return is_improvement(metric, value, best, split_names(recipe.get("metrics", "")))


class Watched(NamedTuple):
    """How the process of a trial ended."""

    exit_code: int
    figures: dict[int, float]
    """Step -> the figure of its evaluation."""
    is_pruned: bool
    """Whether it was told to stop because others were better."""


def watch(process: subprocess.Popen, trial: optuna.Trial, folder: Path, metric: str, stop: list[str]) -> Watched:
    """Reports each evaluation to the study. Tells the process to stop if the study, or a signal, says so."""
    figures: dict[int, float] = {}
    is_pruned, code = False, None
    while code is None:
        code = process.poll()
        for step, value in evaluations(folder, metric).items():
            if step not in figures:
                figures[step] = value
                trial.report(value, step)
                if code is None and not is_pruned and trial.should_prune():
                    is_pruned = True
                    process.terminate()
        if code is None:
            if stop:
                process.terminate()
            time.sleep(SECONDS_BETWEEN_LOOKS)
    if code not in (DONE, STOPPED):  # a launcher says 1, whatever happened; a killed run could not say anything
        code = (read_status(folder) or {}).get("exit_code") or code
    return Watched(code, figures, is_pruned)


def evaluations(folder: Path, metric: str) -> dict[int, float]:
    """Step -> the figure, of the whole lines of metrics.jsonl."""
    file = last_training(folder) / "metrics.jsonl"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    by_step: dict[int, dict[str, Values]] = {}
    for line in text[: text.rfind("\n") + 1].splitlines():
        entry = json.loads(line)
        if kind_of(entry["split"]) == "validation":
            by_step.setdefault(entry["step"], {})[entry["split"]] = entry
    splits = max(map(len, by_step.values()), default=0)
    found = {step: selected_figure(metric, of) for step, of in by_step.items() if len(of) == splits}
    return {step: value for step, value in found.items() if not math.isnan(value)}  # a metric of one's own may fail


def write_results(study: optuna.Study, settings: SweepSettings, recipe: Values) -> None:
    """Of the trials that have ended."""
    out = Path(settings.out)
    table(study).to_csv(out / "trials.csv", index=False)
    if not (complete := study.get_trials(states=[State.COMPLETE])):
        return
    write_text(out / "best.yaml", yaml.safe_dump(recipe | study.best_params, sort_keys=False))
    with warnings.catch_warnings():  # that this is an experimental function of Optuna
        warnings.simplefilter("ignore")
        axes = optuna.visualization.matplotlib.plot_slice(study, target_name=study.user_attrs["metric"])
    axes = axes if len(complete[0].params) == 1 else axes[0]
    axes.figure.savefig(out / "sweep.png", dpi=120, bbox_inches="tight")
    for it in study.trials if not settings.keep else ():
        if it.state.is_finished() and it.number != study.best_trial.number:
            for name in ("checkpoints", "final", "stages"):
                shutil.rmtree(out / f"trial-{it.number:03d}" / name, ignore_errors=True)


def table(study: optuna.Study) -> pandas.DataFrame:
    """The best trial first; those that were stopped last."""
    found = study.trials_dataframe(attrs=("number", "value", "params", "state"))
    found = found.rename(columns={"number": "trial", "value": study.user_attrs["metric"]})
    found.columns = found.columns.str.removeprefix("params_")
    is_lower = study.direction == optuna.study.StudyDirection.MINIMIZE
    return found.sort_values(study.user_attrs["metric"], ascending=is_lower)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
