"""Rows that hold one text in several languages: which languages there are, and which of them are the two sides.

{"translation": {"en": "Go.", "de-DE": "Geh.", "de-AT": "Geh!"}}       variants("de", unit) → ["de-DE", "de-AT"]
{"translation": {"language": ["en", "de"], "translation": ["Go.", "Geh."]}}          as `datasets` stores it
{"en": "Go.", "de": "Geh."}                                            a table with a column for each language
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diptych.data_prep.command_line.errors import UserError, excerpt, nearest
from diptych.data_prep.rows.language_names import is_same_language, names_language
from diptych.data_prep.rows.records import Languages, Row
from diptych.data_prep.rows.valid_text import Fault, from_json_text, listed

UNIT_KEYS = {"language", "translation"}


def variants(language: str, unit: Mapping[str, Any]) -> list[str]:
    """What a unit calls a language that it has text in: `en` is `EN` or, if there is none, `en-GB` and `en_US`."""
    asked, filled = _tag(language), [name for name, value in unit.items() if value is not None]
    for fits in (language.__eq__, lambda name: _tag(name) == asked, lambda name: _tag(name).startswith(f"{asked}-")):
        if found := [name for name in filled if fits(name)]:
            return found
    return []


def _tag(language: str) -> str:
    return language.casefold().replace("_", "-")


def by_language(unit: Any) -> Any:
    """`{"language": ["de", "en", "en"], "translation": ["Geh.", "Go.", "Leave."]}`, as datasets stores translations if
    a row has several in a language, or not all: {"de": ["Geh."], "en": ["Go.", "Leave."]}."""
    if not isinstance(unit, Mapping) or unit.keys() != UNIT_KEYS:
        return unit
    languages, translations = unit["language"], unit["translation"]
    if not isinstance(languages, list | tuple) or not isinstance(translations, list | tuple):
        return unit
    found: dict[str, list[Any]] = {}
    for language, translation in zip(languages, translations, strict=False):
        found.setdefault(str(language), []).append(translation)
    return found


def in_language(written: Any, column: str, language: str) -> Any:
    """The text in a language, or several, that the value of a translation column holds; None if it holds no unit.
    Fault: it has no text in this language, or languages and texts differ in number."""
    written = from_json_text(written)
    unit = by_language(written)
    if not isinstance(unit, Mapping):
        return None
    if unit is not written and len(written["language"]) != len(written["translation"]):
        kind = "languages and translations differ in number"
        raise Fault(column, kind, f"'{column}' has no translation for each language, or no language for each.")
    found = variants(language, unit)
    if not found and language not in unit:
        reason = f"'{column}' has no text in '{language}'; it has some in {listed(unit) or 'no language'}."
        raise Fault(f"{column}.{language}", f"missing field '{column}.{language}'", reason, of_shape=True)
    if len(found) < 2:
        return unit[found[0] if found else language]
    values = [unit[name] for name in found]
    return [text for value in values for text in (value if isinstance(value, list | tuple) else [value])]


def sides_of_units(units: Iterable[Any], source: str, column: str, languages: Sequence[str]) -> dict[str, str]:
    """The columns of the two sides: `translation.en` and `translation.ko`. `languages` are those that were asked for.
    UserError where there are more than two, and none were asked for; or one that was is not there."""
    units = map(by_language, map(from_json_text, units))
    found = list(dict.fromkeys(name for unit in units if isinstance(unit, Mapping) for name in unit))
    if languages:
        if len(languages) != 2 or languages[0] == languages[1]:
            raise UserError(f"--languages takes two different languages, and got {' '.join(languages)}.")
        for language in languages:
            if not variants(language, dict.fromkeys(found, "")):
                near = nearest(language, found)
                hint = f" Did you mean '{excerpt(near)}'?" if near else ""
                raise UserError(f"{source} has no language '{language}'; languages there are {listed(found)}.{hint}")
    elif len(found) != 2:
        bases = list(dict.fromkeys(_tag(name).split("-")[0] for name in found))
        have_regions = 1 < len(bases) < len(found)
        shown = " ".join(map(excerpt, (bases if have_regions else found)[:2]))
        regions = " (en stands for en-GB and en-US as well)" if have_regions else ""
        raise UserError(
            f"{source} has text in {listed(found)}, and pairs are of two languages. Say which are the first and the"
            f" second side, for example --languages {shown}{regions}."
        )
    first, second = languages or found
    return {"first": f"{column}.{first}", "second": f"{column}.{second}"}


def language_columns(rows: Iterable[Row], source: str, asked: Languages) -> list[str]:
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


def languages_of_columns(columns: Mapping[str, str]) -> Languages:
    """What the columns of the two sides are called, without the column that they are in: `translation.en` is `en`."""
    return Languages(*(columns.get(side, "").rpartition(".")[2] for side in ("first", "second")))
