"""Decisions that every process of a run must take at the same training step, such as to save or to stop."""

from __future__ import annotations

from collections import deque

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

LAG = 2
"""Training steps after which a step's results are read: the devices have the next ones queued by then."""


def process_mesh() -> Mesh:
    """Arrange all devices as (process, device)."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.asarray(devices).reshape(jax.process_count(), -1), ("process", "device"))


class Agreement:
    """The largest of the processes' values, the same in all of them; a single process has it at once.

    With several the answer is that of `LAG` calls ago, so that the devices never run out of work.
    """

    def __init__(self) -> None:
        """Compile nothing yet."""
        self._pending: deque[jax.Array] = deque()
        if jax.process_count() > 1:
            mesh = process_mesh()
            self._by_process = NamedSharding(mesh, P("process"))
            self._largest = jax.jit(lambda values: values.max(axis=0), out_shardings=NamedSharding(mesh, P()))

    def largest(self, *values: int) -> tuple[int, ...]:
        """Return the largest values over all processes, which call this equally often; at first zeros."""
        if jax.process_count() == 1:
            return values
        own = np.asarray([values], np.int32)
        self._pending.append(self._largest(jax.make_array_from_process_local_data(self._by_process, own)))
        if len(self._pending) <= LAG:
            return (0,) * len(values)
        return tuple(int(value) for value in np.asarray(self._pending.popleft()))
