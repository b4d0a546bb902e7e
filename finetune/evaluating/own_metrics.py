"""Metrics that are not built in: a function of the user's own, one of the library `evaluate`, COMET, BERTScore.

    def polite(predictions, references, sources):           my_metrics.py, in the current folder or on the path
        return [100.0 * text.endswith("요.") for text in predictions]

    my_metrics:polite      evaluate:meteor      ./my_script.py      comet      bertscore      as `metrics` names them
    my_metrics:misses:min                                                                     lower is better

A function gets N predictions, N lists of references and N sources. It returns a number, or N numbers whose mean is the
figure, or a dict of these: `{"polite": …}` is the figure polite, and `{"yo": …}` is polite.yo. Settings of
`metric_settings` are its further arguments.

N numbers are resampled as such. A number is first asked of each row alone: if it is the mean of these, they are
resampled. If not, the function is applied to the texts of every resample, unless that takes more than MOST_SECONDS.
"""

import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from huggingface_hub import constants

from diptych.data_prep.command_line.errors import UserError, excerpt, in_short, is_out_of_memory, library_errors
from diptych.finetune.evaluating.confidence_intervals import MetricFault, Scored, means
from diptych.finetune.inference.generation_config import warn_once

MOST_SECONDS = 60.0
"""For the intervals or the tests of a metric, and for the search of a row at which it fails."""

Row = tuple[str, list[str], str]
"""Prediction, references, source."""


class MetricName(NamedTuple):
    """What an entry of `metrics` means, where it names no built-in metric."""

    place: str
    """my_metrics:polite, evaluate:meteor, ./my_script.py, comet."""
    figure: str
    """Of its figures: polite, evaluate.meteor, my_script, comet."""
    lower_is_better: bool | None
    """If it says so."""


def parse_metric_name(written: str) -> MetricName | None:
    """None for what can only be a built-in metric."""
    better = {":min": True, ":max": False}.get(written[-4:])
    place = written if better is None else written[:-4]
    if place.startswith("evaluate:"):
        return MetricName(place, f"evaluate.{Path(place[9:]).stem}", better)
    if place in BRIDGES:
        return MetricName(place, place, better)
    if place.endswith(".py") or "/" in place:
        return MetricName(place, Path(place).stem, better)
    return MetricName(place, place.rpartition(":")[2], better) if ":" in place else None


@dataclass(frozen=True)
class OwnMetric:
    name: MetricName
    function: Callable[..., Any]
    signature: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __call__(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], sources: Sequence[str]
    ) -> Scored:
        """MetricFault, with the first row where it fails alone, if the function raises or returns no number."""
        rows = [(text, [*row], source) for text, row, source in zip(predictions, references, sources, strict=True)]
        started = time.monotonic()
        try:
            found = self.apply(rows)
        except MetricFault as fault:
            raise MetricFault(f"metric {self.name.place} {fault}{self._row_at_fault(rows)}") from fault
        if all(np.ndim(value) for value in found.values()):
            scores = np.column_stack(list(found.values()))
            return means(list(found), scores, scale=1.0)._replace(signature=self.signature)
        figures = {name: float(np.mean(value)) for name, value in found.items()}
        return AppliedMetric(self, rows, figures, time.monotonic() - started)

    def apply(self, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        """Each figure, () or (N,). MetricFault says what the function did instead."""
        predictions, references, sources = map(list, zip(*rows, strict=True))
        try:
            result = self.function(predictions, [[*row] for row in references], sources, **self.settings)
        except MetricFault:
            raise
        except (Exception, SystemExit) as error:
            if is_out_of_memory(error):
                raise
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}, line {last.lineno}"
            raise MetricFault(f"raised {type(error).__name__} ({where}): {in_short(error)}") from error
        figure = self.name.figure
        named = result if isinstance(result, Mapping) else {figure: result}
        own_key = figure.removeprefix("evaluate.")  # {"meteor": …} of evaluate:meteor is the figure evaluate.meteor
        named = {figure if key in (figure, own_key) else f"{figure}.{key}": value for key, value in named.items()}
        return {key: _numbers(key, value, len(rows)) for key, value in named.items()} or _numbers(figure, {}, 1)

    def _row_at_fault(self, rows: Sequence[Row]) -> str:
        """The first row with which it fails alone, where it does not with each."""
        started, at_fault, is_ever_right = time.monotonic(), 0, False
        for number, row in enumerate(rows, start=1):
            if (at_fault and is_ever_right) or time.monotonic() - started > MOST_SECONDS:
                break
            try:
                self.apply([row])
                is_ever_right = True
            except MetricFault:
                at_fault = at_fault or number
        if not at_fault:
            return " It fails with none of the rows alone."
        if not is_ever_right:
            return " It also fails with each row alone."
        prediction, _, source = (excerpt(repr(text), 60) for text in rows[at_fault - 1])
        return (
            f" It also fails with row {at_fault} of the predictions alone: source {source}, prediction {prediction}."
        )


