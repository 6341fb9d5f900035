"""The middles of images, for metrics of what is fine in them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax.evaluation import samples
from hypersd_jax.evaluation.lite0 import FEATURES

PATCH = 0.5
"""Sides of a patch, as a share of the image's."""


def patch_features(images: np.ndarray) -> np.ndarray:
    """Features (N, 1280) of the middles of uint8 images (N, H, W, 3), each enlarged to the image's own size."""
    size = samples.SEEN_AT_A_TIME
    parts = [samples.image_features(enlarged_middles(images[at : at + size])) for at in range(0, len(images), size)]
    return np.concatenate([np.zeros((0, FEATURES), np.float32), *parts])


def enlarged_middles(images: np.ndarray) -> np.ndarray:
    """Cut the middles out of uint8 images (N, H, W, 3) and enlarge them, bicubic: float32 (N, H, W, 3) in 0..1."""
    height, width = images.shape[1:3]
    rows, columns = round(PATCH * height), round(PATCH * width)
    top, left = (height - rows) // 2, (width - columns) // 2
    middles = jnp.asarray(images[:, top : top + rows, left : left + columns], jnp.float32) / 255.0
    # Bicubic overshoots at edges; no image holds values outside 0..1.
    return np.asarray(jnp.clip(jax.image.resize(middles, images.shape, "cubic"), 0.0, 1.0))
