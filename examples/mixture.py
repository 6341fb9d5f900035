"""The method in two dimensions, where everything can be seen: ``python examples/mixture.py``, half a minute on a CPU.

The base is no network but the exact denoiser of a mixture of Gaussians, E[x_0 | x_t]; its adapter is a low-rank head
on fixed random features. TSCD and DMD train it by the code that trains Stable Diffusion: `Mixture` is all that they see
of a model (`hypersd_jax.bases.Base`). The plot shows the data, the teacher in many steps and in one, and both
students in one.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax.adapters import init, join, split
from hypersd_jax.config import ConsistencyStage, ScoreStage
from hypersd_jax.diffusion import Schedule, solver_table
from hypersd_jax.distill import endpoint, pad_segments
from hypersd_jax.stages import consistency, generator
from hypersd_jax.stages.kinds import FAKE, STUDENT, training_step
from hypersd_jax.training import init_state, make_mesh

MODES, SPREAD, FEATURES, RANK, BATCH = 8, 0.08, 256, 8, 256
LAST = 999  # the noisiest of 1000 training times
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "sample",
}


class Mixture:
    """A base model: latents (B, 1, 1, 2) are points of a plane, conditioned on nothing."""

    schedule = Schedule(**SCHEDULER)
    latent_shape, scheduler_config, compiler_options = (1, 1, 2), SCHEDULER, {}

    def __init__(self) -> None:
        angles = 2 * np.pi * np.arange(MODES) / MODES
        self.weights = {"means": jnp.asarray(np.stack([np.cos(angles), np.sin(angles)], -1), jnp.float32)}
        draw = np.random.default_rng(0)
        self._frequencies = jnp.asarray(draw.normal(0, 1.5, (3, FEATURES)), jnp.float32)
        self._phases = jnp.asarray(draw.uniform(0, 2 * np.pi, (FEATURES,)), jnp.float32)

    def predict(
        self, weights: Any, x: jax.Array, t: jax.Array, cond: Any, *, adapter: Any = None, taps: Any = ()
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The mean of x_0 given x at time t, and an adapter's term on features of (x, t)."""
        points = x.reshape(-1, 2)
        alpha, sigma = (jnp.asarray(each)[t][:, None] for each in (self.schedule.alpha, self.schedule.sigma))
        variance = (alpha * SPREAD) ** 2 + sigma**2
        offsets = points[:, None] - alpha[:, None] * weights["means"][None]
        share = jax.nn.softmax(-0.5 * jnp.sum(offsets**2, axis=-1) / variance, axis=-1)
        clean = weights["means"][None] + (alpha * SPREAD**2 / variance)[:, None] * offsets
        mean = jnp.sum(share[..., None] * clean, axis=1)
        if adapter is not None:
            inputs = jnp.concatenate([points, 2.0 * t[:, None] / LAST - 1.0], axis=-1)
            features = jnp.cos(inputs @ self._frequencies + self._phases[None]) * (2.0 / FEATURES) ** 0.5
            part = adapter["to_out.0"]
            mean = mean + ((features @ part["down"]) * part["scale"][None]) @ part["up"]
        return mean.reshape(x.shape), {}

    def unconditional(self, row: Any, cond: Any) -> Any:
        """Return the conditional, which is nothing."""
        return cond

    def fresh_adapter(self, key: jax.Array, *, rank: int, alpha: float | None = None) -> Any:
        """One module, from the features to the plane."""
        shapes = {"to_out.0.kernel": jax.ShapeDtypeStruct((FEATURES, 2), jnp.float32)}
        adapter = init(key, shapes, rank=rank, alpha=alpha, targets=("to_out.0",))
        return {path.removeprefix("."): part for path, part in adapter.items()}

    def data(self, key: jax.Array, count: int) -> jax.Array:
        """Samples (count, 1, 1, 2) of the mixture."""
        which, where = jax.random.split(key)
        modes = self.weights["means"][jax.random.randint(which, (count,), 0, MODES)]
        return (modes + SPREAD * jax.random.normal(where, (count, 2)))[:, None, None]


