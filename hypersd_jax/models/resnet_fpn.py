"""ResNet of bottlenecks (He et al. 2016, arXiv:1512.03385) under a feature pyramid (Lin et al. 2017, arXiv:1612.03144).

The stride of a stage stands in its first 3x3 convolution, as in torchvision. Batch norm uses its running statistics
always: the network is a fixed judge of images. Attribute paths are those of mmdetection's files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from hypersd_jax.models.layers import Conv, parameter

EXPANSION = 4
"""Channels that a bottleneck puts out, over those of its 3x3 convolution."""

EPS = 1e-5
CHANNELS = 3


class BatchNorm(nnx.Module):
    """Normalise (B, H, W, C) by running statistics: an affine map of each channel, computed in float32.

    `Network.init` makes no usable variances; parameters come from a file.
    """

    def __init__(self, channels: int, *, dtype: Any) -> None:
        self.scale = parameter((channels,), dtype)
        self.bias = parameter((channels,), dtype)
        self.running_mean = parameter((channels,), dtype)
        self.running_var = parameter((channels,), dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Keep shape and dtype."""
        parts = (self.scale, self.bias, self.running_mean, self.running_var)
        scale, bias, mean, variance = (part[...].astype(jnp.float32)[None, None, None] for part in parts)
        return ((x.astype(jnp.float32) - mean) * (scale * lax.rsqrt(variance + EPS)) + bias).astype(x.dtype)


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolution around a skip, which is projected where the shape changes."""

    def __init__(self, in_channels: int, width: int, stride: int, *, dtype: Any) -> None:
        out = EXPANSION * width
        self.conv1 = Conv(in_channels, width, 1, bias=False, dtype=dtype)
        self.bn1 = BatchNorm(width, dtype=dtype)
        self.conv2 = Conv(width, width, 3, stride=stride, padding=1, bias=False, dtype=dtype)
        self.bn2 = BatchNorm(width, dtype=dtype)
        self.conv3 = Conv(width, out, 1, bias=False, dtype=dtype)
        self.bn3 = BatchNorm(out, dtype=dtype)
        projection: list[nnx.Module] = []
        if stride != 1 or in_channels != out:
            projection = [
                Conv(in_channels, out, 1, stride=stride, bias=False, dtype=dtype),
                BatchNorm(out, dtype=dtype),
            ]
        self.downsample = nnx.List(projection)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, in) to (B, H / stride, W / stride, 4 width)."""
        y = jax.nn.relu(self.bn1(self.conv1(x)))
        y = jax.nn.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        for layer in self.downsample:
            x = layer(x)
        return jax.nn.relu(x + y)


class ResNet(nnx.Module):
    """The four stages C2..C5, at strides 4, 8, 16 and 32."""

    def __init__(self, blocks: Sequence[int], width: int, *, dtype: Any) -> None:
        self.conv1 = Conv(CHANNELS, width, 7, stride=2, padding=3, bias=False, dtype=dtype)
        self.bn1 = BatchNorm(width, dtype=dtype)
        widths = stage_widths(width)
        first = (width, *(EXPANSION * inner for inner in widths[:-1]))
        stages = []
        for stage, (count, inner) in enumerate(zip(blocks, widths, strict=True)):
            own = [Bottleneck(first[stage], inner, 1 if stage == 0 else 2, dtype=dtype)]
            own += [Bottleneck(EXPANSION * inner, inner, 1, dtype=dtype) for _ in range(count - 1)]
            stages.append(nnx.List(own))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages

    def __call__(self, pixels: jax.Array) -> list[jax.Array]:
        """Map normalised images (B, H, W, 3) to C2..C5, (B, H / stride, W / stride, 4 width 2^stage)."""
        x = _max_pool(jax.nn.relu(self.bn1(self.conv1(pixels))))
        found = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = block(x)
            found.append(x)
        return found


class PlainConv(nnx.Module):
    """A convolution with bias under the name `conv`, where other layers of these files have a norm beside it."""

    def __init__(self, in_channels: int, out_channels: int, size: int, *, dtype: Any) -> None:
        self.conv = Conv(in_channels, out_channels, size, padding=size // 2, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, in) to (B, H, W, out)."""
        return self.conv(x)


class FeaturePyramid(nnx.Module):
    """C2..C5 to P2..P6, all of one width; P6 is every second row and column of P5."""

    def __init__(self, in_channels: Sequence[int], width: int, *, dtype: Any) -> None:
        self.lateral_convs = nnx.List([PlainConv(channels, width, 1, dtype=dtype) for channels in in_channels])
        self.fpn_convs = nnx.List([PlainConv(width, width, 3, dtype=dtype) for _ in in_channels])

    def __call__(self, stages: Sequence[jax.Array]) -> list[jax.Array]:
        """Map C2..C5, each half as large as the one before, to P2..P6 (B, H / stride, W / stride, width)."""
        merged = [lateral(stage) for lateral, stage in zip(self.lateral_convs, stages, strict=True)]
        for level in range(len(merged) - 1, 0, -1):
            doubled = jnp.repeat(jnp.repeat(merged[level], 2, axis=1), 2, axis=2)
            merged[level - 1] = merged[level - 1] + doubled
        levels = [conv(features) for conv, features in zip(self.fpn_convs, merged, strict=True)]
        return [*levels, levels[-1][:, ::2, ::2]]


def stage_widths(width: int) -> tuple[int, ...]:
    """Channels of the 3x3 convolutions of C2..C5; the stages put out `EXPANSION` times as many."""
    return (width, 2 * width, 4 * width, 8 * width)


def _max_pool(x: jax.Array) -> jax.Array:
    """3x3, stride 2, padding 1: (B, H, W, C) to (B, H / 2, W / 2, C)."""
    # A plain number as the start: JAX differentiates only a maximum that it can tell for one.
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0)))
