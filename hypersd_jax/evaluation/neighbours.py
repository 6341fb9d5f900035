"""Precision and recall of a set of images by nearest neighbours (arXiv 1904.06991). NumPy, float64, exact."""

from __future__ import annotations

import numpy as np

from hypersd_jax.evaluation.metrics import Estimate, checked_features

NEIGHBOURS = 3
"""Neighbours that decide how far a set reaches around each of its members, as in the paper."""

FEWEST = NEIGHBOURS + 2
"""The smallest set with that many neighbours of each member, and with one member less."""


def covered_share(points: np.ndarray, support: np.ndarray) -> Estimate:
    """Compute the share of ``points`` (N, D) that lie where ``support`` (M, D) reaches (arXiv 1904.06991, eq. 1).

    The support reaches around each member as far as its third nearest neighbour of the same set. With the two-sample
    jackknife's standard error, which counts both sets as random and is on the safe side: on sets from normal
    distributions it was 1.2 to 1.7 times the spread, where the error of a mean over ``points`` was 0.3 to 0.9 times.

    Raises:
        ValueError: with fewer than five rows or different widths.
    """
    points, support = checked_features(points, support, least=FEWEST)
    n, m = len(points), len(support)
    within, across = _squared_distances(support, support), _squared_distances(support, points)
    np.fill_diagonal(within, np.inf)
    radius, wider = np.partition(within, (NEIGHBOURS - 1, NEIGHBOURS), axis=1)[:, NEIGHBOURS - 1 : NEIGHBOURS + 1].T
    inside = across <= radius[:, None]
    counts = inside.sum(axis=0)
    share = float(np.mean(counts > 0))
    # Without one member its own reach is gone, and those that had it among their neighbours reach to their next one.
    gained = (across <= wider[:, None]) & ~inside
    near = within <= radius[:, None]
    regained = near.T.astype(np.float32) @ gained.astype(np.float32)
    without = np.mean(counts - inside + regained > 0, axis=1)
    variance = (m - 1) * without.var() + share * (1.0 - share) / (n - 1)
    return Estimate(share, float(np.sqrt(variance)))


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances (N, M) between the rows of (N, D) and (M, D)."""
    squares = np.sum(a**2, axis=1)[:, None] + np.sum(b**2, axis=1)[None] - 2.0 * (a @ b.T)
    return np.maximum(squares, 0.0)
