"""The rules that keep the rooms apart, read from the source itself."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("modeling", "data_prep", "finetune")
OTHER_FOLDERS = {"benchmarks", "docs", "examples", "tests"}
ROOT_FILES = {
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "constraints.txt",
    "pyproject.toml",
    "setup.py",
}
TRAVELLING = ("configuration_diptych.py", "modeling_diptych.py")  # what goes to the Hub with every checkpoint


def tracked_files() -> list[Path]:
    """What git holds, or is about to; a copy without git is read as it lies."""
    run = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        return [path for path in ROOT.rglob("*") if path.is_file()]
    return [path for path in (ROOT / line for line in run.stdout.splitlines()) if path.exists()]


def source_files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


ALL_SOURCES = [path for room in ROOMS for path in source_files(room)]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, wherever in it; a neighbour's begin with a dot."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found.add(module)
            if module.startswith("diptych") or not node.module:  # `from diptych.data_prep.rows import records`
                found |= {f"{module}.{alias.name}".replace("..", ".") for alias in node.names}
    return found


def is_within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("path", source_files("modeling"), ids=name_of)
def test_the_model_leans_on_torch_transformers_and_its_neighbours_only(path):
    libraries = ("torch", "transformers", "huggingface_hub", "safetensors")
    if path.name == "pipeline_diptych.py":
        libraries = (*libraries, "jinja2")  # which torch brings
    allowed = (*libraries, "copy", "collections", "dataclasses", "difflib", "functools", "json", "pathlib", "typing")
    strangers = {module for module in imports(path) if not module.startswith(".") and not is_within(module, *allowed)}
    assert not strangers


@pytest.mark.parametrize("name", TRAVELLING)
def test_what_travels_imports_only_what_travels(name):
    """The Hub's resolver goes by text: `from .name import x` of the same folder, and no such words in a docstring."""
    source = (ROOT / "modeling" / name).read_text(encoding="utf-8")
    neighbours = {module for module in imports(ROOT / "modeling" / name) if module.startswith(".")}
    assert {f"{module[1:]}.py" for module in neighbours} <= set(TRAVELLING)
    by_text = re.findall(r"^\s*(?:import|from)\s+\.(\S+)", source, flags=re.MULTILINE)
    assert {f".{module}" for module in by_text} == neighbours
    assert not is_within("diptych", *imports(ROOT / "modeling" / name))


def test_the_models_folder_is_flat():
    assert not [path for path in source_files("modeling") if path.parent != ROOT / "modeling"]


@pytest.mark.parametrize("path", source_files("data_prep"), ids=name_of)
def test_data_preparation_knows_no_model_and_no_loop(path):
    forbidden = ("torch", "peft", "accelerate", "diptych.modeling", "diptych.finetune")
    assert not {module for module in imports(path) if is_within(module, *forbidden)}
    models = re.findall(r"\bAutoModel\w*|\b\w+ForConditionalGeneration\b", path.read_text(encoding="utf-8"))
    assert not models


@pytest.mark.parametrize("path", source_files("finetune"), ids=name_of)
def test_the_loop_takes_of_data_preparation_only_what_inference_needs(path):
    """So prompts are rendered, and rows laid out, by the code that made the training rows. `pair` makes
    templates; prompts in a table are read as training rows are."""
    allowed = [
        "diptych.data_prep." + name
        for name in (
            "records",
            "templates",
            "conversations",
            "encode",
            "languages",
            "decoder_start",
            "packing",
            "extend_tokenizer",
            "hub",
            "text_shown",
            "named_splits",
            "two_vocabularies",
        )
    ]
    # Every command line is read, and its mistakes told, in one way.
    allowed += [
        "diptych.data_prep.command_line.arguments",
        "diptych.data_prep.command_line.run_command",
        "diptych.data_prep.command_line.own_files",
    ]
    if path.name == "pair.py":
        allowed.append("diptych.finetune.pairing.donor_template")
    if path.name == "generate_file.py":
        allowed.append("diptych.data_prep.reading.sources")
    taken = {module for module in imports(path) if is_within(module, "diptych.data_prep") and module.count(".") > 1}
    assert not {module for module in taken if not is_within(module, *allowed)}


@pytest.mark.parametrize("path", source_files("finetune") + source_files("data_prep"), ids=name_of)
def test_rooms_import_each_other_by_full_name(path):
    """`python finetune/train.py` has no package to be relative to."""
    assert not {module for module in imports(path) if module.startswith(".")}


DOCSTRING_OR_SETTING = (ast.Expr, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
DEFINITION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@pytest.mark.parametrize("path", ALL_SOURCES, ids=name_of)
def test_importing_does_nothing_but_define_and_register(path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.If):
            assert "__name__" in ast.unparse(node.test) or "TYPE_CHECKING" in ast.unparse(node.test), node.lineno
        elif isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
            call = ast.unparse(node.value).split("(")[0]
            assert path.parent.name == "modeling" and call.endswith((".register", ".register_for_auto_class")), call
        else:
            assert isinstance(node, DOCSTRING_OR_SETTING + DEFINITION), f"line {node.lineno}"


@pytest.mark.parametrize("path", ALL_SOURCES, ids=name_of)
def test_every_file_opens_with_its_promise(path):
    source = path.read_text(encoding="utf-8")
    assert not source.strip() or ast.get_docstring(ast.parse(source))


def test_there_are_no_drawers():
    drawers = re.compile(r"^(utils?|helpers?|common|misc|tools)$")
    assert not [name_of(path) for path in tracked_files() if any(map(drawers.match, path.with_suffix("").parts))]


def test_no_file_in_finetune_hides_a_library():
    """`python finetune/train.py` puts this folder first on the path."""
    libraries = {module.split(".")[0] for path in ALL_SOURCES for module in imports(path)} | {"inspect", "evaluate"}
    assert not {path.stem for path in source_files("finetune")} & libraries


def test_the_top_level_is_as_fixed():
    entries = {path.relative_to(ROOT).parts[0] for path in tracked_files()}
    entries = {entry for entry in entries if not entry.startswith(".")}  # settings of tools
    assert entries <= set(ROOMS) | OTHER_FOLDERS | ROOT_FILES
    assert set(ROOMS) | {"tests", "setup.py", "README.md"} <= entries


def test_tests_mirror_the_rooms():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert folders <= set(ROOMS) | {"benchmarks"}


TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".jinja", ".cfg", ".sh", ""}


def test_no_file_knows_a_machines_paths():
    paths = re.compile(r"(?<![\w.])/(?:work|root|home|tmp|Users|mnt)/\w")
    for path in tracked_files():
        if path.suffix in TEXT and "tests" not in path.relative_to(ROOT).parts:
            assert not paths.search(path.read_text(encoding="utf-8")), name_of(path)
