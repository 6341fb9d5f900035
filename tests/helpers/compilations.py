"""How often XLA compiles."""

from __future__ import annotations

from typing import Any

import jax


class Compilations:
    """Counts the programs that XLA compiles from `counting` on."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, name: str, *_args: Any, **_kwargs: Any) -> None:
        self.count += name == "/jax/core/compile/backend_compile_duration"

    @classmethod
    def counting(cls) -> Compilations:
        """A counter that has begun."""
        counter = cls()
        jax.monitoring.register_event_duration_secs_listener(counter)
        return counter
