"""Distances and score distillation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.distill import dmd_gradient, mse, pseudo_huber, surrogate_loss
from hypersd_jax.errors import UserError

A, B, C = jax.random.normal(jax.random.key(0), (3, 4, 3, 3, 2))


def test_mse():
    np.testing.assert_allclose(mse(A, B), np.mean((np.asarray(A) - np.asarray(B)) ** 2, axis=(1, 2, 3)), rtol=1e-6)
    assert mse(A.astype(jnp.bfloat16), B).dtype == jnp.float32


def test_pseudo_huber():
    d = np.asarray(A, np.float64) - np.asarray(B, np.float64)
    for c in (1e-3, 0.5):
        np.testing.assert_allclose(pseudo_huber(c)(A, B), np.mean(np.sqrt(d**2 + c**2) - c, axis=(1, 2, 3)), rtol=2e-6)
    # close pairs: quadratic, and no cancellation in float32
    near = pseudo_huber(0.5)(A, A + 1e-4)
    np.testing.assert_allclose(near, np.full(4, 1e-8), rtol=2e-2)
    assert jnp.isfinite(jax.grad(lambda a: pseudo_huber(1e-3)(a, A).sum())(A)).all()
    with pytest.raises(UserError, match="huber_c"):
        pseudo_huber(0.0)


def test_dmd_gradient():
    x, real, fake = (np.asarray(a) for a in (A, B, C))
    expected = (fake - real) / np.mean(np.abs(x - real), axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(dmd_gradient(A, B, C), expected, rtol=1e-6)
    # samples are normalised one by one
    np.testing.assert_allclose(dmd_gradient(A[:1], B[:1], C[:1]), expected[:1], rtol=1e-6)
    assert not np.any(dmd_gradient(A, A, A))
    assert not np.any(dmd_gradient(A, A, B))
    assert not np.any(jax.grad(lambda a: dmd_gradient(a, B, C).sum())(A))


def test_dmd_gradient_is_the_weighted_score_difference():
    """Score form of method: (s_fake - s_real) sigma^2 / alpha, over the same normaliser."""
    alpha, sigma = 0.6, 0.8
    x_t = alpha * A + sigma * jax.random.normal(jax.random.key(1), A.shape)
    real, fake = (-(x_t - alpha * mu) / sigma**2 for mu in (B, C))
    norm = jnp.mean(jnp.abs(A - B), axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(dmd_gradient(A, B, C), (fake - real) * sigma**2 / alpha / norm, rtol=1e-4, atol=1e-5)


def test_surrogate_loss_has_the_gradient():
    gradient = dmd_gradient(A, B, C)
    np.testing.assert_allclose(jax.grad(surrogate_loss)(A, gradient), gradient / A.size, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(surrogate_loss(A, gradient), 0.5 * np.mean(np.square(gradient)), rtol=1e-5)
