from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hypersd_jax.evaluation import image_grid, read_strip, strip
from hypersd_jax.evaluation.grid import GAP, MOST_CELL, PAPER, TEXT_WIDTH
from hypersd_jax.evaluation.lettering import BOX, MORE, drawable, fitted_lines, font_for


def test_small_images_are_doubled_and_laid_out_in_rows() -> None:
    columns = {"teacher": np.zeros((3, 64, 64, 3)), "student": np.full((3, 64, 64, 3), 255, np.uint8)}
    grid = image_grid(columns, ["one", "two", "three"])
    assert grid.width == TEXT_WIDTH + 2 * (128 + GAP) + 2 * GAP
    header = grid.height - 3 * (128 + GAP) - GAP
    assert header > 0
    for row in range(3):
        top = GAP + header + row * (128 + GAP)
        box = (TEXT_WIDTH + GAP, top, TEXT_WIDTH + GAP + 128, top + 128)
        assert np.asarray(grid.crop(box)).max() == 0
    assert grid.getpixel((grid.width - 1, grid.height - 1)) == PAPER


def test_large_images_keep_their_size() -> None:
    grid = image_grid({"a": np.zeros((1, 256, 192, 3))}, ["x"])
    assert grid.width == TEXT_WIDTH + 192 + GAP + 2 * GAP


def test_prompts_are_wrapped_into_their_column() -> None:
    prompt = "a very long prompt about a smiling cat face, fluent gradient style, purple background"
    pixels = np.asarray(image_grid({"a": np.full((1, 64, 64, 3), 1.0)}, [prompt]).convert("L"))
    written = np.flatnonzero((pixels[-130:] < 200).any(axis=0))
    assert written.min() >= GAP - 1
    assert written.max() <= TEXT_WIDTH + 2
    assert len(np.flatnonzero(np.diff((pixels[-130:, :TEXT_WIDTH] < 200).any(axis=1).astype(int)) == 1)) >= 3


def test_columns_must_match_the_prompts() -> None:
    with pytest.raises(ValueError, match="'b'"):
        image_grid({"a": np.zeros((2, 8, 8, 3)), "b": np.zeros((1, 8, 8, 3))}, ["x", "y"])
    with pytest.raises(ValueError, match="a column and a prompt"):
        image_grid({}, ["x"])


def test_very_large_images_are_made_smaller() -> None:
    grid = image_grid({"a": np.zeros((1, 1024, 768, 3))}, ["x"])
    assert grid.width == TEXT_WIDTH + MOST_CELL * 3 // 4 + GAP + 2 * GAP


def test_prompts_without_spaces_are_wrapped_and_long_ones_cut() -> None:
    font = font_for("a", 14)
    lines = fitted_lines("\N{CJK UNIFIED IDEOGRAPH-732B}" * 40 + "x" * 60, font, 100, 5)
    assert len(lines) == 5
    assert lines[-1].endswith(MORE)
    assert all(font.getlength(line) <= 100 for line in lines)
    assert fitted_lines("one two", font, 500, 3) == ["one two"]
    assert fitted_lines("", font, 500, 3) == [""]


def test_letters_that_no_font_has_are_boxes() -> None:
    private = "\U0010fffd"
    assert drawable(f"a {private} cat\u200d\n $5_x\ufe0f") == f"a {BOX} cat $5_x"
    known = "Caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{CYRILLIC SMALL LETTER ZHE} \N{ARABIC LETTER SEEN}"
    assert drawable(known) == known


@pytest.mark.parametrize("side", [16, 128, 200])
def test_a_strip_shows_its_prompts_and_gives_its_images_back(side: int, tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((3, side, side, 3))
    prompts = [
        "a <b>red</b> square",
        "long " * 90,
        "\N{ARABIC LETTER SEEN}\N{ARABIC LETTER ALEF} $x_1$ \N{GRINNING FACE}",
    ]
    sheet, info = strip([images], prompts)
    sheet.save(tmp_path / "strip.png", pnginfo=info)
    found = read_strip(tmp_path / "strip.png")
    assert [sample.prompt for sample in found] == prompts
    for sample, image in zip(found, images, strict=True):
        np.testing.assert_array_equal(np.asarray(sample.image), np.round(image * 255))
    shown = sheet.width // 3
    assert shown >= 128
    above = np.asarray(sheet.convert("L"))[: sheet.height - shown]
    for column in range(3):
        assert above[:, column * shown : (column + 1) * shown].min() < 128, "no prompt above the image"


def test_a_strip_without_prompts_is_the_images_alone(tmp_path: Path) -> None:
    rows = [np.zeros((2, 128, 128, 3)), np.ones((2, 128, 128, 3))]
    sheet, info = strip(rows, [])
    assert sheet.size == (256, 256)
    sheet.save(tmp_path / "strip.png", pnginfo=info)
    (whole,) = read_strip(tmp_path / "strip.png")
    assert whole.image.size == (256, 256)
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    assert read_strip(tmp_path / "other.png")[0].prompt == ""
