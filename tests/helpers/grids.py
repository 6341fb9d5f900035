"""The images inside of grids, as they are shown there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from hypersd_jax.evaluation import grid


def cells(path: Path, column: int, rows: int) -> np.ndarray:
    """The images of a grid's column, as they are shown."""
    sheet = np.asarray(Image.open(path).convert("RGB"))
    side, pitch = grid.LEAST_CELL, grid.LEAST_CELL + grid.GAP
    top, columns = sheet.shape[0] - rows * pitch, (sheet.shape[1] - grid.TEXT_WIDTH - 2 * grid.GAP) // pitch
    left = grid.TEXT_WIDTH + grid.GAP + (column % columns) * pitch
    tops = [top + row * pitch for row in range(rows)]
    return np.stack([sheet[each : each + side, left : left + side] for each in tops])


def shown(image: np.ndarray) -> np.ndarray:
    """An image as a grid has it."""
    side = grid.LEAST_CELL
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)).astype(int)
