"""A server that good, slow, hostile and vanishing clients ask for half an hour, and that must be as at its beginning.

    python tests/finetune/serving_soak.py --minutes 30        what `make soak` does

The server is a process of `diptych serve` with a small random model and 256 descriptors. Each good and each slow
client must get the answer that its prompt had before the others came; a 503 may be asked again. Hostile clients must
get a refusal, or a closed connection, and never a 500. After a warm-up of a fifth of the time, at least a minute,
memory must stay within 2 %, and in the end as many descriptors must be open as in the beginning. The exit code is 1 if
one of these fails.
"""

import argparse
import contextlib
import json
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent))  # where pytest puts it, too

from conftest import EIGHT_ROWS, byte_tokenizer, tiny_t5
from listening import listening

DESCRIPTORS = 256
BEFORE = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({DESCRIPTORS}, {DESCRIPTORS}))"
LIMITS = ("--max_source_tokens", "512", "--max_new_tokens", "24", "--queue", "32", "--timeout", "60")
MOST_GROWTH, WARM_UP_SECONDS = 0.02, 60
SECONDS_TO_CLOSE = 60.0
HEAD = "{} {} HTTP/1.1\r\nHost: localhost\r\n{}\r\n"


def request(path: str, body: dict | bytes | None = None, headers: str = "") -> bytes:
    data = json.dumps(body).encode() if isinstance(body, dict) else body or b""
    headers += f"Content-Length: {len(data)}\r\n" if body is not None else ""
    return HEAD.format("GET" if body is None else "POST", path, headers).encode() + data


