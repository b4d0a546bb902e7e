"""`diptych serve` and clients that are slow, many, or ask for too much: real processes, real sockets."""

import asyncio
import contextlib
import json
import re
import resource
import signal
import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import pytest
from conftest import EIGHT_ROWS, TO_KOREAN
from listening import listening
from starlette.testclient import TestClient

from diptych.finetune.inference.generation import generate_batch
from diptych.finetune.inference.prompts import Prompter
from diptych.finetune.serving.completion_service import Hosted, Service, build_app
from diptych.finetune.serving.memory_budget import MemoryMeter, measured_budget
from diptych.finetune.serving.request_batches import Decoding, Ended, Engine, Job
from diptych.finetune.serving.serve_settings import ServeSettings
from diptych.finetune.serving.served_model import ServedModel

HURRIED = """
import resource
from diptych.finetune.serving import completion_service, guarded_server
resource.setrlimit(resource.RLIMIT_NOFILE, ({descriptors}, {descriptors}))
resource.setrlimit(resource.RLIMIT_AS, (8 * 10**9, 8 * 10**9))
completion_service.ARRIVAL_SECONDS = guarded_server.ARRIVAL_SECONDS = {arrival}
guarded_server.SECONDS_FOR_A_408 = 1.0
completion_service.MOST_ARRIVING = 4_000_000
"""
"""Little memory and few descriptors, and less time for requests to arrive."""
ASK = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b"


@pytest.fixture(scope="module")
def hurried(t5_checkpoint, tmp_path_factory):
    log = tmp_path_factory.mktemp("hurried") / "log"
    with listening(["serve", str(t5_checkpoint)], log, HURRIED.format(descriptors=128, arrival=1.5)) as started:
        yield started


def connect(served, sent: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=60)
    connection.sendall(sent)
    return connection


