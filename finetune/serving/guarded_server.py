"""How `diptych serve` and `diptych demo` run: uvicorn with limits, so that no client can stop it for others.

- There are as many connections as the process has descriptors to spare. If there is one more, one without a complete
  request is closed: the one that has sent least and then waited longest. If all are being answered, the newest request
  gets a 503.
- A request must arrive, and each 48 kB of an answer must be read, within ARRIVAL_SECONDS.
- A log line that repeats is written once a minute.
- On a signal the server finishes the requests under way, and the process ends with 0.

The extra `serve` (or `gradio`) is imported here.
"""

import asyncio
import logging
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.serving.request_batches import LOG

ARRIVAL_SECONDS, SECONDS_FOR_A_408 = 30.0, 2.0
ACCEPTED_AT_ONCE = 8
"""Connections that asyncio accepts in a round of its loop. It closes one three rounds after that at the soonest."""
SPARE_DESCRIPTORS = 4 * ACCEPTED_AT_ONCE + 16
"""For connections that are about to be closed, and for files that the process opens later."""
MOST_CONNECTIONS = 4096
"""Each takes up to 130 kB before its request is read."""
KERNEL_BACKLOG = 512


class Connection(H11Protocol):
    """Knows how many bytes of a request have come, and since when it waits for the rest, or for its client to read."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.since, self.seen, self.heard = self.loop.time(), None, 0
        if len(self.connections) < self.limit_concurrency:
            return
        if waiting := [other for other in self.connections - {self} if other.waits_for_request()]:
            min(waiting, key=lambda other: (other.heard, other.since)).drop()

    def data_received(self, data: bytes) -> None:
        self.heard += len(data)
        super().data_received(data)
        if self.cycle is not self.seen:  # a header is complete
            self.since, self.seen = self.loop.time(), self.cycle

    def on_response_complete(self) -> None:
        self.since, self.heard = self.loop.time(), 0
        super().on_response_complete()

    def pause_writing(self) -> None:
        self.since = self.loop.time()
        super().pause_writing()

    def _should_upgrade(self) -> bool:
        return False  # the request is answered as one without `Upgrade`; uvicorn would advise to install a library

    def waits_for_request(self) -> bool:
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def is_too_slow(self) -> bool:
        waited = self.loop.time() - self.since
        return (self.waits_for_request() or self.flow.write_paused) and waited > ARRIVAL_SECONDS + SECONDS_FOR_A_408

    def shutdown(self) -> None:
        """At the server's end: a request that is not complete was not begun."""
        self.drop() if self.waits_for_request() else super().shutdown()

    def drop(self) -> None:
        self.connections.discard(self)
        self.transport.abort()


class OncePerMinute(logging.Filter):
    """Lets a message through once a minute, with the number of those that were left out since."""

    def __init__(self):
        super().__init__()
        self.last: dict[tuple[str, int, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        key = record.pathname, record.lineno, str(record.msg).partition("\n")[0]
        then, left_out = self.last.get(key, (-60.0, 0))
        if is_due := time.monotonic() - then >= 60:
            then = time.monotonic()
            record.msg = f"{record.msg} (and {left_out} times since the last such line)" if left_out else record.msg
        self.last[key] = then, 0 if is_due else left_out + 1
        return is_due


def connection_limit() -> int:
    """How many connections the process can have besides its open files; UserError if these are less than eight."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = len(list(Path("/dev/fd").iterdir())) + SPARE_DESCRIPTORS
    if descriptors == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    if descriptors < taken + 8:
        raise UserError(f"this process may open {descriptors} files only. Raise the limit: ulimit -n {taken + 64}")
    return min(MOST_CONNECTIONS, descriptors - taken)


def run_until_signal(
    app: Any, listener: socket.socket, message: str, seconds: float, on_signal: Callable[[], None] = lambda: None
) -> None:
    """Prints `message`, then serves an ASGI application until SIGTERM or Ctrl-C. Requests under way then have up to
    `seconds` to finish. UserError if the process may open too few files."""

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            listener.listen(KERNEL_BACKLOG)  # those that wait to be accepted cost no descriptor
            self.dropping = asyncio.create_task(self.drop_slow_connections())

        async def drop_slow_connections(self) -> None:
            while True:
                await asyncio.sleep(1)
                for connection in [one for one in self.server_state.connections if one.is_too_slow()]:
                    connection.drop()

        def handle_exit(self, sig: int, frame: Any) -> None:
            on_signal()
            super().handle_exit(sig, frame)

    limit = connection_limit()
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, http=Connection)
    config.ws = "none"  # a WebSocket would leave the limits
    config.loop, config.backlog, config.limit_concurrency = "asyncio", ACCEPTED_AT_ONCE, limit + 1
    config.timeout_graceful_shutdown = int(seconds) + 1
    for name in ("asyncio", "uvicorn.error", LOG.name):
        logging.getLogger(name).addFilter(OncePerMinute())
    server = Server(config)
    # A signal may come before uvicorn handles them; and uvicorn raises it once more at its end.
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, server.handle_exit)
    print(f"{message} (up to {limit} connections; Ctrl-C ends)", file=sys.stderr, flush=True)
    server.run(sockets=[listener])
