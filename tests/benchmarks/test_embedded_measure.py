"""What benchmarks/embedded/measure.py adds: the background that a caption names, and how far the corners are off."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.embedded.measure import background_errors, named_background
from hypersd_jax.data import COLOURS, evaluation_list


def test_captions_name_their_background() -> None:
    for item in evaluation_list(60):
        assert named_background(item.prompt) == item.background


def test_backgrounds_are_off_by_the_corners_difference() -> None:
    prompts = ["key, noto style, red background", "key, noto style", "key, noto style, black background"]
    images = np.zeros((3, 16, 16, 3), np.uint8)
    images[:] = np.asarray([COLOURS[name] for name in ("red", "white", "black")])[:, None, None]
    images[:, 4:12, 4:12] = 77  # what is in the middle does not count
    assert background_errors(images, prompts).tolist() == [0.0, 0.0, 0.0]
    images[0, :, :, 0] += 6  # one channel of three
    images[1, :8, :8] = 0  # an image that fills one corner
    assert background_errors(images, prompts) == pytest.approx([2.0, 0.0, 0.0])
    assert background_errors(images, prompts[::-1])[0] > 80
