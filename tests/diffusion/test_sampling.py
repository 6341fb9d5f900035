"""The sampling scan."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.diffusion import Schedule, sample, solver_table
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
        eps = np.tanh(x + np.float32(t) / np.float32(1000))
        x0 = np.clip((x - row["sigma"] * eps) / row["alpha"], -row["clip"], row["clip"])
        x = row["c_x0"] * x0 + row["c_eps"] * eps + row["c_x"] * x + row["c_x0_prev"] * before
        x, before = x + row["c_noise"] * np.asarray(noise[i]), x0
    return x


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(("name", "eta"), [("ddim", 0.3), ("tcd", 0.3), ("lcm", 0.0)])
def test_scan_follows_the_table(name, eta, steps):
    table = solver_table(name, steps, eta=eta, scheduler_config={**SD, "clip_sample": name != "tcd"})
    got = sample(predict, table, LATENTS, noise(steps), prediction_type="epsilon")
    np.testing.assert_allclose(got, by_hand(table, LATENTS, noise(steps)), rtol=2e-5, atol=2e-5)


def test_a_multistep_row_reads_the_step_before():
    table = solver_table("ddim", 3, scheduler_config=SD)
    table["c_x0_prev"] = np.array([0.5, -0.5, 0.25], np.float32)
    table["init_noise_sigma"] = np.float32(1.5)
    got = sample(predict, table, LATENTS, None, prediction_type="epsilon")
    np.testing.assert_allclose(got, by_hand(table, 1.5 * LATENTS, noise(3)), rtol=2e-5, atol=2e-5)


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
        ]
    ]
    assert len(traces) == 1
    assert len({np.asarray(output).tobytes() for output in outputs}) == 5


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_finite_from_zero_snr(prediction_type):
    config = {**SD, "rescale_betas_zero_snr": True, "prediction_type": prediction_type}
    for name in ("ddim", "tcd", "lcm"):
        for steps in (1, 4):
            table = solver_table(name, steps, scheduler_config=config)
            assert jnp.isfinite(sample(predict, table, LATENTS, noise(steps), prediction_type=prediction_type)).all()


def test_exact_noise_prediction_recovers_the_data():
    """If the network knows the clean latents, every solver ends on them (up to abar_0)."""
    data = jax.random.normal(jax.random.key(2), LATENTS.shape)
    for name in ("ddim", "tcd", "lcm"):
        table = solver_table(name, 4, eta=0.0, scheduler_config={**SD, "prediction_type": "sample"})
        got = sample(lambda x, t: data, table, LATENTS, noise(4), prediction_type="sample")
        np.testing.assert_allclose(got, data, atol=1e-6 if name == "lcm" else 0.15)


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


def test_callback_sees_each_step():
    seen = []
    table = solver_table("ddim", 4, scheduler_config=SD)

    def callback(step, timestep, latents):
        seen.append((int(step), int(timestep), np.asarray(latents)))

    got = sample(predict, table, LATENTS, None, prediction_type="epsilon", callback=callback)
    jax.effects_barrier()
    assert [(step, t) for step, t, _ in sorted(seen, key=lambda s: s[0])] == [(0, 999), (1, 749), (2, 499), (3, 249)]
    np.testing.assert_array_equal(max(seen, key=lambda s: s[0])[2], got)


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
