"""The training step: one compiled program from (state, frozen, batch, key, controls) to (state, metrics)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from hypersd_jax.training.gradients import Metrics, advanced, compiled, joined, mean_gradient
from hypersd_jax.training.optimizer import Controls, learning_rate_at
from hypersd_jax.training.shardings import tree_shardings
from hypersd_jax.training.state import TrainState, moving_average


class LossFunction(Protocol):
    """A mean over the batch's rows, so that micro-batches average to the whole."""

    def __call__(
        self, trainable: Any, ema: Any, frozen: Any, batch: Any, key: jax.Array, controls: Controls
    ) -> tuple[jax.Array, Metrics]:
        """Return the scalar loss and a dict of scalars to log."""


class Step(Protocol):
    """A jitted step; its first argument is donated."""

    def __call__(
        self, state: TrainState, frozen: Any, batch: Any, key: jax.Array, controls: Controls
    ) -> tuple[TrainState, Metrics]:
        """Take one step and return the next state and the metrics, without waiting for the devices."""

    def lower(self, state: Any, frozen: Any, batch: Any, key: Any, controls: Any) -> jax.stages.Lowered:
        """Trace the step for abstract arguments, to compile it for devices that are not here."""


def make_step(
    loss_fn: LossFunction,
    tx: optax.GradientTransformation,
    state: TrainState,
    frozen: Any,
    *,
    mesh: Mesh,
    accumulate: int = 1,
    compiler_options: Mapping[str, Any] | None = None,
) -> Step:
    """Compile-once training step.

    Args:
        loss_fn: the stage's loss.
        tx: what turns gradients into the update before the learning rate (`make_optimizer`).
        state: the state, or its shapes; fixes the shardings (`tree_shardings`), as does `frozen`.
        frozen: the tree that is read and never changed, or its shapes.
        mesh: from `make_mesh`.
        accumulate: micro-batches per update. Every batch leaf has shape (accumulate, B, ...), split over the mesh
            along B; the gradient is the mean over micro-batches, one of which is in memory at a time.
        compiler_options: the backend's options for this program.

    The step's randomness is `fold_in(key, state.step)`, the same after a restart and in every micro-batch: a loss tells
    its rows apart by something in the batch, so that `accumulate` does not change what they draw. `controls` holds
    `optimizer_controls` and `ema_decay` (0 keeps the average equal to the weights) beside what the loss reads.

    A loss or gradient that is not finite changes nothing but two counters: `skipped`, and `step`, so that the
    next step draws other noise. Metrics: the loss's own and loss, grad_norm (before clipping), update_norm,
    param_norm, lr, skipped (so far).
    """
    state_shardings = tree_shardings(mesh, state)

    def step(
        state: TrainState, frozen: Any, batch: Any, key: jax.Array, controls: Controls
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)

        def loss_of(trainable: Any, rows: Any) -> tuple[jax.Array, Metrics]:
            return loss_fn(trainable, state.ema, frozen, rows, key, controls)

        grads, (loss, metrics) = mean_gradient(loss_of, state.trainable, batch, mesh=mesh, accumulate=accumulate)
        grad_norm = optax.tree.norm(grads)
        rate = learning_rate_at(controls, state.step)
        directions, opt_state = tx.update(grads, state.opt_state, state.trainable)
        updates = jax.tree.map(lambda direction: -rate * direction, directions)
        trainable = optax.apply_updates(state.trainable, updates)
        ema = moving_average(state.ema, trainable, controls["ema_decay"])

        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        new_state = advanced(state, trainable, opt_state, ema, finite)
        own = {
            "loss": loss,
            "grad_norm": grad_norm,
            "update_norm": jnp.where(finite, optax.tree.norm(updates), 0.0),
            "param_norm": optax.tree.norm(new_state.trainable),
            "lr": rate,
            "skipped": new_state.skipped,
        }
        return new_state, joined(own, metrics)

    return compiled(step, state_shardings, frozen, mesh=mesh, options=compiler_options)
