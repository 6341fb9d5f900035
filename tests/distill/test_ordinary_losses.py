"""The losses of ordinary training, against the formulas written out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.diffusion import Schedule
from hypersd_jax.distill import Corruption, corruption, denoising_loss, psnr, reconstruction_loss

RNG = np.random.default_rng(0)


def schedule(prediction_type: str) -> Schedule:
    return Schedule.from_config(
        {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": prediction_type,
            "clip_sample": False,
        }
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_denoising_loss(kind, gamma):
    z, eps, out = (RNG.standard_normal((4, 3, 3, 2)).astype(np.float32) for _ in range(3))
    t = np.asarray([0, 200, 600, 999], np.int32)
    times = schedule(kind)
    a, s = (np.asarray(each, np.float64)[t] for each in (times.alpha, times.sigma))
    column = (4, 1, 1, 1)
    seen = {}

    def model(x, at, cond):
        seen.update(x=x, at=at, cond=cond)
        return jnp.asarray(out)

    drawn = Corruption(t=jnp.asarray(t), eps=jnp.asarray(eps), dropped=jnp.zeros(4, bool))
    loss, metrics = denoising_loss(model, jnp.asarray(z), "text", drawn, schedule=times, snr_gamma=gamma)
    np.testing.assert_allclose(seen["x"], a.reshape(column) * z + s.reshape(column) * eps, rtol=1e-6, atol=1e-6)
    assert seen["cond"] == "text"
    target = {"epsilon": eps, "v_prediction": a.reshape(column) * eps - s.reshape(column) * z, "sample": z}[kind]
    errors = np.mean((out - target) ** 2, axis=(1, 2, 3))
    snr = (a / s) ** 2
    # The same weight on the error of x_0, whatever is predicted.
    to_x0 = {"epsilon": 1 / snr, "v_prediction": s**2, "sample": np.ones(4)}[kind]
    weights = np.ones(4) if gamma is None else np.minimum(snr, gamma) * to_x0
    np.testing.assert_allclose(loss, np.mean(weights * errors), rtol=2e-5)
    np.testing.assert_allclose(metrics["mse"], np.mean(errors), rtol=1e-6)


def test_what_is_drawn_depends_on_the_batch_index_alone():
    key = jax.random.key(3)
    options = {"times": 1000, "prompt_dropout": 0.25}
    whole = corruption(key, (64, 2, 2, 1), jnp.arange(64), **options)
    part = corruption(key, (8, 2, 2, 1), jnp.arange(40, 48), **options)
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_array_equal(a[40:48], b)
    many = corruption(key, (4096, 1, 1, 1), jnp.arange(4096), **options)
    assert int(many.t.min()) < 5
    assert int(many.t.max()) > 994
    assert abs(float(many.dropped.mean()) - 0.25) < 0.03
    assert abs(float(many.eps.std()) - 1.0) < 0.05


def test_the_reconstruction_loss():
    x, y = (RNG.uniform(-1, 1, (2, 4, 6, 3)).astype(np.float32) for _ in range(2))
    mean, logvar = (RNG.standard_normal((2, 2, 3, 5)).astype(np.float32) for _ in range(2))
    weights = {"gradient_weight": 0.7, "kl_weight": 0.3}
    loss, metrics = reconstruction_loss(*map(jnp.asarray, (y, x, mean, logvar)), **weights)
    error = y.astype(np.float64) - x
    l1 = np.abs(error).mean()
    gradient = np.abs(error[:, 1:] - error[:, :-1]).mean() + np.abs(error[:, :, 1:] - error[:, :, :-1]).mean()
    kl = 0.5 * np.mean(mean.astype(np.float64) ** 2 + np.exp(logvar) - 1 - logvar)
    np.testing.assert_allclose(loss, l1 + 0.7 * gradient + 0.3 * kl, rtol=1e-6)
    np.testing.assert_allclose([metrics["l1"], metrics["gradient"], metrics["kl"]], [l1, gradient, kl], rtol=1e-6)


def test_psnr_of_a_known_error_and_of_overshoot():
    x = jnp.zeros((1, 4, 4, 3))
    np.testing.assert_allclose(psnr(x + 0.2, x), 20.0, rtol=1e-5)
    np.testing.assert_allclose(psnr(jnp.full_like(x, 3.0), jnp.ones_like(x)), 100.0, rtol=1e-5)
