from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from hypersd_jax.data.pictures import fit_picture, picture_size, read_picture


def encoded(picture: Image.Image, form: str, **options: object) -> io.BytesIO:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    buffer.seek(0)
    return buffer


def pixel(file: io.BytesIO) -> tuple[int, ...]:
    picture = read_picture(file)
    assert picture.mode == "RGB"
    return picture.getpixel((0, 0))


@pytest.mark.parametrize(
    ("mode", "colour", "form", "expected"),
    [
        ("RGB", (10, 200, 30), "PNG", (10, 200, 30)),
        ("L", 90, "PNG", (90, 90, 90)),
        ("1", 1, "PNG", (255, 255, 255)),
        ("RGBA", (10, 200, 30, 0), "PNG", (255, 255, 255)),
        ("RGBA", (10, 200, 30, 255), "WEBP", (10, 200, 30)),
        ("RGBA", (0, 0, 0, 51), "PNG", (204, 204, 204)),
        ("LA", (0, 51), "PNG", (204, 204, 204)),
        ("CMYK", (255, 0, 255, 0), "TIFF", (0, 255, 0)),
        ("I;16", 0x8080, "PNG", (128, 128, 128)),
        ("I;16", 65535, "TIFF", (255, 255, 255)),
        ("I;16", 200, "PNG", (1, 1, 1)),
    ],
)
def test_every_kind_of_pixel_becomes_rgb(mode: str, colour: object, form: str, expected: tuple[int, ...]) -> None:
    lossless = {"lossless": True} if form == "WEBP" else {}
    assert pixel(encoded(Image.new(mode, (3, 2), colour), form, **lossless)) == expected


def test_cmyk_jpeg() -> None:
    """Such JPEGs hold inverted values, as Adobe's programs write them."""
    found = pixel(encoded(Image.new("CMYK", (16, 16), (255, 0, 255, 0)), "JPEG", quality=100))
    np.testing.assert_allclose(found, (0, 255, 0), atol=3)


def test_palette_with_a_transparent_entry() -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    read = read_picture(encoded(picture, "PNG", transparency=0))
    assert [read.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (0, 0, 255)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    """Whatever way the camera was held, the red corner comes out at the top left."""
    upright = Image.new("RGB", (4, 2), (0, 0, 255))
    upright.putpixel((0, 0), (255, 0, 0))
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(turns[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(stored, "PNG", exif=exif)
    read = read_picture(file)
    np.testing.assert_array_equal(np.asarray(read), np.asarray(upright))
    file.seek(0)
    assert picture_size(file) == (2, 4)


def test_sizes_come_from_headers_alone() -> None:
    for form in ("PNG", "JPEG", "WEBP"):
        data = encoded(
            Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 30, 3), np.uint8)), form
        ).getvalue()
        cut = io.BytesIO(data[: len(data) // 2])
        if form != "WEBP":  # Pillow wants all of such a file
            assert picture_size(cut) == (50, 30)
        cut.seek(0)
        with pytest.raises(OSError, match=r"truncated|cannot|decode"):
            read_picture(cut)


def test_animations_show_their_first_frame() -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    assert pixel(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])) == (255, 0, 0)


@pytest.mark.parametrize("cut", [0, 10, 60, -30])
def test_broken_files_are_errors(cut: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    data = encoded(Image.fromarray(noise), "PNG").getvalue()
    with pytest.raises(Exception, match=r"\w"):
        read_picture(io.BytesIO(data[:cut]))


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="floating-point"):
        read_picture(encoded(Image.new("F", (2, 2), 0.5), "TIFF"))


def ramp(height: int, width: int) -> Image.Image:
    """Red tells the row, green the column."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([rows, columns, np.zeros_like(rows)], axis=-1).astype(np.uint8))


@pytest.mark.parametrize(
    ("place", "flip", "top", "left"),
    [
        (None, False, 0, 4),
        ((0.0, 0.0), False, 0, 0),
        ((0.0, 0.999), False, 0, 8),
        ((0.3, 0.5), False, 0, 4),
        ((1.0, 1.0), True, 0, 8),
    ],
)
def test_the_crop_is_where_the_sizes_say(place: tuple[float, float] | None, flip: bool, top: int, left: int) -> None:
    pixels, sizes = fit_picture(ramp(12, 20), (12, 12), place, flip=flip)
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
def test_sizes_of_scaled_pictures(size: tuple[int, int], target: tuple[int, int], expected: tuple[int, ...]) -> None:
    pixels, sizes = fit_picture(ramp(*size), target)
    np.testing.assert_array_equal(sizes, np.asarray(expected, np.float32))
    assert pixels.shape == (*target, 3)
    assert np.abs(pixels).max() <= 1.0
