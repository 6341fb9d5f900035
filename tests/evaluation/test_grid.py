from __future__ import annotations

import numpy as np
import pytest

from hypersd_jax.evaluation import picture_grid
from hypersd_jax.evaluation.grid import GAP, PAPER, TEXT_WIDTH


def test_small_pictures_are_doubled_and_laid_out_in_rows() -> None:
    columns = {"teacher": np.zeros((3, 64, 64, 3)), "student": np.full((3, 64, 64, 3), 255, np.uint8)}
    grid = picture_grid(columns, ["one", "two", "three"])
    assert grid.width == TEXT_WIDTH + 2 * (128 + GAP) + 2 * GAP
    header = grid.height - 3 * (128 + GAP) - GAP
    assert header > 0
    for row in range(3):
        top = GAP + header + row * (128 + GAP)
        box = (TEXT_WIDTH + GAP, top, TEXT_WIDTH + GAP + 128, top + 128)
        assert np.asarray(grid.crop(box)).max() == 0
    assert grid.getpixel((grid.width - 1, grid.height - 1)) == PAPER


def test_large_pictures_keep_their_size() -> None:
    grid = picture_grid({"a": np.zeros((1, 256, 192, 3))}, ["x"])
    assert grid.width == TEXT_WIDTH + 192 + GAP + 2 * GAP


def test_prompts_are_wrapped_into_their_column() -> None:
    prompt = "a very long prompt about a smiling cat face, fluent gradient style, purple background"
    pixels = np.asarray(picture_grid({"a": np.full((1, 64, 64, 3), 1.0)}, [prompt]).convert("L"))
    written = np.flatnonzero((pixels[-130:] < 200).any(axis=0))
    assert written.min() >= GAP - 1
    assert written.max() <= TEXT_WIDTH + 2
    assert len(np.flatnonzero(np.diff((pixels[-130:, :TEXT_WIDTH] < 200).any(axis=1).astype(int)) == 1)) >= 3


def test_columns_must_match_the_prompts() -> None:
    with pytest.raises(ValueError, match="'b'"):
        picture_grid({"a": np.zeros((2, 8, 8, 3)), "b": np.zeros((1, 8, 8, 3))}, ["x", "y"])
    with pytest.raises(ValueError, match="a column and a prompt"):
        picture_grid({}, ["x"])
