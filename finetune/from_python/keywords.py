"""What the functions of `import diptych` share: settings made of keywords, and where the printed lines go.

settings_of(TrainRecipe, {"lr": 1e-4})     UserError: there is no setting lr. Here it is learning_rate: …
with printed_to(say): …                    each line that the work prints becomes say(line)
"""

import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TypeVar

import datasets
import numpy as np
import transformers

from diptych.data_prep.command_line.arguments import from_values
from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.command_line.run_command import check_places, printable

Settings = TypeVar("Settings")
Say = Callable[[str], None]


def settings_of(settings_class: type[Settings], keywords: Mapping[str, Any]) -> Settings:
    """The settings of a command, with the checks and the messages of its command line. UserError where a keyword is no
    setting, its value does not fit, or it names a place that is not there."""
    settings = from_values(settings_class, {name: plain(value, name) for name, value in keywords.items()})
    check_places(settings_class, vars(settings))
    return settings


def plain(value: Any, name: str) -> Any:
    """What a recipe could hold: paths as texts, tuples as lists, numpy's numbers as Python's. UserError: the value of
    the keyword `name` is an object, such as a model or rows."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {inner: plain(part, name) for inner, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part, name) for part in value]
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, str | int | float | None):
        raise UserError(
            f"{name} is of type {type(value).__name__}. Settings are texts, numbers, True or False, lists and dicts;"
            f" save a model or tokenizer into a folder and name the folder, and give rows to diptych.prepare."
        )
    return value


@contextmanager
def keywords_in_messages() -> Iterator[None]:
    """Inside, the message of a UserError names settings as keywords: `--resume true` → `resume=True`, `--lossy_text
    drop` → `lossy_text drop`. What is to be typed into a shell (`diptych prepare --data …`) stays."""

    def as_keyword(option: re.Match) -> str:
        shell, name, value = option.groups()
        return shell or (f"{name}={value.title()}" if value else name)

    try:
        yield
    except UserError as error:
        lines = [line.replace("--help", "docs/settings.md") for line in error.args]
        option = r"(diptych [a-z]+ [^`]*)|(?<![\w-])--([a-z]\w*)(?: (true|false)\b)?"
        error.args = tuple(re.sub(option, as_keyword, line) for line in lines)
        raise


@contextmanager
def printed_to(say: Say | None) -> Iterator[None]:
    """Inside, what is printed on stdout and stderr goes to `say`, a line at a time, and nowhere without `say`.
    Progress bars and the remarks of transformers and datasets are left out."""
    verbosity = transformers.logging.get_verbosity(), datasets.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    datasets.logging.set_verbosity_error()
    lines = _Lines(say)
    try:
        with redirect_stdout(lines), redirect_stderr(lines):
            yield
    finally:
        transformers.logging.set_verbosity(verbosity[0])
        datasets.logging.set_verbosity(verbosity[1])


class _Lines(io.TextIOBase):
    """A stream that hands on whole lines. `say` itself prints to what was stdout before."""

    def __init__(self, say: Say | None):
        self.say, self.stdout, self.begun = say, sys.stdout, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self.begun = (self.begun + text).split("\n")
        for line in lines:
            if self.say and "\r" not in line:  # which progress bars are drawn with
                with redirect_stdout(self.stdout):
                    self.say(printable(line))
        return len(text)
