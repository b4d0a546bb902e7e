"""From the fields of a row to records, in fourteen formats.

    {"instruction": "Add.", "input": "1 + 1", "output": "2"}                                        alpaca
    {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}  messages
    {"translation": {"en": "Go.", "ko": "가."}}                                                     parallel, …

    converter = converter_for(first_rows, "rows.jsonl")       (recognise_format.py)
    converter.records(row)  → [Record(instruction="Add.", input="1 + 1", output="2", …)], or [Reject(…)]

A row that is several examples (turns, instances, directions) gives a record for each, numbered in `origin.instance`.
If only one of its examples is at fault (an instance, a last question without an answer), only that one is a Reject; a
conversation with a fault inside is one Reject, since every later turn builds on it. Texts are never changed.
An alpaca row costs 1.6 µs (half of it the Record), a pair of Tatoeba in both directions 5 µs.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.conversations import MEDIA, Turn, answers, key_of_turns, turns_of, unused_in_turns
from diptych.data_prep.rows.format_table import CONVERSATIONS, NEGATIVE, POSITIVE, Format, fitting_formats
from diptych.data_prep.rows.judged_answers import (
    FORMS,
    apart,
    check_pair,
    check_prompt,
    is_turns,
    judged_turns,
    mark_of,
    pairs_of_rated,
    rated_answer,
    rating_of,
)
from diptych.data_prep.rows.language_names import (
    SOURCE_COLUMNS,
    TARGET_COLUMNS,
    is_same_language,
    is_swapped,
    languages_in,
)
from diptych.data_prep.rows.records import IGNORE_INDEX, Languages, Origin, Record, Reject, Row, Tokenised
from diptych.data_prep.rows.translations import by_language, in_language, variants
from diptych.data_prep.rows.valid_text import (
    Fault,
    described,
    filled_list,
    from_json_text,
    has_value,
    inner,
    input_of,
    is_missing,
    joined,
    listed,
    missing,
    not_a_string,
    some_list,
    text,
    unread,
)

SUMMARY_INSTRUCTION = "Summarize the following text."

MEDIA_MARK = re.compile(r"<\|?(image|img|video|audio)\w*\|?>", re.IGNORECASE)
"""The place of a picture or a sound in a text: `<image>`, `<|image_1|>`, `<|video_pad|>`."""

MAX_PAIRS = 1000
"""Of one row, in which every text of the first side is paired with every text of the second."""

LARGEST_TOKEN_ID = 2**31 - 1
"""Token ids are stored as int32."""

LANGUAGE_COLUMNS = frozenset((*SOURCE_COLUMNS, *TARGET_COLUMNS))

RECORD_FIELDS = ("system", "category", SOURCE_COLUMNS[0], TARGET_COLUMNS[0])
"""What `--map` can fill in any format, as in `--map system=system_prompt`."""

MISSING = object()
"""What a row has under a name that is not there."""

Result = Record | Tokenised | Reject


@dataclass(frozen=True)
class Directions:
    """Instructions for parallel text. A direction with None gives no rows, one with "" rows without instruction."""

    forward: str | None = None
    backward: str | None = None
    languages: Languages = Languages()
    """Of the first side and of the second; in other formats, of source and target. Codes in a row go before these."""

    @property
    def are_none(self) -> bool:
        return self.forward is None and self.backward is None


@dataclass(frozen=True)
class Converter:
    """Rows of one source to records; made by `converter_for`, which knows its first rows. Can be pickled."""

    format: Format
    mapping: Mapping[str, str] = field(default_factory=dict)
    """Field → column, if the two have other names; a column `answers.text` is `text` inside of `answers`."""
    directions: Directions = Directions()
    conversational: bool = False
    """Whether its columns are lists of turns."""
    prompt_field: str = ""
    """Which of PROMPTS answers that were judged are answers to; "" if they are conversations that begin with it."""
    summary_instruction: str = SUMMARY_INSTRUCTION
    positive_examples: int = 0
    """How many of a Natural Instructions task's examples stand in the instruction."""
    negative_examples: int = 0
    rated_pairs: str = "best_worst"
    """Which of several rated answers make a pair: these two, or `all`."""
    rated_margin: float = 0
    """By how much their ratings differ at least."""
    was_given: bool = False
    """The format was named by --format, and not recognised."""
    has_language_columns: bool = False
    """Whether the first rows have columns of language codes."""
    sides: Languages = Languages()
    """What the data calls the languages of the first and of the second side, if it does."""
    is_swapped: bool = False
    """Whether the data has the two sides in the other order than the settings."""

    def records(self, row: Row | Reject) -> list[Result]:
        """At least one. A Reject, which is what readers make of a row that they cannot read, is returned as it is."""
        if isinstance(row, Reject):
            return [row]
        try:
            self._check_media(row.fields)
            return CONVERT[self.format.name](row, self)
        except Fault as fault:
            reason = fault.reason
            if fault.of_shape:  # a row that is not built like the first ones: the data may be of two kinds
                others = [name for name, _ in fitting_formats(row.fields) if name != self.format.name]
                looks = f"; this row looks like {' or '.join(dict.fromkeys(others))}" if others else ""
                how = "as --format says" if self.was_given else "recognised from its first rows"
                reason += f" (This source is read as {self.format.name}, {how}{looks}.)"
            return [Reject(row.origin, fault.field, fault.kind, reason, row.raw)]

    @functools.cached_property
    def used_fields(self) -> frozenset[str]:
        """Columns that are read. The others can be named in a warning."""
        used = {self.column(name) for name in [*self.format.fields, *self.mapping]} | LANGUAGE_COLUMNS
        used -= {self.column(name) for name, wanted in self._task_examples.items() if not wanted}
        return frozenset(used | {name.split(".")[0] for name in used})

    @property
    def _task_examples(self) -> dict[str, int]:
        """How many worked examples of a task stand in the instruction."""
        if self.format.name != "natural_instructions":
            return {}
        return {POSITIVE: self.positive_examples, NEGATIVE: self.negative_examples}

    def unused_fields(self, row: Row) -> list[str]:
        """Columns, and names inside of columns (`messages.name`), that are not read; each once."""
        used = self.used_fields
        names = [name for name in row.fields if name not in used]
        for name, known in self._read_inside.items():
            if name in row.fields:
                value = by_language(from_json_text(row.fields[name]))
                if self.format.name == "parallel" and isinstance(value, Mapping):
                    known = {it: inner for language, inner in known.items() for it in variants(language, value)}
                names += unread(value, name, known)
        if self.conversational:
            for name in map(self.column, self.format.shapes[0]):
                turns = row.fields.get(name)
                form = FORMS[key_of_turns(turns)] if self.format.preferences else self.format.turns
                names += unused_in_turns(turns, name, *form)
        return list(dict.fromkeys(names))

    @functools.cached_property
    def _read_inside(self) -> dict[str, dict[str, Any]]:
        """Column → the names in it that are read: the format's, and the steps of paths such as `answers.text.0`."""
        inside = {self.column(name): dict(known) for name, known in self.format.inside.items()}
        for column in self.mapping.values():
            first, *steps = column.split(".")
            steps = [step for step in steps if not step.isdecimal()]  # a number is a place in a list
            known = inside.setdefault(first, {}) if steps else {}
            for step in steps:
                known = known.setdefault(step, {})
        return {column: known for column, known in inside.items() if column in self.used_fields}

    def _check_media(self, fields: Mapping[str, Any]) -> None:
        """A text that names the place of a picture, in a row that has one, makes no sense without it."""
        if MEDIA.isdisjoint(fields):
            return
        media = [name for name in fields if name in MEDIA and has_value(fields[name])]
        for column in self.used_fields & fields.keys() if media else ():
            if found := MEDIA_MARK.search(json.dumps(from_json_text(fields[column]), ensure_ascii=False, default=str)):
                held = f"'{column}' says {found[0]}, which is what {listed(media)} holds"
                reason = f"{held}, and only text is read. Leave the row out."
                raise Fault(column, "part that is no text", reason)

    # The values of fields

    def column(self, name: str) -> str:
        return self.mapping.get(name, name)

    def value(self, fields: Mapping[str, Any], name: str) -> Any:
        """What the row has for a field, or MISSING."""
        return value_at(fields, self.mapping.get(name, name))

    def needed(self, fields: Mapping[str, Any], name: str) -> Any:
        value = self.value(fields, name)
        if value is MISSING:
            raise missing(self.column(name), fields, self.used_fields, name)
        return value

    def text(self, fields: Mapping[str, Any], name: str) -> str:
        """A text that has to be there."""
        column = self.mapping.get(name, name)
        value = fields.get(column)
        value = self.needed(fields, name) if value is None else value
        if not isinstance(value, str):
            raise not_a_string(value, column, name)
        return text(value, column)

    def texts(self, fields: Mapping[str, Any], name: str) -> list[str]:
        """A text that has to be there, or a list of them: several translations of one sentence."""
        column = self.column(name)
        value = self.value(fields, name)
        if (value is MISSING or value is None) and "." in column:  # the language may be listed, or have a region
            holder, _, language = column.rpartition(".")
            value = in_language(value_at(fields, holder), holder, language)
        if isinstance(value, list | tuple):
            listed = enumerate(filled_list(value, column, f"empty {column}"))
            return [text(it, f"{column}[{number}]") for number, it in listed]
        return [text(value, column)] if isinstance(value, str) else [self.text(fields, name)]

    def optional_text(self, fields: Mapping[str, Any], name: str) -> str:
        """Absent, null and NaN are "": they are how tables say that there is none."""
        column = self.mapping.get(name, name)
        value = fields.get(column)
        if value is None:
            value = self.value(fields, name)
            if value is MISSING and name not in RECORD_FIELDS:
                if misspelt := missing(column, fields, self.used_fields, name, is_optional=True):
                    raise misspelt
        if value is MISSING or is_missing(value):
            return ""
        if not isinstance(value, str):
            raise not_a_string(value, column, name)
        checked = text(value, column, may_be_empty=True)
        return checked if checked.strip() else ""  # a template asks whether there is one

    def shared(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """What all records of a row have: `languages`, of the row or of what it is from; and `system` and `category`
        if --map says what they are."""
        languages = self.directions.languages
        if not (LANGUAGE_COLUMNS.isdisjoint(fields) and LANGUAGE_COLUMNS.isdisjoint(self.mapping)):
            named = {name: self.value(fields, name) for name in LANGUAGE_COLUMNS}
            found = languages_in({name: value for name, value in named.items() if value is not MISSING})
            languages = found.filled_from(languages)
            if not all(found) and is_same_language(*languages):
                side, language = ("source", found.source) if found.source else ("target", found.target)
                reason = f"its {side} language is {language}, and so is the other, which it does not say itself."
                raise Fault(f"{side}_language", "source and target in one language", reason)
        names = [name for name in RECORD_FIELDS[:2] if name in self.mapping] if self.mapping else ()
        return {"languages": languages, **{name: self.optional_text(fields, name) for name in names}}


def value_at(fields: Mapping[str, Any], path: str) -> Any:
    """`answers.text.0` is the first of the list `text` inside of `answers`, if no column is called so; or MISSING."""
    value = fields.get(path, MISSING)
    if value is not MISSING or "." not in path:
        return value
    value = fields
    for name in path.split("."):
        value = from_json_text(value)
        if isinstance(value, Mapping) and name in value:
            value = value[name]
        elif isinstance(value, list | tuple) and name.isdecimal() and len(name) < 10 and int(name) < len(value):
            value = value[int(name)]
        else:
            return MISSING
    return value


# Conversion: one function for each kind of format


def _three_texts(row: Row, converter: Converter, names: tuple[str, str, str], **more: str) -> list[Result]:
    """Instruction, input and output, each under its name; the input may be absent."""
    fields = row.fields
    instruction, input, output = names
    return [
        Record(
            instruction=converter.text(fields, instruction),
            input=converter.optional_text(fields, input) if input else "",
            output=converter.text(fields, output),
            origin=row.origin,
            **{**converter.shared(fields), **more},
        )
    ]


def _dolly(row: Row, converter: Converter) -> list[Result]:
    category = converter.optional_text(row.fields, "category")
    return _three_texts(row, converter, ("instruction", "context", "response"), category=category)


def _prompt_completion(row: Row, converter: Converter) -> list[Result]:
    """Two strings, or two lists of turns; then only the assistant's turns of the completion are learned from."""
    if not converter.conversational:
        return _three_texts(row, converter, ("prompt", "", "completion"))
    prompt, completion = (
        turns_of(converter.needed(row.fields, name), converter.column(name), *converter.format.turns)
        for name in ("prompt", "completion")
    )
    before = [turn._replace(is_target=False) for turn in prompt]
    return _conversation([*before, *completion], converter.column("completion"), row, converter)


def _messages(row: Row, converter: Converter) -> list[Result]:
    """Of OpenAI or ShareGPT, whose one field holds the turns."""
    (field,) = converter.format.shapes[0]
    name = converter.column(field)
    turns = turns_of(converter.needed(row.fields, field), name, *converter.format.turns)
    return _conversation(turns, name, row, converter)


def _conversation(turns: Sequence[Turn], name: str, row: Row, converter: Converter) -> list[Result]:
    """A record for each answer. A question at the end without an answer is a reject of its own."""
    shared = converter.shared(row.fields)
    system, examples, unanswered = answers(turns, name)
    system = [prompt for prompt in (shared.pop("system", ""), *system) if prompt]
    parts = len(examples) + (unanswered is not None)
    results: list[Result] = [
        Record(
            instruction=example.instruction,
            input="",
            output=example.output,
            history=example.history,
            system="\n".join(system),
            origin=_part(row.origin, number, parts),
            **shared,
        )
        for number, example in enumerate(examples, start=1)
    ]
    if unanswered is not None:
        reason = f"'{unanswered.where}' has no answer: here the conversation ends. The turns before it are kept."
        kind = "user turn without an answer"
        results.append(Reject(_part(row.origin, parts, parts), unanswered.where, kind, reason, row.raw))
    return results


def _preference(row: Row, converter: Converter) -> list[Result]:
    """Two answers to one prompt, of which the first was preferred."""
    record, (chosen, rejected) = _judged(row, converter, ("chosen", "rejected"))
    check_pair(chosen, rejected, converter.column("rejected"))
    return [replace(record, rejected=rejected)]


def _marked(row: Row, converter: Converter) -> list[Result]:
    """An answer, and whether it is liked."""
    mark = mark_of(converter.needed(row.fields, "label"), converter.column("label"))
    record, _ = _judged(row, converter, ("completion",))
    return [replace(record, mark=mark)]


def _judged(row: Row, converter: Converter, names: Sequence[str]) -> tuple[Record, list[str]]:
    """The record of the first answer, and the texts of all."""
    fields, answers = row.fields, {}
    for name in names:
        value = converter.needed(fields, name)
        if not is_turns(value):
            converter.text(fields, name)  # which says best what is wrong with one
        answers[converter.column(name)] = judged_turns(value, converter.column(name), converter.conversational)
    shared, found = apart(answers)
    name = converter.prompt_field
    is_given = converter.value(fields, name) is not MISSING and has_value(converter.value(fields, name))
    if shared and is_given and name != "input":
        check_prompt(_prompt(fields, converter), shared, converter.column(name))
    return _answered(row, converter, shared or _prompt(fields, converter), found[0]), [turn.text for turn in found]


def _prompt(fields: Mapping[str, Any], converter: Converter) -> str | list[Turn]:
    name = converter.prompt_field or "prompt"
    value = converter.needed(fields, name)
    if not is_turns(value) or (isinstance(value, str) and not converter.conversational):
        return converter.text(fields, name)
    turns = judged_turns(value, converter.column(name), converter.conversational)
    is_answered = name in CONVERSATIONS and turns[-1].is_target  # by what the row had before
    return turns[: len(turns) - is_answered]


def _answered(row: Row, converter: Converter, prompt: str | list[Turn], answer: Turn) -> Record:
    if not isinstance(prompt, str):
        turns = [*(turn._replace(is_target=False) for turn in prompt), answer]
        [record] = _conversation(turns, answer.where, row, converter)
        return record
    is_source = converter.prompt_field == "source"
    return Record(
        instruction="" if is_source or converter.prompt_field == "input" else prompt,
        input=prompt if is_source else converter.optional_text(row.fields, "input"),
        output=answer.text,
        origin=row.origin,
        **converter.shared(row.fields),
    )


def _rated(row: Row, converter: Converter) -> list[Result]:
    """A record for each pair of a better and a worse answer, and a reject for each answer that cannot be in one."""
    fields, column = row.fields, converter.column("completions")
    ratings, of_ratings = converter.value(fields, "ratings"), converter.column("ratings")
    completions = filled_list(converter.needed(fields, "completions"), column, "no completions")
    are_apart = ratings is not MISSING and not isinstance(completions[0], Mapping)
    ratings = some_list(ratings, of_ratings) if are_apart else ()
    if are_apart and len(ratings) != len(completions):
        reason = f"there are {len(completions)} answers and {len(ratings)} ratings in '{of_ratings}'."
        raise Fault(of_ratings, "answers and ratings differ in number", reason)
    rated, faults = [], []
    for place, it in enumerate(completions):
        where = f"{column}[{place}]"
        try:
            if are_apart:
                rated.append((text(it, where), rating_of(ratings[place], f"{of_ratings}[{place}]")))
            else:
                rated.append(rated_answer(it, where))
        except Fault as fault:
            faults.append(fault)
    if faults and len(rated) < 2:
        raise faults[0]
    texts, ratings = zip(*rated, strict=True)
    if converter.rated_pairs == "all" and len(texts) * (len(texts) - 1) > 2 * MAX_PAIRS:
        reason = (
            f"all pairs of {len(texts):,} answers are more than {MAX_PAIRS:,}. Take best_worst, or divide the row."
        )
        raise Fault(column, "too many pairs", reason)
    pairs = pairs_of_rated(texts, ratings, column, converter.rated_pairs, converter.rated_margin)
    record = _answered(row, converter, _prompt(fields, converter), Turn("assistant", texts[0], column, True))
    count = len(pairs) + len(faults)
    return [
        *(
            replace(record, output=chosen, rejected=rejected, origin=_part(row.origin, number, count))
            for number, (chosen, rejected) in enumerate(pairs, start=1)
        ),
        *(
            Reject(_part(row.origin, number, count), fault.field, fault.kind, fault.reason, row.raw)
            for number, fault in enumerate(faults, start=len(pairs) + 1)
        ),
    ]


def _edits(row: Row, converter: Converter) -> list[Result]:
    """A source, its machine translation, and what a person made of it, which is preferred."""
    source, machine, edited = (converter.text(row.fields, name) for name in ("src", "mt", "pe"))
    check_pair(edited, machine, converter.column("mt"))
    instruction, shared = converter.directions.forward or "", converter.shared(row.fields)
    return [
        Record(instruction=instruction, input=source, output=edited, rejected=machine, origin=row.origin, **shared)
    ]


def _self_instruct(row: Row, converter: Converter) -> list[Result]:
    instruction = converter.text(row.fields, "instruction")
    return _instances(row, converter, "instances", instruction, converter.shared(row.fields))


def _natural_instructions(row: Row, converter: Converter) -> list[Result]:
    fields = row.fields
    instruction = joined(converter.needed(fields, "Definition"), converter.column("Definition"), "\n")
    for name, wanted in converter._task_examples.items():
        # As the prompts of Tk-Instruct have it (Wang et al. 2022): the first few, each with its explanation.
        column, examples = converter.column(name), converter.value(fields, name)
        shown = filled_list(examples, column, "no examples") if wanted and examples is not MISSING and examples else ()
        for number, example in enumerate(shown[:wanted], start=1):
            where = f"{column}[{number - 1}]"
            output = joined(inner(example, "output", where), f"{where}.output", ", ")
            start = f"\n\n{name.removesuffix('s')} {number} -\n"
            instruction += f"{start}Input: {input_of(example, where)}\nOutput: {output}"
            if explanation := example.get("explanation"):
                instruction += f"\nExplanation: {text(explanation, f'{where}.explanation')}"
    categories = converter.value(fields, "Categories")
    categories = "" if categories is MISSING or categories is None else categories
    category = joined(categories, converter.column("Categories"), ", ", may_be_empty=True)
    return _instances(row, converter, "Instances", instruction, {"category": category, **converter.shared(fields)})


def _instances(row: Row, converter: Converter, field: str, instruction: str, shared: dict[str, Any]) -> list[Result]:
    """A record for each output of each instance."""
    name = converter.column(field)
    pairs: list[tuple[Any, str, str, Any]] = []
    for number, instance in enumerate(
        filled_list(converter.needed(row.fields, field), name, f"no {field.casefold()}")
    ):
        where, instance = f"{name}[{number}]", from_json_text(instance)
        try:
            input, outputs = input_of(instance, where), inner(instance, "output", where)
            if isinstance(outputs, list | tuple):
                outputs = enumerate(filled_list(outputs, f"{where}.output", "no output"))
                pairs += [(instance, f"{where}.output[{n}]", input, output) for n, output in outputs]
            else:
                pairs.append((instance, f"{where}.output", input, outputs))
        except Fault as fault:
            pairs.append((instance, where, "", fault))
    results: list[Result] = []
    for number, (instance, where, input, output) in enumerate(pairs, start=1):
        origin = _part(row.origin, number, len(pairs))
        try:
            if isinstance(output, Fault):
                raise output
            record = Record(instruction=instruction, input=input, output=text(output, where), origin=origin, **shared)
        except Fault as fault:
            raw = json.dumps(instance, ensure_ascii=False, default=str)  # the task as a whole can be megabytes
            results.append(Reject(origin, fault.field, fault.kind, fault.reason, raw))
        else:
            results.append(record)
    return results


def _parallel(row: Row, converter: Converter) -> list[Result]:
    """A record for each direction, and for each pair if a side has several texts. A pair without directions is an
    instruction and its answer."""
    fields, shared = row.fields, converter.shared(row.fields)
    there, back = converter.directions.forward, converter.directions.backward
    firsts, seconds = converter.texts(fields, "first"), converter.texts(fields, "second")
    if len(firsts) * len(seconds) > MAX_PAIRS:
        reason = f"the row makes {len(firsts) * len(seconds):,} pairs, and {MAX_PAIRS:,} are allowed. Divide it."
        raise Fault(converter.column("first"), "too many pairs", reason)
    languages = shared.pop("languages")
    if converter.has_language_columns:
        try:
            firsts, seconds = (seconds, firsts) if is_swapped(converter.sides, languages) else (firsts, seconds)
        except UserError as error:
            raise Fault(SOURCE_COLUMNS[0], "other languages than its texts", f"{error}") from None
    if back is not None and any(languages) and not all(languages):
        known, unknown = ("source", "target") if languages.source else ("target", "source")
        reason = (
            f"its {known} language is {max(languages)}, and nobody has said the {unknown} language, which the other"
            f" direction is from. Give --{unknown}_language, or a column {unknown}_language."
        )
        raise Fault(f"{unknown}_language", "one language of two", reason)
    examples: list[tuple[str, str, str, Languages]] = []
    for first, second in product(firsts, seconds):
        if converter.directions.are_none:
            examples.append((first, "", second, languages))
        if there is not None:
            examples.append((there, first, second, languages))
        if back is not None:
            examples.append((back, second, first, languages.swapped()))
    return [
        Record(
            instruction=instruction,
            input=input,
            output=output,
            languages=of_direction,
            origin=_part(row.origin, number, len(examples)),
            **shared,
        )
        for number, (instruction, input, output, of_direction) in enumerate(examples, start=1)
    ]


def _summarisation(row: Row, converter: Converter) -> list[Result]:
    [record] = _three_texts(row, converter, ("document", "", "summary"))
    return [replace(record, instruction=converter.summary_instruction, input=record.instruction)]


def _tokenised(row: Row, converter: Converter) -> list[Result]:
    input_ids = _token_ids(converter.needed(row.fields, "input_ids"), converter.column("input_ids"))
    labels = _token_ids(converter.needed(row.fields, "labels"), converter.column("labels"), IGNORE_INDEX)
    if set(labels) == {IGNORE_INDEX}:
        name = converter.column("labels")
        raise Fault(name, "no label", f"'{name}' is {IGNORE_INDEX} throughout: there is nothing to learn from.")
    return [Tokenised(input_ids=input_ids, labels=labels, origin=row.origin)]


def _token_ids(value: Any, name: str, also: int = 0) -> tuple[int, ...]:
    ids = tuple(filled_list(value, name, f"empty {name}"))
    if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) <= LARGEST_TOKEN_ID:
        return ids
    for place, token in enumerate(ids):
        if type(token) is int and (0 <= token <= LARGEST_TOKEN_ID or token == also):
            continue
        reason = f"'{name}[{place}]' is {described(token)}; a token id, from 0 to {LARGEST_TOKEN_ID:,}, is due."
        raise Fault(f"{name}[{place}]", f"'{name}' holds what is no token id", reason)
    return ids


def _part(origin: Origin, number: int, parts: int) -> Origin:
    """The origin of one of several examples of a row."""
    return Origin(origin.file, origin.row, number) if parts > 1 else origin


CONVERT: Mapping[str, Callable[[Row, Converter], list[Result]]] = {
    "alpaca": functools.partial(_three_texts, names=("instruction", "input", "output")),
    "dolly": _dolly,
    "prompt_completion": _prompt_completion,
    "messages": _messages,
    "sharegpt": _messages,
    "natural_instructions": _natural_instructions,
    "self_instruct": _self_instruct,
    "parallel": _parallel,
    "summarisation": _summarisation,
    "preference": _preference,
    "marked": _marked,
    "rated": _rated,
    "edits": _edits,
    "tokenised": _tokenised,
}
"""Each raises a Fault if the row as a whole is of no use."""
