"""From an image's own size to the size that a network reads."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from hypersd_jax.data.fitting import fit_image, fit_mask


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
    assert (pixels.dtype, sizes.dtype) == (np.uint8, np.float32)
    whole = np.asarray(ramp(12, 20), np.float32)
    if flip:
        whole = whole[:, ::-1]
    np.testing.assert_array_equal(pixels, whole[top : top + 12, left : left + 12])


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


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("corner", [None, (0.9, 0.1), (0.2, 0.95)])
@pytest.mark.parametrize(("size", "annotated"), [((40, 61), (40, 61)), ((40, 61), (80, 122)), ((13, 8), (13, 8))])
def test_a_mask_lies_where_the_image_has_it(
    size: tuple[int, int], annotated: tuple[int, int], corner: tuple[float, float] | None, flip: bool
) -> None:
    """An image that is white where its mask is, scaled down or up; at the image's size, and at twice that."""
    random = np.random.default_rng(0)
    mask = np.zeros(size, bool)
    for _ in range(3):
        top, left = (int(random.integers(0, side - 4)) for side in size)
        mask[top : top + size[0] // 3, left : left + size[1] // 3] = True
    image = Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).convert("RGB")
    pixels, sizes = fit_image(image, (24, 24), corner, flip=flip)
    scale = annotated[0] // size[0]
    whole = mask.repeat(scale, axis=0).repeat(scale, axis=1)
    found = fit_mask(whole, sizes, (24, 24), flip=flip)
    assert found.dtype == bool
    assert 0 < found.mean() < 1
    # They may differ along the edges, where the image has greys.
    assert np.mean(found != (pixels[..., 0] > 127)) < 0.03
    assert np.mean(fit_mask(whole, sizes, (24, 24), flip=not flip) != (pixels[..., 0] > 127)) > 0.1
    twice = fit_mask(whole, sizes, (48, 48), flip=flip)
    assert np.mean(twice != (pixels[..., 0] > 127).repeat(2, axis=0).repeat(2, axis=1)) < 0.06
