"""Distances between sets of images and between pairs of them. NumPy, float64, exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean and its standard error."""

    mean: float
    standard_error: float


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features (N, D) and (M, D) (arXiv 1706.08500, eq. 6).

    With C_a = A'A for A the centred rows over sqrt(N - 1), the non-zero eigenvalues of C_a C_b are the squared singular
    values of A B', so the trace of the root is their sum: no root of a D x D matrix, and no trouble where N < D makes
    it singular.

    Raises:
        ValueError: with fewer than two rows or different widths.
    """
    a, b = checked_features(a, b, least=2)
    (mean_a, root_a), (mean_b, root_b) = _moments(a), _moments(b)
    traces = np.sum(root_a**2) + np.sum(root_b**2)
    cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    return float(max(np.sum((mean_a - mean_b) ** 2) + traces - 2.0 * cross, 0.0))


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean (D,) and a matrix R (min(N, D), D) with R'R the sample covariance."""
    mean = x.mean(axis=0)
    centred = (x - mean[None]) / np.sqrt(len(x) - 1)
    return mean, np.asarray(np.linalg.qr(centred, mode="r")) if len(x) > x.shape[1] else centred


def kernel_distance(a: np.ndarray, b: np.ndarray) -> Estimate:
    """KID: the unbiased squared MMD of features (N, D) and (M, D) under (x.y / D + 1)^3 (arXiv 1801.01401, eq. 4).

    On the whole sets, with the two-sample jackknife's standard error, which is on the safe side where the sets are
    alike. Unbiased, so it may be below zero when they come from one distribution.

    Raises:
        ValueError: with fewer than three rows or different widths.
    """
    a, b = checked_features(a, b, least=3)
    width, n, m = a.shape[1], len(a), len(b)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / width + 1.0) ** 3

    aa, bb, ab = kernel(a, a), kernel(b, b), kernel(a, b)
    np.fill_diagonal(aa, 0.0)
    np.fill_diagonal(bb, 0.0)
    within_a, within_b, across = aa.sum(), bb.sum(), ab.sum()
    value = within_a / (n * (n - 1)) + within_b / (m * (m - 1)) - 2.0 * across / (n * m)
    without_a = (
        (within_a - 2.0 * aa.sum(axis=1)) / ((n - 1) * (n - 2))
        + within_b / (m * (m - 1))
        - 2.0 * (across - ab.sum(axis=1)) / ((n - 1) * m)
    )
    without_b = (
        within_a / (n * (n - 1))
        + (within_b - 2.0 * bb.sum(axis=1)) / ((m - 1) * (m - 2))
        - 2.0 * (across - ab.sum(axis=0)) / (n * (m - 1))
    )
    variance = (n - 1) * without_a.var() + (m - 1) * without_b.var()
    return Estimate(float(value), float(np.sqrt(variance)))


def image_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Root mean squared difference (N,) of paired images (N, H, W, 3), in units of the 0..1 range.

    Raises:
        ValueError: when the shapes differ.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        raise ValueError(f"pairs must have one shape, not {a.shape} and {b.shape}")
    # One pair at a time: in float64 thousands of large images would not fit into memory.
    pairs = zip(a, b, strict=True)
    return np.asarray([np.sqrt(np.mean((unit_range(x) - unit_range(y)) ** 2)) for x, y in pairs], np.float64)


def feature_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distance (N,) of paired features (N, D).

    Raises:
        ValueError: when the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"pairs must have one shape, not {a.shape} and {b.shape}")
    return np.linalg.norm(a.astype(np.float64) - b.astype(np.float64), axis=1)


def diversity(features: np.ndarray) -> np.ndarray:
    """Mean Euclidean distance (M,) between the images of each prompt, for features (M, S, D) from S seeds.

    Zero where all seeds give one image.

    Raises:
        ValueError: with fewer than two seeds.
    """
    if features.ndim != 3 or features.shape[1] < 2:
        raise ValueError(f"features must be (prompts, seeds, D) with two seeds or more, not {features.shape}")
    rows, columns = np.triu_indices(features.shape[1], k=1)
    exact = features.astype(np.float64)
    return np.linalg.norm(exact[:, rows] - exact[:, columns], axis=2).mean(axis=1)


def mean_estimate(values: np.ndarray, units: np.ndarray | None = None) -> Estimate:
    """Mean of values (N,) with its standard error, which one value alone leaves unknown (nan).

    Values of one of ``units`` (N,), say of one prompt, may be alike; the units are independent of one another, and the
    error is that of a mean over them: sqrt(G / (G - 1) sum_g (sum of g's deviations)^2) / N for G units. Without
    units, or where each value is one of its own, that is the usual one.
    """
    values = np.asarray(values, np.float64)
    if units is None:
        error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
        return Estimate(float(values.mean()), float(error))
    _, indices = np.unique(units, return_inverse=True)
    sums = np.bincount(indices, weights=values - values.mean())
    count = len(sums)
    error = np.sqrt(count / (count - 1) * np.sum(sums**2)) / len(values) if count > 1 else np.nan
    return Estimate(float(values.mean()), float(error))


def units_of(prompts: Sequence[str]) -> np.ndarray | None:
    """The units of `mean_estimate` (N,) of a list: its prompts; None where it has but one."""
    return np.unique(prompts, return_inverse=True)[1] if len(set(prompts)) > 1 else None


def paired_margin(a: np.ndarray, b: np.ndarray, units: np.ndarray | None = None) -> Estimate:
    """By how much the distances ``a`` (N,) lie below ``b`` (N,) of the same prompts: the mean of b - a.

    Pairing takes out what the prompts share, so that a margin of twice its standard error means something even where
    the two spread widely. ``units``: as in `mean_estimate`.

    Raises:
        ValueError: when the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"pairs must have one shape, not {a.shape} and {b.shape}")
    return mean_estimate(np.asarray(b, np.float64) - np.asarray(a, np.float64), units)


def unit_range(images: np.ndarray) -> np.ndarray:
    """uint8 or 0..1 float images as float64 in 0..1."""
    images = np.asarray(images)
    return images.astype(np.float64) / (255.0 if images.dtype == np.uint8 else 1.0)


def checked_features(a: np.ndarray, b: np.ndarray, *, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Return features (N, D) and (M, D) in float64; ValueError where either has fewer than ``least`` rows."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features must be (N, D) and (M, D), not {a.shape} and {b.shape}")
    if min(len(a), len(b)) < least:
        raise ValueError(f"{min(len(a), len(b))} features are too few: at least {least} are needed")
    return a, b
