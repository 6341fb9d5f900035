"""The mathematics of sampling: schedule, prediction types, solver tables, guidance, the scan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypersd_jax.diffusion.grids import SPACINGS as SPACINGS
from hypersd_jax.diffusion.parts import last_part as last_part
from hypersd_jax.diffusion.parts import noise_range as noise_range
from hypersd_jax.diffusion.record import Request as Request
from hypersd_jax.diffusion.record import Solver as Solver
from hypersd_jax.diffusion.registry import SOLVERS as SOLVERS
from hypersd_jax.diffusion.registry import register_solver as register_solver
from hypersd_jax.diffusion.schedule import PREDICTION_TYPES as PREDICTION_TYPES
from hypersd_jax.diffusion.schedule import Schedule as Schedule
from hypersd_jax.diffusion.solvers import injects_noise as injects_noise
from hypersd_jax.diffusion.solvers import solver_table as solver_table
from hypersd_jax.lazy import lazily

if TYPE_CHECKING:
    from hypersd_jax.diffusion.guidance import guided as guided
    from hypersd_jax.diffusion.prediction import add_noise as add_noise
    from hypersd_jax.diffusion.prediction import from_x0_eps as from_x0_eps
    from hypersd_jax.diffusion.prediction import to_x0_eps as to_x0_eps
    from hypersd_jax.diffusion.sampling import Known as Known
    from hypersd_jax.diffusion.sampling import State as State
    from hypersd_jax.diffusion.sampling import advance as advance
    from hypersd_jax.diffusion.sampling import begin as begin
    from hypersd_jax.diffusion.sampling import sample as sample

# What computes with JAX, which the command line does not wait for when it checks a solver's name.
__getattr__ = lazily(
    __name__,
    {
        "guided": "guidance",
        **dict.fromkeys(("from_x0_eps", "add_noise", "to_x0_eps"), "prediction"),
        **dict.fromkeys(("Known", "State", "advance", "begin", "sample"), "sampling"),
    },
)
