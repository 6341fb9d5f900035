"""What the pipeline compiles: text encoding, the solver's scan over the UNet, decoding, and the noise of a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hypersd_jax.conditioning import Conditioning, PromptEncoder
from hypersd_jax.diffusion import Known, State, advance, guided
from hypersd_jax.models.controlnet import control_residuals
from hypersd_jax.models.functional import Network
from hypersd_jax.models.layers import timestep_embedding
from hypersd_jax.models.tiling import decode_tiled, encode_tiled
from hypersd_jax.weights.components import Components

# Of tiles, in latent pixels: what diffusers has for autoencoders of 512 pixels.
TILE = 64
OVERLAP = 16


class Guides(NamedTuple):
    """Pictures that steer a scan, each (B, ...).

    Attributes:
        known: what inpainting keeps, for a model that was not trained to inpaint.
        beside: (B, h, w, 1 + C), mask and latents of the masked picture, which an inpainting model reads.
        controls: one picture (B, H, W, 3) in 0..1 for each ControlNet.
    """

    known: Known | None = None
    beside: jax.Array | None = None
    controls: tuple[jax.Array, ...] = ()


def encode(encoder: PromptEncoder, dtype: Any, params: Any, ids: Any, adapters: Any) -> Conditioning:
    """Text embeddings of token ids, in `dtype`."""
    return encoder.encode(params, ids, adapters=adapters, dtype=dtype)


def scan(
    components: Components,
    params: Any,
    adapter: Any,
    cond: Conditioning,
    uncond: Conditioning | None,
    scale: jax.Array,
    table: dict[str, jax.Array],
    state: State,
    noise: jax.Array,
    guides: Guides,
    control_params: Sequence[Any],
    control_scales: Sequence[jax.Array],
    *,
    controlnets: tuple[Network, ...],
    prompted_only: bool,
    prediction_type: str,
) -> State:
    """A table's rows. With an unconditional the two UNet calls of a step are one call on a doubled batch."""
    both = cond if uncond is None else jax.tree.map(lambda u, c: jnp.concatenate([u, c]), uncond, cond)
    inputs = both.unet_kwargs()
    if dim := components.unet_config.time_cond_proj_dim:
        w = jnp.full(state.x.shape[:1], 1000 * (scale - 1))  # LCM's guidance embedding, arXiv 2310.04378
        inputs["timestep_cond"] = timestep_embedding(w, dim, flip_sin_to_cos=False, freq_shift=1.0)

    def predict(x: jax.Array, t: jax.Array) -> jax.Array:
        if uncond is not None:
            x, t = jnp.concatenate([x, x]), jnp.concatenate([t, t])
        extra: dict[str, Any] = {}
        if controlnets:
            down, mid = control_residuals(
                controlnets,
                control_params,
                guides.controls,
                control_scales,
                x,
                t,
                both.context,
                prompted_only=prompted_only,
                **both.unet_kwargs(),
            )
            extra = {"down_residuals": down, "mid_residual": mid}
        if guides.beside is not None:
            repeats = x.shape[0] // guides.beside.shape[0]
            x = jnp.concatenate([x, jnp.concatenate([guides.beside] * repeats)], axis=-1)
        output = components.unet(params, x, t, both.context, adapter=adapter, **inputs, **extra)
        if uncond is None:
            return output
        unguided, prompted = jnp.split(output.astype(jnp.float32), 2)
        return guided(unguided, prompted, scale)

    return advance(predict, table, state, noise, prediction_type=prediction_type, known=guides.known)


def decode(components: Components, params: Any, latents: jax.Array, *, tiled: bool) -> jax.Array:
    """Pictures (B, H, W, 3) in 0..1 of the sampler's latents; NaN where a value is not finite."""

    def whole(z: jax.Array) -> jax.Array:
        images: jax.Array = components.vae(params, z, method="decode")
        return images

    z = components.unscale(latents)
    if tiled:
        images = decode_tiled(whole, z, tile=TILE, overlap=OVERLAP, factor=components.vae_config.downscale)
    else:
        images = whole(z)
    images = images.astype(jnp.float32)
    # Clipped, infinity would pass for white.
    images = jnp.where(jnp.isfinite(images), images, jnp.nan)
    return jnp.clip(images / 2 + 0.5, 0.0, 1.0)


def encode_image(components: Components, params: Any, images: jax.Array, *, tiled: bool) -> jax.Array:
    """Latents (B, h, w, C) as the UNet sees them of pictures (B, H, W, 3) in 0..1: the encoder's mean."""

    def whole(x: jax.Array) -> jax.Array:
        mean: jax.Array = components.vae(params, x, method="encode")[0]
        return mean

    x = 2 * images - 1
    if tiled:
        mean = encode_tiled(whole, x, tile=TILE, overlap=OVERLAP, factor=components.vae_config.downscale)
    else:
        mean = whole(x)
    return components.scale(mean.astype(jnp.float32))


def draw_noise(
    seed: jax.Array, prompts: jax.Array, images: jax.Array, index: jax.Array, *, shape: tuple[int, int, int]
) -> jax.Array:
    """Standard normal (B, *shape), each image from its own key: index 0 is the start, i what step i adds."""

    def draw(prompt: jax.Array, image: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), prompt), image)
        # A step's noise has a key of its own, so that more steps extend the list instead of redrawing it.
        return jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32)

    return jax.vmap(draw)(prompts, images)
