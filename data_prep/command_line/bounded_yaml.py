"""YAML of a person or a stranger, read in little time, whatever it holds.

    read_yaml("seed: 1e-4")               → {"seed": 0.0001}
    read_yaml("[" * 100_000)              → YAMLError: it is nested deeper than 20 levels
    read_yaml(text_of(Path("r.yaml")))

PyYAML looks at all brackets that are open for each further one, and a few lines with aliases may stand for gigabytes.
Tags that do not fit their values raise errors of any type there; here they are YAMLErrors, as is what JSON lacks.
"""

import json
import re
from pathlib import Path
from typing import Any

MOST_CHARACTERS, MOST_DEPTH, MOST_MEANT = 10**6, 20, 10**7


def text_of(file: Path) -> str:
    """No more of it than shows that it is too long."""
    with file.open(encoding="utf-8-sig") as stream:
        return stream.read(MOST_CHARACTERS + 1)


def read_yaml(text: str) -> Any:
    """As jsonargparse reads YAML: 1e-4 is a number, and 2024-01-01 a text. YAMLError where it is none, or too much, or
    ambiguous."""
    import yaml
    from jsonargparse import get_loader

    try:
        if text[:1] == "[" and _is_flat(text):
            return json.loads(text)
        _check(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        found = get_loader("yaml")(text)
        json.dumps(found)
        return found
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from None


def _is_flat(text: str) -> bool:
    """As the lists are that a command line hands on, of any length."""
    try:
        return not any(isinstance(it, list | dict) for it in json.loads(text))
    except (ValueError, RecursionError):
        return False


def _check(text: str, loader: Any) -> None:
    """The depth comes first: deep in a value, the C library ends the process."""
    import yaml

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
    nodes, seen = [yaml.compose(text, loader)], set()
    while nodes:
        node, fault = nodes.pop(), ""
        if isinstance(node, yaml.CollectionNode) and node not in seen:
            seen.add(node)
            pairs = node.value if isinstance(node, yaml.MappingNode) else [(it,) for it in node.value]
            nodes += [it for pair in reversed(pairs) for it in reversed(pair)]
            keys = [key.value for key, *value in pairs if value and isinstance(key, yaml.ScalarNode)]
            if len(set(keys)) < len(keys):
                node = next(key for place, (key, _) in enumerate(pairs) if key.value in keys[:place])
                fault = f"{node.value[:80]} is given twice"
        elif isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float")) and not node.style:
            if re.match(r"[-+]?0[0-9_]|[^:]*\d:", node.value):
                fault = f"{node.value[:80]}, with a leading 0 or a colon, is another number in YAML"
        if fault:
            raise yaml.MarkedYAMLError(problem=fault, problem_mark=node.start_mark)
