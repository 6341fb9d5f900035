"""Which cells of SOLO's grids find which instance of an image (arXiv 1912.04488, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hypersd_jax.distill.structure import InstanceTargets
from hypersd_jax.models.solov2 import MASK_STRIDE

CENTRE = 0.2
"""Sides of an instance's centre region over those of its box."""


class PositiveCells(NamedTuple):
    """The P positive cells of an image, ascending.

    Attributes:
        cells: (P,) int32, index among the cells of all levels, those of the finest grid first, rows first.
        classes: (P,) int32, the category of the cell's instance.
        instances: (P,) int32, the instance's index in the image.
    """

    cells: np.ndarray
    classes: np.ndarray
    instances: np.ndarray


def positive_cells(
    classes: Sequence[int] | np.ndarray,
    masks: np.ndarray,
    *,
    grids: Sequence[int],
    scale_ranges: Sequence[tuple[float, float]],
) -> PositiveCells:
    """Assign the instances of an image to cells.

    An instance belongs to the levels in whose range the square root of its box's area lies, both ends included. There
    its cells are those that its centre region meets: 0.2 of the box's sides around the mask's centre of mass, and no
    cell beyond the neighbours of the one with that centre. Where two instances have a cell in common, the later has it.

    Args:
        classes: (I,) category of each instance.
        masks: (I, H, W), of pixels that are its or not; one without any has no cell.
        grids: cells a side of each level.
        scale_ranges: (smallest, largest) size of each level, in pixels.

    Raises:
        ValueError: there are not as many classes as masks.
    """
    classes = np.asarray(classes, np.int32)
    if masks.ndim != 3 or classes.shape != masks.shape[:1]:
        raise ValueError(f"{classes.shape} classes, but masks of shape {masks.shape}")
    ends = np.cumsum([side * side for side in grids])
    owners = np.full(ends[-1], -1, np.int32)
    for instance, mask in enumerate(masks):
        rows, columns = np.nonzero(mask)
        if not rows.size:
            continue
        size = math.sqrt(_extent(rows) * _extent(columns))
        for side, end, (smallest, largest) in zip(grids, ends, scale_ranges, strict=True):
            if smallest <= size <= largest:
                level = owners[end - side * side : end].reshape(side, side)
                level[_centre(rows, mask.shape[0], side), _centre(columns, mask.shape[1], side)] = instance
    cells = np.flatnonzero(owners >= 0).astype(np.int32)
    return PositiveCells(cells, classes[owners[cells]], owners[cells])


def instance_targets(
    classes: Sequence[int] | np.ndarray,
    masks: np.ndarray,
    *,
    grids: Sequence[int],
    scale_ranges: Sequence[tuple[float, float]],
    positives: int,
    instances: int,
) -> InstanceTargets:
    """Compute the targets of one image, NumPy arrays without the batch axis.

    Args:
        classes: see `positive_cells`.
        masks: (I, H, W), sides divisible by 4.
        grids: see `positive_cells`.
        scale_ranges: the same.
        positives: M, the cells that there is room for. An instance takes up to 9 cells of a level, and is on two
            levels as a rule.
        instances: the instances that there is room for.

    Raises:
        ValueError: there is no room for all, which a loss would take for background; or see `positive_cells`.
    """
    found = positive_cells(classes, masks, grids=grids, scale_ranges=scale_ranges)
    count, height, width = masks.shape
    if len(found.cells) > positives or count > instances:
        raise ValueError(
            f"{len(found.cells)} positive cells of {count} instances, but there is room for {positives} of {instances}"
        )
    rest = positives - len(found.cells)
    shares = masks.astype(bool).reshape(count, height // MASK_STRIDE, MASK_STRIDE, width // MASK_STRIDE, MASK_STRIDE)
    return InstanceTargets(
        cells=np.pad(found.cells, (0, rest)),
        classes=np.pad(found.classes, (0, rest)),
        instances=np.pad(found.instances, (0, rest)),
        weights=np.pad(np.ones(len(found.cells), np.float32), (0, rest)),
        masks=np.pad(shares.mean(axis=(2, 4), dtype=np.float32), ((0, instances - count), (0, 0), (0, 0))),
    )


def _extent(positions: np.ndarray) -> int:
    """The pixels from the first to the last of a mask's rows or columns."""
    return int(positions.max() - positions.min()) + 1


def _centre(positions: np.ndarray, length: int, side: int) -> slice:
    """The rows (or columns) of a grid over `length` pixels that the centre region of a mask's pixels meets."""
    centre, half = positions.mean() + 0.5, CENTRE / 2 * _extent(positions)
    first, middle, last = (math.floor(x / length * side) for x in (centre - half, centre, centre + half))
    return slice(max(first, middle - 1, 0), min(last, middle + 1, side - 1) + 1)
