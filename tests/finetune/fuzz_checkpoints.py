"""Checkpoints with something wrong in them: each must load and write a text, or be refused in one message.

    python tests/finetune/fuzz_checkpoints.py --files 20000 --seed 0
    python tests/finetune/fuzz_checkpoints.py --files 500 --kinds adapter_config.json safetensors
    python tests/finetune/fuzz_checkpoints.py --kinds adapter_config.json --only 17 --keep /tmp/case
    python tests/finetune/fuzz_checkpoints.py --files 100 --command merge

A case is made from its seed, kind and number alone, so `--only` makes it again. It is loaded in a forked process that
may compute for 5 s (15 s where it is resumed), and take 1 GB more than before. Whatever is neither "loaded" nor
"refused" (a UserError) is a finding: another exception, a hang, too much memory, or more than 2,000 characters of
warnings. With `--command` it is given to a command of `diptych`; then a control character in what is printed and a
changed input are findings, too.

A new kind of file is a `Kind` (spoiled_files.py): a function that makes a valid folder, once; one that spoils a copy
of it with a `random.Random` and returns in a few words what it did; and one that loads it. `spoil_json` spoils any
JSON file, `spoil_text` any other. The kinds of each part of the software are a dict in a file of their own, as
OF_THE_MODEL in spoiled_model_files.py, and are joined in KINDS here. Files of the copy are hard links to the valid
ones: replace them with `write`, never open one to change it.
"""

import argparse
import contextlib
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from spoiled_model_files import OF_THE_MODEL
from spoiled_run_files import OF_THE_RUN
from spoiled_tokenizer_files import OF_THE_TOKENIZER

from diptych.data_prep.command_line.errors import CONTROLS, UserError
from diptych.data_prep.command_line.run_command import guard_streams
from diptych.finetune.commands import cli

BYTES, CHARACTERS = 2**30, 2_000
CASES_OF_A_WORKER = 200
KINDS = {**OF_THE_MODEL, **OF_THE_TOKENIZER, **OF_THE_RUN}
ADAPTERS, TOKENIZERS = ["adapter_config.json", "safetensors of an adapter"], list(OF_THE_TOKENIZER)[:3]
MODELS = [kind for kind in OF_THE_MODEL if kind not in ADAPTERS]
COMMANDS = {
    "merge": (ADAPTERS, "merge {case} --out {out}"),
    "export": (MODELS, "export {case} --out {out} --max_new_tokens 4"),
    "onnx": (MODELS, "export {case} --to onnx --out {out} --max_new_tokens 4"),
    "inspect": (MODELS + ADAPTERS, "inspect {case} --source Go. --max_new_tokens 4 --out {out}.html"),
    "tokenizer": (TOKENIZERS, "tokenizer report {case} --data seed_tasks"),
}
"""By name: the kinds that are given to a command of `diptych`, and its words."""
SECONDS_OF_A_COMMAND = 60.0


# Cases in a process of their own


class Result(NamedTuple):
    kind: str
    number: int
    outcome: str
    """loaded, refused; exception, hang, memory, died, warnings are findings."""
    what: str
    """That was spoiled."""
    said: str
    seconds: float

    @property
    def is_finding(self) -> bool:
        return self.outcome not in ("loaded", "refused")


