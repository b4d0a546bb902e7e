"""From a record to source text and target text, by the same code in preparation and at inference.

    TEMPLATES["translate"].render_source("Translate English to Korean:", "Go.")  == "Translate English to Korean: Go."
    TEMPLATES["translate"].render_target("가.")                                  == "가."

A template has two sides. The source is a Jinja text that knows `instruction`, `input`, `history` (earlier
(instruction, output) turns) and `system`. The target is one that knows `output`, what the decoder is given before it
(`decoder_prefix`), and where generation ends (`stop`). It is a small file, as in shipped_templates/:

    {# decoder_prefix: kor_Hang #}        control tokens by name, blanks between them; only in a file's first lines
    {# stop: ### Instruction: #}          once for each; in double quotes as in JSON: {# stop: "\\nUser:" #}
    Task: {{ instruction }}
    Text: {{ input }}
    {# target #}                          at most once; all that follows may be left out, and is {{ output }} then
    Answer: {{ output }}

Decoder prefix: in training these tokens are the first labels and count in the loss, as language codes do in NLLB,
mBART and M2M100; at generation they are forced. They are not masked, because the decoder's input is the labels shifted
by one, in which a masked token would be read as padding. Stop: an answer ends before the first of these strings.

Data is inserted, never interpreted: an input `{{ 7 * 7 }}` stays as it is, and `</s>` is five characters. A control
token in the template's own text, such as `<extra_id_0>`, is that token (rendered_text.py).

The template travels with the tokenizer, inside tokenizer_config.json, together with examples of what it gives, to the
token (`golden`). Loading checks that it still gives the same. Such a file may come from a stranger, so templates run
in template_sandbox.py.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import meta, nodes

from diptych.data_prep.command_line.errors import UserError, excerpt, library_errors, nearest
from diptych.data_prep.rows.records import Record
from diptych.data_prep.text_to_ids.encode import split_sources, split_targets
from diptych.data_prep.text_to_ids.rendered_text import FRAME_MARK, Rendered, check_characters
from diptych.data_prep.text_to_ids.template_sandbox import FILTERS, LimitedEnvironment, start_budget

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_KEY = "diptych_template"
"""The key in tokenizer_config.json. (A name that ends in `_token` would be taken for a special token.)"""

LONGEST_STORED = 2_000_000
"""Of the template in tokenizer_config.json with its examples, as JSON."""
BARE_TEMPLATE = "translate"
"""It adds nothing to a text, for models that language codes tell what to do."""
TARGET_MARK = re.compile(r"\{#-?\s*target\s*-?#\}")
SOURCE_VARIABLES = ("instruction", "input", "history", "system")
TARGET_VARIABLES = ("output",)
SETTINGS = ("decoder_prefix", "stop")
SETTING_LINE = re.compile(r"\{#-?\s*(\w+):\s*(.*?)\s*-?#\}")

# What an expression inside a user's template can raise on a row that it did not expect.
RENDER_ERRORS = (
    *(jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError),
    *(RecursionError, MemoryError, SyntaxError),
)

# Rows that travel with the template, each of which it renders as far as it has a place for them.
GOLDEN_ROWS = (
    {"instruction": "Translate English to Korean:", "input": "I am a student.", "output": "나는 학생이다."},
    {"instruction": "Say </s> and {{ 7 * 7 }}.", "output": "  </s> <pad>\n{{ 7 * 7 }}"},
    {"instruction": "And now?", "output": "It rains.", "history": [["Hello!", "Hi."]], "system": "Be brief."},
)

GOLDEN_COLUMNS = {"source": "source text", "target": "target text", "input_ids": "source ids", "labels": "target ids"}


@dataclass(frozen=True)
class Template:
    """`name` is a name of TEMPLATES or the user's file, as shown in messages."""

    name: str
    source: str
    target: str = "{{ output }}"
    decoder_prefix: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    source_line: int = 1
    """The line of the file in which the source begins, for messages."""
    target_line: int = 1

    def render(self, record: Record) -> tuple[str, str]:
        """Source and target text of one record."""
        source = self.render_source(record.instruction, record.input, record.history, record.system)
        return source, self.render_target(record.output)

    def render_source(
        self, instruction: str, input: str = "", history: tuple[tuple[str, str], ...] = (), system: str = ""
    ) -> str:
        """UserError where the row has earlier turns or a system prompt, and the template has no place for them."""
        for name, value, words in (("history", history, "earlier turns"), ("system", system, "a system prompt")):
            if value and name not in self.source_variables():
                raise UserError(
                    f"template '{self.name}' has no place for {words}. Conversations are prepared with "
                    f"--template chat; 'plain' has a place for them, too."
                )
        if input and not instruction and self.name == "alpaca":
            raise UserError(
                f"template 'alpaca' is built around an instruction, and there is none. Give one, or --template"
                f" {BARE_TEMPLATE}, which adds nothing to a text."
            )
        values = {"instruction": instruction, "input": input, "history": history, "system": system}
        texts = (instruction, input, system, *(text for turn in history for text in turn))
        return _render(self.name, self.source, self.source_line, values, texts)

    def render_target(self, output: str) -> str:
        return _render(self.name, self.target, self.target_line, {"output": output}, (output,))

    def source_variables(self) -> set[str]:
        return _variables(self.source)

    def target_variables(self) -> set[str]:
        return _variables(self.target)

    def cut_at_stop(self, text: str) -> str:
        """`"Go.\\n### Instruction: …"` → `"Go.\\n"`, by the first of `stop`; a text without one is whole."""
        return text[: min((place for place in map(text.find, self.stop) if place >= 0), default=len(text))]


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
    return replace(_read(name_or_path, path), name=path.name)  # the folders are of this machine only


