"""How well a model's confidence tells right outputs from wrong ones, and the fit that makes a probability of it.

    found = calibrated(outputs, right, seed=0)
    found.figures["right_at_half_coverage"]       % right of the half of the outputs that is surest
    plot_risk(found, Path("report.risk.png"))

Coverage is the part of the outputs that is kept, the surest first; risk is the part of these that is wrong (El-Yaniv
and Wiener 2010). All figures come from probabilities of outputs that the fit had not seen: it is made on each half of
the outputs, and applied to the other. What is stored is the fit on all of them. With too few outputs for a fit, the
surest are those with the highest mean log-probability per token. N outputs.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.evaluating.confidence_intervals import Scored
from diptych.finetune.inference.output_confidence import features
from diptych.finetune.inference.outputs import Output

LEAST_OUTPUTS = 40
LEAST_OF_A_KIND = 5
"""Right and wrong outputs that a fit needs."""
BINS = 10
RIDGE = 1e-2
"""Of the squared weights of standardised features, which it keeps finite where no output is told wrongly."""


class Calibrated(NamedTuple):
    weights: list[float]
    """As `output_confidence.Calibration` has them; none without a fit."""
    figures: dict[str, float]
    coverage: np.ndarray
    """(N,), 1/N to 1."""
    risk: np.ndarray
    """(N,) at each coverage."""
    not_fitted: str = ""
    """Why there is no fit."""

    @property
    def warning(self) -> str:
        """What is wrong with the fit; "" if it tells right outputs from wrong ones."""
        half, right = (self.figures[name] for name in ("right_at_half_coverage", "right"))
        if half > right:
            return ""
        return (
            f"right_at_half_coverage ({half:.2f}) is not above right ({right:.2f}): this confidence does not tell"
            " right outputs from wrong ones. Do not use it to leave outputs to a person."
        )


def parse_right(written: str) -> tuple[str, float | None]:
    """`exact_match` → ("exact_match", None), all of 100; `chrf:60` → ("chrf", 60.0). UserError for no number."""
    metric, _, least = written.rpartition(":")
    if not metric:
        return written, None
    try:
        return metric, float(least)
    except ValueError:
        raise UserError(
            f"confidence is {written!r}. Name a metric, and the least score that counts as right: chrf:60."
        ) from None


def right_of(figure: str, least: float | None, scored: Scored, outputs: int) -> np.ndarray:
    """Whether each output is right by its own score, (N,)."""
    scores = [scored.at(np.array([place])).figures()[figure] for place in range(outputs)]
    return np.array(scores) >= (100.0 if least is None else least) - 1e-9


def calibrated(outputs: Sequence[Output], right: np.ndarray, seed: int) -> Calibrated:
    """Without a fit (`not_fitted`) where there are too few outputs, or too few of them are right or wrong."""
    table, wanted = np.array([features(output) for output in outputs]), right.astype(float)
    is_fitted = len(outputs) >= LEAST_OUTPUTS and min(wanted.sum(), (1 - wanted).sum()) >= 2 * LEAST_OF_A_KIND
    probability = _by_halves(table, wanted, seed) if is_fitted else table[:, 0]
    order = np.argsort(-probability, kind="stable")
    kept = np.arange(1, len(outputs) + 1)
    risk = np.cumsum(1 - wanted[order]) / kept
    half = len(outputs) // 2
    figures = {
        "right": 100 * wanted.mean(),
        "right_at_half_coverage": 100 * (1 - risk[half - 1]),
        "area_under_risk": 100 * risk.mean(),
    }
    if not is_fitted:
        not_fitted = (
            f"confidence cannot be fitted to {len(outputs)} outputs of which {int(wanted.sum())} are right: it takes"
            f" {LEAST_OUTPUTS}, with {2 * LEAST_OF_A_KIND} right and as many wrong. Evaluate more rows, or let a"
            f" {'lower' if wanted.mean() < 0.5 else 'higher'} score count as right, as 40 in --confidence chrf:40."
        )
        return Calibrated([], figures, kept / len(outputs), risk, not_fitted)
    bins = np.array_split(order, BINS)
    off = [abs(probability[places].mean() - wanted[places].mean()) * len(places) for places in bins]
    figures["calibration_error"] = 100 * sum(off) / len(outputs)
    figures["brier"] = float(((probability - wanted) ** 2).mean())
    return Calibrated(fit(table, wanted).tolist(), figures, kept / len(outputs), risk)


def _by_halves(table: np.ndarray, wanted: np.ndarray, seed: int) -> np.ndarray:
    """The probability of each output (N,), by a fit to the half that it is not in."""
    halves = np.random.default_rng(seed).permutation(len(wanted)) % 2
    for kind in (0.0, 1.0):  # each half has both kinds
        halves[wanted == kind] = np.arange(int((wanted == kind).sum())) % 2
    probability = np.empty(len(wanted))
    for half in (0, 1):
        weights = fit(table[halves == half], wanted[halves == half])
        probability[halves != half] = _logistic(table[halves != half] @ weights)
    return probability


def fit(table: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Weights (4,) of the features (N, 4), the last of which is 1, by logistic regression."""
    mean, spread = table[:, :-1].mean(0), table[:, :-1].std(0)
    spread[spread == 0] = 1.0
    scaled = np.column_stack([(table[:, :-1] - mean) / spread, table[:, -1]])

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        values = scaled @ weights
        nats = np.logaddexp(0, values) - wanted * values
        slope = scaled.T @ (_logistic(values) - wanted) / len(wanted)
        penalty = np.append(weights[:-1], 0.0)
        return nats.mean() + RIDGE / 2 * (penalty**2).sum(), slope + RIDGE * penalty

    found = minimize(loss, np.zeros(table.shape[1]), jac=True, method="L-BFGS-B").x
    slopes = found[:-1] / spread
    return np.append(slopes, found[-1] - slopes @ mean)


def _logistic(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(values, -700, 700)))


def plot_risk(found: Calibrated, picture: Path, right: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(100 * found.coverage, 100 * found.risk, label="the surest first")
    axes.axhline(100 * found.risk[-1], color="tab:gray", linestyle=":", label="in any order")
    best = np.clip(1 - (1 - found.risk[-1]) / found.coverage, 0, 1)
    axes.plot(100 * found.coverage, 100 * best, color="tab:green", linestyle="--", label="all right ones first")
    axes.set_xlabel("coverage: % of the outputs that are kept")
    axes.set_ylabel(f"risk: % of these that are wrong ({right})")
    axes.set_xlim(0, 100)
    axes.set_ylim(0, None)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    beside = picture.with_name(f"{picture.stem}.partial.png")
    figure.savefig(beside, dpi=120)
    pyplot.close(figure)
    os.replace(beside, picture)


def table_of(found: Calibrated, right: str) -> list[str]:
    """Lines for the printed report."""
    names: dict[str, Any] = {
        "right": f"% of outputs are right ({right})",
        "right_at_half_coverage": "% of the half of which the model is surest",
        "area_under_risk": "% wrong, in the mean over all coverages",
        "calibration_error": "points between probability and share that is right, in the mean over tenths",
        "brier": "squared error of the probability",
    }
    return [f"{name:24}{found.figures[name]:>9.2f}  {note}" for name, note in names.items() if name in found.figures]
