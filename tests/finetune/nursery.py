"""Processes of `diptych` by the dozen: forked from one that has imported everything, so that each starts at once.

    with Nursery() as nursery:                           tests take the fixture `nursery`, one for the whole session
        ranks = nursery.train(["--config", "run.yaml"], ranks=2, log=tmp_path / "log")
        os.kill(ranks[1].pid, signal.SIGKILL)
        assert ranks[0].wait(10) == 6
        assert nursery.run(["compare", "runs/a", "runs/b"], tmp_path / "log", folder=tmp_path).wait(60) == 0
        nursery.run_script([tmp_path / "one_step.py", "out.pt"], tmp_path / "log", ranks=2)

They are `diptych` in all that matters: real processes, in which nothing was used before the fork, with gloo between
ranks as torchrun sets it up. `die_at=7` has the process kill itself before its seventh change to the disk;
`fault=(7, "EIO")` has this change fail, and `fault=(7, "ESTALE", "on")` each one from there on.
"""

import contextlib
import errno
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Process(NamedTuple):
    pid: int
    nursery: "Nursery"

    def wait(self, seconds: float) -> int | None:
        """The exit code, negative for a signal; None if it is still there."""
        return self.nursery.ask({"wait": self.pid, "seconds": seconds})

    def is_alive(self) -> bool:
        return self.wait(0) is None


class Nursery:
    def __enter__(self) -> "Nursery":
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.ask({"wait": 0, "seconds": 0})  # until everything is imported
        return self

    def __exit__(self, *error: object) -> None:
        self.server.stdin.close()
        self.server.wait()

    def ask(self, request: dict[str, Any]) -> Any:
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def run(
        self,
        arguments: Sequence[str],
        log: Path | str,
        folder: Path | str = ".",
        die_at: int | None = None,
        fault: Sequence | None = None,
        **environment: str,
    ) -> Process:
        """`diptych ARGUMENTS` in `folder`, on CPUs; what it says is appended to `log`."""
        request = {"arguments": list(arguments), "log": str(log), "folder": str(folder)}
        request |= {"fault": [die_at, None] if die_at else fault}
        return Process(self.ask(request | {"environment": {"ACCELERATE_USE_CPU": "true"} | environment}), self)

    def train(self, arguments: Sequence[str], log: Path, ranks: int = 1, **faults: Any) -> list[Process]:
        return self.launch(["train", *arguments], log, ranks, **faults)

    def run_script(self, words: Sequence[Path | str], log: Path, ranks: int = 1) -> list[str]:
        """A file of Python and its arguments, as `torchrun FILE ARGUMENTS`: what each rank said. All must succeed."""
        processes = self.launch(["python", *map(str, words)], log, ranks)
        ended = [process.wait(300) for process in processes]
        said = [Path(f"{log}.{rank}").read_text(encoding="utf-8") for rank in range(ranks)]
        assert ended == [0] * ranks, "\n".join(said)
        return said

    def launch(
        self, arguments: Sequence[str], log: Path, ranks: int, folder: Path | str = ".", **faults: Any
    ) -> list[Process]:
        """As torchrun launches it; rank 1 writes to `LOG.1`, and rank 0 is the one that dies, or whose disk fails."""
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        processes = []
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
            environment = meeting | own if ranks > 1 else {}
            processes.append(self.run(arguments, f"{log}.{rank}", folder, **({} if rank else faults), **environment))
        return processes


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def serve() -> None:
    import matplotlib.pyplot  # noqa: F401  a second of each process
    import torch
    from transformers import BartForConditionalGeneration, T5ForConditionalGeneration  # noqa: F401

    import diptych.finetune.training.loop  # noqa: F401  what a training process imports

    torch.set_num_threads(1)
    ended: dict[int, int] = {0: 0}
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = _wait(request["wait"], request["seconds"], ended)
        else:
            answer = os.fork()
            if answer == 0:
                _be_a_process(request)
        print(json.dumps(answer), flush=True)
    for pid in _children():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def _wait(pid: int, seconds: float, ended: dict[int, int]) -> int | None:
    until = time.monotonic() + seconds
    while pid not in ended:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            ended[pid] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() >= until:
            return None
        else:
            time.sleep(0.01)
    return ended[pid]


def _be_a_process(request: dict[str, Any]) -> None:
    from diptych.finetune.commands.cli import main

    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    for place, target in ((nowhere, 0), (log, 1), (log, 2)):
        os.dup2(place, target)
    os.setpgid(0, 0)  # Ctrl-C in the terminal of a test is for the test
    if request["fault"]:
        _fail_at(*request["fault"])
    code = 1
    program, *words = request["arguments"]
    try:
        if program == "python":
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
            code = 0
        else:
            code = main(request["arguments"])
    except SystemExit as error:
        code = error.code
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _fail_at(number: int, error: str | None, lasts: str = "") -> None:
    """At the `number`-th call that changes what is on the disk, counted from 1: SIGKILL, or this error."""
    calls = 0

    def counted(call):
        def wrapper(*arguments, **settings):
            nonlocal calls
            calls += 1
            if calls == number and error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            if calls == number or (lasts and calls > number):
                code = getattr(errno, error)
                places = [] if isinstance(arguments[0], int) else [str(arguments[0])]
                raise OSError(code, os.strerror(code), *places)
            return call(*arguments, **settings)

        return wrapper

    for name in ("fsync", "rename", "replace", "truncate", "mkdir", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))


if __name__ == "__main__":
    serve()
