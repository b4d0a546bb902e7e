"""Jinja for templates that may come from a stranger: each rendering has a budget of work.

    {% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}    SecurityError after a second
    {% set a = input ~ input %}{% set a = a ~ a %} … {{ a }}                          SecurityError at once
    {% macro m() %} … {% endmacro %}                                                  TemplateSyntaxError: not allowed

Jinja's own sandbox keeps a template from Python's internals, but neither from running for ever nor from filling
memory. So a template is limited to what prompts need: `if`, `for` and `set`, `~` and `+`, the filters of FILTERS and
the methods of TEXT_METHODS. What makes a value pays for its characters, and each turn of a loop pays 1. It pays before
a large value is made. The budget is WORK and 16 for each character of the row, in SECONDS of processor time.

It imports only jinja2, because its code travels with checkpoints, in pipeline_diptych.py.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

WORK = 1_000_000
"""What one rendering may do: characters made, and turns of loops."""
SECONDS = 3.0
"""Of this thread; in a large process, the garbage that is collected meanwhile takes its share."""
LONGEST_TEMPLATE = 30_000
NODES = frozenset(
    "Template Output TemplateData If For Assign Name Const Concat Add Sub Neg Compare Operand And Or Not CondExpr"
    " Getattr Getitem Slice Filter Test Call Keyword Tuple".split()
)
FILTERS = (
    "capitalize default first int join last length list lower map reject replace reverse select sort string title trim"
    " unique upper wordcount"
).split()
TEXT_METHODS = frozenset(
    "capitalize count endswith find isalnum isalpha isdigit islower isnumeric isspace isupper lower lstrip partition"
    " removeprefix removesuffix replace rfind rpartition rsplit rstrip split splitlines startswith strip title"
    " upper".split()
)
_left = threading.local()


def start_budget(row_characters: int = 0) -> None:
    """Called before a template is compiled, because constants are computed then, and before each rendering."""
    _left.work = WORK + 16 * row_characters
    _left.deadline = time.thread_time() + SECONDS


def spend(work: int) -> None:
    _left.work -= work
    if _left.work < 0:
        raise SecurityError(f"it makes more than {WORK:,} characters, or its loops take more than {WORK:,} turns")
    is_due = _left.work // 16 != (_left.work + work) // 16  # the clock takes longer than a turn
    if is_due and time.thread_time() > _left.deadline:
        raise SecurityError(f"it takes more than {SECONDS} seconds")


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """`from_string` and `render` as in Jinja, within the budget that `start_budget` opened in this thread."""

    intercepted_binops = frozenset("+")

    def __init__(self) -> None:
        super().__init__(undefined=jinja2.StrictUndefined)
        self.filters = {name: _paid(self.filters[name]) for name in FILTERS}
        self.filters |= {"join": _joined, "replace": _replaced, "_turns": _turns, "_read": _read}
        self.tests = {name: _paid(test) for name, test in self.tests.items()}
        self.globals = {"range": self.globals["range"]}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > LONGEST_TEMPLATE:
            raise SecurityError(f"it has {len(source):,} characters, and {LONGEST_TEMPLATE:,} are allowed")
        return _limited(super()._parse(source, name, filename))

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        kept = []
        for piece in pieces:
            spend(len(piece))
            kept.append(piece)
        return "".join(kept)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in TEXT_METHODS
        return isinstance(obj, LoopContext) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """So that `str.format` is not found: `~` does the same."""
        return None

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        _read(getattr(obj, "__self__", ""))
        if getattr(obj, "__name__", "") == "replace":
            return _replaced(obj.__self__, *args, **kwargs)
        result = super().call(context, obj, *args, **kwargs)
        spend(_size(result))
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        spend(_size(left) + _size(right))
        return super().call_binop(context, operator, left, right)


def _limited(node: nodes.Node) -> nodes.Node:
    """The syntax tree in which each loop counts its turns, `~` is the filter `join`, which pays first, and what is
    compared or cut is paid for."""
    kind = type(node).__name__
    if kind not in NODES or getattr(node, "recursive", False) or (kind == "Tuple" and node.ctx == "load"):
        what = "a recursive loop" if kind == "For" else f"Jinja's {kind}"
        raise TemplateSyntaxError(f"{what} is not allowed in a template, which has if, for, set, ~ and +", node.lineno)
    for name, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            setattr(node, name, _limited(value))
        elif isinstance(value, list):
            setattr(node, name, [_limited(it) if isinstance(it, nodes.Node) else it for it in value])
    if kind == "For":
        node.iter = nodes.Filter(node.iter, "_turns", [], [], None, None, lineno=node.lineno)
    if kind in ("Compare", "Operand"):
        node.expr = _seen(node.expr)
    if kind == "Getitem" and isinstance(node.arg, nodes.Slice):
        node.node = _seen(node.node)
    if kind == "Concat":
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "join", [], [], None, None, lineno=node.lineno)
    return node


def _seen(node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, "_read", [], [], None, None, lineno=node.lineno)


def _paid(function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter or test, which pays for what it reads and makes. None of FILTERS makes much more than it is given."""

    @functools.wraps(function)
    def paid(*args: Any, **kwargs: Any) -> Any:
        for value in args:
            _read(value)
        result = function(*args, **kwargs)
        result = list(_turns(result)) if isinstance(result, Iterator) else result
        spend(_size(result))
        return result

    return paid


def _size(value: Any) -> int:
    """Characters of a text; a place in a list takes 8 bytes and counts as 8."""
    if isinstance(value, str):
        return len(value)
    return sum(8 + _size(it) for it in value) if isinstance(value, list | tuple) else 1


def _turns(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        spend(1)
        yield item


def _read(value: Any) -> Any:
    """Pays for a look at a value: 1 for each item, or for 64 characters."""
    spend(1 + (len(value) // 64 if isinstance(value, str) else len(value) if isinstance(value, list | tuple) else 0))
    return value


def _joined(items: Iterable[Any], separator: str = "") -> str:
    texts = [str(item) for item in items]
    spend(_size(texts) + len(separator) * len(texts))
    return separator.join(texts)


def _replaced(text: str, old: str, new: str, count: int = -1) -> str:
    spend(len(text) + text.count(old) * len(new))
    return text.replace(old, new, count)
