"""The record of a solver: all that the rest of the package needs to know about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hypersd_jax.diffusion.grids import SPACINGS
from hypersd_jax.diffusion.names import require_name

if TYPE_CHECKING:
    from hypersd_jax.diffusion.schedule import Schedule

Table = dict[str, np.ndarray]
"""Update coefficients by name, one for each step; `solvers` lists them."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Inputs of a solver's table.

    Attributes:
        schedule: the model's; keys that its file leaves out are those of `Solver.defaults`.
        config: the model's scheduler_config.json.
        steps: number of steps n; may be None where `timesteps` is given.
        spacing: the caller's, else the solver's own (`Solver.spacing_in`); None for points of the distillation grid.
        timesteps: the caller's own list, instead of a spacing.
        eta: in 0..1, and 0 for a solver that has none.
    """

    schedule: Schedule
    config: Mapping[str, Any]
    steps: int | None
    spacing: str | None
    timesteps: Sequence[int] | None
    eta: float


@dataclass(frozen=True, kw_only=True)
class Solver:
    """A solver. Nothing outside its record and the functions that it names knows it by name.

    Attributes:
        name: what `solver_table`, presets, LoRA headers and the command line call it.
        coefficients: computes the timesteps (n,), float or int, and the update coefficients, float (n,), of a request:
            "alpha", "sigma", "c_x0", "c_eps", "c_noise", and where they are not what `solver_table` fills in (1, 0, 0,
            the schedule's, 1) "c_in", "c_x", "c_x0_prev", "clip" and the scalar "init_noise_sigma".
        webui_name: what AUTOMATIC1111's web UI calls it, for the text inside images.
        has_eta: whether the caller may ask for a share of fresh noise.
        webui_eta: the key under which the web UI states eta.
        spacing: how steps are spaced where the caller gives none: one of SPACINGS; "configured" for the
            `timestep_spacing` of the scheduler_config; None for points of the grid that the model was distilled on.
        respaces: whether it honours the settings of `sigma_grids.RESPACINGS` in the scheduler_config.
        defaults: fields of `Schedule` that diffusers' class of this solver assumes where the scheduler_config is
            silent, and that are not the defaults of `Schedule`.
        refused: keys of the scheduler_config that it has no form for, with the value that asks for nothing.
    """

    name: str
    coefficients: Callable[[Request], tuple[np.ndarray, Table]]
    webui_name: str
    has_eta: bool = False
    webui_eta: str = "Eta"
    spacing: Literal["trailing", "leading", "linspace", "configured"] | None = "configured"
    respaces: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, Any] = field(default_factory=dict)

    def spacing_in(self, config: Mapping[str, Any]) -> str | None:
        """The spacing where the caller gives none, on a model with this scheduler_config."""
        if self.spacing != "configured":
            return self.spacing
        return require_name(
            "scheduler_config: timestep_spacing", config.get("timestep_spacing") or "linspace", SPACINGS
        )
