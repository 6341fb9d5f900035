"""Encode images and captions to what a distillation step reads: latents and conditioning."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hypersd_jax.bases import TextToImage
from hypersd_jax.conditioning import Conditioning
from hypersd_jax.data import signed
from hypersd_jax.training import replicated


def make_encoder(base: TextToImage, out_shardings: Any) -> Any:
    """Make a jitted ``(text params, autoencoder params, images, ids, sizes, key) -> {"latents", "cond"}``.

    Every leaf has a leading micro-batch axis: images (A, B, H, W, 3) uint8, ids a tuple of (A, B, S), sizes
    (A, B, 6) or None; latents (A, B, h, w, C) float32, times the scaling factor. The posterior is sampled, each image
    with its own key, so that the mesh and the micro-batches change nothing.
    """

    def encode(text_params: Any, params: Any, images: Any, ids: Any, sizes: Any, key: jax.Array) -> Any:
        def micro_batch(part: Any) -> Any:
            images, tokens, own_sizes, keys = part
            latents = sampled(base, *base.posterior(params, signed(images)), keys)
            return {"latents": latents, "cond": base.with_sizes(base.encode_prompts(text_params, tokens), own_sizes)}

        return jax.lax.map(micro_batch, (images, ids, sizes, _sample_keys(key, images)))

    return jax.jit(encode, out_shardings=out_shardings)


def make_latents(base: TextToImage, out_shardings: Any) -> Any:
    """Make a jitted ``(autoencoder params, images, key) -> latents``, the image part of `make_encoder`."""

    def encode(params: Any, images: Any, key: jax.Array) -> jax.Array:
        def micro_batch(part: Any) -> jax.Array:
            images, keys = part
            return sampled(base, *base.posterior(params, signed(images)), keys)

        return jax.lax.map(micro_batch, (images, _sample_keys(key, images)))

    return jax.jit(encode, out_shardings=out_shardings)


def make_sampler(base: TextToImage, out_shardings: Any) -> Any:
    """Make a jitted ``(mean, logvar, key) -> latents``: the rest of `make_encoder` where the posterior is cached."""

    def sample(mean: Any, logvar: Any, key: jax.Array) -> jax.Array:
        return jax.vmap(lambda *part: sampled(base, *part))(mean, logvar, _sample_keys(key, mean))

    return jax.jit(sample, out_shardings=out_shardings)


def sampled(base: TextToImage, mean: jax.Array, logvar: jax.Array, keys: jax.Array) -> jax.Array:
    """Sample latents from the posterior, one key a sample: (B, h, w, C) float32, times the scaling factor."""
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:], jnp.float32))(keys)
    return base.scale(mean + jnp.exp(0.5 * logvar) * noise)


def _sample_keys(key: jax.Array, batch: jax.Array) -> jax.Array:
    """Make a key for each sample of (A, B, ...)."""
    return jax.random.split(key, batch.shape[0] * batch.shape[1]).reshape(batch.shape[:2])


def unconditional(base: TextToImage, mesh: Mesh) -> Conditioning:
    """Encode the unconditional of guidance for one sample (1, ...): zeros where the model says so (SDXL), else ``""``.

    Its sizes are the conditional's own, which `Base.unconditional` fills in.
    """
    params = {name: base.params[name] for name in base.text_encoders}
    encode = jax.jit(base.without_weights().encode_prompts, out_shardings=replicated(mesh))
    found: Conditioning = encode(params, base.prompts.tokenize([""]))
    return found.zeroed([True]) if base.zero_unconditional else found
