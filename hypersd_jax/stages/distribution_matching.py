"""Score distillation stages: DMD, DMD2 and TDM (Hyper-SD, arXiv 2404.13686, section 3.3; `docs/method.md`).

Real score: the guided base. Fake score: the base under a LoRA of its own. Student: the base under its LoRA, or a UNet
of its own under full fine-tuning. A training step is some fake-score steps, which also train the discriminator on the
fake score model's features, then one generator step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from hypersd_jax.adapters import join
from hypersd_jax.bases import Base, Networks, TextToImage
from hypersd_jax.config import ScoreStage
from hypersd_jax.diffusion import add_noise
from hypersd_jax.distill import alpha_sigma, fake_loss, noised, score_term
from hypersd_jax.inputs.batches import LoadedBatch
from hypersd_jax.stages import adapter_student, generator
from hypersd_jax.stages.adversarial import make_discriminator
from hypersd_jax.stages.batch_shapes import MicroBatch
from hypersd_jax.stages.context import Run
from hypersd_jax.stages.generator import Frozen
from hypersd_jax.stages.kinds import DISCRIMINATOR, FAKE, STUDENT, naming
from hypersd_jax.stages.rewards import feedback_term, frozen_feedback, require_rewards, tokens_of
from hypersd_jax.stages.streams import Draw, Stream, drawn_from, normal
from hypersd_jax.stages.watching import make_watch
from hypersd_jax.training import LossFunction, Metrics, Phase, Watch

preview, finish = adapter_student.preview, adapter_student.finish


def check(run: Run, stage: ScoreStage, earlier: Sequence[str]) -> None:
    """Refuse a base without the discriminator's features, or a run without the teachers."""
    generator.check(run, stage, earlier)
    if stage.feedback:
        require_rewards(stage, stage.feedback)
    with naming(f"stages.{stage.name}"):
        make_discriminator(run.base, stage.adversarial)


def trainable(run: Run, index: int, stage: ScoreStage) -> dict[str, Any]:
    """Return the student, the fake score model's LoRA factors, and the discriminator heads."""
    models = {STUDENT: generator.first_student(run, stage), FAKE: run.fresh_factors(Stream.FAKE, index)[0]}
    if discriminator := make_discriminator(run.base, stage.adversarial):
        models[DISCRIMINATOR] = discriminator.heads.init(run.config.seed + index)
    return models


def frozen(run: Run, stage: ScoreStage) -> Frozen:
    """Collect what the losses read."""
    bounds = generator.times_between(run, stage.time_range)
    everywhere = np.asarray([0, run.base.schedule.num_train_timesteps - 1], np.int32)
    # The points of a deterministic student lie on its trajectory, so the fake score is needed from each of them on.
    fake_bounds = bounds if stage.kind == "tdm" else everywhere
    return generator.frozen(run, stage)._replace(
        bounds=bounds,
        fake_bounds=fake_bounds,
        fake_scales=run.fresh_scales,
        feedback=frozen_feedback(run, stage, stage.feedback) if stage.feedback else None,
    )


def batches(run: Run, index: int, stage: ScoreStage, frozen: Frozen, done: int) -> Iterator[LoadedBatch]:
    """Load the batches of a generator stage, and the captions' tokens for each reward."""
    return generator.batches(run, index, stage, frozen, done, tokens_of(stage.feedback))


def batch_shapes(run: Run, stage: ScoreStage, size: int) -> MicroBatch:
    """Describe a micro-batch of a generator stage with the captions' tokens."""
    return generator.batch_shapes(run, stage, size, tokens_of(stage.feedback))


def watch(run: Run, stage: ScoreStage) -> Watch | None:
    """Make the guard's measurement, where the stage has feedback."""
    return make_watch(run, stage, stage.feedback, adapter_student.sample)


def phases(base: TextToImage, stage: ScoreStage) -> list[Phase]:
    """List the phases: fake-score steps, which train the discriminator too, then a generator step."""
    fake_models = {FAKE: stage.fake_learning_rate}
    if stage.adversarial:
        fake_models[DISCRIMINATOR] = stage.adversarial.learning_rate
    earlier = generator.earlier_steps(stage)
    of_fake, of_student = make_fake_loss(base, stage), make_student_loss(base, stage)
    return [
        # Its sample carries no gradient, so that the last step is in the loop too.
        Phase(models=fake_models, loss=of_fake, repeats=stage.fake_updates, loop_steps=earlier + 1),
        Phase(models={STUDENT: stage.learning_rate}, loss=of_student, loop_steps=earlier),
    ]


