"""The device mesh, and how batches are placed on it.

Two axes: `data` splits the batch alone, `fsdp` splits the batch and every large leaf of the state. One chip is the mesh
1 x 1, so nothing else in the engine asks how many devices there are.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hypersd_jax.errors import UserError
from hypersd_jax.weights.placement import BATCH_AXES

Tree = TypeVar("Tree")


MOST_AUTO_FSDP = 8
"""Devices that `auto` splits a model over: as many as share fast links in one host; a power of two, as widths are."""


def make_mesh(
    data: int | None = None, fsdp: int | Literal["auto"] = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Arrange devices as (data, fsdp).

    Args:
        data: devices along `data`; None takes all that `fsdp` leaves.
        fsdp: devices along `fsdp`. "auto" is the greatest common divisor of 8 and the devices there are, or those that
            an explicit `data` leaves: 1 on one device, 4 on four or twelve, 8 on any pod.
        devices: the devices to arrange; None takes all of this run. With fewer devices asked for than there are, the
            first ones serve, except in a run of several processes, where every process must own a part.

    Raises:
        UserError: naming `mesh.data` or `mesh.fsdp`, when the two do not fit the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(data, fsdp, len(devices))
    return Mesh(arranged(devices[: math.prod(shape)], *shape), BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


def mesh_shape(data: int | None, fsdp: int | Literal["auto"], count: int) -> tuple[int, int]:
    """Compute the axes (data, fsdp) of `make_mesh` on ``count`` devices; raises as it does."""
    if data is not None and data < 1:
        raise UserError(f"mesh.data must be at least 1, not {data}")
    if fsdp == "auto":
        fsdp = math.gcd(MOST_AUTO_FSDP, max(count // (data or 1), 1))
    if fsdp < 1:
        raise UserError(f"mesh.fsdp must be at least 1, not {fsdp}")
    if data is None:
        if count % fsdp:
            there = "1 device" if count == 1 else f"{count} devices"
            raise UserError(
                f"mesh.fsdp={fsdp} does not divide the {there} of this run; mesh.fsdp=auto takes what is there"
            )
        data = count // fsdp
    wanted = data * fsdp
    if wanted > count or (wanted < count and jax.process_count() > 1):
        raise UserError(
            f"mesh.data={data} times mesh.fsdp={fsdp} is {wanted} devices, but this run has {count}; "
            f"mesh.data=null mesh.fsdp=auto take what is there"
        )
    return data, fsdp


def arranged(devices: Sequence[Any], data: int, fsdp: int) -> np.ndarray:
    """Arrange data x fsdp devices so that those along ``fsdp``, which talk most, are neighbours.

    On several slices, joined by a slower network, ``data`` spans the slices and ``fsdp`` stays within one, where it
    fits; else a warning says so.
    """
    counts = Counter(getattr(device, "slice_index", 0) for device in devices)
    slices = len(counts)
    if slices > 1 and (data % slices or len(set(counts.values())) > 1):
        warnings.warn(
            f"mesh.fsdp={fsdp}: the devices are in {slices} slices, and weights are gathered across them; "
            f"faster is a mesh.fsdp that divides the {min(counts.values())} devices of a slice",
            stacklevel=2,
        )
        return np.asarray(devices).reshape(data, fsdp)
    make: Callable[..., np.ndarray] = functools.partial(mesh_utils.create_device_mesh, (data, fsdp), devices)
    if slices > 1:
        make = functools.partial(
            mesh_utils.create_hybrid_device_mesh, (data // slices, fsdp), (slices, 1), devices=devices
        )
    try:
        return make()
    except NotImplementedError:  # no axis of the chips' torus is as long: 8 of 4 x 4 x 4
        return make(allow_split_physical_axes=True)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that has the same value on every device."""
    return NamedSharding(mesh, P())


def put_batch(batch: Tree, sharding: NamedSharding) -> Tree:
    """Move a batch of NumPy arrays to the devices.

    Args:
        batch: tree of arrays. In a run of several processes each brings its own samples, equally many in each, and the
            result is the global batch.
        sharding: from `weights.placement.batch_sharding`; training batches are split along axis 1, behind the
            micro-batches.

    Raises:
        UserError: naming `batch_size`, when the samples cannot be split evenly.
    """
    axis = len(sharding.spec) - 1
    shards = sharding.mesh.size // jax.process_count()

    def put(leaf: Any) -> jax.Array:
        size = np.shape(leaf)[axis]
        if size % shards:
            raise UserError(f"batch_size: {size} samples in this process cannot be split evenly over {shards} devices")
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    return jax.tree.map(put, batch)


def process_indices(batch_size: int, accumulate: int) -> np.ndarray:
    """Return the batch indices (A, B') that this process loads: its part of each micro-batch of (A, B)."""
    indices = np.arange(batch_size).reshape(accumulate, -1)
    share = indices.shape[1] // jax.process_count()
    first = jax.process_index() * share
    return indices[:, first : first + share]
