"""Rows that are in memory already, as sources like those of files: for `prepare(settings, rows=…)` from Python.

    open_rows([{"instruction": "Add.", "output": "2"}], limits)                  → [Source("rows", split="train")]
    open_rows(DatasetDict({"train": …, "test": …}), limits)                      → [Source("rows:train"), …:test]

The origin of the seventh row is "rows:7", or "rows:test:7" in a split.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy
import xxhash
from datasets import Dataset

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.reading.find_files import Limits
from diptych.data_prep.reading.row_chunks import Finished, in_chunks
from diptych.data_prep.reading.sources import TRAIN, Source, hub_source
from diptych.data_prep.rows.named_splits import HELD_OUT, KINDS, kind_in_name
from diptych.data_prep.rows.records import Origin, Row

RowsInMemory = Sequence[Mapping[str, Any]] | Dataset | Any | Mapping[str, Any]
"""A list of dicts, a dict of columns, a Dataset, a pandas frame; or these by the names of their splits, as a
DatasetDict has them."""

NAME = "rows"


def open_rows(rows: RowsInMemory, limits: Limits) -> list[Source]:
    """One source, to train on; or one for each split of a dict or DatasetDict. UserError where the name of a split is
    neither of train nor of validation nor of test, or a row is no dict."""
    if not isinstance(rows, Mapping) or (_are_columns(rows) and not any(kind_in_name(name) in KINDS for name in rows)):
        return [_source(rows, NAME, TRAIN, limits)]
    for name in rows:
        if kind_in_name(name) not in KINDS:
            raise UserError(
                f"rows has the split '{name}'. Name each split train, validation or test, or give rows as"
                " [{'instruction': 'Add.', 'output': '2'}, …] or columns as {'instruction': ['Add.', …], 'output': …}."
            )
    kinds = [kind_in_name(name) for name in rows]
    sources = []
    for kind, name in sorted(zip(kinds, rows, strict=True), key=lambda pair: KINDS.index(pair[0])):
        # Several sets to validate or to test keep their names: test_news beside test_web is test/test_news.
        split = f"{kind}/{name.rpartition('/')[2]}" if kind in HELD_OUT and kinds.count(kind) > 1 else kind
        sources.append(_source(rows[name], f"{NAME}:{name}", split, limits))
    return sources


def _are_columns(rows: Any) -> bool:
    """{"instruction": ["Add.", …], "output": ["2", …]}: a dict of lists, not of rows."""
    columns = rows.values() if isinstance(rows, Mapping) else ()
    is_list = [isinstance(it, list | tuple | numpy.ndarray) and not isinstance([*it, 0][0], Mapping) for it in columns]
    return bool(is_list) and all(is_list)


def _source(rows: Any, name: str, split: str, limits: Limits) -> Source:
    if hasattr(rows, "to_parquet") and hasattr(rows, "iloc"):  # a pandas frame, without an import of pandas
        rows = Dataset.from_pandas(rows, preserve_index=False)
    if isinstance(rows, Dataset):
        return hub_source(rows, name, NAME, limits, split)
    if isinstance(rows, str | os.PathLike):
        raise UserError(f'{name} is a path. Files have settings of their own: data="train.jsonl", test="test.jsonl".')
    if _are_columns(rows):
        lengths = {column: len(values) for column, values in rows.items()}
        if len(set(lengths.values())) > 1:
            raise UserError(f"{name} has columns of different lengths, {lengths}. Give a value for each row.")
        rows = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    rows = list(rows)
    for place, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise UserError(f"{name}:{place} is of type {type(row).__name__}, and each row is a dict of its fields.")
    raws = [json.dumps(row, ensure_ascii=False, default=str) for row in rows]
    digest = xxhash.xxh3_128_hexdigest("\n".join(raws).encode("utf-8", "surrogatepass"))

    def chunks() -> Iterator[Finished]:
        numbered = enumerate(zip(rows, raws, strict=True), start=1)
        return in_chunks((Row(row, Origin(name, place), raw) for place, (row, raw) in numbered), lambda: 0)

    return Source(name, digest, None, chunks, NAME, split=split)
