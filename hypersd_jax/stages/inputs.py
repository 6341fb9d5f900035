"""From pictures and captions to what a distillation step reads: latents and conditioning."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hypersd_jax.conditioning import Conditioning, PromptEncoder
from hypersd_jax.training import replicated
from hypersd_jax.weights.components import Components


def make_encoder(components: Components, prompts: PromptEncoder, dtype: Any, out_shardings: Any) -> Any:
    """A jitted ``(text params, vae params, images, ids, time_ids, key) -> {"latents", "cond"}``.

    Every leaf has a leading micro-batch axis: images (A, B, H, W, 3) in -1..1, ids a tuple of (A, B, S), time_ids
    (A, B, 6) or None; latents (A, B, h, w, C) float32, times the scaling factor. The posterior is sampled, each picture
    with its own key, so that the mesh and the micro-batches change nothing.
    """

    def encode(text_params: Any, vae_params: Any, images: Any, ids: Any, time_ids: Any, key: jax.Array) -> Any:
        def micro_batch(rows: Any) -> Any:
            pictures, tokens, sizes, row_keys = rows
            latents = sampled(components, *moments(components, vae_params, pictures, dtype), row_keys)
            cond = prompts.encode(text_params, tokens, dtype=dtype)
            return {"latents": latents, "cond": cond._replace(time_ids=sizes)}

        return jax.lax.map(micro_batch, (images, ids, time_ids, _row_keys(key, images)))

    return jax.jit(encode, out_shardings=out_shardings)


def make_latents(components: Components, dtype: Any, out_shardings: Any) -> Any:
    """A jitted ``(vae params, images, key) -> latents``: what `make_encoder` does with the pictures."""

    def encode(vae_params: Any, images: Any, key: jax.Array) -> jax.Array:
        def micro_batch(rows: Any) -> jax.Array:
            pictures, row_keys = rows
            return sampled(components, *moments(components, vae_params, pictures, dtype), row_keys)

        return jax.lax.map(micro_batch, (images, _row_keys(key, images)))

    return jax.jit(encode, out_shardings=out_shardings)


def make_sampler(components: Components, out_shardings: Any) -> Any:
    """A jitted ``(mean, logvar, key) -> latents``: what is left of `make_encoder` where the moments are known."""

    def sample(mean: Any, logvar: Any, key: jax.Array) -> jax.Array:
        return jax.vmap(lambda *rows: sampled(components, *rows))(mean, logvar, _row_keys(key, mean))

    return jax.jit(sample, out_shardings=out_shardings)


def moments(components: Components, params: Any, images: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Mean and log variance of pictures (B, H, W, 3) in -1..1, (B, h, w, C) float32 each."""
    mean, logvar = components.vae(params, images.astype(dtype), method="encode")
    return mean.astype(jnp.float32), logvar.astype(jnp.float32)


def sampled(components: Components, mean: jax.Array, logvar: jax.Array, keys: jax.Array) -> jax.Array:
    """Latents of the posterior, one key a row: (B, h, w, C) float32, times the scaling factor."""
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:], jnp.float32))(keys)
    return components.scale(mean + jnp.exp(0.5 * logvar) * noise)


def _row_keys(key: jax.Array, rows: jax.Array) -> jax.Array:
    """A key for each row of (A, B, ...)."""
    return jax.random.split(key, rows.shape[0] * rows.shape[1]).reshape(rows.shape[:2])


def unconditional(components: Components, prompts: PromptEncoder, dtype: Any, mesh: Mesh) -> Conditioning:
    """The unconditional of guidance as one row (1, ...): zeros where the model says so (SDXL), else the encoded ``""``.

    Its time ids are the conditional's own and are filled in beside it.
    """
    params = {name: components.params[name] for name in components.text_encoders}
    encode = jax.jit(lambda weights, ids: prompts.encode(weights, ids, dtype=dtype), out_shardings=replicated(mesh))
    found: Conditioning = encode(params, prompts.tokenize([""]))
    if not components.zero_unconditional:
        return found
    pooled = None if found.pooled is None else jnp.zeros_like(found.pooled)
    return Conditioning(jnp.zeros_like(found.context), pooled)
