"""Looks of the embedded images: what they do to colours and edges, and that captions and keys stay."""

from __future__ import annotations

import numpy as np
import pytest

from hypersd_jax.config import DataConfig
from hypersd_jax.data.emoji_source import EmojiSource
from hypersd_jax.data.looks import LOOKS, PAPER, SHADE, lines, sepia
from hypersd_jax.data.opening import open_source
from hypersd_jax.errors import UserError


def test_sepia_keeps_brightness_alone() -> None:
    image = np.asarray([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 130, 0]]], np.uint8)
    found = sepia(image)
    np.testing.assert_array_equal(found[0, :2], [SHADE, PAPER])
    # Red and this green are equally bright.
    np.testing.assert_array_equal(found[0, 2], found[0, 3])
    np.testing.assert_array_equal(found[0, 2], np.round(SHADE + 0.299 * (PAPER - SHADE)))


def test_lines_are_where_colours_differ() -> None:
    image = np.full((6, 8, 3), 40, np.uint8)
    image[:, 4:] = (200, 40, 40)
    found = lines(image)
    np.testing.assert_array_equal(found[:, [0, 1, 2, 5, 6, 7]], np.broadcast_to(PAPER, (6, 6, 3)))
    np.testing.assert_array_equal(found[:, 3:5], np.broadcast_to(SHADE, (6, 2, 3)))


@pytest.mark.parametrize("look", LOOKS)
def test_a_source_with_a_look(look: str) -> None:
    positions = np.arange(4)
    plain, found = EmojiSource(seed=1), open_source(DataConfig(look=look), resolution=64, seed=1)
    before, after = plain.batch(positions), found.batch(positions)
    assert before.captions == after.captions
    np.testing.assert_array_equal(plain.keys(positions), found.keys(positions))
    np.testing.assert_array_equal(after.images, [LOOKS[look](image) for image in before.images])


def test_a_look_is_of_the_embedded_images(tmp_path) -> None:
    with pytest.raises(UserError, match=r"data\.look does not apply to data\.source="):
        open_source(DataConfig(source=str(tmp_path), look="sepia"), resolution=64, seed=0)
