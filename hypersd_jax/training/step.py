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
from hypersd_jax.training.state import TrainState, next_state


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
        loop_steps: mean length of the loss's loops whose length is random, for who counts its work (`planning`).
    """

    models: Mapping[str, ArrayLike]
    loss: LossFunction
    repeats: int = 1
    loop_steps: float = 0.0


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

        def take(phase: Phase, others: Any, weights: Any, moments: Any, finite: jax.Array, key: jax.Array) -> Any:
            """Take one phase's update: new weights and moments, whether all was finite so far, and its metrics."""

            def loss_of(trained: Any, micro_batch: Any) -> tuple[jax.Array, Metrics]:
                return phase.loss({**others, **trained}, state.ema, frozen, micro_batch, key)

            def updated() -> tuple[Any, Any, jax.Array]:
                updates, new_moments = {}, {}
                for name, rate in rates.items():
                    directions, new_moments[name] = optimizer.update(grads[name], moments[name], weights[name])
                    updates[name] = jax.tree.map(lambda direction, rate=rate: -rate * direction, directions)
                return optax.apply_updates(weights, updates), new_moments, optax.tree.norm(updates[first])

            first = next(iter(phase.models))
            rates = {name: learning_rate_at(settings, peak, state.step) for name, peak in phase.models.items()}
            grads, (loss, metrics) = mean_gradient(loss_of, weights, batch, mesh=mesh, accumulate=settings.accumulate)
            norms = {name: optax.tree.norm(each) for name, each in grads.items()}
            for value in (loss, *norms.values()):
                finite &= jnp.isfinite(value)
            # A branch, and no select of every leaf: the backend plans a branch by itself, and its planning takes time
            # that grows with the square of what it plans.
            weights, moments, moved = jax.lax.cond(finite, updated, lambda: (weights, moments, jnp.float32(0.0)))
            own = {f"{name}_grad_norm": norm for name, norm in norms.items() if phase is latest[name]}
            if phase is taken[-1]:
                norm = own.pop(f"{first}_grad_norm")
                own |= {"loss": loss, "grad_norm": norm, "update_norm": moved, "lr": rates[first]}
            return weights, moments, finite, _joined(own, metrics)

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
                own, own_moments, finite, metrics = take(phase, others, own, own_moments, finite, here)
                return (own, own_moments, finite), metrics

            # A loop carries what it changes alone: every other leaf would cost time to compile.
            carry: Any = (*({name: tree[name] for name in phase.models} for tree in (weights, moments)), finite)
            if phase.repeats == 1:
                (own, own_moments, finite), metrics = once(carry, jnp.int32(0))
            else:  # a loop, so that the phase is compiled once
                (own, own_moments, finite), all_of_them = jax.lax.scan(once, carry, jnp.arange(phase.repeats))
                metrics = jax.tree.map(lambda each: each[-1], all_of_them)
            weights, moments = {**weights, **own}, {**moments, **own_moments}
            logged = _joined(logged, metrics)
        # Models that may have been updated before something was not finite.
        early = sorted({name for name, phase in latest.items() if phase.repeats > 1 or phase is not taken[-1]})
        new_state = next_state(state, weights, moments, finite, settings.ema, early)
        new_state = jax.lax.with_sharding_constraint(new_state, tree_shardings(mesh, new_state))
        first = next(iter(taken[-1].models))
        own = {"param_norm": optax.tree.norm(new_state.trainable[first]), "skipped": new_state.skipped}
        return new_state, jax.lax.with_sharding_constraint(_joined(own, logged), replicated(mesh))

    return jax.jit(step, donate_argnums=0, compiler_options=dict(compiler_options or {}))


def _joined(own: Metrics, metrics: Metrics) -> Metrics:
    """Join two sets of metrics; ValueError where both name one."""
    if clash := own.keys() & metrics.keys():
        raise ValueError(f"the loss returns metrics that the step computes itself: {sorted(clash)}")
    return own | metrics
