"""README and docs/: every command, file and snippet of each page works as it stands there; links lead somewhere."""

import importlib.util
import json
import pkgutil
import re
import subprocess
from dataclasses import fields

import pytest
import yaml
from page_reader import ROOT, Reader, blocks, commands

from diptych.data_prep.command_line.option_synonyms import other_name
from diptych.data_prep.pipeline.prepare_settings import PrepareSettings
from diptych.finetune.training.recipe import TrainRecipe

README = ROOT / "README.md"
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def reader(tmp_path_factory, nursery):
    """After README, whose prepared data and run the other pages go on with."""
    with pytest.MonkeyPatch.context() as patch:
        made = Reader(tmp_path_factory.mktemp("reader"), nursery)
        patch.chdir(made.folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        made.follow(README)
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_stands_on_a_page_works(reader, page):
    reader.follow(page)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_runs_from_its_first_cell_to_its_last(reader, notebook, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict[str, object] = {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), notebook.name, "exec"), names)
            assert not cell["outputs"]


@pytest.mark.parametrize(
    "page", [README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *PAGES], ids=lambda page: page.stem
)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]*)(?:#[^)]*)?\)", text):
        assert target.startswith("https://") or not target or (page.parent / target).exists(), target


def test_each_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    entries = str(yaml.safe_load(text)["nav"])
    assert set(re.findall(r"[\w-]+\.md", entries)) == {page.name for page in PAGES}


def test_what_the_reference_pages_describe_exists():
    """`make docs` fails as well, but needs mkdocs."""
    for page in PAGES:
        for path, members in re.findall(
            r"^::: (\S+)\n(?:    options:\n      members: \[(.*)\])?",
            page.read_text(encoding="utf-8"),
            flags=re.MULTILINE,
        ):
            found = pkgutil.resolve_name(path)
            assert all(hasattr(found, name) for name in members.split(", ") if name), path


def test_readme_is_short_and_its_make_commands_exist():
    text = README.read_text(encoding="utf-8")
    assert text.count("\n") <= 200
    typed = [command for block in blocks(README) if block.language == "sh" for command in commands(block.text)]
    makes = {command for command in typed if command.startswith("make ")}
    assert makes == {"make install", "make demo", "make test"}
    continuous = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert {line for line in continuous.splitlines() if line.startswith("make ")} >= {"make test-all", "make demo"}
    for command in {*makes, *re.findall(r"`(make [a-z-]+)`", text)}:  # a dry run: every target resolves
        subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def test_extras_that_pages_name_exist():
    extras = (ROOT / "setup.py").read_text(encoding="utf-8")
    for page in [README, *PAGES]:
        for name in re.findall(r"diptych\[(\w+)\]", page.read_text(encoding="utf-8")):
            assert f'"{name}": [' in extras, (page, name)


def test_the_list_of_licences_has_the_versions_that_are_installed():
    """`.ci/audit` also compares the list with what is installed."""
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    pinned = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pinned.items()}
    listed = re.findall(
        r"^\| ([\w.-]+) \| (\d\S*) \|", (ROOT / "docs/dependencies.md").read_text(), flags=re.MULTILINE
    )
    assert len(listed) > 100
    for name, version in listed:
        assert pinned[re.sub(r"[-_.]+", "-", name).lower()] == version, "python docs/dependency_table.py"


def test_contributing_says_what_each_file_is_for():
    spec = importlib.util.spec_from_file_location("file_table", ROOT / "docs" / "file_table.py")
    file_table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(file_table)
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = {
        f"{folder}/{name}"
        for folder, lines in re.findall(r"^### `(.+?)/`\n(.*?)(?=^#|\Z)", text, flags=re.MULTILINE | re.DOTALL)
        for name in re.findall(r"^\| `([^`]+)` \| \S", lines, flags=re.MULTILINE)
    }
    assert listed == set(file_table.listed_files()), "write the table anew: python docs/file_table.py"


def test_what_trainer_and_trl_call_settings_is_what_the_command_line_says():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").split("## What you call it")[1].split("## ")[0]
    known = {setting.name: "" for settings in (TrainRecipe, PrepareSettings) for setting in fields(settings)}
    rows = re.findall(r"^\| (`.+) \| (.+) \|$", text, flags=re.MULTILINE)
    assert len(rows) > 20
    for theirs, ours in rows:
        named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", ours))))
        for name in re.findall(r"`(\w+)`", theirs):
            answer = set(re.findall(r"\w+", other_name(name, known)))
            assert name in known or answer & named - {"diptych", "prepare"}, (name, other_name(name, known), ours)
