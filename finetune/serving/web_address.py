"""What `diptych serve` and `diptych demo` share: where they listen, and who may ask.

Unless told otherwise a server listens at the loopback, where only this machine can ask; requests that a page of
another site makes in a browser on this machine are refused by their headers. Beyond the loopback a secret is needed.
"""

import contextlib
import ipaddress
import re
import socket
from typing import Any

from diptych.data_prep.command_line.errors import UserError

TOKEN_VARIABLE, PASSWORD_VARIABLE = "DIPTYCH_TOKEN", "DIPTYCH_PASSWORD"
"""In the environment, the secrets of `serve` and of `demo`."""
LARGEST_BODY = 4_000_000
HERE = re.compile(r"(https?://)?(localhost|127(?:\.[0-9]{1,3}){3}|\[::1\])(:[0-9]+)?", re.IGNORECASE)


def is_asked_here(headers: Any) -> bool:
    """Whether a request names this machine as its host and is not from a page of another site. `headers` are
    starlette's. A browser sends Origin with a POST, and Sec-Fetch-Site always; following a link is allowed."""
    names = [*headers.getlist("host"), *headers.getlist("origin")]
    is_of_a_page = headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate"
    return len(headers.getlist("host")) == 1 and all(map(HERE.fullmatch, names)) and not is_of_a_page


def need_secret(host: str, secret: str | None, variable: str) -> None:
    """UserError if other machines could ask and no secret is set, or one that no header can carry."""
    if secret and (not secret.strip() or secret != secret.strip()):
        raise UserError(f"{variable} begins or ends with blanks, which are lost on the way. Set it without them.")
    is_loopback = host == "localhost"
    with contextlib.suppress(ValueError):
        is_loopback = ipaddress.ip_address(host).is_loopback
    if not is_loopback and not secret:
        raise UserError(
            f"host {host} can be reached from elsewhere, and no secret is set. Set {variable} in the environment, or "
            f"listen at 127.0.0.1."
        )


def listen(host: str, port: int) -> socket.socket:
    """UserError if the address is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise UserError(f"{host}:{port} cannot be listened at: {error.strerror}. Choose another --port.") from error
    # Accepted connections inherit it. Without it the kernel keeps an answer's body for 40 ms, until the client has
    # acknowledged the headers; asyncio sets it itself only where a socket names its protocol.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
