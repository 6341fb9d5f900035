"""People at a live canvas, as far as a server can tell: connections that type."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import struct
import time
from typing import Any

import websockets

PROMPTS = (
    "lion, noto style, blue background",
    "red apple, fluent flat style",
    "panda, fluent 3d style, green background",
    "frog, blob style, yellow background",
    "strawberry, fluent gradient style, pink background",
)
# An image may be under way for this long, in seconds, beside the time that it was drawn in: at that age it is stale.
UNDER_WAY = 0.25


@dataclasses.dataclass(kw_only=True)
class Record:
    """What one typist saw; times are in seconds.

    Attributes:
        keys: keystrokes sent.
        waits: from the first keystroke that nothing on the page shows yet to the image that does, for each image.
        latencies: from the keystroke that an image is of to the image.
        drawn: what the server took for each image.
        stale: images that were shown though a newer one was there, or was asked for before it was begun.
        worst_place: in the queue.
    """

    keys: int = 0
    waits: list[float] = dataclasses.field(default_factory=list)
    latencies: list[float] = dataclasses.field(default_factory=list)
    drawn: list[float] = dataclasses.field(default_factory=list)
    stale: int = 0
    worst_place: int = 0

    def image(self, header: dict[str, Any], sent: dict[int, float], shown: int, now: float) -> None:
        """Note an image that has come.

        Args:
            header: its own.
            sent: when each version was sent.
            shown: the version on the page before.
            now: the time.
        """
        version, seconds = header["version"], header["milliseconds"] / 1000
        begun = now - seconds - UNDER_WAY
        newest = max((each for each, when in sent.items() if when < begun), default=0)
        self.stale += version <= shown or version < newest
        self.waits.append(now - sent[shown + 1])
        self.latencies.append(now - sent[version])
        self.drawn.append(seconds)


async def one_by_one(url: str, count: int) -> Record:
    """Ask, wait for the image, and ask again."""
    record = Record()
    async with _connected(url) as socket:
        for version in range(1, count + 1):
            begin = time.perf_counter()
            await socket.send(json.dumps({"version": version, "prompt": PROMPTS[version % len(PROMPTS)], "seed": 1}))
            header = await _next_image(socket, record)
            record.image(header, {version: begin}, version - 1, time.perf_counter())
            record.keys += 1
    return record


async def typing(url: str, seconds: float, keys_per_second: float, number: int) -> Record:
    """Type prompts for so long, at intervals that vary by a fifth, without waiting for images."""
    record, rng = Record(), random.Random(number)
    sent: dict[int, float] = {}
    async with _connected(url) as socket:

        async def read() -> None:
            shown = 0
            while True:
                header = await _next_image(socket, record)
                record.image(header, sent, shown, time.perf_counter())
                shown = max(shown, header["version"])

        reader = asyncio.create_task(read())
        await asyncio.sleep(rng.random() / keys_per_second)
        prompt, end = PROMPTS[number % len(PROMPTS)], time.perf_counter() + seconds
        while time.perf_counter() < end:
            record.keys += 1
            text = prompt[: 1 + record.keys % len(prompt)]
            sent[record.keys] = time.perf_counter()
            await socket.send(json.dumps({"version": record.keys, "prompt": text, "seed": number}))
            await asyncio.sleep(rng.uniform(0.8, 1.2) / keys_per_second)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
    return record


def _connected(url: str) -> Any:
    return websockets.connect(
        url.replace("http", "ws", 1) + "live", origin=url.rstrip("/"), compression=None, max_size=2**24
    )


async def _next_image(socket: Any, record: Record) -> dict[str, Any]:
    while True:
        message = await socket.recv()
        if isinstance(message, bytes):
            (length,) = struct.unpack_from(">I", message)
            return json.loads(message[4 : 4 + length])
        found = json.loads(message)
        if found["type"] == "error":
            raise RuntimeError(found["message"])
        if found["type"] == "place" and found["place"]:
            record.worst_place = max(record.worst_place, found["place"])
