"""Distribution matching distillation (DMD, arXiv 2311.18828; DMD2, arXiv 2405.14867; Hyper-SD Eq. 8)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def dmd_gradient(x: ArrayLike, mu_real: ArrayLike, mu_fake: ArrayLike) -> jax.Array:
    """Compute the gradient in x of the KL divergence between the student's and the teacher's distribution.

    (mu_fake - mu_real) / mean|x - mu_real|, the mean over all axes but the batch's: DMD2's normalised form of
    s_fake - s_real. What is not finite (a sample that equals its real estimate) becomes 0.

    Args:
        x: the student's clean samples (B, h, w, C).
        mu_real: the x_0 estimates, from x noised, of the real score model, guidance applied; same shape.
        mu_fake: those of the fake score model.

    Returns:
        float32 (B, h, w, C), without a gradient of its own.
    """
    x, mu_real, mu_fake = (jax.lax.stop_gradient(jnp.asarray(a, jnp.float32)) for a in (x, mu_real, mu_fake))
    scale = jnp.mean(jnp.abs(x - mu_real), axis=tuple(range(1, x.ndim)), keepdims=True)
    gradient = (mu_fake - mu_real) / scale
    return jnp.where(jnp.isfinite(gradient), gradient, 0.0)


def surrogate_loss(x: ArrayLike, gradient: ArrayLike) -> jax.Array:
    """Compute 0.5 mean (x - sg(x - gradient))^2: a scalar whose derivative in x is gradient / x.size.

    Args:
        x: samples (B, h, w, C), through which the student is differentiated.
        gradient: what `dmd_gradient` returns.
    """
    x = jnp.asarray(x, jnp.float32)
    target = jax.lax.stop_gradient(x - jnp.asarray(gradient, jnp.float32))
    return jnp.mean(0.5 * jnp.mean(jnp.square(x - target), axis=tuple(range(1, x.ndim))))
