"""Conversions between prediction types, and guidance."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.diffusion import PREDICTION_TYPES, Schedule, add_noise, from_x0_eps, guided, to_x0_eps
from hypersd_jax.errors import UserError

SCHEDULE = Schedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
TIMES = np.array([0, 19, 499, 999])


def state():
    x0, eps = jax.random.normal(jax.random.key(0), (2, 4, 3, 3, 4))
    alpha, sigma = (a[TIMES].reshape(4, 1, 1, 1) for a in (SCHEDULE.alpha, SCHEDULE.sigma))
    return x0, eps, alpha, sigma, add_noise(x0, eps, alpha, sigma)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_round_trip(prediction_type):
    x0, eps, alpha, sigma, x = state()
    output = from_x0_eps(x0, eps, alpha, sigma, prediction_type)
    got_x0, got_eps = to_x0_eps(output, x, alpha, sigma, prediction_type)
    # float32 rounding of x is divided by alpha_999 = 0.068 in x_0, by sigma_0 = 0.029 in eps
    np.testing.assert_allclose(got_x0, x0, atol=1e-5)
    np.testing.assert_allclose(got_eps, eps, atol=2e-5)


@pytest.mark.parametrize("route", list(itertools.permutations(PREDICTION_TYPES)))
def test_cycle_over_all_types(route):
    """eps -> v -> x_0 -> eps in every order is the identity."""
    x0, eps, alpha, sigma, x = state()
    start = output = from_x0_eps(x0, eps, alpha, sigma, route[0])
    for here, there in itertools.pairwise([*route, route[0]]):
        output = from_x0_eps(*to_x0_eps(output, x, alpha, sigma, here), alpha, sigma, there)
    # the route that passes x_0 alone and comes back as eps meets both small divisors
    np.testing.assert_allclose(output, start, atol=5e-5)


def test_v_is_the_velocity_of_the_angle():
    x0, eps, alpha, sigma, _ = state()
    np.testing.assert_allclose(from_x0_eps(x0, eps, alpha, sigma, "v_prediction"), alpha * eps - sigma * x0, rtol=1e-6)


def test_half_precision_outputs_are_converted_in_float32():
    _, eps, alpha, sigma, x = state()
    got = to_x0_eps(eps.astype(jnp.bfloat16), x.astype(jnp.bfloat16), alpha, sigma, "epsilon")
    assert all(a.dtype == jnp.float32 for a in got)
    exact = (x.astype(jnp.bfloat16).astype(jnp.float32) - sigma * got[1]) / alpha
    np.testing.assert_allclose(got[0], exact, rtol=1e-6)


def test_finite_at_zero_snr():
    x = jnp.ones((1, 2, 2, 1))
    for prediction_type in ("v_prediction", "sample"):
        assert all(jnp.isfinite(a).all() for a in to_x0_eps(0.5 * x, x, 0.0, 1.0, prediction_type))


def test_move_from_t_to_t_is_the_identity():
    _, eps, alpha, sigma, x = state()
    np.testing.assert_allclose(add_noise(*to_x0_eps(eps, x, alpha, sigma, "epsilon"), alpha, sigma), x, atol=1e-6)


def test_unknown_type():
    with pytest.raises(UserError, match="v_prediction"):
        to_x0_eps(1.0, 1.0, 1.0, 1.0, "v-prediction")


def test_guided():
    uncond, cond = jax.random.normal(jax.random.key(1), (2, 3, 2, 2, 4))
    np.testing.assert_array_equal(guided(uncond, cond, 0.0), uncond)
    np.testing.assert_allclose(guided(uncond, cond, 1.0), cond, atol=1e-6)
    np.testing.assert_allclose(guided(uncond, cond, 7.5), uncond + 7.5 * (cond - uncond), rtol=1e-6)
    each = guided(uncond, cond, jnp.array([0.0, 1.0, 3.0]))
    np.testing.assert_allclose(each[2], guided(uncond, cond, 3.0)[2], rtol=1e-6)
    np.testing.assert_array_equal(each, guided(uncond, cond, jnp.array([0.0, 1.0, 3.0]).reshape(3, 1, 1, 1)))
    assert guided(uncond.astype(jnp.bfloat16), cond.astype(jnp.bfloat16), 2.0).dtype == jnp.float32
