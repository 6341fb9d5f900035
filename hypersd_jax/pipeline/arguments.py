"""Checks of a call's arguments and of its images."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from hypersd_jax.config import nearest
from hypersd_jax.errors import UserError
from hypersd_jax.weights.components import default_dtype

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def parse_dtype(dtype: Any) -> Any:
    """Resolve a dtype from None or ``auto`` (the platform's default), a name, or itself."""
    if dtype is None or (isinstance(dtype, str) and dtype == "auto"):
        return default_dtype()
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise UserError(f"dtype={dtype!r} is not valid{nearest(dtype, DTYPES)}")
        return DTYPES[dtype]
    return dtype


def to_pil(images: np.ndarray) -> list[Image.Image]:
    """Images (B, H, W, 3) in 0..1 as 8-bit RGB; NaN becomes black."""
    return [Image.fromarray(np.round(np.nan_to_num(image) * 255).astype(np.uint8)) for image in images]


class NotFiniteWarning(UserWarning):
    """An image holds values that are no numbers, and would be saved black."""


def not_finite(images: np.ndarray) -> list[int]:
    """Indices of the images, or latents, (B, ...) that hold NaN or infinity."""
    return [index for index, image in enumerate(images) if not np.isfinite(image).all()]


def about_not_finite(found: Sequence[int], count: int, dtype: Any) -> str:
    """Describe images that are not finite in one line, with what is likely to help.

    Args:
        found: which, by index; shown counted from 1.
        count: of how many.
        dtype: that the networks compute in.
    """
    shown = ", ".join(str(index + 1) for index in found[:10]) + (", ..." if len(found) > 10 else "")
    which = "the image is" if count == 1 else f"of {count} images {shown} {'is' if len(found) == 1 else 'are'}"
    overflow = "float16 overflows in some models: use bfloat16 or float32; " if jnp.dtype(dtype) == jnp.float16 else ""
    return f"{which} not finite (NaN or infinity): {overflow}a LoRA, its scale or the weights may be at fault"


def warn_if_not_finite(images: np.ndarray, dtype: Any) -> None:
    """Warn of images (B, ...) that are not finite."""
    found = not_finite(images)
    if found:
        warnings.warn(
            about_not_finite(found, len(images), dtype), NotFiniteWarning, stacklevel=4
        )  # the caller of a pipeline


def checked(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Convert `value` to float32 of that shape; what is not, or is not finite, is a `UserError` that names it."""
    try:
        array = np.asarray(value, np.float32)
    except (TypeError, ValueError):
        raise UserError(f"{name} is not a number or a regular array of numbers") from None
    if array.shape != shape:
        raise UserError(f"{name} has shape {array.shape}, not {shape}")
    if not np.isfinite(array).all():
        raise UserError(f"{name} holds values that are not finite")
    return array


def listed(value: Any) -> list[Any]:
    """Make a list of one or several values; a text is one."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]


def texts(name: str, value: Any, *kinds: type) -> list[Any]:
    """Make a list of one or several values, and refuse other kinds than these."""
    texts = listed(value)
    if not texts:
        raise UserError(f"{name}: none given")
    for text in texts:
        if not isinstance(text, kinds):
            raise UserError(f"{name} must be text, not {text!r}")
    return texts


def share(strength: float | None, image: Any, mask: Any, *, default: float) -> float:
    """Resolve the strength of a call: its own, else all of the steps for noise alone and for a mask, else `default`."""
    if image is None:
        for name, value in (("strength", strength), ("mask", mask)):
            if value is not None:
                raise UserError(f"{name}: image must be given with it")
        return 1.0
    if strength is not None:
        checked("strength", strength, ())
        return float(strength)  # as it was given: rounded to float32, 0.7 of 10 steps are 6
    return default if mask is None else 1.0


def latent_size(height: int | None, width: int | None, native: int | tuple[int, int], factor: int) -> tuple[int, int]:
    """Height and width of the latents of an image of these pixels; None takes the model's `native` latent size."""
    default = native if isinstance(native, tuple) else (native, native)
    sizes = []
    for name, value, own in (("height", height, default[0]), ("width", width, default[1])):
        if value is None and not own:
            raise UserError(f"{name} must be given: the model's unet/config.json has no sample_size")
        pixels = own * factor if value is None else value
        if pixels < factor or pixels % factor:
            raise UserError(f"{name}={pixels} must be a positive multiple of {factor}")
        sizes.append(pixels // factor)
    return sizes[0], sizes[1]


def free_memory() -> int:
    """Bytes of memory that no program and no file's cache holds; 0 where the system does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0
