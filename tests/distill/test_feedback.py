"""The rewards' term of the loss: by hand, and its gradients against finite differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.distill import feedback_gradient, feedback_loss

SHAPE = (3, 2, 4, 3)


def brightness(images: jax.Array) -> jax.Array:
    return 10.0 * jnp.mean(images, axis=(1, 2, 3))


def contrast(images: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(images - 0.5), axis=(1, 2, 3))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).uniform(0.1, 0.9, SHAPE).astype(np.float32)


def test_the_hinge_by_hand(images: np.ndarray) -> None:
    scores = np.stack([10 * images.mean((1, 2, 3)), np.square(images - 0.5).mean((1, 2, 3))])
    margins = np.array([np.median(scores[0]) + 0.01, scores[1].min() - 1e-3], np.float32)
    found = feedback_gradient([brightness, contrast], images, margins, [2.0, 3.0], balanced=False)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-5)
    np.testing.assert_array_equal(found.below, scores < margins[:, None])
    assert found.below.sum(axis=1).tolist() == [2, 0]
    hinge = 2.0 * np.maximum(margins[0] - scores[0], 0).mean() + 3.0 * np.maximum(margins[1] - scores[1], 0).mean()
    assert float(found.hinge) == pytest.approx(hinge, rel=1e-5)
    # d/dx of 2 relu(m - 10 mean x), in the images below the margin; the second reward is above its margin throughout.
    wanted = np.where((scores[0] < margins[0])[:, None, None, None], -2.0 * 10.0 / images[0].size, 0.0)
    np.testing.assert_allclose(found.gradient, np.broadcast_to(wanted, SHAPE), rtol=1e-5)


def test_the_losss_derivative_by_finite_differences(images: np.ndarray) -> None:
    """Unbalanced, the surrogate's derivative is that of Eq. 13's mean over the batch."""
    margins, weights = [6.0, 0.2], [0.5, 4.0]

    def decoded(latents: jax.Array) -> jax.Array:
        return 0.5 + 0.4 * jnp.tanh(latents)

    def loss(latents: jax.Array) -> jax.Array:
        pixels = decoded(latents)
        return feedback_loss(
            pixels, feedback_gradient([brightness, contrast], pixels, margins, weights, balanced=False)
        )

    def by_hand(latents: np.ndarray) -> float:
        pixels = 0.5 + 0.4 * np.tanh(latents)
        first, second = 10 * pixels.mean((1, 2, 3)), np.square(pixels - 0.5).mean((1, 2, 3))
        return float(np.mean(0.5 * np.maximum(6.0 - first, 0) + 4.0 * np.maximum(0.2 - second, 0)))

    latents = np.random.default_rng(1).standard_normal(SHAPE)
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(latents, jnp.float32))
    assert float(value) == pytest.approx(by_hand(latents), rel=1e-5)
    for position in np.random.default_rng(2).integers(0, latents.size, 5):
        step = np.zeros(latents.size)
        step[position] = 1e-5
        step = step.reshape(SHAPE)
        slope = (by_hand(latents + step) - by_hand(latents - step)) / 2e-5
        assert float(gradient.reshape(-1)[position]) == pytest.approx(slope, rel=1e-3, abs=1e-7)


def test_balanced_rewards_count_as_their_weights(images: np.ndarray) -> None:
    """Whatever their units: each image's gradient has the norm weight / sqrt(H W 3) where it is below the margin."""
    size = images[0].size
    for units, reward in ((10.0, brightness), (0.01, lambda x: 0.001 * brightness(x)), (1.0, contrast)):
        found = feedback_gradient([reward], images, [1e3], [0.7], balanced=True)
        norms = np.linalg.norm(np.asarray(found.gradient).reshape(len(images), -1), axis=1)
        np.testing.assert_allclose(norms, 0.7 / np.sqrt(size), rtol=1e-4, err_msg=str(units))
    both = feedback_gradient([brightness, contrast], images, [1e3, 1e3], [0.7, 0.2], balanced=True)
    each = [
        feedback_gradient([r], images, [1e3], [w], balanced=True).gradient
        for r, w in ((brightness, 0.7), (contrast, 0.2))
    ]
    np.testing.assert_allclose(both.gradient, each[0] + each[1], rtol=1e-5, atol=1e-8)
    above = feedback_gradient([brightness], images, [-1.0], [1.0], balanced=True)
    assert not np.asarray(above.gradient).any()


def test_a_flat_reward_has_no_gradient(images: np.ndarray) -> None:
    found = feedback_gradient([lambda x: jnp.zeros(x.shape[0])], images, [1.0], [1.0], balanced=True)
    assert not np.asarray(found.gradient).any()
    assert float(found.hinge) == 1.0


def test_no_pixel_is_pushed_further_out() -> None:
    """Brighter is better: what is above 1 stays, what is below 0 is pulled in, both are scored as clipped."""
    pixels = np.full((1, 1, 3, 3), 0.5, np.float32)
    pixels[0, 0, 0], pixels[0, 0, 2] = -0.2, 1.4
    found = feedback_gradient([brightness], pixels, [1e3], [1.0], balanced=False)
    assert float(found.scores[0, 0]) == pytest.approx(5.0)
    moved = np.asarray(found.gradient)[0, 0, :, 0] < 0
    assert moved[1]
    assert not moved[2]
