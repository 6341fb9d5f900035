"""Rows of the solvers that step in noise levels s = sigma / alpha: Euler, ancestral Euler, DPM-Solver++(2M)."""

from __future__ import annotations

import numpy as np

from hypersd_jax.diffusion.level_grids import LevelGrid
from hypersd_jax.diffusion.rows import Table


def _at(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """alpha and sigma, alpha^2 + sigma^2 = 1, at these levels."""
    alpha = 1 / np.sqrt(levels**2 + 1)
    return alpha, levels * alpha


def euler_rows(grid: LevelGrid, *, ancestral: bool) -> Table:
    """Euler steps on latents x = x_0 + s eps (arXiv 2206.00364, Algorithm 2 without churn), or with fresh noise.

    The ancestral step goes down to s_down = s_next^2 / s and adds the noise that makes s_next of it.
    """
    now, then = grid.levels[:-1], grid.levels[1:]
    alpha, sigma = _at(now)
    down = then**2 / now if ancestral else then
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


def dpmpp_2m_rows(grid: LevelGrid, *, order: int, kind: str, euler_at_end: bool) -> Table:
    """DPM-Solver++(2M), "midpoint" or "heun" (arXiv 2211.01095, Algorithm 2), on latents x = alpha x_0 + sigma eps.

    With h = log(s / s_next), the step is x' = (sigma'/sigma) x + A x_0 + B (x_0 - x_0 of the step before), where
    A = alpha' (1 - e^-h) = alpha' - alpha sigma'/sigma. Without a step before, B is 0: the first step is DDIM's, and
    so is the last one where `euler_at_end`.
    """
    alpha, sigma = _at(grid.levels)
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
