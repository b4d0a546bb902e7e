"""Fourteen formats in which data sets write their rows: the columns of each, and which of them a row fits.

fitting_formats({"instruction": "Add.", "output": "2"})     → [("alpaca", 0)]: the format, and its spelling
FORMATS["alpaca"].columns                                   → "instruction, output (input)"
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any

from diptych.data_prep.rows.conversations import ROLES, SHAREGPT_ROLES, key_of_turns
from diptych.data_prep.rows.judged_answers import RATING_KEYS, TEXT_KEYS, is_mark, is_turns
from diptych.data_prep.rows.records import Preferences
from diptych.data_prep.rows.valid_text import from_json_text, from_object_of_lists

POSITIVE, NEGATIVE = "Positive Examples", "Negative Examples"
"""What a task file of Super-NaturalInstructions calls its worked examples."""

DOCUMENTS = ("document", "article", "text", "dialogue")
SUMMARIES = ("summary", "highlights")


CONVERSATIONS = ("messages", "conversations")
PROMPTS = ("prompt", "instruction", *CONVERSATIONS, "input", "source", "question")
"""Columns of the prompt of answers that were judged; the first that a row has is it."""


@dataclass(frozen=True)
class Format:
    """One way in which data sets write their rows."""

    name: str
    shapes: tuple[Mapping[str, str], ...]
    """What columns make a row one of this format: field → column, in each spelling that data sets have."""
    optional: tuple[str, ...] = ()
    inside: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Of a field that holds objects, the names in them that are read, as `unread` takes them."""
    turns: tuple[str, str, Mapping[str, str]] | None = None
    """Of a conversation: the keys of a turn that hold role and text, and what the roles mean."""
    looks: Callable[[Mapping[str, Any], Mapping[str, str]], bool] | None = None
    """Whether the values are those of this format, if columns alone do not tell."""
    preferences: Preferences | None = None
    said: str = ""
    """What messages say of its columns, if its shapes are too many to list."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Every name that `--map` can give a column to."""
        return tuple(dict.fromkeys([*(name for shape in self.shapes for name in shape), *self.optional]))

    @property
    def needs(self) -> str:
        """`document/article, summary/highlights` if each goes with each, otherwise `first, second or …`."""
        if self.said:
            return self.said
        spellings = {name: dict.fromkeys(shape.get(name) for shape in self.shapes) for name in self.shapes[0]}
        if len(self.shapes) == prod(map(len, spellings.values())):
            return ", ".join("/".join(names) for names in spellings.values())
        return " or ".join(", ".join(shape.values()) for shape in self.shapes)


def fitting_formats(
    view: Mapping[str, Any], candidates: Mapping[str, Format] | None = None, mapping: Mapping[str, str] | None = None
) -> list[tuple[str, int]]:
    """Name of the format and number of the shape, of all that a row fits. A field that --map names is looked for under
    no other name. A row that says what its answers are worth fits no plain format."""
    found = [
        (name, number)
        for name, format in (candidates or FORMATS).items()
        for number, shape in enumerate(format.shapes)
        if all(column in view for column in shape.values())
        and all(shape.get(mapped, mapped) == mapped for mapped in mapping or ())
        and (format.looks is None or format.looks(view, shape))
    ]
    return [it for it in found if FORMATS[it[0]].preferences] or found


def _holds_turns(view: Mapping[str, Any], shape: Mapping[str, str]) -> bool:
    """Whether the turns have their role under the format's key; without turns, the name of the column decides."""
    ((name, column),) = shape.items()
    key = key_of_turns(view[column])
    return key == {"messages": "role", "conversations": "from"}[name] or (key is None and column == name)


def _holds_translations(view: Mapping[str, Any], shape: Mapping[str, str]) -> bool:
    return "translation" not in shape or isinstance(from_json_text(view["translation"]), Mapping)


def _has_its_prompt(view: Mapping[str, Any], shape: Mapping[str, str]) -> bool:
    """Whether the prompt is in the column that goes first; without one, the answers are conversations that hold it."""
    first = next((name for name in PROMPTS if name in view), None)
    if first is not None:
        return first in shape.values()
    return all(is_turns(view[column]) for column in shape.values())


def _holds_marks(view: Mapping[str, Any], shape: Mapping[str, str]) -> bool:
    return is_mark(view["label"]) and _has_its_prompt(view, shape)


def _holds_ratings(view: Mapping[str, Any], shape: Mapping[str, str]) -> bool:
    """Whether there is a list of answers, and their ratings are in them or in a list of their own."""
    answers = from_object_of_lists(view[shape["completions"]])
    if not isinstance(answers, list | tuple) or not answers or not _has_its_prompt(view, shape):
        return False
    first = from_json_text(answers[0])
    if "ratings" in shape:
        return isinstance(answers[0], str) and isinstance(from_json_text(view[shape["ratings"]]), list | tuple)
    return isinstance(first, Mapping) and any(key in first for key in RATING_KEYS)


