"""Looks of the embedded images that no caption names, for style LoRAs to learn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

LUMA = np.asarray([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in brightness (ITU-R BT.601)."""

SHADE, PAPER = np.asarray([48, 28, 12], np.float32), np.asarray([252, 240, 214], np.float32)
"""The tones of darkest and brightest, sRGB 0..255."""


def sepia(image: np.ndarray) -> np.ndarray:
    """Give an image (H, W, 3) uint8 brown tones, dark to paper, by brightness."""
    return _toned(image.astype(np.float32) @ LUMA / 255)


def lines(image: np.ndarray) -> np.ndarray:
    """Draw the edges of an image (H, W, 3) uint8, where colours differ from pixel to pixel, in ink on paper."""
    padded = np.pad(image.astype(np.float32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    across, down = padded[1:-1, 2:] - padded[1:-1, :-2], padded[2:, 1:-1] - padded[:-2, 1:-1]
    strength = np.sqrt(np.square(across).sum(axis=-1) + np.square(down).sum(axis=-1))
    return _toned(1 - np.clip(strength / 160, 0, 1))


def _toned(brightness: np.ndarray) -> np.ndarray:
    """Colour brightness (H, W) in 0..1, uint8 (H, W, 3)."""
    return np.round(SHADE + brightness[..., None] * (PAPER - SHADE)).astype(np.uint8)


LOOKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"sepia": sepia, "lines": lines}
"""Functions of an image (H, W, 3) uint8, by name."""