def answer(served, body: dict, path: str = "completions") -> tuple[int, dict]:
    request = urllib.request.Request(f"{served.url}/v1/{path}", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def is_answered(served) -> bool:
    instruction, text, output = EIGHT_ROWS[0]
    status, body = answer(served, {"prompt": instruction, "input": text})
    return status == 200 and body["choices"][0]["text"] == output


def received(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 20):
            data += part
    return data


@pytest.mark.parametrize("descriptors, connections", [(128, 140), pytest.param(1024, 2000, marks=pytest.mark.slow)])
def test_held_connections_stop_nobody(t5_checkpoint, tmp_path, descriptors, connections):
    """Idle ones, and ones with half a header or half a body: the longest waiting is closed for a new one."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 8192), most))
    before = HURRIED.format(descriptors=descriptors, arrival=600)
    starts = (b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n", ASK % (50, b"{"))
    with (
        listening(["serve", str(t5_checkpoint)], tmp_path / "log", before) as served,
        contextlib.ExitStack() as held,
    ):
        for number in range(connections):
            held.enter_context(connect(served, starts[number % 3]))
            if number % (connections // 4) == 0:
                assert is_answered(served)
        assert all(is_answered(served) for _ in range(5))
        assert psutil.Process(served.process.pid).num_fds() < descriptors
        assert served.log.stat().st_size < 2000, served.log.read_text()[:2000]


def test_a_request_must_arrive_in_time(hurried):
    with connect(hurried) as idle, connect(hurried, ASK[:40]) as header, connect(hurried, ASK % (50, b"{")) as body:
        assert (received(idle), received(header)) == (b"", b"")
        refused = received(body)
    assert refused.startswith(b"HTTP/1.1 408") and b"within 1.5 seconds" in refused
    with connect(hurried) as dribbling, pytest.raises(OSError):
        for byte in ASK % (10_000, b"{" * 10_000):
            dribbling.sendall(bytes([byte]))
            time.sleep(0.01)


def test_a_body_that_will_be_too_large_and_an_upgrade_are_answered_at_once(hurried):
    head = ASK.replace(b"\r\nHost", b"\r\nExpect: 100-continue\r\nHost", 1)
    with connect(hurried, head % (10**10, b"")) as large:
        assert received(large).startswith(b"HTTP/1.1 413")
    upgrade = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    with connect(hurried, upgrade) as other:
        assert other.recv(1000).startswith(b"HTTP/1.1 200")
    assert "WebSocket" not in hurried.log.read_text()


def test_an_answer_must_be_read_in_time(hurried):
    """A client that asks on and on, and reads nothing."""
    process = psutil.Process(hurried.process.pid)
    before = process.num_fds()
    with connect(hurried) as deaf, pytest.raises(OSError):
        deaf.settimeout(60)
        while True:
            deaf.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
    assert process.num_fds() <= before and is_answered(hurried)


def test_large_requests_share_a_room_and_small_ones_need_none(hurried):
    large = ASK % (2_500_001, b" " * 2_500_000)
    with connect(hurried, large), connect(hurried, large) as second:
        assert b"too many large requests" in received(second)
        assert is_answered(hurried)
    assert is_answered(hurried)


def test_what_repeats_is_logged_once(hurried):
    for _ in range(50):
        with connect(hurried, b"nonsense\r\n\r\n") as connection:
            assert received(connection).startswith(b"HTTP/1.1 400")
    assert hurried.log.read_text().count("Invalid HTTP request") == 1


def test_a_prompt_that_takes_too_much_memory_is_refused(hurried):
    """A T5 has no limit of positions; attention to 15,000 tokens takes some 15 GB here."""
    assert "a third of the free memory" in hurried.log.read_text()
    status, body = answer(hurried, {"prompt": TO_KOREAN, "input": "Go. " * 3750})
    most = int(re.search(r"has 1\d{4} tokens, and (\d+) are read", body["error"]["message"])[1])
    assert status == 400 and 512 < most < 10_000
    status, body = answer(hurried, {"prompt": TO_KOREAN, "input": "Go. " * 900_000})
    assert status == 400 and f"those of {most} tokens" in body["error"]["message"], body
    prompt = "x" * (most - 100)
    assert answer(hurried, {"prompt": TO_KOREAN, "input": prompt, "max_tokens": 1})[0] == 200


@pytest.mark.parametrize(
    "path, value, said",
    [
        ("completions", 5, "'logprobs' can be 0 only"),
        ("completions", True, "'logprobs' can be 0 only"),
        ("chat/completions", 1, "true gives the log-probability of each token"),
        ("chat/completions", "yes", "true gives the log-probability of each token"),
    ],
)
def test_a_wrong_logprobs_says_what_there_is(hurried, path, value, said):
    asked = {"prompt": "Go."} if path == "completions" else {"messages": [{"role": "user", "content": "Go."}]}
    status, body = answer(hurried, asked | {"logprobs": value}, path)
    assert status == 400 and body["error"]["param"] == "logprobs"
    assert said in body["error"]["message"] and "(top_logprobs) are not supported" in body["error"]["message"]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [(), ("--timeout", "1", "--max_new_tokens", "100000")])
def test_sigterm_does_not_wait_for_clients_that_dawdle(t5_checkpoint, tmp_path, arguments):
    """It waits for no request that has not arrived (with them it would be --timeout, 120 seconds), nor for one with a
    long answer after --timeout."""
    before = HURRIED.format(descriptors=1024, arrival=600)
    with listening(["serve", str(t5_checkpoint), *arguments], tmp_path / "log", before) as served:
        body = json.dumps({"prompt": "Go." * 40, "temperature": 2, "n": 16}).encode()
        sent = (b"", b"GET /health HTTP/1.1\r\n", ASK % (50, b"{"), ASK % (len(body), body) if arguments else b"")
        with contextlib.ExitStack() as held:
            for start in sent:
                held.enter_context(connect(served, start))
            assert is_answered(served) or arguments
            served.process.send_signal(signal.SIGTERM)
            assert served.process.wait(100) == 0


def test_the_budget_is_what_batches_take(loaded):
    """Counted, for each family that a fixture has."""
    budget = measured_budget(loaded)
    most = budget.measured_tokens
    for tokens, prompts, n in ((most, 1, 1), (most // 2, 4, 1), (most // 4, 2, 8)):
        decoding = Decoding(8, temperature=1.0 if n > 1 else 0.0, n=n)
        with MemoryMeter(loaded.model) as meter:
            generate_batch(loaded, [[1] * tokens] * prompts, 8, decoding.generation_kwargs())
        taken = max(meter.most_reading, meter.most_writing)
        assert taken <= budget.cost(tokens, decoding, prompts) * 1.1
        assert budget.cost(tokens, decoding, prompts) < 20 * taken
    assert budget.cost(most, Decoding(8, n=16)) > budget.cost(most, Decoding(8))
    assert budget.cost(most, Decoding(8, num_beams=4)) > budget.cost(most, Decoding(8))
    assert budget.cost(most, Decoding(800)) > budget.cost(most, Decoding(8))


def test_a_batch_and_a_request_stay_within_the_budget(loaded_t5, tiny_tokenizer):
    budget = measured_budget(loaded_t5)
    budget = budget._replace(bytes=budget.cost(512, Decoding(8), prompts=2))
    engine = Engine(loaded_t5, batch_size=4, queue_size=8, batch_wait_ms=300)
    sizes, events = [], []
    engine.on_batch, engine.fits = sizes.append, budget.fits
    engine.submit([Job([5] * 512, Decoding(8), events.append) for _ in range(4)])
    until = time.monotonic() + 60
    while len(events) < 4 and time.monotonic() < until:
        time.sleep(0.02)
    assert sizes == [2, 2] and all(isinstance(event, Ended) for event in events)
    budget = budget._replace(bytes=budget.cost(16, Decoding(8, n=4)))
    served = ServedModel(loaded_t5, Prompter(tiny_tokenizer, loaded_t5.template, 512), 8, budget, 20)
    client = TestClient(
        build_app(Service(ServeSettings(model="t5"), [Hosted("t5", served, engine)])), base_url="http://localhost"
    )
    asked = {"prompt": "Go.", "temperature": 1, "max_tokens": 8}
    assert client.post("/v1/completions", json=asked).status_code == 200
    refused = client.post("/v1/completions", json=asked | {"n": 16})
    assert refused.status_code == 400 and "16 answers" in refused.json()["error"]["message"]
    assert f"may take {budget.bytes / 1e6:,.0f}" in refused.json()["error"]["message"]
    engine.close()


def test_a_client_that_leaves_before_the_first_event_leaves_no_work(loaded_t5, tiny_tokenizer):
    engine = Engine(loaded_t5, batch_size=4, queue_size=8, batch_wait_ms=60_000)
    served = ServedModel(
        loaded_t5, Prompter(tiny_tokenizer, loaded_t5.template, 512), 8, measured_budget(loaded_t5), 20
    )
    app = build_app(Service(ServeSettings(model="t5"), [Hosted("t5", served, engine)]))
    scope = {"type": "http", "asgi": {"spec_version": "2.3"}, "method": "POST", "path": "/v1/completions"}
    scope |= {"headers": [(b"host", b"localhost")], "query_string": b""}
    body = json.dumps({"prompt": "Go.", "stream": True}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}, {"type": "http.disconnect"}]
    begun = []

    async def receive() -> dict:
        return messages.pop(0)

    async def send(message: dict) -> None:
        begun.append((message["type"], engine.waiting))
        await asyncio.sleep(60)

    # in a thread: playwright, which other tests of this process use, leaves a loop running in this one
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, app(scope, receive, send)).result()
    assert begun == [("http.response.start", 1)] and engine.waiting == 0
    engine.close()


def test_a_client_of_openai_is_served_while_others_dawdle(hurried):
    client = openai.OpenAI(base_url=f"{hurried.url}/v1", api_key="-", max_retries=0)
    with contextlib.ExitStack() as held:
        for _ in range(60):
            held.enter_context(connect(hurried, ASK % (50, b"{")))
        whole = client.completions.create(model="t5", prompt=TO_KOREAN, extra_body={"input": "Yes."})
        assert whole.choices[0].text == "네."
