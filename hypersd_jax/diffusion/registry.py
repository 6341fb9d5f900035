"""The solvers by name, one record each: the one file to change when a solver is added."""

from __future__ import annotations

from typing import Any

from hypersd_jax.diffusion.record import Solver
from hypersd_jax.diffusion.sigma_grids import RESPACINGS
from hypersd_jax.diffusion.sigma_solvers import dpmpp_2m, euler, euler_ancestral
from hypersd_jax.diffusion.timestep_solvers import ddim, lcm, tcd

_LATENT_DIFFUSION_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# In noise levels x_0 is not clamped, and neither flow matching's levels nor DPM-Solver's own spacing is implemented.
_SIGMA_SPACE: dict[str, Any] = {"clip_sample": False, "use_flow_sigmas": False, "use_lu_lambdas": False}
_PLAIN_LEVELS = {"interpolation_type": "linear", "timestep_type": "discrete"}

SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        Solver(
            name="ddim",
            coefficients=ddim,
            webui_name="DDIM",
            has_eta=True,
            webui_eta="Eta DDIM",
            spacing="trailing",
            defaults={"clip_sample": True},
        ),
        Solver(
            name="tcd",
            coefficients=tcd,
            webui_name="TCD",
            has_eta=True,
            spacing=None,
            defaults=_LATENT_DIFFUSION_BETAS,
            refused={"clip_sample": False},
        ),
        Solver(name="lcm", coefficients=lcm, webui_name="LCM", spacing=None, defaults=_LATENT_DIFFUSION_BETAS),
        Solver(name="euler", coefficients=euler, webui_name="Euler", respaces=True, refused=_SIGMA_SPACE),
        Solver(
            name="euler_a",
            coefficients=euler_ancestral,
            webui_name="Euler a",
            refused={
                **_SIGMA_SPACE,
                **dict.fromkeys(RESPACINGS, False),
                **_PLAIN_LEVELS,
                "final_sigmas_type": "zero",
            },
        ),
        Solver(
            name="dpmpp_2m",
            coefficients=dpmpp_2m,
            webui_name="DPM++ 2M",
            respaces=True,
            refused={**_SIGMA_SPACE, **_PLAIN_LEVELS, "variance_type": None},
        ),
    )
}


def register_solver(solver: Solver) -> None:
    """Add a solver, under its own name, to those that every part of the package offers.

    Raises:
        ValueError: another solver has that name.
    """
    if solver.name in SOLVERS:
        raise ValueError(f"there is a solver named {solver.name!r} already")
    SOLVERS[solver.name] = solver
