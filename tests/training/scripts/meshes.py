"""Train the toy on one mesh shape after another; run by test_devices.py in a process of its own, with eight devices.

Prints one JSON object of what was seen.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from hypersd_jax import training
from hypersd_jax.errors import UserError
from hypersd_jax.weights import fingerprint
from hypersd_jax.weights.placement import place
from tests.helpers import toy_training as toy
from tests.helpers.compilations import Compilations

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

WIDTH = 8_208  # 8 x 8,208 float32 is 263 kB: just over the rule's threshold
# The norm that gradients are clipped to is so small that where one is all rounding, Adam's eps holds it down.
SLOW = {"learning_rate": 1e-4, "warmup": 0, "schedule": "constant", "weight_decay": 0.0, "clip_norm": 1e-3}
SHAPES = [(1, 1), (8, 1), (2, 4), (1, 8)]


def split(tree) -> dict[str, list]:
    """The leaves that are really in pieces, and the shape of a piece."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.addressable_shards[0].data.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if leaf.addressable_shards[0].data.shape != leaf.shape
    }


def same_everywhere(seen: dict) -> list[toy.Run]:
    runs = []
    for shape in SHAPES:
        run = toy.Run(training.make_mesh(*shape), width=WIDTH, accumulate=2, **SLOW)
        before = split(run.state)
        first = run.state
        history = run.go(1)
        compilations = Compilations.counting()
        history += run.go(2)
        runs.append(run)
        seen["x".join(map(str, shape))] = {
            "loss": [each["loss"] for each in history],
            "grad_norm": [each["grad_norm"] for each in history],
            "difference": max(
                float(np.max(np.abs(np.asarray(a) - np.asarray(b))))
                for a, b in zip(jax.tree.leaves(run.state), jax.tree.leaves(runs[0].state), strict=True)
            ),
            "compiled_later": compilations.count,
            "split_before": before,
            "split_after": split(run.state),
            "donated": all(leaf.is_deleted() for leaf in jax.tree.leaves(first)),
            "frozen_kept": not any(leaf.is_deleted() for leaf in jax.tree.leaves(run.frozen)),
        }
    return runs


def restored_elsewhere(runs: list[toy.Run], folder: Path) -> bool:
    """A state saved under 2 x 4 comes back bit for bit, and in other pieces, under 1 x 8 and 1 x 1."""
    saved = runs[SHAPES.index((2, 4))]
    with training.Checkpointer(folder) as checkpointer:
        checkpointer.save(3, saved.state, {})
        for other in (runs[SHAPES.index((1, 8))], runs[0]):
            state, _ = checkpointer.restore(3, training.abstract(other.mesh, other.state))
            toy.assert_same(state, saved.state)
            if split(state) != split(other.state):
                return False
    return True


def constrained(mesh) -> bool:
    """A loss may constrain activations to the batch axes by name alone."""

    def loss(models, ema, frozen, rows, key):
        hidden = jax.lax.with_sharding_constraint(rows["x"] @ models["a"], P(("data", "fsdp")))
        return jnp.mean(jnp.square(hidden)), {}

    state = training.init_state({"a": jnp.ones((4, 4))}, toy.SETTINGS, averaged=(), mesh=mesh)
    step = training.make_step(lambda settings: [training.Phase(models={"a": 1e-2}, loss=loss)], mesh=mesh)
    batch = training.put_batch({"x": np.ones((1, 16, 4), "f")}, training.batch_sharding(mesh, axis=1))
    _, metrics = step(state, {}, batch, jax.random.key(0), toy.SETTINGS)
    return float(metrics["loss"]) == 16.0


def rules(mesh) -> dict[str, str]:
    big = 2**17
    return {
        name: str(training.leaf_sharding(mesh, shape, dtype).spec)
        for name, shape, dtype in [
            ("small", (256, 256), np.float32),
            ("half_as_wide", (big,), jnp.bfloat16),
            ("tall", (big, 2), np.float32),
            ("kernel", (3, 3, 640, 1280), np.float32),
            ("square", (2048, 2048), np.float32),
            ("second_choice", (1281, 1280), np.float32),
            ("none_fits", (1281, 1281), np.float32),
        ]
    }


def fingerprints() -> list[str]:
    """Of the same weights on every mesh: split in both axes, replicated, and on the host."""
    rng = np.random.default_rng(0)
    weights = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in (("kernel", (3, 3, 64, 128)), ("tall", (2**16, 2)), ("small", (5,)))
    }
    found = [fingerprint(weights)]
    for shape in SHAPES:
        mesh = training.make_mesh(*shape)
        found.append(fingerprint(place(mesh, weights)))
    return found


def main() -> None:
    seen: dict = {"devices": jax.device_count()}
    runs = same_everywhere(seen)
    seen["restored"] = restored_elsewhere(runs, Path(sys.argv[1]))
    mesh = training.make_mesh(2, 4)
    seen["constrained"] = constrained(mesh)
    seen["fingerprints"] = fingerprints()
    seen["rules"] = rules(mesh)
    seen["default"] = dict(training.make_mesh(fsdp=2).shape)
    counts = (1, 2, 3, 4, 6, 8)
    seen["auto"] = [list(training.make_mesh(fsdp="auto", devices=jax.devices()[:n]).shape.values()) for n in counts]
    seen["auto of the rest"] = dict(training.make_mesh(data=4, fsdp="auto").shape)
    try:
        training.put_batch({"x": np.zeros((1, 12, 4))}, training.batch_sharding(mesh, axis=1))
    except UserError as error:
        seen["uneven"] = str(error)
    batch = training.put_batch({"x": np.zeros((2, 16, 4))}, training.batch_sharding(mesh, axis=1))
    seen["batch_piece"] = batch["x"].addressable_shards[0].data.shape
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
