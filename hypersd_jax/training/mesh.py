"""How a run's batches are placed on the device mesh, which `weights.mesh` makes."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hypersd_jax.errors import UserError

Tree = TypeVar("Tree")


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that has the same value on every device."""
    return NamedSharding(mesh, P())


def put_batch(batch: Tree, sharding: NamedSharding) -> Tree:
    """Move a batch of NumPy arrays to the devices.

    Args:
        batch: tree of arrays. In a run of several processes each brings its own samples, equally many in each, and the
            result is the global batch.
        sharding: from `weights.placement.batch_sharding`; training batches are split along axis 1, behind the
            micro-batches.

    Raises:
        UserError: naming `batch_size`, when the samples cannot be split evenly.
    """
    axis = len(sharding.spec) - 1
    shards = sharding.mesh.size // jax.process_count()

    def put(leaf: Any) -> jax.Array:
        size = np.shape(leaf)[axis]
        if size % shards:
            raise UserError(f"batch_size: {size} samples in this process cannot be split evenly over {shards} devices")
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    return jax.tree.map(put, batch)


def process_indices(batch_size: int, accumulate: int) -> np.ndarray:
    """Return the batch indices (A, B') that this process loads: its part of each micro-batch of (A, B)."""
    indices = np.arange(batch_size).reshape(accumulate, -1)
    share = indices.shape[1] // jax.process_count()
    first = jax.process_index() * share
    return indices[:, first : first + share]
