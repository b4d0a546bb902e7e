"""Preparation in tasks of datatrove: the same dataset to the byte, on this machine, in processes that know nothing of
each other, and after a task has failed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import dill
import pyarrow
import pytest
from datatrove.executor import LocalPipelineExecutor

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.pipeline.datatrove_rows import rows_step
from diptych.data_prep.pipeline.parallel_parts import part_path, write_part
from diptych.data_prep.prepare import main

COUNTS = ("rows", "rejected_by_kind", "first_rejected", "splits", "groups", "conflicts", "tokens", "packing", "inputs")
COUNTS += ("template", "warnings", "fingerprint")


def row_of(file, number):
    return {
        "instruction": f"Say {file} {number}.",
        "input": f"it is {number} " * (number % 5),
        "output": f"It is {number % 90}.",
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One file of three chunks, with rows of every fate: broken, with a byte that is no UTF-8, empty, with a doubtful
    content, twice. And two small ones."""
    folder = tmp_path_factory.mktemp("rows")
    lines = [json.dumps(row_of("a", number)).encode() for number in range(6000)]
    for number in range(0, 6000, 150):
        lines[number] = b'{"instruction": "caf\xe9 %d", "output": "b"}' % number
        lines[number + 1] = json.dumps({"instruction": f"Nothing {number}.", "output": ""}).encode()
        lines[number + 2] = lines[3]
        lines[number + 4] = json.dumps(
            {"instruction": f"Mail {number}.", "output": f"me{number}@example.org"}
        ).encode()
    (folder / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    for name in "bc":
        rows = [row_of(name, number) for number in range(60)]
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "eval.jsonl").write_text(json.dumps(row_of("a", 5)) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def prepare(tmp_path, capfd):
    """prepare(*words, out="name") → exit code and standard error; the folder is tmp_path / name."""

    def run(*words, out):
        code = main([*map(str, words), "--out", str(tmp_path / out)])
        return code, capfd.readouterr().err

    return run


def contents(folder):
    """Every file of tables, and the rejects, as bytes; of the manifest what does not name the folder."""
    names = [path for path in folder.rglob("*") if path.suffix == ".arrow" or path.name.endswith(".jsonl")]
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in names}
    return files, {name: manifest[name] for name in COUNTS}