def train(base: Mixture, stage: Any, frozen: Any, models: dict[str, Any]) -> Any:
    """All updates of a stage; returns the student's averaged factors."""
    mesh = make_mesh(1, 1)
    step, state = training_step(base, mesh), init_state(models, stage, averaged=(STUDENT,), mesh=mesh)
    key = jax.random.key(stage.updates)
    for number in range(stage.updates):
        latents = base.data(jax.random.fold_in(key, number), BATCH)
        batch = {"latents": latents, "cond": jnp.zeros((BATCH, 1)), "indices": jnp.arange(BATCH)}
        state, _ = step(state, frozen, jax.tree.map(lambda leaf: leaf[None], batch), key, stage)
    return state.ema[STUDENT]


def run(updates: int) -> dict[str, np.ndarray]:
    """Points (N, 2) by what made them."""
    base, seeds = Mixture(), jax.random.split(jax.random.key(0), 4)
    factors, scales = split(base.fresh_adapter(seeds[0], rank=RANK))
    fake, _ = split(base.fresh_adapter(seeds[1], rank=RANK))
    common: dict[str, Any] = {"name": "toy", "batch_size": BATCH, "schedule": "cosine", "learning_rate": 2e-2}
    uncond = jnp.zeros((1, 1))

    tscd = ConsistencyStage(k=1, solver_steps=20, guidance=(1.0, 1.0), updates=updates, **common)
    segments = pad_segments(20, 1, 20)
    frozen = consistency.Frozen(base.weights, uncond, scales, {}, segments)
    consistent = train(base, tscd, frozen, {STUDENT: factors})

    dmd = ScoreStage(kind="dmd", guidance=1.0, updates=updates // 2, fake_updates=4, fake_learning_rate=2e-2, **common)
    times = np.asarray([[20, 980], [0, LAST]], np.int32)
    settings: dict[str, Any] = {"regression": {}, "regulariser": {}, "tables": generator.Tables()}
    settings |= {"bounds": times[0], "fake_bounds": times[1], "fake_scales": scales}
    matched = train(
        base,
        dmd,
        generator.Frozen(base.weights, uncond, scales, **settings),
        {STUDENT: consistent, FAKE: fake},
    )

    noise = jax.random.normal(seeds[2], (2000, 1, 1, 2))
    found = {"data": base.data(seeds[3], 2000)}
    table = {steps: solver_table("ddim", steps, eta=0.0, scheduler_config=SCHEDULER)["timesteps"] for steps in (50, 1)}
    for name, lora, steps in (
        ("teacher, 50 steps", None, 50),
        ("teacher, 1 step", None, 1),
        ("TSCD, 1 step", consistent, 1),
        ("TSCD then DMD, 1 step", matched, 1),
    ):
        adapter = None if lora is None else join(lora, scales)

        def predict(x: jax.Array, t: jax.Array, cond: Any, adapter: Any = adapter) -> jax.Array:
            return base.predict(base.weights, x, t, cond, adapter=adapter)[0]

        found[name] = endpoint(predict, noise, None, jnp.asarray(table[steps]), schedule=base.schedule)
    return {name: np.asarray(points).reshape(-1, 2) for name, points in found.items()}


def energy_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Energy distance of two sets of points (Szekely and Rizzo 2013): 0 where their distributions are the same."""

    def mean(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.linalg.norm(x[:, None] - y[None], axis=-1).mean())

    return 2 * mean(a, b) - mean(a, a) - mean(b, b)


def main() -> None:
    """Train, print the distances to the data, and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=1500)
    parser.add_argument("--output", type=Path, default=Path("outputs/mixture.png"))
    options = parser.parse_args()
    found = run(options.updates)
    for name, points in found.items():
        print(f"{name:24} energy distance to the data {energy_distance(points, found['data']):.4f}")

    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(3 * len(found), 3.2), sharex=True, sharey=True)
    for axis, (name, points) in zip(axes, found.items(), strict=True):
        axis.scatter(*points.T, s=2, alpha=0.4)
        axis.set(title=name, xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), aspect="equal")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=110, bbox_inches="tight")
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
