"""The device mesh, and the placement of arrays on it: one rule for base weights, adapters and optimizer state.

Two axes: `data` splits the batch alone, `fsdp` splits the batch and every large leaf. One chip is the mesh 1 x 1, so
that training does not ask how many devices there are; sampling on one device has no mesh.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hypersd_jax.errors import UserError

# Below this a leaf costs less to hold everywhere than to gather.
SHARD_ABOVE_BYTES = 4 * 1024 * 1024
BATCH_AXES = ("data", "fsdp")
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
    count = len(devices)
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
    return jax.make_mesh((data, fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices[:wanted])


def mesh_of_option(data: int | None, fsdp: int | Literal["auto"]) -> Mesh:
    """Make the mesh that the option ``--mesh DATAxFSDP`` or ``--mesh auto``, (None, "auto"), asks for.

    Raises:
        UserError: naming the option, when there are not as many devices.
    """
    there = jax.device_count()
    if data is not None and fsdp != "auto" and data * fsdp > there:
        raise UserError(f"--mesh {data}x{fsdp}: takes {data * fsdp} devices, and there are {there}")
    return make_mesh(data, fsdp)


def leaf_sharding(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> NamedSharding:
    """A leaf over 4 MB is split along its largest dimension that ``fsdp`` divides; any other is replicated."""
    size = mesh.shape["fsdp"]
    spec: list[str | None] = [None] * len(shape)
    if math.prod(shape) * jnp.dtype(dtype).itemsize > SHARD_ABOVE_BYTES:
        divisible = [axis for axis, length in enumerate(shape) if length % size == 0]
        if divisible:
            spec[max(divisible, key=lambda axis: shape[axis])] = "fsdp"
    return NamedSharding(mesh, PartitionSpec(*spec))


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """A batch is split along ``axis`` over all devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXES))
