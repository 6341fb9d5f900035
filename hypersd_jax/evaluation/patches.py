"""The middles of images, for metrics of what is fine in them."""

from __future__ import annotations

import numpy as np

from hypersd_jax.evaluation.samples import image_features

PATCH = 0.5
"""Sides of a patch, as a share of the image's."""


def patch_features(images: np.ndarray) -> np.ndarray:
    """Features (N, 1280) of the middles of uint8 images (N, H, W, 3), enlarged to what the network takes."""
    height, width = images.shape[1:3]
    rows, columns = round(PATCH * height), round(PATCH * width)
    top, left = (height - rows) // 2, (width - columns) // 2
    return image_features(images[:, top : top + rows, left : left + columns])
