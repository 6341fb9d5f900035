"""How the images that a call is given become arrays."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image, ImageCms

from hypersd_jax.errors import UserError
from hypersd_jax.pipeline import image_inputs

SIDE = 16
IMAGES = np.random.default_rng(0).random((3, SIDE, SIDE, 3)).astype(np.float32)


def test_paths_images_and_arrays_are_the_same(tmp_path: Path) -> None:
    values = np.round(255 * IMAGES[0]).astype(np.uint8)
    image, size = Image.fromarray(values), (SIDE, SIDE)
    image.save(tmp_path / "a.png")
    expected = values[None].astype(np.float32) / 255
    for given in (image, tmp_path / "a.png", str(tmp_path / "a.png"), [image], expected, expected[0], [expected[0]]):
        np.testing.assert_array_equal(image_inputs.read_images("image", given, size), expected)
    np.testing.assert_array_equal(image_inputs.read_images("image", jax.numpy.asarray(expected), size), expected)
    np.testing.assert_array_equal(
        image_inputs.read_images("image", [image, image], size), np.repeat(expected, 2, axis=0)
    )


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    image = Image.fromarray(np.round(255 * IMAGES[0, :, :10]).astype(np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "a.png", exif=exif)
    assert image_inputs.image_size("image", tmp_path / "a.png", 2) == (10, 16)
    found = image_inputs.read_images("image", tmp_path / "a.png", (10, 16))[0]
    np.testing.assert_array_equal(found, np.rot90(np.asarray(image, np.float32) / 255, -1))


def test_masks_are_black_and_white() -> None:
    grey = np.array([[0.0, 0.49], [0.5, 1.0]], np.float32)
    expected = np.array([[0, 0], [1, 1]], np.float32)[None, :, :, None]
    for given in (grey, grey[None], grey[..., None], grey[None, :, :, None], [grey]):
        np.testing.assert_array_equal(image_inputs.read_masks("mask", given, (2, 2)), expected)
    image = Image.fromarray(np.array([[0, 127], [128, 255]], np.uint8))
    np.testing.assert_array_equal(image_inputs.read_masks("mask", image, (2, 2)), expected)
    np.testing.assert_array_equal(image_inputs.read_masks("mask", image.convert("RGB"), (2, 2)), expected)
    two = np.stack([grey, grey.T])
    assert image_inputs.read_masks("mask", two, (2, 2)).shape == (2, 2, 2, 1)


def test_pixels_of_unknown_range_are_refused() -> None:
    for name, read in (("image", image_inputs.read_images), ("mask", image_inputs.read_masks)):
        with pytest.raises(UserError, match=f"{name}: cannot be read as an image \\(floating-point pixels\\)"):
            read(name, Image.new("F", (2, 2)), (2, 2))


@pytest.mark.parametrize("as_file", [True, False])
def test_images_are_read_as_viewers_show_them(as_file: bool, tmp_path: Path) -> None:
    """Whichever argument they are given for, from a file or from memory: see tests/files/test_images.py."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = profile.index(b"rXYZ", 128), profile.index(b"bXYZ", 128)
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    cases = [
        (Image.new("I;16", (2, 2), 0x8080), {}, (128, 128, 128)),
        (Image.new("RGBA", (2, 2), (10, 200, 30, 0)), {}, (255, 255, 255)),
        (Image.new("RGB", (2, 2), (255, 0, 51)), {"icc_profile": bytes(profile)}, (51, 0, 255)),
    ]
    for number, (image, options, expected) in enumerate(cases):
        path = tmp_path / f"{number}.png"
        image.save(path, **options)
        found = image_inputs.read_images("control_image", path if as_file else Image.open(path), (2, 2))
        np.testing.assert_allclose(255 * found, np.broadcast_to(expected, found.shape), atol=2)


@pytest.mark.parametrize("as_file", [True, False])
def test_a_mask_painted_on_a_transparent_layer_repaints_what_is_painted(as_file: bool, tmp_path: Path) -> None:
    layer = Image.new("RGBA", (4, 4), (255, 255, 255, 0))
    layer.paste((255, 255, 255, 255), (0, 0, 2, 4))
    layer.save(tmp_path / "mask.png")
    found = image_inputs.read_masks("mask", tmp_path / "mask.png" if as_file else layer, (8, 8))
    np.testing.assert_array_equal(found[0, :, :, 0], np.repeat([[1, 1, 1, 1, 0, 0, 0, 0]], 8, axis=0))
    Image.new("I;16", (4, 4), 0x4000).save(tmp_path / "grey.png")
    assert not image_inputs.read_masks("mask", tmp_path / "grey.png", (4, 4)).any()


def test_the_home_folder_in_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (2, 2), (255, 0, 51)).save(tmp_path / "a.png")
    assert image_inputs.image_size("image", "~/a.png", 1) == (2, 2)
    np.testing.assert_allclose(
        255 * image_inputs.read_images("image", "~/a.png", (2, 2))[0, 0, 0], (255, 0, 51), atol=1e-3
    )
