"""Rows that live in Python, as files that `diptych prepare` reads.

    with as_files({"data": rows, "test": {"news": frame}}, folder) as entries:
        …                              entries == {"data": [".prepared.rows/data-1.jsonl"],
                                                   "test": ["news=.prepared.rows/test-1.jsonl"]}

Rows are a list of dicts, a `datasets.Dataset` or `DatasetDict`, or a pandas frame. Texts and paths are sources that
`prepare` reads by itself: files, folders, globs, Hub ids. A list may hold several of any of these.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from diptych.data_prep.command_line.errors import UserError

TAKES_ROWS = ("data", "validation", "test", "decontaminate")
"""Settings of `prepare` that name rows."""
MAY_HAVE_NAMES = ("validation", "test")


@contextmanager
def as_files(keywords: Mapping[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
    """The keywords, with sources in place of rows. The files are written into `folder`, and removed at the end.

    Raises:
        UserError: what is given is neither rows nor a source, or a row cannot be written as JSON.
    """
    try:
        yield {
            name: _sources(name, value, folder) if name in TAKES_ROWS else value for name, value in keywords.items()
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sources(setting: str, given: Any, folder: Path) -> list[str]:
    if given is None:
        return []
    if isinstance(given, Mapping) and not isinstance(given, DatasetDict):
        if setting not in MAY_HAVE_NAMES:
            raise UserError(f"{setting} is a dict; one row is due as a list, [row], and sets with names in test=.")
        return [f"{name}={_source(f'{setting}-{name}', rows, folder)}" for name, rows in given.items()]
    several = given if _holds_sources(given) else [given]
    return [_source(f"{setting}-{number}", rows, folder) for number, rows in enumerate(several, start=1)]


def _holds_sources(given: Any) -> bool:
    """Whether this is a list of sources; a list of dicts is one source."""
    return isinstance(given, list | tuple) and not all(isinstance(row, Mapping) for row in given)


def _source(name: str, rows: Any, folder: Path) -> str:
    if isinstance(rows, str | os.PathLike):
        return os.fspath(rows)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(rows, Dataset | DatasetDict):
        place = folder / name
        rows.save_to_disk(place)
    elif hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # a pandas frame, without importing pandas
        place = folder / f"{name}.jsonl"
        _write(place, rows.astype(object).where(rows.notna(), None).to_dict("records"))
    elif isinstance(rows, Sequence) and all(isinstance(row, Mapping) for row in rows):
        place = folder / f"{name}.jsonl"
        _write(place, rows)
    else:
        raise UserError(
            f"{name} is a {type(rows).__name__}; rows are a list of dicts, a datasets.Dataset or DatasetDict, a pandas"
            f" frame, a path or a Hub id (hf:user/name)."
        )
    return str(place)


def _write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with file.open("w", encoding="utf-8") as stream:
        for number, row in enumerate(rows, start=1):
            try:
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            except (TypeError, ValueError) as error:
                raise UserError(f"row {number} is no JSON ({error}). Give texts, numbers and lists.") from None
