"""Who waits for the device, and for what: one slot a client, and clients in turn.

A client that asks again before its turn has come replaces what it asked for and keeps its place, so that nobody gains
by asking often and nothing is drawn that nobody waits for any more. A client is in the queue once at most: that is
round robin over those who wait.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Work = TypeVar("Work")


@dataclasses.dataclass(eq=False, kw_only=True)
class Client(Generic[Work]):
    """One who asks; made by `Desk.join`, and changed by the desk alone.

    Attributes:
        number: the server's own, from 1 on.
        deliver: called with what the worker has made for it, on the worker's thread.
        slot: what it waits for; None while it waits for nothing.
        turns: how many turns what waits is worth, see `Desk.submit`.
        owed: turns that it gives up to others.
        present: until it leaves.
        replaced: requests that a later one replaced before their turn.
    """

    number: int
    deliver: Callable[[Any], None]
    slot: Work | None = None
    turns: int = 1
    owed: int = 0
    present: bool = True
    replaced: int = 0


class Desk(Generic[Work]):
    """The queue between clients and the one worker; every method may be called from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[Client[Work]] = deque()
        self._drawn_for: Client[Work] | None = None
        self._joined = 0
        self._closed = False

    def join(self, deliver: Callable[[Any], None]) -> Client[Work]:
        """Let somebody in."""
        with self._changed:
            self._joined += 1
            return Client(number=self._joined, deliver=deliver)

    def leave(self, client: Client[Work]) -> None:
        """Forget a client, and what it waits for."""
        with self._changed:
            client.present, client.slot = False, None
            if client in self._queue:
                self._queue.remove(client)

    def submit(self, client: Client[Work], work: Work, turns: int = 1) -> None:
        """Ask for something, in place of what the client waits for.

        Args:
            client: who asks; one that has left is not heard.
            work: what for.
            turns: what it is worth; after work of three turns its client is passed over twice, while others wait.
        """
        with self._changed:
            if client.present and not self._closed:
                client.replaced += client.slot is not None
                self._put(client, work, turns)

    def follow(self, client: Client[Work], work: Work, turns: int = 1) -> None:
        """Ask for something that belongs to what was just drawn, unless the client waits for something newer."""
        with self._changed:
            if client.present and client.slot is None and not self._closed:
                self._put(client, work, turns)

    def take(self) -> tuple[Client[Work], Work] | None:
        """Wait for the next client and what it waits for; None once the desk is closed."""
        with self._changed:
            self._drawn_for = None
            self._changed.wait_for(lambda: self._queue or self._closed)
            if self._closed:
                return None
            while len(self._queue) > 1 and self._queue[0].owed:
                self._queue[0].owed -= 1
                self._queue.rotate(-1)
            client = self._drawn_for = self._queue.popleft()
            work, client.slot = client.slot, None
            assert work is not None
            client.owed = client.turns - 1
            return client, work

    def places(self) -> dict[Client[Work], int]:
        """The place of each who waits: 0 is drawn for now, 1 comes next."""
        with self._changed:
            found = {} if self._drawn_for is None else {self._drawn_for: 0}
            for place, client in enumerate(self._queue, 1):
                found.setdefault(client, place)
            return found

    def close(self) -> None:
        """End the worker; what waits is dropped."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def _put(self, client: Client[Work], work: Work, turns: int) -> None:
        if client.slot is None:
            self._queue.append(client)
        client.slot, client.turns = work, turns
        self._changed.notify()
