"""The sampling scan."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.diffusion import SOLVERS, Known, Schedule, advance, begin, sample, solver_table
from hypersd_jax.errors import UserError

SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "clip_sample": False,
}
LATENTS = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))


def noise(steps):
    return jax.random.normal(jax.random.key(1), (steps, *LATENTS.shape))


def predict(x, t):
    return jnp.tanh(x + t.astype(jnp.float32).reshape(-1, 1, 1, 1) / 1000)


def by_hand(table, latents, noise):
    x, before = np.asarray(latents), 0
    for i, t in enumerate(table["timesteps"]):
        row = {key: value[i] for key, value in table.items() if value.ndim}
        x_in = row["c_in"] * x
        eps = np.tanh(x_in + np.float32(t) / np.float32(1000))
        x0 = np.clip((x_in - row["sigma"] * eps) / row["alpha"], -row["clip"], row["clip"])
        x = row["c_x0"] * x0 + row["c_eps"] * eps + row["c_x"] * x + row["c_x0_prev"] * before
        x, before = x + row["c_noise"] * np.asarray(noise[i]), x0
    return x


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", SOLVERS)
def test_scan_follows_the_table(name, steps):
    eta = 0.3 if name in ("ddim", "tcd") else 0.0
    table = solver_table(name, steps, eta=eta, scheduler_config={**SD, "clip_sample": name in ("ddim", "lcm")})
    got = sample(predict, table, LATENTS, noise(steps), prediction_type="epsilon")
    expected = by_hand(table, table["init_noise_sigma"] * LATENTS, noise(steps))
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


def test_a_multistep_row_reads_the_step_before():
    table = solver_table("ddim", 3, scheduler_config=SD)
    table["c_x0_prev"] = np.array([0.5, -0.5, 0.25], np.float32)
    table["init_noise_sigma"] = np.float32(1.5)
    got = sample(predict, table, LATENTS, None, prediction_type="epsilon")
    np.testing.assert_allclose(got, by_hand(table, 1.5 * LATENTS, noise(3)), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", SOLVERS)
def test_step_by_step_is_the_scan(name):
    table = solver_table(name, 4, scheduler_config=SD)
    state = begin(table, LATENTS)
    for i in range(4):
        rows = {key: value[i : i + 1] for key, value in table.items() if value.ndim}
        state = advance(predict, rows, state, noise(4)[i : i + 1], prediction_type="epsilon")
    got = sample(predict, table, LATENTS, noise(4), prediction_type="epsilon")
    np.testing.assert_allclose(state.x, got, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_start_from_an_image(name):
    """The start is noised to the first level; with a network that knows the image, any part ends on it."""
    clean = jax.random.normal(jax.random.key(3), LATENTS.shape)
    config = {**SD, "prediction_type": "sample"}
    table = solver_table(name, 4, scheduler_config=config, strength=0.5)
    state = begin(table, LATENTS, clean)
    x_in = table["c_in"][0] * state.x
    np.testing.assert_allclose(x_in, table["alpha"][0] * clean + table["sigma"][0] * LATENTS, rtol=1e-5, atol=1e-5)
    got = sample(lambda x, t: clean, table, LATENTS, noise(2), prediction_type="sample", clean=clean)
    np.testing.assert_allclose(got, clean, atol=0.15 if name in ("ddim", "tcd") else 1e-5)


@pytest.mark.parametrize("name", SOLVERS)
def test_what_inpainting_keeps(name):
    """The masked part ends as the image exactly, and has the next level's noise on the way; the rest is painted."""
    clean, mask = jax.random.normal(jax.random.key(3), LATENTS.shape), jnp.zeros((2, 4, 4, 1)).at[:, :2].set(1.0)
    known = Known(mask, clean, LATENTS)
    table = solver_table(name, 4, scheduler_config=SD)
    got = sample(predict, table, LATENTS, noise(4), prediction_type="epsilon", known=known)
    np.testing.assert_array_equal(got[:, 2:], clean[:, 2:])
    assert not np.allclose(got[:, :2], clean[:, :2], atol=0.1)
    first = {key: value[:1] for key, value in table.items() if value.ndim}
    after = advance(predict, first, begin(table, LATENTS), noise(1), prediction_type="epsilon", known=known).x
    x_in = table["c_in"][1] * after[:, 2:]
    expected = table["alpha"][1] * clean + table["sigma"][1] * LATENTS
    np.testing.assert_allclose(x_in, expected[:, 2:], rtol=1e-5, atol=1e-5)


