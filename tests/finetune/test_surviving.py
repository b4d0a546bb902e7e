"""Signals, lost ranks, full disks, second starts: real processes, and what they leave behind."""

import errno
import json
import mmap
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torture import DEADLINE, Case, Torture, differences_of

from diptych.data_prep.command_line.errors import STORAGE_ERRORS, UserError
from diptych.data_prep.command_line.run_command import run_command
from diptych.data_prep.pipeline.prepared_folder import beside
from diptych.finetune.commands.exit_codes import StorageError
from diptych.finetune.run_files import atomic_folders, checkpoints
from diptych.finetune.run_files.run_folder import claimed, read_status

ALONE, TOGETHER = Case(1, "full", packed=True), Case(2, "full", packed=True)
STEPS = 60


@pytest.fixture(scope="module")
def torturer(tmp_path_factory, nursery):
    return Torture(tmp_path_factory.mktemp("surviving"), nursery)


@pytest.fixture(scope="module")
def undisturbed(torturer):
    """`undisturbed(case)`: a run of STEPS steps to compare with."""
    made = {}

    def folder(case: Case) -> Path:
        if case not in made:
            made[case] = torturer.folder / f"undisturbed-{case.ranks}"
            processes = torturer.start(case, long(torturer, case, made[case]), f"undisturbed-{case.ranks}")
            assert {process.wait(DEADLINE) for process in processes} == {0}
        return made[case]

    return folder


def long(torturer: Torture, case: Case, out: Path, **changes) -> dict:
    settings = {"max_steps": STEPS, "save_every": 5, "eval_every": 10, "metrics": "", "keep_last": 1}
    return torturer.recipe(case, out) | settings | changes


