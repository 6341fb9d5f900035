from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from hypersd_jax.data import prefetch


def loaders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_order_is_kept() -> None:
    assert list(prefetch(range(20), depth=3)) == list(range(20))
    assert list(prefetch([])) == []


def test_items_are_made_ahead_but_no_more_than_depth() -> None:
    made: list[int] = []
    third = threading.Event()

    def items() -> Iterator[int]:
        for i in range(10):
            made.append(i)
            if i == 3:
                third.set()
            yield i

    stream = prefetch(items(), depth=2)
    assert next(stream) == 0
    # 1 and 2 wait in the queue, 3 in the thread's hand.
    assert third.wait(timeout=10)
    assert made == [0, 1, 2, 3]
    stream.close()


def test_errors_come_out_in_their_place() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("disk gone")

    stream = prefetch(items())
    assert next(stream) == 1
    with pytest.raises(OSError, match="disk gone"):
        next(stream)
    assert not loaders()


def test_closing_ends_the_thread() -> None:
    stream = prefetch(iter(int, 1), depth=1)
    next(stream)
    assert len(loaders()) == 1
    stream.close()
    assert not loaders()


def test_depth_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="depth"):
        prefetch([1], depth=0)
