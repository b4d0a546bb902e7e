"""JSON that rows hold as text, and the schema that it has to fit, by the library jsonschema.

schema = read_schema("person.json")
fault_of('{"name": "Kim", "age": "31"}', schema)      "age is '31', which is not of type 'integer'"
SchemaFilter(json.dumps(schema)).check(record)        None, or ("target is not of the JSON schema", "…")
as_written('{"age": 31.0, "name": "Jos\\u00e9"}', schema)      '{"name": "José", "age": 31}'

Outputs that have to fit a schema can only be written in one way (finetune/inference/constraints.py): names in the
schema's order, and characters as they are. A model that learned another order is kept from what it wants to write, and
leaves it out. So targets are given that form.
"""

import functools
import json
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from diptych.data_prep.command_line.errors import UserError, excerpt, in_short

INSTALL = "pip install 'diptych[structured]'"


def read_schema(file: str) -> dict[str, Any] | bool:
    """UserError: the file is not JSON, or no schema."""
    try:
        schema = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"json_schema {file} cannot be read: {in_short(error)}") from None
    _validator(json.dumps(schema), file)
    return schema


def why_not_forced(schema: Any) -> str:
    """Why llguidance, which makes outputs fit, cannot do so for this schema; "" if it can, or is not installed."""
    try:
        from llguidance import LLMatcher
    except ImportError:
        return ""
    grammar = f"%llguidance {{}}\nstart: value\nvalue: %json {json.dumps(schema)}\n"
    is_wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    return excerpt(reason_of_llguidance(messages[0]), 200) if is_wrong else ""


def reason_of_llguidance(message: str) -> str:
    """Without the place in its own form of the grammar, and the listing of that."""
    said = re.split(r"\n +1 \| ", message, maxsplit=1)[0]
    said = re.sub(r"(?s)^at \d+\(\d+\): (failed to compile JSON schema: |invalid regex .*\nerror: )?", "", said)
    return " ".join(line.strip() for line in said.split("\n") if line.strip(" ^"))


