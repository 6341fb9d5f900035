"""Decisions that every process of a run must take at the same update, such as to save or to stop."""

from __future__ import annotations

from collections import deque

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

LAG = 2
"""Updates after which what an update has computed is read: the devices have the next ones queued by then."""


class Agreement:
    """The largest of what the processes say, the same in all of them; one process agrees with itself at once.

    With several the answer is that of `LAG` calls ago, so that nobody waits for the devices to run dry.
    """

    def __init__(self) -> None:
        """Compile nothing yet."""
        self._pending: deque[jax.Array] = deque()
        if jax.process_count() > 1:
            devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
            grid = np.asarray(devices).reshape(jax.process_count(), -1)
            mesh = Mesh(grid, ("process", "device"))
            self._by_process = NamedSharding(mesh, P("process"))
            self._largest = jax.jit(lambda rows: rows.max(axis=0), out_shardings=NamedSharding(mesh, P()))

    def largest(self, *values: int) -> tuple[int, ...]:
        """Every process calls this equally often; zeros until there is an answer."""
        if jax.process_count() == 1:
            return values
        row = np.asarray([values], np.int32)
        self._pending.append(self._largest(jax.make_array_from_process_local_data(self._by_process, row)))
        if len(self._pending) <= LAG:
            return (0,) * len(values)
        return tuple(int(value) for value in np.asarray(self._pending.popleft()))
