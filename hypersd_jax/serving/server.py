"""The socket, uvicorn on it, and an end that is clean."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

import uvicorn

from hypersd_jax.serving.guard import Entry
from hypersd_jax.serving.limits import Limits

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Server(uvicorn.Server):
    """uvicorn's server, which would raise the signal that ended it again: here ending is what was asked for."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {each: signal.signal(each, self.handle_exit) for each in _SIGNALS}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def serve(app: Any, sock: socket.socket, entry: Entry, limits: Limits) -> None:
    """Listen until SIGINT or SIGTERM; the page's address is printed once it can be opened.

    Args:
        app: an ASGI application.
        sock: bound, not listening yet.
        entry: whose address is printed.
        limits: what bounds messages and connections.
    """
    sock.listen(128)
    print(entry.url, flush=True)
    print("hypersd: Ctrl-C ends the server", file=sys.stderr)
    _Server(configured(app, limits)).run(sockets=[sock])


def configured(app: Any, limits: Limits) -> uvicorn.Config:
    """How uvicorn runs an application within these limits."""
    return uvicorn.Config(
        app,
        http="h11",
        ws="websockets-sansio",
        ws_max_size=limits.message_bytes,
        ws_per_message_deflate=False,
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=4 * limits.clients,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=3,
        h11_max_incomplete_event_size=16 * 2**10,
    )