@functools.lru_cache(maxsize=4)
def _validator(schema: str, name: str = "the JSON schema") -> Any:
    try:
        import jsonschema
        from referencing.jsonschema import EMPTY_REGISTRY  # which fetches nothing
    except ImportError as error:
        raise UserError(f"jsonschema is not installed, by which JSON is checked: {INSTALL}") from error
    found = json.loads(schema)
    kind = jsonschema.validators.validator_for(found, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(found)
    except jsonschema.SchemaError as error:
        raise UserError(f"{name} is no JSON schema: {error.json_path}: {excerpt(error.message, 200)}") from None
    return kind(found, registry=EMPTY_REGISTRY)


def parsed(text: str) -> Any:
    """The value. ValueError: the text is no JSON, has a name twice in an object, or NaN or Infinity."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a name stands twice in an object")
        return found

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("its parts are nested too deeply") from error


def fault_of(text: str, schema: str) -> str | None:
    """Why a text is no JSON of the schema (in JSON); None where it is. UserError: the schema refers to what it does
    not hold."""
    try:
        value = parsed(text)
    except ValueError as error:
        return f"it is no JSON: {in_short(error)}"
    validator = _validator(schema)
    from referencing.exceptions import Unresolvable

    try:
        errors = sorted(validator.iter_errors(value), key=lambda error: len(error.path))
    except (Unresolvable, RecursionError) as error:
        raise UserError(f"the JSON schema cannot be applied: {type(error).__name__}, {in_short(error)}") from None
    if not errors:
        return None
    place = "/".join(map(str, errors[0].path))
    return f"{f'at {place}: ' if place else ''}{excerpt(errors[0].message, 200)}"


STRING = re.compile(r'("(?:[^"\\]|\\.)*")')
WHITE_SPACE = re.compile(r"[ \t\r\n]+")
ALLOWED = re.compile(r" |\n[ \t]{0,16}")
"""White space between the parts of an output."""


class _Number(float):
    """With the text that it had, so that no digit changes."""

    text: str

    @classmethod
    def of(cls, text: str) -> "_Number":
        number = cls(text)
        number.text = text
        return number


def as_written(text: str, schema: str) -> str:
    """A text that is JSON of the schema, in the form that outputs of the schema have; the text itself if it is so, or
    if its parts are nested hundreds of times."""
    rules = _rules(schema)
    try:
        value = json.loads(text, parse_float=_Number.of, parse_int=_Number.of)
        written = _written(_ordered(value, rules.validator.schema, rules))
    except RecursionError:
        return text
    gaps = [gap for part in STRING.split(text)[::2] for gap in WHITE_SPACE.findall(part)]
    is_so = text == text.strip() and all(map(ALLOWED.fullmatch, gaps)) and _squeezed(text) == _squeezed(written)
    return text if is_so else written


class _Rules(NamedTuple):
    validator: Any
    resolver: Any


@functools.lru_cache(maxsize=4)
def _rules(schema: str) -> _Rules:
    from referencing import Registry
    from referencing.jsonschema import specification_with

    validator = _validator(schema)
    whole = specification_with(validator.META_SCHEMA["$schema"]).create_resource(validator.schema)
    return _Rules(validator, Registry().with_resource("", whole).resolver())


def _squeezed(text: str) -> str:
    """Without white space between the parts."""
    parts = STRING.split(text)
    return "".join(part if place % 2 else WHITE_SPACE.sub("", part) for place, part in enumerate(parts))


def _written(value: Any) -> str:
    if isinstance(value, _Number):
        return value.text
    if isinstance(value, float) and value.is_integer():  # a constant of the schema
        return str(int(value))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_written(name)}: {_written(part)}" for name, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_written, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _ordered(value: Any, schema: Any, rules: _Rules) -> Any:
    """The value with its names in the order of the schema, with the schema's own form of its constants, and with whole
    numbers where it asks for integers."""
    parts = list(_parts(value, schema, rules, ()))
    for part in parts:
        for constant in part.get("enum", [part["const"]] if "const" in part else []):
            if constant == value and isinstance(constant, bool) == isinstance(value, bool):
                return constant
    if isinstance(value, dict):
        first = [name for key in ("properties", "required") for part in parts for name in part.get(key, ())]
        names = [name for name in dict.fromkeys([*first, *value]) if name in value]
        return {name: _ordered(value[name], _schema_of(name, parts), rules) for name in names}
    if isinstance(value, list):
        return [_ordered(it, _schema_at(place, parts), rules) for place, it in enumerate(value)]
    if isinstance(value, _Number) and not value.text.lstrip("-").isdigit():
        if any(part.get("type") == "integer" for part in parts):
            return _Number.of(str(int(Decimal(value.text))))
    return value


def _parts(value: Any, schema: Any, rules: _Rules, before: tuple[Any, ...]) -> Iterator[Mapping[str, Any]]:
    """The schema, those that it refers to or is made of, and the first alternative that the value fits."""
    if not isinstance(schema, dict) or any(schema is other for other in before):
        return
    before = (*before, schema)
    yield schema
    others = [*schema.get("allOf", ())]
    for name in ("anyOf", "oneOf"):
        fitting = (it for it in schema.get(name, ()) if rules.validator.evolve(schema=it).is_valid(value))
        others += [first] if (first := next(fitting, None)) is not None else []
    if str(schema.get("$ref", "")).startswith("#"):
        others.append(rules.resolver.lookup(schema["$ref"]).contents)
    for other in others:
        yield from _parts(value, other, rules, before)


def _schema_of(name: str, parts: list[Mapping[str, Any]]) -> Any:
    found = [part["properties"][name] for part in parts if name in part.get("properties", ())]
    found += [it for part in parts for key, it in part.get("patternProperties", {}).items() if re.search(key, name)]
    found = found or [it for part in parts if isinstance(it := part.get("additionalProperties"), dict)]
    return {"allOf": found}


def _schema_at(place: int, parts: list[Mapping[str, Any]]) -> Any:
    each = (part.get("prefixItems", [])[place : place + 1] or [part.get("items", True)] for part in parts)
    return {"allOf": [it for found in each for it in found]}
