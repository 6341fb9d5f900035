"""The few layers that all networks are made of.

Layouts are channels-last: features (B, ..., C), Linear kernels (in, out), Conv kernels (kh, kw, in, out). A layer
computes in the dtype of its input and casts its parameters to it; float32 means precision `highest`, and norm
statistics are always float32. `Linear` and `Conv` have a `lora` attribute, None until `hypersd_jax.adapters.attach`
sets it inside the trace; so has `Conv` a `transformed` kernel, which `Network` sets where it is given one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from hypersd_jax.adapters import apply_conv, apply_linear, convolution
from hypersd_jax.models import winograd

Padding = tuple[tuple[int, int], tuple[int, int]]


def precision_for(dtype: Any) -> lax.Precision | None:
    """Matmul and convolution precision: float32 is never quietly computed in TF32 or bf16."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def parameter(shape: tuple[int, ...], dtype: Any) -> nnx.Param:
    """Declare a parameter; modules are only ever built abstractly, and `Network.init` fills them by the leaf's name."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype))


def _row(vector: jax.Array, like: jax.Array) -> jax.Array:
    """Give a (C,) parameter the rank and dtype of `like` (..., C)."""
    return vector.astype(like.dtype).reshape((1,) * (like.ndim - 1) + vector.shape)


class Linear(nnx.Module):
    """x (..., in) @ kernel (in, out) + bias (out,)."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, dtype: Any = jnp.float32) -> None:
        self.kernel = parameter((in_features, out_features), dtype)
        self.bias = parameter((out_features,), dtype) if bias else None
        self.lora = nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (..., in) to (..., out)."""
        y = jnp.matmul(x, self.kernel[...].astype(x.dtype), precision=precision_for(x.dtype))
        if self.bias is not None:
            y = y + _row(self.bias[...], y)
        if self.lora is not None:
            y = y + apply_linear(x, self.lora)
        return y


class Conv(nnx.Module):
    """2-D convolution over (B, H, W, in), kernel (kh, kw, in, out), `padding` ((top, bottom), (left, right))."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int,
        *,
        stride: int = 1,
        padding: Padding | int = 0,
        bias: bool = True,
        dtype: Any = jnp.float32,
        platform: str | None = None,
    ) -> None:
        self.platform = platform
        self.strides = (stride, stride)
        self.padding: Padding = ((padding, padding), (padding, padding)) if isinstance(padding, int) else padding
        self.kernel = parameter((size, size, in_channels, out_channels), dtype)
        self.bias = parameter((out_channels,), dtype) if bias else None
        self.lora = nnx.data(None)
        self.transformed = nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, in) to (B, H', W', out)."""
        if self.transformed is not None and winograd.pays(x, self.transformed):
            y = winograd.convolve_tiles(x, self.transformed)
        else:
            y = convolve(x, self.kernel[...].astype(x.dtype), self.strides, self.padding, platform=self.platform)
        if self.bias is not None:
            y = y + _row(self.bias[...], y)
        if self.lora is not None:
            y = y + apply_conv(x, self.lora, self.strides, self.padding, platform=self.platform)
        return y


def convolve(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding, *, platform: str | None = None
) -> jax.Array:
    """Convolve (B, H, W, in) with (kh, kw, in, out) in the way that is fast on `platform` (None: JAX's default)."""
    precision = precision_for(x.dtype)
    if kernel.shape[:2] == (1, 1) and strides == (1, 1) and padding == ((0, 0), (0, 0)):
        return jnp.matmul(x, kernel[0, 0], precision=precision)
    if (platform or jax.default_backend()) == "cpu" and strides == (1, 1) and _faster_as_matmul(x.shape, kernel.shape):
        return jnp.matmul(_columns(x, kernel.shape, padding), kernel.reshape(-1, kernel.shape[-1]), precision=precision)
    return convolution(x, kernel, strides, padding, precision=precision, platform=platform)


def _faster_as_matmul(shape: tuple[int, ...], kernel_shape: tuple[int, ...]) -> bool:
    """Decide whether XLA:CPU convolves faster by gathering columns (im2col).

    GFLOP/s of value and both gradients of 3x3 convolutions, float32, 2 busy cores, jax 0.10.2, convolution / columns:
    1x8x8x1280 16/43, 1x16x16x1280 37/70, 1x64x64x4->320 37/79, 2x8x8x192 67/102, 4x4x4x384->192 36/66, 32x4x4x192
    65/76, 32x8x8x128 61/57; but 8x16x16x64 44/34, 32x16x16x64 28/18 and 32x8x8x256->128 54/25. So: many output channels
    to spread the gathering over, and columns that fit in the cache. Precision `highest` costs nothing there.
    """
    rows = shape[0] * shape[1] * shape[2]
    return kernel_shape[-1] >= 128 and rows * kernel_shape[0] * kernel_shape[1] * kernel_shape[2] <= 3_000_000


def _columns(x: jax.Array, kernel_shape: tuple[int, ...], padding: Padding) -> jax.Array:
    """Gather the neighbourhood of every output pixel: (B, H, W, in) to (B, H', W', kh kw in)."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    h, w = x.shape[1] - kernel_shape[0] + 1, x.shape[2] - kernel_shape[1] + 1
    shifts = [(i, j) for i in range(kernel_shape[0]) for j in range(kernel_shape[1])]
    return jnp.concatenate([x[:, i : i + h, j : j + w] for i, j in shifts], axis=-1)


class GroupNorm(nnx.Module):
    """Normalise (B, ..., C) over space and each group's channels; float32 statistics, variance in a second pass."""

    def __init__(self, groups: int, channels: int, *, eps: float, dtype: Any = jnp.float32) -> None:
        self.groups = groups
        self.eps = eps
        self.scale = parameter((channels,), dtype)
        self.bias = parameter((channels,), dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Keep shape and dtype."""
        batch, channels = x.shape[0], x.shape[-1]
        y = x.reshape(batch, -1, channels)

        def by_group(values: jax.Array) -> jax.Array:
            """The mean over each group of (B, C), for each of its channels: (B, 1, C)."""
            means = jnp.mean(values.reshape(batch, self.groups, -1), axis=2, keepdims=True)
            return jnp.broadcast_to(means, (batch, self.groups, channels // self.groups)).reshape(batch, 1, channels)

        # Pixels before channels: whole rows are summed, which takes two thirds of the time of both at once on a CPU.
        mean = by_group(jnp.mean(y.astype(jnp.float32), axis=1))
        variance = by_group(jnp.mean(jnp.square(y.astype(jnp.float32) - mean), axis=1))
        factor = lax.rsqrt(variance + self.eps) * self.scale[...].astype(jnp.float32)[None, None, :]
        z = (y.astype(jnp.float32) - mean) * factor + self.bias[...].astype(jnp.float32)[None, None, :]
        return z.astype(x.dtype).reshape(x.shape)


class LayerNorm(nnx.Module):
    """Normalise the last axis of (..., C); statistics in float32, variance in a second pass."""

    def __init__(self, channels: int, *, eps: float = 1e-5, dtype: Any = jnp.float32) -> None:
        self.eps = eps
        self.scale = parameter((channels,), dtype)
        self.bias = parameter((channels,), dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Keep shape and dtype."""
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * _row(self.scale[...], y) + _row(self.bias[...], y)).astype(x.dtype)


class Embedding(nnx.Module):
    """A table (vocabulary, dim) looked up by integer ids."""

    def __init__(self, vocabulary: int, dim: int, *, dtype: Any = jnp.float32) -> None:
        self.embedding = parameter((vocabulary, dim), dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Map ids (...) to vectors (..., dim)."""
        return jnp.take(self.embedding[...], ids, axis=0)


class Empty(nnx.Module):
    """A list item without parameters: it keeps the index that a dropout or activation takes in the original's path."""


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """Look up an activation by its config name; GELU is the exact one (erf), as in the original networks."""
    table: dict[str, Callable[[jax.Array], jax.Array]] = {
        "silu": jax.nn.silu,
        "swish": jax.nn.silu,
        "gelu": partial(jax.nn.gelu, approximate=False),
        "relu": jax.nn.relu,
        "mish": jax.nn.mish,
    }
    return table[name]


def timestep_embedding(t: jax.Array, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0.0) -> jax.Array:
    """Embed times (B,) as sinusoids (B, dim) of periods 2 pi to 20,000 pi; float32.

    Frequencies are 10000^(-i / (dim/2 - freq_shift)); sines come first unless `flip_sin_to_cos`; odd ones end in 0.
    """
    half = dim // 2
    frequencies = np.exp(-np.log(10000.0) * np.arange(half, dtype=np.float64) / (half - freq_shift))
    angles = t.astype(jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)[None, :]
    parts = [jnp.cos(angles), jnp.sin(angles)] if flip_sin_to_cos else [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate([*parts, jnp.zeros((t.shape[0], dim % 2), jnp.float32)], axis=-1)
