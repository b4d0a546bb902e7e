"""A share of what `make torture` does: runs are killed at random, and end as those that nobody disturbed.

And what makes that a proof: each thing that a checkpoint holds is missed, or makes another run, where it is taken
away.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from spoiled_run_files import forge
from torture import CASES, DEADLINE, Case, Tally, Torture, differences_of, table

from diptych.finetune.run_files import atomic_folders, checkpoints

SOME = [case for case in CASES if case.optimizer != "adamw" or case.packed == (case.method == "lora")]


@pytest.fixture(scope="module")
def torturer(tmp_path_factory, nursery):
    return Torture(tmp_path_factory.mktemp("torture"), nursery, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("case", SOME, ids=str)
def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(case, torturer):
    tally = Tally()
    while not tally.kills:
        torturer.run(case, 2, tally)
    assert tally.identical == tally.runs
    assert f"{case!s:32}{tally.kills:>7}" in table({case: tally})


CASE = Case(1, "full", packed=True)


@pytest.fixture(scope="module")
def whole(torturer):
    """A finished run that has kept its checkpoints."""
    out = torturer.folder / "whole"
    (process,) = torturer.start(CASE, torturer.recipe(CASE, out) | {"keep_last": 9}, "whole")
    assert process.wait(DEADLINE) == 0, torturer.log("whole")
    return out


@pytest.fixture
def halfway(torturer, whole, tmp_path):
    """The undisturbed run; a copy of the finished one as it was after step 4, and the recipe that resumes it."""
    reference, _ = torturer.reference(CASE)
    out = shutil.copytree(whole, tmp_path / "run")
    for step in checkpoints.checkpoint_steps(out / "checkpoints"):
        if step > 4:
            shutil.rmtree(checkpoints.checkpoint_path(out / "checkpoints", step))
    recipe = torturer.recipe(CASE, out) | {"keep_last": 9}
    return reference, out, checkpoints.checkpoint_path(out / "checkpoints", 4), recipe


def without(tensors_or_json, key):
    return {name: value for name, value in tensors_or_json.items() if name != key}


def change_json(file, change):
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def change_tensors(file, change):
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def change_progress(file, name, value):
    change_json(file, lambda state: state | {"progress": state["progress"] | {name: value}})


def garble_torch_state(states):
    states[0]["torch"] = states[0]["torch"][:-8] + "AAAAAAA="
    other = checkpoints.random_states()
    return [states[0] | {"torch": other["torch"]}]


TAKEN_AWAY = {
    "the model's weights": lambda saved: (saved / "model" / "model.safetensors").unlink(),
    "the model's config": lambda saved: (saved / "model" / "config.json").unlink(),
    "one weight": lambda saved: change_tensors(
        saved / "model" / "model.safetensors", lambda weights: without(weights, sorted(weights)[3])
    ),
    "the optimizer": lambda saved: (saved / "optimizer.safetensors").unlink(),
    "one mean of the optimizer": lambda saved: change_tensors(
        saved / "optimizer.safetensors", lambda states: without(states, sorted(states)[0])
    ),
    "what the optimizer knows": lambda saved: change_tensors(
        saved / "optimizer.safetensors", lambda states: {name: torch.zeros_like(it) for name, it in states.items()}
    ),
    "the random states": lambda saved: (saved / "rng.json").unlink(),
    "torch's random state": lambda saved: change_json(saved / "rng.json", garble_torch_state),
    "python's random state": lambda saved: change_json(
        saved / "rng.json", lambda states: [without(states[0], "python")]
    ),
    "the state": lambda saved: (saved / "state.json").unlink(),
    "the length of the logs": lambda saved: change_json(
        saved / "state.json", lambda state: state | {"written": without(state["written"], "metrics.jsonl")}
    ),
    "the facts of the run": lambda saved: change_json(saved / "state.json", lambda state: without(state, "run")),
    "the scaler": lambda saved: change_json(saved / "state.json", lambda state: without(state, "scaler")),
    "the best value": lambda saved: change_progress(saved / "state.json", "best", 0.0),
    "the tokens so far": lambda saved: change_progress(saved / "state.json", "tokens", 0),
    "the sum of the loss": lambda saved: change_progress(saved / "state.json", "nats", 1.0),
    "the step": lambda saved: change_progress(saved / "state.json", "step", 3),
    "the number of evaluations": lambda saved: change_json(
        saved / "state.json",
        lambda state: state | {"progress": without(state["progress"], "evaluations_without_gain")},
    ),
}


@pytest.mark.parametrize("what", [*TAKEN_AWAY, "nothing"])
def test_nothing_that_a_checkpoint_holds_can_be_missing(what, torturer, halfway):
    """With a manifest that was written anew to fit, so that only what is read can tell."""
    reference, out, saved, recipe = halfway
    state = (saved / "state.json").read_bytes()
    if what != "nothing":
        TAKEN_AWAY[what](saved)
        assert atomic_folders.fault_of(saved)
    atomic_folders.write_manifest(saved)
    if (saved / "state.json").exists() and (saved / "state.json").read_bytes() == state:
        assert bool(checkpoints.checkpoint_fault(saved)) == (what != "nothing")  # as if it were another run's
    forge(saved)
    name = f"resumed-{out.parent.name}"
    code = torturer.start(CASE, recipe, name, resume=str(saved))[0].wait(DEADLINE)
    log = torturer.log(name)
    differences = [it for it in differences_of(reference, out) if "step-000009" in it or "step-" not in it]
    if what == "nothing":
        assert code == 0 and not differences, log
    elif code == 0:
        assert differences, log
    else:
        assert code in (2, 3) and "Traceback" not in log and "diptych train: " in log, log
