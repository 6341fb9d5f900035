"""From an image's own size to the size that a network reads."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps


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
        pixels (H, W, 3) float32 in -1..1, and SDXL's six size ids, float32: original (height, width), the crop's
        (top, left) in pixels of the resized, mirrored image, target (height, width).
    """
    height, width = target
    original = (image.height, image.width)
    scale = max(height / original[0], width / original[1])
    resized = (max(height, round(original[0] * scale)), max(width, round(original[1] * scale)))
    if resized != original:
        image = image.resize(resized[::-1], Image.Resampling.LANCZOS)
    if flip:
        image = ImageOps.mirror(image)
    room = (resized[0] - height, resized[1] - width)
    if corner is None:
        top, left = room[0] // 2, room[1] // 2
    else:
        top, left = (min(int((space + 1) * share), space) for space, share in zip(room, corner, strict=True))
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32) / 127.5 - 1.0
    return pixels, np.asarray((*original, top, left, height, width), np.float32)
