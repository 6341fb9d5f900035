"""Loading the next batches while the devices compute."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import NamedTuple, TypeVar

T = TypeVar("T")
PATIENCE_SECONDS = 5.0


class _End(NamedTuple):
    error: BaseException | None


def prefetch(items: Iterable[T], depth: int = 2) -> Generator[T, None, None]:
    """Yield ``items``, made up to ``depth`` ahead in a thread of its own.

    What raises there is raised here, when its item is due. When the generator is closed or dropped the thread
    stops after the item in hand; one that hangs, as on a network, is left behind.

    Raises:
        ValueError: when ``depth`` is below 1.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, not {depth}")
    return _prefetched(items, depth)


def _prefetched(items: Iterable[T], depth: int) -> Generator[T, None, None]:
    ready: queue.Queue[tuple[T] | _End] = queue.Queue(depth)
    stop = threading.Event()

    def put(entry: tuple[T] | _End) -> None:
        while not stop.is_set():
            try:
                ready.put(entry, timeout=0.1)
            except queue.Full:
                continue
            return

    def work() -> None:
        try:
            for item in items:
                put((item,))
                if stop.is_set():
                    return
        except BaseException as error:
            put(_End(error))
        else:
            put(_End(None))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            entry = ready.get()
            if isinstance(entry, _End):
                if entry.error is not None:
                    raise entry.error
                return
            yield entry[0]
    finally:
        stop.set()
        thread.join(PATIENCE_SECONDS)
