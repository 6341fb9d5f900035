"""Progress bars whose clock begins when the first step, which compiles, is done."""

from __future__ import annotations

import time
from typing import Any

COMPILING = "compiling (once)"


def begin_clock(bar: Any, title: str, done: int) -> None:
    """Name a bar (`tqdm`) for what follows, and count rate and remaining time from here, ``done`` steps in."""
    bar.set_description(title, refresh=False)
    bar.n = bar.initial = bar.last_print_n = done
    bar.start_t = bar.last_print_t = time.time()
    bar.refresh()
