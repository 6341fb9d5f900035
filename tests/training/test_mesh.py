"""Mesh shapes, the sharding rule, and the errors that name the key; several devices are in test_devices.py."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from hypersd_jax import training
from hypersd_jax.errors import UserError


def test_one_device_is_one_by_one():
    mesh = training.make_mesh(devices=jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    ("data", "fsdp", "key"),
    [(None, 2, "mesh.fsdp=2"), (2, 1, "mesh.data=2"), (0, 1, "mesh.data"), (1, 0, "mesh.fsdp"), (-1, 1, "mesh.data")],
)
def test_shapes_that_do_not_fit_are_named(data, fsdp, key):
    with pytest.raises(UserError, match=key):
        training.make_mesh(data, fsdp, devices=jax.devices()[:1])


def test_what_does_not_fit_names_what_does():
    with pytest.raises(UserError, match=r"mesh.fsdp=4 does not divide the 1 device .*; mesh.fsdp=auto takes what is"):
        training.make_mesh(None, 4, devices=jax.devices()[:1])


def test_put_batch_keeps_values():
    sharding = training.batch_sharding(training.make_mesh(1, 1), axis=1)
    batch = {"x": np.arange(12.0, dtype=np.float32).reshape(2, 3, 2)}
    np.testing.assert_array_equal(training.put_batch(batch, sharding)["x"], batch["x"])


def test_abstract_carries_shapes_and_shardings():
    mesh = training.make_mesh(1, 1)
    (leaf,) = jax.tree.leaves(training.abstract(mesh, {"a": np.zeros((3, 2), np.float32)}))
    assert leaf.shape == (3, 2)
    assert leaf.sharding.mesh == mesh
