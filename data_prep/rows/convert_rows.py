"""From the fields of a row to records, in ten formats. The format of a file is recognised by its first rows.

    {"instruction": "Add.", "input": "1 + 1", "output": "2"}                                        alpaca
    {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}  messages
    {"translation": {"en": "Go.", "ko": "가."}}                                                     parallel, …

    converter = converter_for(first_rows, "rows.jsonl")
    converter.records(row)  → [Record(instruction="Add.", input="1 + 1", output="2", …)], or [Reject(…)]

A row that is several examples (turns, instances, directions) gives a record for each, numbered in `origin.instance`.
Where only one of its examples is at fault (an instance, a last question without an answer), it gives a Reject for that
one; a conversation with a fault inside is one Reject, since every later turn builds on it. Texts are never changed.
An alpaca row costs 1.6 µs (half of it the Record), a pair of Tatoeba in both directions 5 µs.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from typing import Any

from diptych.data_prep.command_line.errors import UserError, nearest
from diptych.data_prep.rows.conversations import (
    MEDIA,
    ROLES,
    SHAREGPT_ROLES,
    Turn,
    answers,
    key_of_turns,
    turns_of,
    unused_in_turns,
)
from diptych.data_prep.rows.language_names import (
    SOURCE_COLUMNS,
    TARGET_COLUMNS,
    is_same_language,
    is_swapped,
    languages_in,
    names_language,
)
from diptych.data_prep.rows.records import IGNORE_INDEX, Languages, Origin, Record, Reject, Row, Tokenised
from diptych.data_prep.rows.valid_text import (
    Fault,
    check_not_misspelt,
    described,
    filled_list,
    from_json_text,
    has_value,
    inner,
    input_of,
    is_missing,
    is_unparsed,
    joined,
    listed,
    mapped,
    missing,
    not_a_string,
    path_to_text,
    shown_name,
    text,
    unparsed,
    unread,
)

SUMMARY_INSTRUCTION = "Summarize the following text."

DOCUMENT_NAMES = ("document", "article", "text", "dialogue")
SUMMARY_NAMES = ("summary", "highlights")

POSITIVE, NEGATIVE = "Positive Examples", "Negative Examples"
"""What a task file of Super-NaturalInstructions calls its worked examples."""

MEDIA_MARK = re.compile(r"<\|?(image|img|video|audio)\w*\|?>", re.IGNORECASE)
"""Where a text says that a picture or a sound belongs: `<image>`, `<|image_1|>`, `<|video_pad|>`."""

MAX_PAIRS = 1000
"""Of one row, in which every text of the first side is paired with every text of the second."""

LARGEST_TOKEN_ID = 2**31 - 1
"""Token ids are stored as int32."""

RECORD_FIELDS = ("system", "category", SOURCE_COLUMNS[0], TARGET_COLUMNS[0])
"""What `--map` can fill in any format, as in `--map system=system_prompt`."""

LANGUAGE_COLUMNS = (*SOURCE_COLUMNS, *TARGET_COLUMNS)
_NAMED = frozenset(LANGUAGE_COLUMNS)

SYNONYMS = {
    "instruction": ("prompt", "question", "query", "task", "definition"),
    "input": ("context", "inputs", "passage"),
    "output": ("response", "answer", "completion", "target", "targets", "outputs", "reply"),
    "prompt": ("inputs", "input", "question"),
    "completion": ("response", "answer", "output", "targets"),
    "response": ("answer", "output"),
    "messages": ("conversation", "dialogue", "dialog", "chat", "turns"),
    "conversations": ("conversation", "dialogue", "dialog", "chat", "turns"),
    "document": ("content", "body"),
    "summary": ("abstract", "tldr"),
    "translation": ("translations",),
    "first": ("src", "source_text", "source_sentence"),
    "second": ("tgt", "trg", "target_text", "target_sentence"),
}
"""Names that may mean the same. They are suggested, never guessed."""

MISSING = object()

Result = Record | Tokenised | Reject


@dataclass(frozen=True)
class Directions:
    """Instructions for parallel text. A direction with None gives no rows, one with "" rows without instruction."""

    forward: str | None = None
    backward: str | None = None
    languages: Languages = Languages()
    """Of the first side and of the second; in other formats, of source and target. Rows that bring codes go before."""

    @property
    def are_none(self) -> bool:
        return self.forward is None and self.backward is None


@dataclass(frozen=True)
class Format:
    """One way in which data sets write their rows."""

    name: str
    description: str
    example: str
    """One row, as JSON."""
    convert: Callable[[Row, Converter], list[Result]]
    """Raises a Fault where the row as a whole is of no use."""
    shapes: tuple[Mapping[str, str], ...]
    """What columns make a row one of this format: field → column, in each spelling that data sets have."""
    optional: tuple[str, ...] = ()
    inside: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Of a field that holds objects, the names in them that are read, as `unread` takes them."""
    turns: tuple[str, str, Mapping[str, str]] | None = None
    """Of a conversation: the keys of a turn that hold role and text, and what the roles mean."""
    looks: Callable[[Mapping[str, Any], Mapping[str, str]], bool] | None = None
    """Whether the values are such, where columns alone do not tell."""

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
        """`document/article, summary/highlights` where each goes with each, otherwise `first, second or …`."""
        spellings = {name: dict.fromkeys(shape.get(name) for shape in self.shapes) for name in self.shapes[0]}
        if len(self.shapes) == prod(map(len, spellings.values())):
            return ", ".join("/".join(names) for names in spellings.values())
        return " or ".join(", ".join(shape.values()) for shape in self.shapes)


