"""The last steps of a solver's table, for image to image."""

from __future__ import annotations

from hypersd_jax.diffusion.record import Table
from hypersd_jax.errors import UserError


def last_steps(table: Table, strength: float) -> Table:
    """Keep the last int(n * strength) of a table's n steps, as diffusers' image-to-image pipelines do.

    "start_x0" and "start_noise" then noise clean latents to the level of the first step that is left. That step has
    none before it: what it took of the estimate before, it takes of its own.

    Raises:
        UserError: strength is not above 0 and at most 1, or leaves no step.
    """
    steps = len(table["timesteps"])
    if not 0 < strength <= 1:
        raise UserError(f"strength must be above 0 and at most 1, not {strength}")
    left = min(int(steps * strength), steps)
    if left < 1:
        raise UserError(f"strength={strength} of {steps} steps leaves none")
    first = steps - left
    if first == 0:
        return table
    kept = {key: value if value.ndim == 0 else value[first:].copy() for key, value in table.items()}
    kept["c_x0"][0] += kept["c_x0_prev"][0]
    kept["c_x0_prev"][0] = 0
    kept["start_x0"], kept["start_noise"] = table["known_x0"][first - 1], table["known_noise"][first - 1]
    return kept
