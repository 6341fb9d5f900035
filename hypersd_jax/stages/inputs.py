"""Encode images and captions to what a distillation step reads: latents and conditioning."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hypersd_jax.conditioning import Conditioning, PromptEncoder
from hypersd_jax.training import replicated
from hypersd_jax.weights.components import Components


def make_encoder(components: Components, prompts: PromptEncoder, dtype: Any, out_shardings: Any) -> Any:
    """Make a jitted ``(text params, vae params, images, ids, time_ids, key) -> {"latents", "cond"}``.

    Every leaf has a leading micro-batch axis: images (A, B, H, W, 3) in -1..1, ids a tuple of (A, B, S), time_ids
    (A, B, 6) or None; latents (A, B, h, w, C) float32, times the scaling factor. The posterior is sampled, each image
    with its own key, so that the mesh and the micro-batches change nothing.
    """

    def encode(text_params: Any, vae_params: Any, images: Any, ids: Any, time_ids: Any, key: jax.Array) -> Any:
        def micro_batch(part: Any) -> Any:
            images, tokens, sizes, keys = part
            latents = sampled(components, *moments(components, vae_params, images, dtype), keys)
            cond = prompts.encode(text_params, tokens, dtype=dtype)
            return {"latents": latents, "cond": cond._replace(time_ids=sizes)}

        return jax.lax.map(micro_batch, (images, ids, time_ids, _sample_keys(key, images)))

    return jax.jit(encode, out_shardings=out_shardings)


def make_latents(components: Components, dtype: Any, out_shardings: Any) -> Any:
    """Make a jitted ``(vae params, images, key) -> latents``, the image part of `make_encoder`."""

    def encode(vae_params: Any, images: Any, key: jax.Array) -> jax.Array:
        def micro_batch(part: Any) -> jax.Array:
            images, keys = part
            return sampled(components, *moments(components, vae_params, images, dtype), keys)

        return jax.lax.map(micro_batch, (images, _sample_keys(key, images)))

    return jax.jit(encode, out_shardings=out_shardings)


def make_sampler(components: Components, out_shardings: Any) -> Any:
    """Make a jitted ``(mean, logvar, key) -> latents``: the rest of `make_encoder` where the moments are cached."""

    def sample(mean: Any, logvar: Any, key: jax.Array) -> jax.Array:
        return jax.vmap(lambda *part: sampled(components, *part))(mean, logvar, _sample_keys(key, mean))

    return jax.jit(sample, out_shardings=out_shardings)


def moments(components: Components, params: Any, images: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Compute the posterior's mean and log variance of images (B, H, W, 3) in -1..1, (B, h, w, C) float32 each."""
    mean, logvar = components.vae(params, images.astype(dtype), method="encode")
    return mean.astype(jnp.float32), logvar.astype(jnp.float32)


def sampled(components: Components, mean: jax.Array, logvar: jax.Array, keys: jax.Array) -> jax.Array:
    """Sample latents from the posterior, one key a sample: (B, h, w, C) float32, times the scaling factor."""
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:], jnp.float32))(keys)
    return components.scale(mean + jnp.exp(0.5 * logvar) * noise)


def _sample_keys(key: jax.Array, batch: jax.Array) -> jax.Array:
    """Make a key for each sample of (A, B, ...)."""
    return jax.random.split(key, batch.shape[0] * batch.shape[1]).reshape(batch.shape[:2])


def unconditional(components: Components, prompts: PromptEncoder, dtype: Any, mesh: Mesh) -> Conditioning:
    """Encode the unconditional of guidance for one sample (1, ...): zeros where the model says so (SDXL), else ``""``.

    Its time ids are the conditional's own, which `Base.unconditional` fills in.
    """
    params = {name: components.params[name] for name in components.text_encoders}
    encode = jax.jit(lambda weights, ids: prompts.encode(weights, ids, dtype=dtype), out_shardings=replicated(mesh))
    found: Conditioning = encode(params, prompts.tokenize([""]))
    if not components.zero_unconditional:
        return found
    pooled = None if found.pooled is None else jnp.zeros_like(found.pooled)
    return Conditioning(jnp.zeros_like(found.context), pooled)
