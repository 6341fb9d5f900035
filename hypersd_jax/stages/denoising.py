"""Ordinary training: UNet and text encoder learn to denoise the frozen autoencoder's latents."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hypersd_jax.conditioning import Conditioning
from hypersd_jax.config import TeacherStage
from hypersd_jax.distill import corruption, denoising_loss
from hypersd_jax.evaluation import MANY_STEPS
from hypersd_jax.stages.base import StableDiffusion, with_dropped
from hypersd_jax.stages.context import Run
from hypersd_jax.stages.feeding import Fed
from hypersd_jax.stages.kinds import STUDENT
from hypersd_jax.stages.model_student import check_model, hand_on, with_weights, write_after, write_images
from hypersd_jax.stages.streams import Stream, stream
from hypersd_jax.training import LossFunction, Phase
from hypersd_jax.weights.components import Components

UNET = "unet"


def check(run: Run, stage: TeacherStage, earlier: Sequence[str]) -> None:
    """Whether ordinary training fits the model."""
    check_model(run, stage)


def trainable(run: Run, index: int, stage: TeacherStage) -> dict[str, Any]:
    """The UNet and the text encoders, by component."""
    components = run.base.components
    return {STUDENT: {name: dict(components.params[name]) for name in (UNET, *components.text_encoders)}}


def frozen(run: Run, stage: TeacherStage) -> dict[str, Any]:
    """{"empty": ids of the empty prompt, a tuple of (1, S)}."""
    return {"empty": tuple(jnp.asarray(ids) for ids in run.base.prompts.tokenize([""]))}


def phases(base: StableDiffusion, stage: TeacherStage) -> list[Phase]:
    """One update."""
    return [Phase(models={STUDENT: stage.learning_rate}, loss=make_loss(base, stage))]


def make_loss(base: StableDiffusion, stage: TeacherStage) -> LossFunction:
    """A dropped caption becomes the empty one, or zeros where the model's unconditional is zeros (SDXL)."""
    components, schedule = base.components, base.schedule
    if stage.prediction_type is not None:
        schedule = dataclasses.replace(schedule, prediction_type=stage.prediction_type)

    def loss(models: Any, ema: Any, frozen: Any, rows: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        latents, trained = rows["latents"], models[STUDENT]
        times, dropout = schedule.num_train_timesteps, stage.prompt_dropout
        drawn = corruption(key, latents.shape, rows["places"], times=times, prompt_dropout=dropout)
        ids = rows["ids"]
        if not components.zero_unconditional:
            ids = jax.tree.map(lambda own, empty: jnp.where(drawn.dropped[:, None], empty, own), ids, frozen["empty"])
        cond = base.prompts.encode(trained, ids, dtype=base.dtype)
        if components.zero_unconditional:
            cond = with_dropped(cond, jax.tree.map(jnp.zeros_like, cond), drawn.dropped)
        cond = cond._replace(time_ids=rows["time_ids"])

        def predict(x: jax.Array, t: jax.Array, given: Conditioning) -> jax.Array:
            return base.predict(trained[UNET], x, t, given)[0]

        return denoising_loss(predict, latents, cond, drawn, schedule=schedule, snr_gamma=stage.snr_gamma)

    return loss


def batches(run: Run, index: int, stage: TeacherStage, frozen: Any, done: int) -> Iterator[Fed]:
    """{"latents", "ids", "time_ids", "places"}."""
    assert run.inputs is not None
    key = stream(run.config.seed, Stream.ENCODER, index)
    return run.inputs.captioned(stage, before=run.images_before(index), done=done, key=key)


def preview(run: Run, stage: TeacherStage, student: Any, name: str, *, last: bool = False) -> None:
    """Images of the data's first captions."""
    pipe = run.base.around(_predicting(with_weights(run.base.components, student), stage)).pipe
    settings = run.config.evaluation
    how: dict[str, Any] = {"steps": MANY_STEPS, "sampler": "ddim", "guidance": settings.guidance}
    prompts = list(run.preview_prompts)
    rows = [pipe(prompts, output="np", batch_size=settings.batch_size, stepwise=True, **how)]
    write_images(run, stage, name, rows, prompts, last=last)


def finish(run: Run, stage: TeacherStage, student: Any, *, trained: bool) -> None:
    """The model says of itself what it predicts."""
    hand_on(run, stage, student, lambda components: _predicting(components, stage))
    preview(run, stage, {}, stage.name, last=True)
    write_after(run, stage)


def _predicting(components: Components, stage: TeacherStage) -> Components:
    """The model, which says of itself what the stage has it predict."""
    if stage.prediction_type is None:
        return components
    description = components.description
    config = {**description.scheduler_config, "prediction_type": stage.prediction_type}
    return dataclasses.replace(components, description=dataclasses.replace(description, scheduler_config=config))
