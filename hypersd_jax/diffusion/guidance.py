"""Classifier-free guidance in diffusers' convention (LCM, TCD and PCM print w = scale - 1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def guided(uncond: ArrayLike, cond: ArrayLike, scale: ArrayLike) -> jax.Array:
    """uncond + scale (cond - uncond), float32.

    Args:
        uncond: unconditional prediction (B, h, w, C).
        cond: conditional prediction, same shape.
        scale: scalar, (B,) for one scale a sample, or any shape of the predictions' rank.
    """
    uncond, cond = jnp.asarray(uncond, jnp.float32), jnp.asarray(cond, jnp.float32)
    scale = jnp.asarray(scale, jnp.float32)
    if scale.ndim == 1:
        scale = scale.reshape(-1, *[1] * (cond.ndim - 1))
    return uncond + scale * (cond - uncond)
