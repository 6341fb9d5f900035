"""The plan of a run: what each stage computes, holds, writes, and how long it takes at best."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from hypersd_jax.config import Config, StageConfig
from hypersd_jax.errors import UserError
from hypersd_jax.pipeline import parse_dtype
from hypersd_jax.planning.opening import (
    AnyMesh,
    StageShapes,
    abstract_mesh,
    open_abstract,
    pass_on,
    stage_shapes,
    tracing_mesh,
)
from hypersd_jax.planning.peaks import CPU, DEVICES, Peaks, name_of
from hypersd_jax.planning.sizes import Disk, Memory, disk_of, memory_of, total_bytes
from hypersd_jax.planning.steps import MANY, calls_of, encoding_flops, micro_batch, step_flops
from hypersd_jax.planning.work import NotCounted
from hypersd_jax.stages.batch_shapes import MicroBatch
from hypersd_jax.stages.context import Run
from hypersd_jax.stages.kinds import exported_weights
from hypersd_jax.stages.mesh_choice import device_memory
from hypersd_jax.training import newest_step

GPU_SHARE = 0.75
"""Of a GPU's memory, what JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """The devices that a run is planned for.

    Attributes:
        name: of `peaks.DEVICES`, or ``cpu``; None: not a device whose peaks are listed.
        kind: as JAX calls it, or the name again where it is not here.
        count: how many.
        here: whether they are those of this process.
        peaks: what is published of one.
    """

    name: str | None
    kind: str
    count: int
    here: bool
    peaks: Peaks | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calls:
    """Forward calls of the denoiser in a training step, a sample; a half call stops at the middle block."""

    fewest: float
    most: float

    @property
    def mean(self) -> float:
        """The mean: what is drawn at random, the student's steps, is uniform."""
        return (self.fewest + self.most) / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """The least time of a training step on a device's peaks, seconds.

    Attributes:
        computing: all matrix products and convolutions at the peak of bfloat16.
        reading: of the memory's traffic only what cannot be avoided: what the step reads of weights and adapters once a
            micro-batch, and the trained state read and written once. Activations are left out.
    """

    computing: float
    reading: float

    @property
    def seconds(self) -> float:
        """The larger one."""
        return max(self.computing, self.reading)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage of a plan.

    Attributes:
        name, kind: of the stage.
        updates: training steps.
        done: of these, in the output folder.
        batch_size: samples a step, on all devices.
        accumulate: micro-batches that a batch is computed in.
        calls: of the denoiser; None where the step counts none.
        flops: of a step on all devices (`work`), encoding the batch included; None where they cannot be counted.
        memory: bytes of a device.
        disk: bytes that stay.
        roofline: None without operations or peaks.
    """

    name: str
    kind: str
    updates: int
    done: int
    batch_size: int
    accumulate: int
    calls: Calls | None
    flops: float | None
    memory: Memory
    disk: Disk
    roofline: Roofline | None

    @property
    def images(self) -> int:
        """Samples that the stage sees."""
        return self.updates * self.batch_size

    @property
    def all_calls(self) -> float | None:
        """Calls of the denoiser, times samples, in all its steps."""
        return None if self.calls is None else self.calls.mean * self.images

    @property
    def all_flops(self) -> float | None:
        """Operations of all its steps."""
        return None if self.flops is None else self.flops * self.updates

    @property
    def all_seconds(self) -> float | None:
        """Seconds of all its steps at best."""
        return None if self.roofline is None else self.roofline.seconds * self.updates


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a run.

    Attributes:
        output_dir: of the run, which need not exist.
        model: the base model's source.
        dtype: of the computation.
        latent_shape: (h, w, C).
        resolution: side of the images, pixels.
        device: what it is planned for.
        mesh: sizes of the axes.
        stages: those that are not skipped.
        notes: what is not known or not counted, a sentence each.
    """

    output_dir: str
    model: str
    dtype: str
    latent_shape: tuple[int, ...]
    resolution: int
    device: Device
    mesh: dict[str, int]
    stages: tuple[StagePlan, ...]
    notes: tuple[str, ...]

    def total(self, name: str) -> float | None:
        """Sum an attribute over the stages; None where a stage's is not known."""
        found = [getattr(stage, name) for stage in self.stages]
        return None if None in found else sum(found)

    @property
    def disk(self) -> int:
        """Bytes that the run leaves on disk."""
        return sum(stage.disk.total for stage in self.stages)

    @property
    def memory(self) -> int:
        """Bytes of a device in the stage that holds most, without activations."""
        return max(stage.memory.total for stage in self.stages)


