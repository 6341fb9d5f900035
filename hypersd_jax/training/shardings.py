"""The sharding rule of the base weights (`weights.placement`), applied to whole trees: state, adapters, optimizer."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from hypersd_jax.weights.placement import leaf_sharding


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """The sharding of every leaf of a tree of arrays or `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(lambda leaf: leaf_sharding(mesh, leaf.shape, leaf.dtype), tree)


def abstract(mesh: Mesh, tree: Any) -> Any:
    """The tree as `jax.ShapeDtypeStruct`s that carry their shardings: what `Checkpointer.restore` and `lower` take."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf_sharding(mesh, leaf.shape, leaf.dtype)),
        tree,
    )
