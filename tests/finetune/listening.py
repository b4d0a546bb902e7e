"""Processes of `diptych` that listen, for the tests of serve and demo."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace


@contextlib.contextmanager
def listening(command: Sequence[str], log: Path, before: str = "", **environment: str) -> Iterator[SimpleNamespace]:
    """On a free port, from when it says so until the block ends; `log` is what it says. The process runs the Python
    code `before` first."""
    code = f"{before}\nfrom diptych.finetune.commands.cli import main\nraise SystemExit(main())"
    with log.open("w+b") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *command, "--port", "0"],
            stderr=said,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment,
        )
        try:
            while not (found := re.search(r"http://\S+:(\d+)", log.read_text(errors="replace"))):
                assert process.poll() is None, log.read_text()
                time.sleep(0.05)
            url, port = f"http://127.0.0.1:{found[1]}", int(found[1])
            yield SimpleNamespace(process=process, url=url, port=port, log=log)
        finally:
            process.kill()
            process.wait()
