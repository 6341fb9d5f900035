"""Samplers as tables of coefficients.

Row i of a table says how step i turns the latents x at `timesteps[i]` into the next ones:

    model input  c_in x;   (x_0, eps) from the model output at (alpha, sigma);   x_0 clamped to +-clip
    x  <-  c_x0 x_0 + c_eps eps + c_x x + c_x0_prev x_0(step before) + c_noise z,      z ~ N(0, I)

so one scan (sampling.py) runs every solver, and another eta or timestep list of the same length is only other numbers.
The tables reproduce diffusers' DDIMScheduler, TCDScheduler and LCMScheduler built `from_config` of the same file.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hypersd_jax.diffusion.schedule import Schedule, require_name
from hypersd_jax.errors import UserError

SOLVERS = ("ddim", "tcd", "lcm")
SPACINGS = ("trailing", "leading", "linspace")
Table = dict[str, np.ndarray]


def solver_table(
    name: str,
    steps: int | None,
    *,
    eta: float = 0.0,
    spacing: str | None = None,
    scheduler_config: Mapping[str, Any],
    timesteps: Sequence[int] | None = None,
) -> Table:
    """The coefficient table of a named solver.

    Args:
        name: "ddim", "tcd" or "lcm".
        steps: number of steps n; may be None when `timesteps` is given.
        eta: ddim: share of the DDPM posterior's noise, 0..1 (arXiv 2010.02502, Eq. 16). tcd: stochasticity, 0..1
            (gamma of arXiv 2402.19159). lcm has none.
        spacing: "trailing", "leading" or "linspace"; None means trailing for ddim and, for tcd and lcm, n points of
            the grid of `original_inference_steps` (50) points that the model was distilled on.
        scheduler_config: the model's scheduler_config.json, of any diffusers class.
        timesteps: explicit timesteps, descending and below T, in place of the spacing.

    Returns:
        "timesteps" int32 (n,); float32 (n,) arrays "alpha", "sigma", "c_in", "c_x0", "c_eps", "c_x", "c_x0_prev",
        "c_noise", "clip"; and the float32 scalar "init_noise_sigma", by which standard normal latents are multiplied.

    Raises:
        UserError: an unknown name or spacing, a bad step count, eta or timestep list, an unsupported configuration.
    """
    require_name("sampler", name, SOLVERS)
    if spacing is not None:
        require_name("spacing", spacing, SPACINGS)
    schedule = Schedule.from_config(scheduler_config, solver=name)
    eta = _checked_eta(name, eta)
    if name == "tcd" and schedule.clip_sample:
        raise UserError("scheduler_config: clip_sample=true is not supported by the tcd sampler")
    if timesteps is not None:
        if spacing is not None:
            raise UserError("timesteps: give either timesteps or spacing, not both")
        grid = _checked_timesteps(timesteps, steps, schedule.num_train_timesteps)
    elif name == "ddim" or spacing is not None:
        grid = _spaced_timesteps(steps, spacing or "trailing", schedule)
    else:
        grid = _origin_timesteps(steps, scheduler_config, schedule.num_train_timesteps)

    if name == "ddim":
        # On a regular grid diffusers steps back by T // n, which is not the next listed timestep unless n divides T.
        stride = schedule.num_train_timesteps // len(grid)
        prev = np.append(grid[1:], -1) if timesteps is not None else grid - stride
        rows = _ddim_rows(schedule, grid, prev, eta)
    elif name == "tcd":
        rows = _tcd_rows(schedule, grid, eta)
    else:
        rows = _lcm_rows(schedule, grid, _timestep_scaling(scheduler_config))

    defaults = {
        "alpha": schedule.alpha[grid],
        "sigma": schedule.sigma[grid],
        "c_in": np.ones(len(grid)),
        "c_x": np.zeros(len(grid)),
        "c_x0_prev": np.zeros(len(grid)),
        "clip": np.full(len(grid), schedule.clip_sample_range if schedule.clip_sample else np.inf),
        "init_noise_sigma": np.ones(()),
    }
    table = {key: np.asarray(value, np.float32) for key, value in {**defaults, **rows}.items()}
    return {"timesteps": grid.astype(np.int32), **table}


def injects_noise(table: Mapping[str, Any]) -> bool:
    """Whether any step of a table (of NumPy arrays) adds fresh noise, so that `sample` needs some."""
    return bool(np.any(np.asarray(table["c_noise"]) != 0))


def _ddim_rows(schedule: Schedule, t: np.ndarray, prev: np.ndarray, eta: float) -> Table:
    """DDIM (arXiv 2010.02502, Eqs. 12 and 16); prev < 0 is the end of the trajectory."""
    abar = schedule.alphas_cumprod
    now, then = abar[t], np.where(prev >= 0, abar[np.maximum(prev, 0)], schedule.final_alpha_cumprod)
    variance = eta**2 * np.maximum((1 - then) / (1 - now) * (1 - now / then), 0)
    return {
        "c_x0": np.sqrt(then),
        "c_eps": np.sqrt(np.maximum(1 - then - variance, 0)),
        "c_noise": np.sqrt(variance),
    }


def _tcd_rows(schedule: Schedule, t: np.ndarray, eta: float) -> Table:
    """Strategic stochastic sampling (arXiv 2402.19159): denoise to s = floor((1 - eta) p), re-noise to p.

    p is the next timestep and 0 after the last, where abar_0 is not 1 and nothing is re-noised.
    """
    abar = schedule.alphas_cumprod
    prev = np.append(t[1:], 0)
    # float32, as PyTorch multiplies here: in float64 the floor can fall on the other side of an integer
    s = np.floor(np.float32(1 - eta) * prev.astype(np.float32)).astype(np.int64)
    keep = abar[prev] / abar[s]
    keep[-1] = 1.0
    return {
        "c_x0": np.sqrt(keep * abar[s]),
        "c_eps": np.sqrt(keep * (1 - abar[s])),
        "c_noise": np.sqrt(1 - keep),
    }


def _lcm_rows(schedule: Schedule, t: np.ndarray, timestep_scaling: float) -> Table:
    """Multistep consistency sampling of LCM (arXiv 2310.04378): f = c_out x_0 + c_skip x, re-noised to the next t."""
    scaled, sigma_data = t * timestep_scaling, 0.5
    c_skip = sigma_data**2 / (scaled**2 + sigma_data**2)
    c_out = scaled / np.sqrt(scaled**2 + sigma_data**2)
    abar = np.append(schedule.alphas_cumprod[t[1:]], 1.0)
    return {
        "c_x0": np.sqrt(abar) * c_out,
        "c_eps": np.zeros(len(t)),
        "c_x": np.sqrt(abar) * c_skip,
        "c_noise": np.sqrt(1 - abar),
    }


def _spaced_timesteps(steps: int | None, spacing: str, schedule: Schedule) -> np.ndarray:
    """Descending timesteps over the whole schedule (arXiv 2305.08891, Table 2)."""
    total = schedule.num_train_timesteps
    n = _checked_steps(steps, total, "num_train_timesteps")
    if spacing == "trailing":
        # for some n the accumulated rounding of arange yields an n+1-st point, below zero
        return np.round(np.arange(total, 0, -total / n))[:n].astype(np.int64) - 1
    if spacing == "linspace":
        return np.round(np.linspace(0, total - 1, n))[::-1].astype(np.int64)
    grid = np.arange(n)[::-1] * (total // n) + schedule.steps_offset
    if grid[0] >= total or grid[-1] < 0:
        raise UserError(f"scheduler_config: steps_offset={schedule.steps_offset} leaves the schedule with {n} steps")
    return grid


def _origin_timesteps(steps: int | None, config: Mapping[str, Any], total: int) -> np.ndarray:
    """n points, evenly spaced in index, of the distillation grid k-1, 2k-1, ..., with k = T // origin."""
    origin = config.get("original_inference_steps") or 50
    if not isinstance(origin, int) or not 1 <= origin <= total:
        raise UserError(f"scheduler_config: original_inference_steps must be in 1..{total}, not {origin!r}")
    n = _checked_steps(steps, origin, "original_inference_steps")
    grid = np.arange(origin, 0, -1) * (total // origin) - 1
    return grid[np.floor(np.linspace(0, origin, n, endpoint=False)).astype(np.int64)]


def _timestep_scaling(config: Mapping[str, Any]) -> float:
    scaling = config.get("timestep_scaling") or 10.0
    if not isinstance(scaling, int | float) or not 0 < scaling < float("inf"):
        raise UserError(f"scheduler_config: timestep_scaling must be a positive number, not {scaling!r}")
    return float(scaling)


def _checked_steps(steps: int | None, most: int, limit: str) -> int:
    if steps is None or isinstance(steps, bool) or not hasattr(steps, "__index__"):
        raise UserError(f"steps must be an integer, not {steps!r}")
    n = operator.index(steps)
    if not 1 <= n <= most:
        raise UserError(f"steps must be in 1..{most} ({limit}), not {n}")
    return n


def _checked_timesteps(timesteps: Sequence[int], steps: int | None, total: int) -> np.ndarray:
    try:
        grid = np.asarray([operator.index(t) for t in timesteps], np.int64)
    except TypeError:
        raise UserError(f"timesteps must be a list of integers, not {timesteps!r}") from None
    if len(grid) == 0 or (steps is not None and steps != len(grid)):
        raise UserError(f"timesteps has {len(grid)} values for steps={steps}")
    if np.max(grid) >= total or np.min(grid) < 0:
        raise UserError(f"timesteps must lie in 0..{total - 1}, got {grid.tolist()}")
    if np.any(np.diff(grid) >= 0):
        raise UserError(f"timesteps must be strictly descending, got {grid.tolist()}")
    return grid


def _checked_eta(name: str, eta: float) -> float:
    value = float(eta)
    if not 0 <= value <= 1:
        raise UserError(f"eta must be in 0..1, not {eta}")
    if name == "lcm" and value != 0:
        raise UserError(f"eta={eta}: the lcm sampler has no eta, it re-noises fully at each step")
    return value