def sixteen_files(folder, rows=12):
    folder.mkdir()
    for file in range(16):
        lines = [json.dumps(row_of(f"f{file}", number)) for number in range(rows)]
        lines[3] = "{broken"
        (folder / f"{file:02d}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.slow
def test_four_tasks_of_two_workers_make_the_dataset_of_one_process(folder, bpe_folder, prepare, tmp_path):
    words = ["--data", *(folder / name for name in ("a.jsonl", "b.json", "c.json")), "--tokenizer", bpe_folder]
    words += ["--near_duplicates", "0.9", "--sensitive", "--decontaminate", folder / "eval.jsonl"]
    assert prepare(*words, "--workers", 1, out="local")[0] == 0
    code, said = prepare(*words, "--engine", "datatrove", "--tasks", 4, "--workers", 2, out="datatrove")
    assert code == 0 and "4/4 tasks completed" in said
    assert contents(tmp_path / "datatrove") == contents(tmp_path / "local")
    files, manifest = contents(tmp_path / "local")
    assert {"train/data-00000-of-00001.arrow", "packed/data-00000-of-00001.arrow", "rejects.jsonl"} <= files.keys()
    assert {"invalid UTF-8", "empty output", "exact duplicate"} <= manifest["rejected_by_kind"].keys()
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("local", "datatrove")]
    for part in ("sensitive", "scripts", "duplicates", "contamination", "removed", "lengths"):
        assert reports[0][part] == reports[1][part], part
    assert reports[0]["sensitive"] and reports[0]["contamination"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["datatrove", "local"]  # nothing is left beside them


def test_a_tokenizer_is_trained_on_the_same_rows(folder, prepare, tmp_path):
    words = ["--data", folder / "b.json", folder / "c.json", "--train_tokenizer", "bpe", "--vocab_size", 400]
    assert prepare(*words, out="local")[0] == 0
    for task in range(3):
        list(write_part(rows_step([*map(str, words)], "unused").job, tmp_path / "parts", task, 3))
    assert prepare(*words, "--gathered", tmp_path / "parts", out="gathered")[0] == 0
    assert contents(tmp_path / "gathered") == contents(tmp_path / "local")
    one, other = ((tmp_path / name / "tokenizer" / "tokenizer.json").read_bytes() for name in ("local", "gathered"))
    assert one == other


@pytest.mark.parametrize("tasks", [4, 5, 40])
def test_few_tasks_take_whole_files_and_many_take_chunks(bpe_folder, prepare, tmp_path, tasks):
    """Sixteen files: up to four tasks each read their own alone; of forty some have nothing to do."""
    words = ["--data", sixteen_files(tmp_path / "rows"), "--tokenizer", bpe_folder, "--packing", "false"]
    assert prepare(*words, out="local")[0] == 0
    work = rows_step([*map(str, words)], "unused").job
    rows = [sum(it.examples_read for it in write_part(work, tmp_path / "parts", task, tasks)) for task in range(tasks)]
    assert sum(rows) == 16 * 12
    assert prepare(*words, "--gathered", tmp_path / "parts", out="gathered")[0] == 0
    assert contents(tmp_path / "gathered") == contents(tmp_path / "local")


def test_a_task_that_failed_is_run_again_alone(bpe_folder, prepare, tmp_path):
    """The ninth file is another when its task reads it, and is put back."""
    words = ["--data", sixteen_files(tmp_path / "rows"), "--tokenizer", bpe_folder]
    assert prepare(*words, out="local")[0] == 0
    step = rows_step([*map(str, words)], tmp_path / "parts")
    path = tmp_path / "rows" / "10.jsonl"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"Say f10 5.", b"Sag f10 5."))
    settings = {"tasks": 4, "workers": 1, "logging_dir": str(tmp_path / "parts" / "logs")}
    with pytest.raises(UserError, match=r"10\.jsonl changed while it was read"):
        LocalPipelineExecutor([step], **settings).run()
    assert (tmp_path / "parts" / "logs" / "executor.json").stat().st_size < 10_000  # what the engine writes down
    ended = [part_path(tmp_path / "parts", task, 4).is_file() for task in range(4)]
    assert ended == [True, True, False, False]  # file 10 is that of task 2
    path.write_bytes(content)
    code, said = prepare(*words, "--gathered", tmp_path / "parts", out="gathered")
    assert code == 2 and "part-00002-of-00004.arrow is missing" in said and "Run task 2 again" in said
    before = {task: part_path(tmp_path / "parts", task, 4).stat().st_mtime_ns for task in range(2)}
    LocalPipelineExecutor([step], **settings).run()
    assert {task: part_path(tmp_path / "parts", task, 4).stat().st_mtime_ns for task in range(2)} == before
    assert sorted(path.name for path in (tmp_path / "parts").iterdir() if path.name.startswith(".")) == []
    assert prepare(*words, "--gathered", tmp_path / "parts", out="gathered")[0] == 0
    assert contents(tmp_path / "gathered") == contents(tmp_path / "local")


def test_a_run_that_broke_off_keeps_its_parts_and_goes_on(bpe_folder, prepare, tmp_path, monkeypatch):
    """A part that was lost after its task had ended is made again too."""
    words = ["--data", sixteen_files(tmp_path / "rows"), "--tokenizer", bpe_folder]
    words += ["--engine", "datatrove", "--tasks", 4, "--workers", 1]
    code, said = prepare(
        *words, "--strict", out="prepared"
    )  # tasks end; the first reject is met when parts are merged
    assert code == 2 and "00.jsonl:4" in said
    [parts] = (tmp_path / ".prepared.parts").iterdir()
    lost = part_path(parts, 1, 4)
    lost.unlink()
    made = {task: part_path(parts, task, 4).stat().st_mtime_ns for task in (0, 2, 3)}
    copies = []
    replaced = Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, to: copies.append(Path(to).name) or replaced(path, to))
    assert prepare(*words, out="prepared")[0] == 0
    assert [name for name in copies if name.startswith("part-")] == [lost.name]
    assert len(made) == 3 and not (tmp_path / ".prepared.parts").exists()


# Parts that are not what they should be


@pytest.fixture(scope="module")
def parts_made(bpe_folder, tmp_path_factory):
    """Words, work, and a folder with three parts of two files, of several chunks each."""
    folder = tmp_path_factory.mktemp("parts")
    rows = [row_of("a", number) for number in range(4500)]
    for name in "ab":
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    words = ["--data", str(folder / "a.json"), str(folder / "b.json"), "--tokenizer", str(bpe_folder)]
    words += ["--packing", "false"]
    work = rows_step(words, "unused").job
    for task in range(3):
        list(write_part(work, folder / "parts", task, 3))
    return words, work, folder / "parts"


