from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from hypersd_jax.evaluation import features
from hypersd_jax.evaluation.lite0 import FEATURES, fitted, load_lite0

# Two images and their features by the PyTorch implementation with its own float32 weights, resized by Pillow.
GOLDEN = Path(__file__).parents[1] / "data_files" / "lite0_features.npz"


def test_features_are_those_of_the_original() -> None:
    with np.load(GOLDEN) as golden:
        images, expected = golden["images"], golden["features"]
    found = features(images, batch_size=2)
    assert found.shape == (2, FEATURES)
    # What storing the folded kernels as float16 costs.
    error = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() < 6e-3


def test_batches_are_filled_up_and_float_images_are_0_to_1() -> None:
    with np.load(GOLDEN) as golden:
        images = np.concatenate([golden["images"], golden["images"][:1]])
    found = features(images, batch_size=2)
    assert found.shape == (3, FEATURES)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(features(images / 255.0, batch_size=2), found, rtol=1e-4, atol=1e-4)
    assert features(images[:0]).shape == (0, FEATURES)


@pytest.mark.parametrize(("size", "target"), [(64, 128), (128, 128), (256, 224)])
def test_images_are_brought_to_the_networks_size_as_pillow_does(size: int, target: int) -> None:
    image = np.random.default_rng(0).uniform(20, 235, size=(size, size, 3)).astype(np.float32)
    channels = [Image.fromarray(image[..., c]).resize((target, target), Image.Resampling.BICUBIC) for c in range(3)]
    expected = np.clip(np.stack([np.asarray(channel) for channel in channels], axis=-1), 0, 255)
    found = np.asarray(fitted(jnp.asarray(image)[None]))[0]
    np.testing.assert_allclose(found, expected, atol=1e-2)


def test_weights_are_the_trunk_alone() -> None:
    params = load_lite0()
    assert params["head.kernel"].shape == (1, 1, 320, FEATURES)
    assert all(value.dtype == np.float32 for value in params.values())


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(N, H, W, 3\)"):
        features(np.zeros((2, 64, 64), np.uint8))
