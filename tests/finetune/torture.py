"""Runs that are killed again and again, and must end as if nothing had happened.

    python tests/finetune/torture.py --kills 100 --kills_on_two_ranks 75        what `make torture` does

Each run is killed several times, at a random moment or before a change to the disk that is counted out, and goes on
each time from what is there. After each kill, whatever is visible as a checkpoint must be whole, and none may be gone
that was there before without a newer one. In the end weights, optimizer, random states, figures, samples, plot and
final model must be those of a run that nobody disturbed, to the bit. On two ranks (each with the whole model, or with
its share of a sharded one) one of them is killed, and the other must end by itself, with exit code 6.
"""

import argparse
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))  # where pytest puts it, too

from nursery import Nursery, Process

from diptych.data_prep.pipeline.prepare_settings import PrepareSettings
from diptych.data_prep.prepare import prepare
from diptych.finetune.run_files import atomic_folders, checkpoints

DEADLINE = 120.0
"""Seconds in which a run of a few steps ends, on a busy machine."""
KILLS_A_RUN = 5
MEASURED = ("tokens_per_second", "mfu", "memory_bytes")

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
ROWS = [
    {"instruction": "Add.", "input": f"{one} and {other}", "output": f"{one} plus {other}, which is {a + b + 2}"}
    for a, one in enumerate(NUMBERS)
    for b, other in enumerate(NUMBERS[:4])
]


class Case(NamedTuple):
    ranks: int
    method: str
    packed: bool
    sharding: str = "none"
    optimizer: str = "adamw"

    def __str__(self) -> str:
        kind = f"{self.method}, {'packed' if self.packed else 'padded'}{', sharded' * (self.sharding == 'full')}"
        kind += "" if self.optimizer == "adamw" else f", {self.optimizer}"
        return f"{self.ranks} rank{'s' * (self.ranks > 1)}, {kind}"


CASES = [Case(ranks, method, packed) for ranks in (1, 2) for method in ("full", "lora") for packed in (True, False)]
CASES += [Case(2, "full", packed=True, sharding="full"), Case(2, "lora", packed=False, sharding="full")]
OPTIMIZERS = {
    "adamw": {},
    "schedule_free": {"optimizer": "schedule_free", "schedule": "constant"},
    "muon": {"optimizer": "muon", "ema": 0.9, "neftune": 5.0, "skip_spikes": 100.0},
    "adafactor": {"optimizer": "adafactor", "final": "average"},
    "adamw_8bit": {"optimizer": "adamw_8bit", "schedule": "inverse_sqrt"},
    "bf16": {"weights": "bf16", "precision": "bf16"},
}
"""With what else resumes by numbers of its own."""
if importlib.util.find_spec("bitsandbytes") is None:
    del OPTIMIZERS["adamw_8bit"]
CASES += [Case(1, "full", True, optimizer=name) for name in OPTIMIZERS if name != "adamw"]


@dataclass
class Tally:
    """What was done to the runs of one case, and how they ended."""

    runs: int = 0
    kills: int = 0
    inside_a_save: int = 0
    identical: int = 0


