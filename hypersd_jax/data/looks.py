"""Looks of the embedded images that no caption names, for style LoRAs to learn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

LUMA = np.asarray([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in brightness (ITU-R BT.601)."""

SHADE, PAPER = np.asarray([48, 28, 12], np.float32), np.asarray([252, 240, 214], np.float32)
"""The tones of darkest and brightest, sRGB 0..255."""

TILES = 16
"""Tiles a side of a mosaic."""


def sepia(image: np.ndarray) -> np.ndarray:
    """Give an image (H, W, 3) uint8 brown tones, dark to paper, by brightness."""
    brightness = image.astype(np.float32) @ LUMA / 255
    return np.round(SHADE + brightness[..., None] * (PAPER - SHADE)).astype(np.uint8)


def mosaic(image: np.ndarray) -> np.ndarray:
    """Lay an image (H, W, 3) uint8 in 16 by 16 tiles of one colour each, the mean of what is below."""
    down, across = (np.arange(side) * TILES // side for side in image.shape[:2])
    tiles = np.zeros((TILES, TILES, 4))
    np.add.at(tiles, (down[:, None], across[None]), np.pad(image, ((0, 0), (0, 0), (0, 1)), constant_values=1))
    colours = tiles[..., :3] / np.maximum(tiles[..., 3:], 1)
    return np.round(colours).astype(np.uint8)[down[:, None], across[None]]


LOOKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"sepia": sepia, "mosaic": mosaic}
"""Functions of an image (H, W, 3) uint8, by name."""
