"""Bytes of a stage: on each device by the sharding rule, and on disk."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from hypersd_jax.config import StageConfig
from hypersd_jax.planning.opening import AnyMesh, StageShapes, passed_factors
from hypersd_jax.stages.batch_shapes import MicroBatch
from hypersd_jax.stages.context import Run
from hypersd_jax.stages.kinds import exported_weights, kind_of
from hypersd_jax.training import batch_sharding, leaf_sharding
from hypersd_jax.training.checkpoints import KEPT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a device holds through a stage; activations, which only a compiler knows, are not among them.

    Attributes:
        base: weights of all components.
        frozen: what else the step reads: adapters of teachers, rewards, tables.
        trained: float32 master weights.
        moments: AdamW's.
        average: the moving average.
        gradients: of the phase that has most; with several micro-batches their sum and one more.
        batch: the samples of one training step; None where they are not known.
    """

    base: int
    frozen: int
    trained: int
    moments: int
    average: int
    gradients: int
    batch: int | None

    @property
    def state(self) -> int:
        """What training changes: weights, moments, average."""
        return self.trained + self.moments + self.average

    @property
    def total(self) -> int:
        """All of them."""
        return self.base + self.frozen + self.state + self.gradients + (self.batch or 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Disk:
    """Bytes that a stage leaves on disk; logs, samples and the report come on top.

    Attributes:
        checkpoint: one checkpoint's arrays. Orbax packs floats a little tighter, and adds some 1,000 bytes a leaf.
        kept: how many stay at most; while one is saved there is one more.
        exported: tensors of the student's file or files, or of the model's folder.
    """

    checkpoint: int
    kept: int
    exported: int

    @property
    def total(self) -> int:
        """All that stays."""
        return self.checkpoint * self.kept + self.exported


def memory_of(run: Run, stage: StageConfig, shapes: StageShapes, batch: MicroBatch | None, mesh: AnyMesh) -> Memory:
    """Count the bytes of a device of the mesh, each leaf split as `leaf_sharding` says, batches along their samples."""
    state = shapes.state
    trained = {name: split_bytes(mesh, tree) for name, tree in state.trainable.items()}
    phases = kind_of(stage).phases(run.base, stage)
    largest = max(sum(trained[name] for name in phase.models) for phase in phases)
    return Memory(
        base=split_bytes(mesh, dict(run.base.params)),
        frozen=split_bytes(mesh, shapes.own),
        trained=sum(trained.values()),
        moments=split_bytes(mesh, state.opt_state),
        average=split_bytes(mesh, state.ema),
        gradients=largest * (1 if stage.accumulate == 1 else 2),
        batch=None if batch is None else stage.accumulate * _batch_bytes(mesh, batch),
    )


def split_bytes(mesh: AnyMesh, tree: Any) -> int:
    """Sum the bytes of a tree's leaves on one device."""
    return sum(
        math.prod(leaf_sharding(mesh, leaf.shape, leaf.dtype).shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def total_bytes(tree: Any) -> int:
    """Sum the bytes of a tree's leaves, undivided."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def _batch_bytes(mesh: AnyMesh, batch: MicroBatch) -> int:
    return sum(
        math.prod(batch_sharding(mesh).shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(dict(batch.shapes))
    )


def disk_of(run: Run, stage: StageConfig, shapes: StageShapes) -> Disk:
    """Count the bytes of a stage's checkpoints and exported files."""
    return Disk(
        checkpoint=total_bytes(shapes.state), kept=min(KEPT, stage.updates), exported=_exported(run, stage, shapes)
    )


def _exported(run: Run, stage: StageConfig, shapes: StageShapes) -> int:
    student = exported_weights(stage, shapes.state)
    if run.config.adapter_stages and not stage.exports_model:
        passed = passed_factors(run, stage, student)[0]
        return _lora_bytes(passed) + (_lora_bytes(student) if passed is not student else 0)
    if run.config.adapter_stages:
        return total_bytes({**run.base.params, run.base.denoiser: student})
    is_last = stage.name == run.config.active_stages[-1].name
    return total_bytes(dict(run.base.params)) if is_last else 0


def _lora_bytes(factors: Any) -> int:
    """Count a file's tensors: float32 factors, and the alpha of each module."""
    return total_bytes(factors) + 4 * len(factors)
