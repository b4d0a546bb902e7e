"""What `diptych serve` and `diptych demo` share: where they listen, who may ask, and how they end.

By itself a server listens at the loopback, where only this machine asks; a page that a browser here has open is kept
out by the name it asks under. Beyond the loopback a secret is due. A signal lets end what was begun, and then ends the
process, with 0.
"""

import contextlib
import ipaddress
import re
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from diptych.data_prep.command_line.errors import UserError

HERE = re.compile(r"(https?://)?(localhost|127\.0\.0\.1|\[::1\])(:[0-9]+)?", re.IGNORECASE)


def check_port(port: int) -> None:
    if not 0 <= port <= 65535:
        raise UserError(f"port is {port}; it is a number from 0 to 65535.")


def is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def is_asked_here(headers: Any) -> bool:
    """Whether a request names this machine as its host, and does not come from a page of another site. `headers` are
    starlette's. A browser sends Origin with a POST, and Sec-Fetch-Site always; following a link is allowed."""
    names = [*headers.getlist("host"), *headers.getlist("origin")]
    is_page_s = headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate"
    return len(headers.getlist("host")) == 1 and all(map(HERE.fullmatch, names)) and not is_page_s


def need_secret(host: str, secret: str | None, variable: str) -> None:
    """UserError where others could ask, and none is set."""
    if not is_loopback(host) and not secret:
        raise UserError(
            f"host {host} can be reached from elsewhere, and no secret is set. Set {variable} in the environment, or "
            f"listen at 127.0.0.1."
        )


def listen(host: str, port: int) -> socket.socket:
    """UserError where the place is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise UserError(f"{host}:{port} cannot be listened at: {error.strerror}. Choose another --port.") from error


def address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_until_signal(
    app: Any, listener: socket.socket, message: str, seconds: float, on_signal: Callable[[], None]
) -> None:
    """Says `message`, serves an ASGI application until SIGTERM or Ctrl-C, and then as long as what was begun takes,
    but no longer than so many seconds."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            on_signal()
            super().handle_exit(sig, frame)

    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
    config.timeout_graceful_shutdown = int(seconds) + 1
    server = Server(config)
    # For a signal before uvicorn listens to them, and since it raises anew what ended it.
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, server.handle_exit)
    print(f"{message} (Ctrl-C ends)", file=sys.stderr, flush=True)
    server.run(sockets=[listener])
