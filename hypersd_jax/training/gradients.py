"""What every kind of training step is made of: mean gradients, the state that keeps what was good, compilation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hypersd_jax.training.mesh import replicated
from hypersd_jax.training.shardings import tree_shardings
from hypersd_jax.training.state import TrainState
from hypersd_jax.weights.placement import batch_sharding

Metrics = dict[str, jax.Array]


def mean_gradient(
    loss_of: Callable[[Any, Any], tuple[jax.Array, Metrics]], trainable: Any, batch: Any, *, mesh: Mesh, accumulate: int
) -> tuple[Any, tuple[jax.Array, Metrics]]:
    """Gradient, loss and metrics, means over the micro-batches, one of which is in memory at a time.

    Args:
        loss_of: (trainable, rows) -> (loss, metrics), a mean over the rows.
        trainable: what to differentiate in.
        batch: leaves (accumulate, B, ...).
        mesh: places the gradients as the trainable tree.
        accumulate: micro-batches.
    """
    shardings = tree_shardings(mesh, trainable)
    constrain = jax.lax.with_sharding_constraint
    differentiate = jax.value_and_grad(loss_of, has_aux=True)

    def micro_batch(rows: Any) -> tuple[Any, tuple[jax.Array, Metrics]]:
        value, grads = differentiate(trainable, rows)
        return constrain(grads, shardings), value

    def add(total: Any, rows: Any) -> tuple[Any, tuple[jax.Array, Metrics]]:
        grads, value = micro_batch(rows)
        return jax.tree.map(jnp.add, total, grads), value

    # Models constrain their activations to axis names; the mesh those names belong to is known here alone.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        if accumulate == 1:
            return micro_batch(jax.tree.map(lambda leaf: leaf[0], batch))
        zeros = constrain(jax.tree.map(jnp.zeros_like, trainable), shardings)
        total, values = jax.lax.scan(add, zeros, batch)
    mean_value = jax.tree.map(lambda each: jnp.mean(each, axis=0), values)
    return jax.tree.map(lambda grad: grad / accumulate, total), mean_value


def advanced(state: TrainState, trainable: Any, opt_state: Any, ema: Any, finite: jax.Array) -> TrainState:
    """The next state; where an update was not finite it changes nothing but the two counters."""

    def keep_if_bad(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, old)

    return TrainState(
        step=state.step + 1,
        trainable=keep_if_bad(trainable, state.trainable),
        opt_state=keep_if_bad(opt_state, state.opt_state),
        ema=keep_if_bad(ema, state.ema),
        skipped=state.skipped + jnp.where(finite, 0, 1),
    )


def joined(own: Metrics, metrics: Metrics) -> Metrics:
    """The step's metrics and the loss's; ValueError where both name one."""
    if clash := own.keys() & metrics.keys():
        raise ValueError(f"the loss returns metrics that the step computes itself: {sorted(clash)}")
    return own | metrics


def compiled(
    step: Callable[..., Any], state_shardings: Any, frozen: Any, *, mesh: Mesh, options: Mapping[str, Any] | None
) -> Any:
    """The step jitted: (state, frozen, batch, key, controls), the state donated."""
    everywhere = replicated(mesh)
    return jax.jit(
        step,
        in_shardings=(
            state_shardings,
            tree_shardings(mesh, frozen),
            batch_sharding(mesh, axis=1),
            everywhere,
            everywhere,
        ),
        out_shardings=(state_shardings, everywhere),
        donate_argnums=0,
        compiler_options=dict(options) if options else None,
    )
