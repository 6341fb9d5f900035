"""A two-layer network on noisy regression: the smallest thing that the training engine can train."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hypersd_jax import training
from hypersd_jax.config.fields import static

FEATURES = 8


@training.step_argument
@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the engine reads of a stage, and the strength of the toy's noise."""

    updates: int = 10
    learning_rate: float = 1e-2
    warmup: int = 2
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    beta1: float = static(0.9)
    beta2: float = static(0.999)
    weight_decay: float = static(1e-2)
    clip_norm: float = static(1.0)
    ema: float = 0.9
    accumulate: int = static(1)
    jitter: float = 0.1


SETTINGS = Settings()


def trainable(width: int = 16) -> dict[str, Any]:
    """Weights by model, of which there is one."""
    draw = np.random.default_rng(0)
    scale = np.float32(FEATURES**-0.5)
    layers = {
        "first": {"kernel": scale * draw.standard_normal((FEATURES, width), np.float32), "bias": np.zeros(width, "f")},
        "second": {"kernel": draw.standard_normal((width, 1), np.float32), "bias": np.zeros(1, "f")},
    }
    return {"student": layers}


def fresh(mesh: Mesh | None = None, *, width: int = 16, settings: Any = SETTINGS) -> training.TrainState:
    """The state before the first step."""
    return training.init_state(trainable(width), settings, averaged=("student",), mesh=mesh)


def frozen() -> dict[str, np.ndarray]:
    return {"mixing": np.linalg.qr(np.random.default_rng(1).standard_normal((FEATURES, FEATURES)))[0].astype("f")}


def batch(step: int, rows: int = 16, accumulate: int = 1) -> dict[str, np.ndarray]:
    """The batch of one step: a function of the step alone, so that a restart sees the same data."""
    x = np.random.default_rng([2, step]).standard_normal((rows, FEATURES), np.float32)
    y = np.sin(x.sum(axis=1, keepdims=True))
    index = np.arange(rows, dtype=np.int32)
    leaves = {"x": x, "y": y, "index": index}
    return {name: leaf.reshape(accumulate, rows // accumulate, *leaf.shape[1:]) for name, leaf in leaves.items()}


def noisy(rows, key, jitter):
    """The inputs (B, FEATURES), each row jittered by its index."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows["index"])
    return rows["x"] + jitter * jax.vmap(lambda row_key: jax.random.normal(row_key, rows["x"].shape[1:]))(keys)


def predict(params, frozen, x):
    hidden = jnp.tanh(x @ frozen["mixing"] @ params["first"]["kernel"] + params["first"]["bias"][None])
    return (hidden @ params["second"]["kernel"]) / np.float32(hidden.shape[-1]) ** 0.5 + params["second"]["bias"][None]


def make_loss(settings):
    """Regression plus consistency with the average, each row's input jittered by `settings.jitter`."""

    def loss(models, ema, frozen, rows, key):
        prediction = predict(models["student"], frozen, noisy(rows, key, settings.jitter))
        target = jax.lax.stop_gradient(predict(ema["student"], frozen, rows["x"]))
        error = jnp.mean(jnp.square(prediction - rows["y"]))
        drift = jnp.mean(jnp.square(prediction - target))
        return error + 0.1 * drift, {"error": error, "drift": drift}

    return loss


def phases(settings) -> list[training.Phase]:
    return [training.Phase(models={"student": settings.learning_rate}, loss=make_loss(settings))]


@functools.cache
def make_step(mesh: Mesh) -> training.Step:
    """One step for all the tests on a mesh."""
    return training.make_step(phases, mesh=mesh)


class Run:
    """State, step and frozen tree on a mesh; `go(n)` takes n steps."""

    def __init__(self, mesh: Mesh | None = None, *, width: int = 16, rows: int = 16, **settings) -> None:
        self.mesh = mesh or training.make_mesh(1, 1)
        self.frozen = jax.device_put(frozen(), training.tree_shardings(self.mesh, frozen()))
        self.settings = dataclasses.replace(SETTINGS, **settings)
        self.state = fresh(self.mesh, width=width, settings=self.settings)
        self.step = make_step(self.mesh)
        self.rows = rows
        self.key = jax.random.key(7)

    def go(self, steps: int, **settings) -> list[dict[str, float]]:
        """Take steps, with other settings for these alone; returns their metrics."""
        history, here = [], dataclasses.replace(self.settings, **settings)
        for _ in range(steps):
            data = batch(int(self.state.step), self.rows, here.accumulate)
            data = training.put_batch(data, training.batch_sharding(self.mesh, axis=1))
            self.state, metrics = self.step(self.state, self.frozen, data, self.key, here)
            history.append({name: float(value) for name, value in metrics.items()})
        return history


def assert_same(first, second) -> None:
    """Bit for bit the same tree."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=jax.tree_util.keystr(path))
