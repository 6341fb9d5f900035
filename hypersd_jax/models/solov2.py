"""SOLOv2: instance segmentation with a mask kernel for each cell of a grid (Wang et al. 2020, arXiv:2003.10152).

Written from that paper, SOLO's (arXiv:1912.04488) and those of the parts (`resnet_fpn`), not from the authors' program:
that program and its weights (`SOLOv2_R50_3x.pth`) are for non-commercial use only, and neither is part of this package.
Attribute paths are those of the authors' files, which mmdetection wrote.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hypersd_jax.models.functional import Network, describe
from hypersd_jax.models.layers import Conv, GroupNorm
from hypersd_jax.models.resnet_fpn import CHANNELS, EXPANSION, FeaturePyramid, ResNet, stage_widths

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
"""Statistics of ImageNet's R, G and B in 0..255."""

STRIDE = 32
"""Of the coarsest stage; the sides of images are multiples of it."""

MASK_STRIDE = 4
"""Pixels of the image a side of one pixel of the masks."""

LEVELS = 5
MASK_LEVELS = 4
"""Levels that have a grid, P2..P6, and those that the masks are made of, P2..P5."""

COORDINATES = 2
EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class SoloV2Config:
    """Sizes of the network; the defaults are SOLOv2's with ResNet-50 on COCO.

    Attributes:
        blocks: bottlenecks of each of the four stages.
        width: of the first stage's 3x3 convolutions, doubled from stage to stage.
        pyramid_width: channels of P2..P6.
        head_width: of both branches.
        head_layers: 3x3 convolutions of a branch before its prediction.
        mask_width: of the mask branch before its prediction.
        kernel_width: of a mask's kernel, and of the mask features.
        groups: of every group norm; it divides `head_width`, `mask_width` and `kernel_width`.
        classes: categories, without background.
        grids: cells a side, from P2 to P6.
        scale_ranges: (smallest, largest) sqrt(w h) in pixels of the instances that each level finds.
    """

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    pyramid_width: int = 256
    head_width: int = 512
    head_layers: int = 4
    mask_width: int = 128
    kernel_width: int = 256
    groups: int = 32
    classes: int = 80
    grids: tuple[int, ...] = (40, 36, 24, 16, 12)
    scale_ranges: tuple[tuple[float, float], ...] = ((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048))

    def __post_init__(self) -> None:
        if len(self.grids) != LEVELS or len(self.scale_ranges) != LEVELS:
            raise ValueError(
                f"SOLOv2 has {LEVELS} levels, not {len(self.grids)} grids, {len(self.scale_ranges)} ranges"
            )


class SoloV2Output(NamedTuple):
    """Outputs for images (B, H, W, 3), by level of S x S cells, rows first.

    Attributes:
        categories: per level (B, S, S, classes), logits.
        kernels: per level (B, S, S, E), the 1x1 kernels of the cells' masks.
        features: (B, H / 4, W / 4, E); a cell's mask is the sigmoid of their product with its kernel.
    """

    categories: tuple[jax.Array, ...]
    kernels: tuple[jax.Array, ...]
    features: jax.Array


class ConvNorm(nnx.Module):
    """Convolution without bias, group norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, size: int, *, groups: int, dtype: Any) -> None:
        self.conv = Conv(in_channels, out_channels, size, padding=size // 2, bias=False, dtype=dtype)
        self.gn = GroupNorm(groups, out_channels, eps=EPS, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, in) to (B, H, W, out)."""
        return jax.nn.relu(self.gn(self.conv(x)))


