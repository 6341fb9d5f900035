"""From an image's own size to the size that a network reads."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

HALF = 128
"""Of the values of 8 bits."""


def fit_image(
    image: Image.Image, target: tuple[int, int], corner: tuple[float, float] | None = None, *, flip: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Scale an image so that it just covers ``target`` (height, width), mirror it with ``flip``, and crop.

    Args:
        image: RGB.
        target: height and width of the result.
        corner: where the crop lies, (down, across), each from 0, the top or left end, up to 1; None: in the middle.
        flip: mirror left and right before cropping.

    Returns:
        pixels (H, W, 3) uint8, and SDXL's six size ids, float32: original (height, width), the crop's
        (top, left) in pixels of the resized, mirrored image, target (height, width).
    """
    height, width = target
    original = (image.height, image.width)
    resized = _covering(original, target)
    if resized != original:
        image = image.resize(resized[::-1], Image.Resampling.LANCZOS)
    if flip:
        image = ImageOps.mirror(image)
    room = (resized[0] - height, resized[1] - width)
    if corner is None:
        top, left = room[0] // 2, room[1] // 2
    else:
        top, left = (min(int((space + 1) * share), space) for space, share in zip(room, corner, strict=True))
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.uint8)
    return pixels, np.asarray((*original, top, left, height, width), np.float32)


def fit_mask(mask: np.ndarray, sizes: np.ndarray, size: tuple[int, int], *, flip: bool = False) -> np.ndarray:
    """Scale, mirror and crop a mask of an image as `fit_image` did the image.

    Args:
        mask: (h, w) bool, of the whole image, at its own size or another one of the same shape.
        sizes: the image's six size ids from `fit_image`.
        size: height and width of the result, whatever the image's are now.
        flip: whether the image was mirrored.

    Returns:
        (H, W) bool: the pixels of which it covers about half or more.
    """
    *original, top, left, height, width = (int(number) for number in sizes)
    resized = _covering((original[0], original[1]), (height, width))
    if flip:
        left = resized[1] - left - width
    down, across = mask.shape[0] / resized[0], mask.shape[1] / resized[1]
    end = (min((left + width) * across, mask.shape[1]), min((top + height) * down, mask.shape[0]))
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    image = image.resize(size[::-1], Image.Resampling.BILINEAR, box=(left * across, top * down, *end))
    return np.asarray(ImageOps.mirror(image) if flip else image) >= HALF


def _covering(original: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The size to which an image is scaled so that it just covers ``target``."""
    scale = max(target[0] / original[0], target[1] / original[1])
    return max(target[0], round(original[0] * scale)), max(target[1], round(original[1] * scale))
