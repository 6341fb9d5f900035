"""Update coefficients of the solvers that step in timesteps: DDIM, TCD, LCM. Latents are alpha_t x_0 + sigma_t eps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hypersd_jax.diffusion.grids import from_origin, listed, spaced
from hypersd_jax.diffusion.record import Request, Table
from hypersd_jax.errors import UserError, shown


def ddim(request: Request) -> tuple[np.ndarray, Table]:
    """DDIM (arXiv 2010.02502, Eqs. 12 and 16)."""
    schedule, t = request.schedule, _timesteps(request)
    # On a regular grid diffusers steps back by T // n, which is not the next listed timestep unless n divides T. A
    # previous timestep below 0 is the end of the trajectory.
    prev = np.append(t[1:], -1) if request.timesteps is not None else t - schedule.num_train_timesteps // len(t)
    abar = schedule.alphas_cumprod
    now, then = abar[t], np.where(prev >= 0, abar[np.maximum(prev, 0)], schedule.final_alpha_cumprod)
    variance = request.eta**2 * np.maximum((1 - then) / (1 - now) * (1 - now / then), 0)
    return t, {
        **_alpha_sigma(request, t),
        "c_x0": np.sqrt(then),
        "c_eps": np.sqrt(np.maximum(1 - then - variance, 0)),
        "c_noise": np.sqrt(variance),
    }


def tcd(request: Request) -> tuple[np.ndarray, Table]:
    """Strategic stochastic sampling (arXiv 2402.19159): denoise to s = floor((1 - eta) p), re-noise to p.

    p is the next timestep and 0 after the last, where abar_0 is not 1 and nothing is re-noised.
    """
    t, abar = _timesteps(request), request.schedule.alphas_cumprod
    prev = np.append(t[1:], 0)
    # float32, as PyTorch multiplies here: in float64 the floor can fall on the other side of an integer
    s = np.floor(np.float32(1 - request.eta) * prev.astype(np.float32)).astype(np.int64)
    keep = abar[prev] / abar[s]
    keep[-1] = 1.0
    return t, {
        **_alpha_sigma(request, t),
        "c_x0": np.sqrt(keep * abar[s]),
        "c_eps": np.sqrt(keep * (1 - abar[s])),
        "c_noise": np.sqrt(1 - keep),
    }


def lcm(request: Request) -> tuple[np.ndarray, Table]:
    """Multistep consistency sampling of LCM (arXiv 2310.04378): f = c_out x_0 + c_skip x, re-noised to the next t."""
    t = _timesteps(request)
    scaled, sigma_data = t * _timestep_scaling(request.config), 0.5
    c_skip = sigma_data**2 / (scaled**2 + sigma_data**2)
    c_out = scaled / np.sqrt(scaled**2 + sigma_data**2)
    abar = np.append(request.schedule.alphas_cumprod[t[1:]], 1.0)
    return t, {
        **_alpha_sigma(request, t),
        "c_x0": np.sqrt(abar) * c_out,
        "c_eps": np.zeros(len(t)),
        "c_x": np.sqrt(abar) * c_skip,
        "c_noise": np.sqrt(1 - abar),
    }


def _timesteps(request: Request) -> np.ndarray:
    """The caller's own timesteps, else spaced ones, else points of the distillation grid, int64 (n,)."""
    schedule = request.schedule
    if request.timesteps is not None:
        return listed(request.timesteps, request.steps, schedule.num_train_timesteps)
    if request.spacing is not None:
        return np.round(spaced(request.steps, request.spacing, schedule)).astype(np.int64)
    return from_origin(request.steps, request.config, schedule.num_train_timesteps)


def _alpha_sigma(request: Request, t: np.ndarray) -> Table:
    return {"alpha": request.schedule.alpha[t], "sigma": request.schedule.sigma[t]}


def _timestep_scaling(config: Mapping[str, Any]) -> float:
    scaling = config.get("timestep_scaling") or 10.0
    if not isinstance(scaling, int | float) or not 0 < scaling <= float(np.finfo(np.float32).max):
        raise UserError(f"scheduler_config: timestep_scaling must be a positive number, not {shown(scaling)}")
    return float(scaling)
