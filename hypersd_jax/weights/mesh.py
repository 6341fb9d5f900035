"""The device mesh.

Two axes: `data` splits the batch alone, `fsdp` splits the batch and every large leaf. One chip is the mesh 1 x 1, so
that training does not ask how many devices there are; sampling on one device has no mesh.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from hypersd_jax.errors import UserError
from hypersd_jax.weights.placement import BATCH_AXES

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


def mesh_of_option(data: int | None, fsdp: int | Literal["auto"]) -> Mesh:
    """Make the mesh that the option ``--mesh DATAxFSDP`` or ``--mesh auto``, (None, "auto"), asks for.

    Raises:
        UserError: naming the option, when there are not as many devices.
    """
    there = jax.device_count()
    if data is not None and fsdp != "auto" and data * fsdp > there:
        raise UserError(f"--mesh {data}x{fsdp}: takes {data * fsdp} devices, and there are {there}")
    return make_mesh(data, fsdp)
