"""Preprocessing of images for a reward's image tower: resized, cropped or padded, normalised; differentiable.

Both sizes are known when the program is traced, so resizing and cropping are two products with constant matrices, and
gradients are the products with their transposes. Weights are those of Pillow and of PyTorch's `antialias=True`: the
cubic kernel of Keys (1981) with a = -1/2, stretched by the factor of reduction, normalised where it leaves the image.

transformers resizes 8-bit images: after each of the two passes Pillow rounds to 1/255 and cuts off what overshoots
0..1. Here neither happens, for both stop gradients. A value differs by half a step as a rule, and at hard edges by the
overshoot: 0.02 of the range in photos, 0.15 in drawings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax.errors import UserError, shown

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Statistics of the images that OpenAI's CLIP was trained on, RGB in 0..1."""

NAME = "image processor"
BICUBIC = 3
STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")


class Placement(NamedTuple):
    """One side of an image after resizing: its length, and which of its pixels is the first that is seen.

    Where `start` is negative, so many black pixels come before the image.
    """

    resized: int
    start: int


Fit = Callable[[int, tuple[int, int], int], Placement]


def crop(length: int, sides: tuple[int, int], size: int) -> Placement:
    """Shortest side to `size`, then the centre crop, as transformers' image processor cuts it."""
    # The longer side is cut to whole pixels, as transformers and torchvision do.
    resized = int(size * length / min(sides))
    return Placement(resized, (resized - size) // 2)


def torchvision_crop(length: int, sides: tuple[int, int], size: int) -> Placement:
    """The same as torchvision cuts it: halves of odd margins are rounded to even, so it may lie one pixel further."""
    resized = int(size * length / min(sides))
    return Placement(resized, round((resized - size) / 2))


def pad(length: int, sides: tuple[int, int], size: int) -> Placement:
    """Longest side to `size`, the rest black on both sides: OpenCLIP's `ResizeMaxSize`, with which HPSv2 evaluates."""
    resized = max(round(length * (size / max(sides))), 1)
    return Placement(resized, -((size - resized) // 2))


@dataclass(frozen=True, kw_only=True)
class ImageSteps:
    """Settings of the preprocessing.

    Attributes:
        size: in pixels a side.
        mean: of R, G and B in 0..1.
        std: the same.
        fit: how the sides are made equal, `crop`, `torchvision_crop` or `pad`: from the length of one side in pixels,
            that of both and `size` to its placement.
    """

    size: int = 224
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    fit: Fit = crop

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], size: int, fit: Fit = crop) -> ImageSteps:
        """Read a `preprocessor_config.json` of a tower for images of this size; what it leaves out is CLIP's.

        UserError names a key that asks for anything else than what `preprocess` does.
        """
        for key in STEPS:
            _require(config, key, config.get(key, True) is True)
        _require(config, "resample", config.get("resample", BICUBIC) == BICUBIC)
        _require(config, "size", config.get("size", size) in (size, {"shortest_edge": size}))
        _require(config, "crop_size", config.get("crop_size", size) in (size, {"height": size, "width": size}))
        factor = config.get("rescale_factor", 1 / 255)
        _require(config, "rescale_factor", isinstance(factor, float) and abs(factor * 255 - 1) < 1e-6)
        mean, std = _colour(config, "image_mean", MEAN, least=0.0), _colour(config, "image_std", STD, 1e-6)
        return cls(size=size, mean=mean, std=std, fit=fit)


def preprocess(images: jax.Array, steps: ImageSteps) -> jax.Array:
    """Bring images (B, H, W, 3), uint8 or floats in 0..1, to (B, S, S, 3) float32, normalised; to be traced.

    ValueError where they have another shape or type.
    """
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be (B, H, W, 3), not {images.shape}")
    if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be uint8 or floats, not {images.dtype}")
    x = images.astype(jnp.float32)
    if images.dtype == jnp.uint8:
        x = x / 255.0
    sides = (images.shape[1], images.shape[2])
    for axis, length in enumerate(sides):
        place = steps.fit(length, sides, steps.size)
        if length != steps.size or place.resized != steps.size:
            weights = jnp.asarray(_placed(resize_weights(length, place.resized), place.start, steps.size), jnp.float32)
            spec = ("yh,bhwc->bywc", "xw,bywc->byxc")[axis]
            x = jnp.einsum(spec, weights, x, precision=jax.lax.Precision.HIGHEST)
    mean, std = (jnp.asarray(value, jnp.float32)[None, None, None] for value in (steps.mean, steps.std))
    return (x - mean) / std


def resize_weights(length: int, resized: int) -> np.ndarray:
    """The matrix (resized, length), float64, that resizes one side by antialiased bicubic interpolation."""
    scale = length / resized
    stretch = max(scale, 1.0)
    centres = (np.arange(resized) + 0.5) * scale
    x = np.abs(np.arange(length)[None, :] + 0.5 - centres[:, None]) / stretch
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    weights = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)


def _placed(weights: np.ndarray, start: int, size: int) -> np.ndarray:
    """The rows of a matrix from `start` on, (size, length); rows before and behind its own are 0."""
    found = np.zeros((size, weights.shape[1]))
    first = max(-start, 0)
    rows = weights[max(start, 0) : size + start]
    found[first : first + len(rows)] = rows
    return found


def _require(config: Mapping[str, Any], key: str, is_met: bool) -> None:
    if not is_met:
        raise UserError(f"{NAME} config: {key}={shown(config[key])} is not supported")


def _colour(config: Mapping[str, Any], key: str, default: tuple[float, ...], least: float) -> tuple[float, ...]:
    value = config.get(key, default)
    is_met = (
        isinstance(value, list | tuple)
        and len(value) == 3
        and all(isinstance(part, float | int) and not isinstance(part, bool) and least <= part <= 1.0 for part in value)
    )
    _require(config, key, is_met)
    return tuple(map(float, value))
