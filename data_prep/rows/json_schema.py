"""JSON that rows hold as text, and the schema that it has to fit, by the library jsonschema.

schema = read_schema("person.json")
fault_of('{"name": "Kim", "age": "31"}', schema)      "age is '31', which is not of type 'integer'"
SchemaFilter(json.dumps(schema)).check(record)        None, or ("target is not of the JSON schema", "…")
"""

import functools
import json
from pathlib import Path
from typing import Any

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
