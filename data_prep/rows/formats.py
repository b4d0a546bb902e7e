"""Ten formats in which data sets write their rows: the columns of each, and which of them a row fits.

fitting_formats({"instruction": "Add.", "output": "2"})     → [("alpaca", 0)]: the format, and its spelling
FORMATS["alpaca"].columns                                   → "instruction, output (input)"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any

from diptych.data_prep.rows.conversations import ROLES, SHAREGPT_ROLES, key_of_turns
from diptych.data_prep.rows.valid_text import from_json_text

POSITIVE, NEGATIVE = "Positive Examples", "Negative Examples"
"""What a task file of Super-NaturalInstructions calls its worked examples."""

DOCUMENTS = ("document", "article", "text", "dialogue")
SUMMARIES = ("summary", "highlights")


@dataclass(frozen=True)
class Format:
    """One way in which data sets write their rows."""

    name: str
    description: str
    example: str
    """One row, as JSON."""
    shapes: tuple[Mapping[str, str], ...]
    """What columns make a row one of this format: field → column, in each spelling that data sets have."""
    optional: tuple[str, ...] = ()
    inside: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Of a field that holds objects, the names in them that are read, as `unread` takes them."""
    turns: tuple[str, str, Mapping[str, str]] | None = None
    """Of a conversation: the keys of a turn that hold role and text, and what the roles mean."""
    looks: Callable[[Mapping[str, Any], Mapping[str, str]], bool] | None = None
    """Whether the values are those of this format, if columns alone do not tell."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Every name that `--map` can give a column to."""
        return tuple(dict.fromkeys([*(name for shape in self.shapes for name in shape), *self.optional]))

    @property
    def columns(self) -> str:
        """`instruction, output (input)`: what is needed, and what may be there."""
        return f"{self.needs} ({', '.join(self.optional)})" if self.optional else self.needs

    @property
    def needs(self) -> str:
        """`document/article, summary/highlights` if each goes with each, otherwise `first, second or …`."""
        spellings = {name: dict.fromkeys(shape.get(name) for shape in self.shapes) for name in self.shapes[0]}
        if len(self.shapes) == prod(map(len, spellings.values())):
            return ", ".join("/".join(names) for names in spellings.values())
        return " or ".join(", ".join(shape.values()) for shape in self.shapes)


def fitting_formats(
    view: Mapping[str, Any], candidates: Mapping[str, Format] | None = None, mapping: Mapping[str, str] | None = None
) -> list[tuple[str, int]]:
    """Name of the format and number of the shape, of all that a row fits. A field that --map names is looked for under
    no other name."""
    return [
        (name, number)
        for name, format in (candidates or FORMATS).items()
        for number, shape in enumerate(format.shapes)
        if all(column in view for column in shape.values())
        and all(shape.get(mapped, mapped) == mapped for mapped in mapping or ())
        and (format.looks is None or format.looks(view, shape))
    ]


# Values that decide, if columns alone do not


def _holds_messages(view: Mapping[str, Any], shape: Mapping[str, str]) -> bool:
    return _holds_turns(view, shape, "role", "messages")


def _holds_sharegpt(view: Mapping[str, Any], shape: Mapping[str, str]) -> bool:
    return _holds_turns(view, shape, "from", "conversations")


def _holds_turns(view: Mapping[str, Any], shape: Mapping[str, str], role_key: str, column: str) -> bool:
    """Whether the turns have their role under this key; if there are no turns, the name of the column decides."""
    (found,) = shape.values()
    key = key_of_turns(view[found])
    return key == role_key or (key is None and found == column)


def _holds_translations(view: Mapping[str, Any], shape: Mapping[str, str]) -> bool:
    return "translation" not in shape or isinstance(from_json_text(view["translation"]), Mapping)


# The formats


INSTANCE: Mapping[str, Any] = {"input": {}, "output": {}}
EXAMPLE: Mapping[str, Any] = {**INSTANCE, "explanation": {}}


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


FORMATS = {
    format.name: format
    for format in (
        Format(
            "alpaca",
            "an instruction, often an input, and the output",
            '{"instruction": "Add.", "input": "1 + 1", "output": "2"}',
            (_same("instruction", "output"),),
            optional=("input",),
        ),
        Format(
            "dolly",
            "the same under other names, with a category",
            '{"instruction": "Who?", "context": "Ann wrote it.", "response": "Ann.", "category": "closed_qa"}',
            (_same("instruction", "context", "response"),),
            optional=("category",),
        ),
        Format(
            "prompt_completion",
            "a prompt and its completion, both strings, or both lists of turns as in messages",
            '{"prompt": "The sky is", "completion": " blue."}',
            (_same("prompt", "completion"),),
            turns=("role", "content", ROLES),
        ),
        Format(
            "messages",
            "conversations as OpenAI has them; every assistant turn is an example",
            '{"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}',
            (_same("messages"), {"messages": "conversations"}),
            turns=("role", "content", ROLES),
            looks=_holds_messages,
        ),
        Format(
            "sharegpt",
            "conversations as ShareGPT has them; every gpt turn is an example",
            '{"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]}',
            (_same("conversations"), {"conversations": "messages"}),
            turns=("from", "value", SHAREGPT_ROLES),
            looks=_holds_sharegpt,
        ),
        Format(
            "natural_instructions",
            "a task file of Super-NaturalInstructions; every output of every instance is an example",
            '{"Definition": ["Add."], "Categories": ["Maths"], "Positive Examples": [], "Negative Examples": [],'
            ' "Instances": [{"id": "1", "input": "1 + 1", "output": ["2", "two"]}]}',
            (_same("Definition", "Instances"),),
            optional=("Categories", POSITIVE, NEGATIVE),
            inside={"Instances": INSTANCE, POSITIVE: EXAMPLE, NEGATIVE: EXAMPLE},
        ),
        Format(
            "self_instruct",
            "an instruction with several instances; each is an example",
            '{"instruction": "Add.", "instances": [{"input": "1 + 1", "output": "2"}]}',
            (_same("instruction", "instances"),),
            inside={"instances": INSTANCE},
        ),
        Format(
            "parallel",
            "parallel text; each direction that has an instruction (--forward, --backward) is an example",
            '{"translation": {"en": "Go.", "ko": "가."}}',
            (_same("first", "second"), {"first": "source", "second": "target"}, _same("translation")),
            looks=_holds_translations,
        ),
        Format(
            "summarisation",
            "a text and its summary",
            '{"document": "It rained all day.", "summary": "Rain."}',
            tuple(
                {"document": document, "summary": summary}
                for document, summary in product(
                    ("document", "article", "text", "dialogue"), ("summary", "highlights")
                )
            ),
        ),
        Format(
            "tokenised",
            "token ids; neither the template nor the tokenizer touches them",
            '{"input_ids": [12, 7, 1], "labels": [31, 40, 1]}',
            (_same("input_ids", "labels"),),
        ),
    )
}
