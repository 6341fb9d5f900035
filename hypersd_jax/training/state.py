"""The state that training changes: the trainable tree, its optimizer state, its moving average and two counters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import ArrayLike

from hypersd_jax.training.optimizer import make_optimizer
from hypersd_jax.training.settings import Settings
from hypersd_jax.training.shardings import tree_shardings
from hypersd_jax.weights.placement import place


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """All that a checkpoint holds; the frozen base is never in it.

    Attributes:
        step: finished steps of this stage, skipped ones included, int32.
        trainable: float32 master weights by model: adapters and discriminator heads, or all weights of a network.
        opt_state: the optimizers' states by model; Adam holds two float32 copies of the weights and a counter.
        ema: moving averages of `trainable`, of those models that are averaged.
        skipped: steps whose loss or gradient was not finite, int32.
    """

    step: jax.Array
    trainable: Any
    opt_state: Any
    ema: Any
    skipped: jax.Array


def init_state(
    trainable: Mapping[str, Any],
    settings: Settings,
    *,
    averaged: Collection[str],
    mesh: Mesh | None = None,
) -> TrainState:
    """Make the state before the first step, with `ema` equal to what it averages.

    Args:
        trainable: a tree of float32 arrays for each model, copied: the caller's outlive the donation of the state.
        settings: the stage's, for the optimizer of each model.
        averaged: models whose weights are averaged.
        mesh: places every leaf by `tree_shardings`; None leaves them where they are.

    Raises:
        ValueError: naming a leaf that is not float32.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(trainable):
        if leaf.dtype != jnp.float32:
            raise ValueError(f"trainable leaf {jax.tree_util.keystr(path)} is {leaf.dtype}; master weights are float32")
    optimizer = make_optimizer(settings)

    def make(tree: Mapping[str, Any]) -> TrainState:
        return TrainState(
            step=jnp.int32(0),
            trainable=jax.tree.map(jnp.copy, tree),
            opt_state={name: optimizer.init(weights) for name, weights in tree.items()},
            ema=jax.tree.map(jnp.copy, {name: tree[name] for name in averaged}),
            skipped=jnp.int32(0),
        )

    trainable = dict(trainable)
    if mesh is None:
        return jax.jit(make)(trainable)
    trainable = place(mesh, trainable)
    return jax.jit(make, out_shardings=tree_shardings(mesh, jax.eval_shape(make, trainable)))(trainable)


def moving_average(ema: Any, params: Any, decay: ArrayLike) -> Any:
    """Compute `decay * ema + (1 - decay) * params`; at decay 0 exactly `params`."""
    return jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, ema, params)


def next_state(
    state: TrainState, trainable: Any, opt_state: Any, finite: jax.Array, decay: ArrayLike, early: Collection[str]
) -> TrainState:
    """Make the state after a step; one that was not ``finite`` changes nothing but the two counters.

    ``early`` are the models that may have been updated before something was not finite.
    """

    def of_early(trees: Any) -> Any:
        return {name: trees[name] for name in early}

    def moved() -> tuple[Any, Any, Any]:
        ema = moving_average(state.ema, {name: trainable[name] for name in state.ema}, decay)
        return of_early(trainable), of_early(opt_state), ema

    def kept() -> tuple[Any, Any, Any]:
        return of_early(state.trainable), of_early(state.opt_state), dict(state.ema)

    own, own_moments, ema = jax.lax.cond(finite, moved, kept)
    return TrainState(
        step=state.step + 1,
        trainable={**trainable, **own},
        opt_state={**opt_state, **own_moments},
        ema=ema,
        skipped=state.skipped + jnp.where(finite, 0, 1),
    )
