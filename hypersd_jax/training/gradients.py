"""The mean gradient of a loss over micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hypersd_jax.training.shardings import tree_shardings

Metrics = dict[str, jax.Array]


def mean_gradient(
    loss_of: Callable[[Any, Any], tuple[jax.Array, Metrics]], trainable: Any, batch: Any, *, mesh: Mesh, accumulate: int
) -> tuple[Any, tuple[jax.Array, Metrics]]:
    """Compute gradient, loss and metrics, means over the micro-batches, one of which is in memory at a time.

    Args:
        loss_of: (trainable, micro-batch) -> (loss, metrics), a mean over its samples.
        trainable: what to differentiate in.
        batch: leaves (accumulate, B, ...).
        mesh: places the gradients as the trainable tree.
        accumulate: micro-batches.
    """
    shardings = tree_shardings(mesh, trainable)
    constrain = jax.lax.with_sharding_constraint
    differentiate = jax.value_and_grad(loss_of, has_aux=True)

    def of_one(micro_batch: Any) -> tuple[Any, tuple[jax.Array, Metrics]]:
        value, grads = differentiate(trainable, micro_batch)
        return constrain(grads, shardings), value

    def add(total: Any, micro_batch: Any) -> tuple[Any, tuple[jax.Array, Metrics]]:
        grads, value = of_one(micro_batch)
        return jax.tree.map(jnp.add, total, grads), value

    # Models constrain their activations to axis names; the mesh those names belong to is known here alone.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        if accumulate == 1:
            return of_one(jax.tree.map(lambda leaf: leaf[0], batch))
        zeros = constrain(jax.tree.map(jnp.zeros_like, trainable), shardings)
        total, values = jax.lax.scan(add, zeros, batch)
    mean_value = jax.tree.map(lambda each: jnp.mean(each, axis=0), values)
    return jax.tree.map(lambda grad: grad / accumulate, total), mean_value
