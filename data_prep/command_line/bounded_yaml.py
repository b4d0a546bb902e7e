"""YAML of a person or a stranger, read in little time, whatever it holds.

    read_yaml("seed: 1e-4")               → {"seed": 0.0001}
    read_yaml("[" * 100_000)              → YAMLError: it is nested deeper than 20 levels
    read_yaml(text_of(Path("r.yaml")))

PyYAML looks at all brackets that are open for each further one, and a few lines with aliases may stand for gigabytes.
Tags that do not fit their values raise errors of any type there; here they are YAMLErrors, as is what JSON lacks.
"""

import json
from pathlib import Path
from typing import Any

MOST_CHARACTERS, MOST_DEPTH, MOST_MEANT = 10**6, 20, 10**7


def text_of(file: Path) -> str:
    """No more of it than shows that it is too long."""
    with file.open(encoding="utf-8-sig") as stream:
        return stream.read(MOST_CHARACTERS + 1)


def read_yaml(text: str) -> Any:
    """As jsonargparse reads YAML: 1e-4 is a number, and 2024-01-01 a text. YAMLError where it is none, or too much."""
    import yaml
    from jsonargparse import get_loader

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        if text[:1] in ("[", "{") and (found := _as_json(text)) is not None:
            return found
        if len(text) > MOST_CHARACTERS:
            raise yaml.YAMLError(f"it has more than {MOST_CHARACTERS:,} characters")
        depth = aliases = 0
        for event in yaml.parse(text, loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            aliases += isinstance(event, yaml.AliasEvent)
            if depth > MOST_DEPTH:
                raise yaml.YAMLError(f"it is nested deeper than {MOST_DEPTH} levels")
            if len(text) << min(aliases, 99) > MOST_MEANT:  # each may double what all before it stand for
                raise yaml.YAMLError(f"it has {aliases} aliases (*name) or more: write out what they stand for")
        found = get_loader("yaml")(text)
        json.dumps(found)
        return found
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError) as error:
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from None


def _as_json(text: str) -> Any:
    """In which the lists of a command line are handed on; in it a list may be of any length."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
