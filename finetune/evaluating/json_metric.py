"""The metric `json`, for outputs that are JSON: how many are, and which of their fields are right.

    json_valid         % of outputs that are JSON and fit the schema, if there is one
    json_exact         % that equal a reference as values: the order of an object's names does not count
    json_f1            F1 over all fields of all rows: a field is a path and its value, and {"a": {"b": [1, 2]}} has
                       a.b = 1 and a.b = 2
    json_exact.NAME    % of rows in which the field NAME of the top level equals that of the reference, or is in
                       neither and the output is JSON; for the MOST_FIELDS most frequent names of the references

Each row is compared with the reference that gives it the highest F1. An output that is no JSON has no fields, and
counts as wrong for each of them.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from diptych.data_prep.command_line.errors import UserError, excerpt
from diptych.data_prep.rows.json_schema import fault_of, parsed, read_schema
from diptych.finetune.evaluating.confidence_intervals import Statistics

MOST_FIELDS = 30
MISSING = object()


def count_json(
    predictions: Sequence[str], references: Sequence[Sequence[str]], schema: str | None = None
) -> Statistics:
    """`schema` is a file. UserError: a reference is not JSON."""
    rules = json.dumps(read_schema(schema)) if schema else "true"
    expected = [[_reference(text, row) for text in of_row] for row, of_row in enumerate(references)]
    counts = Counter(name for row in expected for name in (row[0] if isinstance(row[0], dict) else ()))
    names = [name for name, _ in counts.most_common(MOST_FIELDS)]
    table = []
    for text, of_row in zip(predictions, expected, strict=True):
        try:
            value = parsed(text)
        except ValueError:
            value = MISSING
        scored = [(*_overlap(value, reference), reference) for reference in of_row]
        shared, total, nearest = max(scored, key=lambda it: it[0] / max(it[1], 1))
        is_valid = value is not MISSING and fault_of(text, rules) is None
        exact = any(_written(value) == _written(reference) for reference in of_row)
        of_names = [
            value is not MISSING and _written(_field(value, name)) == _written(_field(nearest, name)) for name in names
        ]
        table.append([is_valid, exact, shared, total, *of_names, 1])

    def figures_of(sums: np.ndarray) -> dict[str, float]:
        valid, exact, shared, total, *fields, rows = map(float, sums)
        found = {"json_valid": valid / rows, "json_exact": exact / rows, "json_f1": shared / total if total else 1.0}
        found |= {f"json_exact.{name}": hits / rows for name, hits in zip(names, fields, strict=True)}
        return {name: 100 * value for name, value in found.items()}

    return Statistics(np.array(table, dtype=np.float64), figures_of)


def _reference(text: str, row: int) -> Any:
    try:
        return parsed(text)
    except ValueError as error:
        raise UserError(
            f"the metric json needs references that are JSON, and that of source {row + 1} is not ({error}):"
            f" {excerpt(text)}. `diptych prepare --json_schema FILE` leaves such rows out."
        ) from None


def _overlap(value: Any, reference: Any) -> tuple[int, int]:
    """Twice the fields that both have, and the fields of the one and of the other: F1 is their ratio."""
    found, wanted = (Counter(_fields(it)) for it in (value, reference))
    return 2 * (found & wanted).total(), found.total() + wanted.total()


def _fields(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, dict) and value:
        for name, of_name in value.items():
            yield from _fields(of_name, (*path, name))
    elif isinstance(value, list) and value:
        for item in value:
            yield from _fields(item, path)
    elif value is not MISSING:
        yield path, _written(value)


def _written(value: Any) -> str:
    """In one form, with an object's names sorted. MISSING equals itself alone."""
    return "" if value is MISSING else json.dumps(value, sort_keys=True)


def _field(value: Any, name: str) -> Any:
    return value.get(name, MISSING) if isinstance(value, dict) else MISSING
