"""Human feedback: rewards raised up to a margin (Hyper-SD, arXiv 2404.13686, Eq. 13; UniFL, arXiv 2404.05595)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Score = Callable[[jax.Array], jax.Array]
"""Images (B, H, W, 3) in 0..1 -> scores (B,), each of its own image alone."""


class Feedback(NamedTuple):
    """What rewards say of a batch of images.

    Attributes:
        gradient: (B, H, W, 3) float32, of each image's weighted hinges, in that image.
        hinge: (), the weighted hinges' mean over the batch, Eq. 13.
        scores: (R, B) float32, by reward.
        below: (R, B), whether a score is below its margin.
    """

    gradient: jax.Array
    hinge: jax.Array
    scores: jax.Array
    below: jax.Array


def feedback_gradient(
    rewards: Sequence[Score], images: ArrayLike, margins: ArrayLike, weights: ArrayLike, *, balanced: bool
) -> Feedback:
    """Compute sum_d w_d relu(alpha_d - r_d(x, c)) of each image (Eq. 13) and its gradient in the image.

    Args:
        rewards: r_d, with their prompts.
        images: x, (B, H, W, 3); scored as clipped to 0..1.
        margins: alpha_d, (R,), in the units of each reward.
        weights: w_d, (R,).
        balanced: scale each reward's gradient in each image to the norm 1 / sqrt(H W 3) before its weight. A step of
            root mean square 1 along it then counts as its weight, whatever the reward's units and the image's size, as
            in an MSE. False: the gradient of Eq. 13 as it stands.

    A value outside 0..1 is never pushed further out: rewards do not see it, and would only saturate the image.
    """
    images = jax.lax.stop_gradient(jnp.asarray(images, jnp.float32))
    margins, weights = jnp.asarray(margins), jnp.asarray(weights)
    seen = jnp.clip(images, 0.0, 1.0)
    gradient, hinges, scores = jnp.zeros_like(images), [], []
    for index, reward in enumerate(rewards):
        found, pull_back = jax.vjp(reward, seen)
        (ascent,) = pull_back(jnp.ones_like(found))  # a score depends on its own image alone
        if balanced:
            ascent = _unit(ascent)
        active = (found < margins[index]).astype(jnp.float32).reshape(-1, 1, 1, 1)
        gradient = gradient - weights[index] * active * ascent
        hinges.append(weights[index] * jnp.mean(jax.nn.relu(margins[index] - found)))
        scores.append(found)
    outwards = ((images > 1.0) & (gradient < 0.0)) | ((images < 0.0) & (gradient > 0.0))
    stacked = jnp.stack(scores)
    below = stacked < jnp.broadcast_to(margins[:, None], stacked.shape)
    return Feedback(jnp.where(outwards, 0.0, gradient), jnp.sum(jnp.stack(hinges)), stacked, below)


def feedback_loss(images: jax.Array, found: Feedback) -> jax.Array:
    """Compute a scalar whose value is the hinge, and whose derivative in images (B, H, W, 3) is gradient / B.

    So the decoder behind the images is differentiated once, however many rewards there are.
    """
    surrogate = jnp.sum(jax.lax.stop_gradient(found.gradient) * images.astype(jnp.float32)) / images.shape[0]
    return surrogate + jax.lax.stop_gradient(found.hinge - surrogate)


def _unit(gradient: jax.Array) -> jax.Array:
    """Scale each sample of (B, H, W, C) to the norm 1 / sqrt(H W C); a zero or infinite one becomes zero."""
    size = math.prod(gradient.shape[1:])
    norm = jnp.sqrt(jnp.sum(jnp.square(gradient), axis=(1, 2, 3), keepdims=True) * size)
    usable = (norm > 0.0) & jnp.isfinite(norm)
    return jnp.where(usable, gradient / jnp.where(usable, norm, 1.0), 0.0)
