"""Teacher stages: train denoiser and text encoders to denoise the frozen autoencoder's latents."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hypersd_jax.bases import TextToImage, with_dropped
from hypersd_jax.conditioning import Conditioning
from hypersd_jax.config import TeacherStage
from hypersd_jax.distill import corruption, denoising_loss
from hypersd_jax.evaluation import MANY_STEPS
from hypersd_jax.inputs.batches import LoadedBatch
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.stages.batch_shapes import MicroBatch, captioned
from hypersd_jax.stages.context import Run
from hypersd_jax.stages.kinds import STUDENT
from hypersd_jax.stages.model_student import check_model, pass_on, write_final_model, write_images
from hypersd_jax.stages.streams import Stream, stream
from hypersd_jax.training import LossFunction, Phase


def check(run: Run, stage: TeacherStage, earlier: Sequence[str]) -> None:
    """Refuse models that ordinary training does not fit."""
    check_model(run, stage)


def trainable(run: Run, index: int, stage: TeacherStage) -> dict[str, Any]:
    """Return the weights of the denoiser and the text encoders, by component."""
    base = run.base
    return {STUDENT: {name: dict(base.params[name]) for name in (base.denoiser, *base.text_encoders)}}


def frozen(run: Run, stage: TeacherStage) -> dict[str, Any]:
    """Return {"empty": ids of the empty prompt, a tuple of (1, S)}."""
    return {"empty": tuple(jnp.asarray(ids) for ids in run.base.prompts.tokenize([""]))}


def phases(base: TextToImage, stage: TeacherStage) -> list[Phase]:
    """Train the model once a step."""
    return [Phase(models={STUDENT: stage.learning_rate}, loss=make_loss(base, stage))]


def make_loss(base: TextToImage, stage: TeacherStage) -> LossFunction:
    """Make the denoising loss; a dropped caption becomes the empty one, or zeros where the unconditional is (SDXL)."""
    schedule = base.schedule
    if stage.prediction_type is not None:
        schedule = dataclasses.replace(schedule, prediction_type=stage.prediction_type)

    def loss(models: Any, ema: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        latents, trained = batch["latents"], models[STUDENT]
        times, dropout = schedule.num_train_timesteps, stage.prompt_dropout
        drawn = corruption(key, latents.shape, batch["indices"], times=times, prompt_dropout=dropout)
        ids = batch["ids"]
        if not base.zero_unconditional:
            ids = jax.tree.map(lambda own, empty: jnp.where(drawn.dropped[:, None], empty, own), ids, frozen["empty"])
        cond = base.encode_prompts(trained, ids)
        if base.zero_unconditional:
            cond = with_dropped(cond, jax.tree.map(jnp.zeros_like, cond), drawn.dropped)
        cond = base.with_sizes(cond, batch["sizes"])

        def predict(x: jax.Array, t: jax.Array, given: Conditioning) -> jax.Array:
            return base.predict(trained[base.denoiser], x, t, given)[0]

        return denoising_loss(predict, latents, cond, drawn, schedule=schedule, snr_gamma=stage.snr_gamma)

    return loss


def batches(run: Run, index: int, stage: TeacherStage, frozen: Any, done: int) -> Iterator[LoadedBatch]:
    """Load batches {"latents", "ids", "sizes", "indices"}."""
    assert run.inputs is not None
    key = stream(run.config.seed, Stream.ENCODER, index)
    return run.inputs.captioned(stage, before=run.images_before(index), done=done, key=key)


def batch_shapes(run: Run, stage: TeacherStage, size: int) -> MicroBatch:
    """Describe a micro-batch."""
    return captioned(run, size)


def preview(run: Run, stage: TeacherStage, student: Any, name: str, *, last: bool = False) -> None:
    """Sample the data's first captions."""
    pipe = Pipeline(_predicting(run.base.with_weights(student), stage))
    settings = run.config.evaluation
    how: dict[str, Any] = {"steps": MANY_STEPS, "sampler": "ddim", "guidance": settings.guidance}
    prompts = list(run.preview_prompts)
    images = [pipe(prompts, output="np", batch_size=settings.batch_size, stepwise=True, **how)]
    write_images(run, stage, name, images, prompts, last=last)


def finish(run: Run, stage: TeacherStage, student: Any, *, trained: bool) -> None:
    """Pass the model on with its prediction type, and export it if it is the last."""
    pass_on(run, stage, student, lambda base: _predicting(base, stage))
    preview(run, stage, {}, stage.name, last=True)
    write_final_model(run, stage)


def _predicting(base: TextToImage, stage: TeacherStage) -> TextToImage:
    return base if stage.prediction_type is None else base.predicting(stage.prediction_type)
