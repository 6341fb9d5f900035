"""One connection: messages in, images out, and the place in the queue meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import anyio
from starlette.websockets import WebSocket, WebSocketDisconnect

from hypersd_jax.errors import UserError
from hypersd_jax.serving.desk import Desk
from hypersd_jax.serving.limits import Limits, Rate
from hypersd_jax.serving.request import Reader
from hypersd_jax.serving.wire import pack
from hypersd_jax.serving.worker import Failed, Outcome, Work

_POLICY = 1008
_SHOWN_OUT = {"type": "end", "message": "too many messages were refused"}
_LINES = 20  # that wait for a client that does not read; older ones are dropped
_TELL_SECONDS = 0.5  # between two words on a client's place


class Outbox:
    """What is to be sent: of images the newest of each role, and a few lines.

    A client that reads slowly therefore holds up nobody, costs two images at most, and sees the newest.
    """

    def __init__(self) -> None:
        self._filled = asyncio.Event()
        self._lines: deque[dict[str, Any]] = deque(maxlen=_LINES)
        self._images: dict[str, Any] = {}
        self.dropped = 0

    def line(self, message: dict[str, Any]) -> None:
        """Add an object to send."""
        self._lines.append(message)
        self._filled.set()

    def outcome(self, found: Outcome) -> None:
        """Add what the worker made; it takes the place of an older image."""
        if isinstance(found, Failed):
            self.line({"type": "error", "version": found.request.version, "message": found.reason})
            return
        self.dropped += found.role in self._images
        self._images[found.role] = found
        self._filled.set()

    async def next(self) -> Any:
        """Wait for what is to be sent next: an object, or a `Drawn`; lines first."""
        while not self._lines and not self._images:
            self._filled.clear()
            await self._filled.wait()
        if self._lines:
            return self._lines.popleft()
        return self._images.pop(next(iter(self._images)))


class Session:
    """A client's connection, from its acceptance on.

    Args:
        socket: accepted.
        desk: where its requests go.
        reader: of its messages.
        limits: its bounds.
    """

    def __init__(self, socket: WebSocket, desk: Desk[Work], reader: Reader, limits: Limits) -> None:
        self._socket, self._desk, self._reader, self._limits = socket, desk, reader, limits
        self._outbox = Outbox()
        self._asked = asyncio.Event()
        self._newest = 0
        self._sent = 0

    async def run(self, hello: Mapping[str, Any]) -> None:
        """Serve the client until it leaves."""
        loop = asyncio.get_running_loop()

        def deliver(found: Outcome) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._outbox.outcome, found)

        self._client = self._desk.join(deliver)
        self._outbox.line({**hello, "client": self._client.number})
        try:
            await _first_of(self._read, self._write, self._tell)
        finally:
            self._desk.leave(self._client)

    async def _read(self) -> None:
        limits = self._limits
        rate, refused = Rate(limits.messages_per_second, limits.burst, time.monotonic()), 0
        while (message := await self._socket.receive())["type"] == "websocket.receive":
            data = message["text"] if message.get("text") is not None else message["bytes"]
            try:
                if not rate.allows(time.monotonic()):
                    raise UserError(f"more than {limits.messages_per_second:g} messages a second")
                if isinstance(data, str):
                    request = self._reader.read(data)
                else:  # pictures take a while to decode
                    request = await anyio.to_thread.run_sync(self._reader.read, data)
                if request.version <= self._newest:
                    raise UserError(f"version: {request.version} is not above {self._newest}")
            except UserError as error:
                refused += 1
                self._outbox.line({"type": "error", "message": str(error)})
                if refused >= limits.refusals:
                    self._outbox.line(_SHOWN_OUT)
                    await anyio.sleep_forever()  # until that is sent, which ends all
                continue
            refused = max(refused - 1, 0)
            self._newest = request.version
            self._desk.submit(self._client, Work(request=request))
            self._asked.set()

    async def _write(self) -> None:
        while True:
            found = await self._outbox.next()
            if found is _SHOWN_OUT:
                await self._socket.close(code=_POLICY, reason=found["message"])
                return
            if isinstance(found, dict):
                await self._socket.send_json(found)
                continue
            version = found.request.version
            if version < self._sent:  # a newer one is on the page
                continue
            self._sent = version
            header = {
                "type": "image",
                "version": version,
                "role": found.role,
                "milliseconds": round(1000 * found.seconds, 1),
                "steps": found.settings.steps,
                "calls": found.calls,
                "seed": found.request.seed,
                "notes": found.notes,
                "parameters": found.text,
            }
            await self._socket.send_bytes(pack(header, await anyio.to_thread.run_sync(found.png)))

    async def _tell(self) -> None:
        """Tell the client its place while it waits for others."""
        told: int | None = None
        while True:
            place = self._desk.places().get(self._client)
            if place != told:
                self._outbox.line({"type": "place", "place": place, "waiting": self._client.slot is not None})
                told = place
            if place is None:
                self._asked.clear()
                await self._asked.wait()
            await asyncio.sleep(_TELL_SECONDS)


async def _first_of(*parts: Callable[[], Awaitable[None]]) -> None:
    """Run until one part ends, and end the others then."""

    async def run(part: Callable[[], Awaitable[None]]) -> None:
        with contextlib.suppress(WebSocketDisconnect, OSError):  # it left while something was being sent
            await part()
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for each in parts:
            group.start_soon(run, each)
