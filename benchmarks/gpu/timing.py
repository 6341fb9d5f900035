"""Time a piece of work: once with compilation, then several times."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

REPEATS = 7
"""Timed calls, of which the median counts."""
WARM_UP = 2
"""Calls before them: the first compiles, the second may still choose kernels or record a CUDA graph."""


def timed(work: Callable[[], Any], finish: Callable[[], Any] = lambda: None, *, repeats: int = REPEATS) -> dict:
    """Return ``first``, ``median``, ``least`` and ``most`` seconds of calls.

    Args:
        work: what is timed.
        finish: waits for the device, where ``work`` does not.
        repeats: calls after `WARM_UP`.
    """
    found = []
    for _ in range(WARM_UP + repeats):
        begin = time.perf_counter()
        work()
        finish()
        found.append(time.perf_counter() - begin)
    after = found[WARM_UP:]
    return {"first": found[0], "median": median(after), "least": min(after), "most": max(after)}
