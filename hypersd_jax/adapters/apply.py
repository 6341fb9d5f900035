"""The adapter in the forward pass: base(x) + up(scale * down(x)), the base weights left untouched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from hypersd_jax.adapters.convolution import convolution
from hypersd_jax.adapters.lora import Adapter, Array

Entry = Mapping[str, Array]


def attach(module: nnx.Module, adapter: Adapter) -> None:
    """Set `.lora` on each adapted layer of a freshly merged `module`, reached by its dotted path.

    Meant for use inside a trace, right after `nnx.merge`: the merged module belongs to that trace alone, so one graph
    definition serves every adapter and none. `nnx.data` marks the entry as arrays, so that a later split or
    `jax.checkpoint` carries it along in both graph modes of NNX.

    Args:
        module: its adaptable layers declare ``lora = None``; integers in a path index an `nnx.List`.
        adapter: ``{dotted module path: {"down", "up", "scale"}}``.

    Raises:
        KeyError: the path leads nowhere, or to something that takes no LoRA.
    """
    for path, entry in adapter.items():
        layer: Any = module
        for name in path.split("."):
            try:
                layer = layer[int(name)] if name.isdigit() else getattr(layer, name)
            except (AttributeError, IndexError, KeyError, TypeError):
                raise KeyError(f"{path}: the model has no such module") from None
        if not hasattr(layer, "lora"):
            raise KeyError(f"{path}: a {type(layer).__name__} takes no LoRA")
        layer.lora = nnx.data(dict(entry))


def apply_linear(x: jax.Array, lora: Entry) -> jax.Array:
    """The additive term of a Linear: x (..., in) -> (..., out), in x's dtype."""
    return project_up(_project(x, lora["down"].astype(x.dtype)), lora)


def apply_conv(
    x: jax.Array,
    lora: Entry,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    platform: str | None = None,
) -> jax.Array:
    """The additive term of a Conv: x (B, H, W, in) -> (B, H', W', out), in x's dtype.

    `down` runs with the base convolution's own strides and padding; `up` is a 1x1 convolution. `platform` as in
    `convolution`.
    """
    down = jnp.asarray(lora["down"]).astype(x.dtype)
    hidden = convolution(x, down, strides, padding, precision=_precision(x.dtype), platform=platform)
    return project_up(hidden, lora)


def project_up(hidden: jax.Array, lora: Entry) -> jax.Array:
    """The second half of an additive term: what `down` made of the input, (..., r) -> (..., out)."""
    # The scale goes in before the cast: one such as 0.7 has no exact bfloat16.
    return _project(hidden, jnp.asarray(lora["up"] * lora["scale"][:, None]).astype(hidden.dtype))


def _project(x: jax.Array, kernel: Array) -> jax.Array:
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), precision=_precision(x.dtype))


def _precision(dtype: Any) -> lax.Precision | None:
    """float32 means float32, on TPU and GPU too; below it the hardware's own precision is meant."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None
