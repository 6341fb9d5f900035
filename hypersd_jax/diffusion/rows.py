"""Rows of the solvers that step in timesteps: DDIM, TCD and LCM. Latents are x_t = alpha_t x_0 + sigma_t eps."""

from __future__ import annotations

import numpy as np

from hypersd_jax.diffusion.schedule import Schedule

Table = dict[str, np.ndarray]


def ddim_rows(schedule: Schedule, t: np.ndarray, prev: np.ndarray, eta: float) -> Table:
    """DDIM (arXiv 2010.02502, Eqs. 12 and 16); prev < 0 is the end of the trajectory."""
    abar = schedule.alphas_cumprod
    now, then = abar[t], np.where(prev >= 0, abar[np.maximum(prev, 0)], schedule.final_alpha_cumprod)
    variance = eta**2 * np.maximum((1 - then) / (1 - now) * (1 - now / then), 0)
    return {
        "c_x0": np.sqrt(then),
        "c_eps": np.sqrt(np.maximum(1 - then - variance, 0)),
        "c_noise": np.sqrt(variance),
    }


def tcd_rows(schedule: Schedule, t: np.ndarray, eta: float) -> Table:
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


def lcm_rows(schedule: Schedule, t: np.ndarray, timestep_scaling: float) -> Table:
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
