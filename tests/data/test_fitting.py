"""From an image's own size to the size that a network reads."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from hypersd_jax.data.fitting import fit_image


def ramp(height: int, width: int) -> Image.Image:
    """Red tells the row, green the column."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([rows, columns, np.zeros_like(rows)], axis=-1).astype(np.uint8))


@pytest.mark.parametrize(
    ("corner", "flip", "top", "left"),
    [
        (None, False, 0, 4),
        ((0.0, 0.0), False, 0, 0),
        ((0.0, 0.999), False, 0, 8),
        ((0.3, 0.5), False, 0, 4),
        ((1.0, 1.0), True, 0, 8),
    ],
)
def test_the_crop_is_where_the_sizes_say(corner: tuple[float, float] | None, flip: bool, top: int, left: int) -> None:
    pixels, sizes = fit_image(ramp(12, 20), (12, 12), corner, flip=flip)
    np.testing.assert_array_equal(sizes, np.asarray([12, 20, top, left, 12, 12], np.float32))
    assert pixels.dtype == sizes.dtype == np.float32
    whole = np.asarray(ramp(12, 20), np.float32)
    if flip:
        whole = whole[:, ::-1]
    np.testing.assert_allclose((pixels + 1.0) * 127.5, whole[top : top + 12, left : left + 12], atol=1e-4)


@pytest.mark.parametrize(
    ("size", "target", "expected"),
    [
        ((40, 20), (8, 8), (40, 20, 4, 0, 8, 8)),
        ((20, 40), (8, 16), (20, 40, 0, 0, 8, 16)),
        ((5, 7), (16, 16), (5, 7, 0, 3, 16, 16)),
        ((101, 67), (8, 8), (101, 67, 2, 0, 8, 8)),
    ],
)
def test_sizes_of_scaled_images(size: tuple[int, int], target: tuple[int, int], expected: tuple[int, ...]) -> None:
    pixels, sizes = fit_image(ramp(*size), target)
    np.testing.assert_array_equal(sizes, np.asarray(expected, np.float32))
    assert pixels.shape == (*target, 3)
    assert np.abs(pixels).max() <= 1.0
