"""Command lines and YAML recipes as one settings dataclass; its help; and what is wrong with them, in one message.

    parse(PrepareSettings, "diptych prepare", ["--config", "r.yaml", "--data", "a.json", "b.json", "--strict"])
    → PrepareSettings(data=["a.json", "b.json"], strict=True, …)       the command line goes before the file

The fields' docstrings are the text of --help. jsonargparse merges files and options into values, but its messages are
about Python's types. So files and options are compared with the fields here first, and a UserError names the file or
the option, what was found, what is expected, and the nearest name:

    --validation_fraction is 'abc'; it has to be a number.
    r.yaml: there is no setting mixture.temprature. Did you mean temperature? Choose from: temperature, cap, weights, …
    there is no option --lr. Here it is --learning_rate: Peak learning rate.

Dashes in an option are underscores: --learning-rate is --learning_rate.
"""

import json
import math
import shutil
import sys
import textwrap
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from diptych.data_prep.command_line.bounded_yaml import read_yaml, text_of
from diptych.data_prep.command_line.errors import UserError, check_encoding, excerpt, nearest, nearest_file
from diptych.data_prep.command_line.option_synonyms import other_name
from diptych.data_prep.command_line.run_command import say_if_pipe, with_wrong_places

Settings = TypeVar("Settings")

NAMES_SHOWN = 12
HELP_COLUMNS = 100
ANSWERS = ("--help", "--print_config")
"""Options that print something and end the command."""
CONFIG = "--config"
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list"}
PLACEHOLDERS = {int: "NUMBER", float: "NUMBER", bool: "true|false", str: "TEXT", dict: "{NAME: VALUE, ...}"}
OTHER_OPTIONS = {
    "--config FILE": "YAML file with any of these settings, as `name: value`; the command line has priority.",
    "--print_config": "Print all settings as YAML, and end.",
    "--help": "Print this, and end.",
}


def parse(
    settings_class: type[Settings],
    command: str,
    argv: Sequence[str],
    usage: str | None = None,
    sections: Mapping[str, str] | None = None,
) -> Settings:
    """A field without a default is a positional argument. Lists take words up to the next option (`--data a b`), and
    `true` may be left out (`--strict`). `sections` are the headings of --help, each by the field that it stands above.

    Raises UserError for what cannot be parsed, SystemExit(0) after --help and --print_config.
    """
    if "-h" in argv or "--help" in argv:
        print(help_text(settings_class, command, usage, sections))
        raise SystemExit(0)
    for word in argv:
        check_encoding(word)
    words, recipes = [], []
    left = iter(_spell_out(settings_class, [_with_underscores(word, settings_class) for word in argv]))
    for word in left:
        option, equals, value = word.partition("=")
        if option != CONFIG:
            words.append(word)
            continue
        value = value if equals else next(left, "")
        if not value or value.startswith("--"):
            raise UserError(f"{CONFIG} has no value; it has to be a YAML file.")
        recipes.append(value)
    contents = [_read_recipe(name, settings_class) for name in recipes]
    given = given_options(words)
    for content in reversed(contents):  # `--max_steps 100` drops a recipe's `epochs: 3`, and so does a later recipe
        for other in (other for name in given for other in instead_of(settings_class, name) if other not in given):
            content.pop(other, None)
        given = given | {name for name, value in content.items() if value is not None}
    if not any(word.split("=")[0] in ANSWERS for word in words):
        _check_words(words, settings_class, command, {name for content in contents for name in content})
    return _instantiate(settings_class, command, contents, words)


def _check_not_empty(settings_class: type, contents: Sequence[Mapping[str, Any]], words: Sequence[str]) -> None:
    """UserError for a setting with the metadata `not_empty` that was given as "", as by an empty variable of a shell:
    it would count as left out."""
    for name in (it.name for it in fields(settings_class) if it.metadata.get("not_empty")):
        pairs = zip(words, words[1:], strict=False)
        is_empty = f"--{name}=" in words or (f"--{name}", "") in pairs
        if is_empty or any(content.get(name) == "" for content in contents):
            raise UserError(f"{name} is empty. Give it a value, or leave it out.")