def _numbers(name: str, value: Any, rows: int) -> np.ndarray:
    """() or (rows,), float64. MetricFault for all else."""
    try:
        if value is None or isinstance(value, str | bytes) or "/" in name:
            raise TypeError
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise MetricFault(f"returned no number for {name}: {excerpt(repr(value), 60)}.") from None
    if numbers.shape not in ((), (rows,)):
        raise MetricFault(
            f"returned numbers of shape {numbers.shape} for {name}; it must be one, or one for each of {rows} rows."
        )
    if not np.isfinite(numbers.sum(initial=0.0) * 1e6):  # also what is too large to be added up
        raise MetricFault(f"returned no number for {name}: {numbers.flat[np.abs(numbers).argmax()]}.")
    return numbers


@dataclass(frozen=True)
class AppliedMetric:
    """Figures that follow from the texts of all sources together, as far as is known (`Scored`)."""

    metric: OwnMetric
    rows: list[Row]
    found: dict[str, float]
    seconds: float
    """That the function took for all rows."""

    @property
    def signature(self) -> str:
        return self.metric.signature

    @property
    def sources(self) -> int:
        return len(self.rows)

    def figures(self) -> dict[str, float]:
        return self.found

    def at(self, places: np.ndarray) -> Scored:
        return self.metric(*zip(*(self.rows[place] for place in places), strict=True))

    def resampled(self, times: int) -> Scored:
        by_row = self._by_row()
        if by_row is None and times * self.seconds > MOST_SECONDS:
            raise MetricFault(
                f"it is no mean over rows, and {times:,} resamples of {self.seconds:.2g} s each take more than "
                f"{MOST_SECONDS:.0f} s. Let the function return a number for each row, if it can."
            )
        return by_row or self

    def _by_row(self) -> Scored | None:
        """The figures as means of those of each row, if they are that."""
        scores, started = [], time.monotonic()
        for row in self.rows:
            try:
                of_row = self._figures([row])
            except MetricFault:
                return None
            scores.append([of_row[name] for name in self.found])
            if time.monotonic() - started > MOST_SECONDS:
                return None
        found = means(list(self.found), scores, scale=1.0)._replace(signature=self.signature)
        return found if np.allclose(list(found.figures().values()), list(self.found.values()), rtol=1e-6) else None

    def drawn(self, weights: np.ndarray) -> dict[str, float]:
        return self._figures([row for row, times in zip(self.rows, weights, strict=True) for _ in range(int(times))])

    def exchanged(self, other: "AppliedMetric", mask: np.ndarray) -> dict[str, float]:
        pairs = zip(self.rows, other.rows, mask, strict=True)
        return self._figures([theirs if is_other else ours for ours, theirs, is_other in pairs])

    def _figures(self, rows: Sequence[Row]) -> dict[str, float]:
        figures = {name: float(np.mean(value)) for name, value in self.metric.apply(rows).items()}
        if figures.keys() != self.found.keys():
            raise MetricFault(f"it returned {', '.join(self.found)} for all rows, and {', '.join(figures)} for some.")
        return figures


