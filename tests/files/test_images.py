from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from hypersd_jax.files import image_size, read_image, read_mask


def encoded(image: Image.Image, form: str, **options: object) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    buffer.seek(0)
    return buffer


def pixel(file: io.BytesIO) -> tuple[int, ...]:
    image = read_image(file)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


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
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    read = read_image(encoded(image, "PNG", transparency=0))
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
    read = read_image(file)
    np.testing.assert_array_equal(np.asarray(read), np.asarray(upright))
    file.seek(0)
    assert image_size(file) == (2, 4)


def test_sizes_come_from_headers_alone() -> None:
    for form in ("PNG", "JPEG", "WEBP"):
        data = encoded(
            Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 30, 3), np.uint8)), form
        ).getvalue()
        cut = io.BytesIO(data[: len(data) // 2])
        if form != "WEBP":  # Pillow wants all of such a file
            assert image_size(cut) == (50, 30)
        cut.seek(0)
        with pytest.raises(OSError, match=r"truncated|cannot|decode"):
            read_image(cut)


def test_animations_show_their_first_frame() -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    assert pixel(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])) == (255, 0, 0)


@pytest.mark.parametrize("cut", [0, 10, 60, -30])
def test_broken_files_are_errors(cut: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    data = encoded(Image.fromarray(noise), "PNG").getvalue()
    with pytest.raises(Exception, match=r"\w"):
        read_image(io.BytesIO(data[:cut]))


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="floating-point"):
        read_image(encoded(Image.new("F", (2, 2), 0.5), "TIFF"))


def profile(name: str = "sRGB", swap: tuple[bytes, bytes] | None = None) -> bytes:
    """A profile of Pillow's, with two of its tags exchanged in the table."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile(name)).tobytes())
    if swap:
        first, second = (data.index(tag, 128) for tag in swap)
        data[first : first + 4], data[second : second + 4] = swap[1], swap[0]
    return bytes(data)


SWAPPED = profile(swap=(b"rXYZ", b"bXYZ"))


@pytest.mark.parametrize(
    ("form", "mode"),
    [
        *((form, mode) for form in ("PNG", "TIFF") for mode in ("RGB", "RGBA", "P", "I;16")),
        *(("WEBP", mode) for mode in ("RGB", "RGBA")),
        ("JPEG", "RGB"),
    ],
)
def test_a_profile_decides_the_colours(form: str, mode: str) -> None:
    """Red and blue change places; grey pixels, which the profile does not fit, stay as they are."""
    if mode == "I;16":
        image, expected = Image.new(mode, (16, 16), 0x8080), (128, 128, 128)
    else:
        image, expected = Image.new("RGB", (16, 16), (255, 0, 51)).convert(mode), (51, 0, 255)
    options = {"lossless": True} if form == "WEBP" else {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    found = pixel(encoded(image, form, icc_profile=SWAPPED, **options))
    np.testing.assert_allclose(found, expected, atol=6 if form == "JPEG" else 2)


def test_srgb_images_keep_their_pixels_and_damaged_profiles_are_left_out() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    for given in (profile(), profile()[:200], b"no profile"):
        read = read_image(encoded(noise, "PNG", icc_profile=given))
        np.testing.assert_array_equal(np.asarray(read), np.asarray(noise))


def test_an_image_in_memory_is_read_as_its_file_is() -> None:
    stored = Image.new("RGBA", (4, 2), (250, 20, 40, 255))
    stored.putpixel((0, 0), (9, 9, 9, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = encoded(stored, "PNG", icc_profile=SWAPPED, exif=exif)
    expected = np.asarray(read_image(file))
    file.seek(0)
    with Image.open(file) as image:
        np.testing.assert_array_equal(np.asarray(read_image(image)), expected)
        np.testing.assert_array_equal(np.asarray(read_image(image)), expected)  # decoded by now
    assert expected.shape == (4, 2, 3)
    assert expected[0, 1].tolist() == [255, 255, 255]
    np.testing.assert_allclose(expected[1, 1], (40, 20, 250), atol=2)


def png(pixels: np.ndarray, kind: int, bits: int, **chunks: bytes) -> io.BytesIO:
    """A PNG by hand, of kinds that Pillow does not write: pixels (H, W) or (H, W, C) of `bits` each."""
    if bits == 16:
        lines = [line.astype(">u2").tobytes() for line in pixels]
    else:
        spread = np.unpackbits(pixels.astype(np.uint8)[..., None], axis=-1)[..., -bits:]
        lines = [np.packbits(line.reshape(-1)).tobytes() for line in spread]
    parts = {
        "IHDR": struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], bits, kind, 0, 0, 0),
        **chunks,
        "IDAT": zlib.compress(b"".join(b"\0" + line for line in lines)),
        "IEND": b"",
    }
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in parts.items():
        whole = name.encode() + body
        data += struct.pack(">I", len(body)) + whole + struct.pack(">I", zlib.crc32(whole))
    return io.BytesIO(data)


def test_16_bit_colours_are_rounded_and_their_transparent_one_is_exact() -> None:
    colours = np.asarray([[[0x1234, 0, 0xFFFF], [0x12FF, 0, 0xFFFF], [0x80FF, 0x7F80, 0]]])
    read = np.asarray(read_image(png(colours, 2, 16, tRNS=struct.pack(">HHH", 0x1234, 0, 0xFFFF))))
    assert read.tolist() == [[[255, 255, 255], [19, 0, 255], [128, 127, 0]]]
    opaque = np.asarray(read_image(png(colours, 2, 16)))
    assert opaque[0, 0].tolist() == [18, 0, 255]
    with_alpha = np.concatenate([colours, [[[0xFFFF], [0], [0x8080]]]], axis=-1)
    assert np.asarray(read_image(png(with_alpha, 6, 16)))[0].tolist() == [
        [18, 0, 255],
        [255, 255, 255],
        [191, 191, 127],
    ]


@pytest.mark.parametrize(("bits", "clear"), [(1, 1), (2, 2), (4, 9), (8, 200), (16, 40000)])
def test_the_transparent_grey_of_any_depth(bits: int, clear: int) -> None:
    most = 2**bits - 1
    pixels = np.asarray([[0, clear]])
    read = np.asarray(read_image(png(pixels, 0, bits, tRNS=struct.pack(">H", clear))))
    assert read[0, :, 0].tolist() == [0, 255]
    opaque = np.asarray(read_image(png(pixels, 0, bits)))
    assert opaque[0, :, 0].tolist() == [0, round(255 * clear / most)]


def test_a_mask_is_luminance_times_opacity() -> None:
    layer = Image.new("RGBA", (4, 1), (255, 255, 255, 0))  # white, but nothing of it is there
    for place, colour in enumerate([(255, 255, 255, 255), (255, 255, 255, 128), (0, 0, 0, 255)]):
        layer.putpixel((place, 0), colour)
    assert np.asarray(read_mask(encoded(layer, "PNG")))[0].tolist() == [255, 128, 0, 0]
    assert np.asarray(read_mask(encoded(Image.new("I;16", (1, 1), 0x8080), "PNG"))).tolist() == [[128]]
    assert np.asarray(read_mask(encoded(layer.convert("LA"), "PNG")))[0].tolist() == [255, 128, 0, 0]


def test_integers_of_32_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="32-bit"):
        read_image(encoded(Image.new("I", (2, 2), 1 << 20), "TIFF"))
