"""The web application: a fixed table of static files, and one websocket."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from hypersd_jax.serving.desk import Desk
from hypersd_jax.serving.guard import Entry, Guard
from hypersd_jax.serving.limits import Limits
from hypersd_jax.serving.request import PICTURES, Offer, Reader
from hypersd_jax.serving.session import Session
from hypersd_jax.serving.worker import Work

_SCRIPT, _STYLE = "text/javascript; charset=utf-8", "text/css; charset=utf-8"
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", _STYLE),
    "/favicon.svg": ("favicon.svg", "image/svg+xml"),
    **{
        f"/{name}.js": (f"{name}.js", _SCRIPT) for name in ("app", "board", "camera", "connection", "controls", "shelf")
    },
}
"""The only files that any request reads, by path; all are read when the server starts."""
SOCKET = "/live"


class App:
    """The application of a server; call it as ASGI does.

    Args:
        desk: where the worker takes requests from.
        offer: what can be asked for.
        limits: bounds of every client.
        entry: who may come in.
        about: what the page is told of the model.
    """

    def __init__(self, desk: Desk[Work], offer: Offer, limits: Limits, entry: Entry, about: Mapping[str, Any]) -> None:
        self._desk, self._reader, self._limits = desk, Reader(offer, limits), limits
        self._hello = {"type": "hello", **about, **_described(offer, limits)}
        folder = resources.files("hypersd_jax.serving") / "static"
        self._files = {path: ((folder / name).read_bytes(), kind) for path, (name, kind) in FILES.items()}
        self._clients = 0
        self._guarded = Guard(self._dispatch, entry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or one websocket."""
        await self._guarded(scope, receive, send)

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._live(WebSocket(scope, receive, send))
        else:
            await self._file(scope)(scope, receive, send)

    def _file(self, scope: Scope) -> Response:
        if scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("only GET and HEAD\n", status_code=405, headers={"Allow": "GET, HEAD"})
        found = self._files.get(scope["path"])
        if found is None:
            return PlainTextResponse("not found\n", status_code=404)
        return Response(found[0], media_type=found[1])

    async def _live(self, socket: WebSocket) -> None:
        if socket.url.path != SOCKET:
            await socket.close(code=1008)
            return
        await socket.accept()
        if self._clients >= self._limits.clients:
            await socket.send_json({"type": "full", "message": f"all {self._limits.clients} places are taken"})
            await socket.close(code=1013)
            return
        self._clients += 1
        try:
            await Session(socket, self._desk, self._reader, self._limits).run(self._hello)
        finally:
            self._clients -= 1


def _described(offer: Offer, limits: Limits) -> dict[str, Any]:
    """An offer as JSON."""
    return {
        "modes": {mode: PICTURES[mode] for mode in offer.modes},
        "sizes": {name: {"height": height, "width": width} for name, (height, width) in offer.sizes.items()},
        "loras": offer.loras,
        "steps": offer.steps,
        "guidance": offer.guidance,
        "limits": {
            "steps": limits.steps,
            "guidance": limits.guidance,
            "lora_scale": limits.lora_scale,
            "control_scale": limits.control_scale,
            "prompt_characters": limits.prompt_characters,
        },
    }
