"""The noise levels that sigma-space solvers visit, and their timesteps: the grids of Euler and of DPM-Solver++.

A noise level is s_t = sigma_t / alpha_t, the "sigma" of arXiv 2206.00364 and of a scheduler_config.json.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hypersd_jax.diffusion.grids import checked_steps, listed, spaced
from hypersd_jax.diffusion.names import require_name
from hypersd_jax.diffusion.record import Request
from hypersd_jax.errors import UserError, shown

if TYPE_CHECKING:
    from hypersd_jax.diffusion.schedule import Schedule

RESPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LevelGrid:
    """n steps between n + 1 levels.

    Attributes:
        timesteps: float64 (n,), the network's input at each step; may be fractional.
        levels: float64 (n + 1,), the level before each step and, last, after all.
        spacing: the spacing that the solver is set to, also where it did not make the grid.
    """

    timesteps: np.ndarray
    levels: np.ndarray
    spacing: str


def schedule_levels(schedule: Schedule) -> np.ndarray:
    """s_t at every timestep, ascending, (T,), in the float32 that diffusers has: some grids round or floor by it.

    At zero terminal SNR, where the level is infinite, the last abar is 2^-24, the level 4096, as in diffusers.
    """
    abar = schedule.alphas_cumprod.astype(np.float32)
    if schedule.rescale_betas_zero_snr:
        abar[-1] = 2**-24
    if not np.all(abar > 0):
        raise UserError("scheduler_config: the betas leave abar = 0 in float32, a noise level without end")
    if not np.all(abar < 1):
        raise UserError("scheduler_config: the betas are too small to make any noise in float32")
    return np.sqrt((1 - abar) / abar)


def euler_grid(request: Request) -> LevelGrid:
    """The grid of diffusers' EulerDiscreteScheduler; timesteps of "linspace" and of respaced levels are fractional."""
    schedule, config, timesteps, spacing = request.schedule, request.config, request.timesteps, str(request.spacing)
    total, every = schedule.num_train_timesteps, schedule_levels(schedule)
    if timesteps is not None:
        grid = listed(timesteps, request.steps, total).astype(np.float64)
    else:
        grid = spaced(request.steps, spacing, schedule)
    n, how = len(grid), _respacing(config, timesteps)
    interpolation = require_name(
        "scheduler_config: interpolation_type", config.get("interpolation_type") or "linear", ("linear", "log_linear")
    )
    if interpolation == "linear":
        levels = np.interp(grid, np.arange(total), every)
    else:
        levels = np.exp(np.linspace(np.log(every[-1]), np.log(every[0]), n + 1))
    if how is not None:
        levels = _respaced(how, levels[0], levels[-1], n, config)
        grid = _to_timesteps(levels, every)
    levels = np.append(levels, _last_level(config, every))[: n + 1]
    if config.get("timestep_type") == "continuous" and schedule.prediction_type == "v_prediction":
        if timesteps is not None:
            raise UserError("timesteps cannot be given: scheduler_config says timestep_type=continuous")
        grid = 0.25 * np.log(levels[:-1])
    return LevelGrid(timesteps=grid, levels=levels, spacing=spacing)


def dpmpp_grid(request: Request) -> LevelGrid:
    """The grid of diffusers' DPMSolverMultistepScheduler: n of n + 1 spaced points, whole timesteps throughout."""
    schedule, config, timesteps, spacing = request.schedule, request.config, request.timesteps, str(request.spacing)
    total, every = schedule.num_train_timesteps, schedule_levels(schedule)
    how = _respacing(config, timesteps)
    if timesteps is not None:
        grid = listed(timesteps, request.steps, total)
    else:
        lowest = _number(config, "lambda_min_clipped", -np.inf)
        reach = total - int(np.searchsorted(-np.log(every[::-1]), lowest))  # lambda = -log s, clipped from below
        n = checked_steps(request.steps, total, "num_train_timesteps")
        if spacing == "linspace":
            grid = np.round(np.linspace(0, reach - 1, n + 1))[::-1][:-1]
        elif spacing == "leading":
            grid = np.arange(n, 0, -1) * (reach // (n + 1)) + schedule.steps_offset
        else:
            grid = np.round(np.arange(reach, 0, -total / n))[:n] - 1
        if len(grid) == 0 or np.any(np.diff(grid) >= 0) or grid[0] >= total or grid[-1] < 0:
            raise UserError(f"steps={n} is more than the dpmpp_2m sampler's {spacing} spacing has room for")
    grid = grid.astype(np.int64)
    if how is None:
        levels = every[grid]
    else:
        levels = _respaced(how, every[-1], every[0], len(grid), config)
        found = _to_timesteps(levels, every)
        if how == "use_karras_sigmas" and schedule.beta_schedule != "squaredcos_cap_v2":
            found = np.round(found)
        grid = np.floor(found)
    levels = np.append(levels, _last_level(config, every))
    return LevelGrid(timesteps=grid.astype(np.float64), levels=levels, spacing=spacing)


def _respacing(config: Mapping[str, Any], timesteps: Sequence[int] | None) -> str | None:
    """The one of RESPACINGS that the configuration asks for."""
    asked = [key for key in RESPACINGS if config.get(key)]
    if len(asked) > 1:
        raise UserError(f"scheduler_config: only one of {', '.join(asked)} can be true")
    if asked and timesteps is not None:
        raise UserError(f"timesteps cannot be given: scheduler_config says {asked[0]}=true")
    return asked[0] if asked else None


def _respaced(how: str, high: float, low: float, n: int, config: Mapping[str, Any]) -> np.ndarray:
    """n levels, high to low: arXiv 2206.00364 Eq. 5 with rho = 7, log-linear, or Beta(0.6, 0.6) of 2407.12173."""
    high, low = _number(config, "sigma_max", high), _number(config, "sigma_min", low)
    if not 0 < low <= high < np.inf:
        raise UserError(f"scheduler_config: sigma_min={low:g} must be positive and at most sigma_max={high:g}")
    ramp = np.linspace(0, 1, n)
    if how == "use_karras_sigmas":
        return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    if how == "use_exponential_sigmas":
        return np.exp(np.linspace(np.log(high), np.log(low), n))
    from scipy.special import betaincinv  # longer to import than NumPy, and seldom asked for

    return low + betaincinv(0.6, 0.6, 1 - ramp) * (high - low)


def _to_timesteps(levels: np.ndarray, every: np.ndarray) -> np.ndarray:
    """Fractional timesteps at which the schedule has these levels, linear in log s and clipped to 0..T-1."""
    return np.interp(np.log(levels), np.log(every), np.arange(len(every)))


def _last_level(config: Mapping[str, Any], every: np.ndarray) -> float:
    end = require_name(
        "scheduler_config: final_sigmas_type", config.get("final_sigmas_type") or "zero", ("zero", "sigma_min")
    )
    return 0.0 if end == "zero" else float(every[0])


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key)
    if value is None:
        return float(default)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = np.nan
    if np.isnan(number):
        raise UserError(f"scheduler_config: {key} has the unreadable value {shown(value)}")
    return number
