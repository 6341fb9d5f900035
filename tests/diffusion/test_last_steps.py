"""The last steps of a solver's table."""

from __future__ import annotations

import numpy as np
import pytest

from hypersd_jax.diffusion import SOLVERS, last_steps, solver_table
from hypersd_jax.errors import UserError

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def table(name="dpmpp_2m", steps=8, **kwargs):
    return solver_table(name, steps, scheduler_config=SD, **kwargs)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_last_steps_are_those_of_the_whole(name):
    whole, part = table(name), table(name, strength=0.5)
    for key, value in part.items():
        if value.ndim and key not in ("c_x0", "c_x0_prev"):
            np.testing.assert_array_equal(value, whole[key][4:])
        if value.ndim:
            np.testing.assert_array_equal(value[1:], whole[key][5:])
    assert (part["start_x0"], part["start_noise"]) == (whole["known_x0"][3], whole["known_noise"][3])
    np.testing.assert_allclose(part["c_in"][0] * part["start_noise"], part["sigma"][0], rtol=1e-6)


def test_a_multistep_solver_begins_with_a_first_order_step():
    whole, part = table(), table(strength=0.5)
    assert whole["c_x0_prev"][4] != 0
    assert part["c_x0_prev"][0] == 0
    np.testing.assert_allclose(part["c_x0"][0] + part["c_x"][0] * part["alpha"][0], part["alpha"][1], rtol=1e-6)


def test_the_whole_is_left_as_it_was():
    whole = table()
    copy = {key: value.copy() for key, value in whole.items()}
    last_steps(whole, 0.5)
    for key, value in copy.items():
        np.testing.assert_array_equal(whole[key], value)
    assert last_steps(whole, 1.0)["timesteps"].tolist() == whole["timesteps"].tolist()


@pytest.mark.parametrize("strength", [0, -1, 1.01, float("nan"), 0.1])
def test_bad_strength(strength):
    with pytest.raises(UserError, match="strength"):
        last_steps(table(), strength)
