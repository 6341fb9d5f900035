"""TSCD's training step on a GPU is the CPU's: losses, gradient norms, and where they lead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks.sides import training, training_ours
from benchmarks.sides.training_ours import INDEX, Model, given, make_batch, make_run, part_trained, trees
from hypersd_jax.stages.kinds import STUDENT
from hypersd_jax.stages.streams import Stream, stream
from hypersd_jax.training import make_mesh
from hypersd_jax.weights.components import open_model

pytestmark = pytest.mark.gpu

TOLERANCE = 5e-3
"""Relative, of losses and gradient norms in float32: the loss is of small differences between predictions."""
LED_TO = 5e-2
"""Relative to what the updates have changed, by norm: Adam divides small gradients by their own size."""
UPDATES = 2
SHAPE = training.Shape(latent=8, rank=4)


def train(folder: Path, device: jax.Device) -> tuple[list[dict[str, float]], list[np.ndarray], list[np.ndarray]]:
    """The metrics of some updates, and the student's factors before and after."""
    mesh = make_mesh(1, 1, [device])
    with jax.default_device(device):
        unread = Model.describe(open_model(folder), remat=False, mesh=mesh)
        values = given(unread.structure.unet, SHAPE.latent, 2)
        start, scales = part_trained(stream(0, Stream.ADAPTER, 0), unread.unet.shapes, SHAPE.rank)
        case = training.CASES[training.COMPARED]
        run = make_run(SHAPE, case, unread, unread.read(), values, scales, start)
        state, frozen = trees(run)
        before = [np.asarray(leaf) for leaf in jax.tree.leaves(state.trainable[STUDENT])]
        key, batch, found = stream(run.config.seed, Stream.NOISE, INDEX), make_batch(run, values), []
        for _ in range(UPDATES):
            state, metrics = run.step(state, frozen, batch, key, run.config.stages[INDEX])
            found.append({name: float(metrics[name]) for name in ("loss", "grad_norm")})
        leaves = jax.tree.leaves(state.trainable[STUDENT])
        assert all(leaf.devices() == {device} for leaf in leaves)
        return found, before, [np.asarray(leaf) for leaf in leaves]


def test_a_step_of_tscd(model: Path, gpu: jax.Device, cpu: jax.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_ours, "default_dtype", lambda: np.dtype("float32"))
    (ours, before, after), (expected, start, end) = train(model, gpu), train(model, cpu)
    for one, other in zip(ours, expected, strict=True):
        assert one == pytest.approx(other, rel=TOLERANCE)
    np.testing.assert_array_equal(joined(before), joined(start))
    assert np.linalg.norm(joined(after) - joined(end)) < LED_TO * np.linalg.norm(joined(end) - joined(start))


def joined(leaves: list[Any]) -> np.ndarray:
    return np.concatenate([leaf.ravel() for leaf in leaves])
