"""COCO's two forms of a mask, polygons and run lengths, to pixels; by their definition, without COCO's program."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

FIRST, BITS, MORE = 48, 5, 32
"""Of a character of compressed run lengths: its code's offset, how many bits it brings, and the bit for "goes on"."""


def polygon_mask(polygons: Iterable[np.ndarray], height: int, width: int) -> np.ndarray:
    """Fill polygons (V, 2) of x and y, in pixels from the image's top left corner: (H, W) bool.

    A pixel is in a polygon if its centre is, by the even-odd rule, and in the mask if it is in one of them.
    """
    mask = np.zeros((height, width), bool)
    for polygon in polygons:
        mask |= _filled(polygon.astype(np.float64), height, width)
    return mask


def _filled(polygon: np.ndarray, height: int, width: int) -> np.ndarray:
    """One polygon: each of its edges inverts all pixels to its right, row by row."""
    (x0, y0), (x1, y1) = polygon.T, np.roll(polygon, -1, axis=0).T
    rows = np.arange(height) + 0.5
    edge, row = np.nonzero((y0[:, None] <= rows) != (y1[:, None] <= rows))
    x = x0[edge] + (rows[row] - y0[edge]) / (y1[edge] - y0[edge]) * (x1[edge] - x0[edge])
    inverted = np.zeros((height, width + 1), bool)
    np.logical_xor.at(inverted, (row, np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)), True)
    return np.logical_xor.accumulate(inverted, axis=1)[:, :width]


def run_length_mask(counts: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fill run lengths (N,), of pixels outside and inside by turns, column by column: (H, W) bool."""
    inside = np.arange(len(counts)) % 2 == 1
    return np.repeat(inside, counts).reshape(width, height).T


def run_lengths(text: str) -> list[int]:
    """Read the run lengths of a compressed text.

    A number is spread over characters of 5 bits, the lowest first, with the sign as its highest bit. From the fourth
    on it is the difference to the last but one.

    Raises:
        ValueError: the text ends within a number, or holds other characters.
    """
    counts: list[int] = []
    number = shift = 0
    for character in text:
        code = ord(character) - FIRST
        if not 0 <= code < 2 * MORE:
            raise ValueError(f"{character!r} is not of compressed run lengths")
        number |= (code % MORE) << shift
        shift += BITS
        if code < MORE:
            if code >= MORE // 2:
                number -= 1 << shift
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number = shift = 0
    if shift:
        raise ValueError("compressed run lengths end within a number")
    return counts
