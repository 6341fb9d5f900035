"""Autoencoder stages: train a KL autoencoder, or its decoder alone, to reconstruct images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax.bases import TextToImage
from hypersd_jax.config import AutoencoderStage
from hypersd_jax.data import signed
from hypersd_jax.distill import reconstruction_loss
from hypersd_jax.errors import UserError
from hypersd_jax.inputs.batches import LoadedBatch, images_only, load_batches
from hypersd_jax.stages.batch_shapes import MicroBatch, images_alone
from hypersd_jax.stages.context import Run
from hypersd_jax.stages.kinds import STUDENT
from hypersd_jax.stages.model_student import pass_on, write_final_model, write_images
from hypersd_jax.stages.streams import normal
from hypersd_jax.training import LossFunction, Phase
from hypersd_jax.weights.placement import host

# How many images the latents' standard deviation is taken over, and how many are encoded at a time.
SCALE_IMAGES, SCALE_BATCH = 512, 32


def check(run: Run, stage: AutoencoderStage, earlier: Sequence[str]) -> None:
    """Refuse aspect buckets and caches, naming the key: the autoencoder trains on square images themselves."""
    for key in ("bucket_step", "cache"):
        if getattr(run.config.data, key) is not None:
            raise UserError(f"data.{key}: stages.{stage.name} trains the autoencoder, on whole square images")


def trained_part(base: TextToImage, stage: AutoencoderStage) -> dict[str, jax.Array]:
    """Select the autoencoder's parameters that the stage trains."""
    params = base.params[base.autoencoder]
    return {path: value for path, value in params.items() if stage.part == "all" or path.startswith(base.decoder)}


def trainable(run: Run, index: int, stage: AutoencoderStage) -> dict[str, Any]:
    """Return the trained parameters of the autoencoder, by component."""
    return {STUDENT: {run.base.autoencoder: trained_part(run.base, stage)}}


def frozen(run: Run, stage: AutoencoderStage) -> dict[str, Any]:
    """Return the frozen parameters of the autoencoder, by component."""
    name, trained = run.base.autoencoder, trained_part(run.base, stage)
    return {name: {path: value for path, value in run.base.params[name].items() if path not in trained}}


def phases(base: TextToImage, stage: AutoencoderStage) -> list[Phase]:
    """Train the autoencoder once a step."""
    return [Phase(models={STUDENT: stage.learning_rate}, loss=make_loss(base, stage))]


def make_loss(base: TextToImage, stage: AutoencoderStage) -> LossFunction:
    """Make the reconstruction loss; the posterior is sampled, with each image's noise by its batch index."""

    def loss(models: Any, ema: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        images = signed(batch["images"])
        params = {**frozen[base.autoencoder], **models[STUDENT][base.autoencoder]}
        mean, logvar = base.posterior(params, images)
        latents = mean + jnp.exp(0.5 * logvar) * normal(key, batch["indices"], mean.shape[1:])
        output = base.decode(params, latents)
        weights: dict[str, Any] = {"gradient_weight": stage.gradient_weight, "kl_weight": stage.kl_weight}
        return reconstruction_loss(output, images, mean, logvar, **weights)

    return loss


def batches(run: Run, index: int, stage: AutoencoderStage, frozen: Any, done: int) -> Iterator[LoadedBatch]:
    """Load batches {"images", "indices"}."""
    assert run.source is not None
    load, before = images_only(run.source), run.images_before(index)
    return load_batches(
        stage, before=before, done=done, mesh=run.mesh, load=load, finish=lambda _number, loaded: loaded
    )


def batch_shapes(run: Run, stage: AutoencoderStage, size: int) -> MicroBatch:
    """Describe a micro-batch."""
    return images_alone(run, size)


def preview(run: Run, stage: AutoencoderStage, student: Any, name: str, *, last: bool = False) -> None:
    """Write the data's first images over their reconstructions."""
    assert run.source is not None
    images = run.source.batch(np.arange(run.config.evaluation.batch_size)).images
    write_images(run, stage, name, reconstructed(run.base.with_weights(student), images), (), last=last)


def finish(run: Run, stage: AutoencoderStage, student: Any, *, trained: bool) -> None:
    """Pass the autoencoder on, with a new scaling factor where its latents are new, and export it if it is the last."""

    def adjusted(base: TextToImage) -> TextToImage:
        return _with_scaling(run, base) if stage.part == "all" else base

    pass_on(run, stage, student, adjusted)
    preview(run, stage, {}, stage.name, last=True)
    write_final_model(run, stage)


def _with_scaling(run: Run, base: TextToImage) -> TextToImage:
    """Return the model with the scaling factor that gives the data's first latents unit variance."""
    assert run.source is not None
    images = jnp.asarray(run.source.batch(np.arange(SCALE_IMAGES)).images)

    def moments(part: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, logvar = base.posterior(dict(base.params[base.autoencoder]), signed(part))
        return jnp.mean(mean), jnp.mean(jnp.square(mean) + jnp.exp(logvar))

    parts = images.reshape(-1, SCALE_BATCH, *images.shape[1:])
    first, second = (jnp.mean(each) for each in jax.jit(lambda parts: jax.lax.map(moments, parts))(parts))
    factor = float(1.0 / jnp.sqrt(second - jnp.square(first)))
    return base.scaled(factor)


def reconstructed(base: TextToImage, images: np.ndarray) -> list[np.ndarray]:
    """Reconstruct images (B, H, W, 3) uint8 by the posterior's mean; return images and reconstructions in 0..1."""

    def back_and_forth(params: Any, given: jax.Array) -> jax.Array:
        return base.decode(params, base.posterior(params, signed(given))[0]).astype(jnp.float32)

    output = host(jax.jit(back_and_forth)(dict(base.params[base.autoencoder]), jnp.asarray(images)))
    return [signed(images) * 0.5 + 0.5, np.clip(output * 0.5 + 0.5, 0.0, 1.0)]
