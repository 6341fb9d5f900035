"""A student that is regressed to where a many-step teacher leads, or kept by its anchor, without any score."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from hypersd_jax.config import RegressionStage
from hypersd_jax.stages import adapter_student, generator
from hypersd_jax.stages.base import Base
from hypersd_jax.stages.context import Run
from hypersd_jax.stages.generator import Frozen
from hypersd_jax.stages.kinds import STUDENT
from hypersd_jax.stages.networks import Networks
from hypersd_jax.training import LossFunction, Metrics, Phase

check, frozen, batches = generator.check, generator.frozen, generator.batches
preview, finish = adapter_student.preview, adapter_student.finish


def trainable(run: Run, index: int, stage: RegressionStage) -> dict[str, Any]:
    """The student alone."""
    return {STUDENT: generator.first_student(run, stage)}


def phases(base: Base, stage: RegressionStage) -> list[Phase]:
    """One update of the student."""
    return [Phase(models={STUDENT: stage.learning_rate}, loss=make_loss(base, stage))]


def make_loss(base: Base, stage: RegressionStage) -> LossFunction:
    """The loss of the student."""

    def loss(models: Any, ema: Any, frozen: Frozen, rows: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
        nets = Networks(base=base, weights=frozen.weights)
        key = jax.random.fold_in(jax.random.fold_in(key, 0), 0)  # as the only phase of a student beside others draws
        drawn, sample, begun = generator.student_sample(nets, stage, models, frozen, rows, key)
        terms, metrics, calls = generator.teachers_terms(nets, stage, models, ema, frozen, rows, drawn, sample, begun)
        value = jnp.float32(0.0)
        for term in terms:
            value = value + term
        return value, {**metrics, "calls": drawn.step + 1.0 + calls}

    return loss
