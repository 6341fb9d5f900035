"""A two-layer network on noisy regression: the smallest thing that the training engine can train."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hypersd_jax import training
from hypersd_jax.training.step import Step

FEATURES = 8
QUICK = {"xla_backend_optimization_level": 0}  # compiles in half the time
CONFIG = training.OptimizerConfig(learning_rate=1e-2, warmup_steps=2, schedule="cosine", weight_decay=1e-2)


def trainable(width: int = 16) -> dict[str, dict[str, np.ndarray]]:
    draw = np.random.default_rng(0)
    scale = np.float32(FEATURES**-0.5)
    return {
        "first": {"kernel": scale * draw.standard_normal((FEATURES, width), np.float32), "bias": np.zeros(width, "f")},
        "second": {"kernel": draw.standard_normal((width, 1), np.float32), "bias": np.zeros(1, "f")},
    }


def frozen() -> dict[str, np.ndarray]:
    return {"mixing": np.linalg.qr(np.random.default_rng(1).standard_normal((FEATURES, FEATURES)))[0].astype("f")}


def batch(step: int, rows: int = 16, accumulate: int = 1) -> dict[str, np.ndarray]:
    """The batch of one step: a function of the step alone, so that a restart sees the same data."""
    x = np.random.default_rng([2, step]).standard_normal((rows, FEATURES), np.float32)
    y = np.sin(x.sum(axis=1, keepdims=True))
    place = np.arange(rows, dtype=np.int32)
    leaves = {"x": x, "y": y, "place": place}
    return {name: leaf.reshape(accumulate, rows // accumulate, *leaf.shape[1:]) for name, leaf in leaves.items()}


def predict(params, frozen, x):
    hidden = jnp.tanh(x @ frozen["mixing"] @ params["first"]["kernel"] + params["first"]["bias"][None])
    return (hidden @ params["second"]["kernel"]) / np.float32(hidden.shape[-1]) ** 0.5 + params["second"]["bias"][None]


def loss(trainable, ema, frozen, batch, key, controls):
    """Regression plus consistency with the average, each row's input jittered by `controls["jitter"]`."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, batch["place"])
    noise = controls["jitter"] * jax.vmap(lambda row_key: jax.random.normal(row_key, batch["x"].shape[1:]))(keys)
    prediction = predict(trainable, frozen, batch["x"] + noise)
    target = jax.lax.stop_gradient(predict(ema, frozen, batch["x"]))
    error = jnp.mean(jnp.square(prediction - batch["y"]))
    drift = jnp.mean(jnp.square(prediction - target))
    return error + 0.1 * drift, {"error": error, "drift": drift}


def controls(updates: int = 10, *, jitter: float = 0.1, ema_decay: float = 0.9, config=CONFIG) -> training.Controls:
    return training.optimizer_controls(config, updates) | {
        "ema_decay": np.asarray(ema_decay, np.float32),
        "jitter": np.asarray(jitter, np.float32),
    }


@functools.cache
def compiled(mesh: Mesh, width: int, accumulate: int, config: training.OptimizerConfig) -> Step:
    """One compiled step for all the tests that need the same one."""
    tx = training.make_optimizer(config)
    state = jax.eval_shape(lambda: training.init_state(trainable(width), tx))
    return training.make_step(loss, tx, state, frozen(), mesh=mesh, accumulate=accumulate, compiler_options=QUICK)


class Run:
    """State, step and frozen tree on a mesh; `go(n)` takes n steps."""

    def __init__(self, mesh: Mesh | None = None, *, width=16, accumulate=1, config=CONFIG, rows=16, **control) -> None:
        self.mesh = mesh or training.make_mesh(1, 1)
        self.frozen = jax.device_put(frozen(), training.tree_shardings(self.mesh, frozen()))
        self.state = training.init_state(trainable(width), training.make_optimizer(config), self.mesh)
        self.step = compiled(self.mesh, width, accumulate, config)
        self.controls = controls(config=config, **control)
        self.rows, self.accumulate = rows, accumulate
        self.key = jax.random.key(7)

    def go(self, steps: int) -> list[dict[str, float]]:
        history = []
        for _ in range(steps):
            data = batch(int(self.state.step), self.rows, self.accumulate)
            data = training.put_batch(data, training.batch_sharding(self.mesh, axis=1))
            self.state, metrics = self.step(self.state, self.frozen, data, self.key, self.controls)
            history.append({name: float(value) for name, value in metrics.items()})
        return history


def assert_same(first, second) -> None:
    """Bit for bit the same tree."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=jax.tree_util.keystr(path))