def from_values(settings_class: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Settings of values by name, as a recipe has them: the same checks, and a text where a list is due is a list.

    Raises UserError for a name or a value that does not fit.
    """
    content = _checked(dict(values), settings_class)
    due = [setting.name for setting in fields(settings_class) if _is_positional(setting)]
    if missing := [name for name in due if name not in content]:
        raise UserError(f"no {missing[0]} is given.")
    return _instantiate(settings_class, settings_class.__name__, [content], [])


def _instantiate(
    settings_class: type[Settings], command: str, contents: Sequence[Mapping[str, Any]], words: Sequence[str]
) -> Settings:
    """Recipes, and the words of a command line over them, as settings."""
    import jsonargparse  # here, so that --help need not wait for it
    import yaml

    _check_not_empty(settings_class, contents, words)
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    jsonargparse.set_loader("bounded", read_yaml, exceptions=(yaml.YAMLError,))
    parser = jsonargparse.ArgumentParser(prog=command, exit_on_error=False, parser_mode="bounded")
    parser.add_argument(CONFIG, action="config")
    parser.add_class_arguments(settings_class, as_positional=True)
    first = [f"{CONFIG}={json.dumps(content)}" for content in contents if content]
    try:
        found = parser.instantiate(parser.parse_args([*first, *words]))
        values = {setting.name: found[setting.name] for setting in fields(settings_class)}
        if not 0 <= values.get("seed", 0) < 2**32:  # as numpy has them
            raise UserError(f"seed is {excerpt(values['seed'], 40)}; it has to be a number from 0 to {2**32 - 1}.")
        try:
            settings = settings_class(**values)
            check_numbers(settings)
            return settings
        except UserError as error:
            raise with_wrong_places(error, settings_class, values) from None
    except UserError:
        raise
    except (ArgumentError, ValueError) as error:
        behind: BaseException | None = error
        while behind is not None and not isinstance(behind, UserError):  # which a dataclass raised
            behind = behind.__cause__ or behind.__context__
        raise behind or UserError(f"{excerpt(error, 300).rstrip('.')}. See --help.") from None


def check_numbers(
    settings: Any, ranges: Mapping[str, tuple[Callable[[float], bool], str]] | None = None, before: str = ""
) -> None:
    """UserError for a number that is not finite, that is outside of its range, or, if it is in no range, below 0.

    check_numbers(recipe, {"above 0": (lambda value: value > 0, "learning_rate epsilon")})
    """
    allowed = {name: (words, fits) for words, (fits, names) in (ranges or {}).items() for name in names.split()}
    for setting in fields(settings):
        name, value = setting.name, getattr(settings, setting.name)
        if is_dataclass(value):
            check_numbers(value, None, f"{before}{name}.")
        words, fits = allowed.get(name, ("0 or more", lambda number: number >= 0))
        for number in value if isinstance(value, tuple) else [value]:
            is_finite = not isinstance(number, float) or math.isfinite(number)
            if isinstance(number, int | float) and not (is_finite and fits(number)):
                raise UserError(f"{before}{name} is {value}; it must be {words}{'' if is_finite else ', and finite'}.")


def choose_from(name: str, known: Sequence[str]) -> str:
    """`Did you mean …? Choose from: …`, the end of a message about a name that is not known."""
    near = nearest(name, known)
    names = f"Choose from: {', '.join(known)}." if len(known) <= NAMES_SHOWN else "--help lists them all."
    return f"{f'Did you mean {near}? ' if near else ''}{names}"


def instead_of(settings_class: type, name: str) -> Sequence[str]:
    """The settings to which `name` is an alternative (metadata `instead_of`): epochs for max_steps."""
    return next((it.metadata.get("instead_of", ()) for it in fields(settings_class) if it.name == name), ())


def given_options(words: Sequence[str]) -> set[str]:
    """Names of the settings that a command line has."""
    options = (word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--"))
    return {option.replace("-", "_").split(".")[0] for option in options}


# The command line


def _with_underscores(word: str, settings_class: type) -> str:
    """`--learning-rate=1e-4` → `--learning_rate=1e-4`; names that are no settings, as in `--weights.a-b`, stay."""
    if not word.startswith("--"):
        return word
    option, equals, value = word.partition("=")
    parts, inner = option[2:].split("."), settings_class
    for place, part in enumerate(parts):
        if inner is None:
            break
        parts[place] = part.replace("-", "_")
        inner = _settings_in(get_type_hints(inner).get(parts[place]))
    return f"--{'.'.join(parts)}{equals}{value}"


def _spell_out(settings_class: type, argv: Sequence[str]) -> list[str]:
    """What people type, as jsonargparse reads it: `--data a b --strict` → `--strict=true --data=["a", "b"]`."""
    hints = get_type_hints(settings_class)
    lists: dict[str, list[Any]] = {}
    others, entries, kind = [], None, str
    for position, word in enumerate(argv):
        option, equals, value = word.partition("=")
        hint = hints.get(option[2:]) if option.startswith("--") else None
        if inner := [get_args(part)[0] for part in _kinds(hint) if get_origin(part) is list]:
            kind, entries = inner[0], lists.setdefault(option, [])
            entries += [value if kind is str else _read(value)] if equals else []
        elif word.startswith("--"):
            entries = None
            following = argv[position + 1] if position + 1 < len(argv) else "--"
            has_value = isinstance(_read(following), bool) if hint is bool else not _is_option(following)
            is_bare = bool in (hint, *get_args(hint)) and not equals and not has_value
            others.append(f"{word}=true" if is_bare else word)
        elif entries is None:
            others.append(word)
        else:
            entries.append(word if kind is str else _read(word))
    for option, entries in lists.items():
        is_list = len(entries) == 1 and isinstance(entries[0], list)  # `--layers '[0, 1]'` and not `--layers 0 1`
        others.append(f"{option}={json.dumps(entries[0] if is_list else entries)}")
    return others


def _check_words(words: Sequence[str], settings_class: type, command: str, in_recipes: set[str]) -> None:
    due = [setting.name for setting in fields(settings_class) if _is_positional(setting)]
    usage = f"{command} {' '.join(name.upper() for name in due)} …"
    given: list[str] = []
    faults: list[str] = []
    left = iter(enumerate(words))
    for place, word in left:
        if not word.startswith("--"):
            given.append(word)
            continue
        option, equals, value = word.partition("=")
        if not equals:
            value = words[place + 1] if place + 1 < len(words) else None
            if value is not None and not _is_option(value):
                next(left)
        try:
            hint = _hint_of(option, settings_class)
        except UserError as error:
            faults.append(str(error))
            continue
        if option[2:] in due:
            raise UserError(f"{option} is given without its name: {usage}")
        if value is None or (not equals and _is_option(value)):
            is_value = value is not None and not value.startswith("--")
            more = f" A value that begins with a dash is written {option}={value}" if is_value else ""
            raise UserError(f"{option} has no value; it {_expected(hint)}.{more}")
        if fault := _fault(option, value, hint):
            faults.append(fault)
    if faults:
        raise UserError(*faults)
    if len(given) > len(due):
        raise UserError(f"{given[len(due)]!r} belongs to no option. See --help.")
    if missing := [name for name in due[len(given) :] if name not in in_recipes]:
        raise UserError(f"no {missing[0]} is given: {usage}")


def _is_option(word: str) -> bool:
    """As for argparse: `-x` and `--seed` are options; a dash alone, `-1` and `- x` are values."""
    return word.startswith("-") and word != "-" and " " not in word and not isinstance(_read(word), int | float)


def _hint_of(option: str, settings_class: type) -> Any:
    """The type of an option's value; `--mixture.cap` is a setting in a setting."""
    hint: Any = settings_class
    path = option.removeprefix("--").removesuffix("+").split(".")
    for depth, name in enumerate(path):
        if get_origin(hint) is dict:  # any name may stand there
            return get_args(hint)[1]
        inner = _settings_in(hint)
        hints = get_type_hints(inner) if inner else {}
        if name not in hints:
            before = "--" + "".join(f"{part}." for part in path[:depth])
            positional = {setting.name for setting in fields(inner) if _is_positional(setting)} if inner else ()
            known = [before + known for known in hints if known not in positional] or [before.rstrip(".")]
            advice = inner and other_name(name, _docs(inner), before) or choose_from(before + name, known)
            raise UserError(f"there is no option {option}. {advice}")
        hint = hints[name]
    return hint


# Recipes


def _read_recipe(name: str, settings_class: type) -> dict[str, Any]:
    """The values of a YAML file, each of which fits its setting; one text where a list is due is a list of one."""
    import yaml

    path = Path(name).expanduser()
    say_if_pipe(str(path), CONFIG)
    try:
        text = text_of(path)
        content = read_yaml(text)
        if isinstance(content, str):  # a lone `seed:`, which is a text on a command line only
            content = read_yaml(f"{text}\n#")
    except FileNotFoundError:
        near = nearest_file(path)
        hint = f" Did you mean {near}?" if near else ""
        raise UserError(f"{CONFIG} {name}: there is no such file.{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{CONFIG} {name} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(
            f"{name}{where}: no YAML ({getattr(error, 'problem', excerpt(error))}). Correct it there."
        ) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{name} holds {_shown(content)}; settings are due, one a line, as in `seed: 1`.")
    return _checked(content, settings_class, f"{name}: ")


def _checked(content: dict[str, Any], settings_class: type, before: str = "") -> dict[str, Any]:
    """Values by name, each of which fits its setting. One text where a list is due is a list of one;
    metadata `written` turns the other forms of a setting into its own."""
    hints = get_type_hints(settings_class)
    other_forms = {setting.name: setting.metadata.get("written") for setting in fields(settings_class)}
    for key, value in content.items():
        if isinstance(value, str) and get_origin(hints.get(key)) is list:
            content[key] = [value]
        elif written := other_forms.get(key):
            content[key] = written(value)
    each = (_fault_inside("", {key: value}, settings_class) for key, value in content.items())
    if faults := [fault for fault in each if fault]:
        raise UserError(before + faults[0], *faults[1:])
    return content


# What is wrong with a value


def _fault(where: str, value: Any, hint: Any) -> str | None:
    """What is wrong with a value, or with the first part of it that does not fit; "0.1" fits where 0.1 does."""
    found = value if str in _kinds(hint) else _read(value)
    if isinstance(found, float) and not math.isfinite(found):
        return f"{where} is {_shown(value)}; it has to be a finite number."
    for kind in _kinds(hint):
        origin, inner = get_origin(kind), get_args(kind)
        if kind is Any:
            origin, inner = type(found), (Any, Any)
        if is_dataclass(kind) and isinstance(found, dict):
            return _fault_inside(f"{where}.", found, kind)
        if origin is dict and isinstance(found, dict):
            parts = ((f"{where}.{key}", part, inner[1]) for key, part in found.items())
        elif isinstance(found, list) and (origin is list or origin is tuple and len(found) == len(inner)):
            each = zip(found, inner if origin is tuple else inner[:1] * len(found), strict=True)
            parts = ((f"{where}, entry {place},", *part) for place, part in enumerate(each, start=1))
        else:
            continue
        return next((fault for part in parts if (fault := _fault(*part))), None)
    if any(_fits(value, kind) for kind in _kinds(hint)):
        return None
    hints, advice = (hint, *get_args(hint)), ""
    choices = [choice for part in hints if get_origin(part) is Literal for choice in get_args(part)]
    if str in hints and not isinstance(value, str | list | dict | None):
        advice = " Put it in quotes."
    elif near := nearest(value, choices) if isinstance(value, str) else None:
        advice = f" Did you mean {near}?"
    return f"{where} is {_shown(value)}; it {_expected(hint)}.{advice}"


def _kinds(hint: Any) -> tuple[Any, ...]:
    """`int | None` → int, None."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _fault_inside(where: str, values: dict[Any, Any], settings_class: type) -> str | None:
    hints = get_type_hints(settings_class)
    for key, value in values.items():
        name, _, rest = str(key).partition(".")
        if name not in hints:
            advice = other_name(str(key), _docs(settings_class)) or choose_from(str(key), list(hints))
            return f"there is no setting {where}{key}. {advice}"
        if fault := _fault(f"{where}{name}", {rest: value} if rest else value, hints[name]):
            return fault
    return None


def _fits(value: Any, kind: Any) -> bool:
    """Whether it fits a kind that holds no others."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in parts
    if kind is Any or kind is str:
        return kind is Any or isinstance(value, str)
    value = _read(value)
    if kind in (int, float):
        is_number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        return is_number and abs(value) <= sys.float_info.max
    return isinstance(value, kind) if kind in (bool, NoneType) else False


def _read(value: Any) -> Any:
    """What a text says as YAML: "0.1" → 0.1; any other value, and what is no YAML, as it is."""
    import yaml

    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return read_yaml(value)
    except yaml.YAMLError:
        return value


def _expected(hint: Any) -> str:
    """`has to be a number`, `can be auto, bf16 or fp32`."""
    kinds, is_choice = [], False
    for kind in (kind for kind in _kinds(hint) if kind is not NoneType):
        origin, parts = get_origin(kind), get_args(kind)
        is_choice |= origin is Literal
        if origin is Literal:
            kinds += parts
        elif origin is tuple:
            kinds.append(f"a list of {len(parts)} values")
        elif origin is dict or is_dataclass(kind):
            name = "name" if origin else fields(kind)[0].name
            kinds.append(f"values by name, as in {{{name}: …}}")
        else:
            kinds.append(KINDS[origin or kind])
    listed = " or ".join(filter(None, [", ".join(kinds[:-1]), kinds[-1]]))
    return f"{'can' if is_choice else 'has to'} be {listed}"


def _shown(value: Any) -> str:
    if value is None:
        return "empty"
    return excerpt(repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def _settings_in(hint: Any) -> type | None:
    """The dataclass that a setting is made of, if it is: `Mixture | None` → Mixture."""
    return next((part for part in (hint, *get_args(hint)) if is_dataclass(part)), None)


# The help


def help_text(
    settings_class: type, command: str, usage: str | None = None, sections: Mapping[str, str] | None = None
) -> str:
    positional = [setting.name.upper() for setting in fields(settings_class) if _is_positional(setting)]
    usage = usage or " ".join([command, *positional, "[--SETTING VALUE ...]"])
    columns = min(shutil.get_terminal_size().columns, HELP_COLUMNS)

    def wrapped(text: str, indent: str) -> str:
        return textwrap.fill(" ".join(text.split()), columns, initial_indent=indent, subsequent_indent=indent)

    lines = [f"usage: {usage}", "", wrapped(settings_class.__doc__ or "", "")]
    last = ((head.split()[0], head, text) for head, text in OTHER_OPTIONS.items())
    headings = {**(sections or {next(iter(get_type_hints(settings_class))): "settings"}), CONFIG: "and"}
    for name, head, text in (*_entries(settings_class), *last):
        lines += ["", f"{headings[name]}:"] if name in headings else []
        lines += [f"  {head}", wrapped(text, " " * 6)] if text else [f"  {head}"]
    return "\n".join(lines)


def _entries(settings_class: type, before: str = "") -> Iterator[tuple[str, str, str]]:
    """Name, how it is given, and description of each setting; the settings inside of one follow it."""
    docs, hints = _docs(settings_class), get_type_hints(settings_class)
    for setting in fields(settings_class):
        name, text = f"{before}{setting.name}", docs[setting.name]
        default = setting.default
        if default not in (MISSING, None, ""):
            plain = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
            text += f" (default: {plain.lower() if isinstance(default, bool) else plain})"
        head = setting.name.upper() if _is_positional(setting) else f"--{name} {_placeholder(hints[setting.name])}"
        yield name, head, text
        if inner := _settings_in(hints[setting.name]):
            yield from _entries(inner, f"{name}.")


def _docs(settings_class: type) -> dict[str, str]:
    """The description of each setting: the docstring below its field."""
    import docstring_parser

    parsed = (docstring_parser.parse_from_object(it) for it in reversed(settings_class.__mro__) if is_dataclass(it))
    described = {it.arg_name: it.description for docs in parsed for it in docs.params}
    return {setting.name: described.get(setting.name) or "" for setting in fields(settings_class)}


def _placeholder(hint: Any) -> str:
    """`NUMBER`, `auto|table`, `TEXT ...`: what follows an option in --help."""
    if len(kinds := _kinds(hint)) > 1:
        return "|".join(_placeholder(kind) for kind in kinds if kind is not NoneType)
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "|".join(parts)
    if origin is list:
        return f"{_placeholder(parts[0])} ..."
    if origin is tuple:
        return f"[{', '.join(map(_placeholder, parts))}]"
    return PLACEHOLDERS[dict if is_dataclass(hint) else origin or hint]


def _is_positional(setting: Field) -> bool:
    return setting.default is MISSING and setting.default_factory is MISSING
