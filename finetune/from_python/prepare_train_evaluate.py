"""`diptych.prepare`, `diptych.train` and `diptych.evaluate`: three commands as functions that return what they made.

    data = prepare([{"instruction": …, "input": …, "output": …}, …], tokenizer=CHECKPOINT)
    run = train(model=CHECKPOINT, data=data, out="runs/first", epochs=3)
    run.validation_loss                                          1.873
    evaluate(run, data, metrics="chrf").figures["chrf"]          41.2

They write the same folders as the commands, so that either may go on with what the other made.
"""

import json
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.pipeline.prepare_settings import PrepareSettings
from diptych.data_prep.pipeline.row_stages import OWN_COLUMNS
from diptych.data_prep.prepare import Prepared
from diptych.data_prep.prepare import prepare as prepare_by_settings
from diptych.finetune.commands.exit_codes import Stopped
from diptych.finetune.commands.model_settings import split_names
from diptych.finetune.evaluating.evaluate_settings import EvaluateSettings
from diptych.finetune.evaluating.evaluate_split import load_splits, predictions_file, report_file
from diptych.finetune.evaluating.evaluate_split import run as evaluate_by_settings
from diptych.finetune.run_files.run_folder import last_training, read_status
from diptych.finetune.train import run_recipe
from diptych.finetune.training.recipe import TrainRecipe
from diptych.finetune.training.stop_signals import SIGNALS, StopRequest
from diptych.keywords import Say, keywords_in_messages, printed_to, settings_of
from diptych.text_model import TextModel, load


@dataclass(frozen=True)
class TrainedRun:
    """What `train` wrote."""

    folder: Path

    @property
    def state(self) -> str:
        """How it ended: "done", or "stopped" by Ctrl-C or a signal, after which `train(…, resume=True)` goes on."""
        return read_status(self.folder)["state"]

    @property
    def figures(self) -> list[dict[str, Any]]:
        """metrics.jsonl: of each logged step and each evaluation the step, the split and its figures."""
        return _read_lines(last_training(self.folder) / "metrics.jsonl")

    @property
    def train_loss(self) -> float | None:
        """The last one, in nats per target token."""
        return self._last_loss("train")

    @property
    def validation_loss(self) -> float | None:
        """The last one; None where there was no validation set."""
        return self._last_loss("validation")

    @property
    def final(self) -> Path:
        """The folder of the final model, which `from_pretrained` loads."""
        return self.folder / "final"

    def __fspath__(self) -> str:
        return str(self.folder)

    def load(self, dtype: str = "auto", device: str = "auto") -> TextModel:
        """The final model, as `diptych.load` gives it."""
        return load(self.final, dtype, device)

    def _last_loss(self, split: str) -> float | None:
        losses = [entry["loss"] for entry in self.figures if entry["split"].split("/")[0] == split]
        return losses[-1] if losses else None


@dataclass(frozen=True)
class Report:
    """What `evaluate` found on one split."""

    figures: dict[str, float]
    """loss (nats per target token), metrics (0 to 100), and counts."""
    intervals: dict[str, tuple[float, float]]
    """Of each figure the lowest and highest value of its 95 % interval."""
    groups: dict[str, dict[str, dict[str, Any]]]
    """By column of `by` and its value: rows, sources, figures, intervals. Also by direction of translation, where rows
    have several."""
    predictions: list[dict[str, Any]] = field(repr=False)
    """Of each different source: source, references, prediction, finished, nats, target_tokens."""


@keywords_in_messages()
def prepare(data: Any = None, *, say: Say | None = None, **settings: Any) -> Prepared:
    """Rows to a checked, tokenised and packed dataset, as `diptych prepare` does it.

    Args:
        data: rows in memory, which are a list of dicts, a dict of columns, a `datasets.Dataset` or a pandas frame, or
            a dict (or DatasetDict) of these by the names of their splits, `{"train": rows, "test": others}`; or one or
            several paths, globs or Hub ids (`hf:user/name`). The format is recognised from the first rows.
        say: is called with each line that the command would print, such as `print`.
        settings: those of `diptych prepare` (PrepareSettings): tokenizer, out, template, max_source_tokens …

    Returns:
        The dataset: folder, splits (rows of each), rejected, rejects_file, warnings, manifest.

    Raises:
        UserError: a setting is wrong, or no row can be kept.
    """
    is_named = isinstance(data, str | os.PathLike) or (
        isinstance(data, list | tuple) and bool(data) and all(isinstance(name, str | os.PathLike) for name in data)
    )
    rows = None if is_named else data
    asked = settings_of(PrepareSettings, settings | ({"data": data} if is_named else {}))
    with printed_to(say):
        prepared = prepare_by_settings(asked, print, rows)
        print(prepared)
        print("".join(f"warning: {warning}\n" for warning in prepared.manifest["warnings"]), end="")
    return prepared


