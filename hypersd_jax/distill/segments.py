"""Trajectory segments of TSCD, on solver indices."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hypersd_jax.errors import UserError


def segment_bounds(N: int, k: int, T: int = 1000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the start, teacher-step and boundary timesteps of N solver starts on a trajectory of k segments.

    The grid is g_j = (j + 1) T / N - 1. Hyper-SD's Eq. 11 computes the boundary t_b on timesteps, which puts it above
    t_prev for some starts of every practical grid; on indices t_b <= t_prev always holds, and the boundaries of N = 40
    are the timesteps that a DDIM "trailing" sampler of k steps visits.

    Args:
        N: solver points (the paper's NList); divides T.
        k: segments; divides N.
        T: training timesteps.

    Returns:
        (t_n, t_prev, t_b), int64 arrays (N,), with t_b <= t_prev < t_n. Index 0 of the schedule stands for the end of
        the trajectory, so N = T has one start, t_n = 0, without room: there all three are 0 and the loss is zero.

    Raises:
        UserError: unless k divides N and N divides T.
    """
    if N < 1 or T % N:
        raise UserError(f"solver_steps: N = {N} must divide the {T} training timesteps")
    if k < 1 or N % k:
        raise UserError(f"k: the number of segments, {k}, must divide solver_steps = {N}")
    grid = np.arange(1, N + 1, dtype=np.int64) * (T // N) - 1
    first = np.arange(N) * k // N * (N // k)  # the first start of each start's segment
    before = np.concatenate([np.zeros(1, np.int64), grid])  # before[j] is g_{j-1}, and 0 for j = 0
    return grid, before[:-1], before[first]


class Segments(NamedTuple):
    """`segment_bounds` as int32 arrays (length,), padded so that stages with other N and k share one compiled step."""

    t_n: Any  # the starts on the solver grid, rising
    t_prev: Any  # one solver step further
    t_b: Any  # the end of each start's segment
    t_top: Any  # the last start of each start's segment
    size: Any  # (), N: how many are drawn from


def pad_segments(N: int, k: int, length: int, T: int = 1000) -> Segments:
    """Pad the segments of `segment_bounds` to arrays of a fixed length.

    Raises:
        UserError: as `segment_bounds`, or N > length.
    """
    if length < N:
        raise UserError(f"solver_steps: N = {N} exceeds the padded length {length}")
    t_n, t_prev, t_b = segment_bounds(N, k, T)
    t_top = t_n.reshape(k, N // k)[:, -1:].repeat(N // k, axis=1).reshape(-1)
    padded = (np.pad(each, (0, length - N), mode="edge") for each in (t_n, t_prev, t_b, t_top))
    return Segments(*(np.asarray(each, np.int32) for each in (*padded, N)))
