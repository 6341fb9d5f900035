"""Segments on solver indices."""

from __future__ import annotations

import numpy as np
import pytest

from hypersd_jax.diffusion import solver_table
from hypersd_jax.distill import Segments, pad_segments, segment_bounds
from hypersd_jax.errors import UserError

VALID = [(N, k) for N in (8, 40, 50, 100, 200, 250, 500, 1000) for k in (1, 2, 4, 8) if N % k == 0]


def test_golden_table_of_40_points_in_8_segments():
    t_n, t_prev, t_b = segment_bounds(40, 8)
    assert t_n[:6].tolist() == [24, 49, 74, 99, 124, 149]
    assert t_prev[:6].tolist() == [0, 24, 49, 74, 99, 124]
    assert t_b[:11].tolist() == [0] * 5 + [124] * 5 + [249]
    assert t_n[-1] == 999
    assert t_b[-1] == 874


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_edges_are_the_trailing_grid(k):
    t_n, _, t_b = segment_bounds(40, k)
    config = {"num_train_timesteps": 1000}
    assert sorted({999, *t_b.tolist()} - {0}) == sorted(
        solver_table("ddim", k, scheduler_config=config)["timesteps"].tolist()
    )
    assert set(t_b.tolist()) - {0} <= set(t_n.tolist())


def test_50_points_are_the_grid_that_tcd_samples_on():
    t_n, t_prev, t_b = segment_bounds(50, 1)
    assert t_n.tolist() == list(range(19, 1000, 20))
    assert t_prev.tolist() == [0, *range(19, 980, 20)]
    assert not t_b.any()
    assert segment_bounds(50, 2)[2].tolist() == [0] * 25 + [499] * 25


@pytest.mark.parametrize(("N", "k"), VALID)
def test_order(N, k):
    t_n, t_prev, t_b = segment_bounds(N, k)
    assert len(t_n) == len(t_prev) == len(t_b) == N
    assert np.all(t_b <= t_prev)
    inner = slice(1, None) if N == 1000 else slice(None)  # N = T: g_0 = 0 has nowhere to go
    assert np.all(t_prev[inner] < t_n[inner])
    assert np.unique(t_b).size == k


def test_other_lengths_of_the_schedule():
    t_n, _, t_b = segment_bounds(8, 4, T=16)
    assert t_n.tolist() == [1, 3, 5, 7, 9, 11, 13, 15]
    assert t_b.tolist() == [0, 0, 3, 3, 7, 7, 11, 11]


@pytest.mark.parametrize(
    ("N", "k", "key"), [(50, 8, "k:"), (30, 1, "solver_steps"), (0, 1, "solver_steps"), (40, 0, "k:")]
)
def test_bad_input(N, k, key):
    with pytest.raises(UserError, match=f"^{key}"):
        segment_bounds(N, k)


@pytest.mark.parametrize(("N", "k"), VALID)
def test_the_top_is_the_last_start_of_the_segment(N, k):
    """Which is the edge that the next segment ends on."""
    padded = pad_segments(N, k, N)
    t_n, t_b, t_top = padded.t_n, padded.t_b, padded.t_top
    assert t_top.dtype == np.int32
    assert t_top.shape == (N,)
    assert np.all(t_n <= t_top)
    assert np.unique(t_top).tolist() == [*np.unique(t_b)[1:].tolist(), 999]
    same = t_b[:, None] == t_b[None]
    assert all(np.unique(t_top[row]).tolist() == [t_n[row].max()] for row in same[:: N // k])


def test_the_tops_of_40_points_in_8_segments():
    padded = pad_segments(40, 8, 50)
    assert padded.t_top[:11].tolist() == [124] * 5 + [249] * 5 + [374]
    assert padded.t_top[35:].tolist() == [999] * 15  # the padding repeats the last


def test_padding():
    padded = pad_segments(8, 4, 50)
    assert isinstance(padded, Segments)
    assert (padded.size, padded.size.shape, padded.size.dtype) == (8, (), np.int32)
    for found, values in zip(padded[:3], segment_bounds(8, 4), strict=True):
        assert found.dtype == np.int32
        assert found.shape == (50,)
        np.testing.assert_array_equal(found[:8], values)
    with pytest.raises(UserError, match="solver_steps"):
        pad_segments(40, 4, 8)
