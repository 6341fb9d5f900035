"""Instance annotations of a dataset's images, in COCO's JSON format."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from hypersd_jax.data.listing import file_name
from hypersd_jax.data.masks import polygon_mask, run_length_mask, run_lengths
from hypersd_jax.errors import UserError, short
from hypersd_jax.weights.diffusers.component import read_json


class Instance(NamedTuple):
    """An instance of an image: its category, from 0, and its polygons (V, 2), or else its run lengths."""

    category: int
    polygons: tuple[np.ndarray, ...] = ()
    counts: np.ndarray | None = None

    def mask(self, height: int, width: int) -> np.ndarray:
        """Fill its mask (H, W) bool."""
        if self.counts is None:
            return polygon_mask(self.polygons, height, width)
        return run_length_mask(self.counts, height, width)


class AnnotatedImage(NamedTuple):
    """An image's size in pixels, and its instances."""

    height: int
    width: int
    instances: tuple[Instance, ...]


class Annotations(NamedTuple):
    """A file of annotations.

    Attributes:
        categories: how many there are.
        images: by file name, without folders.
        crowds: how many regions were left out, as they hold many instances (``iscrowd``).
    """

    categories: int
    images: Mapping[str, AnnotatedImage]
    crowds: int

    def image(self, name: str) -> AnnotatedImage | None:
        """Find an image by its file's name, whatever its folder; None where it is not listed."""
        return self.images.get(file_name(name))


@functools.cache
def read_annotations(path: str) -> Annotations:
    """Read COCO's ``instances_*.json`` once; categories are numbered by their ids' order.

    Raises:
        UserError: the file cannot be read, or one of its entries is not as the format has it.
    """
    try:
        return _annotations(read_json(path))
    except KeyError as error:
        raise UserError(f"{path}: is not in COCO's format: {error} is missing, or is no id that it lists") from None
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is not in COCO's format: {short(error)}") from None


def _annotations(content: Any) -> Annotations:
    ids = sorted(int(category["id"]) for category in content["categories"])
    numbers = {category: number for number, category in enumerate(ids)}
    sizes = {image["id"]: (int(image["height"]), int(image["width"])) for image in content["images"]}
    if any(side < 1 for size in sizes.values() for side in size):
        raise ValueError("an image's height or width is below 1")
    names = {image["id"]: file_name(str(image["file_name"])) for image in content["images"]}
    if (twice := Counter(names.values()).most_common(1)) and twice[0][1] > 1:
        raise ValueError(f"several images are called {twice[0][0]}")
    found: dict[Any, list[Instance]] = {image: [] for image in sizes}
    crowds = 0
    for entry in content["annotations"]:
        if entry.get("iscrowd"):
            crowds += 1
            continue
        image = entry["image_id"]
        found[image].append(_instance(numbers[entry["category_id"]], entry["segmentation"], sizes[image]))
    images = {names[image]: AnnotatedImage(*sizes[image], tuple(instances)) for image, instances in found.items()}
    return Annotations(len(numbers), images, crowds)


def _instance(category: int, segmentation: Any, size: tuple[int, int]) -> Instance:
    if isinstance(segmentation, list):
        polygons = tuple(np.asarray(polygon, np.float32).reshape(-1, 2) for polygon in segmentation)
        if not all(np.isfinite(polygon).all() for polygon in polygons):
            raise ValueError("a polygon's numbers are not finite")
        return Instance(category, polygons)
    given = segmentation["counts"]
    counts = np.asarray(run_lengths(given) if isinstance(given, str) else given, np.int64)
    if tuple(segmentation["size"]) != size or counts.ndim != 1 or counts.sum() != size[0] * size[1] or counts.min() < 0:
        raise ValueError(f"run lengths of {segmentation['size']} pixels in an image of {list(size)}")
    return Instance(category, counts=counts)
