"""Update coefficients of the solvers that step in noise levels sigma / alpha: Euler, ancestral Euler, DPM-Solver++."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hypersd_jax.diffusion.names import require_name
from hypersd_jax.diffusion.record import Request, Table
from hypersd_jax.diffusion.sigma_grids import LevelGrid, dpmpp_grid, euler_grid
from hypersd_jax.errors import UserError, shown


def euler(request: Request) -> tuple[np.ndarray, Table]:
    """Euler steps (arXiv 2206.00364, Algorithm 2 without churn) on latents x = x_0 + s eps."""
    grid = euler_grid(request)
    return grid.timesteps, _euler(grid, grid.levels[1:])


def euler_ancestral(request: Request) -> tuple[np.ndarray, Table]:
    """Euler steps with fresh noise: down to s_down = s_next^2 / s, then the noise that makes s_next of it."""
    grid = euler_grid(request)
    return grid.timesteps, _euler(grid, grid.levels[1:] ** 2 / grid.levels[:-1])


def dpmpp_2m(request: Request) -> tuple[np.ndarray, Table]:
    """DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2), with the settings that the scheduler_config makes."""
    grid = dpmpp_grid(request)
    return grid.timesteps, _dpmpp_2m(grid, **_dpmpp_settings(request.config, len(grid.timesteps)))


def _euler(grid: LevelGrid, down: np.ndarray) -> Table:
    """Update coefficients of an Euler step to the levels `down`, and of the noise from there to the grid's."""
    now, then = grid.levels[:-1], grid.levels[1:]
    alpha, sigma = _alpha_sigma(now)
    most = grid.levels.max()
    return {
        "alpha": alpha,
        "sigma": sigma,
        "c_in": alpha,
        "c_x0": np.ones(len(now)),
        "c_eps": down,
        "c_noise": np.sqrt(np.maximum(then**2 - down**2, 0)),
        # the whole schedule's level, but "leading" does not begin at its top: there x is as wide as data plus noise
        "init_noise_sigma": most if grid.spacing != "leading" else np.sqrt(most**2 + 1),
    }


def _dpmpp_2m(grid: LevelGrid, *, order: int, kind: str, euler_at_end: bool) -> Table:
    """Update coefficients of DPM-Solver++(2M), "midpoint" or "heun", on latents x = alpha x_0 + sigma eps.

    With h = log(s / s_next), the step is x' = (sigma'/sigma) x + A x_0 + B (x_0 - x_0 of the step before), where
    A = alpha' (1 - e^-h) = alpha' - alpha sigma'/sigma. Without a step before, B is 0: the first step is DDIM's, and
    so is the last one where `euler_at_end`.
    """
    alpha, sigma = _alpha_sigma(grid.levels)
    ratio = sigma[1:] / sigma[:-1]
    first_order = alpha[1:] - alpha[:-1] * ratio
    correction = np.zeros(len(ratio))
    if order == 2:
        for i in range(1, len(ratio) - 1 if euler_at_end else len(ratio)):
            before, h = np.log(grid.levels[i - 1 : i + 1] / grid.levels[i : i + 2])
            half = first_order[i] / 2 if kind == "midpoint" else alpha[i + 1] + alpha[i + 1] * np.expm1(-h) / h
            correction[i] = half * h / before
    return {
        "alpha": alpha[:-1],
        "sigma": sigma[:-1],
        "c_x0": first_order + correction,
        "c_eps": np.zeros(len(ratio)),
        "c_x": ratio,
        "c_x0_prev": -correction,
        "c_noise": np.zeros(len(ratio)),
    }


def _dpmpp_settings(config: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Read a configuration's settings of the DPM-Solver++ update itself."""
    order = config.get("solver_order") or 2
    if order not in (1, 2):
        raise UserError(f"scheduler_config: solver_order={shown(order)} is not supported by the dpmpp_2m sampler")
    algorithm = config.get("algorithm_type") or "dpmsolver++"
    if algorithm != "dpmsolver++":
        raise UserError(f"scheduler_config: algorithm_type={shown(algorithm)} is not supported by the dpmpp_2m sampler")
    kind = config.get("solver_type") or "midpoint"
    kind = "midpoint" if kind in ("logrho", "bh1", "bh2") else kind  # of DEIS and UniPC files
    require_name("scheduler_config: solver_type", kind, ("midpoint", "heun"))
    lower_order_final = config.get("lower_order_final")
    short = steps < 15 and (lower_order_final is None or bool(lower_order_final))
    ends_clean = (config.get("final_sigmas_type") or "zero") == "zero"
    return {"order": order, "kind": kind, "euler_at_end": bool(config.get("euler_at_final")) or short or ends_clean}


def _alpha_sigma(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """alpha and sigma, alpha^2 + sigma^2 = 1, at these levels."""
    alpha = 1 / np.sqrt(levels**2 + 1)
    return alpha, levels * alpha
