"""One side of a comparison: a process that does one named piece of work per line it reads, and says what it took."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping


def serve(load: Callable[[], Mapping[str, Callable[[], object]]]) -> None:
    """Load, then answer ``NAME`` with ``{"seconds", "peak_gib"}`` until the input ends."""
    channel = sys.stdout
    sys.stdout = sys.stderr  # what libraries print must not get between the answers

    def answer(begin: float) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"seconds": time.perf_counter() - begin, "peak_gib": peak}), file=channel, flush=True)

    begin = time.perf_counter()
    parts = load()
    answer(begin)
    for line in sys.stdin:
        begin = time.perf_counter()
        parts[line.strip()]()
        answer(begin)