def attach_template(tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    """Init keyword arguments are what every save_pretrained and push_to_hub writes into tokenizer_config.json."""
    tokenizer.init_kwargs[TOKENIZER_KEY] = asdict(template) | {"golden": golden_examples(tokenizer, template)}


def template_of(tokenizer: PreTrainedTokenizerBase, check: bool = True) -> Template:
    """The template that travels with the tokenizer. UserError where there is none, or it no longer renders its golden
    examples."""
    stored = tokenizer.init_kwargs.get(TOKENIZER_KEY)
    if stored is None:
        raise UserError(
            f"the tokenizer carries no template, so it is not known how its model's prompts look. Name the template:"
            f" one of {', '.join(TEMPLATES)}, or a Jinja file."
        )
    with library_errors("the template in tokenizer_config.json is not one", "Name one with --template."):
        if len(json.dumps(stored)) > LONGEST_STORED:
            raise ValueError(f"it has more than {LONGEST_STORED:,} characters")
        values = {name: tuple(it) if name in SETTINGS else it for name, it in stored.items() if name != "golden"}
        template = Template(**values)
        for field in fields(template):
            value, kind = getattr(template, field.name), {"str": str, "int": int}.get(field.type, tuple)
            if not isinstance(value, kind) or (kind is tuple and not all(isinstance(it, str) for it in value)):
                raise TypeError(f"its {field.name} is {value!r:.80}")
        difference = golden_difference(tokenizer, template) if check else ""
    if difference:
        raise UserError(
            f"template '{template.name}' and this tokenizer do not give what they gave when they were saved:"
            f" {difference}. A model that was trained on the one would be asked the other. Put the tokenizer's files"
            f" back as they were; if the change is wanted, name the template with --template, or call attach_template"
            f" again."
        )
    return template


def carried_template(tokenizer: PreTrainedTokenizerBase, check: bool = True) -> Template | None:
    """The same, or None where the tokenizer carries none."""
    return template_of(tokenizer, check) if TOKENIZER_KEY in tokenizer.init_kwargs else None


def golden_examples(tokenizer: PreTrainedTokenizerBase, template: Template) -> list[dict[str, Any]]:
    """GOLDEN_ROWS, without what the template has no place for; the texts of each, and its token ids: those before the
    text, of the text, and after it."""
    unused = {"history", "system"} - template.source_variables()
    rows = [{name: value for name, value in row.items() if name not in unused} for row in GOLDEN_ROWS]
    return [_golden(tokenizer, template, row) for row in rows]


def stored_golden(tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The golden examples that travel with the template; the oldest folders have none."""
    stored = tokenizer.init_kwargs[TOKENIZER_KEY].get("golden", [])
    return stored if isinstance(stored, list) else [stored]


def golden_difference(tokenizer: PreTrainedTokenizerBase, template: Template) -> str:
    """`"the source text of example 1 was 'Q: Go.' and is 'A: Go.'"`; "" where all is as it was stored. Where another
    language is set than then, of the ids only those of the text are compared."""
    for number, then in enumerate(stored_golden(tokenizer), start=1):
        if not (isinstance(then, dict) and then.keys() >= {"fields", "languages", *GOLDEN_COLUMNS}):
            return f"example {number} is damaged"
        try:
            now = _golden(tokenizer, template, then["fields"])
        except UserError as error:
            return f"example {number} can no longer be encoded: {error}"
        except (LookupError, TypeError, ValueError, AttributeError):
            return f"the fields of example {number} are damaged"
        if isinstance(now["input_ids"], str) and now["input_ids"] != then["input_ids"]:
            return f"example {number} is no longer rendered: {now['input_ids']}"
        for name, what in GOLDEN_COLUMNS.items():
            before, after = then[name], now[name]
            if name in ("input_ids", "labels") and then["languages"] != now["languages"]:
                before, after = before[1], after[1]
            if before != after:
                was, now_is = excerpt(repr(before)), excerpt(repr(after))
                return f"the {what} of example {number} was {was} and is {now_is}"
    return ""


def _golden(tokenizer: PreTrainedTokenizerBase, template: Template, fields: dict[str, Any]) -> dict[str, Any]:
    history = tuple(map(tuple, fields.get("history", ())))
    try:
        source = template.render_source(
            fields["instruction"], fields.get("input", ""), history, fields.get("system", "")
        )
        target = template.render_target(fields["output"])
    except UserError as error:  # a template for rows of one shape may refuse these: the refusal is stored
        return {"fields": fields, "source": "", "target": "", "input_ids": str(error), "labels": "", "languages": []}
    return {
        "fields": fields,
        "source": str(source),
        "target": str(target),
        "input_ids": list(split_sources(tokenizer, [source])[0]),
        "labels": list(split_targets(tokenizer, [target], template.decoder_prefix)[0]),
        "languages": [getattr(tokenizer, name, None) for name in ("src_lang", "tgt_lang")],
    }


def _read(name: str, path: Path) -> Template:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: invalid UTF-8 at byte offset {error.start}. Save the template as UTF-8.") from None
    lines = text.splitlines(keepends=True)
    first, settings = _settings(name, lines)
    target_mark = _target_mark(name, lines)
    source = "".join(lines[first:target_mark])
    if target_mark is None:
        template = Template(name, source, source_line=first + 1, **settings)
    else:
        source, target = source.removesuffix("\n").removesuffix("\r"), "".join(lines[target_mark + 1 :])
        template = Template(name, source, target, source_line=first + 1, target_line=target_mark + 2, **settings)
    _check(name, template.source, SOURCE_VARIABLES, template.source_line)
    _check(name, template.target, TARGET_VARIABLES, template.target_line)
    if not template.source_variables() & set(SOURCE_VARIABLES):
        raise UserError(
            f"{name}: the source uses none of {', '.join(SOURCE_VARIABLES)}, so it would be the same for every row."
            f" Write {{{{ instruction }}}} or {{{{ input }}}} where the row's text is to stand."
        )
    return template


def _target_mark(name: str, lines: list[str]) -> int | None:
    """The index of the line between source and target, if there is one."""
    marks = [place for place, line in enumerate(lines) if TARGET_MARK.search(line)]
    for place in marks:
        if not TARGET_MARK.fullmatch(lines[place].strip()):
            raise UserError(f"{name}, line {place + 1}: {{# target #}} needs a line of its own. Give it one.")
    if len(marks) > 1:
        raise UserError(
            f"{name}, line {marks[1] + 1}: a second {{# target #}}, after that in line {marks[0] + 1}; a template has"
            f" one source and one target. Delete one of the two lines."
        )
    return marks[0] if marks else None


def _settings(name: str, lines: list[str]) -> tuple[int, dict[str, tuple[str, ...]]]:
    """How many of the first lines are settings, and what they say."""
    settings: dict[str, tuple[str, ...]] = {}
    first = 0
    for number, line in enumerate(lines, start=1):
        match = SETTING_LINE.fullmatch(line.strip())
        if match is None:
            continue
        key, value = match.groups()
        if key not in SETTINGS:
            if near := nearest(key, SETTINGS, cutoff=0.75):
                raise UserError(f"{name}, line {number}: unknown setting '{key}'. Did you mean '{near}'?")
            continue  # a comment like any other
        if number != first + 1:
            raise UserError(f"{name}, line {number}: '{key}' belongs into the first lines of the file. Move it there.")
        words = tuple(value.split()) if key == "decoder_prefix" else (_unquoted(name, number, value),)
        if not all(words) or not words:
            raise UserError(f"{name}, line {number}: '{key}' is empty. Write what it is, or delete the line.")
        settings[key] = settings.get(key, ()) + words
        first = number
    return first, settings


def _unquoted(name: str, line: int, value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise UserError(f"{name}, line {line}: {value} is no JSON string ({error}). Correct the quotes.") from None


def _check(name: str, text: str, allowed: tuple[str, ...], first_line: int) -> None:
    try:
        _compiled(text)
        tree = _environment().parse(text)
    except jinja2.TemplateSyntaxError as error:
        known = f" Here are {', '.join(FILTERS)}." if "No filter named" in error.message else ""
        message = error.message.rstrip(".")
        raise UserError(f"{name}, line {error.lineno + first_line - 1}: {message}.{known} Correct it there.") from None
    except RENDER_ERRORS as error:
        raise UserError(f"{name} cannot be compiled: {error}. Make it simpler.") from None
    for unknown in sorted(meta.find_undeclared_variables(tree) - set(allowed) - set(_environment().globals)):
        line = next(node.lineno for node in tree.find_all(nodes.Name) if node.name == unknown) + first_line - 1
        near = nearest(unknown, allowed)
        hint = f" Did you mean '{near}'?" if near else ""
        raise UserError(f"{name}, line {line}: unknown variable '{unknown}'; here are {', '.join(allowed)}.{hint}")


def _render(name: str, text: str, first_line: int, values: dict[str, Any], texts: tuple[str, ...]) -> str:
    for value in texts:
        check_characters(value)
    try:
        compiled = _compiled(text)
        start_budget(sum(map(len, texts)))
        rendered = compiled.render(values)
    except RENDER_ERRORS as error:
        line = _line_of(error)
        where = f", line {line + first_line - 1}" if line else ""
        raise UserError(f"template {name}{where}: {excerpt(error)}. Change the template or this row.") from error
    return Rendered(rendered) if FRAME_MARK in rendered else rendered


def _line_of(error: BaseException) -> int | None:
    """Jinja writes the template's own lines into the traceback, under the file name `<template>`."""
    line, traceback = getattr(error, "lineno", None), error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == "<template>":
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


@functools.cache
def _environment() -> LimitedEnvironment:
    return LimitedEnvironment()


@functools.lru_cache(maxsize=64)
def _compiled(text: str) -> jinja2.Template:
    """FRAME_MARK stands before and after each piece of the template's own text, `{{ '<extra_id_0>' }}` included."""
    check_characters(text)
    start_budget()  # constants are computed while it compiles
    tree = _environment().parse(text)
    for output in tree.find_all(nodes.Output):
        output.nodes = [_marked(child) for child in output.nodes]
    return _environment().from_string(tree)


def _marked(node: nodes.Expr) -> nodes.Expr:
    is_text = isinstance(node, nodes.TemplateData)
    text = node.data if is_text else node.value if isinstance(node, nodes.Const) else ""
    if not isinstance(text, str) or not text.strip():
        return node
    return nodes.TemplateData(FRAME_MARK + text + FRAME_MARK, lineno=node.lineno)


@functools.lru_cache(maxsize=64)
def _variables(text: str) -> set[str]:
    return meta.find_undeclared_variables(_environment().parse(text))


SHIPPED = Path(__file__).with_name("shipped_templates")
TEMPLATES = {
    name: Template(name, (SHIPPED / f"{name}.jinja").read_text(encoding="utf-8"))
    for name in ("alpaca", "plain", "translate", "chat")
}
"""The shipped templates."""