def load_metric(name: MetricName, settings: Mapping[str, Any]) -> OwnMetric:
    """UserError if there is no such metric, or it does not take the settings."""
    place = name.place
    if place in BRIDGES:
        function, signature = BRIDGES[place], place
    elif place.startswith("evaluate:") or place.endswith(".py") or "/" in place:
        function, signature = _of_evaluate(place.removeprefix("evaluate:"))
    else:
        function, signature = _of_module(place)
    check_arguments(function, 3, place, settings)
    if place in BRIDGES:
        _check_bridge(place, **settings)
    if settings:
        signature += f"|{json.dumps(settings, ensure_ascii=False, default=str)}"
    return OwnMetric(name, function, signature, settings)


def check_arguments(function: Callable[..., Any], texts: int, name: str, settings: Mapping[str, Any]) -> None:
    """UserError if the function cannot be called with so many lists of texts and these settings."""
    try:
        inspect.signature(function).bind(*[[]] * texts, **settings)
    except TypeError as error:
        raise UserError(
            f"metric {name} cannot be called: {in_short(error)} It is called with predictions, references and "
            f"sources, and with its metric_settings: {', '.join(settings) or 'none are given'}."
        ) from None
    except ValueError:  # a builtin that does not tell its arguments
        pass


def _of_module(place: str) -> tuple[Callable[..., Any], str]:
    """The function `my_metrics:polite`, and its signature with a hash of the file."""
    module, _, name = place.rpartition(":")
    importlib.invalidate_caches()
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # last, so that no file there hides a library
    remedy = "A metric is module:function, with the module in the current folder or on the path."
    with library_errors(f"metric {place}: the module {module} cannot be imported", remedy):
        found = importlib.import_module(module)
    function = getattr(found, name, None)
    if not callable(function):
        names = ", ".join(key for key, it in vars(found).items() if inspect.isfunction(it)) or "none"
        file = getattr(found, "__file__", module)
        raise UserError(f"metric {place}: {file} has no function {name!r}. Its functions are: {names}.")
    return function, f"{place}|sha256:{_hash_of(place, function)}"


def _hash_of(place: str, it: Any) -> str:
    """Of the file in which it stands, which is told; "" where there is none."""
    try:
        file = Path(inspect.getfile(it))
        warn_once(f"(metric {place} runs code of {file})")
        return hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    except (TypeError, OSError):
        return ""


# The library `evaluate`


@functools.cache
def _of_evaluate(place: str) -> tuple[Callable[..., Any], str]:
    """A metric by its name on the Hub (loaded, or in the cache), or by the path of its script, whose code runs."""
    import evaluate  # half a second

    evaluate.config.HF_EVALUATE_OFFLINE |= constants.HF_HUB_OFFLINE  # by which the library asks no network
    with library_errors(
        f"the library evaluate cannot load the metric {place}",
        "Without a network, it has to be in the cache of evaluate. Or give the path of a script: ./my_metric.py.",
    ):
        metric = evaluate.load(place, keep_in_memory=True)
    features = metric.info.features
    features = features if isinstance(features, list) else [features]
    names = [name for name in ("predictions", "references", "sources") if name in features[0]]
    if unknown := features[0].keys() - set(names):
        raise UserError(f"metric {place} of evaluate needs {', '.join(sorted(unknown))}, which evaluation has not.")
    is_single = not any(isinstance(it.get("references"), list | datasets.List | datasets.Sequence) for it in features)

    def compute(predictions, references, sources, **settings):
        if is_single:
            if any(len(row) > 1 for row in references):
                warn_once(f"({place} of evaluate takes one reference: the first of each source is used)")
            references = [row[0] for row in references]
        given = {"predictions": predictions, "references": references, "sources": sources}
        result = metric.compute(**{name: given[name] for name in names}, **settings)
        if not isinstance(result, Mapping):
            return result
        figures = {key: value for key, value in result.items() if np.isscalar(value) and not isinstance(value, str)}
        if left_out := ", ".join(result.keys() - figures.keys()):
            warn_once(f"({place} of evaluate also returns {left_out}, which is no number and is left out)")
        return figures

    return compute, f"evaluate {evaluate.__version__}:{Path(place).stem}|sha256:{_hash_of(place, type(metric))}"


