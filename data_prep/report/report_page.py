"""What a preparation did, as a page to look at: the facts of report_facts.py in; report.html and report.json out.

The page is one file without a script. It asks nothing of any network, and its Content-Security-Policy forbids it to;
texts of rows are escaped, and characters that are invisible or change the writing direction are shown by their number
(U+202E). Facts are counts and a few examples, so that the page of 100,000 rows is about as large as that of 2,000.
"""

import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from diptych.data_prep.report.visible_text import TEMPLATES, prose, shortened, token_markup, visible

PAGE = "report.html.jinja"

TOKENS_SHOWN = 160
"""How many tokens of each side of a sample are shown."""


def write_report(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes report.html and report.json into a folder that exists."""
    text = json.dumps(facts, ensure_ascii=False, indent=2, allow_nan=False)
    # Numbers of one list on one line. Inside a string there is no line break, so no string is touched.
    text = re.sub(r"\[\n([-+.\deE,\s]*)\n\s*\]", lambda found: "[" + " ".join(found[1].split()) + "]", text)
    text = re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)  # lone surrogates are no UTF-8
    (folder / "report.json").write_text(text + "\n", encoding="utf-8", newline="\n")
    (folder / "report.html").write_text(render_page(facts), encoding="utf-8", newline="\n")


def render_page(facts: Mapping[str, Any]) -> str:
    """The text of report.html. All values are escaped, and their invisible characters shown by number."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=lambda value: visible(shortened(value)) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": lambda value: "–" if value is None else f"{value:,}",
        "percent": _percent,
        "prose": prose,
        "token": token_markup,
        "written": _written,
    }
    bins = {side: _bins(**facts["lengths"][side]) for side in facts["lengths"]}
    return environment.get_template(PAGE).render(facts=facts, bins=bins, tokens_shown=TOKENS_SHOWN, zip=zip)


def _written(value: Any) -> str:
    """A setting, as a person would write it down: ["a.tsv", "b.tsv"] → "a.tsv, b.tsv"."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_written, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _percent(part: float, whole: float = 1) -> str:
    """0.987 → "98.7 %". Only 0 is shown as "0.0 %", and only 1 as "100.0 %"."""
    share = part / whole if whole else 0
    if 0 < share < 0.001:
        return "< 0.1\u00a0%"
    if 0.999 < share < 1:
        return "> 99.9\u00a0%"
    return f"{share:.1%}".replace("%", "\u00a0%")


def _bins(edges: list[int], counts: list[int], limit: int, **_: Any) -> list[dict[str, Any]]:
    """The bars of a histogram, all equally wide on the page: their heights in per cent of the highest."""
    return [
        {
            "tokens": f"{start:,}" if end == start + 1 else f"{start:,} to {end - 1:,}",
            "count": count,
            "height": round(100 * count / max(counts), 1),
            "is_over": start > limit,
        }
        for (start, end), count in zip(itertools.pairwise(edges), counts, strict=True)
    ]
