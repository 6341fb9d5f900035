"""Compile each stage's training step for TPUs that are not here, from shapes: what the compiler says of its memory."""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hypersd_jax.config import Config
from hypersd_jax.errors import UserError
from hypersd_jax.pipeline import parse_dtype
from hypersd_jax.planning.opening import open_abstract, pass_on, stage_shapes, tracing_mesh, without_measuring
from hypersd_jax.planning.peaks import DEVICES
from hypersd_jax.planning.steps import micro_batch
from hypersd_jax.stages.kinds import exported_weights
from hypersd_jax.stages.mesh_choice import choose_mesh
from hypersd_jax.training import abstract, batch_sharding, make_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """The compiler's figures of a training step, for one chip.

    Attributes:
        arguments: bytes that the step reads and changes: denoiser, adapters, optimizer, batch. The text encoders and
            the autoencoder lie beside them.
        temporary: bytes of activations and the like.
        peak: most bytes at one time; None where this version of JAX does not say.
        flops: operations, each loop taken for one pass, and kernels of their own left out.
        accessed: bytes read and written, likewise.
        seconds: that compiling took.
    """

    arguments: int
    temporary: int
    peak: int | None
    flops: float
    accessed: float
    seconds: float


def compile_steps(config: Config, topology: str) -> dict[str, Compiled]:
    """Compile every stage's training step for a topology such as ``v5e:2x4``; nothing is run or written.

    Stages of equal choices are compiled once.

    Returns:
        By the stage's name.

    Raises:
        UserError: the libtpu package is not installed, it knows no such topology, or what the run would refuse.
    """
    dtype = jnp.bfloat16 if config.model.dtype == "auto" else parse_dtype(config.model.dtype)
    chips = topology_devices(topology)
    peaks = DEVICES.get(topology.partition(":")[0])
    choice = choose_mesh(config, len(chips), peaks.memory if peaks else None, dtype)
    mesh = make_mesh(choice.data, choice.fsdp, devices=chips)
    run = open_abstract(config, mesh=mesh, traced_for=mesh, dtype=dtype)
    known: dict[Any, Compiled] = {}
    found = {}
    for index, stage in enumerate(config.active_stages):
        shapes = stage_shapes(run, index, stage, tracing_mesh())
        batch = micro_batch(run, stage, stage.batch_size // stage.accumulate)
        if batch is None:
            raise UserError(f"stages.{stage.name}: --topology: its kind does not say what a batch holds")
        samples = jax.tree.map(lambda leaf, count=stage.accumulate: _samples(mesh, leaf, count), dict(batch.shapes))
        arguments = (abstract(mesh, shapes.state), abstract(mesh, shapes.frozen), samples)
        leaves, tree = jax.tree.flatten((*arguments, without_measuring(stage)))
        same = (tree, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves))
        if same not in known:
            key = jax.eval_shape(lambda: jax.random.key(0))
            known[same] = _compile(run.step.lower(*arguments, key, without_measuring(stage)))
        found[stage.name] = known[same]
        if config.adapter_stages:
            pass_on(run, stage, exported_weights(stage, shapes.state))
    return found


def topology_devices(topology: str) -> Sequence[jax.Device]:
    """Describe the devices of a topology; UserError where that cannot be."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology {topology}: needs the libtpu package, which is not installed (pip install libtpu)")
    from jax.experimental import topologies

    try:
        devices: Sequence[jax.Device] = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--topology {topology}: libtpu cannot describe it ({first})") from None
    return devices


def _samples(mesh: Mesh, leaf: Any, accumulate: int) -> jax.ShapeDtypeStruct:
    """Describe a batch (accumulate, B, ...) of micro-batches, split along B."""
    return jax.ShapeDtypeStruct((accumulate, *leaf.shape), leaf.dtype, sharding=batch_sharding(mesh, axis=1))


def _compile(lowered: Any) -> Compiled:
    begin = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - begin
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        peak=getattr(memory, "peak_memory_in_bytes", None) or None,
        flops=cost.get("flops", 0.0),
        accessed=cost.get("bytes accessed", 0.0),
        seconds=seconds,
    )
