"""Samplers as tables of update coefficients.

Entry i of each coefficient belongs to step i, which turns the latents x at `timesteps[i]` into the next ones:

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

from hypersd_jax.diffusion.grids import SPACINGS
from hypersd_jax.diffusion.last_steps import last_steps
from hypersd_jax.diffusion.names import require_name
from hypersd_jax.diffusion.record import Request, Solver, Table
from hypersd_jax.diffusion.registry import SOLVERS
from hypersd_jax.diffusion.schedule import Schedule
from hypersd_jax.errors import UserError, short


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
    """Compute the table of update coefficients of a named solver.

    Args:
        name: a key of SOLVERS.
        steps: number of steps n; may be None when `timesteps` is given.
        eta: ddim: share of the DDPM posterior's noise, 0..1 (arXiv 2010.02502, Eq. 16). tcd: stochasticity, 0..1
            (gamma of arXiv 2402.19159). The others have none; euler_a always adds the noise of its own rule.
        spacing: "trailing", "leading" or "linspace"; None means the solver's own (`Solver.spacing`): trailing for ddim,
            n points of the grid of `original_inference_steps` (50) points that the model was distilled on for tcd and
            lcm, and for the others the configuration's `timestep_spacing`, else linspace.
        scheduler_config: the model's scheduler_config.json, of any diffusers class.
        timesteps: explicit timesteps, descending and below T, instead of the spacing.
        strength: above 0, at most 1: the share of the n steps, the last ones, that are left (`last_steps`).

    Returns:
        "timesteps" (n,): int32, or float32 where a solver visits fractional ones.
        "alpha", "sigma", "c_in", "c_x0", "c_eps", "c_x", "c_x0_prev", "c_noise", "clip": float32 (n,), see above.
        "known_x0", "known_noise": float32 (n,), what clean latents and noise are multiplied by to stand at the level
        after the step; 1 and 0 after the last.
        "init_noise_sigma": float32 scalar, by which standard normal latents are multiplied to start from noise alone.
        "start_x0", "start_noise": float32 scalars, by which clean latents and noise are, to start from an image.

    Raises:
        UserError: an unknown name or spacing, a bad step count, eta, timestep list or strength, an unsupported
            configuration.
    """
    solver = SOLVERS[require_name("sampler", name, SOLVERS)]
    if spacing is not None:
        require_name("spacing", spacing, SPACINGS)
    if timesteps is not None and spacing is not None:
        raise UserError("timesteps: give either timesteps or spacing, not both")
    eta = _checked_eta(solver, eta)
    for key, value in solver.refused.items():
        if (scheduler_config.get(key) or value) != value:
            asked = short(scheduler_config[key]).lower()
            raise UserError(f"scheduler_config: {key}={asked} is not supported by the {name} sampler")
    schedule = Schedule.from_config(scheduler_config, solver=name)
    request = Request(
        schedule=schedule,
        config=scheduler_config,
        steps=steps,
        spacing=spacing or solver.spacing_in(scheduler_config),
        timesteps=timesteps,
        eta=eta,
    )
    grid, coefficients = solver.coefficients(request)
    return last_steps(_finished(schedule, grid, coefficients), strength)


def injects_noise(table: Mapping[str, Any]) -> bool:
    """Tell whether any step of a table (of NumPy arrays) adds fresh noise, so that `sample` needs some."""
    return bool(np.any(np.asarray(table["c_noise"]) != 0))


def _finished(schedule: Schedule, grid: np.ndarray, coefficients: Table) -> Table:
    """Complete a table: coefficients that a solver left out, and the scales of noised clean latents."""
    n = len(grid)
    table = {
        "c_in": np.ones(n),
        "c_x": np.zeros(n),
        "c_x0_prev": np.zeros(n),
        "clip": np.full(n, schedule.clip_sample_range if schedule.clip_sample else np.inf),
        "init_noise_sigma": np.ones(()),
        **coefficients,
    }
    clean, noise = table["alpha"] / table["c_in"], table["sigma"] / table["c_in"]
    table |= {"start_x0": clean[0], "start_noise": noise[0]}
    table |= {"known_x0": np.append(clean[1:], 1.0), "known_noise": np.append(noise[1:], 0.0)}
    kind = np.int32 if np.array_equal(grid, np.round(grid)) else np.float32
    return {"timesteps": grid.astype(kind), **{key: np.asarray(value, np.float32) for key, value in table.items()}}


def _checked_eta(solver: Solver, eta: float) -> float:
    value = float(eta)
    if not 0 <= value <= 1:
        raise UserError(f"eta must be in 0..1, not {eta}")
    if value != 0 and not solver.has_eta:
        others = " and ".join(name for name, other in SOLVERS.items() if other.has_eta)
        raise UserError(f"eta={eta}: the {solver.name} sampler has no eta ({others} have)")
    return value