@pytest.fixture
def parts(parts_made, tmp_path):
    """The same, to be harmed."""
    words, work, folder = parts_made
    return words, work, shutil.copytree(folder, tmp_path / "parts")


def without_a_batch(path, number):
    """As if a chunk had been lost on the way."""
    read = pyarrow.ipc.open_stream(path.read_bytes())
    batches = list(read.iter_batches_with_custom_metadata())
    with pyarrow.ipc.new_stream(str(path), read.schema) as stream:
        for place, (batch, beside) in enumerate(batches):
            if place != number:
                stream.write_batch(batch, beside)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-2000])


HARMS = {
    "part-00001-of-00003.arrow is missing. Run task 1 again": lambda one, two, three: two.unlink(),
    "has no parts in it": lambda *parts: [part.unlink() for part in parts],
    "parts of runs with 3 and 4 tasks": lambda one, two, three: two.rename(part_path(two.parent, 1, 4)),
    "part-00002-of-00003.arrow is cut off": lambda one, two, three: cut_off(three),
    "part-00000-of-00003.arrow cannot be read": lambda one, two, three: one.write_bytes(b"nothing"),
    "part-00000-of-00003.arrow does not fit": lambda one, two, three: without_a_batch(one, 0),
    "part-00001-of-00003.arrow does not fit": lambda one, two, three: without_a_batch(two, 1),
    "of-00003.arrow is cut off": lambda one, two, three: without_a_batch(three, 2),
    "00000-of-00003.arrow does not fit": lambda one, two, three: one.write_bytes(two.read_bytes()),
}


@pytest.mark.parametrize("said", HARMS)
def test_a_part_that_is_not_whole_is_named(parts, prepare, tmp_path, said):
    words, _, folder = parts
    HARMS[said](*(part_path(folder, task, 3) for task in range(3)))
    code, complained = prepare(*words, "--gathered", folder, out="gathered")
    assert code == 2 and said in complained
    assert not (tmp_path / "gathered").exists()


def test_parts_of_other_settings_or_data_are_refused(parts, prepare, tmp_path):
    words, _, folder = parts
    code, said = prepare(*words, "--template", "plain", "--gathered", folder, out="gathered")
    assert code == 2 and "made of other data, with other settings" in said
    path = Path(words[2])
    content = path.read_bytes()
    path.write_bytes(content.replace(b"Say a 7.", b"Sag a 7."))
    code, said = prepare(*words, "--gathered", folder, out="gathered")
    path.write_bytes(content)
    assert code == 2 and "made of other data, with other settings" in said


def test_a_task_that_is_stopped_leaves_nothing_half(parts):
    _, work, folder = parts
    for path in folder.iterdir():
        path.unlink()
    batches = write_part(work, folder, 0, 3)
    next(batches)
    batches.close()
    assert list(folder.iterdir()) == []


RUN_TASK = "import dill, sys; list(dill.loads(sys.stdin.buffer.read()).run(None, 1, 3))"


@pytest.mark.slow
def test_a_step_travels_to_another_process_as_the_engine_sends_it(parts, tmp_path):
    """datatrove pickles with dill, and Slurm's tasks are processes that read it."""
    words, _, folder = parts
    sent = dill.dumps(rows_step(words, tmp_path / "sent"))
    subprocess.run([sys.executable, "-c", RUN_TASK], input=sent, check=True)
    assert part_path(tmp_path / "sent", 1, 3).read_bytes() == part_path(folder, 1, 3).read_bytes()


# Settings


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--engine", "spark"], "engine is 'spark'; it can be local or datatrove"),
        (["--tasks", "4"], "Add --engine datatrove"),
        (["--engine", "datatrove", "--tasks", "-1"], "tasks is -1"),
        (["--engine", "datatrove", "--gathered", "parts"], "Drop one"),
        (["--gathered", "nowhere"], "has no parts in it"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(folder, bpe_folder, prepare, words, said):
    code, complained = prepare("--data", folder / "b.json", "--tokenizer", bpe_folder, *words, out="prepared")
    assert code == 2 and said in complained


def test_without_datatrove_the_extra_is_named(folder, bpe_folder, prepare, monkeypatch):
    monkeypatch.delitem(sys.modules, "diptych.data_prep.pipeline.datatrove_rows")
    monkeypatch.setitem(sys.modules, "datatrove.data", None)
    words = ["--data", folder / "b.json", "--tokenizer", bpe_folder, "--engine", "datatrove"]
    code, said = prepare(*words, out="prepared")
    assert code == 2 and "pip install 'diptych[datatrove]'" in said
