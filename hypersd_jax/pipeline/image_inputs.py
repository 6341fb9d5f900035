"""Images that a call is given - to start from, to repaint, for ControlNets - as arrays of the size that is sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hypersd_jax.errors import UserError
from hypersd_jax.files import read_image, read_mask
from hypersd_jax.paths import expanded
from hypersd_jax.pipeline import arguments


def image_size(name: str, value: Any, factor: int) -> tuple[int, int]:
    """Height and width in pixels of the first image, rounded down to multiples of the autoencoder's factor.

    Arguments as for `read_images`; of a list of lists, the images of several ControlNets, the first list counts.
    """
    first = _listed(name, value)[0]
    first = _opened(name, _listed(name, first)[0] if isinstance(first, list | tuple) else first, read_image)
    if not isinstance(first, Image.Image) and first.ndim < 2:
        raise UserError(f"{name} has shape {first.shape}, not that of an image")
    height, width = (first.height, first.width) if isinstance(first, Image.Image) else first.shape[:2]
    return height - height % factor, width - width % factor


def read_images(name: str, value: Any, size: tuple[int, int]) -> np.ndarray:
    """Read one or several images as (N, H, W, 3) float32 in 0..1.

    Args:
        name: the argument's, for messages.
        value: a PIL image, a path, an array (H, W, 3) or (N, H, W, 3) in 0..1, or a list of these. Images and files
            are read by `files.read_image`: upright, in sRGB, on white.
        size: height and width in pixels. Images are resized to it, by Lanczos as in diffusers; arrays must have it.

    Raises:
        UserError: what cannot be read, is not an image, or does not have the size.
    """
    return np.stack([_array(name, each, size, 3) for each in _listed(name, value)])


def read_masks(name: str, value: Any, size: tuple[int, int]) -> np.ndarray:
    """Read one or several masks as (N, H, W, 1) float32: 1 where to paint (white, 0.5 and above), 0 where to keep.

    Arguments as for `read_images`; of an image what is transparent is kept, and arrays are (H, W) or (N, H, W), with or
    without a last axis of 1.
    """
    found = np.stack([_array(name, each, size, 1) for each in _listed(name, value, mask=True)])
    return (found >= 0.5).astype(np.float32)


def at_latent_size(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a mask (N, H, W, 1) to the size of the latents, (N, h, w, 1), by the nearest pixel, as diffusers does."""
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, mask.shape[1:3], strict=True))
    return mask[:, rows][:, :, columns]


def for_prompts(
    name: str, batch: np.ndarray, prompts: int, encode: Callable[[np.ndarray], np.ndarray] | None = None
) -> np.ndarray:
    """Give each prompt an image: the single one of all, which is encoded once, or its own."""
    if len(batch) not in (1, prompts):
        raise UserError(f"{name}: {len(batch)} given for {prompts} prompts")
    batch = batch if encode is None else encode(batch)
    return batch if len(batch) == prompts else np.repeat(batch, prompts, axis=0)


def _listed(name: str, value: Any, mask: bool = False) -> Sequence[Any]:
    if hasattr(value, "__array__") and not isinstance(value, Image.Image):
        array = np.asarray(value)
        single = array.ndim <= 2 or (array.ndim == 3 and (not mask or array.shape[-1] == 1))
        listed = [array] if single else list(array)
    else:
        listed = list(value) if isinstance(value, list | tuple) else [value]
    if not listed:
        raise UserError(f"{name}: none given")
    return listed


def _opened(name: str, value: Any, read: Callable[[Any], Image.Image]) -> Image.Image | np.ndarray:
    if isinstance(value, str | Path | Image.Image):
        shown = f"{name} {value}" if isinstance(value, str | Path) else name
        try:
            return read(value if isinstance(value, Image.Image) else expanded(Path(value)))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{shown}: cannot be read as an image ({error})") from None
    if not hasattr(value, "__array__"):
        raise UserError(f"{name} must be an image, a path or an array, not {type(value).__name__}")
    return np.asarray(value)


def _array(name: str, value: Any, size: tuple[int, int], channels: int) -> np.ndarray:
    read = read_image if channels == 3 else read_mask
    opened = _opened(name, value, lambda source: read(source, size))
    if isinstance(opened, Image.Image):
        return np.asarray(opened, np.float32).reshape(*size, channels) / 255
    if opened.ndim == 2 and channels == 1:
        opened = opened[..., None]
    found = arguments.checked(name, opened, (*size, channels))
    if found.min() < 0 or found.max() > 1:
        raise UserError(f"{name} holds values outside 0..1")
    return found
