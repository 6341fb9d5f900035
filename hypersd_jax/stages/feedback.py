"""Feedback stages: a second LoRA on a distilled student, trained on rewards of its images (Hyper-SD, section 3.2).

The student without gradient up to a late step, that step with gradient, the decoder, the rewards; and the same from
noised images, before a network that finds their instances (`structure`). The distilled LoRA is frozen; the two are one
adapter by concatenation of their ranks, while training and in the exported file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax import adapters
from hypersd_jax.adapters import Adapter
from hypersd_jax.bases import Networks, TextToImage, in_one_call
from hypersd_jax.config import PREVIOUS, FeedbackStage
from hypersd_jax.diffusion import add_noise, to_x0_eps
from hypersd_jax.distill import alpha_sigma
from hypersd_jax.errors import UserError
from hypersd_jax.inputs.batches import LoadedBatch, together
from hypersd_jax.stages import adapter_student, generator
from hypersd_jax.stages.batch_shapes import MicroBatch
from hypersd_jax.stages.context import Factors, Run
from hypersd_jax.stages.export import export_student
from hypersd_jax.stages.generator import Frozen
from hypersd_jax.stages.kinds import STUDENT
from hypersd_jax.stages.rewards import feedback_term, frozen_feedback, require_rewards, tokens_of
from hypersd_jax.stages.streams import Draw, Stream, drawn_from, normal
from hypersd_jax.stages.structure import frozen_structure, require_structure, structure_term, targets_of
from hypersd_jax.stages.watching import make_watch
from hypersd_jax.training import LossFunction, Metrics, Phase, Watch
from hypersd_jax.training.first_process import from_first
from hypersd_jax.weights.placement import host, place


def check(run: Run, stage: FeedbackStage, earlier: Sequence[str]) -> None:
    """Refuse rewards or structure that cannot be computed, or a run that has distilled no student yet."""
    if not run.has_student(earlier):
        raise UserError(
            f"stages.{stage.name}: kind=feedback needs a student to train on: a stage before it, or lora.start"
        )
    generator.check(run, stage, earlier)
    require_rewards(stage, stage.feedback)
    require_structure(run, stage)


def trainable(run: Run, index: int, stage: FeedbackStage) -> dict[str, Any]:
    """Return the second LoRA's factors, the only trained model; its output begins at zero."""
    return {STUDENT: run.fresh_factors(Stream.FEEDBACK, index, rank=_rank(run, stage))[0]}


def frozen(run: Run, stage: FeedbackStage) -> Frozen:
    """Collect what the loss reads, the distilled student's adapter among it."""
    return generator.frozen(run, stage)._replace(
        scales=_scales(run, stage),
        under=run.teacher(PREVIOUS),
        feedback=frozen_feedback(run, stage, stage.feedback),
        structure=frozen_structure(run, stage),
    )


def phases(base: TextToImage, stage: FeedbackStage) -> list[Phase]:
    """Train the second LoRA once a step."""
    loops = [generator.earlier_steps(stage)] if len(stage.times) > 1 else []
    if stage.structure_steps > 1:  # its samples are another loop of the same calls
        loops.append(generator.mean_before(stage.structure_steps, min(stage.late_steps, stage.structure_steps)))
    mean = sum(loops) / max(len(loops), 1)
    return [Phase(models={STUDENT: stage.learning_rate}, loss=make_loss(base, stage), loop_steps=mean)]


