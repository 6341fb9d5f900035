"""Integer timesteps of a sampler: spaced over the schedule, picked from the distillation grid, or listed."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hypersd_jax.errors import UserError, shown

if TYPE_CHECKING:
    from hypersd_jax.diffusion.schedule import Schedule

SPACINGS = ("trailing", "leading", "linspace")
# Points of the grid that LCM, TCD and their successors are distilled on, where nothing says otherwise.
ORIGINAL_STEPS = 50


def spaced(steps: int | None, spacing: str, schedule: Schedule) -> np.ndarray:
    """n descending timesteps over the whole schedule (arXiv 2305.08891, Table 2), float64 (n,).

    Those of "linspace" are not rounded. One point of "linspace" is timestep 0, as in diffusers.
    """
    total = schedule.num_train_timesteps
    n = checked_steps(steps, total, "num_train_timesteps")
    if spacing == "trailing":
        # for some n the accumulated rounding of arange yields an n+1-st point, below zero
        return np.round(np.arange(total, 0, -total / n))[:n] - 1
    if spacing == "linspace":
        return np.linspace(0, total - 1, n)[::-1]
    grid = np.arange(n, dtype=np.float64)[::-1] * (total // n) + schedule.steps_offset
    if grid[0] >= total or grid[-1] < 0:
        raise UserError(f"scheduler_config: steps_offset={schedule.steps_offset} leaves the schedule with {n} steps")
    return grid


def from_origin(steps: int | None, config: Mapping[str, Any], total: int) -> np.ndarray:
    """n points, evenly spaced in index, of the distillation grid k-1, 2k-1, ..., with k = T // origin; int64 (n,)."""
    origin = config.get("original_inference_steps") or ORIGINAL_STEPS
    if not isinstance(origin, int) or not 1 <= origin <= total:
        raise UserError(f"scheduler_config: original_inference_steps must be in 1..{total}, not {shown(origin)}")
    n = checked_steps(steps, origin, "original_inference_steps")
    grid = np.arange(origin, 0, -1) * (total // origin) - 1
    return grid[np.floor(np.linspace(0, origin, n, endpoint=False)).astype(np.int64)]


def listed(timesteps: Sequence[int], steps: int | None, total: int) -> np.ndarray:
    """The caller's own timesteps, int64 (n,); a `UserError` unless they descend strictly within 0..T-1."""
    try:
        grid = np.asarray([operator.index(t) for t in timesteps], np.int64)
    except (TypeError, OverflowError):
        raise UserError(f"timesteps must be a list of integers, not {shown(timesteps)}") from None
    if len(grid) == 0 or (steps is not None and steps != len(grid)):
        raise UserError(f"timesteps has {len(grid)} values for steps={steps}")
    if np.max(grid) >= total or np.min(grid) < 0:
        raise UserError(f"timesteps must lie in 0..{total - 1}, got {shown(grid.tolist())}")
    if np.any(np.diff(grid) >= 0):
        raise UserError(f"timesteps must be strictly descending, got {shown(grid.tolist())}")
    return grid


def checked_steps(steps: int | None, most: int, limit: str) -> int:
    """`steps` as an int in 1..most; else a `UserError` that says what sets the limit."""
    n = whole_steps(steps)
    if not 1 <= n <= most:
        raise UserError(f"steps must be in 1..{most} ({limit}), not {n}")
    return n


def whole_steps(steps: int | None) -> int:
    """`steps` as an int; else a `UserError`."""
    if steps is None or isinstance(steps, bool) or not hasattr(steps, "__index__"):
        raise UserError(f"steps must be an integer, not {shown(steps)}")
    return operator.index(steps)