@dataclass(frozen=True)
class Converter:
    """Rows of one source to records; made by `converter_for`, which knows its first rows. Can be pickled."""

    format: Format
    mapping: Mapping[str, str] = field(default_factory=dict)
    """Field → column, where the two have other names; a column `answers.text` is `text` inside of `answers`."""
    directions: Directions = Directions()
    conversational: bool = False
    """Whether its columns are lists of turns."""
    summary_instruction: str = SUMMARY_INSTRUCTION
    positive_examples: int = 0
    """How many of a Natural Instructions task's examples are told in the instruction."""
    negative_examples: int = 0
    was_given: bool = False
    """The format was named by --format, and not recognised."""
    brings_languages: bool = False
    """Whether the first rows have columns of language codes."""
    sides: Languages = Languages()
    """What the data calls the languages of the first and of the second side, where it does."""
    is_swapped: bool = False
    """Whether the data has the two sides the other way round than the settings."""

    def records(self, row: Row | Reject) -> list[Result]:
        """At least one. A Reject, which is what readers make of a row that they cannot read, passes through."""
        if isinstance(row, Reject):
            return [row]
        try:
            self._check_media(row.fields)
            return self.format.convert(row, self)
        except Fault as fault:
            reason = fault.reason + self._other_shape(row) if fault.of_shape else fault.reason
            return [Reject(row.origin, fault.field, fault.kind, reason, row.raw)]

    @functools.cached_property
    def used_fields(self) -> frozenset[str]:
        """Columns that are read. The others can be named in a warning."""
        used = {self.column(name) for name in [*self.format.fields, *self.mapping]}
        used |= {*SOURCE_COLUMNS, *TARGET_COLUMNS}
        if self.format.name == "natural_instructions":
            unused = {POSITIVE: not self.positive_examples, NEGATIVE: not self.negative_examples}
            used -= {self.column(name) for name, is_unused in unused.items() if is_unused}
        return frozenset(used | {name.split(".")[0] for name in used})

    def unused_fields(self, row: Row) -> list[str]:
        """Columns, and names inside of columns (`messages.name`), that are not read; each once."""
        used = self.used_fields
        names = [name for name in row.fields if name not in used]
        for name, known in self._inside.items():
            if name in row.fields:
                value = by_language(from_json_text(row.fields[name]))
                if self.format.name == "parallel" and isinstance(value, Mapping):
                    known = {it: inner for language, inner in known.items() for it in variants(language, value)}
                names += unread(value, name, known)
        if self.conversational:
            for name in map(self.column, self.format.shapes[0]):
                names += unused_in_turns(row.fields.get(name), name, *self.format.turns)
        return list(dict.fromkeys(names))

    @functools.cached_property
    def _inside(self) -> dict[str, dict[str, Any]]:
        """Column → the names in it that are read: the format's, and the steps of paths such as `answers.text.0`."""
        inside = {self.column(name): dict(known) for name, known in self.format.inside.items()}
        for column in self.mapping.values():
            first, *steps = _steps(column)
            steps = [step for step in steps if not step.isdecimal()]  # a number is a place in a list
            known = inside.setdefault(first, {}) if steps else {}
            for step in steps:
                known = known.setdefault(step, {})
        return {column: known for column, known in inside.items() if column in self.used_fields}

    def _check_media(self, fields: Mapping[str, Any]) -> None:
        """A text that speaks of a picture, in a row that has one, cannot be learned from without it."""
        if MEDIA.isdisjoint(fields):
            return
        media = [name for name in fields if name in MEDIA and has_value(fields[name])]
        for column in self.used_fields & fields.keys() if media else ():
            if found := MEDIA_MARK.search(json.dumps(from_json_text(fields[column]), ensure_ascii=False, default=str)):
                held = f"'{column}' says {found[0]}, which is what {listed(media)} holds"
                reason = f"{held}, and only text is read. Leave the row out."
                raise Fault(column, "part that is no text", reason)

    def column(self, name: str) -> str:
        return self.mapping.get(name, name)

    def value(self, fields: Mapping[str, Any], name: str) -> Any:
        """What the row has for a field, or MISSING."""
        column = self.mapping.get(name, name)
        value = fields.get(column, MISSING)
        return _inside(fields, column) if value is MISSING and "." in column else value

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
            value = self._in_language(fields, *column.rsplit(".", 1))
        if isinstance(value, list | tuple):
            listed = enumerate(filled_list(value, column, f"empty {column}"))
            return [text(it, f"{column}[{number}]") for number, it in listed]
        return [text(value, column)] if isinstance(value, str) else [self.text(fields, name)]

    def _in_language(self, fields: Mapping[str, Any], holder: str, language: str) -> Any:
        written = from_json_text(_inside(fields, holder))
        unit = by_language(written)
        if not isinstance(unit, Mapping):
            return MISSING
        if unit is not written and len(written["language"]) != len(written["translation"]):
            kind = "languages and translations differ in number"
            raise Fault(holder, kind, f"'{holder}' has no translation for each language, or no language for each.")
        found = variants(language, unit)
        if not found and language not in unit:
            reason = f"'{holder}' has no text in '{language}'; it has some in {listed(unit) or 'no language'}."
            raise Fault(f"{holder}.{language}", f"missing field '{holder}.{language}'", reason, of_shape=True)
        if len(found) < 2:
            return unit[found[0] if found else language]
        texts = [unit[name] for name in found]
        return [part for text in texts for part in (text if isinstance(text, list | tuple) else [text])]

    def optional_text(self, fields: Mapping[str, Any], name: str) -> str:
        """Absent, null and NaN are "": they are how tables say that there is none."""
        column = self.mapping.get(name, name)
        value = fields.get(column)
        if value is None:
            value = self.value(fields, name)
            if value is MISSING and name not in RECORD_FIELDS:
                check_not_misspelt(column, fields, self.used_fields, name)
        if value is MISSING or is_missing(value):
            return ""
        if not isinstance(value, str):
            raise not_a_string(value, column, name)
        checked = text(value, column, may_be_empty=True)
        return checked if checked.strip() else ""  # a template asks whether there is one

    def mapped(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """`system` and `category`, where --map says what they are; and `languages`."""
        languages = {"languages": self.languages(fields)}
        if not self.mapping:
            return languages
        names = [name for name in RECORD_FIELDS[:2] if name in self.mapping]
        return languages | {name: self.optional_text(fields, name) for name in names}

    def languages(self, fields: Mapping[str, Any]) -> Languages:
        """Those of the row, or of what it is from."""
        if not fields.keys().isdisjoint(LANGUAGE_COLUMNS) or not self.mapping.keys().isdisjoint(LANGUAGE_COLUMNS):
            named = {name: self.value(fields, name) for name in LANGUAGE_COLUMNS}
            found = languages_in({name: value for name, value in named.items() if value is not MISSING})
            languages = found.or_else(self.directions.languages)
            if not all(found) and is_same_language(*languages):
                side, given = ("source", found.source) if found.source else ("target", found.target)
                reason = f"its {side} language is {given}, and so is the other, which it does not say itself."
                raise Fault(f"{side}_language", "source and target in one language", reason)
            return languages
        return self.directions.languages

    def _other_shape(self, row: Row) -> str:
        """A row that is built otherwise than the first ones says so: the data may be of two kinds."""
        others = [name for name, _ in _fitting(row.fields) if name != self.format.name]
        looks = f"; this row looks like {' or '.join(dict.fromkeys(others))}" if others else ""
        how = "as --format says" if self.was_given else "recognised from its first rows"
        return f" (This source is read as {self.format.name}, {how}{looks}.)"


def converter_for(
    rows: Sequence[Row],
    source: str,
    name: str | None = None,
    mapping: Mapping[str, str] | None = None,
    directions: Directions = Directions(),
    languages: Sequence[str] = (),
    summary_instruction: str = SUMMARY_INSTRUCTION,
    positive_examples: int = 0,
    negative_examples: int = 0,
    languages_of_name: Sequence[str] = (),
) -> Converter:
    """What turns all rows of a source into records, decided by its first ones. Everything that a person has to mend
    before a row can be read is said here: columns that are not there, formats that may be two, missing directions.

    `languages_of_name` are those of the two sides that the source's name says. Which side is in which language is as
    the data says: where `directions` have the same two the other way round, the sides are swapped, and other ones are
    refused."""
    mapping = dict(mapping or {})
    said, sides = directions.languages.direction, Languages(*languages_of_name)
    if not languages and "translation" not in mapping and not any(map(_fitting, _views(rows, mapping))):
        languages = _language_columns(rows, source, directions.languages)
    if len(languages) == 2 and mapping.keys().isdisjoint(("first", "second", "translation")):
        names = {name for row in rows for name in row.fields}
        if names.issuperset(languages):  # a table with a column for each language
            mapping |= zip(("first", "second"), languages, strict=True)
            sides = Languages(*languages)
    _check_settings(directions, summary_instruction)
    format, shape = _recognise(rows, source, mapping, name)
    spelled = {name: mapping.get(column, column) for name, column in shape.items() if name != column}
    if "translation" in shape:
        spelled = _languages(rows, source, mapping.pop("translation", "translation"), languages)
        sides = _called(spelled)
    columns = {**spelled, **mapping}
    if not any(sides) and all(map(names_language, _called(columns))):
        sides = _called(columns)
    if format.name == "parallel" and directions.are_none and said:
        directions = replace(directions, forward="")
    if format.name == "parallel" and columns.get("first") != "source":
        need_direction(source, directions)
    try:
        is_back = format.name == "parallel" and is_swapped(sides, directions.languages)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    if is_back:
        sides = sides.swapped()
        columns |= {"first": columns.get("second", "second"), "second": columns.get("first", "first")}
    if format.name == "parallel":
        directions = replace(directions, languages=directions.languages.or_else(sides))
    return Converter(
        format,
        columns,
        directions,
        conversational=format.turns is not None
        and (format.name != "prompt_completion" or _is_conversational(_views(rows, mapping))),
        summary_instruction=summary_instruction,
        positive_examples=positive_examples,
        negative_examples=negative_examples,
        was_given=name is not None,
        brings_languages=any(not _NAMED.isdisjoint(view) for view in _views(rows, mapping)),
        sides=sides,
        is_swapped=is_back,
    )


def _language_columns(rows: Iterable[Row], source: str, asked: Languages) -> list[str]:
    """The columns of a table that are called by languages, if these are two, or two of them are asked for."""
    texts = [(name, value) for row in rows for name, value in row.fields.items() if isinstance(value, str)]
    names = list(dict.fromkeys(name for name, _ in texts if names_language(name)))
    found = names
    if len(names) > 2 and all(asked):
        found = [name for name in names if any(is_same_language(name, language) for language in asked)]
    if len(names) > 2 and len(found) != 2:
        raise UserError(
            f"{source} has columns that are called by languages, {listed(names)}, and pairs are of two. Say which are"
            f" the first and the second side, for example --languages {names[-2]} {names[-1]}."
        )
    return found if len(found) == 2 else []


def _called(columns: Mapping[str, str]) -> Languages:
    """What the columns of the two sides are called, less what they are in: `translation.en` is `en`."""
    return Languages(*(columns.get(side, "").rpartition(".")[2] for side in ("first", "second")))


def recognise(
    rows: Sequence[Row], source: str, mapping: Mapping[str, str] | None = None, name: str | None = None
) -> Format:
    """The one format that most of the first rows have. UserError where there is none, or more than one."""
    return _recognise(rows, source, dict(mapping or {}), name)[0]


def need_direction(source: str, directions: Directions) -> None:
    if directions.are_none:
        raise UserError(
            f"{source} is parallel text, and no direction has an instruction. Give one or both, for example"
            " --forward 'Translate English to Korean:' --backward 'Translate Korean to English:'. For models with"
            " language codes, --forward '' --backward '' give rows without instructions."
        )


def parse_mapping(entries: Iterable[str]) -> dict[str, str]:
    """`["output=answer"]` → `{"output": "answer"}`: the known name, then the data's."""
    mapping: dict[str, str] = {}
    for entry in entries:
        name, equals, column = entry.partition("=")
        if not (name and equals and column):
            raise UserError(f"--map {entry}: a known name, '=' and a column are due, such as output=answer.")
        if name in mapping:
            raise UserError(f"--map gives '{name}' two columns, '{mapping[name]}' and '{column}'. Drop one.")
        mapping[name] = column
    _check_mapped_names(mapping, FORMATS.values())
    return mapping


def describe() -> str:
    """Name, columns (in brackets those that may be absent) and a row of each format, for people."""
    lines = []
    for format in FORMATS.values():
        lines += [f"{format.name}: {format.description}", f"    columns  {format.columns}"]
        lines += [f"    example  {format.example}"]
    return "\n".join(lines)


# Recognition


def _recognise(
    rows: Sequence[Row], source: str, mapping: Mapping[str, str], name: str | None
) -> tuple[Format, Mapping[str, str]]:
    """The format, and which of its spellings. Each row votes for all that it fits; the winner has more votes than any
    other, and more than half of the rows that fit something, since a few rows may be faulty, or of another kind."""
    rows = [row for row in rows if isinstance(row, Row)]
    if not rows:
        raise UserError(f"{source}: there is no row by which to recognise a format.")
    candidates = FORMATS if name is None else {name: named(name)}
    _check_mapped_names(mapping, candidates.values())
    _check_mapped_columns(rows, source, mapping)
    views = _views(rows, mapping)
    filled = [{column: value for column, value in view.items() if value is not None} for view in views]
    for looked_at in (filled, views):  # a table may have columns for two formats, of which one is null throughout
        fitting = [found for view in looked_at if (found := _fitting(view, candidates, mapping))]
        if fitting:
            return _winner(fitting, source, name is not None)
    raise UserError(_nothing_fits(rows, views, source, candidates))


def _winner(
    fitting: Sequence[Sequence[tuple[str, int]]], source: str, was_given: bool
) -> tuple[Format, Mapping[str, str]]:
    votes = Counter(candidate for found in fitting for candidate in found)
    (best, count), *others = votes.most_common()
    if 2 * count > len(fitting) and all(number < count for _, number in others):
        format = FORMATS[best[0]]
        return format, format.shapes[best[1]]
    names = list(dict.fromkeys(name for name, _ in votes))
    shown = ", ".join(
        f"{name} ({', '.join(FORMATS[name].shapes[shape].values())}: {number:,} of {len(fitting):,} rows)"
        for (name, shape), number in votes.most_common()
    )
    if was_given or len(names) == 1:
        fields = FORMATS[names[0]].shapes[votes.most_common(1)[0][0][1]]
        mend = "--map decides, for example --map " + " ".join(mapped(name, column) for name, column in fields.items())
    else:
        mend = f"--format NAME decides, for example --format {names[0]}"
    raise UserError(f"{source} fits more than one format, to judge by its first rows: {shown}. {mend}.")


def _fitting(
    view: Mapping[str, Any], candidates: Mapping[str, Format] | None = None, mapping: Mapping[str, str] | None = None
) -> list[tuple[str, int]]:
    """Name of the format and number of the shape, of all that a row fits. What --map names is no longer looked for
    under other names."""
    return [
        (name, number)
        for name, format in (candidates or FORMATS).items()
        for number, shape in enumerate(format.shapes)
        if all(column in view for column in shape.values())
        and all(shape.get(mapped, mapped) == mapped for mapped in mapping or ())
        and (format.looks is None or format.looks(view, shape))
    ]


def _views(rows: Iterable[Row], mapping: Mapping[str, str]) -> list[dict[str, Any]]:
    """The rows as they would be with their columns renamed."""
    views = []
    for row in rows:
        if not isinstance(row, Row):
            continue
        view = {name: value for name, value in row.fields.items() if name not in mapping}
        for column in mapping.values():
            view.pop(column, None)
        for name, column in mapping.items():
            value = row.fields.get(column, MISSING)
            value = _inside(row.fields, column) if value is MISSING else value
            if value is not MISSING:
                view[name] = value
        views.append(view)
    return views


def _inside(fields: Mapping[str, Any], path: str) -> Any:
    """`answers.text.0` is the first of the list `text` inside of `answers`."""
    value: Any = fields
    for name in _steps(path):
        value = from_json_text(value)
        if isinstance(value, Mapping) and name in value:
            value = value[name]
        elif isinstance(value, list | tuple) and name.isdecimal() and len(name) < 10 and int(name) < len(value):
            value = value[int(name)]
        else:
            return MISSING
    return value


@functools.lru_cache(maxsize=64)
def _steps(path: str) -> tuple[str, ...]:
    return tuple(path.split("."))


def named(name: str) -> Format:
    """The format that --format names."""
    if name in FORMATS:
        return FORMATS[name]
    near = nearest(name, FORMATS)
    hint = f" Did you mean '{near}'?" if near else ""
    raise UserError(f"format '{name}' is not known. Known are {', '.join(FORMATS)}.{hint}")


def _check_mapped_names(mapping: Mapping[str, str], formats: Iterable[Format]) -> None:
    formats = list(formats)
    known = list(dict.fromkeys([*(name for format in formats for name in format.fields), *RECORD_FIELDS]))
    for name, column in mapping.items():
        if name not in known:
            near = nearest(name, known)
            hint = f"Did you mean '{near}={column}'?" if near else f"Known are {', '.join(known)}."
            swapped = " The known name stands first, the data's column second." if column in known else ""
            where = f"format {formats[0].name}" if len(formats) == 1 else "any format"
            raise UserError(f"--map {name}={column}: '{name}' is no field of {where}. {hint}{swapped}")


def _check_mapped_columns(rows: Sequence[Row], source: str, mapping: Mapping[str, str]) -> None:
    for name, column in mapping.items():
        if any(column in row.fields or _inside(row.fields, column) is not MISSING for row in rows):
            continue
        paths = dict.fromkeys(path for row in rows for path in _paths(row.fields))
        near = nearest(column, paths)
        hint = f" Did you mean '{name}={shown_name(near)}'?" if near else ""
        found = listed(dict.fromkeys(column for row in rows for column in row.fields)) or "none"
        raise UserError(
            f"{source}: --map {name}={column}: there is no column '{column}' in its first rows; columns there are"
            f" {found}.{hint}"
        )


def _paths(fields: Mapping[str, Any]) -> Iterable[str]:
    for name, value in fields.items():
        yield name
        if isinstance(value, Mapping):
            yield from (f"{name}.{inner}" for inner in value)


def _nothing_fits(
    rows: Sequence[Row], views: Sequence[Mapping[str, Any]], source: str, candidates: Mapping[str, Format]
) -> str:
    found = listed(dict.fromkeys(name for row in rows for name in row.fields)) or "none"
    needs = "; ".join(f"{name}: {format.needs}" for name, format in candidates.items())
    what = "no known format" if len(candidates) > 1 else f"not {next(iter(candidates))}, as --format says"
    advice = next(
        (unparsed(value, f"'{shown_name(name)}'", name) for name, value in views[0].items() if is_unparsed(value)),
        _suggestion(views, candidates),
    )
    return (
        f"{source}: {what}, to judge by its first rows. Columns there are {found}.{advice} What the columns have to"
        f" be: {needs}."
    )


def _suggestion(views: Sequence[Mapping[str, Any]], candidates: Mapping[str, Format]) -> str:
    """The fewest columns that would have to be called otherwise, so that the rows have a format and are read."""
    best: tuple[int, str, dict[str, str]] | None = None
    for format in candidates.values():
        for shape in format.shapes:
            renamed = next((it for it in _renamings(views, format, shape) if _reads(views, format, it)), None)
            count = sum(name in shape for name in renamed or ())
            if renamed and (best is None or count < best[0]):
                best = (count, format.name, renamed)
    if best is None:
        return (
            " Columns with other names are mapped, also inside of others: --map output=answer, or answers.text.0, and"
            " those of parallel text as --map first=en second=de. Those of a csv without a header are numbers: --map"
            " instruction=1 output=2."
        )
    _, name, renamed = best
    pairs = [(known, shown_name(column)) for known, column in renamed.items()]
    meant = " and ".join(f"'{column}' is the {known}" for known, column in pairs[:1])
    meant += "".join(f", '{column}' the {known}" for known, column in pairs[1:])
    options = " ".join(mapped(known, column) for known, column in pairs)
    return f" If {meant}, --map {options} makes it {name}."


def _renamings(
    views: Sequence[Mapping[str, Any]], format: Format, shape: Mapping[str, str]
) -> Iterable[dict[str, str]]:
    """What `--map` could say, so that the rows have this shape: names that are alike, or mean the same; at last, of
    columns that hold lists or objects, the first text in them."""
    columns = list(dict.fromkeys(name for view in views for name in view))
    renamed: dict[str, str] = {}
    for name, column in {**shape, **_same(*format.optional)}.items():
        others = [other for other in columns if other not in shape.values() and other not in renamed.values()]
        near = nearest(column, others)
        for synonym in () if near else SYNONYMS.get(name, ()):
            near = near or nearest(synonym, others, cutoff=0.85)
        if column not in columns and near is not None:
            renamed[name] = near
    if not all(column in columns or name in renamed for name, column in shape.items()):
        return
    yield renamed
    first = {column: view[column] for view in reversed(views) for column in renamed.values() if column in view}
    yield {name: ".".join([column, *path_to_text(first[column])]) for name, column in renamed.items()}


def _reads(views: Sequence[Mapping[str, Any]], format: Format, mapping: Mapping[str, str]) -> bool:
    """Whether a row would become an example with this mapping."""
    rows = [Row(view, Origin("", number), "") for number, view in enumerate(views)]
    if not any(_fitting(view, {format.name: format}, mapping) for view in _views(rows, mapping)):
        return False
    try:
        converter = converter_for(rows, "", format.name, mapping, Directions("To:", "From:"))
    except UserError:  # there is more to be told, which this mapping brings out
        return True
    return any(not isinstance(result, Reject) for row in rows for result in converter.records(row))


def _languages(rows: Sequence[Row], source: str, column: str, languages: Sequence[str]) -> dict[str, str]:
    """The columns of the two sides: `translation.en` and `translation.ko`."""
    views = _views(rows, {"translation": column})
    units = [by_language(from_json_text(view["translation"])) for view in views if "translation" in view]
    found = list(dict.fromkeys(name for unit in units if isinstance(unit, Mapping) for name in unit))
    if languages:
        if len(languages) != 2 or languages[0] == languages[1]:
            raise UserError(f"--languages takes two different languages, and got {' '.join(languages)}.")
        for language in languages:
            if not variants(language, dict.fromkeys(found, "")):
                near = nearest(language, found)
                hint = f" Did you mean '{shown_name(near)}'?" if near else ""
                raise UserError(f"{source} has no language '{language}'; languages there are {listed(found)}.{hint}")
    elif len(found) != 2:
        bases = list(dict.fromkeys(_tag(name).split("-")[0] for name in found))
        have_regions = 1 < len(bases) < len(found)
        shown = " ".join(map(shown_name, (bases if have_regions else found)[:2]))
        regions = " (en stands for en-GB and en-US as well)" if have_regions else ""
        raise UserError(
            f"{source} has text in {listed(found)}, and pairs are of two languages. Say which are the first and the"
            f" second side, for example --languages {shown}{regions}."
        )
    first, second = languages or found
    return {"first": f"{column}.{first}", "second": f"{column}.{second}"}


def variants(language: str, unit: Mapping[str, Any]) -> list[str]:
    """What a unit calls a language that it has text in: `en` is `EN` or, where there is none, `en-GB` and `en_US`."""
    asked, filled = _tag(language), [name for name, value in unit.items() if value is not None]
    for fits in (language.__eq__, lambda name: _tag(name) == asked, lambda name: _tag(name).startswith(f"{asked}-")):
        if found := [name for name in filled if fits(name)]:
            return found
    return []


def _tag(language: str) -> str:
    return language.casefold().replace("_", "-")


def by_language(unit: Any) -> Any:
    """`{"language": ["de", "en", "en"], "translation": ["Geh.", "Go.", "Leave."]}`, as datasets keeps translations of
    which a row has several in a language, or not all: {"de": ["Geh."], "en": ["Go.", "Leave."]}."""
    if not isinstance(unit, Mapping) or unit.keys() != {"language", "translation"}:
        return unit
    languages, translations = unit["language"], unit["translation"]
    if not isinstance(languages, list | tuple) or not isinstance(translations, list | tuple):
        return unit
    found: dict[str, list[Any]] = {}
    for language, translation in zip(languages, translations, strict=False):
        found.setdefault(str(language), []).append(translation)
    return found


def _is_conversational(views: Sequence[Mapping[str, Any]]) -> bool:
    """Whether most prompts are lists of turns; a text is one only if it is the JSON of turns."""
    prompts = [view["prompt"] for view in views if view.get("prompt") is not None]
    are_turns = [
        key_of_turns(it) is not None if isinstance(it, str | Mapping) else isinstance(it, list | tuple)
        for it in prompts
    ]
    return 2 * sum(are_turns) > len(prompts)


def _check_settings(directions: Directions, summary_instruction: str) -> None:
    """What is put into every record is checked as what the data puts there."""
    settings = {"forward": directions.forward, "backward": directions.backward}
    given = {name: value for name, value in settings.items() if value} | {"summary_instruction": summary_instruction}
    for name, value in given.items():
        try:
            text(value, name)
        except Fault as fault:
            raise UserError(f"--{name}: {fault.reason}") from None


# Conversion: one function for each format


def _alpaca(row: Row, it: Converter) -> list[Result]:
    fields = row.fields
    instruction = it.text(fields, "instruction")
    input = it.optional_text(fields, "input")
    output = it.text(fields, "output")
    return [Record(instruction=instruction, input=input, output=output, origin=row.origin, **it.mapped(fields))]


def _dolly(row: Row, it: Converter) -> list[Result]:
    fields = row.fields
    return [
        Record(
            instruction=it.text(fields, "instruction"),
            input=it.optional_text(fields, "context"),
            output=it.text(fields, "response"),
            origin=row.origin,
            **{**it.mapped(fields), "category": it.optional_text(fields, "category")},
        )
    ]


def _prompt_completion(row: Row, it: Converter) -> list[Result]:
    """Two strings, or two lists of turns; then the assistant's turns of the completion are learned from."""
    fields = row.fields
    if not it.conversational:
        prompt, completion = it.text(fields, "prompt"), it.text(fields, "completion")
        return [Record(instruction=prompt, input="", output=completion, origin=row.origin, **it.mapped(fields))]
    prompt = turns_of(it.needed(fields, "prompt"), it.column("prompt"), *it.format.turns)
    completion = turns_of(it.needed(fields, "completion"), it.column("completion"), *it.format.turns)
    before = [turn._replace(is_target=False) if turn.role == "assistant" else turn for turn in prompt]
    return _conversation([*before, *completion], it.column("completion"), row, it)


def _messages(row: Row, it: Converter) -> list[Result]:
    """Of OpenAI or ShareGPT, whose one field holds the turns."""
    (field,) = it.format.shapes[0]
    name = it.column(field)
    return _conversation(turns_of(it.needed(row.fields, field), name, *it.format.turns), name, row, it)


def _conversation(turns: Sequence[Turn], name: str, row: Row, it: Converter) -> list[Result]:
    """A record for each answer. A question at the end, to which nobody answers, is a reject of its own."""
    mapped = it.mapped(row.fields)
    system, examples, unanswered = answers(turns, name)
    system = [prompt for prompt in (mapped.pop("system", ""), *system) if prompt]
    parts = len(examples) + (unanswered is not None)
    results: list[Result] = [
        Record(
            instruction=example.instruction,
            input="",
            output=example.output,
            history=example.history,
            system="\n".join(system),
            origin=_part(row.origin, number, parts),
            **mapped,
        )
        for number, example in enumerate(examples, start=1)
    ]
    if unanswered is not None:
        reason = f"'{unanswered.where}' has no answer: here the conversation ends. The turns before it are kept."
        kind = "user turn without an answer"
        results.append(Reject(_part(row.origin, parts, parts), unanswered.where, kind, reason, row.raw))
    return results


def _self_instruct(row: Row, it: Converter) -> list[Result]:
    instruction, mapped = it.text(row.fields, "instruction"), it.mapped(row.fields)
    name = it.column("instances")
    instances = filled_list(it.needed(row.fields, "instances"), name, "no instances")
    results: list[Result] = []
    for number, instance in enumerate(instances):
        origin = _part(row.origin, number + 1, len(instances))
        where, instance = f"{name}[{number}]", from_json_text(instance)
        try:
            input, output = input_of(instance, where), text(inner(instance, "output", where), f"{where}.output")
        except Fault as fault:
            results.append(Reject(origin, fault.field, fault.kind, fault.reason, row.raw))
        else:
            results.append(Record(instruction=instruction, input=input, output=output, origin=origin, **mapped))
    return results


def _natural_instructions(row: Row, it: Converter) -> list[Result]:
    """A task with all its instances, each with one output or several: one record for each output."""
    fields = row.fields
    instruction = joined(it.needed(fields, "Definition"), it.column("Definition"), "\n")
    for name, wanted in ((POSITIVE, it.positive_examples), (NEGATIVE, it.negative_examples)):
        instruction += _task_examples(fields, name, wanted, it)
    categories = it.value(fields, "Categories")
    categories = "" if categories is MISSING or categories is None else categories
    category = joined(categories, it.column("Categories"), ", ", may_be_empty=True)
    mapped = {"category": category, **it.mapped(fields)}
    name = it.column("Instances")
    results: list[Result] = []
    pairs: list[tuple[Any, str, str, Any]] = []
    for number, instance in enumerate(filled_list(it.needed(fields, "Instances"), name, "no instances")):
        where, instance = f"{name}[{number}]", from_json_text(instance)
        try:
            input, outputs = input_of(instance, where), inner(instance, "output", where)
            if isinstance(outputs, list | tuple):
                outputs = list(enumerate(filled_list(outputs, f"{where}.output", "no output")))
                pairs += [(instance, f"{where}.output[{n}]", input, output) for n, output in outputs]
            else:
                pairs.append((instance, f"{where}.output", input, outputs))
        except Fault as fault:
            pairs.append((instance, where, "", fault))
    for number, (instance, where, input, output) in enumerate(pairs, start=1):
        origin = _part(row.origin, number, len(pairs))
        try:
            if isinstance(output, Fault):
                raise output
            record = Record(instruction=instruction, input=input, output=text(output, where), origin=origin, **mapped)
        except Fault as fault:
            raw = json.dumps(instance, ensure_ascii=False, default=str)  # the task as a whole can be megabytes
            results.append(Reject(origin, fault.field, fault.kind, fault.reason, raw))
        else:
            results.append(record)
    return results


def _task_examples(fields: Mapping[str, Any], name: str, wanted: int, it: Converter) -> str:
    """As the prompts of Tk-Instruct have it (Wang et al. 2022): the first few, each with its explanation."""
    column, examples = it.column(name), it.value(fields, name)
    if not wanted or examples is MISSING or not examples:
        return ""
    told = ""
    for number, example in enumerate(filled_list(examples, column, "no examples")[:wanted], start=1):
        where = f"{column}[{number - 1}]"
        input, output = input_of(example, where), joined(inner(example, "output", where), f"{where}.output", ", ")
        told += f"\n\n{name.removesuffix('s')} {number} -\nInput: {input}\nOutput: {output}"
        if explanation := example.get("explanation"):
            told += f"\nExplanation: {text(explanation, f'{where}.explanation')}"
    return told


def _parallel(row: Row, it: Converter) -> list[Result]:
    """A record for each direction, and for each pair where a side has several texts. A pair without directions is an
    instruction and its answer."""
    fields, mapped = row.fields, it.mapped(row.fields)
    there, back = it.directions.forward, it.directions.backward
    firsts, seconds = it.texts(fields, "first"), it.texts(fields, "second")
    if len(firsts) * len(seconds) > MAX_PAIRS:
        reason = f"the row makes {len(firsts) * len(seconds):,} pairs, and {MAX_PAIRS:,} are allowed. Divide it."
        raise Fault(it.column("first"), "too many pairs", reason)
    languages = mapped.pop("languages")
    if it.brings_languages:
        try:
            firsts, seconds = (seconds, firsts) if is_swapped(it.sides, languages) else (firsts, seconds)
        except UserError as error:
            raise Fault(SOURCE_COLUMNS[0], "other languages than its texts", f"{error}") from None
    if back is not None and any(languages) and not all(languages):
        known, missing = ("source", "target") if languages.source else ("target", "source")
        reason = (
            f"its {known} language is {max(languages)}, and nobody has said the {missing} language, which the other"
            f" direction is from. Give --{missing}_language, or a column {missing}_language."
        )
        raise Fault(f"{missing}_language", "one language of two", reason)
    ways: list[tuple[str, str, str, Languages]] = []
    for first, second in product(firsts, seconds):
        if it.directions.are_none:
            ways.append((first, "", second, languages))
        if there is not None:
            ways.append((there, first, second, languages))
        if back is not None:
            ways.append((back, second, first, languages.swapped()))
    return [
        Record(
            instruction=way,
            input=input,
            output=output,
            languages=of_way,
            origin=_part(row.origin, number, len(ways)),
            **mapped,
        )
        for number, (way, input, output, of_way) in enumerate(ways, start=1)
    ]


def _summarisation(row: Row, it: Converter) -> list[Result]:
    fields = row.fields
    document, summary = it.text(fields, "document"), it.text(fields, "summary")
    instruction = it.summary_instruction
    return [Record(instruction=instruction, input=document, output=summary, origin=row.origin, **it.mapped(fields))]


def _tokenised(row: Row, it: Converter) -> list[Result]:
    input_ids = _token_ids(it.needed(row.fields, "input_ids"), it.column("input_ids"))
    labels = _token_ids(it.needed(row.fields, "labels"), it.column("labels"), IGNORE_INDEX)
    if set(labels) == {IGNORE_INDEX}:
        name = it.column("labels")
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


# Parts of rows


def _part(origin: Origin, number: int, parts: int) -> Origin:
    """The origin of one of several examples of a row."""
    return Origin(origin.file, origin.row, number) if parts > 1 else origin


# What makes a row one of a format, where columns alone do not tell


def _looks_like_messages(view: Mapping[str, Any], shape: Mapping[str, str]) -> bool:
    """`conversations` is where ShareGPT has its turns, so there the turns have to say that they are messages."""
    key = key_of_turns(view[shape["messages"]])
    return key == "role" or (key is None and shape["messages"] == "messages")


def _looks_like_sharegpt(view: Mapping[str, Any], shape: Mapping[str, str]) -> bool:
    key = key_of_turns(view[shape["conversations"]])
    return key == "from" or (key is None and shape["conversations"] == "conversations")


def _looks_like_parallel(view: Mapping[str, Any], shape: Mapping[str, str]) -> bool:
    return "translation" not in shape or isinstance(from_json_text(view["translation"]), Mapping)


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
            _alpaca,
            (_same("instruction", "output"),),
            optional=("input",),
        ),
        Format(
            "dolly",
            "the same under other names, with a category",
            '{"instruction": "Who?", "context": "Ann wrote it.", "response": "Ann.", "category": "closed_qa"}',
            _dolly,
            (_same("instruction", "context", "response"),),
            optional=("category",),
        ),
        Format(
            "prompt_completion",
            "a prompt and its completion, both strings, or both lists of turns as in messages",
            '{"prompt": "The sky is", "completion": " blue."}',
            _prompt_completion,
            (_same("prompt", "completion"),),
            turns=("role", "content", ROLES),
        ),
        Format(
            "messages",
            "conversations as OpenAI has them; every assistant turn is an example",
            '{"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}',
            _messages,
            (_same("messages"), {"messages": "conversations"}),
            turns=("role", "content", ROLES),
            looks=_looks_like_messages,
        ),
        Format(
            "sharegpt",
            "conversations as ShareGPT has them; every gpt turn is an example",
            '{"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]}',
            _messages,
            (_same("conversations"), {"conversations": "messages"}),
            turns=("from", "value", SHAREGPT_ROLES),
            looks=_looks_like_sharegpt,
        ),
        Format(
            "natural_instructions",
            "a task file of Super-NaturalInstructions; every output of every instance is an example",
            '{"Definition": ["Add."], "Categories": ["Maths"], "Positive Examples": [], "Negative Examples": [],'
            ' "Instances": [{"id": "1", "input": "1 + 1", "output": ["2", "two"]}]}',
            _natural_instructions,
            (_same("Definition", "Instances"),),
            optional=("Categories", POSITIVE, NEGATIVE),
            inside={"Instances": INSTANCE, POSITIVE: EXAMPLE, NEGATIVE: EXAMPLE},
        ),
        Format(
            "self_instruct",
            "an instruction with several instances; each is an example",
            '{"instruction": "Add.", "instances": [{"input": "1 + 1", "output": "2"}]}',
            _self_instruct,
            (_same("instruction", "instances"),),
            inside={"instances": INSTANCE},
        ),
        Format(
            "parallel",
            "parallel text; each direction that has an instruction (--forward, --backward) is an example",
            '{"translation": {"en": "Go.", "ko": "가."}}',
            _parallel,
            (_same("first", "second"), {"first": "source", "second": "target"}, _same("translation")),
            looks=_looks_like_parallel,
        ),
        Format(
            "summarisation",
            "a text and its summary",
            '{"document": "It rained all day.", "summary": "Rain."}',
            _summarisation,
            tuple(
                {"document": document, "summary": summary}
                for document, summary in product(DOCUMENT_NAMES, SUMMARY_NAMES)
            ),
        ),
        Format(
            "tokenised",
            "token ids; neither the template nor the tokenizer touches them",
            '{"input_ids": [12, 7, 1], "labels": [31, 40, 1]}',
            _tokenised,
            (_same("input_ids", "labels"),),
        ),
    )
}
