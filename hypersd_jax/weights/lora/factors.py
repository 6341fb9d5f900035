"""The two factors of one LoRA module: from PyTorch's layout to ours and back.

PyTorch writes down (r, in) and up (out, r) for a Linear, down (r, in, kh, kw) and up (out, r, 1, 1) for a convolution;
LyCORIS's Tucker form of the latter has down (r, in, 1, 1) and mid (r, r, kh, kw) instead.
Ours are down (in, r) or (kh, kw, in, r), and up (r, out) always.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from hypersd_jax.errors import UserError


def fits(
    down: tuple[int, ...], up: tuple[int, ...], kernel: tuple[int, ...], mid: tuple[int, ...] | None = None
) -> bool:
    """Tell whether factors of these shapes, in PyTorch's layout, belong to a base kernel of this shape in ours.

    A Linear's factors are taken for a 1x1 convolution and the other way round: SD 1.5 and SDXL differ in which of the
    two `proj_in` is, and exporters mix them up.
    """
    *window, fan_in, fan_out = kernel
    down, up = ((*shape, 1, 1) if len(shape) == 2 else shape for shape in (down, up))
    rank = down[0] if down else 0
    if mid is not None:
        if not window or mid != (rank, rank, *window) or down[2:] != (1, 1):
            return False
        window = [1, 1]
    return rank > 0 and down == (rank, fan_in, *(window or (1, 1))) and up == (fan_out, rank, 1, 1)


def fold_mid(down: np.ndarray, mid: np.ndarray) -> np.ndarray:
    """One down factor (r, in, kh, kw) for down (r, in, 1, 1) or (r, in) and mid (r, r, kh, kw): the same change."""
    return np.einsum("pqkl,qi->pikl", mid, down.reshape(down.shape[:2]))


def from_torch(down: np.ndarray, up: np.ndarray, kernel: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(down, up) in our layout, float32, for a base kernel of shape `kernel` that they `fits`."""
    down = down.reshape(down.shape[0], kernel[-2], *(kernel[:-2] or (1, 1))).transpose(2, 3, 1, 0)
    down = down.reshape(*kernel[:-1], -1)
    return np.ascontiguousarray(down, np.float32), np.ascontiguousarray(up.reshape(up.shape[:2]).T, np.float32)


def common_rank(adapter: Mapping[str, Mapping[str, Any]]) -> int:
    """The rank that most modules have."""
    return Counter(entry["scale"].shape[0] for entry in adapter.values()).most_common(1)[0][0]


def to_torch(
    module: str, entry: Mapping[str, Any], dtype: Any, alpha: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(down, up) in PyTorch's layout, the entry's scale folded into `up` for a reader that multiplies by alpha / rank.

    Args:
        module: its path, for the error.
        entry: {"down", "up", "scale"}.
        dtype: to store.
        alpha: as the file states it; None means the rank, so that its scale is 1.

    Raises:
        UserError: a value is NaN or infinite, or is too large for `dtype`.
    """
    down = np.asarray(entry["down"], np.float32)
    scale = np.asarray(entry["scale"], np.float32)
    if alpha is not None:
        scale = scale * np.float32(len(scale) / alpha)
    up = (np.asarray(entry["up"], np.float32) * scale[:, None]).T
    if down.ndim == 4:
        down, up = down.transpose(3, 2, 0, 1), up[:, :, None, None]
    else:
        down = down.T
    with np.errstate(over="ignore"):  # reported below, with a name
        stored = down.astype(dtype, order="C"), up.astype(dtype, order="C")
    if not all(is_finite(factor) for factor in stored):
        raise UserError(
            f"{module}: its LoRA factors hold NaN, infinite values, or values too large for {np.dtype(dtype).name}"
        )
    return stored


def is_finite(array: np.ndarray) -> bool:
    """Tell whether no value is NaN or infinite as the float32 that it is read as, whatever type a file holds it in."""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(array.astype(np.float32, copy=False)).all())
