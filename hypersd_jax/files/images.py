"""One reader for every image that a user names: for training, image to image, ControlNet and evaluation.

The result is what an image viewer shows: upright, in sRGB, 8 bits a channel, with transparent parts on white.
"""

from __future__ import annotations

import functools
import io
from pathlib import PurePath
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

IMAGE_ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".avif", ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".qoi"),
)
"""Endings of the files that are read as images."""

UNREAD_ENDINGS = (".heic", ".heif", ".hif", ".jxl", ".svg", ".psd", ".exr", ".hdr", ".cr2", ".nef", ".arw", ".dng")
"""Endings of images that cannot be read; where they lie among others they are counted and named."""

_ORIENTATION = 0x0112
# From orientation 5 on, width and height are swapped.
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# How Pillow unpacks a PNG of 16 bits a channel, by the bytes that it keeps: the upper ones, or the lower ones.
_DEEP = {"RGB;16B": "RGB;16L", "RGBA;16B": "RGBA;16L"}
# Steps between the grey levels of a PNG with few of them, which Pillow spreads over 0..255 but not in its tRNS.
_SPREAD = {"L;2": 85, "L;4": 17}
# A profile that changes no colour by more than this is taken for sRGB, so that such images keep their pixels.
_SAME = 1


class _Layers(NamedTuple):
    """Colour (RGB, in sRGB), opacity (mode L), None where all is opaque, and how the image is to be resized."""

    colour: Image.Image
    alpha: Image.Image | None
    resampling: Image.Resampling


def is_readable(name: str) -> bool:
    """Tell whether a file's name ends as those do that are read as images."""
    return PurePath(name).suffix.lower() in IMAGE_ENDINGS


def image_size(file: IO[bytes]) -> tuple[int, int]:
    """Return (height, width) as `read_image` would give them, from the header alone; raises what Pillow raises."""
    with _opened(file) as image:
        width, height = image.size
        # Of a PNG without it in the header, Pillow would decode all pixels to look behind them.
        known = image.format != "PNG" or "exif" in image.info
        swapped = known and image.getexif().get(_ORIENTATION, 1) >= 5
    return (width, height) if swapped else (height, width)


def read_image(source: Any, size: tuple[int, int] | None = None) -> Image.Image:
    """Read an image as RGB, 8 bits a channel, in sRGB: upright by its EXIF data, transparent parts on white.

    Args:
        source: an open binary file, a path, or a PIL image. Of an animation the first frame counts.
        size: (height, width) to resize to, by Lanczos, black and white by the nearest pixel; None keeps its own.

    Raises:
        ValueError: floating-point or 32-bit pixels, whose range nobody knows; and whatever Pillow raises.
    """
    colour, alpha, resampling = _layers_of(source)
    if alpha is not None:
        white = Image.new("RGBA", colour.size, (255, 255, 255, 255))
        colour.putalpha(alpha)
        colour = Image.alpha_composite(white, colour).convert("RGB")
    return _resized(colour, size, resampling)


def read_mask(source: Any, size: tuple[int, int] | None = None) -> Image.Image:
    """Read a mask as grey levels (mode L): luminance times opacity; errors as for `read_image`.

    Args:
        source: as for `read_image`.
        size: (height, width) to resize to. What is opaque becomes grey after that, as in diffusers.
    """
    colour, alpha, resampling = _layers_of(source)
    if alpha is not None:
        product = np.asarray(colour.convert("L"), np.float32) * np.asarray(alpha, np.float32) / 255.0
        colour = Image.fromarray(np.round(product).astype(np.uint8))
    return _resized(colour, size, resampling).convert("L")


def _resized(image: Image.Image, size: tuple[int, int] | None, resampling: Image.Resampling) -> Image.Image:
    if size is None or image.size == size[::-1]:
        return image
    return image.resize(size[::-1], resampling)


def _layers_of(source: Any) -> _Layers:
    if isinstance(source, Image.Image):
        return _layers(source)
    with _opened(source) as image:
        return _layers(image)


def _opened(source: Any) -> Image.Image:
    try:
        return Image.open(source)
    except UnidentifiedImageError:  # whose message shows the object that was opened
        raise UnidentifiedImageError("not in a known image format") from None


