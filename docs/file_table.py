"""Writes the table at the end of CONTRIBUTING.md anew: each file with the first sentence that stands in it.

python docs/file_table.py
"""

import ast
import re
import subprocess
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
HEADING = "## What each file is for\n"
FOLDERS = ("modeling", "data_prep", "finetune", "examples", "benchmarks", "docs")
LEFT_OUT = re.compile(r"__init__\.py$|/samples/|^docs/.*\.md$|\.png$")


def listed_files() -> list[str]:
    """What git holds, or is about to, in the folders of the table."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *FOLDERS]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted({name for name in names if not LEFT_OUT.search(name) and (ROOT / name).exists()})


def first_sentence(file: Path) -> str:
    """Of the docstring of a Python file, or of the comment or heading with which another one begins."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    elif file.suffix == ".ipynb":
        text = "".join(re.findall(r'"# ([^"\\]+)', text)[:1])
    else:
        found = re.search(
            r"(?:<!--|/\*\*?|\{#-?|#+|//)\s*((?!!/|SBATCH).+?)\s*(?:-->|\*/|-?#\}|$)", text, re.MULTILINE
        )
        text = found[1] if found else ""
    sentence = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=\w[.)`])\s+(?=[A-Z`])", sentence)[0].rstrip(".").replace("|", "\\|")


def table() -> str:
    parts = []
    for folder, names in groupby(sorted(listed_files(), key=lambda name: (str(Path(name).parent), name)), key=_folder):
        lines = [f"| `{Path(name).name}` | {first_sentence(ROOT / name)} |" for name in names]
        parts.append("\n".join([f"### `{folder}/`", "", "| file | what it is for |", "|---|---|", *lines]))
    return "\n\n".join(parts) + "\n"


def _folder(name: str) -> str:
    return str(Path(name).parent)


if __name__ == "__main__":
    before = PAGE.read_text(encoding="utf-8").split(HEADING)[0]
    PAGE.write_text(f"{before}{HEADING}\n{table()}", encoding="utf-8")
