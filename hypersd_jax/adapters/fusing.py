"""An adapter written into the weights themselves."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from hypersd_jax.adapters.lora import Adapter, Array

Params = dict[str, jax.Array]


def delta(entry: Mapping[str, Array]) -> jax.Array:
    """Compute what an adapted module adds to its kernel: down (..., in, r), up (r, out) -> (..., in, out), float32."""
    down = entry["down"].astype(jnp.float32)
    up = entry["up"].astype(jnp.float32) * entry["scale"].astype(jnp.float32)[:, None]
    return lax.dot_general(down, up, (((down.ndim - 1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)


def merge(params: Mapping[str, jax.Array], adapter: Adapter, scale: float | jax.Array = 1.0) -> Params:
    """Write an adapter into weights: W + scale * delta, added in float32 and rounded once to W's dtype.

    Raises:
        KeyError: the adapter names a module that `params` does not hold.
    """
    factor = jnp.asarray(scale, jnp.float32)
    merged = dict(params)
    for path, entry in adapter.items():
        name = path + ".kernel"
        if name not in params:
            raise KeyError(f"{path}: the model has no such module")
        merged[name] = _merged_kernel(params[name], entry, factor)
    return merged


@jax.jit
def _merged_kernel(kernel: jax.Array, entry: Mapping[str, Array], factor: jax.Array) -> jax.Array:
    return (kernel.astype(jnp.float32) + factor * delta(entry)).astype(kernel.dtype)