def _layers(image: Image.Image) -> _Layers:
    packing = _packing(image)
    deep = _deep_pixels(image, packing) if packing in _DEEP else None
    image.load()
    profile, clear = image.info.get("icc_profile"), image.info.get("transparency")
    transpose = _TRANSPOSES.get(image.getexif().get(_ORIENTATION, 1))
    if deep is not None:
        flat, alpha = _from_16_bits(deep[..., :3]), _from_16_bits(deep[..., 3]) if deep.shape[-1] == 4 else None
        if clear is not None:
            alpha = _opacity((deep == np.asarray(clear)).all(axis=-1))
    elif image.mode == "F":
        raise ValueError("floating-point pixels")
    elif image.mode.startswith("I"):
        levels: np.ndarray = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError("32-bit pixels")
        flat, alpha = _from_16_bits(levels), None if clear is None else _opacity(levels == clear)
    else:
        flat, alpha = _from_8_bits(image, clear, _SPREAD.get(packing, 1))
    colour = _in_srgb(flat, profile)
    if transpose is not None:
        colour, alpha = colour.transpose(transpose), None if alpha is None else alpha.transpose(transpose)
    # Pillow resizes black and white, which has no levels between, by the nearest pixel whatever it is asked for.
    return _Layers(colour, alpha, Image.Resampling.NEAREST if image.mode == "1" else Image.Resampling.LANCZOS)


def _packing(image: Image.Image) -> str:
    """The packing of the pixels of a PNG that is not decoded yet, in Pillow's terms."""
    tiles = getattr(image, "tile", None)
    packing = tiles[0][3] if image.format == "PNG" and tiles else ""
    return packing if isinstance(packing, str) else ""


def _deep_pixels(image: Any, packing: str) -> np.ndarray:
    """(H, W, 3 or 4) 0..65535 of a PNG, of which Pillow itself keeps the upper bytes only."""
    image.fp.seek(0)
    data = image.fp.read()

    def unpacked(packing: str) -> np.ndarray:
        with Image.open(io.BytesIO(data)) as reopened:
            reopened.tile = [reopened.tile[0]._replace(args=packing)]
            return np.asarray(reopened).astype(np.int64)

    return 256 * unpacked(packing) + unpacked(_DEEP[packing])


def _from_16_bits(levels: np.ndarray) -> Image.Image:
    """Levels 0..65535 rounded to 8 bits: grey (H, W), or RGB (H, W, 3)."""
    return Image.fromarray(np.round(levels / 257.0).astype(np.uint8))


def _opacity(clear: np.ndarray) -> Image.Image:
    return Image.fromarray(np.where(clear, 0, 255).astype(np.uint8))


def _from_8_bits(image: Image.Image, clear: Any, spread: int) -> tuple[Image.Image, Image.Image | None]:
    """Colour without opacity, in the file's own colour space, and the opacity."""
    if image.mode == "L" and clear is not None:
        return image, _opacity(np.asarray(image) == spread * clear)
    if image.mode in ("LA", "La"):
        straight = image.convert("LA")
        return straight.getchannel("L"), straight.getchannel("A")
    if "A" in image.getbands() or "a" in image.getbands() or clear is not None:
        straight = image.convert("RGBA")
        return straight.convert("RGB"), straight.getchannel("A")
    if image.mode == "1":
        return image.convert("L"), None
    return (image, None) if image.mode in ("L", "CMYK", "LAB") else (image.convert("RGB"), None)


def _in_srgb(flat: Image.Image, profile: bytes | None) -> Image.Image:
    """Colours as RGB in sRGB; a profile that is damaged, or of another colour space, is left out, as viewers do."""
    transform = _transform(profile, flat.mode) if profile or flat.mode == "LAB" else None
    if transform is None:
        return flat.convert("RGB")
    converted = ImageCms.applyTransform(flat, transform)
    assert converted is not None
    return converted


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from a profile's colours to sRGB; None where there is none, or where it changes nothing."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else ImageCms.createProfile("LAB")
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if mode not in ("L", "RGB"):
        return transform
    levels = np.linspace(0, 255, 18).round().astype(np.uint8)
    probe = levels[None] if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(18, -1, 3)
    before = Image.fromarray(probe)
    after = ImageCms.applyTransform(before, transform)
    apart = np.asarray(after, np.int64) - np.asarray(before.convert("RGB"), np.int64)
    return transform if np.abs(apart).max() > _SAME else None
