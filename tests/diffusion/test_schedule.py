"""The schedule's golden values, and what is refused."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from hypersd_jax.diffusion import Schedule
from hypersd_jax.errors import UserError

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def test_golden_values_of_stable_diffusion():
    schedule = Schedule.from_config(SD)
    golden = {0: 0.999150, 19: 0.982244, 124: 0.863408, 259: 0.658976, 499: 0.277670, 800: 0.036870, 999: 0.004660}
    for t, abar in golden.items():
        assert schedule.alphas_cumprod[t] == pytest.approx(abar, abs=6e-7)
    assert schedule.alpha[999] == pytest.approx(0.06826, abs=6e-6)
    assert schedule.sigma[999] == pytest.approx(0.99767, abs=6e-6)
    assert schedule.alphas_cumprod.dtype == np.float64
    assert schedule.alpha.dtype == schedule.sigma.dtype == np.float32
    np.testing.assert_allclose(schedule.alpha**2 + schedule.sigma**2, 1, rtol=3e-7)


def test_final_alpha():
    assert Schedule.from_config({**SD, "set_alpha_to_one": False}).final_alpha_cumprod == pytest.approx(0.99915)
    assert Schedule.from_config({**SD, "set_alpha_to_one": True}).final_alpha_cumprod == 1


def test_zero_terminal_snr():
    schedule = Schedule.from_config({**SD, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    assert schedule.alpha[-1] == 0
    assert schedule.sigma[-1] == 1
    assert schedule.alphas_cumprod[0] == pytest.approx(0.99915)
    assert np.all(np.diff(schedule.alphas_cumprod) < 0)


def test_absent_keys_take_the_defaults_of_the_solvers_class():
    assert Schedule.from_config({}, solver="ddim").clip_sample
    assert Schedule.from_config({}, solver="lcm").beta_schedule == "scaled_linear"
    assert not Schedule.from_config({}).clip_sample


def test_static_argument_of_jit():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def alpha_at(schedule, t):
        traces.append(1)
        return jax.numpy.asarray(schedule.alpha)[t]

    alpha_at(Schedule.from_config(SD), 3)
    alpha_at(Schedule.from_config({**SD, "_class_name": "PNDMScheduler", "skip_prk_steps": True}), 4)
    assert len(traces) == 1
    alpha_at(Schedule.from_config({**SD, "beta_end": 0.013}), 3)
    assert len(traces) == 2


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"thresholding": True}, "thresholding"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"prediction_type": "v"}, "v_prediction"),
        ({"beta_schedule": "scaled-linear"}, "scaled_linear"),
        ({"trained_betas": [0.1]}, "trained_betas"),
        ({"beta_start": "low"}, "beta_start"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"num_train_timesteps": float("inf")}, "num_train_timesteps"),
        ({"num_train_timesteps": 10**15}, "num_train_timesteps must be in 1..100000, not 1000000000000000"),
        ({"steps_offset": 10**30}, "steps_offset=1000000000000000000000000000000 leads out of the 1000 timesteps"),
        ({"beta_start": [1.0] * 999}, r"beta_start has the unreadable value \[1\.0, .{100,200}\.\.\.$"),
        ({"beta_start": -0.1}, "beta_start must be above 0 and below 1, not -0.1"),
        ({"beta_end": 1.0}, "beta_end"),
        ({"beta_end": float("nan")}, "beta_end"),
        ({"trained_betas": [0.1] * 999 + [1.5]}, "trained_betas must be above 0 and below 1, not 1.5"),
        ({"trained_betas": [0.9] * 1000}, "trained_betas over 1000 timesteps leaves alpha = 0"),
        ({"beta_end": 0.99}, "beta_start, beta_end over 1000 timesteps"),
        (
            {"num_train_timesteps": 1, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
            "leaves alpha = 0",
        ),
        ({"clip_sample_range": float("nan")}, "clip_sample_range"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name"),
    ],
)
def test_refused(change, key):
    with pytest.raises(UserError, match=key):
        Schedule.from_config({**SD, **change})
