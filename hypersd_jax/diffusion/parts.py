"""Parts of a solver's table: the last steps for image to image, a range of noise for two models in turn."""

from __future__ import annotations

import numpy as np

from hypersd_jax.diffusion.record import Table
from hypersd_jax.errors import UserError


def last_part(table: Table, strength: float) -> Table:
    """The last int(n * strength) of a table's n steps, as diffusers' image-to-image pipelines take them.

    Its "start_x0" and "start_noise" noise the clean latents to the level of the first step that is left.

    Raises:
        UserError: strength is not above 0 and at most 1, or leaves no step.
    """
    steps = len(table["timesteps"])
    if not 0 < strength <= 1:
        raise UserError(f"strength must be above 0 and at most 1, not {strength}")
    left = min(int(steps * strength), steps)
    if left < 1:
        raise UserError(f"strength={strength} of {steps} steps leaves none")
    return _from_row(table, steps - left)


def noise_range(
    table: Table, *, start: float | None = None, end: float | None = None, num_train_timesteps: int
) -> Table:
    """The steps of one of two models that denoise in turn: SDXL's base up to `end`, its refiner from `start`.

    Args:
        table: of the whole trajectory.
        start: share of the trajectory, 0..1, that has been walked already; the latents are then taken as they are.
        end: share at which to stop.
        num_train_timesteps: T.

    Raises:
        UserError: a share out of range, or no step between them.
    """
    timesteps = np.asarray(table["timesteps"])
    for name, share in (("denoising_start", start), ("denoising_end", end)):
        if share is not None and not 0 < share < 1:
            raise UserError(f"{name} must be between 0 and 1, not {share}")
    first, last = 0, len(timesteps)
    if start is not None:
        first = int(np.sum(timesteps >= round(num_train_timesteps - start * num_train_timesteps)))
    if end is not None:
        last = int(np.sum(timesteps >= round(num_train_timesteps - end * num_train_timesteps)))
    if first >= last:
        raise UserError(f"no step of {len(timesteps)} lies between denoising_start={start} and denoising_end={end}")
    part = {key: value if value.ndim == 0 else value[:last] for key, value in table.items()}
    if start is not None:
        part["init_noise_sigma"] = np.ones((), np.float32)
    return _from_row(part, first)


def _from_row(table: Table, first: int) -> Table:
    """The rows from `first` on. The new first step has none before it: what it took from there it takes from itself."""
    if first == 0:
        return table
    part = {key: value if value.ndim == 0 else value[first:].copy() for key, value in table.items()}
    part["c_x0"][0] += part["c_x0_prev"][0]
    part["c_x0_prev"][0] = 0
    part["start_x0"], part["start_noise"] = table["known_x0"][first - 1], table["known_noise"][first - 1]
    return part
