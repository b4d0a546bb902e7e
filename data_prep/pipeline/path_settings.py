"""Checks of settings that name a checkpoint, a file or a folder: they run before any work.

model: str = field(metadata=CHECKPOINT)
"""

import os
from pathlib import Path
from typing import Any

from diptych.data_prep.command_line.errors import UserError, escaped, in_short, nearest_file
from diptych.data_prep.rows.named_splits import named


def _check_checkpoint(name: str, option: str) -> None:
    if not os.path.isdir(name):
        from diptych.data_prep.text_to_ids.checkpoint_config import check_place  # 0.2 s, of huggingface_hub

        check_place(name)


def _check_prepared(name: str, option: str) -> None:
    if (Path(name) / "dataset_dict.json").is_file():
        return
    if os.path.isfile(name):
        why, rows = "it is a file", f" --data {name}"
    else:
        why, rows = "it has no dataset_dict.json" if os.path.isdir(name) else "there is no such folder", ""
    raise UserError(f"{name} is no prepared dataset ({why}). Make one with `diptych prepare{rows}`.")


def _check_exists(name: str, option: str) -> None:
    path = Path(name)
    if not os.path.lexists(path):
        near = nearest_file(path)
        hint = f" Did you mean {near}?" if near else ""
        raise UserError(f"{option} {name}: there is no such file or folder.{hint}")


def _check_template(name: str, option: str) -> None:
    from diptych.data_prep.text_to_ids.templates import load_template  # 0.1 s, of jinja2

    load_template(name)


def _check_source(name: str, option: str) -> None:
    if not os.path.exists(name):
        from diptych.data_prep.reading.sources import check_entry  # 0.2 s, of pyarrow

        check_entry(name)


def _check_output(name: str, option: str) -> None:
    """UserError where nothing can be written: before the work, which may take hours."""
    place = Path(name).absolute()
    if escaped(name) != name:
        raise UserError(f"{option} {name} has a line break or another control character. Choose another name.")
    try:
        place.resolve()
    except (OSError, RuntimeError) as error:  # a link that leads to itself
        raise UserError(f"{option} {name}: {in_short(error)} Choose another place.") from None
    above = next(folder for folder in (*place.parents, place) if folder.exists())
    if not os.access(above, os.W_OK | os.X_OK) or not above.is_dir():
        why = "you may not write there" if above.is_dir() else "this is a file"
        raise UserError(f"{option} {name}: nothing can be made in {above}: {why}. Choose another place.")


def _entries_of_dict(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return [f"{name}={it}" for name, its in value.items() for it in (its if isinstance(its, list) else [its])]


OUTPUT = {"check": _check_output}
"""A file or folder that will be written."""
CHECKPOINT = {"check": _check_checkpoint}
"""A folder that exists, or a Hub id."""
START = {"check": lambda name, option: name.startswith("diptych-") or _check_checkpoint(name, option)}
"""The same, or a named size."""
PREPARED = {"check": _check_prepared}
EXISTING = {"check": _check_exists}
TEMPLATE = {"check": _check_template}
SOURCE = {"check": _check_source}
"""What `diptych prepare` reads."""
NAMED = {"written": _entries_of_dict}
"""A list whose entries are name=value, which may be a dict: {"output": "answer"} is ["output=answer"]."""
NAMES = {"written": lambda value: ",".join(map(str, value)) if isinstance(value, list) else value}
"""A text of names between commas, which may be a list."""
NAMED_SOURCE = NAMED | {"check": lambda name, option: _check_source(named(name)[1], option)}
"""The same, perhaps with a name before it: news=a.jsonl."""
