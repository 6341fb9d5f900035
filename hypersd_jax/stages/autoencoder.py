"""The stage `autoencoder`: a KL autoencoder, or its decoder alone, is trained to give pictures back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hypersd_jax.config import AutoencoderStage
from hypersd_jax.distill import reconstruction_loss
from hypersd_jax.training import Controls, LossFunction
from hypersd_jax.weights.components import Components

DECODER = ("decoder.", "post_quant_conv.")
"""Parameter paths of the half that reads latents begin so."""


def trained_part(stage: AutoencoderStage, params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Those of the autoencoder's parameters that the stage trains."""
    return {path: value for path, value in params.items() if stage.part == "all" or path.startswith(DECODER)}


def make_loss(components: Components, stage: AutoencoderStage, dtype: Any) -> LossFunction:
    """The stage's loss for `make_step`: trainable {"vae": parameters}, batch {"images", "places"}.

    Frozen is {"vae": those of its parameters that are not trained}. The posterior is sampled, each picture with the
    noise of its place in the batch.
    """

    def loss(
        trainable: Any, ema: Any, frozen: Any, batch: Any, key: jax.Array, controls: Controls
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        images = batch["images"]
        params = {**frozen["vae"], **trainable["vae"]}
        mean, logvar = components.vae(params, images.astype(dtype), method="encode")
        mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
        latents = mean + jnp.exp(0.5 * logvar) * posterior_noise(key, batch["places"], mean.shape[1:])
        output = components.vae(params, latents.astype(dtype), method="decode")
        return reconstruction_loss(
            output,
            images,
            mean,
            logvar,
            gradient_weight=stage.gradient_weight,
            kl_weight=stage.kl_weight,
        )

    return loss


def posterior_noise(key: jax.Array, places: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal numbers (B, *shape); those of a row depend on (key, its place) alone."""
    return jax.vmap(lambda place: jax.random.normal(jax.random.fold_in(key, place), shape))(places)
