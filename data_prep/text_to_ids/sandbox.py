"""Jinja for templates that may come from a stranger: what a template can do is bounded in time and memory.

    {% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}    LimitError after a second
    {{ 'a' * 10 ** 10 }}   {{ input | center(10 ** 9) }}   {{ input.ljust(10 ** 9) }}    LimitError at once

Jinja's immutable sandbox keeps a template from Python's internals, but neither from running for ever nor from filling
memory. Here each rendering has a budget: STEPS turns of loops and calls, CHARACTERS that it may make, SECONDS of
processor time. The steps are counted by nodes that are put into the syntax tree, at the head of each loop and macro,
and everything that can make a large value asks first: operators, `~`, literals, filters, methods, and the output.
Filters and methods that are not listed here do not exist, so that nothing is left that does not ask.

Counting was preferred to a tracing function or a watching thread: it works in the main thread, in other threads and in
worker processes alike, leaves debuggers and signals alone, stops before memory is taken and not afterwards, and gives
the same answer on a slow machine. A row pays 1.3 µs for it, and another one for each turn of a loop.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.runtime import Context, LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

STEPS = 1_000_000
"""Turns of loops, calls and filters in one rendering, besides one for each character of the row: about a second."""
CHARACTERS = 10_000_000
"""What one rendering may make, besides 8 for each character of the row."""
LIST_PLACE = 8
"""A place in a list counts as so many characters: it takes as many bytes, and longer to count."""
SECONDS = 1.0
"""Processor time of one rendering."""
LARGEST_NUMBER = 100_000
"""Of widths, counts and other numbers that are given to a filter or method."""
LARGEST_INTEGER_BITS = 4096
LONGEST_TEMPLATE = 30_000

FILTERS = (
    "abs capitalize center count d default first float format indent int items join last length list lower map max min"
    " reject rejectattr replace reverse round select selectattr sort string title trim truncate unique upper wordcount"
    " wordwrap"
).split()
STRING_METHODS = frozenset(
    "capitalize casefold count endswith find index isalnum isalpha isdecimal isdigit islower isnumeric isspace istitle"
    " isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip"
    " split splitlines startswith strip swapcase title upper".split()
)
METHODS: dict[type, frozenset[str]] = {
    str: STRING_METHODS,
    list: frozenset(("count", "index")),
    tuple: frozenset(("count", "index")),
    dict: frozenset(("get", "items", "keys", "values")),
}


class LimitError(Exception):
    """A template that does too much, or what it may not do."""


class _Budget(threading.local):
    """What is left to the rendering under way in this thread."""

    steps = characters = 0
    deadline = 0.0


_budget = _Budget()


def start_budget(data_characters: int = 0) -> None:
    _budget.steps = STEPS + data_characters
    _budget.characters = CHARACTERS + 8 * data_characters
    _budget.deadline = time.thread_time() + SECONDS


def _step() -> None:
    _budget.steps = left = _budget.steps - 1
    if left < 0:
        raise LimitError(f"it takes more than {STEPS:,} steps")
    if left % 16 == 0 and time.thread_time() > _budget.deadline:
        raise LimitError(f"it takes more than {SECONDS} seconds")


def _spend(size: int) -> None:
    """Called before a value of this size is made, wherever that can be known."""
    _budget.characters -= size
    if _budget.characters < 0:
        raise LimitError(f"it makes more than {CHARACTERS:,} characters")


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """`from_string` and `render` as ever, within the budget that `start_budget` opened in this thread."""

    intercepted_binops = frozenset("+ * ** %".split())

    def __init__(self) -> None:
        super().__init__(undefined=jinja2.StrictUndefined, finalize=_output)
        self.filters = {name: _guarded(name, self.filters[name]) for name in FILTERS}
        self.filters |= {"_counted": _counted, "_joined": _joined, "_sized": _sized}
        self.globals = {name: self.globals[name] for name in ("range", "namespace")}

    def limited(self, tree: nodes.Template) -> jinja2.Template:
        return self.from_string(_Limits().visit(tree))

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        kept = []
        for piece in pieces:
            _spend(len(piece))
            kept.append(piece)
        return "".join(kept)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, LoopContext | Namespace | Undefined):
            return super().is_safe_attribute(obj, attr, value)
        return attr in METHODS.get(type(obj), ())

    def wrap_str_format(self, value: Any) -> None:
        """str.format is no method here: `~` and the filter `format` do the same."""
        return None

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        _step()
        _check_numbers(args, kwargs)
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str) and name in ("replace", "join"):
            if name == "join" and args:
                args = (_listed(args[0]), *args[1:])
            _spend(_LARGEST_RESULT[name](owner, *args, **kwargs))
        result = super().call(context, obj, *args, **kwargs)
        _spend(_size(result, strict=False))
        return result

    def call_test(self, *args: Any, **kwargs: Any) -> bool:
        _step()
        return super().call_test(*args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _step()
        if operator == "%" and isinstance(left, str):
            return _percent(left, right)
        if isinstance(left, int | float) and isinstance(right, int | float):
            _check_integers(operator, left, right)
        else:
            sizes = [_size(value) for value in (left, right)]
            times = [max(value, 0) for value in (left, right) if isinstance(value, int)]
            _spend(max(sizes) * times[0] if operator == "*" and times else sum(sizes))
        return super().call_binop(context, operator, left, right)


class _Limits(NodeTransformer):
    """A step at the head of each loop and macro; `~` and literals of lists made by functions that ask first."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body = [_step_node(node), *node.body]
        if node.test is not None:  # for items that it leaves out the body does not run
            node.test = nodes.And(_step_node(node).node, node.test, lineno=node.lineno)
        return node

    def visit_Macro(self, node: nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        node.body = [_step_node(node), *node.body]
        return node

    visit_CallBlock = visit_Macro

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filter_node("_joined", nodes.List(node.nodes, lineno=node.lineno))

    def visit_List(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else _filter_node("_sized", node)

    visit_Tuple = visit_Dict = visit_List


def _filter_node(name: str, node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _step_node(node: nodes.Node) -> nodes.ExprStmt:
    counted = _filter_node("_counted", nodes.Const(None, lineno=node.lineno))
    return nodes.ExprStmt(counted, lineno=node.lineno)


@pass_context  # without it, Jinja would run it once, while it compiles
def _counted(context: Context, value: None) -> bool:
    _step()
    return True


def _output(value: Any) -> Any:
    """Each `{{ … }}` before it becomes text."""
    _spend(len(value) if type(value) is str else _size(value))
    return value


def _sized(value: Any) -> Any:
    """A literal of a list that holds itself twice, forty times over, is small in memory and endless as text."""
    _step()
    _spend(_size(value))
    return value


def _joined(parts: list[Any]) -> str:
    _step()
    _spend(sum(_size(part) for part in parts))
    return "".join(map(str, parts))


def _size(value: Any, strict: bool = True) -> int:
    """About how many characters it is as text. With `strict`, only of what is data, and not of a macro or a loop."""
    if isinstance(value, str | range):
        return len(value)
    if value is None or isinstance(value, int | float | Undefined):
        return 1
    if isinstance(value, list | tuple):
        return _sum_sizes(value, strict)
    if isinstance(value, dict):
        return _sum_sizes(value.keys(), strict) + _sum_sizes(value.values(), strict)
    if strict:
        raise LimitError(f"a {type(value).__name__} is neither text nor a number nor a list of these")
    return 1


def _sum_sizes(values: Iterable[Any], strict: bool) -> int:
    total = 1
    for value in values:
        total += LIST_PLACE + _size(value, strict)
        if total > _budget.characters:
            _spend(total)
    return total


def _check_numbers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int | float) and not -LARGEST_NUMBER <= value <= LARGEST_NUMBER:
            raise LimitError(f"a filter or method is given a number beyond {LARGEST_NUMBER:,}")


def _check_integers(operator: str, left: float, right: float) -> None:
    if isinstance(left, float) or isinstance(right, float):
        return
    bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
    if bits > LARGEST_INTEGER_BITS and operator in ("*", "**"):
        raise LimitError("it computes with a number of more than a thousand digits")


def _listed(value: Any) -> list[Any]:
    """Filters such as `map` give generators; what makes one text of them has to know their size first."""
    items = list(value) if isinstance(value, Iterable) else [value]
    _spend(_size(items))
    return items


def _percent(text: str, values: Any) -> str:
    """`'%s: %s' % ('a', 'b')`, without the widths that make a gigabyte of `%1000000000d`."""
    if re.search(r"%[^%a-zA-Z]*(\*|\d{4})", text):
        raise LimitError("a width in '%' has more than three digits")
    _spend(len(text) + text.count("%") * (1000 + _size(values)))
    return text % values


def _format_filter(text: Any, *args: Any, **kwargs: Any) -> str:
    if args and kwargs:
        raise LimitError("format takes values by place or by name, not both")
    return _percent(str(text), kwargs or args)


def _indented(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> int:
    return len(text) + (text.count("\n") + 2) * (width if isinstance(width, int) else len(width))


def _replaced(text: str, old: str, new: str, count: int | None = None) -> int:
    return len(text) + (len(text) // max(len(old), 1) + 1) * len(new)


# How many characters the result may have, of what makes more than it is given.
_LARGEST_RESULT: dict[str, Callable[..., int]] = {
    "center": lambda text, width=80: len(text) + max(width, 0),
    "indent": _indented,
    "replace": _replaced,
    "join": lambda text, items=(): _size(items) + len(items) * len(text),  # the method
    "truncate": lambda text, length=255, killwords=False, end="...", leeway=None: len(text) + len(end),
    "wordwrap": lambda text, width=79, break_long_words=True, wrapstring=None, break_on_hyphens=True: (
        len(text) * (2 + len(wrapstring or ""))
    ),
}


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, which now counts as a step, asks before it makes a larger value, and pays for what it has made."""
    if name == "format":
        function = _format_filter
    context_args = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _step()
        given = args[context_args:]
        _check_numbers(given[1:], kwargs)
        if name == "join":
            items = _listed(given[0])
            args = (*args[:context_args], items, *given[1:])
            _spend(len(items) * len(given[1] if len(given) > 1 else kwargs.get("d", "")))
        elif name in _LARGEST_RESULT:
            _spend(_size(given[0]))
            _spend(_LARGEST_RESULT[name](str(given[0]), *given[1:], **kwargs))
        elif name == "string":
            _spend(_size(given[0]))
        result = function(*args, **kwargs)
        if isinstance(result, Iterator):
            return _counting(result)
        _spend(_size(result, strict=False))
        return result

    return guarded


def _counting(items: Iterator[Any]) -> Iterator[Any]:
    for item in items:
        _step()
        yield item
