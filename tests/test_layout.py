"""The rules of the house, read from the source: which room may import which, what a file and a class may be called,
how large they may be. `make test` fails where one does not hold, and says where."""

import ast
import re
import subprocess
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP = ("modeling", "data_prep", "finetune")
OTHER_FOLDERS = {"benchmarks", "docs", "examples", "tests"}
ROOT_FILES = {
    *("CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "SECURITY.md", "Dockerfile"),
    *("constraints.txt", "mkdocs.yml", "pyproject.toml", "setup.py"),
}
TRAVELLING = ("configuration_diptych.py", "modeling_diptych.py")  # what goes to the Hub with every checkpoint

# From below: a room imports its own files and those of rooms before it.
DATA_ROOMS = ("command_line", "rows", "reading cleaning", "text_to_ids", "packing", "pipeline", "report")
TRAIN_ROOMS = (
    *("commands", "run_files", "model", "batches", "inference", "generating", "evaluating", "preferences", "training"),
)
WINGS = {
    *("data_prep/tokenizer_tools", "data_prep/denoise.py"),
    *(f"finetune/{name}" for name in ("inspecting", "serving", "exporting", "pairing")),
    *("finetune/several_runs", "finetune/from_python"),
}
MOST_LINES, MOST_LINES_OF_A_FUNCTION, MOST_CHILDREN = 620, 80, 16
MOST_SOURCE = 42_640  # lower it with each cut: 24,000 is what it should become


def tracked_files() -> list[Path]:
    """What git holds, or is about to; a copy without git is read as it lies."""
    run = subprocess.run(
        ["git", "ls-files", "--others", "--cached", "--exclude-standard"], cwd=ROOT, stdout=-1, text=True
    )
    if run.returncode:
        return [path for path in ROOT.rglob("*") if path.is_file()]
    return [path for path in (ROOT / line for line in run.stdout.splitlines()) if path.exists()]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


FILES = {name_of(path): path.read_text(encoding="utf-8") for top in TOP for path in sorted((ROOT / top).rglob("*.py"))}
TREES = {name: ast.parse(source) for name, source in FILES.items()}


def module_of(name: str) -> str:
    return "diptych." + name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_of(name): name for name in FILES}


def imported(name: str) -> set[str]:
    """Dotted names of what a file imports, wherever in it; a neighbour's begin with a dot."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            members = {f"{module}.{alias.name}" for alias in node.names}
            found |= (members & MODULES.keys()) | {module if members - MODULES.keys() else ""} - {""}
    return found


GRAPH = {name: {MODULES[module] for module in imported(name) if module in MODULES} - {name} for name in FILES}


def room_of(name: str) -> str:
    """The folder of a file; a file that lies at the top of data_prep or finetune is a room of its own."""
    parts = name.split("/")
    return "/".join(parts[:2])


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that can all be reached from each other."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, open_nodes = set(), [start]
        while open_nodes:
            for other in graph.get(open_nodes.pop(), set()) - seen:
                seen.add(other)
                open_nodes.append(other)
        reached[start] = seen
    groups = {frozenset(b for b in reached[a] if a in reached.get(b, ())) for a in graph if a in reached[a]}
    return [sorted(group) for group in groups]


def is_within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def below(name: str, *folders: str) -> bool:
    return any(name == folder or name.startswith(f"{folder}/") for folder in folders)


def test_no_file_and_no_room_imports_itself_by_way_of_others():
    assert not circles(GRAPH)
    rooms = defaultdict(set)
    for name, others in GRAPH.items():
        rooms[room_of(name)] |= {room_of(other) for other in others} - {room_of(name)}
    assert not circles(rooms)


@pytest.mark.parametrize("top, order", [("data_prep", DATA_ROOMS), ("finetune", TRAIN_ROOMS)])
def test_a_room_imports_only_rooms_below_it(top, order):
    rank = {f"{top}/{room}": number for number, rooms in enumerate(order) for room in rooms.split()}
    for name, others in GRAPH.items():
        inside = {room_of(other) for other in others if below(other, top) and other != f"{top}/__init__.py"}
        if room_of(name) in rank:
            assert not {room for room in inside if rank.get(room, len(order)) > rank[room_of(name)]}, name
    folders = {room_of(name) for name in FILES if below(name, top) and name.count("/") > 1}
    assert folders == rank.keys() | {wing for wing in WINGS if below(wing, top) and not wing.endswith(".py")}


def test_the_core_imports_no_wing():
    core = [name for name in FILES if not below(name, *WINGS)]
    assert not [(name, other) for name in core for other in GRAPH[name] if below(other, *WINGS)]


def test_data_preparation_knows_no_model_and_no_loop():
    forbidden = ("torch", "peft", "accelerate", "diptych.modeling", "diptych.finetune")
    for name, source in FILES.items():
        if below(name, "data_prep"):
            assert not {module for module in imported(name) if is_within(module, *forbidden)}, name
            assert not re.findall(r"\bAutoModel\w*|\b\w+ForConditionalGeneration\b", source), name


def test_training_takes_of_data_preparation_what_inference_needs():
    """So prompts are rendered, and rows laid out, by the code that made the training rows."""
    rooms = [f"data_prep/{room}" for room in ("command_line", "rows", "text_to_ids", "packing")]
    files = [f"reading/{file}" for file in ("sources", "find_files", "text_encoding", "json_rows")]
    files += ["pipeline/path_settings", "pipeline/checkpoint_tokenizer", "report/visible_text"]
    allowed = [*rooms, *(f"data_prep/{file}.py" for file in files)]
    rest = [name for name in FILES if below(name, "finetune") and not below(name, "finetune/from_python")]
    taken = {(name, other) for name in rest for other in GRAPH[name] if below(other, "data_prep")}
    assert not {pair for pair in taken if not below(pair[1], *allowed)}


def test_the_model_leans_on_torch_transformers_and_its_neighbours_only():
    allowed = ("torch", "transformers", "huggingface_hub", "safetensors")
    allowed += ("copy", "collections", "dataclasses", "difflib", "functools", "json", "pathlib", "typing")
    for name in FILES:
        if below(name, "modeling"):
            assert name.count("/") == 1  # the Hub takes files of one folder
            modules = {module for module in imported(name) if not module.startswith(".")}
            assert not {module for module in modules if not is_within(module, *allowed)}, name


@pytest.mark.parametrize("file", TRAVELLING)
def test_what_travels_imports_only_what_travels(file):
    """The Hub's resolver goes by text: `from .name import x` of the same folder, and no such words in a docstring."""
    name = f"modeling/{file}"
    neighbours = {module for module in imported(name) if module.startswith(".")}
    assert {f"{module[1:]}.py" for module in neighbours} <= set(TRAVELLING)
    by_text = re.findall(r"^\s*(?:import|from)\s+\.(\S+)", FILES[name], flags=re.MULTILINE)
    assert {f".{module}" for module in by_text} == neighbours
    assert not is_within("diptych", *imported(name))


