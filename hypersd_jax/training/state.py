"""What training changes: the trainable tree, its optimizer state, its moving average and two counters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import ArrayLike

from hypersd_jax.training.shardings import tree_shardings


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The whole of what a checkpoint holds; the frozen base is never in it.

    Attributes:
        step: finished steps of this stage, skipped ones included, int32.
        trainable: float32 master weights: adapters and heads, or whole networks.
        opt_state: the optimizer's state; Adam holds two float32 copies of `trainable` and a counter.
        ema: moving average of `trainable`, same structure; of several players' trees, those that are averaged.
        skipped: steps whose loss or gradient was not finite, int32.
    """

    step: jax.Array
    trainable: Any
    opt_state: Any
    ema: Any
    skipped: jax.Array


def init_state(trainable: Any, tx: optax.GradientTransformation, mesh: Mesh | None = None) -> TrainState:
    """The state before the first step, with `ema` equal to `trainable`.

    Args:
        trainable: tree of float32 arrays, copied: the caller's arrays outlive the donation of the state.
        tx: the optimizer.
        mesh: places every leaf by `tree_shardings`; None leaves them where they are.

    Raises:
        ValueError: naming a leaf that is not float32.
    """
    _require_float32(trainable)
    return _placed(trainable, tx.init, lambda tree: tree, mesh)


def init_players(
    trainable: Mapping[str, Any],
    optimizers: Mapping[str, optax.GradientTransformation],
    *,
    averaged: Collection[str],
    mesh: Mesh | None = None,
) -> TrainState:
    """The state before the first round of several players (`rounds`): everything by player, the average of some."""
    _require_float32(trainable)

    def moments(tree: Any) -> Any:
        return {name: tx.init(tree[name]) for name, tx in optimizers.items()}

    return _placed(dict(trainable), moments, lambda tree: {name: tree[name] for name in averaged}, mesh)


def _placed(trainable: Any, moments: Callable[[Any], Any], averaged: Callable[[Any], Any], mesh: Mesh | None) -> Any:
    def make(tree: Any) -> TrainState:
        return TrainState(
            step=jnp.int32(0),
            trainable=jax.tree.map(jnp.copy, tree),
            opt_state=moments(tree),
            ema=jax.tree.map(jnp.copy, averaged(tree)),
            skipped=jnp.int32(0),
        )

    if mesh is None:
        return jax.jit(make)(trainable)
    trainable = jax.device_put(trainable, tree_shardings(mesh, trainable))
    return jax.jit(make, out_shardings=tree_shardings(mesh, jax.eval_shape(make, trainable)))(trainable)


def _require_float32(trainable: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(trainable):
        if leaf.dtype != jnp.float32:
            raise ValueError(f"trainable leaf {jax.tree_util.keystr(path)} is {leaf.dtype}; master weights are float32")


def moving_average(ema: Any, params: Any, decay: ArrayLike) -> Any:
    """`decay * ema + (1 - decay) * params`; at decay 0 exactly `params`."""
    return jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, ema, params)