def test_other_numbers_compile_nothing():
    traces = []

    @jax.jit
    def run(table, latents, noise):
        def model(x, t):
            traces.append(1)
            return predict(x, t)

        return sample(model, table, latents, noise, prediction_type="epsilon")

    outputs = [
        run(solver_table(name, 4, eta=eta, scheduler_config=SD, timesteps=timesteps), LATENTS, noise(4))
        for name, eta, timesteps in [
            ("tcd", 0.0, None),
            ("tcd", 0.3, None),
            ("tcd", 1, [999, 749, 499, 249]),
            ("ddim", 0.5, None),
            ("lcm", 0, [900, 500, 100, 3]),
            ("dpmpp_2m", 0, None),
            ("euler_a", 0, [900, 500, 100, 3]),
        ]
    ]
    assert len(traces) == 1
    assert len({np.asarray(output).tobytes() for output in outputs}) == 7


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_finite_from_zero_snr(prediction_type):
    config = {**SD, "rescale_betas_zero_snr": True, "prediction_type": prediction_type}
    for name in SOLVERS:
        for steps in (1, 4):
            table = solver_table(name, steps, scheduler_config=config)
            assert jnp.isfinite(sample(predict, table, LATENTS, noise(steps), prediction_type=prediction_type)).all()


def test_exact_noise_prediction_recovers_the_data():
    """If the network knows the clean latents, every solver ends on them (up to abar_0)."""
    data = jax.random.normal(jax.random.key(2), LATENTS.shape)
    for name in SOLVERS:
        table = solver_table(name, 4, eta=0.0, scheduler_config={**SD, "prediction_type": "sample"})
        got = sample(lambda x, t: data, table, LATENTS, noise(4), prediction_type="sample")
        np.testing.assert_allclose(got, data, atol=0.15 if name in ("ddim", "tcd") else 1e-6)


def test_noise_is_checked():
    table = solver_table("lcm", 4, scheduler_config=SD)
    with pytest.raises(UserError, match="noise"):
        sample(predict, table, LATENTS, None, prediction_type="epsilon")
    with pytest.raises(UserError, match="noise"):
        sample(predict, table, LATENTS, noise(3), prediction_type="epsilon")
    one = solver_table("lcm", 1, scheduler_config=SD)
    np.testing.assert_array_equal(
        sample(predict, one, LATENTS, None, prediction_type="epsilon"),
        sample(predict, one, LATENTS, noise(1), prediction_type="epsilon"),
    )


def test_half_precision_network_keeps_a_float32_carry():
    table = solver_table("ddim", 4, scheduler_config=SD)

    def half(x, t):
        assert x.dtype == jnp.float32
        assert t.shape == (2,)
        return predict(x, t).astype(jnp.bfloat16)

    assert sample(half, table, LATENTS.astype(jnp.bfloat16), None, prediction_type="epsilon").dtype == jnp.float32


def test_gaussian_data_gets_its_variance():
    """The exact score of N(0, s^2) data: the probability-flow ODE scales the noise to the data's spread."""
    schedule, spread = Schedule.from_config(SD), 0.5
    alphas, sigmas = jnp.asarray(schedule.alpha), jnp.asarray(schedule.sigma)

    def score(x, t):
        a, s = (v[t].reshape(-1, 1, 1, 1) for v in (alphas, sigmas))
        return s * x / (a**2 * spread**2 + s**2)

    table = solver_table("ddim", 1000, scheduler_config=SD)
    got = sample(score, table, LATENTS, None, prediction_type="epsilon")
    scale = [np.sqrt(schedule.alphas_cumprod[t] * (spread**2 - 1) + 1) for t in (0, 999)]
    # a first-order solver: 0.3 % at 1000 steps, 0.5 % at 500
    np.testing.assert_allclose(got, LATENTS * (scale[0] / scale[1]), rtol=4e-3)
