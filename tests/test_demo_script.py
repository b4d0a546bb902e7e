"""examples/demo.py, whose run is `make demo`: how it counts."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_demo_counts_errors_against_the_nearest_pronunciation_with_and_without_stress():
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    rows = [
        {"prediction": "T AH0 M AA1 T OW2", "references": ["T AH0 M EY1 T OW2", "T AH0 M AA1 T OW2"]},
        {"prediction": "AE0 B IY0", "references": ["AE1 B IY0"]},
    ]
    assert demo.error_rates(rows, with_stress=True) == (pytest.approx(100 / 9), 50)
    assert demo.error_rates(rows, with_stress=False) == (0, 0)
    assert demo.RECIPE.is_file()