def make_fake_loss(base: Base, stage: ScoreStage) -> LossFunction:
    """Make the loss of a fake-score step: of the fake score model, and of the discriminator on its features."""
    discriminator = make_discriminator(base, stage.adversarial)
    taps = discriminator.taps if discriminator is not None else ()

    def loss(models: Any, ema: Any, frozen: Frozen, batch: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
        nets = Networks(base=base, weights=frozen.weights)
        drawn, sample = generator.fake_sample(nets, stage, models, frozen, batch, key)
        x_t, t, b = noised(sample, drawn, base.schedule)
        x_t, cond = jax.lax.stop_gradient(x_t), batch["cond"]
        fake = join(models[FAKE], frozen.fake_scales)
        output, features = nets.tapped(x_t, t, cond, taps, fake)
        value = fake_loss(output, x_t, t, b, drawn.eps, schedule=base.schedule)
        metrics: Metrics = {"fake_mse": value}
        calls = 2.0  # the sample's last step, and the fake score
        if discriminator is not None:
            real_t = _real(base, batch, key, t)
            real_features = nets.tapped(real_t, t, cond, taps, fake)[1]
            perturbed = None
            if discriminator.config.r1:
                noise = normal(drawn_from(key, Draw.R1), batch["indices"], real_t.shape[1:])
                perturbed = nets.tapped(real_t + discriminator.config.r1_sigma * noise, t, cond, taps, fake)[1]
            own, more = discriminator.loss(models[DISCRIMINATOR], real_features, features, perturbed)
            value, metrics = value + own, metrics | more
            calls += discriminator.cost * (2 if discriminator.config.r1 else 1)
        return value, {**metrics, "fake_calls": (drawn.step + calls) * stage.fake_updates}

    return loss


def make_student_loss(base: TextToImage, stage: ScoreStage) -> LossFunction:
    """Make the loss of a generator step: score difference, generator loss, regression, regulariser, feedback."""
    discriminator = make_discriminator(base, stage.adversarial)
    taps = discriminator.taps if discriminator is not None else ()

    def loss(models: Any, ema: Any, frozen: Frozen, batch: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
        nets = Networks(base=base, weights=frozen.weights)
        drawn, sample, solver_step = generator.student_sample(nets, stage, models, frozen, batch, key)
        real_calls = 2.0 if stage.guided else 1.0
        fake = join(models[FAKE], frozen.fake_scales)
        # The base's solver step, if it is the regulariser's teacher too, shares the real score's call.
        joined = [solver_step.inputs] if solver_step is not None and not frozen.regulariser else []

        def real_scores(*inputs: Any) -> tuple[jax.Array, tuple[list[jax.Array], jax.Array | None]]:
            calls = [inputs, *joined]
            (output, *others), target = generator.base_calls(nets, stage, frozen, drawn.noise, batch["cond"], calls)
            return output, (others, target)

        def fake_scores(x: jax.Array, t: jax.Array, cond: Any) -> tuple[jax.Array, tuple[Any, jax.Array | None]]:
            if discriminator is not None:  # which reads the features with their gradient
                output, features = nets.tapped(x, t, cond, taps, fake)
                return output, (features, None)
            output, target = generator.adapter_call(nets, stage, frozen, drawn.noise, fake, (x, t, cond))
            return output, (None, target)

        matching, metrics, (features, from_adapter), (others, from_base) = score_term(
            sample,
            drawn,
            real_scores,
            fake_scores,
            batch["cond"],
            schedule=base.schedule,
            with_features=discriminator is not None,
        )
        value = stage.weight * matching
        if discriminator is not None:
            metrics["generator"] = discriminator.student_term(models[DISCRIMINATOR], features)
            value = value + discriminator.config.weight * metrics["generator"]
        if stage.feedback is not None:
            rewarded, gained = feedback_term(base, stage.feedback, frozen.feedback, [sample.x0], batch)
            value, metrics = value + rewarded, metrics | gained
        target = from_base if from_adapter is None else from_adapter
        if solver_step is not None and others:
            solver_step = solver_step._replace(teacher=others[0])
        terms, more, calls = generator.teacher_terms(
            nets, stage, models, ema, frozen, batch, drawn, sample, solver_step, target
        )
        for term in terms:
            value = value + term
        # The sample's steps, the last with gradient, and both scores.
        return value, {**metrics, **more, "calls": drawn.step + 2.0 + real_calls + calls}

    return loss


def _real(base: Base, batch: Any, key: jax.Array, t: jax.Array) -> jax.Array:
    """Add noise to the images' latents, to timesteps t (B,)."""
    latents = batch["latents"]
    noise = normal(drawn_from(key, Draw.REAL), batch["indices"], latents.shape[1:])
    return add_noise(latents, noise, *alpha_sigma(base.schedule, t, latents))
