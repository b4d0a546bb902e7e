"""Settings that name a checkpoint, a file or a folder: each is looked for before any work.

model: str = field(metadata=CHECKPOINT)
"""

from __future__ import annotations

import os
from pathlib import Path

from diptych.data_prep.command_line.errors import UserError, nearest


def _check_checkpoint(name: str, given_as: str) -> None:
    if not os.path.isdir(name):
        from diptych.data_prep.text_to_ids.checkpoint_config import check_place  # 0.2 s, of huggingface_hub

        check_place(name)


def _check_start(name: str, given_as: str) -> None:
    if not name.startswith("diptych-"):  # a named size
        _check_checkpoint(name, given_as)


def _check_prepared(name: str, given_as: str) -> None:
    if not (Path(name) / "dataset_dict.json").is_file():
        why = "it has no dataset_dict.json" if os.path.isdir(name) else "there is no such folder"
        why, rows = ("it is a file", f" --data {name}") if os.path.isfile(name) else (why, "")
        raise UserError(f"{name} is no prepared dataset ({why}). Make one with `diptych prepare{rows}`.")


def _check_exists(name: str, given_as: str) -> None:
    path = Path(name)
    if not os.path.lexists(path):
        near = nearest(path.name, os.listdir(path.parent) if path.parent.is_dir() else [])
        hint = f" Did you mean {path.with_name(near)}?" if near else ""
        raise UserError(f"{given_as} {name}: there is no such file or folder.{hint}")


def _check_template(name: str, given_as: str) -> None:
    from diptych.data_prep.text_to_ids.templates import load_template

    load_template(name)


def _check_source(name: str, given_as: str) -> None:
    if not os.path.exists(name):
        from diptych.data_prep.reading.sources import check_entry  # 0.2 s, of pyarrow

        check_entry(name)


def _check_held_out(name: str, given_as: str) -> None:
    from diptych.data_prep.rows.named_splits import named

    _check_source(named(name)[1], given_as)


def _check_output(name: str, given_as: str) -> None:
    """Before the work, which may take hours, and not after it."""
    place = Path(name).absolute()
    above = next(folder for folder in place.parents if folder.exists())
    if not os.access(above, os.W_OK | os.X_OK) or not above.is_dir():
        why = "you may not write there" if above.is_dir() else "this is a file"
        raise UserError(f"{given_as} {name}: nothing can be made in {above}: {why}. Choose another place.")


OUTPUT = {"check": _check_output}
"""A file or folder that the work makes."""
CHECKPOINT = {"check": _check_checkpoint}
"""A folder, or what the Hub has; of a folder, only that it is there."""
START = {"check": _check_start}
"""The same, or a named size."""
PREPARED = {"check": _check_prepared}
EXISTING = {"check": _check_exists}
TEMPLATE = {"check": _check_template}
SOURCE = {"check": _check_source}
"""What `diptych prepare` reads."""
NAMED_SOURCE = {"check": _check_held_out}
"""The same, perhaps with a name before it: news=a.jsonl."""
