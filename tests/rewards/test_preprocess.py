"""Preparing images for CLIP: against Pillow, for floats and for 8 bits, and with gradients."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from hypersd_jax.errors import UserError
from hypersd_jax.rewards.preprocess import MEAN, STD, ImageSteps, pad, preprocess, resize_weights, torchvision_crop

SHAPES = [(64, 64), (45, 80), (83, 37), (24, 24), (9, 11), (24, 61)]
STEPS = ImageSteps(size=24)
PLAIN = ImageSteps(size=24, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def _random_image(height, width):
    """Smooth colours, hard edges and noise, (1, H, W, 3) uint8."""
    rng = np.random.default_rng([height, width])
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 255 / width, y * 255 / height, 255.0 * ((x // 5 + y // 7) % 2)], axis=-1)
    return np.clip(base + rng.normal(0, 12, base.shape), 0, 255).astype(np.uint8)[None]


def _pillow(image, size):
    """Pillow's resizing of each channel in mode F, and the centre crop; (S, S, 3) in 0..1."""
    height, width = image.shape[:2]
    short = min(height, width)
    to = (int(size * width / short), int(size * height / short))
    channels = [
        np.asarray(Image.fromarray(image[..., c].astype(np.float32)).resize(to, Image.Resampling.BICUBIC))
        for c in range(3)
    ]
    top, left = (to[1] - size) // 2, (to[0] - size) // 2
    return np.stack(channels, axis=-1)[top : top + size, left : left + size] / 255


@pytest.mark.parametrize("shape", SHAPES)
def test_floats_as_pillow_resizes_them(shape):
    image = _random_image(*shape)
    ours = preprocess(jnp.asarray(image), PLAIN)
    assert (ours.shape, ours.dtype) == ((1, 24, 24, 3), jnp.float32)
    np.testing.assert_allclose(ours[0], _pillow(image[0], 24), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_eight_bits_change(shape):
    """Pillow on bytes is our weights with rounding and a cut at 0 and 255 after each pass: all that we leave out."""
    image = _random_image(*shape)[0]
    to = tuple(int(24 * side / min(shape)) for side in shape)
    theirs = np.asarray(Image.fromarray(image).resize(to[::-1], Image.Resampling.BICUBIC), np.float64)
    passes = [
        ("yh,hwc->ywc", resize_weights(shape[0], to[0])),
        ("xw,hwc->hxc", resize_weights(shape[1], to[1])),
    ]
    apart = []
    for order in (passes, passes[::-1]):  # which side comes first depends on the sizes
        found = image.astype(np.float64)
        for spec, weights in order:
            found = np.clip(np.round(np.einsum(spec, weights, found)), 0, 255)
        apart.append(np.abs(found - theirs).max())
    assert min(apart) <= 1.0
    top, left = (to[0] - 24) // 2, (to[1] - 24) // 2
    ours = np.asarray(preprocess(jnp.asarray(image)[None], PLAIN))[0]
    assert np.median(np.abs(ours - theirs[top : top + 24, left : left + 24] / 255)) < 0.6 / 255


@pytest.mark.parametrize(("shape", "apart"), [((24, 27), 1), ((24, 25), 0), ((24, 61), 0), ((31, 24), 1)])
def test_where_torchvision_crops(shape, apart):
    """Margins of 3, 1, 37 and 7 pixels: half of it, rounded to even by torchvision and down by transformers."""
    image = np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape, 1).repeat(3, -1) / 1000
    seen = preprocess(jnp.asarray(image), dataclasses.replace(PLAIN, fit=torchvision_crop))[0, 0, 0, 0]
    step = 1 if shape[1] > 24 else shape[1]
    np.testing.assert_allclose(seen - preprocess(jnp.asarray(image), PLAIN)[0, 0, 0, 0], apart * step / 1000, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_padding_as_pillow_resizes(shape):
    """The longest side fits, and what is left is black on both sides, one pixel more of it behind the image."""
    image = _random_image(*shape)
    ours = np.asarray(preprocess(jnp.asarray(image), dataclasses.replace(PLAIN, fit=pad)))[0]
    rows, columns = (max(round(side * (24 / max(shape))), 1) for side in shape)
    channels = [Image.fromarray(image[0, ..., c].astype(np.float32)) for c in range(3)]
    small = [np.asarray(channel.resize((columns, rows), Image.Resampling.BICUBIC)) / 255 for channel in channels]
    wanted = np.zeros((24, 24, 3))
    top, left = (24 - rows) // 2, (24 - columns) // 2
    wanted[top : top + rows, left : left + columns] = np.stack(small, axis=-1)
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5)


