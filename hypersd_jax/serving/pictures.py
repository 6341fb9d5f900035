"""Pictures that clients send: bounded before they are decoded, and of three formats alone."""

from __future__ import annotations

import io
import warnings

from PIL import Image

from hypersd_jax.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP")


def read_picture(name: str, data: bytes, most: int) -> Image.Image:
    """Decode a picture.

    Args:
        name: the client's, for the message.
        data: a PNG, JPEG or WebP file.
        most: pixels that a side may have.

    Raises:
        UserError: another format, damaged, or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception:  # Pillow's decoders raise whatever they come across
        raise UserError(f"{name}: is no PNG, JPEG or WebP") from None
    if max(image.size) > most:
        raise UserError(f"{name}: {image.width}x{image.height} pixels, more than {most} on a side")
    image.info.pop("icc_profile", None)  # a stranger's colour profile is not run
    try:
        image.load()
    except Exception:
        raise UserError(f"{name}: is damaged") from None
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
        raise UserError(f"{name}: has pixels of kind {image.mode}, not 8 bits a channel")
    return image