INSTANCE: Mapping[str, Any] = {"input": {}, "output": {}}
EXAMPLE: Mapping[str, Any] = {**INSTANCE, "explanation": {}}


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def _with_prompt(*names: str) -> tuple[dict[str, str], ...]:
    return tuple(_same(prompt, *names) for prompt in PROMPTS if prompt not in CONVERSATIONS)


def _with_conversation(*names: str) -> tuple[dict[str, str], ...]:
    return tuple(_same(prompt, *names) for prompt in CONVERSATIONS)


_ALL = (
    # {"instruction": "Add.", "input": "1 + 1", "output": "2"}
    Format("alpaca", (_same("instruction", "output"),), optional=("input",)),
    # {"instruction": "Who?", "context": "Ann wrote it.", "response": "Ann.", "category": "closed_qa"}
    Format("dolly", (_same("instruction", "context", "response"),), optional=("category",)),
    # {"prompt": "The sky is", "completion": " blue."}, or both lists of turns as in messages
    Format("prompt_completion", (_same("prompt", "completion"),), turns=("role", "content", ROLES)),
    # {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}
    Format(
        "messages",
        (_same("messages"), {"messages": "conversations"}),
        turns=("role", "content", ROLES),
        looks=_holds_turns,
    ),
    # {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]}
    Format(
        "sharegpt",
        (_same("conversations"), {"conversations": "messages"}),
        turns=("from", "value", SHAREGPT_ROLES),
        looks=_holds_turns,
    ),
    # {"Definition": ["Add."], "Categories": ["Maths"], "Positive Examples": [], "Negative Examples": [],
    #  "Instances": [{"id": "1", "input": "1 + 1", "output": ["2", "two"]}]}
    Format(
        "natural_instructions",
        (_same("Definition", "Instances"),),
        optional=("Categories", POSITIVE, NEGATIVE),
        inside={"Instances": INSTANCE, POSITIVE: EXAMPLE, NEGATIVE: EXAMPLE},
    ),
    # {"instruction": "Add.", "instances": [{"input": "1 + 1", "output": "2"}]}
    Format("self_instruct", (_same("instruction", "instances"),), inside={"instances": INSTANCE}),
    # {"translation": {"en": "Go.", "ko": "가."}}
    Format(
        "parallel",
        (_same("first", "second"), {"first": "source", "second": "target"}, _same("translation")),
        looks=_holds_translations,
    ),
    # {"document": "It rained all day.", "summary": "Rain."}
    Format(
        "summarisation", tuple({"document": names[0], "summary": names[1]} for names in product(DOCUMENTS, SUMMARIES))
    ),
    # {"prompt": "Who?", "chosen": "Ann.", "rejected": "Bob."}; each a text or turns; or both conversations, no prompt
    Format(
        "preference",
        (*_with_prompt("chosen", "rejected"), *_with_conversation("chosen", "rejected"), _same("chosen", "rejected")),
        optional=("input",),
        turns=("role", "content", ROLES),
        looks=_has_its_prompt,
        preferences="pairs",
        said="prompt/instruction/input/source/question, chosen, rejected",
    ),
    # {"prompt": "Who?", "completion": "Ann.", "label": true}
    Format(
        "marked",
        _with_prompt("completion", "label"),
        optional=("input",),
        turns=("role", "content", ROLES),
        looks=_holds_marks,
        preferences="marks",
        said="prompt/instruction/input/source/question, completion, label",
    ),
    # {"prompt": "Who?", "completions": [{"response": "Ann.", "score": 5}, {"response": "Bob.", "score": 1}]}
    # {"prompt": "Who?", "responses": ["Ann.", "Bob."], "scores": [5, 1]}
    Format(
        "rated",
        (
            *_with_prompt("completions"),
            *(
                {**shape, "completions": completions, "ratings": ratings}
                for shape in _with_prompt("completions")
                for completions, ratings in product(("completions", "responses"), ("ratings", "scores"))
            ),
        ),
        optional=("input",),
        inside={"completions": dict.fromkeys((*TEXT_KEYS, *RATING_KEYS), {})},
        turns=("role", "content", ROLES),
        looks=_holds_ratings,
        preferences="pairs",
        said="prompt/instruction/input/source/question, completions (each with its score) or responses, scores",
    ),
    # {"src": "Go.", "mt": "가요.", "pe": "가."}
    Format("edits", (_same("src", "mt", "pe"),), preferences="pairs"),
    # {"input_ids": [12, 7, 1], "labels": [31, 40, 1]}
    Format("tokenised", (_same("input_ids", "labels"),)),
)
FORMATS = {format.name: format for format in _ALL}
