"""A checkpoint is whole or not there; its order is that of steps; what is read is what was written."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.commands.exit_codes import CheckpointError
from diptych.finetune.run_files import atomic_folders, checkpoints
from diptych.finetune.run_files.run_log import RunLog


def write(folder, step: int, text: str = "weights"):
    path = checkpoints.checkpoint_path(folder, step)

    def fill(partial):
        (partial / "weights").write_text(text)
        (partial / "state.json").write_text(f'{{"progress": {{"step": {step}}}}}')

    checkpoints.write_checkpoint(path, fill)
    return path


def test_latest_is_the_one_of_the_largest_step(tmp_path):
    for step in (9_000_000, 200, 1000):  # as text, "step-9000000" and "step-001000" sort otherwise
        write(tmp_path, step)
    names = [path.name for path in checkpoints.complete_checkpoints(tmp_path)]
    assert names == ["step-000200", "step-001000", "step-9000000"]
    assert checkpoints.latest_checkpoint(tmp_path).path.name == "step-9000000"


def test_weights_can_be_read_by_whom_the_umask_lets(tmp_path):
    """safetensors makes its files with the mode 0600."""
    path = checkpoints.checkpoint_path(tmp_path, 1)
    checkpoints.write_checkpoint(path, lambda at: save_file({"a": torch.ones(2)}, at / "model.safetensors"))
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o666 & ~_umask()}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


FOUND = {
    "manifest": "it has no manifest.json",
    "garbled": "its manifest.json cannot be read",
    "missing": "weights is missing",
    "short": "weights has 5 bytes instead of 7",
    "flipped": "weights is not what was written",
}


@pytest.mark.parametrize("damage, found", FOUND.items())
def test_a_damaged_checkpoint_is_passed_over_and_why_is_said(damage, found, tmp_path):
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    if damage == "manifest":
        (bad / "manifest.json").unlink()
    elif damage == "garbled":
        (bad / "manifest.json").write_text('{"weights": 3}')
    elif damage == "missing":
        (bad / "weights").unlink()
    elif damage == "short":
        (bad / "weights").write_text("weigh")
    else:
        (bad / "weights").write_text("weighTs")
    path, passed_over = checkpoints.latest_checkpoint(tmp_path)
    assert path == good and passed_over == [f"step-000002: {found}"]
    with pytest.raises(CheckpointError, match=f"step-000002 cannot be used: {found}"):
        checkpoints.check_checkpoint(bad)
    shutil.rmtree(good)
    with pytest.raises(CheckpointError, match="no checkpoint in .* is sound: step-000002"):
        checkpoints.latest_checkpoint(tmp_path)
    write(tmp_path, 2, "again")
    assert (checkpoints.latest_checkpoint(tmp_path).path / "weights").read_text() == "again"


def test_an_error_while_writing_leaves_no_checkpoint(tmp_path):
    def fail(partial):
        (partial / "weights").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoints.write_checkpoint(checkpoints.checkpoint_path(tmp_path, 5), fail)
    assert checkpoints.complete_checkpoints(tmp_path) == []


def test_a_process_killed_while_writing_leaves_only_whole_checkpoints(tmp_path):
    endless = (
        "import sys; from pathlib import Path; from diptych.finetune.run_files import checkpoints as c\n"
        "for step in range(10**6):\n"
        "    c.write_checkpoint(c.checkpoint_path(Path(sys.argv[1]), step),\n"
        "        lambda p: [(p / str(i)).write_bytes(bytes([step % 256]) * 300000) for i in range(5)]\n"
        "        + [(p / 'state.json').write_text('{\"progress\": {\"step\": %d}}' % step)])\n"
        "    c.prune_checkpoints(Path(sys.argv[1]), 2, step, None)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", endless, str(tmp_path)])
    # any later one will do: each is pruned soon, and on a busy machine this loop may come too late to see the third
    while not any(path.name >= "step-000003" for path in tmp_path.glob("step-*")) and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.random() / 10)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    whole = checkpoints.complete_checkpoints(tmp_path)
    assert whole and checkpoints.latest_checkpoint(tmp_path).path == whole[-1]
    left = {path for path in tmp_path.iterdir() if not path.name.endswith("partial")}
    assert left == set(whole)


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    checkpoints.prune_checkpoints(tmp_path, keep_last=1, newest=4, best=2)
    assert [path.name for path in checkpoints.complete_checkpoints(tmp_path)] == ["step-000002", "step-000004"]


def aliens_in(folder, sound) -> dict[str, str]:
    """What is called like a checkpoint and is none, and what is wrong with each."""
    (folder / "step-000900").write_text("mine")
    (folder / "step-000901").symlink_to(shutil.copytree(sound, folder / "elsewhere"))
    (folder / "step-000902").symlink_to(folder / "nowhere")
    (folder / "step-90").mkdir()
    (folder / "step-²").mkdir()
    shutil.copytree(sound, folder / "step-999999999")
    return {
        "step-000900": "it is no folder",
        "step-000901": "it is a link",
        "step-000902": "it is a link",
        "step-90": "training would call it step-000090",
        "step-999999999": "it is that of step 3",
    }


def test_what_is_only_called_like_a_checkpoint_is_neither_resumed_nor_kept_for_one(tmp_path):
    sound = write(tmp_path, 3)
    aliens = aliens_in(tmp_path, sound)
    path, passed_over = checkpoints.latest_checkpoint(tmp_path)
    assert path == sound and sorted(passed_over) == [f"{name}: {why}" for name, why in aliens.items()]
    later = write(tmp_path, 4)
    checkpoints.prune_checkpoints(tmp_path, keep_last=1, newest=4, best=None)
    assert later.is_dir() and not sound.exists() and all(os.path.lexists(tmp_path / name) for name in aliens)
    shutil.rmtree(later)
    with pytest.raises(
        CheckpointError, match="no checkpoint in .* is sound: .*step-90: training would call it step-000090"
    ):
        checkpoints.latest_checkpoint(tmp_path)


def test_a_checkpoint_of_a_step_that_the_run_has_not_come_to_takes_no_place(tmp_path):
    """It came into the folder while the run went on."""
    for step in (3, 4, 999_999_999):
        write(tmp_path, step)
    checkpoints.prune_checkpoints(tmp_path, keep_last=1, newest=4, best=None)
    assert checkpoints.checkpoint_steps(tmp_path) == [4, 999_999_999]


def test_what_lies_where_a_checkpoint_is_due_is_moved_and_kept(tmp_path):
    (tmp_path / "mine").mkdir()
    for step, put in ((1, lambda path: path.write_text("mine")), (2, lambda path: path.symlink_to(tmp_path / "mine"))):
        put(checkpoints.checkpoint_path(tmp_path, step))
        assert not checkpoints.checkpoint_fault(write(tmp_path, step))
    assert (tmp_path / "aside" / "step-000001-1").read_text() == "mine"
    assert (tmp_path / "aside" / "step-000002-1").resolve() == tmp_path / "mine"
    checkpoints.prune_checkpoints(tmp_path, keep_last=1, newest=2, best=None)
    aliens = aliens_in(tmp_path, write(tmp_path, 3))
    (tmp_path / "aside").rename(tmp_path / "other place")
    (tmp_path / "aside").symlink_to(tmp_path / "other place")
    with pytest.raises(UserError, match="aside is a link"):
        checkpoints.set_aside(tmp_path, after=3)
    (tmp_path / "aside").unlink()
    (tmp_path / "other place").rename(tmp_path / "aside")
    moved = checkpoints.set_aside(tmp_path, after=3)
    assert sorted(path.name for path in moved) == [f"{name}-1" for name in aliens]
    assert checkpoints.checkpoint_steps(tmp_path) == [2, 3]


def test_random_states_go_on_after_json(tmp_path):
    atomic_folders.write_json(tmp_path / "rng.json", checkpoints.random_states())
    drawn = random.random(), np.random.rand(), torch.rand(3)
    random.random(), np.random.rand(), torch.rand(3)
    checkpoints.restore_random_states(atomic_folders.read_json(tmp_path / "rng.json"))
    again = random.random(), np.random.rand(), torch.rand(3)
    assert drawn[:2] == again[:2] and torch.equal(drawn[2], again[2])


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_copy_replaces_only_what_was_copied_before(tmp_path):
    source, target = tmp_path / "model", tmp_path / "final"
    (source / "tokenizer").mkdir(parents=True)
    for text in ("first", "second"):
        (source / "weights").write_text(text)
        (source / "tokenizer" / "vocab").write_text(f"of {text}")
        atomic_folders.copy_folder(source, target)
        assert (target / "weights").read_text() == text and not atomic_folders.fault_of(target)
    (target / "README.md").write_text("mine")
    before = contents(target)
    atomic_folders.copy_folder(source, target)  # it has these files already
    assert contents(target) == before
    (source / "weights").write_text("third")
    with pytest.raises(UserError, match=r"README.md in it is not training's, and would be lost. Move .*final away"):
        atomic_folders.copy_folder(source, target)
    (target / "README.md").unlink()
    (target / "weights").write_text("edited")
    with pytest.raises(UserError, match="weights in it is not as training wrote it"):
        atomic_folders.copy_folder(source, target)
    target.rename(tmp_path / "moved")
    target.symlink_to(tmp_path / "moved")
    with pytest.raises(UserError, match="it is a link"):
        atomic_folders.copy_folder(source, target)
    assert (tmp_path / "moved" / "weights").read_text() == "edited"


def test_a_folder_of_the_users_beside_a_new_one_is_left_alone(tmp_path):
    (tmp_path / "merged.partial").mkdir()
    (tmp_path / "merged.partial" / "mine").write_text("mine")
    atomic_folders.write_folder(tmp_path / "merged", lambda folder: (folder / "weights").write_text("a"), 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "merged.partial"]
    assert (tmp_path / "merged.partial" / "mine").read_text() == "mine"


def test_a_log_that_is_a_link_or_a_pipe_is_neither_cut_nor_continued(tmp_path):
    (tmp_path / "mine").write_text("precious\n")
    for put in (lambda log: log.symlink_to(tmp_path / "mine"), os.mkfifo):
        put(tmp_path / "samples.jsonl")
        with pytest.raises(UserError, match="samples.jsonl is a link or no file"):
            RunLog(tmp_path, Accelerator(cpu=True), {})
        (tmp_path / "samples.jsonl").unlink()
    assert (tmp_path / "mine").read_text() == "precious\n"


def test_a_pipe_or_device_is_written_to_and_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "out.html")
    with ThreadPoolExecutor(1) as reader:
        read = reader.submit((tmp_path / "out.html").read_text)
        atomic_folders.write_text(tmp_path / "out.html", "a page")
        assert read.result() == "a page"
    assert (tmp_path / "out.html").is_fifo() and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "full.html").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*full.html'"):
        atomic_folders.write_text(tmp_path / "full.html", "a page")