def until(condition, seconds: float = DEADLINE):
    """Waits for something that another process does."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)
    return found


def has_saved(out: Path):
    return lambda: checkpoints.checkpoint_steps(out / "checkpoints")


def run_alone(torturer, recipe: dict, name: str, code: int, **changes) -> str:
    """A run to its end, which has to have this exit code: what it said."""
    (process,) = torturer.start(ALONE, recipe, name, **changes)
    assert process.wait(DEADLINE) == code, torturer.log(name)
    return torturer.log(name)


def ends_alike(torturer, undisturbed, case: Case, recipe: dict) -> None:
    out = Path(recipe["out"])
    processes = torturer.start(case, recipe, f"{out.name}-resumed")
    assert {process.wait(DEADLINE) for process in processes} == {0}, torturer.log(f"{out.name}-resumed")
    assert not differences_of(undisturbed(case), out)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_saves_and_the_run_goes_on_with_the_same_bits(name, torturer, undisturbed, tmp_path):
    out = tmp_path / name
    recipe = long(torturer, ALONE, out)
    (process,) = torturer.start(ALONE, recipe, name)
    until(has_saved(out))
    os.kill(process.pid, getattr(signal, name))
    assert process.wait(DEADLINE) == 75, torturer.log(name)
    status, said = read_status(out), torturer.log(name)
    assert (status["state"], status["exit_code"]) == ("stopped", 75)
    assert 0 < status["step"] < STEPS and checkpoints.checkpoint_steps(out / "checkpoints")[-1] == status["step"]
    assert f"stopped by {name} after step {status['step']}, saved" in said
    assert f"go on with: diptych train --config {out / 'config.yaml'} --resume true" in said
    ends_alike(torturer, undisturbed, ALONE, recipe)


@pytest.mark.slow
def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(torturer, undisturbed, tmp_path):
    """Evaluations that take most of the time: one is cut, and comes first when the run goes on."""
    out = tmp_path / "evaluating"
    recipe = long(torturer, ALONE, out, eval_every=1, save_every=1000, max_steps=6, metrics="exact_match")
    recipe |= {"metrics_limit": 2, "eval_batch_size": 1, "max_new_tokens": 200}
    run_alone(torturer, recipe | {"out": str(tmp_path / "whole")}, "evaluating-whole", 0)
    (process,) = torturer.start(ALONE, recipe, "evaluating")
    until(lambda: (out / "metrics.jsonl").is_file() and "validation" in (out / "metrics.jsonl").read_text())
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(DEADLINE) == 75, torturer.log("evaluating")
    run_alone(torturer, recipe, "evaluating-on", 0)
    compared = ("final", "samples.jsonl", "loss.png", "metrics.jsonl")
    assert not [name for name in differences_of(tmp_path / "whole", out) if name.startswith(compared)]


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all(torturer, undisturbed, tmp_path):
    out = tmp_path / "together"
    recipe = long(torturer, TOGETHER, out)
    processes = torturer.start(TOGETHER, recipe, "together")
    until(has_saved(out))
    os.kill(processes[1].pid, signal.SIGTERM)
    assert [process.wait(DEADLINE) for process in processes] == [75, 75], torturer.log("together")
    assert "torchrun --nproc_per_node=2 -m diptych.finetune.train --config" in torturer.log("together")
    ends_alike(torturer, undisturbed, TOGETHER, recipe)


def test_a_second_ctrl_c_ends_at_once():
    script = (
        "import os, signal, time\n"
        "from diptych.finetune.training.stop_signals import StopRequest\n"
        "stop = StopRequest()\n"
        "stop.listen()\n"
        "stop.defer()\n"
        "for pause in (0.0, 0.2, 1.2):\n"
        "    time.sleep(pause)\n"
        "    print(repr(stop.reason), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["''", "'SIGINT'", "'SIGINT'"]
    assert "KeyboardInterrupt" in done.stderr


def test_a_signal_before_the_first_step_leaves_nothing_half_done(torturer, tmp_path):
    out = tmp_path / "early"
    (process,) = torturer.start(ALONE, long(torturer, ALONE, out), "early")
    until(lambda: (out / ".lock").exists())
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(DEADLINE) == 75
    steps = checkpoints.checkpoint_steps(out / "checkpoints")
    assert len(steps) == 1 or "before the first step: nothing is lost" in torturer.log("early")


def test_a_lost_rank_ends_the_others(torturer, undisturbed, tmp_path):
    out = tmp_path / "lost"
    recipe = long(torturer, TOGETHER, out)
    processes = torturer.start(TOGETHER, recipe, "lost")
    until(has_saved(out))
    os.kill(processes[1].pid, signal.SIGKILL)
    assert processes[0].wait(10) == 6, torturer.log("lost")
    said, status = torturer.log("lost"), read_status(out)
    assert "rank 0 waited for the others with the " in said and "one of 2 ranks has ended" in said
    assert "Traceback" not in said and "This is typically" not in said
    taken = [line for line in said.splitlines() if line.startswith("step ") and "loss" in line and "valid" not in line]
    lost = len(taken) - status["step"]
    assert f"Steps since the checkpoint of step {status['step']}, which are lost: {lost}.\n" in status["message"]
    assert status["exit_code"] == 6
    ends_alike(torturer, undisturbed, TOGETHER, recipe)


def test_a_rank_that_hangs_is_not_waited_for_longer_than_twice_the_timeout(torturer, tmp_path):
    out = tmp_path / "hung"
    processes = torturer.start(TOGETHER, long(torturer, TOGETHER, out, rank_timeout=4.0), "hung")
    until(has_saved(out))
    os.kill(processes[1].pid, signal.SIGSTOP)
    try:
        assert processes[0].wait(8) == 6, torturer.log("hung")
    finally:
        os.kill(processes[1].pid, signal.SIGKILL)
    assert "rank 0 waited for the others with the " in torturer.log("hung")
    assert read_status(out)["exit_code"] == 6


def launch(launcher: list[str], recipe: dict, file: Path) -> subprocess.Popen:
    file.write_text(yaml.safe_dump(recipe))
    command = [*launcher, "-m", "diptych.finetune.train", "--config", str(file), "--resume", "true"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with file.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


LAUNCHERS = {
    "accelerate": ["accelerate.commands.launch", "--num_processes", "1", "--cpu", "--mixed_precision", "no"],
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
def test_when_the_launcher_alone_is_told_to_stop_the_run_is_saved_and_no_orphan_is_left(name, torturer, tmp_path):
    out = tmp_path / name
    recipe = long(torturer, ALONE if name == "accelerate" else TOGETHER, out, max_steps=4000)
    launcher = launch([sys.executable, "-m", *LAUNCHERS[name]], recipe, tmp_path / f"{name}.yaml")
    until(has_saved(out))
    children = psutil.Process(launcher.pid).children(recursive=True)
    launcher.terminate()
    launcher.wait(DEADLINE)
    _, alive = psutil.wait_procs(children, timeout=DEADLINE)
    assert not alive
    status = until(lambda: (found := read_status(out))["exit_code"] is not None and found)
    assert status["exit_code"] == 75, (tmp_path / f"{name}.log").read_text()
    assert checkpoints.checkpoint_steps(out / "checkpoints")[-1] == status["step"]


@pytest.mark.slow
def test_a_second_start_is_refused_and_a_lock_of_a_killed_run_is_free(torturer, undisturbed, tmp_path):
    out = tmp_path / "twice"
    recipe = long(torturer, ALONE, out)
    (first,) = torturer.start(ALONE, recipe, "first")
    until(has_saved(out))
    os.kill(first.pid, signal.SIGSTOP)
    said = run_alone(torturer, recipe, "second", 2)
    assert f"is in use by another run (process {first.pid} on {socket.gethostname()}" in said
    assert read_status(out)["process"] == first.pid, "the second one has no say"
    os.kill(first.pid, signal.SIGKILL)
    ends_alike(torturer, undisturbed, ALONE, recipe)


def test_a_taken_folder_is_told_before_the_seconds_that_torch_takes():
    script = "import sys, diptych.finetune.train; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.slow
def test_a_disk_that_runs_full_leaves_the_older_checkpoint(torturer, undisturbed, tmp_path):
    """As large a file as the weights cannot be written any more."""
    out = tmp_path / "full"
    recipe = long(torturer, ALONE, out)
    (process,) = torturer.start(ALONE, recipe, "full")
    until(has_saved(out))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (300_000, 300_000))
    assert process.wait(DEADLINE) == 4, torturer.log("full")
    said = torturer.log("full")
    assert " bytes were): Error while serializing: I/O error: File too large" in said and "`ulimit -f`" in said
    assert "is untouched." in said and f"go on with: diptych train --config {out / 'config.yaml'}" in said
    assert "Traceback" not in said and read_status(out)["exit_code"] == 4
    (left,) = (out / "checkpoints").glob("step-*")
    assert not atomic_folders.fault_of(left)
    ends_alike(torturer, undisturbed, ALONE, recipe)


FAULTS = [
    (30, "EIO"),  # a file of a checkpoint
    (66, "ESTALE", "on"),  # its rename, and all that comes after it
    (109, "EROFS"),  # the removal of an old one
    *[
        pytest.param((at, error, *on), marks=pytest.mark.slow)
        for at, error, *on in (
            (8, "ENOTCONN", "on"),
            (35, "EXDEV"),
            (54, "ENOSPC", "on"),
            (66, "EXDEV"),
            (98, "EIO"),
            (115, "EIO"),
            (127, "EROFS", "on"),
            (136, "EDQUOT"),
            (140, "ESTALE"),
        )
    ],
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: " ".join(map(str, fault)))
def test_a_disk_that_fails_is_one_message_and_the_run_goes_on_with_the_same_bits(fault, torturer, tmp_path):
    out = tmp_path / "failing"
    recipe, name = torturer.recipe(ALONE, out), "failing-" + "-".join(map(str, fault))
    said = run_alone(torturer, recipe, name, 4, fault=fault)
    assert "Traceback" not in said and said.count("diptych train: ") == 2
    why = said[said.index("diptych train: ") :]
    assert (
        f"{out}" in why
        and os.strerror(getattr(errno, fault[1])) in why
        and STORAGE_ERRORS[getattr(errno, fault[1])] in why
    )
    assert not any(map(checkpoints.checkpoint_fault, (out / "checkpoints").glob("step-*")))
    run_alone(torturer, recipe, name, 0)
    assert not differences_of(torturer.reference(ALONE)[0], out)


def test_a_checkpoint_that_cannot_fit_is_not_begun(tmp_path):
    def write(folder):
        (folder / "weights").write_text("weights")

    checkpoints.write_checkpoint(checkpoints.checkpoint_path(tmp_path, 1), write)
    with pytest.raises(
        StorageError,
        match=r"step-000002 could not be written \(0 of 1,000,000,000,000,000,000 bytes .* free. Make .*\nThat of",
    ):
        checkpoints.write_checkpoint(checkpoints.checkpoint_path(tmp_path, 2), write, bytes_needed=10**18)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


@pytest.fixture(scope="module")
def ended(torturer):
    """A short run that is over, all of whose checkpoints are kept."""
    out = torturer.folder / "ended"
    run_alone(torturer, long(torturer, ALONE, out, max_steps=15, keep_last=9), "ended", 0)
    return out


@pytest.fixture
def finished(torturer, ended, tmp_path):
    """(recipe, its checkpoints): a copy of that run, to do anything with."""
    out = shutil.copytree(ended, tmp_path / "finished")
    return long(torturer, ALONE, out, max_steps=15, keep_last=9), out / "checkpoints"


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_damaged_checkpoints_are_passed_over_and_the_run_says_so(finished, torturer):
    recipe, folder = finished
    flip_a_bit(checkpoints.checkpoint_path(folder, 15) / "optimizer.safetensors")
    shutil.copytree(checkpoints.checkpoint_path(folder, 10), checkpoints.checkpoint_path(folder, 12))
    (checkpoints.checkpoint_path(folder, 12) / "rng.json").unlink()
    said = run_alone(torturer, recipe, "passing", 0)
    assert "passed over step-000015: optimizer.safetensors is not what was written" in said
    assert "passed over step-000012: rng.json is missing" in said and "goes on after step 10" in said


def test_nothing_begins_anew_where_all_checkpoints_are_damaged(finished, torturer):
    recipe, folder = finished
    for step in checkpoints.checkpoint_steps(folder):
        flip_a_bit(checkpoints.checkpoint_path(folder, step) / "model" / "model.safetensors")
    assert "no checkpoint in" in run_alone(torturer, recipe, "hopeless", 3)
    assert read_status(folder.parent)["state"] == "done"
    status = read_status(folder.parent) | {"state": "stopped", "exit_code": 75}  # as a run that has not ended
    (folder.parent / "status.json").write_text(json.dumps(status))
    run_alone(torturer, recipe, "still", 3)
    assert read_status(folder.parent)["exit_code"] == 3


def test_a_named_checkpoint_is_gone_back_to_or_is_an_error(finished, torturer):
    recipe, folder = finished
    before = {file.name: file.read_bytes() for file in (folder.parent / "final").iterdir()}
    named = checkpoints.checkpoint_path(folder, 5)
    said = run_alone(torturer, recipe, "back", 0, resume=str(named))
    assert "goes back to step-000005: 2 later checkpoints are in" in said
    assert sorted(path.name for path in (folder / "aside").iterdir()) == ["step-000010-1", "step-000015-1"]
    assert {file.name: file.read_bytes() for file in (folder.parent / "final").iterdir()} == before
    flip_a_bit(named / "state.json")
    faults = {named: "state.json is not what was written", folder / "step-7": "there is no such folder"}
    for path, fault in faults.items():
        said = run_alone(torturer, recipe, f"bad-{path.name}", 3, resume=str(path))
        assert f"{path} cannot be used: {fault}" in said


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"seed": 1, "precision": "bf16"}, ["seed 0 -> 1", "precision 'fp32' -> 'bf16'"]),
        ({"batch_size": 2}, ["rows in a step (batch_size × ranks × gradient_accumulation_steps) 4 -> 2"]),
        ({"packed": False}, ["packed True -> False"]),
        ({"model_overrides": {"hidden_size": 64}}, ["model_overrides {"]),
    ],
)
def test_another_run_is_told_key_by_key(changes, said, finished, torturer):
    recipe, folder = finished
    log = run_alone(torturer, recipe | changes, "other", 2)
    assert "this is not the run" in log and all(words in log for words in said)
    assert "changed for the rest of the run" not in log
    assert len(log[log.index("diptych train: ") :].splitlines()) <= 6
    Path(f"{torturer.folder}/other.log.0").unlink()


@pytest.mark.slow
def test_two_ranks_go_on_as_one_and_one_as_two(torturer, tmp_path):
    """The order of rows is the whole run's; without dropout, whose states are each rank's own, so are the sums."""
    quiet = {"model_overrides": {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 1}}
    quiet |= {"max_steps": 10, "epsilon": 1e-2}
    weights, expected = {}, []
    for name, first, then in (("alone", ALONE, ALONE), ("2 to 1", TOGETHER, ALONE), ("1 to 2", ALONE, TOGETHER)):
        out = tmp_path / name
        for case, steps in ((first, 5), (then, 10)):
            recipe = long(torturer, case, out, **quiet) | {"schedule": "constant", "max_steps": steps}
            processes = torturer.start(case, recipe, f"{name}-{steps}")
            assert {process.wait(DEADLINE) for process in processes} == {0}, torturer.log(f"{name}-{steps}")
        weights[name] = load_file(out / "final" / "model.safetensors")
        losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert name == "alone" or losses == pytest.approx(expected, abs=1e-5)
        expected = losses
    for name in ("2 to 1", "1 to 2"):
        for key, weight in weights[name].items():
            assert (weight - weights["alone"][key]).abs().max() <= 1e-5


def test_a_finished_run_leaves_what_else_lies_in_its_final_model(finished, torturer):
    recipe, folder = finished
    final = folder.parent / "final"
    (final / "exported").mkdir()
    for name in ("README.md", "exported/model.bin"):
        (final / name).write_text("mine")
    before = {path: path.read_bytes() for path in final.rglob("*") if path.is_file()}
    run_alone(torturer, recipe, "again", 0)
    said = run_alone(torturer, recipe | {"max_steps": 20}, "further", 2)  # which would replace the model
    assert "README.md in it is not training's, and would be lost. Move" in said
    assert read_status(folder.parent)["state"] == "done"
    assert {path: path.read_bytes() for path in final.rglob("*") if path.is_file()} == before
    assert checkpoints.checkpoint_steps(folder)[-1] == 15


def test_a_log_that_was_lost_or_shortened_is_said_and_not_filled_up(finished, torturer):
    recipe, folder = finished
    log = folder.parent / "metrics.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole[:-20])
    assert "bytes that it had at this checkpoint" in run_alone(torturer, recipe, "shorter", 0)
    assert whole.startswith(log.read_bytes()) and log.read_bytes().endswith(b"\n")
    log.unlink()
    picture = (folder.parent / "loss.png").read_bytes()
    assert f"has 0 of the {len(whole):,} bytes" in run_alone(torturer, recipe, "lost", 0)
    assert log.read_bytes() == b""
    assert (folder.parent / "loss.png").read_bytes() == picture
    log.write_bytes(b"no line of ours\n" + whole)
    assert "metrics.jsonl line 1 is no JSON" in run_alone(torturer, recipe, "garbled", 2)


@pytest.mark.parametrize("kind", ["link", "file", "folder"])
def test_what_lies_where_a_lock_is_due_is_neither_followed_nor_emptied(kind, tmp_path):
    (tmp_path / "mine").write_text("mine")
    run, prepared = tmp_path / "run", tmp_path / "prepared"
    run.mkdir()
    for lock in (run / ".lock", tmp_path / ".prepared.lock"):
        if kind == "link":
            lock.symlink_to(tmp_path / "mine")
        elif kind == "file":
            lock.write_text("mine")
        else:
            lock.mkdir()
    for alone in (claimed(run, resumes=False), beside(prepared)):
        with pytest.raises(UserError, match="is a link, or no file|is no lock, and would be overwritten"), alone:
            raise AssertionError("it was taken")
    assert (tmp_path / "mine").read_text() == "mine" and not prepared.exists()
    assert kind != "file" or (run / ".lock").read_text() == (tmp_path / ".prepared.lock").read_text() == "mine"


@pytest.mark.slow
def test_training_goes_on_when_nobody_reads_what_it_says(torturer, tmp_path):
    out = tmp_path / "unread"
    recipe = long(torturer, ALONE, out, max_steps=4)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    command = f"{sys.executable} -m diptych.finetune.train --config {file} 2>&1 | true; exit ${{PIPESTATUS[0]}}"
    assert subprocess.run(["bash", "-c", command], timeout=DEADLINE).returncode == 0
    assert read_status(out)["state"] == "done" and (out / "final" / "config.json").is_file()


def lost_in_a_loader():
    try:
        torch.empty(2**48)
    except RuntimeError as error:
        raise UserError("the weights could not be read") from error


def written_to_a_full_disk():
    with open("/dev/full", "w") as file:
        file.write("text")


def without_a_thread():
    raise RuntimeError("can't start new thread")


def lost_in_a_folder():
    try:
        written_to_a_full_disk()
    except OSError as error:
        raise UserError("the folder could not be written") from error


@dataclass
class Nothing:
    pass


ENDED = {
    "an allocation of torch": (lambda: torch.empty(2**48), "out of memory: "),
    "an allocation of Python": (lambda: bytearray(2**60), "out of memory: MemoryError. Use a machine with more"),
    "a map of the system": (lambda: mmap.mmap(-1, 2**60), "out of memory: "),
    "a thread": (without_a_thread, "out of memory: can't start new thread. Use a machine with more"),
    "behind a loader's message": (lost_in_a_loader, "out of memory: the weights could not be read. Use a machine"),
    "a disk": (written_to_a_full_disk, "No space left on device. Make room on this disk, or name another."),
    "a disk behind a message": (lost_in_a_folder, "the folder could not be written"),
}


@pytest.mark.parametrize("work, said", ENDED.values(), ids=ENDED)
def test_whatever_has_no_memory_or_no_disk_is_one_message_and_code_4(work, said, capsys):
    assert run_command("diptych generate", lambda argv: Nothing(), lambda settings: work(), []) == 4
    assert capsys.readouterr().err.startswith(f"diptych generate: {said}")


FULL = """
import dataclasses, resource
from diptych.data_prep.command_line.run_command import run_command

