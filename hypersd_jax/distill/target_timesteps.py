"""The target timestep t_end, at which a consistency loss compares student and target, in t_b..t_prev."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

TargetChoice = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(a number uniform in [0, 1), t_b, t_prev) -> t_end, int32 in t_b..t_prev."""


def uniform_target(uniform: jax.Array, t_b: jax.Array, t_prev: jax.Array) -> jax.Array:
    """Choose t_end uniformly over t_b..t_prev, both inclusive (Hyper-SD, Algorithm 1; TCD with t_b = 0)."""
    return t_b + uniform_integer(uniform, t_prev - t_b + 1)


def segment_boundary(_uniform: jax.Array, t_b: jax.Array, _t_prev: jax.Array) -> jax.Array:
    """Choose the segment boundary t_b, always (PCM, arXiv 2405.18407)."""
    return t_b


def uniform_integer(uniform: jax.Array, count: jax.Array) -> jax.Array:
    """Map a number uniform in [0, 1) to an int32 uniform over 0..count-1; its 2^-23 grid suffices for a thousand."""
    return jnp.minimum((uniform * count).astype(jnp.int32), count - 1)
