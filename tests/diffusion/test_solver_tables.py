"""Solver tables: golden grids, the coefficients by hand, and bad input."""

from __future__ import annotations

import numpy as np
import pytest

from hypersd_jax.diffusion import Schedule, injects_noise, solver_table
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


def test_types():
    rows = table("tcd", 4, eta=0.3)
    assert rows["timesteps"].dtype == np.int32
    assert all(value.dtype == np.float32 for key, value in rows.items() if key != "timesteps")
    assert all(value.shape == (4,) for key, value in rows.items() if key != "init_noise_sigma")


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


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("dim", {}, "sampler.*'ddim'"),
        ("ddim", {"spacing": "trailling"}, "spacing.*'trailing'"),
        ("tcd", {"eta": 7.0}, "eta"),
        ("ddim", {"eta": -0.1}, "eta"),
        ("ddim", {"eta": float("nan")}, "eta"),
        ("lcm", {"eta": 0.3}, "eta"),
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
        ("tcd", {"scheduler_config": {**SD, "clip_sample": True}}, "clip_sample"),
        ("tcd", {"scheduler_config": {**SD, "original_inference_steps": 2000}}, "original_inference_steps"),
        ("ddim", {"scheduler_config": {**SD, "thresholding": True}}, "thresholding"),
        ("lcm", {"scheduler_config": {**SD, "timestep_scaling": "x"}}, "timestep_scaling.*'x'"),
        ("lcm", {"scheduler_config": {**SD, "timestep_scaling": float("inf")}}, "timestep_scaling"),
    ],
)
def test_bad_input(name, kwargs, message):
    with pytest.raises(UserError, match=message):
        table(name, **{"steps": 4, **kwargs})
