"""COCO's polygons and run lengths, on examples made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from hypersd_jax.data.masks import polygon_mask, run_length_mask, run_lengths


def filled(*polygons: list[float], size: tuple[int, int] = (4, 5)) -> list[str]:
    """The mask as text, a line for each row."""
    mask = polygon_mask([np.reshape(np.float32(each), (-1, 2)) for each in polygons], *size)
    return ["".join(".#"[pixel] for pixel in row) for row in mask.astype(int)]


def test_a_rectangle_has_the_pixels_between_its_corners() -> None:
    assert filled([1, 1, 4, 1, 4, 3, 1, 3]) == [".....", ".###.", ".###.", "....."]
    # A pixel is in if its centre is: from column 1.5 to 3.5 these are 1's (on the edge), 2's, and not 3's.
    assert filled([1.5, 1, 3.5, 1, 3.5, 3, 1.5, 3]) == [".....", ".##..", ".##..", "....."]
    assert filled([-3, -2, 2, -2, 2, 9, -3, 9]) == ["##...", "##...", "##...", "##..."]


def test_a_triangle() -> None:
    """Its long side crosses the rows' centres at 0.7, 1.7, 2.7 and 3.7."""
    assert filled([0, -0.2, 4.2, 4, 0, 4], size=(4, 4)) == ["#...", "##..", "###.", "####"]


def test_parts_are_joined_and_a_loop_of_one_is_a_hole() -> None:
    assert filled([0, 0, 2, 0, 2, 2, 0, 2], [1, 1, 5, 1, 5, 2, 1, 2]) == ["##...", "#####", ".....", "....."]
    ring = [0, 0, 5, 0, 5, 4, 0, 4, 0, 0, 1, 1, 4, 1, 4, 3, 1, 3, 1, 1]
    assert filled(ring) == ["#####", "#...#", "#...#", "#####"]


def test_what_has_no_area_covers_nothing() -> None:
    assert filled([2, 2], [1, 1, 4, 3], []) == ["....."] * 4


def test_run_lengths_go_down_the_columns() -> None:
    """4 x 3 pixels: five outside, two inside, three outside, two inside."""
    mask = run_length_mask(np.asarray([5, 2, 3, 2]), 4, 3)
    assert mask.astype(int).tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1]]
    assert run_length_mask(np.asarray([0, 12]), 4, 3).all()


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("52", [5, 2]),
        # 31 needs a second character, as 16 would else be read as its sign: 31 = 0b11111 and 0 above it.
        ("o0", [31]),
        # The fourth is the difference to the second, here 2 - 2 = 0 and 1 - 2 = -1 (0b11111: its sign bit is set).
        ("5230", [5, 2, 3, 2]),
        ("523O", [5, 2, 3, 1]),
        # 1000 = 31 * 32 + 8: 0b01000 with more to come, then 0b11111 with more to come, then 0.
        ("Xo0", [1000]),
    ],
)
def test_compressed_run_lengths(text: str, counts: list[int]) -> None:
    assert run_lengths(text) == counts


def encoded(counts: list[int]) -> str:
    """The format written down a second time, the other way round."""
    text = ""
    for index, count in enumerate(counts):
        number = count - counts[index - 2] if index > 2 else count
        while True:
            low, number = number & 31, number >> 5
            done = number == (-1 if low & 16 else 0)
            text += chr(48 + low + (0 if done else 32))
            if done:
                break
    return text


def test_compressed_run_lengths_of_any_numbers() -> None:
    random = np.random.default_rng(0)
    for largest in (2, 40, 3000, 10**6):
        counts = random.integers(0, largest, 50).tolist()
        assert run_lengths(encoded(counts)) == counts


@pytest.mark.parametrize(("text", "line"), [("5 2", "' ' is not of compressed"), ("5o", "end within a number")])
def test_text_that_is_no_run_lengths(text: str, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        run_lengths(text)
