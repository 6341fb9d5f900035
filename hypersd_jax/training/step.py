"""The training step: one compiled program from (state, frozen, batch, key, controls) to (state, metrics)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from hypersd_jax.training.mesh import replicated
from hypersd_jax.training.optimizer import Controls, learning_rate_at
from hypersd_jax.training.shardings import tree_shardings
from hypersd_jax.training.state import TrainState, moving_average
from hypersd_jax.weights.placement import batch_sharding

Metrics = dict[str, jax.Array]


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
    everywhere = replicated(mesh)
    constrain = jax.lax.with_sharding_constraint

    def gradient(state: TrainState, frozen: Any, batch: Any, key: jax.Array, controls: Controls) -> Any:
        differentiate = jax.value_and_grad(loss_fn, has_aux=True)

        def micro_batch(rows: Any) -> tuple[Any, tuple[jax.Array, Metrics]]:
            value, grads = differentiate(state.trainable, state.ema, frozen, rows, key, controls)
            return constrain(grads, state_shardings.trainable), value

        if accumulate == 1:
            return micro_batch(jax.tree.map(lambda leaf: leaf[0], batch))

        def add(total: Any, rows: Any) -> tuple[Any, tuple[jax.Array, Metrics]]:
            grads, value = micro_batch(rows)
            return jax.tree.map(jnp.add, total, grads), value

        zeros = constrain(jax.tree.map(jnp.zeros_like, state.trainable), state_shardings.trainable)
        total, values = jax.lax.scan(add, zeros, batch)
        mean_value = jax.tree.map(lambda each: jnp.mean(each, axis=0), values)
        return jax.tree.map(lambda grad: grad / accumulate, total), mean_value

    def step(
        state: TrainState, frozen: Any, batch: Any, key: jax.Array, controls: Controls
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        # Models constrain their activations to axis names; the mesh those names belong to is known here alone.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            grads, (loss, metrics) = gradient(state, frozen, batch, key, controls)

        grad_norm = optax.tree.norm(grads)
        rate = learning_rate_at(controls, state.step)
        directions, opt_state = tx.update(grads, state.opt_state, state.trainable)
        updates = jax.tree.map(lambda direction: -rate * direction, directions)
        trainable = optax.apply_updates(state.trainable, updates)
        ema = moving_average(state.ema, trainable, controls["ema_decay"])

        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        def keep_if_bad(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, old)

        new_state = TrainState(
            step=state.step + 1,
            trainable=keep_if_bad(trainable, state.trainable),
            opt_state=keep_if_bad(opt_state, state.opt_state),
            ema=keep_if_bad(ema, state.ema),
            skipped=state.skipped + jnp.where(finite, 0, 1),
        )
        own = {
            "loss": loss,
            "grad_norm": grad_norm,
            "update_norm": jnp.where(finite, optax.tree.norm(updates), 0.0),
            "param_norm": optax.tree.norm(new_state.trainable),
            "lr": rate,
            "skipped": new_state.skipped,
        }
        if clash := own.keys() & metrics.keys():
            raise ValueError(f"the loss returns metrics that the step computes itself: {sorted(clash)}")
        return new_state, own | metrics

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
        compiler_options=dict(compiler_options) if compiler_options else None,
    )
