"""Where a consistency loss compares student and target: the end t_end of a start's segment t_b..t_prev."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

End = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(a number uniform in [0, 1), t_b, t_prev) -> t_end, int32 in t_b..t_prev."""


def uniform_end(uniform: jax.Array, t_b: jax.Array, t_prev: jax.Array) -> jax.Array:
    """Uniform over the integer timesteps t_b..t_prev, both inclusive (Hyper-SD, Algorithm 1; TCD where t_b = 0)."""
    return t_b + below(uniform, t_prev - t_b + 1)


def edge_end(_uniform: jax.Array, t_b: jax.Array, _t_prev: jax.Array) -> jax.Array:
    """The segment's edge t_b, always (PCM, arXiv 2405.18407)."""
    return t_b


def below(uniform: jax.Array, count: jax.Array) -> jax.Array:
    """An int32 uniform over 0..count-1 from one in [0, 1); its 2^-23 grid is fine for a thousand values."""
    return jnp.minimum((uniform * count).astype(jnp.int32), count - 1)
