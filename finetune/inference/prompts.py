"""A row in; the token ids that the encoder reads out, by the template and the code that made the training rows.

    prompt_of({"instruction": "Translate to Korean.", "input": "Yes."})   Prompt("Translate to Korean.", "Yes.")
    prompter = Prompter(tokenizer, template, max_source_tokens=512)
    text, languages = prompter.render(prompt)
    prompter.encode([text], [languages])                                  [[12, 7, 1]], [False]

A row may be a conversation (`messages` as in training): the prompt then asks for its next answer or, if it ends with
an answer, for that answer again.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from diptych.data_prep.command_line.errors import UserError, nearest
from diptych.data_prep.rows.conversations import ROLES, SHAREGPT_ROLES, open_question, turns_of
from diptych.data_prep.rows.language_names import languages_in
from diptych.data_prep.rows.records import Languages
from diptych.data_prep.rows.valid_text import described, listed
from diptych.data_prep.text_to_ids.encode import split_sources
from diptych.data_prep.text_to_ids.languages import codes_of, resolved
from diptych.data_prep.text_to_ids.templates import (
    BARE_TEMPLATE,
    TEMPLATES,
    TOKENIZER_KEY,
    Template,
    load_template,
    template_of,
)

PROMPT_FIELDS = ("instruction", "input", "history", "system")
CONVERSATION_FIELDS = ("messages", "conversations")
OUTPUT_FIELDS = (
    ("row", "prediction", "finished", "source_cut", "source_pieces", "sentences_cut", "source_rounds", "error")
    + ("terms_missed", "placeholders_lost")
    + ("log_probability", "log_probability_per_token", "confidence")
)  # fmt: skip
"""Fields that `diptych generate` writes, so a row must not have them."""


class EmptyInput(UserError):
    """A row whose only text is an `input` that is empty."""


class Prompt(NamedTuple):
    instruction: str
    input: str = ""
    history: tuple[tuple[str, str], ...] = ()
    """Earlier instructions and their outputs, oldest first."""
    system: str = ""
    languages: Languages = Languages()


class Prompter(NamedTuple):
    """Renders and encodes prompts."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    max_source_tokens: int | None
    languages: Languages = Languages()
    """Languages of prompts that name none."""

    def render(self, prompt: Prompt) -> tuple[str, Languages]:
        """The source text, and the languages as the tokenizer calls them. UserError: the template has no place for a
        field, or the tokenizer does not know a language."""
        instruction, text, history, system, own = prompt
        languages = resolved(self.tokenizer, own.filled_from(self.languages), self.template.decoder_prefix)
        instruction = codes_of(self.tokenizer).instruction(instruction, languages)
        return self.template.render_source(instruction, text, history, system), languages

    def encode(
        self, texts: list[str], languages: Sequence[Languages] | None = None
    ) -> tuple[list[list[int]], list[bool]]:
        """Token ids of each rendered prompt, and whether it was cut to max_source_tokens."""
        encodings = split_sources(self.tokenizer, texts, languages)
        ids = [encoding.ids(self.max_source_tokens) for encoding in encodings]
        was_cut = [encoding.ids() != kept for encoding, kept in zip(encodings, ids, strict=True)]
        return ids, was_cut


def template_for(name: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The named template, or the tokenizer's own. A tokenizer with language codes and no template gets the template
    that adds nothing to a text."""
    if name:
        return load_template(name)
    if codes_of(tokenizer).tokens and TOKENIZER_KEY not in tokenizer.init_kwargs:
        return TEMPLATES[BARE_TEMPLATE]
    return template_of(tokenizer)


def prompt_of(fields: dict[str, Any]) -> Prompt:
    """The prompt in a row's fields. UserError: says which field is missing or wrong; Fault: the conversation in the
    row is wrong."""
    if taken := [name for name in OUTPUT_FIELDS if name in fields]:
        raise UserError(f"field {taken[0]!r} is one that is written here; rename it")
    for name in PROMPT_FIELDS:
        near = nearest(name, [other for other in fields if other not in PROMPT_FIELDS], cutoff=0.75)
        if name not in fields and near:
            raise UserError(f"{name!r} is missing, and there is {near!r}. Rename it to {name!r}")
    for name in ("input", "system"):
        if not isinstance(fields.get(name) or "", str):
            raise UserError(f"{name!r} must be a string, got {described(fields[name])}")
    if conversation := next((name for name in CONVERSATION_FIELDS if name in fields), None):
        return _conversation_prompt(fields, conversation)
    text, instruction = fields.get("input") or "", fields.get("instruction")
    if "instruction" not in fields and not text.strip() and "input" in fields:
        raise EmptyInput("'input' is empty, and there is no 'instruction'. Give a text in one of them")
    if "instruction" not in fields and not text.strip():
        raise UserError(f"'instruction' is missing; the row has {listed(fields) or 'no fields'}")
    instruction = "" if instruction in (None, "") and text.strip() else instruction
    if not isinstance(instruction, str) or not (instruction.strip() or text.strip()):
        raise UserError(f"'instruction' must be a string that is not empty, got {described(instruction)}")
    history = fields.get("history") or []
    turns = history if isinstance(history, list) else [None]
    if any(not isinstance(turn, list) or list(map(type, turn)) != [str, str] for turn in turns):
        raise UserError("'history' must be a list of [instruction, output] pairs of strings, oldest first")
    return Prompt(instruction, text, tuple(map(tuple, history)), fields.get("system") or "", languages_in(fields))


def _conversation_prompt(fields: dict[str, Any], name: str) -> Prompt:
    """Of messages in the form of OpenAI or ShareGPT. The row's `system` stands before their system messages."""
    for other in ("instruction", "input", "history"):
        if fields.get(other):
            raise UserError(f"the row has both {name!r} and {other!r}; remove one of them")
    turns = fields[name]
    first = turns[0] if isinstance(turns, list) and turns else None
    is_sharegpt = isinstance(first, dict) and "role" not in first and "from" in first
    form = ("from", "value", SHAREGPT_ROLES) if is_sharegpt else ("role", "content", ROLES)
    messages, question = open_question(turns_of(turns, name, *form, may_be_empty=True), name)
    system = "\n".join(text for text in (fields.get("system"), *messages) if text)
    return Prompt(question.instruction, history=question.history, system=system, languages=languages_in(fields))
