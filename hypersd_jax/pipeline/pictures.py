"""Pictures that a call is given - to start from, to repaint, to steer by - as arrays of the size that is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hypersd_jax.errors import UserError


def picture_size(name: str, value: Any, factor: int) -> tuple[int, int]:
    """Height and width in pixels of the first picture, rounded down to multiples of the autoencoder's factor."""
    first = _opened(name, _listed(name, value)[0])
    height, width = (first.height, first.width) if isinstance(first, Image.Image) else first.shape[:2]
    return height - height % factor, width - width % factor


def pictures(name: str, value: Any, size: tuple[int, int]) -> np.ndarray:
    """One or several pictures as (N, H, W, 3) float32 in 0..1.

    Args:
        name: the argument's, for messages.
        value: a PIL image, a path, an array (H, W, 3) or (N, H, W, 3) in 0..1, or a list of these.
        size: height and width in pixels. Images are resized to it, by Lanczos as in diffusers; arrays must have it.

    Raises:
        UserError: what cannot be read, is not a picture, or does not have the size.
    """
    return np.stack([_array(name, each, size, "RGB") for each in _listed(name, value)])


def masks(name: str, value: Any, size: tuple[int, int]) -> np.ndarray:
    """One or several masks as (N, H, W, 1) float32, 1 where to paint (white, 0.5 and above), 0 where to keep.

    Arguments as for `pictures`; arrays are (H, W) or (N, H, W), with or without a last axis of 1.
    """
    found = np.stack([_array(name, each, size, "L") for each in _listed(name, value, mask=True)])
    return (found >= 0.5).astype(np.float32)


def shrunk(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask (N, H, W, 1) at the size of the latents, (N, h, w, 1): the nearest pixel, as diffusers takes it."""
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, mask.shape[1:3], strict=True))
    return mask[:, rows][:, :, columns]


def for_prompts(name: str, batch: np.ndarray, prompts: int) -> np.ndarray:
    """One picture for each prompt: the only one for all, or each its own."""
    if len(batch) not in (1, prompts):
        raise UserError(f"{name}: {len(batch)} given for {prompts} prompts")
    return batch if len(batch) == prompts else np.repeat(batch, prompts, axis=0)


def _listed(name: str, value: Any, mask: bool = False) -> Sequence[Any]:
    if isinstance(value, np.ndarray):
        single = value.ndim == 2 or (value.ndim == 3 and (not mask or value.shape[-1] == 1))
        return [value] if single else list(value)
    listed = list(value) if isinstance(value, list | tuple) else [value]
    if not listed:
        raise UserError(f"{name}: none given")
    return listed


def _opened(name: str, value: Any) -> Image.Image | np.ndarray:
    if isinstance(value, str | Path):
        try:
            with Image.open(value) as image:
                image.load()
                return image
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{name} {value}: cannot be read as a picture ({error})") from None
    if isinstance(value, Image.Image):
        return value
    if not hasattr(value, "__array__"):
        raise UserError(f"{name} must be a picture, a path or an array, not {type(value).__name__}")
    return np.asarray(value)


def _array(name: str, value: Any, size: tuple[int, int], mode: str) -> np.ndarray:
    opened = _opened(name, value)
    channels = 3 if mode == "RGB" else 1
    if isinstance(opened, Image.Image):
        fitted = opened.convert(mode)
        if fitted.size != size[::-1]:
            fitted = fitted.resize(size[::-1], Image.Resampling.LANCZOS)
        return np.asarray(fitted, np.float32).reshape(*size, channels) / 255
    if opened.ndim == 2 and channels == 1:
        opened = opened[..., None]
    if opened.shape != (*size, channels):
        raise UserError(f"{name} has shape {opened.shape}, not {(*size, channels)}")
    found = opened.astype(np.float32)
    if not np.isfinite(found).all() or found.min() < 0 or found.max() > 1:
        raise UserError(f"{name} holds values outside 0..1")
    return found
