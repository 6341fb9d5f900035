"""One sharding rule for base, adapters and optimizer state.

Every leaf over 4 MB is split along its largest dimension that the `fsdp` axis divides; the rest is copied to every
device, because gathering a small leaf costs more than the memory it would save.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

SHARD_ABOVE_BYTES = 4 * 1024 * 1024


def leaf_sharding(mesh: Mesh, shape: Sequence[int], dtype: Any) -> NamedSharding:
    """The sharding of one leaf; the later of equally large dimensions is split, so that kernels split their outputs."""
    size = mesh.shape["fsdp"]
    if size == 1 or int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize <= SHARD_ABOVE_BYTES:
        return NamedSharding(mesh, P())
    divisible = [axis for axis, length in enumerate(shape) if length % size == 0]
    if not divisible:
        return NamedSharding(mesh, P())
    split = max(divisible, key=lambda axis: (shape[axis], axis))
    return NamedSharding(mesh, P(*[None] * split, "fsdp"))


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """The sharding of every leaf of a tree of arrays or `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(lambda leaf: leaf_sharding(mesh, leaf.shape, leaf.dtype), tree)


def abstract(mesh: Mesh, tree: Any) -> Any:
    """The tree as `jax.ShapeDtypeStruct`s that carry their shardings: what `Checkpointer.restore` and `lower` take."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf_sharding(mesh, leaf.shape, leaf.dtype)),
        tree,
    )
