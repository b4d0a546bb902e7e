"""From a record to source text and target text, by the same code in preparation and at inference.

    TEMPLATES["translate"].render_source("Translate English to Korean:", "Go.")  == "Translate English to Korean: Go."
    TEMPLATES["translate"].render_target("가.")                                  == "가."

A template is two Jinja texts. The source knows `instruction`, `input` and `history` (earlier (instruction, output)
turns), the target knows `output`. Data is inserted, never interpreted: an input `{{ 7 * 7 }}` stays as it is. A user's
file is the source; after a line `{# target #}` the target may follow, which is `{{ output }}` otherwise:

    Task: {{ instruction }}
    Text: {{ input }}
    {# target #}
    Answer: {{ output }}

The template travels with the tokenizer, inside tokenizer_config.json. As such a file may come from a stranger,
templates run in Jinja's immutable sandbox.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from diptych.data_prep.records import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_KEY = "diptych_template"
"""The key in tokenizer_config.json. (A name that ends in `_token` would be taken for a special token.)"""

TARGET_MARK = "{# target #}"
SOURCE_VARIABLES = ("instruction", "input", "history")
TARGET_VARIABLES = ("output",)

# What an expression inside a user's template can raise on a row that it did not expect.
RENDER_ERRORS = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)


@dataclass(frozen=True)
class Template:
    """Two Jinja texts. `name` is a name of TEMPLATES or the user's file, as shown in messages."""

    name: str
    source: str
    target: str = "{{ output }}"

    def render_source(self, instruction: str, input: str = "", history: tuple[tuple[str, str], ...] = ()) -> str:
        if history and "history" not in self.source_variables():
            raise UserError(f"template '{self.name}' has no place for earlier turns; 'plain' has one.")
        return _render(self.name, self.source, instruction=instruction, input=input, history=history)

    def render_target(self, output: str) -> str:
        return _render(self.name, self.target, output=output)

    def source_variables(self) -> set[str]:
        return _variables(self.source)

    def target_variables(self) -> set[str]:
        return _variables(self.target)


def load_template(name_or_path: str) -> Template:
    """A shipped template by its name, or a Jinja file, checked so that its mistakes show before the first row."""
    if name_or_path in TEMPLATES:
        return TEMPLATES[name_or_path]
    path = Path(name_or_path)
    if not path.is_file():
        near = nearest(name_or_path, TEMPLATES)
        hint = f" Did you mean '{near}'?" if near else ""
        raise UserError(
            f"template '{name_or_path}' is neither one of {', '.join(TEMPLATES)} nor a Jinja file that exists.{hint}"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: invalid UTF-8 at byte offset {error.start}. Save the template as UTF-8.") from None
    source, target, lines_before_target = _divide(text)
    _check(name_or_path, source, SOURCE_VARIABLES, lines_before=0)
    _check(name_or_path, target, TARGET_VARIABLES, lines_before=lines_before_target)
    return Template(name_or_path, source, target)


def attach_template(tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    """Init keyword arguments are what every save_pretrained and push_to_hub writes into tokenizer_config.json."""
    tokenizer.init_kwargs[TOKENIZER_KEY] = asdict(template)


def template_of(tokenizer: PreTrainedTokenizerBase) -> Template:
    stored = tokenizer.init_kwargs.get(TOKENIZER_KEY)
    if stored is None:
        raise UserError(
            f"the tokenizer carries no template, so it is not known how its model's prompts look. Name the template:"
            f" one of {', '.join(TEMPLATES)}, or a Jinja file."
        )
    return Template(**stored)


def _divide(text: str) -> tuple[str, str, int]:
    """Source, target, and the number of lines above the target, for line numbers in messages."""
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        if line.strip() == TARGET_MARK:
            source = "".join(lines[:number])
            return source.removesuffix("\n").removesuffix("\r"), "".join(lines[number + 1 :]), number + 1
    return text, "{{ output }}", 0


def _check(name: str, text: str, allowed: tuple[str, ...], lines_before: int) -> None:
    try:
        tree = _environment().parse(text)
        _compiled(text)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{name}, line {error.lineno + lines_before}: {error.message}. Mend it there.") from None
    for unknown in sorted(meta.find_undeclared_variables(tree) - set(allowed) - set(_environment().globals)):
        line = next(node.lineno for node in tree.find_all(nodes.Name) if node.name == unknown) + lines_before
        near = nearest(unknown, allowed)
        hint = f" Did you mean '{near}'?" if near else ""
        raise UserError(f"{name}, line {line}: unknown variable '{unknown}'; here are {', '.join(allowed)}.{hint}")


def _render(name: str, text: str, **values: Any) -> str:
    try:
        return _compiled(text).render(values)
    except RENDER_ERRORS as error:
        line = f", line {_line_of(error)}" if _line_of(error) else ""
        raise UserError(f"template {name}{line}: {error}. Change the template or this row.") from error


def _line_of(error: BaseException) -> int | None:
    """Jinja writes the template's own lines into the traceback, under the file name `<template>`."""
    line, traceback = getattr(error, "lineno", None), error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == "<template>":
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)


@functools.lru_cache(maxsize=64)
def _compiled(text: str) -> jinja2.Template:
    return _environment().from_string(text)


@functools.lru_cache(maxsize=64)
def _variables(text: str) -> set[str]:
    return meta.find_undeclared_variables(_environment().parse(text))


# The prompt of Stanford Alpaca, word for word, so that checkpoints trained on it elsewhere meet what they know.
_ALPACA = (
    "{% if input %}Below is an instruction that describes a task, paired with an input that provides further context."
    " Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{{ instruction }}\n\n### Input:\n{{ input }}\n\n### Response:"
    "{% else %}Below is an instruction that describes a task."
    " Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{{ instruction }}\n\n### Response:{% endif %}"
)

_PLAIN = (
    "{% for turn in history %}{{ turn[0] }}\n\n{{ turn[1] }}\n\n{% endfor %}"
    "{{ instruction }}{% if input %}\n\n{{ input }}{% endif %}"
)

_TRANSLATE = "{{ instruction }}{% if input %} {{ input }}{% endif %}"

TEMPLATES = {
    "alpaca": Template("alpaca", _ALPACA),
    "plain": Template("plain", _PLAIN),
    "translate": Template("translate", _TRANSLATE),
}
