"""The facts of an inspection as a page: `inspect.html`, which loads nothing and runs no script but its own.

Texts of prompts and vocabularies are escaped, and the script, whose hash is in the page's Content-Security-Policy,
writes them as text only. Without scripts, and on paper, everything but the maps is there.
"""

import base64
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.report.visible_text import TEMPLATES as SHARED_TEMPLATES
from diptych.data_prep.report.visible_text import prose
from diptych.finetune.run_files.atomic_folders import write_text

TEMPLATES = Path(__file__).parent / "templates"
MARK = '<meta name="generator" content="diptych inspect">'
"""In every page of ours, so that no other file is overwritten."""
WORST_ROWS = 12


def check_page(file: Path) -> None:
    """UserError if the file exists and is no such page, or is a folder."""
    if file.is_dir():
        raise UserError(f"--out {file} is a folder. Name a file in it, {file / 'inspect.html'}.")
    if file.is_file() and MARK not in file.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise UserError(f"--out {file} exists and is no page of `diptych inspect`. Name another file.")


def write_page(file: Path, facts: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, render_page(facts))


def render_page(facts: Mapping[str, Any]) -> str:
    script = (TEMPLATES / "inspection.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shown = ("source", "decoder", "steps", "lens", "attention", "embeddings", "unread", "given")
    return (
        _environment()
        .get_template("inspection.html.jinja")
        .render(
            **facts | {"facts": facts, "mark": Markup(MARK), "worst_rows": WORST_ROWS},
            script=Markup(script),
            script_hash=digest,
            payload=_as_json({name: facts[name] for name in shown}),
        )
    )


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([TEMPLATES, SHARED_TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"prose": prose, "percent": _percent, "log_of": math.log}
    return environment


def _percent(share: float) -> str:
    """0.9612 → "96.1 %"; a small share is not shown as 0."""
    return "< 0.1 %" if 0 < share < 0.001 else f"{100 * share:.1f} %"


def _as_json(facts: Mapping[str, Any]) -> Markup:
    """For a script element, which ends at `</script` wherever that stands."""
    text = json.dumps(facts, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))
