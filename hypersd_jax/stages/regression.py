"""Regression stages: regress the student to a teacher's ODE endpoints, with a consistency regulariser if asked."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from hypersd_jax.bases import Base, Networks
from hypersd_jax.config import RegressionStage
from hypersd_jax.stages import adapter_student, generator
from hypersd_jax.stages.context import Run
from hypersd_jax.stages.generator import Frozen
from hypersd_jax.stages.kinds import STUDENT
from hypersd_jax.training import LossFunction, Metrics, Phase

check, frozen, batches, batch_shapes = generator.check, generator.frozen, generator.batches, generator.batch_shapes
preview, finish = adapter_student.preview, adapter_student.finish


def trainable(run: Run, index: int, stage: RegressionStage) -> dict[str, Any]:
    """Return the student, the only trained model."""
    return {STUDENT: generator.first_student(run, stage)}


def phases(base: Base, stage: RegressionStage) -> list[Phase]:
    """Train the student once a step."""
    earlier = generator.earlier_steps(stage)
    return [Phase(models={STUDENT: stage.learning_rate}, loss=make_loss(base, stage), loop_steps=earlier)]


def make_loss(base: Base, stage: RegressionStage) -> LossFunction:
    """Make the loss of the student."""

    def loss(models: Any, ema: Any, frozen: Frozen, batch: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
        nets = Networks(base=base, weights=frozen.weights)
        key = jax.random.fold_in(jax.random.fold_in(key, 0), 0)  # the key of the first phase of several
        drawn, sample, solver_step = generator.student_sample(nets, stage, models, frozen, batch, key)
        terms, metrics, calls = generator.teacher_terms(
            nets, stage, models, ema, frozen, batch, drawn, sample, solver_step
        )
        value = jnp.float32(0.0)
        for term in terms:
            value = value + term
        return value, {**metrics, "calls": drawn.step + 1.0 + calls}

    return loss
