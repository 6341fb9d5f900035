"""Samplers as tables of coefficients.

Row i of a table says how step i turns the latents x at `timesteps[i]` into the next ones:

    model input  c_in x = alpha x_0 + sigma eps;   (x_0, eps) from the model output;   x_0 clamped to +-clip
    x  <-  c_x0 x_0 + c_eps eps + c_x x + c_x0_prev x_0(step before) + c_noise z,      z ~ N(0, I)

so one scan (sampling.py) runs every solver, and another eta or timestep list of the same length is only other numbers.
The tables reproduce diffusers' DDIM, TCD, LCM, EulerDiscrete, EulerAncestralDiscrete and DPMSolverMultistep schedulers
built `from_config` of the same file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hypersd_jax.diffusion.grids import SPACINGS, from_origin, listed, spaced
from hypersd_jax.diffusion.level_grids import RESPACINGS, dpmpp_grid, euler_grid
from hypersd_jax.diffusion.level_rows import dpmpp_2m_rows, euler_rows
from hypersd_jax.diffusion.parts import last_part
from hypersd_jax.diffusion.rows import Table, ddim_rows, lcm_rows, tcd_rows
from hypersd_jax.diffusion.schedule import Schedule, require_name
from hypersd_jax.errors import UserError, short, shown

SOLVERS = ("ddim", "tcd", "lcm", "euler", "euler_a", "dpmpp_2m")
WITH_ETA = ("ddim", "tcd")

# What a file may say that a solver has no form for, with the value that means nothing is asked.
_LEVELS_ONLY: dict[str, Any] = {"clip_sample": False, "use_flow_sigmas": False, "use_lu_lambdas": False}
_REFUSED: dict[str, dict[str, Any]] = {
    "tcd": {"clip_sample": False},
    "euler": _LEVELS_ONLY,
    "euler_a": {
        **_LEVELS_ONLY,
        **dict.fromkeys(RESPACINGS, False),
        "interpolation_type": "linear",
        "timestep_type": "discrete",
        "final_sigmas_type": "zero",
    },
    "dpmpp_2m": {
        **_LEVELS_ONLY,
        "interpolation_type": "linear",
        "timestep_type": "discrete",
        "variance_type": None,
    },
}


def solver_table(
    name: str,
    steps: int | None,
    *,
    eta: float = 0.0,
    spacing: str | None = None,
    scheduler_config: Mapping[str, Any],
    timesteps: Sequence[int] | None = None,
    strength: float = 1.0,
) -> Table:
    """The coefficient table of a named solver.

    Args:
        name: one of SOLVERS.
        steps: number of steps n; may be None when `timesteps` is given.
        eta: ddim: share of the DDPM posterior's noise, 0..1 (arXiv 2010.02502, Eq. 16). tcd: stochasticity, 0..1
            (gamma of arXiv 2402.19159). The others have none; euler_a always adds the noise of its own rule.
        spacing: "trailing", "leading" or "linspace"; None means trailing for ddim, n points of the grid of
            `original_inference_steps` (50) points that the model was distilled on for tcd and lcm, and for the others
            the configuration's `timestep_spacing`, else linspace.
        scheduler_config: the model's scheduler_config.json, of any diffusers class.
        timesteps: explicit timesteps, descending and below T, in place of the spacing.
        strength: above 0, at most 1: the share of the n steps, the last ones, that are left (`parts.last_part`).

    Returns:
        "timesteps" (n,): int32, or float32 where a solver visits fractional ones.
        "alpha", "sigma", "c_in", "c_x0", "c_eps", "c_x", "c_x0_prev", "c_noise", "clip": float32 (n,), see above.
        "known_x0", "known_noise": float32 (n,), what clean latents and noise are multiplied by to stand at the level
        after the step; 1 and 0 after the last.
        "init_noise_sigma": float32 scalar, by which standard normal latents are multiplied to start from noise alone.
        "start_x0", "start_noise": float32 scalars, by which clean latents and noise are, to start from a picture.

    Raises:
        UserError: an unknown name or spacing, a bad step count, eta, timestep list or strength, an unsupported
            configuration.
    """
    require_name("sampler", name, SOLVERS)
    if spacing is not None:
        require_name("spacing", spacing, SPACINGS)
    if timesteps is not None and spacing is not None:
        raise UserError("timesteps: give either timesteps or spacing, not both")
    eta = _checked_eta(name, eta)
    for key, value in _REFUSED.get(name, {}).items():
        if (scheduler_config.get(key) or value) != value:
            asked = short(scheduler_config[key]).lower()
            raise UserError(f"scheduler_config: {key}={asked} is not supported by the {name} sampler")
    schedule = Schedule.from_config(scheduler_config, solver=name)
    if name in ("euler", "euler_a"):
        levels = euler_grid(schedule, scheduler_config, steps, spacing, timesteps)
        grid, rows = levels.timesteps, euler_rows(levels, ancestral=name == "euler_a")
    elif name == "dpmpp_2m":
        levels = dpmpp_grid(schedule, scheduler_config, steps, spacing, timesteps)
        grid, rows = levels.timesteps, dpmpp_2m_rows(levels, **_dpmpp_settings(scheduler_config, len(levels.timesteps)))
    else:
        grid, rows = _by_timestep(name, schedule, scheduler_config, steps, eta, spacing, timesteps)
    return last_part(_finished(schedule, grid, rows), strength)


def injects_noise(table: Mapping[str, Any]) -> bool:
    """Whether any step of a table (of NumPy arrays) adds fresh noise, so that `sample` needs some."""
    return bool(np.any(np.asarray(table["c_noise"]) != 0))


def _by_timestep(
    name: str,
    schedule: Schedule,
    config: Mapping[str, Any],
    steps: int | None,
    eta: float,
    spacing: str | None,
    timesteps: Sequence[int] | None,
) -> tuple[np.ndarray, Table]:
    """Timesteps and rows of ddim, tcd and lcm."""
    total = schedule.num_train_timesteps
    if timesteps is not None:
        grid = listed(timesteps, steps, total)
    elif name == "ddim" or spacing is not None:
        grid = np.round(spaced(steps, spacing or "trailing", schedule)).astype(np.int64)
    else:
        grid = from_origin(steps, config, total)
    if name == "ddim":
        # On a regular grid diffusers steps back by T // n, which is not the next listed timestep unless n divides T.
        prev = np.append(grid[1:], -1) if timesteps is not None else grid - total // len(grid)
        rows = ddim_rows(schedule, grid, prev, eta)
    elif name == "tcd":
        rows = tcd_rows(schedule, grid, eta)
    else:
        rows = lcm_rows(schedule, grid, _timestep_scaling(config))
    return grid, {"alpha": schedule.alpha[grid], "sigma": schedule.sigma[grid], **rows}


def _finished(schedule: Schedule, grid: np.ndarray, rows: Table) -> Table:
    """The whole table: columns that a solver left out, and the scales of noised clean latents."""
    n = len(grid)
    rows = {
        "c_in": np.ones(n),
        "c_x": np.zeros(n),
        "c_x0_prev": np.zeros(n),
        "clip": np.full(n, schedule.clip_sample_range if schedule.clip_sample else np.inf),
        "init_noise_sigma": np.ones(()),
        **rows,
    }
    clean, noise = rows["alpha"] / rows["c_in"], rows["sigma"] / rows["c_in"]
    rows |= {"start_x0": clean[0], "start_noise": noise[0]}
    rows |= {"known_x0": np.append(clean[1:], 1.0), "known_noise": np.append(noise[1:], 0.0)}
    kind = np.int32 if np.array_equal(grid, np.round(grid)) else np.float32
    return {"timesteps": grid.astype(kind), **{key: np.asarray(value, np.float32) for key, value in rows.items()}}


def _dpmpp_settings(config: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """What a configuration says of the DPM-Solver++ update itself."""
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


def _timestep_scaling(config: Mapping[str, Any]) -> float:
    scaling = config.get("timestep_scaling") or 10.0
    if not isinstance(scaling, int | float) or not 0 < scaling <= float(np.finfo(np.float32).max):
        raise UserError(f"scheduler_config: timestep_scaling must be a positive number, not {shown(scaling)}")
    return float(scaling)


def _checked_eta(name: str, eta: float) -> float:
    value = float(eta)
    if not 0 <= value <= 1:
        raise UserError(f"eta must be in 0..1, not {eta}")
    if name not in WITH_ETA and value != 0:
        raise UserError(f"eta={eta}: the {name} sampler has no eta ({' and '.join(WITH_ETA)} have)")
    return value
