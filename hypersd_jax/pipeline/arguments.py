"""What a call is given: checked, listed, cut into rounds."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from hypersd_jax.config import nearest
from hypersd_jax.errors import UserError
from hypersd_jax.weights.components import default_dtype

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
Callback = Callable[[int, int], None]


def parse_dtype(dtype: Any) -> Any:
    """A dtype from None or ``auto`` (the platform's default), a name, or itself."""
    if dtype is None or (isinstance(dtype, str) and dtype == "auto"):
        return default_dtype()
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise UserError(f"dtype={dtype!r} is not valid{nearest(dtype, DTYPES)}")
        return DTYPES[dtype]
    return dtype


def to_pil(images: np.ndarray) -> list[Image.Image]:
    """Pictures (B, H, W, 3) in 0..1 as 8-bit RGB images; NaN becomes black."""
    return [Image.fromarray(np.round(np.nan_to_num(image) * 255).astype(np.uint8)) for image in images]


class NotFiniteWarning(UserWarning):
    """An image holds values that are no numbers, and would be saved black."""


def not_finite(images: np.ndarray) -> list[int]:
    """Which of the images, or latents, (B, ...) hold NaN or infinity, by index."""
    return [index for index, image in enumerate(images) if not np.isfinite(image).all()]


def about_not_finite(found: Sequence[int], count: int, dtype: Any) -> str:
    """One line on images that are not finite, with what is likely to help.

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
        warnings.warn(about_not_finite(found, len(images), dtype), NotFiniteWarning, stacklevel=3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """Pictures that are drawn at a time.

    Attributes:
        rows: their numbers in the call, (size,); past `count` the last is repeated, to share the other rounds' program.
        count: how many of them are wanted.
        windows: in how many windows their prompts are read, None for one reading of what fits (`PromptEncoder`).
    """

    rows: np.ndarray
    count: int
    windows: int | None


def rounds(windows: Sequence[int | None], size: int | None) -> list[Round]:
    """The rows of a call in rounds of one size, each of rows with equally many windows; None is all such rows at once.

    Rows of other windows are apart because what a prompt's context ends in depends on their number.
    """
    found = []
    for number in dict.fromkeys(windows):
        rows = np.asarray([row for row, own in enumerate(windows) if own == number])
        step = size or len(rows)
        for part in (rows[start : start + step] for start in range(0, len(rows), step)):
            filled = np.pad(part, (0, step - len(part)), mode="edge")
            found.append(Round(rows=filled, count=len(part), windows=number))
    return found


def joined(rounds: Sequence[Round], drawn: Sequence[np.ndarray]) -> np.ndarray:
    """What the rounds drew, (size, ...) each, in the order of the call's rows."""
    rows = np.concatenate([each.rows[: each.count] for each in rounds])
    kept = [images[: each.count] for each, images in zip(rounds, drawn, strict=True)]
    return np.concatenate(kept)[np.argsort(rows)]


def slices(table: Mapping[str, np.ndarray], noise: Any) -> Iterator[tuple[dict[str, np.ndarray], Any]]:
    """A solver's table as tables of one step each."""
    for i in range(len(noise)):
        yield {key: value if value.ndim == 0 else value[i : i + 1] for key, value in table.items()}, noise[i : i + 1]


class Progress:
    """Tell a callback of every finished step of a call.

    A step is waited for once the next one has been handed to the devices, so that they never stand idle between two.
    """

    def __init__(self, callback: Callback, total: int) -> None:
        self._callback = callback
        self._total = total
        self._done = 0
        self._running: jax.Array | None = None

    def follow(self, latents: jax.Array) -> None:
        """Take the result of the step that was just handed over, and tell of the one before it."""
        before, self._running = self._running, latents
        self._tell(before)

    def finish(self) -> None:
        """Tell of the last step that was handed over."""
        before, self._running = self._running, None
        self._tell(before)

    def _tell(self, latents: jax.Array | None) -> None:
        if latents is None:
            return
        jax.block_until_ready(latents)
        self._done += 1
        self._callback(self._done, self._total)


def checked(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """`value` as float32 of that shape; what is not, or is not finite, is a `UserError` that names it."""
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
    """One or several, as a list; a text is one."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]


def texts(name: str, value: Any, *kinds: type) -> list[Any]:
    """One or several values of these kinds, as a list."""
    texts = listed(value)
    if not texts:
        raise UserError(f"{name}: none given")
    for text in texts:
        if not isinstance(text, kinds):
            raise UserError(f"{name} must be text, not {text!r}")
    return texts


def share(strength: float | None, image: Any, mask: Any, *, default: float) -> float:
    """The strength of a call: its own, else all of the steps for noise alone and for a mask, else `default`."""
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
    """Height and width of the latents of a picture of these pixels; None takes the model's `native` latent size."""
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
