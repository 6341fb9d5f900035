"""Distances d(prediction, target) of the consistency losses: one value a sample, float32."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from hypersd_jax.errors import UserError

Distance = Callable[[ArrayLike, ArrayLike], jax.Array]


def _difference(prediction: ArrayLike, target: ArrayLike) -> jax.Array:
    difference = jnp.asarray(prediction, jnp.float32) - jnp.asarray(target, jnp.float32)
    return difference.reshape(difference.shape[0], -1)


def mse(prediction: ArrayLike, target: ArrayLike) -> jax.Array:
    """Compute the mean squared error of each sample: (B, ...) twice -> (B,)."""
    return jnp.mean(jnp.square(_difference(prediction, target)), axis=1)


def pseudo_huber(c: float) -> Distance:
    """Make the distance mean_i sqrt(d_i^2 + c^2) - c, over the elements i of a sample; c > 0.

    The element form of LCM's and PCM's training code, which their c = 0.001 belongs to; the norm form of iCT
    (arXiv 2310.14189) wants a c that grows with the number of elements.
    """
    if not c > 0:
        raise UserError(f"huber_c must be positive, not {c}")

    def distance(prediction: ArrayLike, target: ArrayLike) -> jax.Array:
        square = jnp.square(_difference(prediction, target))
        # d^2 / (sqrt(d^2 + c^2) + c) is the same number without the cancellation at small d
        return jnp.mean(square / (jnp.sqrt(square + c**2) + c), axis=1)

    return distance
