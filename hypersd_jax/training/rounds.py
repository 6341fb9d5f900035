"""The training step of several players: the student, and what is trained beside it (a fake-score model, heads).

One update is one round: each turn in order, as often as it says, then the student's moving average. A turn
differentiates its own loss in its own players alone; the others stand still. All is one compiled program, so that a
checkpoint always falls between rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from hypersd_jax.training.gradients import Metrics, advanced, compiled, joined, mean_gradient
from hypersd_jax.training.optimizer import Controls, learning_rate_at
from hypersd_jax.training.shardings import tree_shardings
from hypersd_jax.training.state import TrainState, moving_average
from hypersd_jax.training.step import LossFunction, Step

Optimizers = Mapping[str, optax.GradientTransformation]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One kind of update within a round.

    Attributes:
        players: whose weights it changes, the first of whom its gradient norm is logged for in the last turn.
        loss: its loss, given all players' weights.
        repeat: how often it is taken in a row, each time with other randomness on the same batch.
    """

    players: tuple[str, ...]
    loss: LossFunction
    repeat: int = 1


def make_round(
    turns: Sequence[Turn],
    optimizers: Optimizers,
    state: TrainState,
    frozen: Any,
    *,
    mesh: Mesh,
    accumulate: int = 1,
    compiler_options: Mapping[str, Any] | None = None,
) -> Step:
    """Compile a round; the arguments that `make_step` has too mean the same.

    Args:
        turns: in the order in which they are taken; the last one's loss is the round's.
        optimizers: one a player.
        state: ``trainable`` and ``opt_state`` by player, ``ema`` by those players that are averaged.
        frozen: read and never changed.
        mesh: from `make_mesh`.
        accumulate: micro-batches per update of a turn.
        compiler_options: the backend's.

    Turn i's r-th repetition draws from `fold_in(fold_in(fold_in(key, state.step), i), r)`. ``controls["players"]``
    holds `optimizer_controls` by player, ``controls["ema_decay"]`` the average's decay. Metrics: the losses' own (those
    of a repeated turn from its last time); loss, grad_norm, update_norm and lr of the last turn's first player,
    ``PLAYER_grad_norm`` of the others, param_norm, skipped. A round with a loss or gradient that is not finite is
    skipped as a whole.
    """
    state_shardings = tree_shardings(mesh, state)
    latest = {name: turn for turn in turns for name in turn.players}  # whose gradient norm is logged

    def take(turn: Turn, state: TrainState, weights: Any, moments: Any, given: tuple[Any, ...], key: jax.Array) -> Any:
        """One update of a turn: new weights and moments, what it was like, and whether it was finite."""
        frozen, batch, controls = given

        def loss_of(active: Any, rows: Any) -> tuple[jax.Array, Metrics]:
            return turn.loss({**weights, **active}, state.ema, frozen, rows, key, controls)

        active = {name: weights[name] for name in turn.players}
        grads, (loss, metrics) = mean_gradient(loss_of, active, batch, mesh=mesh, accumulate=accumulate)
        finite = jnp.isfinite(loss)
        own: Metrics = {}
        for place, name in enumerate(turn.players):
            norm = optax.tree.norm(grads[name])
            finite &= jnp.isfinite(norm)
            rate = learning_rate_at(controls["players"][name], state.step)
            directions, moments_of = optimizers[name].update(grads[name], moments[name], weights[name])
            updates = jax.tree.map(lambda direction, rate=rate: -rate * direction, directions)
            weights = {**weights, name: optax.apply_updates(weights[name], updates)}
            moments = {**moments, name: moments_of}
            if turn is turns[-1] and place == 0:
                own |= {"loss": loss, "grad_norm": norm, "update_norm": optax.tree.norm(updates), "lr": rate}
            elif turn is latest[name]:
                own[f"{name}_grad_norm"] = norm
        return weights, moments, joined(own, metrics), finite

    def step(
        state: TrainState, frozen: Any, batch: Any, key: jax.Array, controls: Controls
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        given = (frozen, batch, controls)
        weights, moments = state.trainable, state.opt_state
        finite, logged = jnp.bool_(True), Metrics()
        for index, turn in enumerate(turns):
            turn_key = jax.random.fold_in(key, index)

            def once(carry: Any, number: jax.Array, turn: Turn = turn, turn_key: jax.Array = turn_key) -> Any:
                weights, moments, finite = carry
                here = jax.random.fold_in(turn_key, number)
                weights, moments, metrics, good = take(turn, state, weights, moments, given, here)
                return (weights, moments, finite & good), metrics

            carry = (weights, moments, finite)
            if turn.repeat == 1:
                (weights, moments, finite), metrics = once(carry, jnp.int32(0))
            else:
                (weights, moments, finite), all_of_them = jax.lax.scan(once, carry, jnp.arange(turn.repeat))
                metrics = jax.tree.map(lambda each: each[-1], all_of_them)
            logged = joined(logged, metrics)
        ema = moving_average(state.ema, {name: weights[name] for name in state.ema}, controls["ema_decay"])
        new_state = advanced(state, weights, moments, ema, finite)
        logged["update_norm"] = jnp.where(finite, logged["update_norm"], 0.0)
        own = {"param_norm": optax.tree.norm(new_state.trainable[turns[-1].players[0]]), "skipped": new_state.skipped}
        return new_state, joined(own, logged)

    return compiled(step, state_shardings, frozen, mesh=mesh, options=compiler_options)