def test_files_import_each_other_by_full_name():
    """`python finetune/train.py` has no package to be relative to."""
    rest = [name for name in FILES if not below(name, "modeling", "finetune/from_python")]
    assert not [name for name in rest for module in imported(name) if module.startswith(".")]


def test_importing_does_nothing_but_define_and_register():
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    settings = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
    for name, tree in TREES.items():
        for node in tree.body:
            where = f"{name}:{node.lineno}"
            if isinstance(node, ast.If):
                assert "__name__" in ast.unparse(node.test) or "TYPE_CHECKING" in ast.unparse(node.test), where
            elif isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
                call = ast.unparse(node.value).split("(")[0]
                assert below(name, "modeling") and call.endswith((".register", ".register_for_auto_class")), where
            else:
                assert isinstance(node, (*definitions, *settings, ast.Expr)), where


def test_every_file_opens_with_its_promise():
    assert not [name for name, tree in TREES.items() if FILES[name].strip() and not ast.get_docstring(tree)]


def test_names_mean_one_thing():
    stems = Counter(Path(name).stem for name in FILES if Path(name).stem not in ("__init__", "__main__"))
    assert not [stem for stem, count in stems.items() if count > 1]
    classes = Counter(
        node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    )
    assert not [name for name, count in classes.items() if count > 1 and not name.startswith("_")]
    drawers = re.compile(r"^(utils?|helpers?|common|misc|tools)$")
    assert not [name_of(path) for path in tracked_files() if any(map(drawers.match, path.with_suffix("").parts))]


def test_nothing_grows_too_large():
    lines = {name: source.count("\n") for name, source in FILES.items()}
    assert not [name for name, count in lines.items() if count > MOST_LINES and not name.endswith(TRAVELLING)]
    functions = [
        f"{name}:{node.lineno} {node.name}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno - node.lineno >= MOST_LINES_OF_A_FUNCTION
    ]
    assert not functions
    children = Counter(str(Path(name).parent) for name in FILES if not name.endswith("__init__.py"))
    children += Counter(str(Path(folder).parent) for folder in {str(Path(name).parent) for name in FILES})
    assert not [folder for folder, count in children.items() if count > MOST_CHILDREN]
    assert sum(lines.values()) <= MOST_SOURCE


def test_no_file_in_finetune_hides_a_library():
    """`python finetune/train.py` puts this folder first on the path."""
    libraries = {module.split(".")[0] for name in FILES for module in imported(name)} | {"inspect", "evaluate"}
    beside = {path.stem for path in (ROOT / "finetune").iterdir()}
    assert not beside & libraries


def test_the_top_level_is_as_fixed():
    entries = {path.relative_to(ROOT).parts[0] for path in tracked_files()}
    entries = {entry for entry in entries if not entry.startswith(".")}  # settings of tools
    assert entries <= set(TOP) | OTHER_FOLDERS | ROOT_FILES
    assert set(TOP) | {"tests", "setup.py", "README.md"} <= entries
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert folders <= set(TOP)


TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".jinja", ".cfg", ".sh", ""}


def test_no_file_knows_a_machines_paths():
    paths = re.compile(r"(?<![\w.])/(?:work|root|home|tmp|Users|mnt)/\w")
    for path in tracked_files():
        if path.suffix in TEXT and "tests" not in path.relative_to(ROOT).parts:
            assert not paths.search(path.read_text(encoding="utf-8")), name_of(path)
