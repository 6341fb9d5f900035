"""Read the targets of the structure term: the instances of a batch's images, where the student's images have them."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from hypersd_jax.data import Batch
from hypersd_jax.data.fitting import fit_mask
from hypersd_jax.data.image_sizes import WORKERS
from hypersd_jax.data.instances import AnnotatedImage
from hypersd_jax.distill.structure import InstanceTargets
from hypersd_jax.errors import UserError
from hypersd_jax.inputs.batches import Reading
from hypersd_jax.inputs.instance_targets import instance_targets, positive_cells
from hypersd_jax.models.solov2 import SoloV2Config, whole_strides

TARGETS = "structure_targets"
LEFT_OUT = "structure_left_out"
"""Keys of a batch: `InstanceTargets`; and how many of an image's instances there was no room for, (B,) float32."""

SHAPE_TOLERANCE = 0.05
"""By which the aspect ratios of an image and of its annotations may differ, as a logarithm: sizes are whole pixels."""


def reading(
    annotated: Mapping[int, AnnotatedImage],
    names: Mapping[int, str],
    config: SoloV2Config,
    *,
    positives: int,
    instances: int,
) -> Reading:
    """Make the function that reads a batch's targets, in the frame of what SOLOv2 sees of it.

    Args:
        annotated: the annotations of each of the source's images, by its key.
        names: the file of each.
        config: the network's, for its grids.
        positives, instances: the room of an image, see `instance_targets`.
    """

    def read(captions: Sequence[str], images: Batch | None) -> dict[str, Any]:
        assert images is not None
        assert images.keys is not None
        assert images.mirrored is not None
        keys, flips = images.keys.tolist(), images.mirrored.tolist()
        size = whole_strides(*images.images.shape[1:3])

        def one(index: int) -> tuple[InstanceTargets, np.float32]:
            image, sizes = annotated[keys[index]], images.sizes[index]
            _require_shape(image, sizes, names[keys[index]])
            masks = fitted_masks(image, sizes, size, flip=flips[index])
            classes = [instance.category for instance in image.instances]
            return targets_of(classes, masks, config, positives=positives, instances=instances)

        with ThreadPoolExecutor(WORKERS) as pool:
            targets, left_out = zip(*pool.map(one, range(len(keys))), strict=True)
        return {TARGETS: InstanceTargets(*map(np.stack, zip(*targets, strict=True))), LEFT_OUT: np.stack(left_out)}

    return read


def fitted_masks(image: AnnotatedImage, sizes: np.ndarray, size: tuple[int, int], *, flip: bool) -> np.ndarray:
    """Compute the masks (I, *size) bool of an image's instances, as `fit_mask`."""
    whole = (instance.mask(image.height, image.width) for instance in image.instances)
    return np.asarray([fit_mask(mask, sizes, size, flip=flip) for mask in whole], bool).reshape(-1, *size)


def _require_shape(image: AnnotatedImage, sizes: np.ndarray, name: str) -> None:
    """Refuse annotations of an image of another shape, as of one that has been turned."""
    height, width = map(int, sizes[:2])
    if abs(math.log(height / width * image.width / image.height)) > SHAPE_TOLERANCE:
        found = f"{width} x {height} pixels, but {image.width} x {image.height} in the annotations"
        raise UserError(f"data.source: {name} has {found}")


def targets_of(
    classes: Sequence[int], masks: np.ndarray, config: SoloV2Config, *, positives: int, instances: int
) -> tuple[InstanceTargets, np.float32]:
    """Compute the targets of the largest instances that there is room for, and count those that there is none for.

    Instances without a pixel are not in the image. Where two share a cell, the smaller has it.

    Args:
        classes: category of each instance.
        masks: (I, H, W) bool.
        config: the network's.
        positives, instances: the room.
    """
    sizes = masks.sum(axis=(1, 2))
    order = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    masks, ordered = masks[order], np.asarray(classes, np.int32)[order]
    grids: dict[str, Any] = {"grids": config.grids, "scale_ranges": config.scale_ranges}

    def cells(count: int) -> int:
        return len(positive_cells(ordered[:count], masks[:count], **grids).cells)

    kept = min(len(order), instances)
    if cells(kept) > positives:  # fewer instances never have more cells
        kept = bisect.bisect_right(range(kept), positives, key=cells) - 1
    found = instance_targets(ordered[:kept], masks[:kept], **grids, positives=positives, instances=instances)
    return found, np.float32(len(order) - kept)