class Torture:
    """`folder` holds the data, the base model, and every run."""

    def __init__(self, folder: Path, nursery: Nursery, seed: int = 0):
        self.folder, self.nursery, self.random = folder, nursery, random.Random(seed)
        self.references: dict[Case, tuple[Path, float]] = {}
        self.data = folder / "data"
        rows = folder / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        prepare(
            PrepareSettings(
                data=[str(rows)],
                out=str(self.data),
                template="plain",
                train_tokenizer="bpe",
                vocab_size=300,
                test_fraction=0.0,
                packed_source_tokens=64,
                packed_target_tokens=64,
            )
        )
        self._make_base()

    def _make_base(self) -> None:
        """A checkpoint for LoRA to stand on: what one step of training leaves."""
        recipe = self.recipe(Case(1, "full", True), self.folder / "base") | {"max_steps": 1}
        assert self.start(Case(1, "full", True), recipe, "base")[0].wait(DEADLINE) == 0, self.log("base")

    def recipe(self, case: Case, out: Path) -> dict:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 1}
        overrides = {"model_overrides": sizes | {"residual_dropout": 0.1}}
        model = (
            {"model": "diptych-8m"} | overrides
            if case.method == "full"
            else {"model": str(self.folder / "base/final")}
        )
        return (
            model
            | {
                "data": str(self.data),
                "out": str(out),
                "method": case.method,
                "lora_dropout": 0.1 if case.method == "lora" else 0.0,
                "packed": case.packed,
                "sharding": case.sharding,
                "batch_size": 4 // case.ranks,
                "max_steps": 9,
                "precision": "fp32",
                "save_every": 2,
                "eval_every": 3,
                "logging_every": 1,
                "metrics": "exact_match",
                "metrics_limit": 2,
                "max_new_tokens": 4,
                "keep_last": 2,
                "learning_rate": 1e-2,
                "rank_timeout": 30.0,
            }
            | OPTIMIZERS[case.optimizer]
        )

    def start(
        self, case: Case, recipe: dict, name: str, die_at: int | None = None, resume: str = "true", **faults
    ) -> list[Process]:
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(recipe))
        arguments = ["--config", str(file), "--resume", resume]
        return self.nursery.train(arguments, self.folder / f"{name}.log", case.ranks, die_at=die_at, **faults)

    def log(self, name: str) -> str:
        return "\n".join(file.read_text() for file in sorted(self.folder.glob(f"{name}.log.*")))

    def reference(self, case: Case) -> tuple[Path, float]:
        """A run that nobody disturbs, and its seconds."""
        if case not in self.references:
            name = f"reference-{CASES.index(case)}"
            started = time.monotonic()
            processes = self.start(case, self.recipe(case, self.folder / name), name)
            assert [process.wait(DEADLINE) for process in processes] == [0] * case.ranks, self.log(name)
            self.references[case] = self.folder / name, time.monotonic() - started
        return self.references[case]

    def run(self, case: Case, kills: int, tally: Tally) -> None:
        """One run, killed so many times, then left in peace and compared."""
        reference, seconds = self.reference(case)
        name = f"run-{CASES.index(case)}-{tally.runs}"
        out = self.folder / name
        recipe = self.recipe(case, out)
        newest = 0
        for _ in range(kills):
            at_a_change = self.random.random() < 0.5
            processes = self.start(case, recipe, name, self.random.randint(1, 150) if at_a_change else None)
            if not at_a_change:
                time.sleep(self.random.random() * seconds)
                os.kill(self.random.choice(processes).pid, signal.SIGKILL)
            codes = [process.wait(DEADLINE) for process in processes]
            if -signal.SIGKILL not in codes:
                assert set(codes) == {0}, f"{codes}\n{self.log(name)}"
                continue  # it was faster
            tally.kills += 1
            tally.inside_a_save += any((out / "checkpoints").glob(".step-*-partial"))
            assert set(codes) <= {-signal.SIGKILL, 6, 0}, f"{codes}\n{self.log(name)}"
            steps = checkpoints.checkpoint_steps(out / "checkpoints")
            faults = [
                atomic_folders.fault_of(checkpoints.checkpoint_path(out / "checkpoints", step)) for step in steps
            ]
            assert not any(faults), faults
            assert max(steps, default=0) >= newest, f"{newest} was committed, and there is {steps}"
            marker = out / "checkpoints" / checkpoints.BEST
            assert not marker.is_file() or (marker.parent / json.loads(marker.read_text())["checkpoint"]).is_dir()
            newest = max(steps, default=0)
        processes = self.start(case, recipe, name)
        codes = [process.wait(DEADLINE) for process in processes]
        assert codes == [0] * case.ranks, f"{codes}\n{self.log(name)}"
        tally.runs += 1
        differences = differences_of(reference, out)
        assert not differences, f"{case}, {reference} and {out}: {differences}"
        tally.identical += 1


def differences_of(reference: Path, run: Path) -> list[str]:
    """Files that are not the same to the bit, what was measured with a clock and paths excepted."""
    found = []
    for file in sorted(path for path in reference.rglob("*") if path.is_file()):
        name = file.relative_to(reference)
        if name.name in (".lock", "status.json", "manifest.json", "config.yaml") and len(name.parts) == 1:
            continue
        other = run / name
        if not other.is_file() or _comparable(file) != _comparable(other):
            found.append(str(name))
    more = {str(path.relative_to(run)) for path in run.rglob("*")} - {
        str(path.relative_to(reference)) for path in reference.rglob("*")
    }
    return found + sorted(more)


def _comparable(file: Path) -> object:
    if file.name == "metrics.jsonl":
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]
    if file.name == "state.json":  # figures have another number of digits each time, so the file another length
        return {name: value for name, value in json.loads(file.read_text()).items() if name != "written"}
    if file.name == "manifest.json":
        return sorted(json.loads(file.read_text()))
    return file.read_bytes()


def torture(kills: dict[int, int], folder: Path, seed: int, cases: list[Case]) -> dict[Case, Tally]:
    """`kills`: ranks -> how many, shared out evenly among the cases of so many ranks."""
    tallies = {case: Tally() for case in cases}
    with Nursery() as nursery, tqdm(total=sum(kills.values()), unit="kill", disable=not sys.stderr.isatty()) as bar:
        torturer = Torture(folder, nursery, seed)
        for case, tally in tallies.items():
            due = kills[case.ranks] / sum(other.ranks == case.ranks for other in cases)
            while tally.kills < due:
                before = tally.kills
                torturer.run(case, min(KILLS_A_RUN, round(due) - tally.kills or 1), tally)
                bar.update(tally.kills - before)
    return tallies


def table(tallies: dict[Case, Tally]) -> str:
    lines = [f"{'case':32}{'kills':>7}{'in a save':>11}{'runs':>6}{'identical':>11}"]
    for case, tally in tallies.items():
        lines.append(f"{case!s:32}{tally.kills:>7}{tally.inside_a_save:>11}{tally.runs:>6}{tally.identical:>11}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--kills_on_two_ranks", type=int, default=75)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        kills = {1: settings.kills, 2: settings.kills_on_two_ranks}
        print(table(torture(kills, Path(folder), settings.seed, [case for case in CASES if kills[case.ranks]])))
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