# Metrics by large models, whose packages are not needed otherwise

_COMET = """
import json, sys
from comet import load_from_checkpoint
with open(sys.argv[1], encoding="utf-8") as file:
    asked = json.load(file)
model = load_from_checkpoint(asked["model"])
if model.requires_references() and "ref" not in asked["rows"][0]:
    sys.exit("this checkpoint compares with references, and there are none.")
output = model.predict(asked["rows"], batch_size=asked["batch_size"], gpus=asked["gpus"])
with open(sys.argv[2], "w", encoding="utf-8") as file:
    json.dump([float(score) for score in output["scores"]], file)
"""


def comet(predictions, references, sources, *, model: str, python=sys.executable, prefix="", batch_size=8, gpus=0):
    """COMET (Rei et al. 2020, arXiv 2009.09025), times 100, by the best reference. `model`: a checkpoint (….ckpt).
    unbabel-comet needs older libraries than Diptych, so `python`, the interpreter of another environment, runs it.
    `prefix`: what the template puts before each source, which COMET is not to read."""
    is_compared = any(map(any, references))
    asked = [
        {"src": source.removeprefix(prefix), "mt": text} | ({"ref": it} if is_compared else {})
        for source, text, of_row in zip(sources, predictions, references, strict=True)
        for it in of_row
    ]
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder) / "asked.json", Path(folder) / "scores.json"
        content = {"model": str(Path(model).expanduser()), "rows": asked, "batch_size": batch_size, "gpus": gpus}
        question.write_text(json.dumps(content), encoding="utf-8")
        command = [str(Path(python).expanduser()), "-c", _COMET, str(question), str(answer)]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            lines = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
            raise MetricFault(f"failed in {python}: {excerpt(lines[-1])}")
        scores = iter(json.loads(answer.read_text(encoding="utf-8")))
    return [100 * max(next(scores) for _ in of_row) for of_row in references]


def bertscore(predictions, references, sources, *, model: str, layers: int, device: str | None = None, batch_size=64):
    """BERTScore (Zhang et al. 2020, arXiv 1904.09675), times 100, by the best reference, not rescaled. `model`: the
    path of an encoder; `layers`: which of its layers is compared. An empty text scores 0, as in bert_score."""
    scorer = _bert_scorer(str(Path(model).expanduser()), layers, device)
    places = [
        place for place, text in enumerate(predictions) if text.strip() and all(map(str.strip, references[place]))
    ]
    scores = np.zeros((3, len(predictions)))
    if places:
        pairs = [[side[place] for place in places] for side in (predictions, references)]
        scores[:, places] = [100 * side.numpy() for side in scorer.score(*pairs, batch_size=batch_size)]
    return dict(zip(("precision", "recall", "f1"), scores, strict=True))


@functools.cache
def _bert_scorer(model: str, layers: int, device: str | None) -> Any:
    from bert_score import BERTScorer

    return BERTScorer(model_type=model, num_layers=layers, device=device)


def _check_bridge(place: str, *, model: str, python: str = sys.executable, **others: Any) -> None:
    """UserError if the model or the package is not there: it may be needed hours later."""
    if not Path(model).expanduser().exists():
        raise UserError(f"metric_settings.{place}.model: there is no {model}. Name the path of a model on this disk.")
    package, remedy = {
        "comet": ("comet", "Make an environment with unbabel-comet, and name its interpreter: {comet: {python: …}}."),
        "bertscore": ("bert_score", "pip install 'diptych[bertscore]'."),
    }[place]
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{package}') is None)"
    try:
        is_missing = subprocess.run([str(Path(python).expanduser()), "-c", look], capture_output=True).returncode
    except OSError as error:
        raise UserError(f"metric_settings.{place}.python: {python} cannot be run: {in_short(error)}") from None
    if is_missing:
        raise UserError(f"metric {place} needs the package {package}, which {python} does not have. {remedy}")


BRIDGES: dict[str, Callable[..., Any]] = {"comet": comet, "bertscore": bertscore}
