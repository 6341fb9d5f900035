"""A KL autoencoder, or its decoder alone, is trained to give images back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax.config import AutoencoderStage
from hypersd_jax.distill import reconstruction_loss
from hypersd_jax.errors import UserError
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.stages.base import StableDiffusion
from hypersd_jax.stages.context import Run
from hypersd_jax.stages.feeding import Fed, feed, pictures
from hypersd_jax.stages.kinds import STUDENT
from hypersd_jax.stages.model_student import hand_on, with_weights, write_after, write_images
from hypersd_jax.training import LossFunction, Phase
from hypersd_jax.weights.components import Components

VAE = "vae"
DECODER = ("decoder.", "post_quant_conv.")
"""Parameter paths of the half that reads latents begin so."""
# How many images the latents' standard deviation is taken over, and how many are encoded at a time.
SCALE_IMAGES, SCALE_BATCH = 512, 32


def check(run: Run, stage: AutoencoderStage, earlier: Sequence[str]) -> None:
    """It needs whole images."""
    for key in ("bucket_step", "cache"):
        if getattr(run.config.data, key) is not None:
            raise UserError(f"data.{key}: stages.{stage.name} trains the autoencoder, on whole square images")


def trained_part(stage: AutoencoderStage, params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Those of the autoencoder's parameters that the stage trains."""
    return {path: value for path, value in params.items() if stage.part == "all" or path.startswith(DECODER)}


def trainable(run: Run, index: int, stage: AutoencoderStage) -> dict[str, Any]:
    """{"vae": parameters}."""
    return {STUDENT: {VAE: trained_part(stage, run.base.components.params[VAE])}}


def frozen(run: Run, stage: AutoencoderStage) -> dict[str, Any]:
    """{"vae": those of its parameters that are not trained}."""
    params = run.base.components.params[VAE]
    trained = trained_part(stage, params)
    return {VAE: {path: value for path, value in params.items() if path not in trained}}


def phases(base: StableDiffusion, stage: AutoencoderStage) -> list[Phase]:
    """One update."""
    return [Phase(models={STUDENT: stage.learning_rate}, loss=make_loss(base, stage))]


def make_loss(base: StableDiffusion, stage: AutoencoderStage) -> LossFunction:
    """The posterior is sampled, each image with the noise of its place in the batch."""
    vae, dtype = base.components.vae, base.dtype

    def loss(models: Any, ema: Any, frozen: Any, rows: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        images = rows["images"]
        params = {**frozen[VAE], **models[STUDENT][VAE]}
        mean, logvar = vae(params, images.astype(dtype), method="encode")
        mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
        latents = mean + jnp.exp(0.5 * logvar) * posterior_noise(key, rows["places"], mean.shape[1:])
        output = vae(params, latents.astype(dtype), method="decode")
        weights: dict[str, Any] = {"gradient_weight": stage.gradient_weight, "kl_weight": stage.kl_weight}
        return reconstruction_loss(output, images, mean, logvar, **weights)

    return loss


def posterior_noise(key: jax.Array, places: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal numbers (B, *shape); those of a row depend on (key, its place) alone."""
    return jax.vmap(lambda place: jax.random.normal(jax.random.fold_in(key, place), shape))(places)


def batches(run: Run, index: int, stage: AutoencoderStage, frozen: Any, done: int) -> Iterator[Fed]:
    """{"images", "places"}."""
    assert run.source is not None
    load, before = pictures(run.source), run.images_before(index)
    return feed(stage, before=before, done=done, mesh=run.mesh, load=load, finish=lambda _number, loaded: loaded)


def preview(run: Run, stage: AutoencoderStage, student: Any, name: str, *, last: bool = False) -> None:
    """Images over their reconstructions."""
    assert run.source is not None
    pipe = run.base.around(with_weights(run.base.components, student)).pipe
    images = run.source.batch(np.arange(run.config.evaluation.batch_size)).images
    write_images(run, stage, name, reconstructed(pipe, images), (), last=last)


def finish(run: Run, stage: AutoencoderStage, student: Any, *, trained: bool) -> None:
    """New latents get a new scaling factor."""

    def adjusted(components: Components) -> Components:
        return _with_scaling(run, components) if stage.part == "all" else components

    hand_on(run, stage, student, adjusted)
    preview(run, stage, {}, stage.name, last=True)
    write_after(run, stage)


def _with_scaling(run: Run, components: Components) -> Components:
    """The components with the scaling factor that gives the latents of the stream's first images unit variance."""
    assert run.source is not None
    images = jnp.asarray(run.source.batch(np.arange(SCALE_IMAGES)).images)

    def moments(part: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, logvar = components.vae(dict(components.params[VAE]), part.astype(run.base.dtype), method="encode")
        mean = mean.astype(jnp.float32)
        return jnp.mean(mean), jnp.mean(jnp.square(mean) + jnp.exp(logvar.astype(jnp.float32)))

    parts = images.reshape(-1, SCALE_BATCH, *images.shape[1:])
    first, second = (jnp.mean(each) for each in jax.jit(lambda rows: jax.lax.map(moments, rows))(parts))
    factor = float(1.0 / jnp.sqrt(second - jnp.square(first)))
    description = components.description
    config = {**description.configs[VAE], "scaling_factor": factor}
    return dataclasses.replace(
        components,
        description=dataclasses.replace(description, configs={**description.configs, VAE: config}),
        vae_config=dataclasses.replace(components.vae_config, scaling_factor=factor),
    )


def reconstructed(pipe: Pipeline, images: np.ndarray) -> list[np.ndarray]:
    """Images (B, H, W, 3) in -1..1 and what the autoencoder makes of them, by its posterior's mean; both in 0..1."""
    components = pipe.components

    def back_and_forth(params: Any, given: jax.Array) -> jax.Array:
        mean, _ = components.vae(params, given.astype(pipe.dtype), method="encode")
        return components.vae(params, mean, method="decode").astype(jnp.float32)

    output = np.asarray(jax.jit(back_and_forth)(dict(components.params[VAE]), jnp.asarray(images)))
    return [images * 0.5 + 0.5, np.clip(output * 0.5 + 0.5, 0.0, 1.0)]
