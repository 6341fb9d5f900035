"""Distances d(prediction, target) of the consistency losses: one value a sample, float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from hypersd_jax.errors import UserError

Distance = Callable[[ArrayLike, ArrayLike], jax.Array]


def _difference(prediction: ArrayLike, target: ArrayLike) -> jax.Array:
    difference = jnp.asarray(prediction, jnp.float32) - jnp.asarray(target, jnp.float32)
    return difference.reshape(difference.shape[0], -1)


def mse(prediction: ArrayLike, target: ArrayLike) -> jax.Array:
    """Mean squared error of each sample: (B, ...) twice -> (B,)."""
    return jnp.mean(jnp.square(_difference(prediction, target)), axis=1)


def pseudo_huber(c: float) -> Distance:
    """The distance mean_i sqrt(d_i^2 + c^2) - c, over the elements i of a sample; c > 0.

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


def feature_distance(prediction: Mapping[str, ArrayLike], target: Mapping[str, ArrayLike]) -> jax.Array:
    """How far two samples' features lie apart: unit-length channels, squared difference, mean over places, then blocks.

    The form of LPIPS (arXiv 1801.03924, Eq. 1) with weights of one, on any network's features: (B, h, w, C) by block,
    twice -> (B,), each between 0 and 4.
    """
    return sum(_direction_distance(prediction[name], target[name]) for name in prediction) / jnp.float32(
        len(prediction)
    )


def _direction_distance(prediction: ArrayLike, target: ArrayLike) -> jax.Array:
    square = jnp.square(_unit(prediction) - _unit(target))
    return jnp.mean(jnp.sum(square, axis=-1), axis=(1, 2))


def _unit(features: ArrayLike) -> jax.Array:
    """Each place's channels at length one; all-zero channels stay zero, with a gradient that is finite."""
    features = jnp.asarray(features, jnp.float32)
    return features * jax.lax.rsqrt(jnp.sum(jnp.square(features), axis=-1, keepdims=True) + 1e-12)


def batch_mean(values: ArrayLike, weights: ArrayLike | None = None) -> jax.Array:
    """Mean of per-sample values (B,); with weights (B,) the weighted mean, so that 0 leaves a padded sample out."""
    values = jnp.asarray(values, jnp.float32)
    if weights is None:
        return jnp.mean(values)
    weights = jnp.asarray(weights, jnp.float32)
    total = jnp.sum(weights)
    return jnp.sum(weights * values) / jnp.where(total > 0, total, 1.0)
