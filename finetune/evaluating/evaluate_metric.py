"""Our metrics for code that uses the `evaluate` library, whose import takes half a second.

TextMetric("chrf").compute(predictions=["학생이다."], references=[["학생이야.", "학생이다."]])
-> {"chrf": 100.0, "chrf_signature": "…"}
"""

import datasets
import evaluate

from diptych.finetune.evaluating.metrics import METRICS, check_pairs, figures_and_signatures


class TextMetric(evaluate.Metric):
    """One of METRICS for code that uses the `evaluate` library. Nothing is written to its cache."""

    def __init__(self, name: str):
        self.count = METRICS[name]
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
        return evaluate.MetricInfo(
            description=self.count.__doc__,
            citation="",
            inputs_description="predictions: list[str]; references: list[list[str]], one or more for each prediction.",
            features=datasets.Features(features),
        )

    def add_batch(self, *, predictions: list[str], references: list[list[str]]) -> None:
        """Collects predictions and references. `compute` calls it, too, so that every row is checked."""
        check_pairs(predictions, references)
        super().add_batch(predictions=predictions, references=references)

    def _compute(self, predictions, references, **settings) -> dict[str, float | str]:
        figures, signatures = figures_and_signatures([self.count(predictions, references, **settings)])
        return figures | {f"{name}_signature": signature for name, signature in signatures.items()}
