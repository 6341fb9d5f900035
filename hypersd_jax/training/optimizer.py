"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) with clipping, warm-up and a schedule, of a stage's settings.

Rate, warm-up and length are arguments of the compiled step; the moments' constants and the schedule are part of it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from hypersd_jax.training.settings import Settings


def make_optimizer(settings: Settings) -> optax.GradientTransformation:
    """Make the chain clip, precondition, decay: the update before the learning rate, which the step multiplies in."""
    parts = [
        optax.clip_by_global_norm(settings.clip_norm),
        optax.scale_by_adam(b1=settings.beta1, b2=settings.beta2),
    ]
    if settings.weight_decay:
        parts.append(optax.add_decayed_weights(settings.weight_decay))
    return optax.chain(*parts)


def learning_rate_at(settings: Settings, peak: ArrayLike, step: jax.Array | int) -> jax.Array:
    """Compute the learning rate of the training step that follows `step` finished ones, float32.

    Warm-up gives step n (counted from 1) n/warmup of ``peak``; `cosine` and `linear` fall to 0 over the steps after
    it, of which there are ``updates`` less the warm-up.
    """
    done, warmup, updates = (jnp.asarray(each, jnp.float32) for each in (step, settings.warmup, settings.updates))
    rise = jnp.minimum(1.0, (done + 1.0) / jnp.maximum(warmup, 1.0))
    progress = jnp.clip((done - warmup) / jnp.maximum(updates - warmup, 1.0), 0.0, 1.0)
    rate = jnp.asarray(peak, jnp.float32) * rise
    if settings.schedule == "cosine":
        return rate * (0.5 * (1.0 + jnp.cos(jnp.pi * progress)))
    return rate * (1.0 - progress) if settings.schedule == "linear" else rate
