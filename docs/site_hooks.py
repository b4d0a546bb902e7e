"""What `make docs` does to pages: results come from benchmarks/, and links to files that are no pages become names."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "RESULTS.md"


def on_files(files: Files, config: Any) -> None:
    for picture in sorted((RESULTS.parent / "figures").glob("*.png")):
        files.append(File.generated(config, f"figures/{picture.name}", abs_src_path=str(picture)))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_path == "results.md":
        return RESULTS.read_text(encoding="utf-8")
    return re.sub(r"\[([^]]+)\]\(\.\./[^)]+\)", r"\1", markdown)
