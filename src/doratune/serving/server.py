"""The address, the process's end, and what clients may do there.

On another address than this machine's own a key is required. The address is taken before the model is loaded, listened on after.
Ctrl-C and SIGTERM: no new requests; what is being written has some seconds to end, then the process ends; a second one at once.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Callable

import uvicorn

from ..errors import UserError

KEY = "DORATUNE_API_KEY"
END_S = 5
"""Seconds that answers have to end in."""


def key() -> str | None:
    """The API key of the environment.

    Raises:
        UserError: a key that no client could send.
    """
    value = os.environ.get(KEY)
    if value is not None and (not value or value != value.strip() or not (value.isascii() and value.isprintable())):
        raise UserError(
            f"{KEY} is empty, or holds what no header can (spaces at its ends, other than ASCII); set another, or unset it"
        )
    return value


def bound(host: str, port: int, key: str | None) -> socket.socket:
    """A socket of this address; nobody can connect to it before it listens. port 0: any that is free.

    Raises:
        UserError: no such host, an address that is in use or not this machine's, or one that others reach without a key.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError):
        raise UserError(f"host {host!r} is not known; give --host 127.0.0.1, or an address of this machine") from None
    if key is None and not ipaddress.ip_address(address[0].partition("%")[0]).is_loopback:
        raise UserError(f"host {host} can be reached from elsewhere; set a key in the environment, {KEY}, or leave out --host")
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise UserError(f"cannot listen on {host}, port {port}: {error.strerror}; give another --port or --host") from None
    return sock


def own_names(host: str, key: str | None) -> frozenset[str] | None:
    """Names under which this machine is meant; None: any, where a key is asked for."""
    return None if key is not None else frozenset({"localhost", "127.0.0.1", "::1", host.lower()})


def address_of(sock: socket.socket) -> str:
    """`http://127.0.0.1:8000`."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Listener(uvicorn.Server):
    """uvicorn, with the signal that ended it."""

    ended_by: int | None = None

    def handle_exit(self, sig: int, frame) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what it says of requests that it cancels
        self.force_exit = self.should_exit
        self.ended_by, self.should_exit = sig, True


def listen(app, sock: socket.socket, stop: Callable[[], None]) -> int:
    """Serve until a signal; returns the exit status.

    Args:
        stop: called when no more answers are needed.

    Raises:
        KeyboardInterrupt: Ctrl-C ended it.
    """
    config = uvicorn.Config(
        app, http="h11", ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
        timeout_graceful_shutdown=END_S,
    )  # fmt: skip
    server = Listener(config)
    try:
        server.run(sockets=[sock])
    finally:
        stop()
    if server.ended_by == signal.SIGINT:
        raise KeyboardInterrupt
    return 0 if server.ended_by is None else 128 + server.ended_by
