"""Settings that most commands share: which checkpoint, on which device, asked how.

Nothing heavy is imported by files of settings, so that --help and mistakes are answered at once; what only a model, a
tokenizer or another library knows is checked by the work. The fields' docstrings are the text of --help.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.pipeline.path_settings import CHECKPOINT, TEMPLATE
from diptych.data_prep.rows.records import Languages


@dataclass(frozen=True)
class ModelSettings:
    """A checkpoint, and how it is loaded."""

    model: str = field(metadata=CHECKPOINT)
    """Checkpoint folder (after training: RUN/final), adapter folder, or Hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights; `auto`: the type in which the checkpoint was saved."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; `auto` uses an accelerator if there is one."""


@dataclass(frozen=True)
class PromptSettings(ModelSettings):
    """A checkpoint that is asked something."""

    template: str = field(default="", metadata=TEMPLATE)
    """Name or file of a prompt template. Default: the one that is saved with the tokenizer."""
    source_language: str = ""
    """Language of the input, for multilingual models: a code of the tokenizer (eng_Latn), or a short one (en). Rows
    and requests can have their own. For T5, input without instruction begins `translate English to Korean:`."""
    target_language: str = ""
    """Language of the output, in the same way. Default for both: the language in the tokenizer."""

    @property
    def languages(self) -> Languages:
        return Languages(self.source_language, self.target_language)


def split_names(names: str) -> list[str]:
    """`"chrf, bleu"` -> `["chrf", "bleu"]`; no names give no list."""
    return [name.strip() for name in names.split(",") if name.strip()]


def check_positive(settings: Any, *names: str) -> None:
    """UserError where one of these settings is given and below 1."""
    for name in names:
        if getattr(settings, name) is not None and getattr(settings, name) < 1:
            raise UserError(f"{name} is {getattr(settings, name)}; it must be 1 or more.")
