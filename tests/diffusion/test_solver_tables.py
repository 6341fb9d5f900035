"""Solver tables: golden grids, the coefficients by hand, and bad input."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hypersd_jax.diffusion import SOLVERS, Schedule, injects_noise, solver_table
from hypersd_jax.errors import UserError

SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}
ABAR = Schedule.from_config(SD).alphas_cumprod


def table(name, steps, **kwargs):
    return solver_table(name, steps, **{"scheduler_config": SD, **kwargs})


@pytest.mark.parametrize("name", ["tcd", "lcm"])
@pytest.mark.parametrize("grid", [[999], [999, 499], [999, 759, 499, 259], [999, 879, 759, 639, 499, 379, 259, 139]])
def test_golden_origin_grids(name, grid):
    assert table(name, len(grid))["timesteps"].tolist() == grid


@pytest.mark.parametrize(
    "grid",
    [
        [999],
        [999, 499],
        [999, 749, 499, 249],
        [999, 874, 749, 624, 499, 374, 249, 124],
        [999, 916, 832, 749, 666, 582, 499, 416, 332, 249, 166, 82],
    ],
)
def test_golden_trailing_grids(grid):
    assert table("ddim", len(grid))["timesteps"].tolist() == grid
    assert table("tcd", len(grid), spacing="trailing")["timesteps"].tolist() == grid


def test_other_spacings():
    assert table("ddim", 4, spacing="leading")["timesteps"].tolist() == [751, 501, 251, 1]
    assert table("ddim", 4, spacing="linspace")["timesteps"].tolist() == [999, 666, 333, 0]


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 4])
def test_types(name, steps):
    rows = table(name, steps)
    scalars = {"init_noise_sigma", "start_x0", "start_noise"}
    assert rows["timesteps"].dtype == np.int32
    assert all(value.dtype == np.float32 for key, value in rows.items() if key != "timesteps")
    assert all(value.shape == (() if key in scalars else (steps,)) for key, value in rows.items())
    assert all(np.all(np.isfinite(value)) for key, value in rows.items() if key != "clip")


def test_fractional_timesteps_are_floats_and_whole_ones_are_not():
    assert table("euler", 5)["timesteps"].tolist() == [999, 749.25, 499.5, 249.75, 0]
    assert table("euler", 4)["timesteps"].dtype == np.int32
    assert table("euler", 4, spacing="trailing")["timesteps"].tolist() == [999, 749, 499, 249]
    karras = {**SD, "use_karras_sigmas": True}
    assert table("euler", 4, scheduler_config=karras)["timesteps"].dtype == np.float32
    assert table("dpmpp_2m", 4, scheduler_config=karras)["timesteps"].dtype == np.int32


def test_golden_dpmpp_grids():
    """n of n + 1 points, so that the last step ends clean instead of at timestep 0 or 1."""
    assert table("dpmpp_2m", 4, spacing="linspace")["timesteps"].tolist() == [999, 749, 500, 250]
    assert table("dpmpp_2m", 4, spacing="leading")["timesteps"].tolist() == [801, 601, 401, 201]
    assert table("dpmpp_2m", 4, spacing="trailing")["timesteps"].tolist() == [999, 749, 499, 249]


def test_euler_is_ddim_in_other_units():
    """One Euler step in s is one DDIM step: x_vp = alpha x_ve (arXiv 2010.02502, Section 4.3)."""
    grid = [900, 700, 300, 10]
    euler, ddim = (table(name, 4, timesteps=grid) for name in ("euler", "ddim"))
    after = np.append(euler["alpha"][1:], 1.0)  # Euler ends on clean latents, DDIM on abar_0
    for key in ("c_x0", "c_eps"):
        np.testing.assert_allclose((euler[key] * after)[:3], ddim[key][:3], rtol=1e-5)
    assert euler["c_eps"][-1] == 0
    np.testing.assert_array_equal(euler["c_in"], euler["alpha"])
    np.testing.assert_allclose(euler["start_noise"] * euler["alpha"][0], euler["sigma"][0], rtol=1e-6)


def test_ancestral_noise_keeps_the_variance():
    rows = table("euler_a", 4)
    levels = rows["sigma"] / rows["alpha"]
    np.testing.assert_allclose(rows["c_eps"] ** 2 + rows["c_noise"] ** 2, np.append(levels[1:] ** 2, 0), rtol=1e-5)
    assert injects_noise(rows)
    assert rows["c_noise"][-1] == 0


def test_dpmpp_2m_without_its_history_is_ddim():
    """Each row's x_0 coefficients add up to the first-order step's; the first and the last row have no history."""
    rows = table("dpmpp_2m", 6)
    after_alpha = np.append(rows["alpha"][1:], 1.0)
    after_sigma = np.append(rows["sigma"][1:], 0.0)
    np.testing.assert_allclose(rows["c_x"] * rows["sigma"], after_sigma, rtol=1e-6, atol=1e-7)
    together = rows["c_x0"] + rows["c_x0_prev"] + rows["c_x"] * rows["alpha"]
    np.testing.assert_allclose(together, after_alpha, rtol=1e-5)
    assert (rows["c_x0_prev"] != 0).tolist() == [False, True, True, True, True, False]


def test_start_noise_of_the_whole_schedule():
    for name, sigma in (("ddim", 1), ("dpmpp_2m", 1), ("euler", 14.6146), ("euler_a", 14.6146)):
        assert table(name, 4, spacing="trailing")["init_noise_sigma"] == pytest.approx(sigma, rel=1e-5)
    leading = table("euler", 4, spacing="leading")
    assert leading["init_noise_sigma"] == pytest.approx((leading["start_noise"] ** 2 + 1) ** 0.5, rel=1e-6)


def test_ddim_coefficients():
    rows = table("ddim", 4)
    np.testing.assert_allclose(rows["c_x0"], np.sqrt(ABAR[[749, 499, 249, 0]]), rtol=1e-6)
    np.testing.assert_allclose(rows["c_eps"], np.sqrt(1 - ABAR[[749, 499, 249, 0]]), rtol=1e-6)
    assert not injects_noise(rows)
    assert table("ddim", 4, scheduler_config={**SD, "set_alpha_to_one": True})["c_x0"][-1] == 1
    noisy = table("ddim", 4, eta=1.0)
    assert injects_noise(noisy)
    # whatever eta, the marginal keeps its variance
    np.testing.assert_allclose(noisy["c_eps"] ** 2 + noisy["c_noise"] ** 2, rows["c_eps"] ** 2, rtol=1e-5)


def test_ddim_previous_timestep_is_t_minus_the_integer_stride():
    rows = table("ddim", 12)  # 1000 // 12 = 83, while the listed neighbours are 83 or 84 apart
    np.testing.assert_allclose(rows["c_x0"][1], np.sqrt(ABAR[916 - 83]), rtol=1e-6)


def test_ddim_custom_timesteps_step_to_the_next_listed_one():
    rows = table("ddim", 2, timesteps=[800, 300])
    np.testing.assert_allclose(rows["c_x0"], np.sqrt(ABAR[[300, 0]]), rtol=1e-6)
    np.testing.assert_allclose(rows["alpha"], np.sqrt(ABAR[[800, 300]]), rtol=1e-6)


def test_custom_timesteps_equal_to_the_grid_change_nothing():
    for name, grid in (("ddim", [999, 749, 499, 249]), ("tcd", [999, 759, 499, 259]), ("lcm", [999, 759, 499, 259])):
        for steps in (4, None):
            custom = table(name, steps, timesteps=grid)
            for key, value in table(name, 4).items():
                np.testing.assert_array_equal(custom[key], value)


def test_tcd_coefficients():
    rows = table("tcd", 4, eta=1.0)
    np.testing.assert_allclose(rows["c_noise"][:3] ** 2, 1 - ABAR[[759, 499, 259]] / ABAR[0], rtol=1e-5)
    assert rows["c_noise"][-1] == 0
    assert rows["c_x0"][-1] == pytest.approx(0.99957, abs=1e-5)  # abar_0, not 1, even though it is the end
    assert rows["c_eps"][-1] == pytest.approx(0.02915, abs=1e-5)
    assert not injects_noise(table("tcd", 4, eta=0.0))
    assert not injects_noise(table("tcd", 1, eta=1.0))


def test_lcm_boundary_conditions_at_800():
    rows = table("lcm", 1, timesteps=[800])
    assert rows["c_x"][0] == pytest.approx(3.9e-9, rel=1e-2)
    assert rows["c_x0"][0] == pytest.approx(1, abs=1e-7)
    assert rows["c_eps"][0] == rows["c_noise"][0] == 0


REFUSED = [
    *itertools.product(("euler", "euler_a", "dpmpp_2m"), ("clip_sample", "use_flow_sigmas", "use_lu_lambdas"), (True,)),
    *itertools.product(("euler_a",), ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), (True,)),
    ("euler_a", "final_sigmas_type", "sigma_min"),
    ("euler_a", "interpolation_type", "log_linear"),
    ("dpmpp_2m", "timestep_type", "continuous"),
    ("dpmpp_2m", "variance_type", "learned_range"),
    ("dpmpp_2m", "algorithm_type", "sde-dpmsolver++"),
    ("dpmpp_2m", "solver_order", 3),
    ("dpmpp_2m", "solver_type", "third"),
    ("dpmpp_2m", "lambda_min_clipped", "low"),
    ("euler", "thresholding", True),
    ("euler", "rescale_betas_zero_snr", True),  # epsilon cannot start from no signal
    ("euler", "timestep_spacing", "even"),
    ("euler", "final_sigmas_type", "none"),
    ("euler", "interpolation_type", "cubic"),
]


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("dim", {}, "sampler.*'ddim'"),
        ("ddim", {"spacing": "trailling"}, "spacing.*'trailing'"),
        ("tcd", {"eta": 7.0}, "eta"),
        ("ddim", {"eta": -0.1}, "eta"),
        ("ddim", {"eta": float("nan")}, "eta"),
        ("lcm", {"eta": 0.3}, "eta"),
        ("euler", {"eta": 0.3}, "eta.*euler sampler has no eta"),
        ("euler_a", {"eta": 1.0}, "eta.*euler_a sampler has no eta"),
        ("dpmpp_2m", {"eta": 1.0}, "eta.*dpmpp_2m sampler has no eta"),
        ("dpmpp_2m", {"steps": 1000}, "steps=1000.*linspace"),
        ("euler", {"timesteps": [9.5, 4, 3, 2]}, "timesteps"),
        ("euler", {"strength": 0.0}, "strength"),
        ("euler", {"strength": 1.5}, "strength"),
        ("euler", {"strength": 0.2}, "strength=0.2 of 4 steps leaves none"),
        ("ddim", {"steps": 0}, "steps"),
        ("ddim", {"steps": 1001}, "steps"),
        ("ddim", {"steps": 2.5}, "steps"),
        ("ddim", {"steps": None}, "steps"),
        ("tcd", {"steps": 51}, "steps.*original_inference_steps"),
        ("ddim", {"steps": 1000, "spacing": "leading"}, "steps_offset"),
        ("tcd", {"timesteps": [499, 999, 1, 0]}, "timesteps.*descending"),
        ("lcm", {"timesteps": [999, 499, 499, 0]}, "timesteps.*descending"),
        ("ddim", {"timesteps": [1000, 4, 3, 2]}, "timesteps"),
        ("ddim", {"timesteps": [9, 4, 3, -2]}, "timesteps"),
        ("ddim", {"timesteps": [999, 1]}, "timesteps.*steps=4"),
        ("ddim", {"timesteps": []}, "timesteps"),
        ("ddim", {"timesteps": [9.5, 4, 3, 2]}, "timesteps"),
        ("ddim", {"timesteps": [9, 4, 3, 2], "spacing": "trailing"}, "timesteps"),
        ("euler", {"timesteps": [9, 4], "steps": 2, "scheduler_config": {**SD, "use_karras_sigmas": True}}, "karras"),
        (
            "euler",
            {"scheduler_config": {**SD, "use_karras_sigmas": True, "use_beta_sigmas": True}},
            "use_karras_sigmas, use_beta_sigmas",
        ),
        ("euler", {"scheduler_config": {**SD, "use_karras_sigmas": True, "sigma_min": -1}}, "sigma_min"),
        ("dpmpp_2m", {"scheduler_config": {**SD, "use_beta_sigmas": True, "sigma_max": float("inf")}}, "sigma_max"),
        ("dpmpp_2m", {"scheduler_config": {**SD, "lambda_min_clipped": float("inf")}}, "steps=4"),
        ("euler", {"scheduler_config": {"beta_end": 0.2}}, "abar = 0"),
        ("tcd", {"scheduler_config": {**SD, "clip_sample": True}}, "clip_sample"),
        ("tcd", {"scheduler_config": {**SD, "original_inference_steps": 2000}}, "original_inference_steps"),
        ("ddim", {"scheduler_config": {**SD, "thresholding": True}}, "thresholding"),
        ("lcm", {"scheduler_config": {**SD, "timestep_scaling": "x"}}, "timestep_scaling.*'x'"),
        ("lcm", {"scheduler_config": {**SD, "timestep_scaling": float("inf")}}, "timestep_scaling"),
        ("lcm", {"scheduler_config": {**SD, "timestep_scaling": 10**400}}, "timestep_scaling"),
        ("ddim", {"timesteps": [10**30, 4, 3, 2]}, "timesteps must be a list of integers"),
        ("euler", {"scheduler_config": {**SD, "use_karras_sigmas": True, "sigma_max": 10**400}}, "sigma_max"),
        ("euler_a", {"scheduler_config": {**SD, "beta_start": 1e-40}}, "too small to make any noise"),
        *((name, {"scheduler_config": {**SD, key: value}}, key) for name, key, value in REFUSED),
    ],
)
def test_bad_input(name, kwargs, message):
    with pytest.raises(UserError, match=message):
        table(name, **{"steps": 4, **kwargs})
