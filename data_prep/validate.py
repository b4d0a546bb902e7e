"""From a Row to a Record, or to a Reject that says which field is wrong and what to do. Values are never changed.

{"instruction": "Add.", "output": "2"}               → Record, input ""
{"instrution": "Add.", "output": "2"}                → Reject "'instruction' is missing; rename 'instrution' …"
{"instruction": "Add.", "output": 2}                 → Reject "'output' is a number (2), not a string …"
{"instruction": "Add.", "output": "  "}              → Reject "'output' is empty …"
"""

from __future__ import annotations

from typing import Any

from diptych.data_prep.records import Record, Reject, Row, nearest

FIELDS = ("instruction", "input", "output")

JSON_TYPE_NAMES = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def validate(row: Row) -> Record | Reject:
    """The first fault found makes the row a Reject; a row without fault becomes a Record."""
    for check in (_missing, _not_a_string, _not_unicode, _empty):
        for field in FIELDS:
            if fault := check(field, row.fields):
                return Reject(row.origin, field, *fault, row.raw)
    values = {field: row.fields.get(field) or "" for field in FIELDS}
    return Record(**values, origin=row.origin)


def _missing(field: str, fields: dict[str, Any]) -> tuple[str, str] | None:
    """`input` may be absent, but not misspelt: a row with 'inptu' would otherwise lose its input without a word."""
    if field in fields:
        return None
    others = [name for name in fields if name not in FIELDS]
    near = nearest(field, others, cutoff=0.75 if field == "input" else 0.6)
    if near is not None:
        return f"misspelt field '{near}'", f"'{field}' is missing; is '{near}' meant? Rename it to '{field}'."
    if field == "input":
        return None
    has = ", ".join(f"'{name}'" for name in fields) or "no fields"
    return f"missing field '{field}'", f"'{field}' is missing; the row has {has}."


def _not_a_string(field: str, fields: dict[str, Any]) -> tuple[str, str] | None:
    value = fields.get(field, "")
    if isinstance(value, str) or (field == "input" and value is None):  # a null input is how tables say "no input"
        return None
    if value is None:
        return f"'{field}' is null", f"'{field}' is null; a string is due."
    name = JSON_TYPE_NAMES.get(type(value), type(value).__name__)
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:60] + " …"
    return f"'{field}' is not a string", f"'{field}' is {name} ({shown}), not a string: put it in quotes."


def _not_unicode(field: str, fields: dict[str, Any]) -> tuple[str, str] | None:
    """JSON may spell half of a surrogate pair (`"\\ud83d"`), which is no character and cannot be encoded."""
    value = fields.get(field) or ""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"U+{ord(value[error.start]):04X}"
        where = f"{code} at character {error.start + 1}"
        return "broken Unicode", f"'{field}' holds {where}: half of a broken symbol, or a byte that is no UTF-8."
    return None


def _empty(field: str, fields: dict[str, Any]) -> tuple[str, str] | None:
    if field == "input" or fields[field].strip():
        return None
    return f"empty {field}", f"'{field}' is empty: a row needs one to be learned from."