@keywords_in_messages()
def train(*, say: Say | None = None, **settings: Any) -> TrainedRun:
    """Train a checkpoint, or a new model, on prepared data, as `diptych train` does it, on this process alone.

    Ctrl-C, SIGTERM and SIGUSR1 let the step that is under way end, and save: the run's `state` is then "stopped".

    Args:
        say: is called with each line that the command would print, such as `print`.
        settings: those of a recipe (TrainRecipe): model, data, out, epochs or max_steps, learning_rate …

    Raises:
        UserError: a setting is wrong, or `out` holds another run; its subclasses CheckpointError, StorageError and
            NotFiniteError for what may go wrong later.
        KeyboardInterrupt: Ctrl-C before the first step, or a second one.
    """
    if isinstance(settings.get("data"), list | dict):
        raise UserError("data is a list or dict of rows. Prepare it first: data=diptych.prepare(rows, …).")
    recipe = settings_of(TrainRecipe, {name: _place_of(value) for name, value in settings.items()})
    with printed_to(say), _stop_by_signals() as stop:
        run_recipe(recipe, stop)
    return TrainedRun(Path(recipe.out))


@keywords_in_messages()
def evaluate(model: Any, data: Any, *, say: Say | None = None, **settings: Any) -> Report | dict[str, Report]:
    """Loss and metrics with 95 % intervals, as `diptych evaluate` finds them.

    Args:
        model: a checkpoint folder or Hub id, a TrainedRun, or what `diptych.load` gave.
        data: what `prepare` returned or the folder that it wrote; or rows in memory, as `prepare` takes them, all of
            which are evaluated, with the model's template.
        say: is called with each line that the command would print, such as `print`.
        settings: those of `diptych evaluate` (EvaluateSettings): split, metrics, num_beams, limit …

    Returns:
        The report. Of several test sets with names, a dict of one for each.

    Raises:
        UserError: a setting is wrong, the data were prepared for another tokenizer, or a row cannot be kept.
    """
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint, data = _place_of(model), _place_of(data)
        if not isinstance(data, str | os.PathLike):
            kept = sorted(set(split_names(settings.get("by", ""))) - OWN_COLUMNS - {"direction"})
            more = {"out": Path(scratch) / "prepared", "strict": True, "keep_columns": kept}
            data = prepare({"test": data}, tokenizer=checkpoint, **more).folder
        out = {"out": str(Path(scratch) / "report.json")}
        asked = settings_of(EvaluateSettings, out | settings | {"model": checkpoint, "data": data})
        names = list(load_splits(asked.data, asked.split))
        with printed_to(say):
            evaluate_by_settings(asked)
        reports = {}
        for name in names:
            file = report_file(asked.out, name, len(names))
            report = json.loads(file.read_text(encoding="utf-8"))
            reports[name] = Report(
                report["figures"],
                {figure: tuple(interval) for figure, interval in report["intervals"].items()},
                report["groups"],
                _read_lines(predictions_file(file)) if "predictions_sha256" in report else [],
            )
    return reports if len(reports) > 1 else reports[names[0]]


def _place_of(value: Any) -> Any:
    """The folder or Hub id of what one of these functions returned; any other value as it is."""
    if isinstance(value, TrainedRun):
        if not value.final.is_dir():
            raise UserError(f"the run {value.folder} is {value.state}: train(…, resume=True) goes on with it.")
        return str(value.final)
    if isinstance(value, TextModel):
        return value.name
    return str(value.folder) if isinstance(value, Prepared) else value


def _read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@contextmanager
def _stop_by_signals() -> Iterator[StopRequest]:
    """Inside, signals ask training to stop; afterwards they do what they did before. Python lets only the main thread
    say what signals do: elsewhere they are left alone."""
    stop, is_main = StopRequest(), threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in SIGNALS} if is_main else {}
    if is_main:
        stop.listen()
    try:
        yield stop
    except Stopped as error:
        raise KeyboardInterrupt(str(error)) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
