"""The placement of arrays on a mesh, one rule for base weights, adapters and optimizer state; and their way back."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

SHARD_ABOVE_BYTES = 256 * 1024
"""Below this a leaf costs less to hold everywhere than to gather.

SDXL's adapter of rank 64 with its moments and average is .89 GB a device on 2 x 4, where 4 MiB would make it 3.09 GB.
"""
BATCH_AXES = ("data", "fsdp")


def leaf_sharding(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> NamedSharding:
    """Split a leaf over `SHARD_ABOVE_BYTES` along its largest dimension that ``fsdp`` divides; replicate any other."""
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


def put(value: Any, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Move an array that every process has to the devices; each hands its own ones only the parts that lie there.

    An array that is spread over the processes already may be spread otherwise; one of a program that is being traced
    stays the compiler's. ``sharding`` None is the default device.
    """
    if isinstance(value, jax.core.Tracer):
        return value
    is_spread = isinstance(value, jax.Array) and not value.is_fully_addressable
    if sharding is None or sharding.is_fully_addressable or is_spread:
        return jax.device_put(value, sharding)
    # `device_put` would send every byte over the network, to see whether all processes have the same.
    array = np.asarray(value)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def place(mesh: Mesh, tree: Any) -> Any:
    """Lay out every array of a tree on a mesh by `leaf_sharding`; one that lies there so already stays.

    An array that is left on one device, however small, costs a transfer to all the others at every call of a program.
    """

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array | np.ndarray):
            return leaf
        return put(leaf, leaf_sharding(mesh, leaf.shape, leaf.dtype))

    return jax.tree.map(one, tree)


def host(value: Any) -> np.ndarray:
    """Gather an array on this host, also where it is spread over several."""
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        value = multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(value)