class Fuzzer:
    """`folder` gets the valid checkpoints, and one case at a time."""

    def __init__(self, folder: Path, seed: int, kinds: Sequence[str], command: str = ""):
        self.folder, self.seed, self.kinds, self.command = folder, seed, kinds, command
        self.worker: tuple[int, Any, Any] | None = None
        for kind in kinds:
            KINDS[kind].make(self.valid(kind))

    def valid(self, kind: str) -> Path:
        return self.folder / "valid" / kind.replace(" ", "-")

    def make(self, kind: str, number: int) -> tuple[Path, str]:
        case = self.folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(self.valid(kind), case, copy_function=os.link)
        return case, KINDS[kind].spoil(case, random.Random(f"{self.seed}/{kind}/{number}"))

    def run(self, kind: str, number: int) -> Result:
        """Makes the case in the worker, and loads it there. A worker that ends is replaced."""
        if self.worker is None or number % CASES_OF_A_WORKER == 0:
            self.close()
            self.worker = self._fork()
        pid, asked, answers = self.worker
        asked.write(json.dumps([kind, number]) + "\n")
        asked.flush()
        what = json.loads(answers.readline() or b'"it could not be made"')
        process = psutil.Process(pid)
        (started, base), found, waits_until = usage(process), "", time.monotonic() + 300
        seconds = memory = 0.0
        limit = SECONDS_OF_A_COMMAND if self.command else KINDS[kind].seconds
        while not found and not select.select([answers], [], [], 0.02)[0]:
            ended, now = usage(process)
            seconds, memory = ended - started, max(memory, now - base)
            is_late = seconds > limit or time.monotonic() > waits_until
            found = "memory" if memory > BYTES else "hang" if is_late else ""
        line = "" if found else answers.readline()
        if not line:
            self.close()
            return Result(kind, number, found or "died", what, "", seconds)
        return Result(kind, number, *json.loads(line), seconds)

    def _fork(self) -> tuple[int, Any, Any]:
        (read_asked, write_asked), (read_answers, write_answers) = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(write_asked), os.close(read_answers)
            try:  # a mistake of the fuzzer must not go on as a second parent, which would remove the folder
                with open(read_asked) as asked, open(write_answers, "w") as answers:
                    self._work(asked, answers)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        os.close(read_asked), os.close(write_answers)
        return pid, open(write_asked, "w"), open(read_answers, "rb", buffering=0)

    def _work(self, asked: Any, answers: Any) -> None:
        in_use = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (in_use + 4 * BYTES,) * 2)
        log = os.open(self.folder / "log", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        guard_streams()
        for line in asked:
            kind, number = json.loads(line)
            case, what = self.make(kind, number)
            os.ftruncate(log, 0)
            print(json.dumps(what), file=answers, flush=True)
            outcome, said = self._load(kind, case)
            sys.stderr.flush()
            if not outcome == "exception" and not self.command and os.fstat(log).st_size > CHARACTERS:
                outcome, said = "warnings", os.pread(log, 500, 0).decode(errors="replace")
            print(json.dumps([outcome, what, said]), file=answers, flush=True)

    def _load(self, kind: str, case: Path) -> tuple[str, str]:
        try:
            if self.command:
                return self._carry_out(case)
            KINDS[kind].load(case)
        except UserError as error:
            return ("refused" if len(str(error)) < CHARACTERS else "warnings"), str(error)[:CHARACTERS]
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = next((frame for frame in reversed(frames) if "/finetune/" in frame.filename), frames[-1])
            where = " < ".join(f"{Path(it.filename).name}:{it.lineno}" for it in (frames[-1], own))
            return "exception", f"{type(error).__name__}: {str(error)[:300]} [{where}]"
        return "loaded", ""

    def _carry_out(self, case: Path) -> tuple[str, str]:
        places = {"case": case, "out": self.folder / "out"}
        shutil.rmtree(places["out"], ignore_errors=True)
        os.chdir(case)  # an adapter's base is looked for there
        before = {file: file.read_bytes() for file in case.rglob("*") if file.is_file()}
        code = cli.main(COMMANDS[self.command][1].format(**places).split())
        sys.stdout.flush(), sys.stderr.flush()
        text = (self.folder / "log").read_text()
        said = re.sub(r"[\n\t\r]|\x1b\[A", " ", text)
        after = {file: file.read_bytes() for file in case.rglob("*") if file.is_file()}
        is_long = max(map(len, re.split(r"[\n\r]", text))) > CHARACTERS
        if before != after or is_long or re.search(CONTROLS, said) or "Traceback" in said:
            return ("changed" if before != after else "printed"), said
        return ("refused" if code else "loaded"), said

    def close(self) -> None:
        if self.worker is not None:
            pid, asked, answers = self.worker
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            asked.close(), answers.close()
            self.worker = None


def usage(process: psutil.Process) -> tuple[float, float]:
    """Seconds of work, which other processes on the machine do not lengthen, and bytes."""
    try:
        times = process.cpu_times()
        return times.user + times.system + times.children_user + times.children_system, process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0.0, 0.0


def fuzz(files: int, seed: int, kinds: Sequence[str], folder: Path, command: str = "") -> Iterator[Result]:
    """The kinds in turn. The folder must be on a file system with hard links."""
    fuzzer = Fuzzer(folder, seed, kinds, command)
    try:
        for number in range(files):
            yield fuzzer.run(kinds[number % len(kinds)], number // len(kinds))
    finally:
        fuzzer.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, metavar="KIND")
    parser.add_argument("--command", default="", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("--only", type=int, help="the number of one case of each kind")
    parser.add_argument("--keep", type=Path, help="a new folder for the last case")
    settings = parser.parse_args()
    kinds = settings.kinds or (COMMANDS[settings.command][0] if settings.command else list(KINDS))
    tally: Counter = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if settings.only is None:
            results = fuzz(settings.files, settings.seed, kinds, folder, settings.command)
        else:
            fuzzer = Fuzzer(folder, settings.seed, kinds, settings.command)
            results = [fuzzer.run(kind, settings.only) for kind in kinds]
            fuzzer.close()
        with contextlib.suppress(KeyboardInterrupt):  # what was counted until then is told
            for result in results:
                tally[result.kind, result.outcome] += 1
                if result.is_finding or settings.only is not None:
                    print(f"{result.kind} {result.number} {result.outcome} after {result.seconds:.1f} s", flush=True)
                    print(f"    {result.what}\n    {result.said}", flush=True)
        if settings.keep:
            shutil.copytree(folder / "case", settings.keep)
    for (kind, outcome), count in sorted(tally.items()):
        print(f"{kind:36}{outcome:12}{count:>8,}")
    return int(any(outcome not in ("loaded", "refused") for _, outcome in tally))


if __name__ == "__main__":
    raise SystemExit(main())
