"""Ordinary LoRA stages: the denoising loss on an adapter, on the base alone or beside a frozen few-step LoRA.

A LoRA that was trained on the base alone changes what a few-step LoRA was distilled from, so both together are a little
worse than either. Denoising with the few-step LoRA attached would be no remedy: its predictions are no denoiser's, and
the new LoRA would learn to make them one again, which undoes the speed. Here the new LoRA denoises on the base alone,
and TSCD's loss, with the base and the new LoRA for its teacher, keeps both together a student of that teacher.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hypersd_jax import adapters
from hypersd_jax.adapters import Adapter
from hypersd_jax.bases import Base, Networks, with_dropped
from hypersd_jax.config import PREVIOUS, LoraStage
from hypersd_jax.distill import Segments, corruption, denoising_loss
from hypersd_jax.errors import UserError
from hypersd_jax.inputs.batches import LoadedBatch
from hypersd_jax.stages import adapter_student
from hypersd_jax.stages.batch_shapes import MicroBatch, conditioned
from hypersd_jax.stages.consistency import segments_of
from hypersd_jax.stages.context import Factors, Run
from hypersd_jax.stages.export import export_student
from hypersd_jax.stages.kinds import STUDENT, naming
from hypersd_jax.stages.regulariser import begin_step, regulariser_loss
from hypersd_jax.stages.streams import Draw, Stream, drawn_from, stream
from hypersd_jax.training import LossFunction, Phase
from hypersd_jax.training.first_process import from_first
from hypersd_jax.weights.placement import host, place

PART = "style"
"""The file of the new LoRA alone is called NAME.style.safetensors, where NAME.safetensors holds both."""


class Frozen(NamedTuple):
    """Arrays that the training step reads and never changes."""

    weights: Any
    uncond: Any  # of one sample
    scales: Any  # of the new LoRA's factors
    under: Adapter  # the few-step LoRA; empty without one
    segments: Segments | None


def check(run: Run, stage: LoraStage, earlier: Sequence[str]) -> None:
    """Refuse a model that no adapter is trained on, or a few-step LoRA that is missing or would be trained on."""
    adapter_student.check(run)
    if stage.beside is not None and not run.has_student(earlier):
        raise UserError(f"stages.{stage.name}.beside: needs a few-step LoRA: lora.start, or a stage before it")
    if stage.beside is None and earlier:
        raise UserError(f"stages.{stage.name}: kind=lora after another stage needs beside, or would undo its speed")
    if stage.beside is not None:
        with naming(f"stages.{stage.name}.beside"):
            segments_of(run, stage.beside.solver_steps, stage.beside.k)


def trainable(run: Run, index: int, stage: LoraStage) -> dict[str, Any]:
    """Return the new LoRA's factors; without ``beside`` the run's own, which may continue those of a file."""
    return {STUDENT: run.student if stage.beside is None else run.fresh_factors(Stream.STYLE, index)[0]}


def frozen(run: Run, stage: LoraStage) -> Frozen:
    """Collect what the loss reads, the few-step LoRA among it."""
    beside = stage.beside
    return Frozen(
        weights=run.base.weights,
        uncond=run.uncond,
        scales=run.scales if beside is None else run.fresh_scales,
        under={} if beside is None else run.teacher(PREVIOUS),
        segments=None if beside is None else segments_of(run, beside.solver_steps, beside.k),
    )


def phases(base: Base, stage: LoraStage) -> list[Phase]:
    """Train the new LoRA once a step."""
    return [Phase(models={STUDENT: stage.learning_rate}, loss=make_loss(base, stage))]


def make_loss(base: Base, stage: LoraStage) -> LossFunction:
    """Make the loss: denoising by the new LoRA alone, and what keeps the speed of the one beside it."""

    def loss(
        models: Any, ema: Any, frozen: Frozen, batch: Any, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        nets, schedule = Networks(base=base, weights=frozen.weights), base.schedule
        latents, indices, cond = batch["latents"], batch["indices"], batch["cond"]
        times, dropout = schedule.num_train_timesteps, stage.prompt_dropout
        drawn = corruption(key, latents.shape, indices, times=times, prompt_dropout=dropout)
        uncond = base.unconditional(frozen.uncond, cond)
        own, average = (adapters.join(each[STUDENT], frozen.scales) for each in (models, ema))
        value, metrics = denoising_loss(
            nets.predictor(own),
            latents,
            with_dropped(cond, uncond, drawn.dropped),
            drawn,
            schedule=schedule,
            snr_gamma=stage.snr_gamma,
        )
        if stage.beside is None:
            return value, {**metrics, "calls": jnp.float32(1.0)}
        assert frozen.segments is not None
        begun = begin_step(frozen.segments, latents, stage.guidance, batch, drawn_from(key, Draw.BESIDE), schedule)
        both, average_of_both = (adapters.concatenate([frozen.under, each]) for each in (own, average))
        begun = begun._replace(
            student=nets.predictor(both)(*begun.inputs), teacher=_teacher(nets, stage, average, uncond, *begun.inputs)
        )
        together, target_calls = regulariser_loss(begun, nets.predictor(average_of_both), schedule)
        calls = 1.0 + 1.0 + (2.0 if stage.guided else 1.0) + target_calls
        return value + stage.beside.weight * together, {**metrics, "together": together, "calls": calls}

    return loss


def _teacher(
    nets: Networks, stage: LoraStage, adapter: Adapter, uncond: Any, x: jax.Array, t: jax.Array, cond: Any
) -> jax.Array:
    """Predict with the base and the new LoRA, guided, without gradient."""
    if not stage.guided:
        return nets.predictor(adapter)(x, t, cond)
    return nets.guided(x, t, cond, uncond, jnp.broadcast_to(stage.guidance, t.shape), adapter=adapter)[0]


def batches(run: Run, index: int, stage: LoraStage, frozen: Frozen, done: int) -> Iterator[LoadedBatch]:
    """Load batches {"latents", "cond", "indices"}."""
    assert run.inputs is not None
    key = stream(run.config.seed, Stream.ENCODER, index)
    return run.inputs.conditioned(stage, before=run.images_before(index), done=done, key=key)


def batch_shapes(run: Run, stage: LoraStage, size: int) -> MicroBatch:
    """Describe a micro-batch."""
    return conditioned(run, size)


def preview(run: Run, stage: LoraStage, student: Any, name: str) -> None:
    """Sample with the new LoRA, and with the few-step one where it is beside that."""
    with _passed_on(run, stage, student) as factors:
        adapter_student.preview(run, stage, factors, name)


def finish(run: Run, stage: LoraStage, student: Any, *, trained: bool) -> None:
    """Export the new LoRA; where it is beside another, both as one file as well, which starts the next stage."""
    if stage.beside is None:
        adapter_student.finish(run, stage, student, trained=trained)
        return
    alone = run.output.part(stage.name, PART)
    is_written = bool(from_first(alone.exists())) and not trained
    own = adapters.join(student, run.fresh_scales)
    factors, run.scales = passed_on(run, stage, student)
    adapter_student.finish(run, stage, factors, trained=trained)
    host_adapter = jax.tree.map(host, own)  # by all processes, which hold a part each
    if not is_written and jax.process_index() == 0:
        fingerprint = run.base_fingerprint
        export_student(alone, host_adapter, stage, run.base, base_fingerprint=fingerprint, states_sampling=False)


def passed_on(run: Run, stage: LoraStage, student: Factors) -> tuple[Factors, dict[str, jax.Array]]:
    """Return the factors and scales that the next stage starts from: those of both LoRAs."""
    if stage.beside is None:
        return student, run.scales
    both = adapters.concatenate([run.teacher(PREVIOUS), adapters.join(student, run.fresh_scales)])
    factors, scales = place(run.mesh, adapters.split(both))
    return factors, scales


@contextlib.contextmanager
def _passed_on(run: Run, stage: LoraStage, student: Factors) -> Iterator[Any]:
    """Let the run's scales be those of what is sampled, for a block that samples with its factors."""
    before = run.scales
    factors, run.scales = passed_on(run, stage, student)
    try:
        yield factors
    finally:
        run.scales = before
