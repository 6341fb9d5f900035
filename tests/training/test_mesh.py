"""Mesh shapes, the sharding rule, and the errors that name the key; several devices are in test_devices.py."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from hypersd_jax import training
from hypersd_jax.errors import UserError
from hypersd_jax.training.mesh import arranged


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


def chips(slices: int, each: int) -> list[SimpleNamespace]:
    """Devices of several slices, in an order that says nothing."""
    made = [
        SimpleNamespace(id=number, slice_index=number % slices, process_index=0, platform="cpu", device_kind="chip")
        for number in range(slices * each)
    ]
    return sorted(made, key=lambda chip: chip.id * 5 % 7)


@pytest.mark.parametrize(("slices", "each", "data", "fsdp"), [(2, 8, 2, 8), (2, 8, 4, 4), (4, 2, 8, 1), (1, 8, 2, 4)])
def test_weights_are_split_within_a_slice(slices, each, data, fsdp):
    grid = arranged(chips(slices, each), data, fsdp)
    assert grid.shape == (data, fsdp)
    assert all(len({chip.slice_index for chip in row}) == 1 for row in grid)
    assert sorted(chip.id for chip in grid.flat) == list(range(slices * each))


def test_weights_that_do_not_fit_a_slice_are_a_warning():
    with pytest.warns(UserWarning, match=r"mesh.fsdp=8: the devices are in 2 slices.* divides the 4 devices"):
        grid = arranged(chips(2, 4), 1, 8)
    assert grid.shape == (1, 8)