def fill(settings):
    held = []
    for size in (2**22, 2**12, 2**7, 1):
        try:
            while True:
                held.append([None] * size)
        except MemoryError:
            if size == 1:
                raise

resource.setrlimit(resource.RLIMIT_AS, (3 * 10**8, 3 * 10**8))
raise SystemExit(run_command("diptych generate", lambda argv: dataclasses.make_dataclass("Nothing", [])(), fill, []))
"""


def test_the_message_has_memory_where_there_is_none():
    ended = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, timeout=DEADLINE)
    assert ended.returncode == 4 and ended.stderr.startswith("diptych generate: out of memory: MemoryError. Use a")


WITHOUT_ROOTS_RIGHTS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner", "--inh-caps=-all"]
IN_A_NAMESPACE = ["unshare", "--mount", "sh", "-c"]


def train_as(prefix: list[str], recipe: dict, file: Path) -> tuple[int, str]:
    """Exit code and messages of a process of its own; the words are put before the command."""
    file.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "diptych.finetune.train", "--config", str(file), "--resume", "true"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*prefix, *command], capture_output=True, text=True, env=environment, timeout=DEADLINE)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "place, mode",
    [
        (".lock", 0o444),
        *(
            pytest.param(*rest, marks=pytest.mark.slow)
            for rest in [("status.json", 0o000), (".", 0o555), ("checkpoints", 0o555)]
        ),
    ],
)
def test_a_run_of_another_user_is_one_message_and_is_left_as_it_is(place, mode, finished, torturer, tmp_path):
    """Who may not write to `checkpoints` is told at the start, not at the first checkpoint."""
    recipe, folder = finished
    out = folder.parent
    status = read_status(out) | {"state": "stopped", "exit_code": 75}
    (out / "status.json").write_text(json.dumps(status))
    (out / place).chmod(mode)
    prefix = WITHOUT_ROOTS_RIGHTS if os.geteuid() == 0 else []
    code, said = train_as(prefix, recipe | {"max_steps": 40}, tmp_path / "other.yaml")
    (out / place).chmod(0o755)
    assert (
        code == 2 and f"diptych train: {out / place}" in said and "Permission denied. Get yourself the right" in said
    )
    assert checkpoints.checkpoint_steps(folder)[-1] == 15 and "step 16/" not in said
    assert place == "checkpoints" or read_status(out)["step"] == 15  # who may write there says how it ended


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
@pytest.mark.parametrize(
    "mount, said",
    [
        (
            "mount --bind {out} {out} && mount -o remount,ro,bind {out}",
            ".lock: Read-only file system. This disk can only",
        ),
        ("mount -t tmpfs -o size=60k none {out}", "No space left on device. Make room"),
        ("mount -t tmpfs -o size=9m none {out}", "step-000005 could not be written (0 of 18,"),
    ],
)
def test_a_small_disk_or_a_read_only_one_is_one_message(mount, said, torturer, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    prefix = [*IN_A_NAMESPACE, f'{mount.format(out=out)} && exec "$@"', "sh"]
    code, log = train_as(prefix, long(torturer, ALONE, out, eval_every=5), tmp_path / "small.yaml")
    assert code == 4 and said in log, log


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_status_that_is_damaged_is_written_anew(content, tmp_path):
    (tmp_path / "status.json").write_text(content)
    (tmp_path / "config.yaml").write_text("seed: 0")
    with pytest.raises(UserError, match="mine"), claimed(tmp_path, resumes=True):
        raise UserError("mine")
    assert read_status(tmp_path)["message"] == "mine" and read_status(tmp_path)["exit_code"] == 2


def test_a_status_that_cannot_be_written_does_not_hide_why_the_run_ended(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("seed: 0")
    (tmp_path / "status.json.0.partial").mkdir(parents=True)
    with pytest.raises(UserError, match="mine"), claimed(tmp_path / "run", resumes=True) as status:
        status.folder = tmp_path
        status.has_begun = True
        raise UserError("mine")
    assert "status.json does not say how the run ended" in capsys.readouterr().err