def make_loss(base: TextToImage, stage: FeedbackStage) -> LossFunction:
    """Make the loss: the rewards' hinges (Eq. 13), the structure term (Eq. 14), and what keeps the student near."""

    def loss(models: Any, ema: Any, frozen: Frozen, batch: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
        nets = Networks(base=base, weights=frozen.weights)
        drawn, sample, solver_step = generator.student_sample(nets, stage, models, frozen, batch, key)
        x0 = [sample.x0, *_redrawn(nets, stage, models, frozen, batch, key, sample.x0)]
        value, metrics = feedback_term(base, stage.feedback, frozen.feedback, x0, batch)
        terms, more, calls = generator.teacher_terms(
            nets, stage, models, ema, frozen, batch, drawn, sample, solver_step
        )
        for term in terms:
            value = value + term
        if stage.structure is not None:
            term, found, cost = structure_term(base, stage, models, frozen, batch, key)
            value, more, calls = value + term, {**more, **found}, calls + cost
        return value, {**metrics, **more, "calls": drawn.step + 1.0 + stage.redraws + calls}

    return loss


def _redrawn(
    nets: Networks, stage: FeedbackStage, models: Any, frozen: Frozen, batch: Any, key: jax.Array, x0: jax.Array
) -> list[jax.Array]:
    """Noise the sample to its last time again and again, and take the last step from there (DRaFT-LV).

    More estimates of one gradient, at a call each, in place of more samples, at all steps' calls each.
    """
    if not stage.redraws:
        return []
    t, schedule = jnp.full((len(x0),), stage.times[-1], jnp.int32), nets.base.schedule
    alpha, sigma = alpha_sigma(schedule, t, x0)
    noise = normal(drawn_from(key, Draw.REDRAW), batch["indices"], (stage.redraws, *x0.shape[1:]))
    starts = [add_noise(jax.lax.stop_gradient(x0), noise[:, number], alpha, sigma) for number in range(stage.redraws)]
    student = generator.predictor(nets, stage, models[STUDENT], frozen)
    outputs = in_one_call(student, *((x, t, batch["cond"]) for x in starts))
    pairs = zip(outputs, starts, strict=True)
    return [to_x0_eps(output, x, alpha, sigma, schedule.prediction_type)[0] for output, x in pairs]


def batches(run: Run, index: int, stage: FeedbackStage, frozen: Frozen, done: int) -> Iterator[LoadedBatch]:
    """Load the batches of a generator stage, the captions' tokens for each reward, and the images' instances."""
    read = together(tokens_of(stage.feedback), targets_of(run, stage))
    return generator.batches(run, index, stage, frozen, done, read)


def batch_shapes(run: Run, stage: FeedbackStage, size: int) -> MicroBatch:
    """Describe a micro-batch of a generator stage with the captions' tokens and the images' instances."""
    return generator.batch_shapes(run, stage, size, together(tokens_of(stage.feedback), targets_of(run, stage)))


def preview(run: Run, stage: FeedbackStage, student: Any, name: str) -> None:
    """Sample with both LoRAs."""
    with _merged(run, stage, student) as factors:
        adapter_student.preview(run, stage, factors, name)


def watch(run: Run, stage: FeedbackStage) -> Watch | None:
    """Make the guard's measurement, of both LoRAs."""

    def sample(run: Run, stage: FeedbackStage, student: Any, prompts: Sequence[str], count: int) -> np.ndarray:
        with _merged(run, stage, student) as factors:
            return adapter_student.sample(run, stage, factors, prompts, count)

    return make_watch(run, stage, stage.feedback, sample)


def finish(run: Run, stage: FeedbackStage, student: Any, *, trained: bool) -> None:
    """Export both LoRAs as one file and the second one alone, and pass both on as the student."""
    alone = run.output.part(stage.name, "feedback")
    is_written = bool(from_first(alone.exists())) and not trained
    own = _adapter(run, stage, student)
    factors, run.scales = passed_on(run, stage, student)
    adapter_student.finish(run, stage, factors, trained=trained)
    host_adapter = jax.tree.map(host, own)  # by all processes, which hold a part each
    if not is_written and jax.process_index() == 0:
        export_student(alone, host_adapter, stage, run.base, base_fingerprint=run.base_fingerprint)


def passed_on(run: Run, stage: FeedbackStage, student: Factors) -> tuple[Factors, dict[str, jax.Array]]:
    """Return the factors and scales that the next stage starts from: those of both LoRAs."""
    factors, scales = place(run.mesh, adapters.split(merged(run, stage, student)))
    return factors, scales


def merged(run: Run, stage: FeedbackStage, student: Factors) -> Adapter:
    """Concatenate the distilled student's adapter and the second LoRA's at its merge weight: the sum, exactly."""
    return adapters.concatenate(
        [run.teacher(PREVIOUS), adapters.scaled(_adapter(run, stage, student), stage.merge_weight)]
    )


@contextlib.contextmanager
def _merged(run: Run, stage: FeedbackStage, student: Factors) -> Iterator[Any]:
    """Let the run's scales be those of both LoRAs, for a block that samples with the factors of both."""
    factors, scales = passed_on(run, stage, student)
    before, run.scales = run.scales, scales
    try:
        yield factors
    finally:
        run.scales = before


def _adapter(run: Run, stage: FeedbackStage, student: Factors) -> Adapter:
    return adapters.join(student, _scales(run, stage))


def _scales(run: Run, stage: FeedbackStage) -> dict[str, jax.Array]:
    """The second LoRA's scales: alpha is its rank."""
    ones = np.ones((_rank(run, stage),), np.float32)
    return dict(place(run.mesh, dict.fromkeys(run.fresh_scales, ones)))


def _rank(run: Run, stage: FeedbackStage) -> int:
    return stage.rank or run.config.lora.rank
