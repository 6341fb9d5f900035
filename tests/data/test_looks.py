"""Looks of the embedded images: what they do to colours and edges, and that captions and keys stay."""

from __future__ import annotations

import numpy as np
import pytest

from hypersd_jax.config import DataConfig
from hypersd_jax.data.emoji_source import EmojiSource
from hypersd_jax.data.looks import LOOKS, PAPER, SHADE, mosaic, sepia
from hypersd_jax.data.opening import open_source
from hypersd_jax.errors import UserError


def test_sepia_keeps_brightness_alone() -> None:
    image = np.asarray([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 130, 0]]], np.uint8)
    found = sepia(image)
    np.testing.assert_array_equal(found[0, :2], [SHADE, PAPER])
    # Red and this green are equally bright.
    np.testing.assert_array_equal(found[0, 2], found[0, 3])
    np.testing.assert_array_equal(found[0, 2], np.round(SHADE + 0.299 * (PAPER - SHADE)))


@pytest.mark.parametrize("side", [64, 40, 16, 8])
def test_a_mosaic_has_tiles_of_their_mean_colours(side: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    found = mosaic(image)
    assert len(np.unique(found.reshape(-1, 3), axis=0)) <= min(side, 16) ** 2
    assert np.abs(found.mean((0, 1)) - image.mean((0, 1))).max() < 0.5
    if side % 16 == 0:
        blocks = image.reshape(16, side // 16, 16, side // 16, 3).mean((1, 3))
        wanted = np.round(blocks).astype(np.uint8).repeat(side // 16, 0).repeat(side // 16, 1)
        np.testing.assert_array_equal(found, wanted)


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