class Soak:
    """Clients of the server at `port`, and what happened to them."""

    def __init__(self, port: int, seed: int = 0):
        self.port, self.random = port, random.Random(seed)
        self.is_over = threading.Event()
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.seconds: list[float] = []
        self.expected = [self.answer(prompt)[1] for prompt in EIGHT_ROWS]

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=90)

    def ask(self, data: bytes, pause: float = 0.0) -> tuple[int, bytes]:
        """The status and body of the response to a request, which is sent in four parts; 0 if the server hangs up."""
        with self.connect() as connection, contextlib.suppress(ConnectionError):
            for part in range(4):
                connection.sendall(data[part * len(data) // 4 : (part + 1) * len(data) // 4])
                time.sleep(pause)
            response = b""
            while part := connection.recv(1 << 16):
                response += part
            head, _, body = response.partition(b"\r\n\r\n")
            return int(head.split()[1] if head else 0), body
        return 0, b""

    def answer(self, row: tuple[str, str, str], pause: float = 0.0, **settings: object) -> tuple[int, str]:
        body = {"prompt": row[0], "input": row[1], **settings}
        status, data = self.ask(request("/v1/completions", body, "Connection: close\r\n"), pause)
        if status != 200:
            return status, data.decode()
        if not settings.get("stream"):
            return status, json.loads(data)["choices"][0]["text"]
        # Chunks of HTTP/1.1: an event never holds a line break.
        events = [line[6:] for line in data.decode().splitlines() if line.startswith("data: {")]
        return status, "".join(json.loads(event)["choices"][0]["text"] for event in events)

    # Clients

    def good(self) -> None:
        number, started = self.random.randrange(8), time.monotonic()
        self.must_answer(number, 0.0)
        self.seconds.append(time.monotonic() - started)

    def slow(self) -> None:
        self.must_answer(self.random.randrange(8), self.random.random())

    def must_answer(self, number: int, pause: float) -> None:
        status = 503
        while status == 503:
            status, text = self.answer(EIGHT_ROWS[number], pause, stream=self.random.random() < 0.5)
            self.done["asked again after a 503"] += status == 503
        if (status, text) != (200, self.expected[number]):
            self.wrong.append(f"prompt {number}, pause {pause:.2f} s: status {status}, {text[:200]!r}")

    def vanishing(self) -> None:
        body = {"prompt": "Go.", "stream": True, "temperature": 1, "n": 4}
        data = request("/v1/completions", body)
        with self.connect() as connection, contextlib.suppress(OSError):
            connection.settimeout(2)
            connection.sendall(data[: self.random.choice((10, len(data) - 5, len(data)))])
            if self.random.random() < 0.5:
                connection.recv(100)

    def idle(self) -> None:
        """More connections than the server has descriptors, held for a second."""
        with contextlib.ExitStack() as held:
            for _ in range(DESCRIPTORS + 20):
                held.enter_context(self.connect())
            time.sleep(1)

    def deaf(self) -> None:
        with self.connect() as connection, contextlib.suppress(OSError):
            connection.settimeout(2)
            while not self.is_over.is_set():
                connection.sendall(request("/metrics") * 100)

    def hostile(self) -> None:
        close, path = "Connection: close\r\n", "/v1/completions"
        wrong = {
            "nonsense": b"\x16\x03\x01" + bytes(self.random.randrange(256) for _ in range(200)) + b"\r\n\r\n",
            "a long header": HEAD.format("GET", "/health", f"X: {'x' * 100_000}\r\n").encode(),
            "no host": b"GET /health HTTP/1.1\r\n\r\n",
            "another host": request(path, {"prompt": "Go."}, f"{close}Origin: http://evil.example\r\n"),
            "no JSON": request(path, b"{", close),
            "deep JSON": request(path, b"[" * 50_000, close),
            "a long prompt": request(path, {"prompt": "Go. " * 5_000}, close),
            "a longer prompt": request(path, {"prompt": "x" * 3_000_000}, close),
            "a large body": request(path, b" " * 5_000_000, close),
            "fields": request(path, {"prompt": "Go.", self.random.choice("abc") * 5000: "x" * 5000}, close),
            "a number": request(path, b'{"prompt": "Go.", "temperature": 1e-39, "n": 1e400}', close),
            "an upgrade": request("/health", None, "Connection: Upgrade, close\r\nUpgrade: websocket\r\n"),
            "a path": request(f"/{self.random.random()}", None, close),
            "a wrong chunk": HEAD.format("POST", path, "Transfer-Encoding: chunked\r\n").encode() + b"zz\r\n",
        }
        name = self.random.choice(list(wrong))
        status, body = self.ask(wrong[name])
        if status >= 500 and status != 503:
            self.wrong.append(f"{name}: status {status}, {body[:200]!r}")

    def repeat(self, client: Callable[[], None]) -> None:
        while not self.is_over.is_set():
            try:
                client()
            except Exception as error:  # of any type: a client that fails is counted, and goes on
                self.wrong.append(f"{client.__name__}: {type(error).__name__}: {error}")
                time.sleep(1)
            self.done[client.__name__] += 1


def soak(folder: Path, minutes: float, seed: int = 0) -> list[str]:
    """Runs it, prints what it counted, and returns what did not hold."""
    tokenizer = byte_tokenizer()
    tiny_t5(len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with listening(["serve", str(folder / "model"), *LIMITS], folder / "log", BEFORE) as served:
        process, memory = psutil.Process(served.process.pid), []
        it = Soak(served.port, seed)
        descriptors = process.num_fds()
        clients = [it.good, it.good, it.good, it.slow, it.slow, it.vanishing, it.hostile, it.hostile, it.idle, it.deaf]
        threads = [threading.Thread(target=it.repeat, args=(client,), daemon=True) for client in clients]
        for thread in threads:
            thread.start()
        started = time.monotonic()
        while time.monotonic() - started < 60 * minutes and process.is_running():
            time.sleep(1)
            memory.append(process.memory_info().rss)
        it.is_over.set()
        for thread in threads:
            thread.join(SECONDS_TO_CLOSE)
        until = time.monotonic() + SECONDS_TO_CLOSE
        while process.num_fds() > descriptors and time.monotonic() < until:
            time.sleep(0.5)
        left, log = process.num_fds(), served.log.read_text(errors="replace")
    after = memory[min(max(len(memory) // 5, WARM_UP_SECONDS), len(memory) * 4 // 5) :]
    tenth = max(1, len(after) // 10)
    first, last = statistics.median(after[:tenth]), statistics.median(after[-tenth:])
    p50, p99 = (statistics.quantiles(it.seconds, n=100)[share] for share in (49, 98))
    print(", ".join(f"{count} {name}" for name, count in sorted(it.done.items())))
    print(f"answers: median {p50:.2f} s, p99 {p99:.2f} s. log: {len(log):,} bytes")
    print(f"memory: {first / 1e6:.1f} MB after the warm-up, {last / 1e6:.1f} in the end; descriptors: {left}")
    faults = it.wrong[:20] + [f"{len(it.wrong) - 20} more of these"] * (len(it.wrong) > 20)
    faults += ["memory has grown"] * (last > first * (1 + MOST_GROWTH))
    faults += [f"{left} descriptors are open, and were {descriptors}"] * (left > descriptors)
    faults += [f"the log has an error:\n{log[-3000:]}"] * ("Traceback" in log or "report it" in log)
    faults += [f"the log has {len(log)} bytes"] * (len(log) > 2000 * (minutes + 1))
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        faults = soak(Path(folder), settings.minutes, settings.seed)
    print("\n".join(f"did not hold: {fault}" for fault in faults) or "all of it held")
    return int(bool(faults))


if __name__ == "__main__":
    raise SystemExit(main())
