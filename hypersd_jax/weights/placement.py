"""The placement of arrays on a mesh: one rule for base weights, adapters and optimizer state."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Below this a leaf costs less to hold everywhere than to gather.
SHARD_ABOVE_BYTES = 4 * 1024 * 1024
BATCH_AXES = ("data", "fsdp")


def leaf_sharding(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> NamedSharding:
    """A leaf over 4 MB is split along its largest dimension that ``fsdp`` divides; any other is replicated."""
    size = mesh.shape["fsdp"]
    spec: list[str | None] = [None] * len(shape)
    if math.prod(shape) * jnp.dtype(dtype).itemsize > SHARD_ABOVE_BYTES:
        divisible = [axis for axis, length in enumerate(shape) if length % size == 0]
        if divisible:
            spec[max(divisible, key=lambda axis: shape[axis])] = "fsdp"
    return NamedSharding(mesh, PartitionSpec(*spec))


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """A batch is split along ``axis`` over all devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXES))
