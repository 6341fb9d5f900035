"""Join the processes of a run, before anything else asks for a device, and connect their devices."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hypersd_jax.config import DistributedConfig
from hypersd_jax.config.distributed import ALONE
from hypersd_jax.errors import UserError, short
from hypersd_jax.training.agreement import process_mesh

LAUNCHERS = (
    ("SLURM", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
)
"""Launchers of several processes: the variable with their number, and the one with the number of this one."""
TPU_CHIPS = "TPU chips"
VISIBLE_DEVICES = ("jax_cuda_visible_devices", "jax_rocm_visible_devices")


def join(config: DistributedConfig) -> None:
    """Meet the other processes of the run; where there is one alone, or they have met, nothing happens.

    Raises:
        UserError: the others did not come in time, or the cluster does not say where they are.
    """
    if jax.distributed.is_initialized() or config.coordinator == ALONE:
        return
    sign = _sign_of_several()
    if config.coordinator is None and sign is None:
        return
    try:
        if config.address is not None and config.process:
            _wait_for(config.address, config.timeout_seconds)
        elif config.address is not None:  # JAX's own words, where nobody comes, would stand alone
            who = f"{config.processes} processes at {config.address}, for {config.timeout_seconds} s at most"
            print(f"waiting for {who}", file=sys.stderr, flush=True)
        jax.distributed.initialize(
            coordinator_address=config.address,
            num_processes=config.processes,
            process_id=config.process,
            initialization_timeout=config.timeout_seconds,
            heartbeat_timeout_seconds=config.timeout_seconds,
            shutdown_timeout_seconds=config.timeout_seconds,
        )
        if _alone_on_its_host():  # JAX has given it one GPU, as each process of these launchers
            for name in VISIBLE_DEVICES:
                jax.config.update(name, os.environ.get(name.upper(), "all"))
    except Exception as error:  # of the coordination service, or of whatever was asked for its address
        reason = short((str(error).strip().splitlines() or [type(error).__name__])[0])
        if config.coordinator is None and sign == TPU_CHIPS and not _has_used_jax(error):
            # Outside Google's cloud nothing says whether there are other hosts.
            warnings.warn(f"this process trains alone: no other host was found ({reason})", stacklevel=2)
            return
        given = f"={config.coordinator}" if config.coordinator else f" (found: {sign})"
        here = "this process" if config.address is None else f"process {config.process} of {config.processes}"
        raise UserError(
            f"distributed.coordinator{given}: {here} did not meet the others in {config.timeout_seconds} s ({reason})"
        ) from None


def connect(mesh: Mesh) -> None:
    """Open every connection that programs on ``mesh`` will use, while all processes are at the same place.

    On CPUs a process waits 30 s at most for the others when a group of devices meets for the first time, and as long as
    it takes later. At their first training step they are minutes apart: JAX keeps compiled programs of process 0 alone.
    """
    if jax.process_count() > 1:
        for each in (process_mesh(), mesh):
            _sum_along_axes(each)


def _sum_along_axes(mesh: Mesh) -> None:
    """Sum one number of each device along each axis of a mesh, and over all devices."""
    names = mesh.axis_names

    def sums(value: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jax.lax.psum(value, axes) for axes in (*names, names))

    rest = [P(tuple(other for other in names if other != name)) for name in names]
    ones = np.ones(mesh.size, np.float32)
    spread = jax.make_array_from_callback(ones.shape, NamedSharding(mesh, P(names)), lambda index: ones[index])
    summed = jax.jit(jax.shard_map(sums, mesh=mesh, in_specs=P(names), out_specs=(*rest, P())))(spread)
    jax.block_until_ready(summed)


def _has_used_jax(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and "before any JAX" in str(error)


def _alone_on_its_host() -> bool:
    """Tell whether a launcher has started one process on each host, which is then to have all GPUs that it may."""
    counts = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(",")  # as in "1(x4)" or "2,1"
    if "SLURM_PROCID" in os.environ and all(count.partition("(")[0] == "1" for count in counts):
        return True
    return os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"


def _wait_for(address: str, seconds: float) -> None:
    """Wait until someone listens at HOST:PORT; OSError where nobody does in time.

    JAX itself ends the process then, with a page of its own.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _sign_of_several() -> str | None:
    """Find what tells that this process may be one of several; None where nothing does."""
    for name, count, rank in LAUNCHERS:
        if rank in os.environ and os.environ.get(count, "").isdecimal() and int(os.environ[count]) > 1:
            return f"{name}, {count}={os.environ[count]}"
    if "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        return "TPU_WORKER_HOSTNAMES"
    chips = any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    if chips and importlib.util.find_spec("libtpu") and os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu"):
        return TPU_CHIPS
    return None