def test_bytes_are_floats_times_255():
    image = _random_image(45, 80)
    floats = jnp.asarray(image, jnp.float32) / 255
    np.testing.assert_allclose(preprocess(jnp.asarray(image), STEPS), preprocess(floats, STEPS), rtol=0, atol=1e-6)


def test_an_image_of_the_right_size_is_only_normalised():
    image = _random_image(24, 24)
    wanted = (image / 255 - np.asarray(MEAN)) / np.asarray(STD)
    np.testing.assert_allclose(preprocess(jnp.asarray(image), STEPS), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("length", "resized"), [(64, 24), (7, 24), (100, 3), (5, 5), (1, 4)])
def test_weights_add_up(length, resized):
    weights = resize_weights(length, resized)
    assert weights.shape == (resized, length)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-12)


def test_gradients_pass():
    """By a linear function a finite difference of any size is exact; what is cropped away has no part in it."""
    image = jnp.asarray(_random_image(30, 60), jnp.float32) / 255
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.standard_normal((1, 24, 24, 3)), jnp.float32)
    direction = jnp.asarray(rng.standard_normal(image.shape), jnp.float32)

    def value(x):
        return jnp.sum(weights * preprocess(x, STEPS))

    gradient = jax.jit(jax.grad(value))(image)
    slope = (value(image + 0.5 * direction) - value(image - 0.5 * direction)) / 1.0
    np.testing.assert_allclose(jnp.sum(gradient * direction), slope, rtol=1e-4)
    assert float(jnp.abs(gradient[:, :, 20:40]).min()) > 0.0
    assert float(jnp.abs(gradient[:, :, :8]).max()) == 0.0


@pytest.mark.parametrize(("shape", "dtype"), [((24, 24, 3), np.uint8), ((1, 24, 24, 4), np.uint8)])
def test_other_shapes(shape, dtype):
    with pytest.raises(ValueError, match=r"images must be \(B, H, W, 3\)"):
        preprocess(jnp.zeros(shape, dtype), STEPS)


def test_other_types():
    with pytest.raises(ValueError, match="images must be uint8 or floats, not int32"):
        preprocess(jnp.zeros((1, 24, 24, 3), jnp.int32), STEPS)


def test_configurations_of_old_and_new():
    assert ImageSteps.from_dict({}, 224) == ImageSteps()
    assert ImageSteps.from_dict({"size": 224, "crop_size": 224, "resample": 3, "do_resize": True}, 224) == ImageSteps()
    new = {
        "crop_size": {"height": 96, "width": 96},
        "size": {"shortest_edge": 96},
        "rescale_factor": 0.00392156862745098,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 1],
    }
    assert ImageSteps.from_dict(new, 96) == ImageSteps(size=96, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 1.0))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("do_center_crop", False),
        ("do_resize", None),
        ("resample", 2),
        ("size", 256),
        ("size", {"height": 224, "width": 224}),
        ("crop_size", {"height": 224, "width": 200}),
        ("rescale_factor", 1.0),
        ("image_mean", [0.5, 0.5]),
        ("image_mean", 0.5),
        ("image_std", [0.5, 0.5, 0.0]),
        ("image_std", [0.5, 0.5, float("nan")]),
        ("image_std", [0.5, 0.5, True]),
    ],
)
def test_what_is_not_done_is_refused(key, value):
    with pytest.raises(UserError, match=f"image processor config: {key}=.* is not supported"):
        ImageSteps.from_dict({key: value}, 224)
