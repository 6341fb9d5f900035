"""The training step: one compiled program from (state, frozen, batch, key, settings) to (state, metrics).

A step is a list of phases, taken in order: each says which models are trained, on what loss, and how often in a row. A
consistency stage has one phase with one model; score distillation trains the fake-score model some times, then the
student. All is one program, so that a checkpoint always falls between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import ArrayLike

from hypersd_jax.training.gradients import Metrics, mean_gradient
from hypersd_jax.training.mesh import replicated
from hypersd_jax.training.optimizer import learning_rate_at, make_optimizer
from hypersd_jax.training.settings import Settings
from hypersd_jax.training.shardings import tree_shardings
from hypersd_jax.training.state import TrainState, moving_average, next_state


class LossFunction(Protocol):
    """A mean over the batch's samples, so that micro-batches average to the full batch's loss."""

    def __call__(self, models: Any, ema: Any, frozen: Any, batch: Any, key: jax.Array, /) -> tuple[jax.Array, Metrics]:
        """Return the scalar loss and a dict of scalars to log; ``models`` and ``ema`` are weights by model."""


class Step(Protocol):
    """A jitted step; its first argument is donated."""

    def __call__(
        self, state: TrainState, frozen: Any, batch: Any, key: jax.Array, settings: Any
    ) -> tuple[TrainState, Metrics]:
        """Take one step and return the next state and the metrics, without waiting for the devices."""

    def lower(self, state: Any, frozen: Any, batch: Any, key: Any, settings: Any) -> jax.stages.Lowered:
        """Trace the step for abstract arguments, to compile it for devices that are not here."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of a training step: which models it trains, on what loss.

    Attributes:
        models: those whose weights it changes, with their learning rates after the warm-up; the first one of the last
            phase is what the step's norms and rate are of.
        loss: its loss, given all models' weights and differentiated in its own alone.
        repeats: how often it is taken in a row, each time with other randomness on the same batch.
    """

    models: Mapping[str, ArrayLike]
    loss: LossFunction
    repeats: int = 1


def make_step(
    phases: Callable[[Any], Sequence[Phase]], *, mesh: Mesh, compiler_options: Mapping[str, Any] | None = None
) -> Step:
    """Make the training step of stages with the phases that ``phases`` makes; equal choices share one program.

    The step's arguments: state, from `init_state`; frozen, what is read and never changed; batch, whose leaves have
    shape (accumulate, B, ...), split over the mesh along B, so that one micro-batch is in memory at a time; key; and
    the stage's settings (`Settings`, registered by `step_argument`).

    The only phase of a single model, taken once, has the key `fold_in(key, state.step)`, and elsewhere phase i's r-th
    repetition has `fold_in(fold_in(fold_in(key, state.step), i), r)`: the same after a restart and in every
    micro-batch. A loss tells its samples apart by their batch index, so that `accumulate` does not change their
    randomness.

    A step with a loss or gradient that is not finite changes nothing but two counters: `skipped`, and `step`, so that
    the next one has other noise. Metrics: the losses' own (those of a repeated phase from its last time); loss,
    grad_norm (before clipping), update_norm, param_norm and lr of the last phase's first model, ``MODEL_grad_norm`` of
    the others, skipped (so far).

    Args:
        phases: (settings as they are inside the step) -> phases in the order in which they are taken; the last one's
            loss is the step's.
        mesh: from `make_mesh`; the state stays split as `tree_shardings` says.
        compiler_options: the backend's, see `hypersd_jax.compilation`.
    """

    def step(
        state: TrainState, frozen: Any, batch: Any, key: jax.Array, settings: Settings
    ) -> tuple[TrainState, Metrics]:
        taken = phases(settings)
        alone = len(taken) == 1 and len(taken[0].models) == 1 and taken[0].repeats == 1
        optimizer = make_optimizer(settings)
        latest = {name: phase for phase in taken for name in phase.models}  # whose gradient norm is logged

        def take(phase: Phase, others: Any, weights: Any, moments: Any, key: jax.Array) -> Any:
            """Take one phase's update: new weights and moments, its metrics, and whether it was finite."""

            def loss_of(trained: Any, micro_batch: Any) -> tuple[jax.Array, Metrics]:
                return phase.loss({**others, **trained}, state.ema, frozen, micro_batch, key)

            grads, (loss, metrics) = mean_gradient(loss_of, weights, batch, mesh=mesh, accumulate=settings.accumulate)
            finite, own = jnp.isfinite(loss), Metrics()
            for index, (name, peak) in enumerate(phase.models.items()):
                norm = optax.tree.norm(grads[name])
                finite &= jnp.isfinite(norm)
                rate = learning_rate_at(settings, peak, state.step)
                directions, new_moments = optimizer.update(grads[name], moments[name], weights[name])
                updates = jax.tree.map(lambda direction, rate=rate: -rate * direction, directions)
                weights = {**weights, name: optax.apply_updates(weights[name], updates)}
                moments = {**moments, name: new_moments}
                if phase is taken[-1] and index == 0:
                    own |= {"loss": loss, "grad_norm": norm, "update_norm": optax.tree.norm(updates), "lr": rate}
                elif phase is latest[name]:
                    own[f"{name}_grad_norm"] = norm
            return weights, moments, _joined(own, metrics), finite

        key = jax.random.fold_in(key, state.step)
        weights, moments = state.trainable, state.opt_state
        finite, logged = jnp.bool_(True), Metrics()
        for index, phase in enumerate(taken):
            phase_key = key if alone else jax.random.fold_in(key, index)

            def once(
                carry: Any,
                number: jax.Array,
                phase: Phase = phase,
                phase_key: jax.Array = phase_key,
                others: Any = weights,
            ) -> Any:
                own, own_moments, finite = carry
                here = phase_key if alone else jax.random.fold_in(phase_key, number)
                own, own_moments, metrics, good = take(phase, others, own, own_moments, here)
                return (own, own_moments, finite & good), metrics

            # A loop carries what it changes alone: every other leaf would cost time to compile.
            carry = (*({name: tree[name] for name in phase.models} for tree in (weights, moments)), finite)
            if phase.repeats == 1:
                (own, own_moments, finite), metrics = once(carry, jnp.int32(0))
            else:  # a loop, so that the phase is compiled once
                (own, own_moments, finite), all_of_them = jax.lax.scan(once, carry, jnp.arange(phase.repeats))
                metrics = jax.tree.map(lambda each: each[-1], all_of_them)
            weights, moments = {**weights, **own}, {**moments, **own_moments}
            logged = _joined(logged, metrics)
        ema = moving_average(state.ema, {name: weights[name] for name in state.ema}, settings.ema)
        in_memory = {name for name, phase in latest.items() if phase.repeats > 1 or phase is not taken[-1]}
        new_state = next_state(state, weights, moments, ema, finite, in_memory)
        new_state = jax.lax.with_sharding_constraint(new_state, tree_shardings(mesh, new_state))
        first = next(iter(taken[-1].models))
        logged["update_norm"] = jnp.where(finite, logged["update_norm"], 0.0)
        own = {"param_norm": optax.tree.norm(new_state.trainable[first]), "skipped": new_state.skipped}
        return new_state, jax.lax.with_sharding_constraint(_joined(own, logged), replicated(mesh))

    return jax.jit(step, donate_argnums=0, compiler_options=dict(compiler_options or {}))


def _joined(own: Metrics, metrics: Metrics) -> Metrics:
    """Join two sets of metrics; ValueError where both name one."""
    if clash := own.keys() & metrics.keys():
        raise ValueError(f"the loss returns metrics that the step computes itself: {sorted(clash)}")
    return own | metrics
