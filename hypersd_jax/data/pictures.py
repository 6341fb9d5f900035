"""One picture: from encoded bytes to pixels, and from its own size to the size that a network reads."""

from __future__ import annotations

from typing import IO

import numpy as np
from PIL import Image, ImageOps

# What orients a picture, in its EXIF data: from 5 on, width and height change places.
_ORIENTATION, _TURNED = 0x0112, 5


def picture_size(file: IO[bytes]) -> tuple[int, int]:
    """(height, width) as `read_picture` would give them, from the file's header alone; raises what Pillow raises."""
    with Image.open(file) as image:
        width, height = image.size
        # Of a PNG without it in the header, Pillow would decode all pixels to look behind them.
        known = image.format != "PNG" or "exif" in image.info
        turned = known and image.getexif().get(_ORIENTATION, 1) >= _TURNED
    return (width, height) if turned else (height, width)


def read_picture(file: IO[bytes]) -> Image.Image:
    """Decode a picture to RGB, turned as its EXIF data says; what is transparent lies on white.

    Of an animation, the first frame. 16 bits a channel are rounded to 8.

    Raises:
        ValueError: floating-point pixels, whose range nobody knows; and whatever Pillow raises on broken files.
    """
    with Image.open(file) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
    if upright.mode == "F":
        raise ValueError("floating-point pixels")
    if upright.mode.startswith("I"):
        return _from_16_bits(np.asarray(upright))
    if "A" in upright.getbands() or "a" in upright.getbands() or "transparency" in upright.info:
        coloured = upright.convert("RGBA")
        ground = Image.new("RGBA", coloured.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, coloured).convert("RGB")
    return upright.convert("RGB")


def _from_16_bits(pixels: np.ndarray) -> Image.Image:
    """Grey levels 0..65535 (H, W), which Pillow alone would cut off at 255."""
    grey = np.round(np.clip(pixels.astype(np.float64), 0, 65535) / 257.0).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def fit_picture(
    picture: Image.Image, target: tuple[int, int], place: tuple[float, float] | None = None, *, flip: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Scale a picture so that it just covers ``target`` (height, width), mirror it if told to, and crop.

    Args:
        picture: RGB.
        target: height and width of the result.
        place: where the crop lies, (down, across), each from 0, the top or left end, up to 1; None: in the middle.
        flip: mirror left and right before cropping.

    Returns:
        pixels (H, W, 3) float32 in -1..1, and SDXL's six size ids, float32: original (height, width), the crop's
        (top, left) in pixels of the resized, mirrored picture, target (height, width).
    """
    height, width = target
    original = (picture.height, picture.width)
    scale = max(height / original[0], width / original[1])
    resized = (max(height, round(original[0] * scale)), max(width, round(original[1] * scale)))
    if resized != original:
        picture = picture.resize(resized[::-1], Image.Resampling.LANCZOS)
    if flip:
        picture = ImageOps.mirror(picture)
    room = (resized[0] - height, resized[1] - width)
    if place is None:
        top, left = room[0] // 2, room[1] // 2
    else:
        top, left = (min(int((space + 1) * share), space) for space, share in zip(room, place, strict=True))
    pixels = np.asarray(picture.crop((left, top, left + width, top + height)), np.float32) / 127.5 - 1.0
    return pixels, np.asarray((*original, top, left, height, width), np.float32)