def plan_run(config: Config, *, device: str | None = None, devices: int | None = None) -> Plan:
    """Plan a run without training, writing, or reading more of the weights than their headers.

    Args:
        config: from `load_config`.
        device: a name of `peaks.NAMES`; None: the devices that are here.
        devices: how many of it; None: as many as are here, in each of the run's processes, or one of another kind.

    Raises:
        UserError: what the run itself would refuse, or a name or count of devices that cannot be.
    """
    planned = find_device(device, devices, processes=config.distributed.processes or 1)
    dtype, traced_for = planned_dtype(config, device), tracing_mesh()
    mesh, reason = abstract_mesh(config, planned.count, usable_memory(planned), dtype)
    run = open_abstract(config, mesh=mesh, traced_for=traced_for, dtype=dtype)
    notes: dict[str, None] = {} if reason is None else {reason: None}
    counted: dict[Any, float] = {}
    stages = []
    for index, stage in enumerate(config.active_stages):
        shapes = stage_shapes(run, index, stage, traced_for)
        batch = micro_batch(run, stage, stage.batch_size // stage.accumulate)
        flops = None
        if batch is None:
            notes[f"{stage.name}: its kind does not say what a batch holds, so that no work is counted"] = None
        else:
            try:
                flops = _flops(run, stage, shapes, batch, traced_for, counted)
            except NotCounted as reason:
                notes[f"{stage.name}: its operations cannot be counted: {reason}"] = None
        memory = memory_of(run, stage, shapes, batch, mesh)
        roofline = _roofline(planned, mesh, stage, shapes, memory, flops, dtype)
        stages.append(
            StagePlan(
                name=stage.name,
                kind=stage.kind,
                updates=stage.updates,
                done=newest_step(run.output.checkpoints(stage.name)) or 0,
                batch_size=stage.batch_size,
                accumulate=stage.accumulate,
                calls=_calls(run, stage, shapes, traced_for),
                flops=flops,
                memory=memory,
                disk=disk_of(run, stage, shapes),
                roofline=roofline,
            )
        )
        if config.adapter_stages:
            pass_on(run, stage, exported_weights(stage, shapes.state))
    if config.reuse is not None:
        notes[f"stages that reuse={config.reuse} has are planned as if they were trained"] = None
    if planned.peaks is None:
        notes[f"the peaks of {planned.kind} are not known, so that no time is given"] = None
    elif dtype != jnp.bfloat16:
        notes[f"{jnp.dtype(dtype).name} is slower than bfloat16, whose peaks are listed, so that no time is given"] = (
            None
        )
    return Plan(
        output_dir=config.output_dir,
        model=config.model.source,
        dtype=jnp.dtype(dtype).name,
        latent_shape=tuple(run.base.latent_shape),
        resolution=run.base.image_side,
        device=planned,
        mesh={name: int(size) for name, size in mesh.shape.items()},
        stages=tuple(stages),
        notes=tuple(notes),
    )


def find_device(device: str | None, devices: int | None, *, processes: int = 1) -> Device:
    """Describe the devices of `plan_run`'s arguments; ``processes`` are started on machines like this one."""
    if devices is not None and devices < 1:
        raise UserError(f"--devices must be at least 1, not {devices}")
    if device is not None:
        if device not in DEVICES and device != CPU:
            raise UserError(f"--device {device}: not one of {', '.join((*DEVICES, CPU))}")
        return Device(name=device, kind=device, count=devices or 1, here=False, peaks=DEVICES.get(device))
    kind: str = jax.devices()[0].device_kind
    name = CPU if jax.default_backend() == "cpu" else name_of(kind)
    count = devices or jax.device_count() * processes
    peaks = None if name is None else DEVICES.get(name)
    return Device(name=name, kind=kind, count=count, here=devices is None, peaks=peaks)


def usable_memory(device: Device) -> float | None:
    """Bytes of a device that JAX may use; None where they are not known."""
    if device.here:
        return device_memory()
    if device.peaks is None:
        return None
    return device.peaks.memory * (1.0 if str(device.name).startswith("v") else GPU_SHARE)


def planned_dtype(config: Config, device: str | None) -> Any:
    """Resolve ``model.dtype``: where it is ``auto`` it follows the device, here or planned."""
    if config.model.dtype != "auto" or device is None:
        return parse_dtype(config.model.dtype)
    return jnp.float32 if device == CPU else jnp.bfloat16


def _calls(run: Run, stage: StageConfig, shapes: StageShapes, mesh: Any) -> Calls | None:
    many = micro_batch(run, stage, MANY)
    found = None if many is None else calls_of(run, stage, shapes, many.shapes, mesh)
    return None if found is None else Calls(fewest=found[0], most=found[1])


def _flops(
    run: Run, stage: StageConfig, shapes: StageShapes, batch: MicroBatch, mesh: Any, counted: dict[Any, float]
) -> float:
    """Count a step's operations; stages of equal choices and shapes are traced once."""
    leaves, tree = jax.tree.flatten((stage, shapes.state, shapes.frozen, batch.shapes))
    key = (tree, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves))
    if key not in counted:
        counted[key] = step_flops(run, stage, shapes, batch.shapes, mesh)
    return counted[key] + stage.batch_size * encoding_flops(run, batch, mesh)


def _roofline(
    device: Device,
    mesh: AnyMesh,
    stage: StageConfig,
    shapes: StageShapes,
    memory: Memory,
    flops: float | None,
    dtype: Any,
) -> Roofline | None:
    if flops is None or device.peaks is None or dtype != jnp.bfloat16:
        return None
    # Split kernels are gathered before they are used, so that each device reads them whole.
    traffic = stage.accumulate * total_bytes(shapes.frozen) + 2 * memory.state
    return Roofline(
        computing=flops / math.prod(mesh.shape.values()) / device.peaks.flops, reading=traffic / device.peaks.bandwidth
    )
