"""A 2-D convolution whose gradients are fast on a CPU wherever in a program they stand.

XLA's CPU backend brings a convolution into the layout of its fast kernels (NHWC, HWIO, NHWC) only where it stands
outside every loop. JAX writes gradients in other layouts, so that within a `lax.scan` they fall back to plain loops:
the kernel's gradient takes 10 to 20 times as long there, the input's 3 times. Here they are written in the fast
layout; outside loops the same kernels run on the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Pads = tuple[tuple[int, int], tuple[int, int]]


def convolution(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    precision: lax.Precision | None,
    platform: str | None = None,
) -> jax.Array:
    """Convolve (B, H, W, in) with (kh, kw, in, out), giving (B, H', W', out).

    Args:
        x: features.
        kernel: of x's dtype.
        strides: (down, right).
        padding: ((top, bottom), (left, right)), "SAME" or "VALID".
        precision: of the products.
        platform: "cpu", "gpu" or "tpu"; None is JAX's default backend. Only a CPU needs the gradients written out.
    """
    steps = (strides[0], strides[1])
    pads = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], steps, padding) if isinstance(padding, str) else padding
    (top, bottom), (left, right) = pads
    run = _with_gradients if (platform or jax.default_backend()) == "cpu" else _forward
    y: jax.Array = run(x, kernel, steps, ((top, bottom), (left, right)), precision)
    return y


def _forward(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    pads: Pads,
    precision: lax.Precision | None,
    *,
    lhs_dilation: tuple[int, int] = (1, 1),
    rhs_dilation: tuple[int, int] = (1, 1),
) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        pads,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _with_gradients(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads, precision: lax.Precision | None
) -> jax.Array:
    return _forward(x, kernel, strides, pads, precision)


def _save(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads, precision: lax.Precision | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _forward(x, kernel, strides, pads, precision), (x, kernel)


def _gradients(
    strides: tuple[int, int], pads: Pads, precision: lax.Precision | None, saved: Any, g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients: of the input, g spread by the strides with the turned kernel; of the kernel, the input with g."""
    x, kernel = saved
    of_input, of_kernel = [], []
    for axis in (0, 1):
        size, low = kernel.shape[axis], pads[axis][0]
        length, span = x.shape[axis + 1], (g.shape[axis + 1] - 1) * strides[axis] + 1
        of_input.append((size - 1 - low, length - span + low))
        of_kernel.append((low, span + size - 1 - length - low))
    turned = jnp.swapaxes(jnp.flip(kernel, (0, 1)), 2, 3)
    dx = _forward(g, turned, (1, 1), (of_input[0], of_input[1]), precision, lhs_dilation=strides)
    dk = _forward(
        jnp.transpose(x, (3, 1, 2, 0)),
        jnp.transpose(g, (1, 2, 0, 3)),
        (1, 1),
        (of_kernel[0], of_kernel[1]),
        precision,
        rhs_dilation=strides,
    )
    return dx, jnp.transpose(dk, (1, 2, 0, 3))


_with_gradients.defvjp(_save, _gradients)
