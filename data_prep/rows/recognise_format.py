"""Which format the rows of a source have, by its first ones, and what makes records of all of them.

    converter = converter_for(first_rows, "rows.jsonl")
    converter.records(row)  → [Record(instruction="Add.", input="1 + 1", output="2", …)], or [Reject(…)]

What a person has to change before a row can be read is an error here: columns that are not there, formats that may be
two, missing directions. Names are suggested, never guessed.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from diptych.data_prep.command_line.errors import UserError, excerpt, nearest
from diptych.data_prep.rows.conversations import key_of_turns
from diptych.data_prep.rows.convert_rows import (
    LANGUAGE_COLUMNS,
    MISSING,
    RECORD_FIELDS,
    SUMMARY_INSTRUCTION,
    Converter,
    Directions,
    value_at,
)
from diptych.data_prep.rows.format_table import FORMATS, PROMPTS, Format, fitting_formats
from diptych.data_prep.rows.judged_answers import is_turns
from diptych.data_prep.rows.language_names import is_swapped, names_language
from diptych.data_prep.rows.records import Languages, Origin, Reject, Row
from diptych.data_prep.rows.translations import language_columns, languages_of_columns, sides_of_units
from diptych.data_prep.rows.valid_text import Fault, listed, mapped, path_to_text, text, unparsed

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
"""Names that may mean the same, for suggestions."""

COMPARED = 200
"""So many columns are compared with the names that are known; of a table with more, a suggestion would be chance."""

View = dict[str, Any]
"""A row with its columns renamed as --map says."""

NO_DIRECTIONS = Directions()


def converter_for(
    rows: Sequence[Row],
    source: str,
    name: str | None = None,
    mapping: Mapping[str, str] | None = None,
    directions: Directions = NO_DIRECTIONS,
    languages: Sequence[str] = (),
    summary_instruction: str = SUMMARY_INSTRUCTION,
    positive_examples: int = 0,
    negative_examples: int = 0,
    languages_of_name: Sequence[str] = (),
    rated_pairs: str = "best_worst",
    rated_margin: float = 0,
) -> Converter:
    """What turns all rows of a source into records, decided by its first ones.

    `languages_of_name` are those of the two sides that the source's name says. The data says which side is in which
    language: if `directions` have the same two in the other order, the sides are swapped; other ones are refused.

    Raises:
        UserError: the format, a column, a language or a direction is not clear.
    """
    _check_instructions(directions, summary_instruction)
    mapping = dict(mapping or {})
    sides = Languages(*languages_of_name)
    views = _views(rows, mapping)
    if not languages and "translation" not in mapping and not any(map(fitting_formats, views)):
        languages = language_columns(rows, source, directions.languages)
    if len(languages) == 2 and mapping.keys().isdisjoint(("first", "second", "translation")):
        if {name for row in rows for name in row.fields}.issuperset(languages):  # a column for each language
            mapping |= zip(("first", "second"), languages, strict=True)
            sides, views = Languages(*languages), _views(rows, mapping)
    format, shape = _recognise(rows, source, mapping, name)
    spelled = {name: mapping.get(column, column) for name, column in shape.items() if name != column}
    if "translation" in shape:
        units = [view["translation"] for view in views if "translation" in view]
        spelled = sides_of_units(units, source, mapping.pop("translation", "translation"), languages)
        sides = languages_of_columns(spelled)
    columns = {**spelled, **mapping}
    is_back = False
    if format.name == "parallel":
        named_sides = languages_of_columns(columns)
        if not any(sides) and all(map(names_language, named_sides)):
            sides = named_sides
        if directions.are_none and directions.languages.direction:
            directions = replace(directions, forward="")
        if columns.get("first") != "source":
            need_direction(source, directions)
        try:
            is_back = is_swapped(sides, directions.languages)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
        if is_back:
            sides = sides.swapped()
            columns |= {"first": columns.get("second", "second"), "second": columns.get("first", "first")}
        directions = replace(directions, languages=directions.languages.filled_from(sides))
    if format.name == "edits":
        directions = replace(directions, backward=None)
        if directions.forward is None:
            need_forward(source, directions)
            directions = replace(directions, forward="")
    return Converter(
        format,
        columns,
        directions,
        conversational=bool(format.turns) and _has_turns(views, format),
        prompt_field=next((name for name in shape if name in PROMPTS), "") if format.preferences else "",
        summary_instruction=summary_instruction,
        positive_examples=positive_examples,
        negative_examples=negative_examples,
        rated_pairs=rated_pairs,
        rated_margin=rated_margin,
        was_given=name is not None,
        has_language_columns=any(not view.keys().isdisjoint(LANGUAGE_COLUMNS) for view in views),
        sides=sides,
        is_swapped=is_back,
    )


def _check_instructions(directions: Directions, summary_instruction: str) -> None:
    """Settings that stand in every record are checked like the texts of the data."""
    given = {"forward": directions.forward, "backward": directions.backward}
    given = {name: value for name, value in given.items() if value} | {"summary_instruction": summary_instruction}
    for name, value in given.items():
        try:
            text(value, name)
        except Fault as fault:
            raise UserError(f"--{name}: {fault.reason}") from None


def need_direction(source: str, directions: Directions) -> None:
    if directions.are_none:
        raise UserError(
            f"{source} is parallel text, and no direction has an instruction. Give one or both, for example"
            " --forward 'Translate English to Korean:' --backward 'Translate Korean to English:'. For models with"
            " language codes, --forward '' --backward '' give rows without instructions."
        )


def need_forward(source: str, directions: Directions) -> None:
    if not directions.languages.direction:
        raise UserError(
            f"{source} is translations with their corrections, and they have no instruction. Give one, for example"
            " --forward 'Translate English to Korean:'. For models with language codes, --forward '' gives rows"
            " without one."
        )


def _has_turns(views: Sequence[View], format: Format) -> bool:
    """Whether most prompts, or answers that were judged, are lists of turns; a text is one only if it spells turns."""
    if format.name in ("messages", "sharegpt"):
        return True
    if not format.preferences:
        return _are_mostly(views, "prompt", _is_prompt_of_turns)
    return any(_are_mostly(views, name, is_turns) for name in (*PROMPTS, "chosen", "completion"))


def _are_mostly(views: Sequence[View], name: str, is_it: Callable[[Any], bool]) -> bool:
    values = [view[name] for view in views if view.get(name) is not None]
    return 2 * sum(map(is_it, values)) > len(values)


def _is_prompt_of_turns(value: Any) -> bool:
    return key_of_turns(value) is not None if isinstance(value, str | Mapping) else isinstance(value, list | tuple)


# What a person names


def named(name: str) -> Format:
    """The format that --format names."""
    if name in FORMATS:
        return FORMATS[name]
    near = nearest(name, FORMATS)
    hint = f" Did you mean '{near}'?" if near else ""
    raise UserError(f"format '{name}' is not known. Known are {', '.join(FORMATS)}.{hint}")


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
    _check_mapped_names(mapping, FORMATS)
    return mapping


def _check_mapped_names(mapping: Mapping[str, str], formats: Mapping[str, Format]) -> None:
    known = list(dict.fromkeys([*(name for format in formats.values() for name in format.fields), *RECORD_FIELDS]))
    for name, column in mapping.items():
        if name not in known:
            near = nearest(name, known)
            hint = f"Did you mean '{near}={column}'?" if near else f"Known are {', '.join(known)}."
            swapped = " The known name stands first, the data's column second." if column in known else ""
            where = f"format {next(iter(formats))}" if len(formats) == 1 else "any format"
            raise UserError(f"--map {name}={column}: '{name}' is no field of {where}. {hint}{swapped}")


def _columns_of(rows: Sequence[Row]) -> str:
    return listed(dict.fromkeys(name for row in rows for name in row.fields)) or "none"


# Recognition


def _recognise(
    rows: Sequence[Row], source: str, mapping: Mapping[str, str], name: str | None
) -> tuple[Format, Mapping[str, str]]:
    """The format, and which of its spellings. Each row votes for all that it fits. The winner has more votes than any
    other, and more than half of the rows that fit something, since a few rows may be faulty, or of another kind."""
    rows = [row for row in rows if isinstance(row, Row)]
    if not rows:
        raise UserError(f"{source}: there is no row by which to recognise a format.")
    candidates = FORMATS if name is None else {name: named(name)}
    _check_mapped_names(mapping, candidates)
    for mapped_name, column in mapping.items():
        if all(value_at(row.fields, column) is MISSING for row in rows):
            held = [(path, value) for row in rows for path, value in row.fields.items()]
            inside = (f"{path}.{step}" for path, value in held if isinstance(value, Mapping) for step in value)
            near = nearest(column, dict.fromkeys([*(path for path, _ in held), *inside]))
            hint = f" Did you mean '{mapped_name}={excerpt(near)}'?" if near else ""
            raise UserError(
                f"{source}: --map {mapped_name}={column}: there is no column '{column}' in its first rows; columns"
                f" there are {_columns_of(rows)}.{hint}"
            )
    views = _views(rows, mapping)
    filled = [{column: value for column, value in view.items() if value is not None} for view in views]
    for looked_at in (filled, views):  # a table may have columns for two formats, of which one is null throughout
        fitting = [found for view in looked_at if (found := fitting_formats(view, candidates, mapping))]
        if fitting:
            return _winner(fitting, source, name is not None)
    needs = "; ".join(f"{name}: {format.needs}" for name, format in candidates.items())
    what = "no known format" if name is None else f"not {name}, as --format says"
    advice = (unparsed(value, f"'{excerpt(column)}'", column) for column, value in views[0].items())
    raise UserError(
        f"{source}: {what}, to judge by its first rows. Columns there are {_columns_of(rows)}."
        f"{next(filter(None, advice), None) or _suggestion(views, candidates)} What the columns have to be: {needs}."
    )


def _winner(
    fitting: Sequence[Sequence[tuple[str, int]]], source: str, was_given: bool
) -> tuple[Format, Mapping[str, str]]:
    votes = Counter(candidate for found in fitting for candidate in found).most_common()
    ((best, shape), count), *others = votes
    if 2 * count > len(fitting) and all(number < count for _, number in others):
        return FORMATS[best], FORMATS[best].shapes[shape]
    names = list(dict.fromkeys(name for found in fitting for name, _ in found))
    shown = ", ".join(
        f"{name} ({', '.join(FORMATS[name].shapes[shape].values())}: {number:,} of {len(fitting):,} rows)"
        for (name, shape), number in votes
    )
    if was_given or len(names) == 1:
        columns = FORMATS[best].shapes[shape].items()
        remedy = "--map decides, for example --map " + " ".join(mapped(name, column) for name, column in columns)
    else:
        remedy = f"--format NAME decides, for example --format {names[0]}"
    raise UserError(f"{source} fits more than one format, to judge by its first rows: {shown}. {remedy}.")


def _views(rows: Iterable[Row], mapping: Mapping[str, str]) -> list[View]:
    views = []
    for row in rows:
        if isinstance(row, Row):
            values = {name: value_at(row.fields, column) for name, column in mapping.items()}
            renamed = {*mapping, *mapping.values()}
            view = {name: value for name, value in row.fields.items() if name not in renamed}
            views.append(view | {name: value for name, value in values.items() if value is not MISSING})
    return views


# Suggestions


def _suggestion(views: Sequence[View], candidates: Mapping[str, Format]) -> str:
    """The fewest columns to rename, so that the rows have a format and are read."""
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
    pairs = [(known, excerpt(column)) for known, column in renamed.items()]
    meant = ", ".join(f"'{column}' is the {known}" for known, column in pairs)
    options = " ".join(mapped(known, column) for known, column in pairs)
    return f" If {meant}, --map {options} makes it {name}."


def _renamings(views: Sequence[View], format: Format, shape: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """What `--map` could say, so that the rows have this shape: names that are alike, or mean the same; then, of
    columns that hold lists or objects, the first text in them."""
    columns = list(dict.fromkeys(name for view in views for name in view))[:COMPARED]
    renamed: dict[str, str] = {}
    for name, column in {**shape, **{name: name for name in format.optional}}.items():
        others = [other for other in columns if other not in shape.values() and other not in renamed.values()]
        near = nearest(column, others) or next(
            (near for synonym in SYNONYMS.get(name, ()) if (near := nearest(synonym, others, cutoff=0.85))), None
        )
        if column not in columns and near is not None:
            renamed[name] = near
    if all(column in columns or name in renamed for name, column in shape.items()):
        yield renamed
        first = {column: view[column] for view in reversed(views) for column in renamed.values() if column in view}
        yield {name: ".".join([column, *path_to_text(first[column])]) for name, column in renamed.items()}


def _reads(views: Sequence[View], format: Format, mapping: Mapping[str, str]) -> bool:
    """Whether a row would become an example with this mapping."""
    rows = [Row(view, Origin("", number), "") for number, view in enumerate(views)]
    if not any(fitting_formats(view, {format.name: format}, mapping) for view in _views(rows, mapping)):
        return False
    try:
        converter = converter_for(rows, "", format.name, mapping, Directions("To:", "From:"))
    except UserError:  # the error is about something else, which comes after this mapping
        return True
    return any(not isinstance(result, Reject) for row in rows for result in converter.records(row))
