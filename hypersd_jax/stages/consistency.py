"""Consistency stages: TSCD and the baselines (arXiv 2404.13686, section 3.1; `docs/method.md`).

Teacher, student, target and discriminator are the same base weights under different LoRA trees, so a step holds one
base. What differs between the four stages of TSCD (k, N, guidance range, EMA decay, learning rate, the two terms'
weights) are arguments: all stages of one method share one compiled step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from hypersd_jax.adapters import Adapter, join
from hypersd_jax.bases import Base, Networks, with_dropped
from hypersd_jax.config import PREVIOUS, ConsistencyStage
from hypersd_jax.distill import Segments, Teacher, consistency_loss, mse, pad_segments, pseudo_huber
from hypersd_jax.inputs.batches import LoadedBatch
from hypersd_jax.stages import adapter_student
from hypersd_jax.stages.adversarial import Discriminator, make_discriminator, pair_calls, pair_term
from hypersd_jax.stages.batch_shapes import MicroBatch, conditioned
from hypersd_jax.stages.context import Run
from hypersd_jax.stages.kinds import DISCRIMINATOR, STUDENT, naming
from hypersd_jax.stages.streams import Draw, Stream, drawn_from, stream
from hypersd_jax.training import LossFunction, Phase

preview, finish = adapter_student.preview, adapter_student.finish


class Frozen(NamedTuple):
    """Arrays that the training step reads and never changes."""

    weights: Any
    uncond: Any  # of one sample
    scales: Any  # of the LoRA's factors
    teacher: Adapter  # the previous student, empty where the teacher is the base
    segments: Segments


def check(run: Run, stage: ConsistencyStage, earlier: Sequence[str]) -> None:
    """Refuse a base without the discriminator's features, or a schedule without the solver's grid."""
    adapter_student.check(run)
    with naming(f"stages.{stage.name}"):
        make_discriminator(run.base, stage.adversarial)
        segments_of(run, stage.solver_steps, stage.k)


def segments_of(run: Run, solver_steps: int, k: int) -> Segments:
    """Compute the segments of a solver grid, padded to the run's longest."""
    return pad_segments(solver_steps, k, run.grid_length, run.base.schedule.num_train_timesteps)


def trainable(run: Run, index: int, stage: ConsistencyStage) -> dict[str, Any]:
    """Return the student's LoRA factors and the discriminator heads."""
    models: dict[str, Any] = {STUDENT: run.student}
    if discriminator := make_discriminator(run.base, stage.adversarial):
        models[DISCRIMINATOR] = discriminator.heads.init(run.config.seed + index)
    return models


def frozen(run: Run, stage: ConsistencyStage) -> Frozen:
    """Collect what the losses read."""
    # The first stage's teacher is the base under both readings of the paper: its student is the unchanged base.
    first = not run.has_student(()) and stage.name == run.config.adapter_stages[0].name
    return Frozen(
        weights=run.base.weights,
        uncond=run.uncond,
        scales=run.scales,
        teacher=run.teacher(PREVIOUS) if stage.teacher == PREVIOUS and not first else {},
        segments=segments_of(run, stage.solver_steps, stage.k),
    )


def phases(base: Base, stage: ConsistencyStage) -> list[Phase]:
    """List the phases: discriminator steps alone, then one of the student and the discriminator on the same pair."""
    student = {STUDENT: stage.learning_rate}
    if stage.adversarial is None:
        return [Phase(models=student, loss=make_loss(base, stage))]
    heads = {DISCRIMINATOR: stage.adversarial.learning_rate}
    both = Phase(models={**student, **heads}, loss=make_loss(base, stage))
    if stage.adversarial.updates == 1:
        return [both]
    alone = make_loss(base, stage, discriminator_alone=True)
    return [Phase(models=heads, loss=alone, repeats=stage.adversarial.updates - 1), both]


def make_loss(base: Base, stage: ConsistencyStage, *, discriminator_alone: bool = False) -> LossFunction:
    """Make the loss of a phase; ``discriminator_alone``: of one that does not train the student."""
    distance = mse if stage.distance == "mse" else pseudo_huber(stage.huber_c)
    discriminator = make_discriminator(base, stage.adversarial)

    def loss(
        models: Any, ema: Any, frozen: Frozen, batch: Any, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        nets = Networks(base=base, weights=frozen.weights)
        uncond = base.unconditional(frozen.uncond, batch["cond"])
        cond, indices = batch["cond"], batch["indices"]
        if stage.drops:
            cond = with_dropped(cond, uncond, _dropped(key, indices, stage.prompt_dropout))
        teacher_fn, teacher_calls = make_teacher(nets, frozen.teacher, discriminator, guided=stage.guided)
        extra = None
        if discriminator is not None:
            heads = models[DISCRIMINATOR]
            extra = pair_term(discriminator, nets, heads, cond, key, indices, alone=discriminator_alone)
        value, metrics = consistency_loss(
            "tscd" if stage.kind == "tcd" else stage.kind,  # TCD is TSCD with one segment
            nets.predictor(join(models[STUDENT], frozen.scales)),
            nets.predictor(join(ema[STUDENT], frozen.scales)),
            teacher_fn,
            {**batch, "cond": cond, "uncond": uncond},
            key,
            frozen.segments,
            guidance=(stage.guidance[0], stage.guidance[1]),
            offset_noise=stage.offset_noise,
            distance=distance,
            distance_weight=np.float32(0.0) if discriminator_alone else stage.distance_weight,
            schedule=base.schedule,
            indices=indices,
            extra=extra,
        )
        calls = 1.0 + teacher_calls + metrics.pop("target_calls")
        if discriminator is not None:
            calls += pair_calls(discriminator, start_is_known=teacher_calls > 1)
            if discriminator_alone:
                return value, {"discriminator_calls": calls * (discriminator.config.updates - 1)}
        return value, {**metrics, "calls": calls}

    return loss


def make_teacher(
    nets: Networks, previous: Adapter, discriminator: Discriminator | None = None, *, guided: bool
) -> tuple[Teacher, float]:
    """Make the teacher of a consistency loss, and count its calls: the previous student, or the base, guided or not.

    The guided base's call also gives the features that a discriminator of pairs reads at the step's start.
    """
    if guided and not previous:
        taps = discriminator.taps if discriminator is not None and discriminator.config.features == "pair" else ()
        return lambda x, t, cond, uncond, guidance: nets.guided(x, t, cond, uncond, guidance, taps=taps), 2.0
    unguided = nets.predictor(previous or None)
    return lambda x, t, cond, _uncond, _guidance: (unguided(x, t, cond), {}), 1.0


def batches(run: Run, index: int, stage: ConsistencyStage, frozen: Frozen, done: int) -> Iterator[LoadedBatch]:
    """Load batches {"latents", "cond", "indices"}."""
    assert run.inputs is not None
    key = stream(run.config.seed, Stream.ENCODER, index)
    return run.inputs.conditioned(stage, before=run.images_before(index), done=done, key=key)


def batch_shapes(run: Run, stage: ConsistencyStage, size: int) -> MicroBatch:
    """Describe a micro-batch."""
    return conditioned(run, size)


def _dropped(key: jax.Array, indices: jax.Array, share: Any) -> jax.Array:
    """Draw which samples (B,) lose their caption, by (key, batch index) alone."""
    mine = drawn_from(key, Draw.DROPOUT)
    return jax.vmap(lambda index: jax.random.uniform(jax.random.fold_in(mine, index)))(indices) < share