class Head(nnx.Module):
    """Kernels and categories of every cell; both branches are shared by the levels."""

    def __init__(self, config: SoloV2Config, *, dtype: Any) -> None:
        width = config.head_width

        def branch(in_channels: int) -> nnx.List:
            widths = (in_channels, *(width for _ in range(config.head_layers)))
            return nnx.List([ConvNorm(*pair, 3, groups=config.groups, dtype=dtype) for pair in pairwise(widths)])

        self.grids = config.grids
        self.kernel_convs = branch(config.pyramid_width + COORDINATES)
        self.cate_convs = branch(config.pyramid_width)
        self.solo_kernel = Conv(width, config.kernel_width, 3, padding=1, dtype=dtype)
        self.solo_cate = Conv(width, config.classes, 3, padding=1, dtype=dtype)

    def __call__(self, levels: list[jax.Array]) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """Map P2..P6 to `SoloV2Output.categories` and `SoloV2Output.kernels`."""
        # P2 has the size of P3 here, and P6 that of P5: strides 8, 8, 16, 32, 32.
        first, *middle, last = levels
        first = resize(first, (first.shape[1] // 2, first.shape[2] // 2))
        last = resize(last, middle[-1].shape[1:3])
        categories, kernels = [], []
        for features, side in zip((first, *middle, last), self.grids, strict=True):
            cells = resize(with_coordinates(features), (side, side))
            kernel, category = cells, cells[..., :-COORDINATES]
            for layer in self.kernel_convs:
                kernel = layer(kernel)
            for layer in self.cate_convs:
                category = layer(category)
            kernels.append(self.solo_kernel(kernel))
            categories.append(self.solo_cate(category))
        return tuple(categories), tuple(kernels)


class MaskLevel(nnx.Module):
    """Convolutions `conv0`, `conv1`, ..., each but P2's followed by twice the resolution."""

    def __init__(self, level: int, config: SoloV2Config, *, dtype: Any) -> None:
        self.level = level
        in_channels = config.pyramid_width + (COORDINATES if level == MASK_LEVELS - 1 else 0)
        for index in range(max(level, 1)):
            conv = ConvNorm(in_channels, config.mask_width, 3, groups=config.groups, dtype=dtype)
            setattr(self, f"conv{index}", conv)
            in_channels = config.mask_width

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, h, w, in) to (B, H / 4, W / 4, mask_width)."""
        for index in range(max(self.level, 1)):
            x = getattr(self, f"conv{index}")(x)
            if self.level:
                x = resize(x, (2 * x.shape[1], 2 * x.shape[2]))
        return x


class MaskHead(nnx.Module):
    """The mask branch: P2..P5 at the resolution of P2, summed, and a 1x1 convolution."""

    def __init__(self, config: SoloV2Config, *, dtype: Any) -> None:
        self.convs_all_levels = nnx.List([MaskLevel(level, config, dtype=dtype) for level in range(MASK_LEVELS)])
        self.conv_pred = nnx.List(
            [ConvNorm(config.mask_width, config.kernel_width, 1, groups=config.groups, dtype=dtype)]
        )

    def __call__(self, levels: list[jax.Array]) -> jax.Array:
        """Map P2..P5 to `SoloV2Output.features`."""
        *finer, coarsest = levels
        inputs = (*finer, with_coordinates(coarsest))
        first, *others = (level(x) for level, x in zip(self.convs_all_levels, inputs, strict=True))
        return self.conv_pred[0](sum(others, start=first))


class SoloV2(nnx.Module):
    """Images (B, H, W, 3) to `SoloV2Output`; differentiable in the images."""

    def __init__(self, config: SoloV2Config, *, dtype: Any) -> None:
        self.dtype = dtype
        self.backbone = ResNet(config.blocks, config.width, dtype=dtype)
        channels = [EXPANSION * width for width in stage_widths(config.width)]
        self.neck = FeaturePyramid(channels, config.pyramid_width, dtype=dtype)
        self.bbox_head = Head(config, dtype=dtype)
        self.mask_feat_head = MaskHead(config, dtype=dtype)

    def __call__(self, images: jax.Array) -> SoloV2Output:
        """Segment RGB images, floats in 0..1; ValueError where the sides are no multiples of 32 pixels."""
        if images.ndim != 4 or images.shape[-1] != CHANNELS or images.shape[1] % STRIDE or images.shape[2] % STRIDE:
            raise ValueError(f"images must be (B, H, W, 3) with sides divisible by {STRIDE}, not {images.shape}")
        mean, std = (jnp.asarray(value, jnp.float32)[None, None, None] for value in (MEAN, STD))
        pixels = ((255.0 * images.astype(jnp.float32) - mean) / std).astype(self.dtype)
        levels = self.neck(self.backbone(pixels))
        categories, kernels = self.bbox_head(levels)
        return SoloV2Output(categories, kernels, self.mask_feat_head(levels[:MASK_LEVELS]))


def solov2(config: SoloV2Config, *, dtype: Any = jnp.float32) -> Network:
    """SOLOv2 as a `Network`: `network(params, images (B, H, W, 3) in 0..1) -> SoloV2Output`.

    Args:
        config: its sizes.
        dtype: of parameters and computation; norms are float32 whatever it is.
    """
    return describe(SoloV2, config, dtype=dtype)


def whole_strides(height: int, width: int) -> tuple[int, int]:
    """Round the sides of an image up to multiples of `STRIDE`."""
    return -(-height // STRIDE) * STRIDE, -(-width // STRIDE) * STRIDE


def resize(x: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Resize (B, H, W, C) to (B, *size, C): bilinear, not antialiased, as PyTorch's `align_corners=False`."""
    return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "linear", antialias=False)


def with_coordinates(x: jax.Array) -> jax.Array:
    """Append the column and the row, each from -1 to 1: (B, H, W, C) to (B, H, W, C + 2)."""
    batch, height, width, _ = x.shape
    columns = jnp.broadcast_to(jnp.linspace(-1.0, 1.0, width)[None, None, :, None], (batch, height, width, 1))
    rows = jnp.broadcast_to(jnp.linspace(-1.0, 1.0, height)[None, :, None, None], (batch, height, width, 1))
    return jnp.concatenate([x, columns.astype(x.dtype), rows.astype(x.dtype)], axis=-1)
