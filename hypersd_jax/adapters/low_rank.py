"""The best adapter of a given rank for a change of weights (Eckart and Young 1936), on the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from hypersd_jax.adapters.lora import Array


class Truncated(NamedTuple):
    """An adapter's entry for one module, and the squared Frobenius norms of it and of what it stands for."""

    entry: dict[str, Array]
    kept: float
    total: float


def low_rank(delta: np.ndarray, rank: int) -> Truncated:
    """The closest adapter of a rank to a change of one kernel.

    The space of the `rank` largest singular values comes from the eigenvectors of the smaller Gram matrix in float64,
    which for SDXL's (1280, 10240) takes a twentieth of a full SVD's time; the entry is the exact projection onto it.
    Singular values below 1e-8 of the largest cannot be told from rounding.

    Args:
        delta: (in, out), or (kh, kw, in, out), which is taken as (kh kw in, out) as in LoCon.
        rank: of the entry, cut to the smaller side.
    """
    import scipy.linalg  # a quarter of a second to import, which sampling does not need

    matrix = np.asarray(delta, np.float64).reshape(-1, delta.shape[-1])
    wide = matrix.shape[0] <= matrix.shape[1]
    gram = matrix @ matrix.T if wide else matrix.T @ matrix
    size = gram.shape[0]
    rank = min(rank, size)
    values, vectors = scipy.linalg.eigh(gram, subset_by_index=(size - rank, size - 1))
    vectors, values = vectors[:, ::-1], np.maximum(values[::-1], 0.0)
    # Each factor gets the root of the singular value, so that neither over- nor underflows in half precision.
    roots = values**0.25
    roots = np.where(roots > 1e-4 * roots.max(initial=0.0), roots, 1.0)
    if wide:
        down, up = vectors * roots, (vectors.T @ matrix) / roots[:, None]
    else:
        down, up = (matrix @ vectors) / roots, vectors.T * roots[:, None]
    return Truncated(_entry(down, up, delta.shape[:-1]), float(values.sum()), float(np.trace(gram)))


def reduced(entry: Mapping[str, Array], rank: int | None) -> Truncated:
    """`low_rank` of an entry's own delta, from the factors: the kernel is never formed. None cuts nothing off."""
    import scipy.linalg

    down = np.asarray(entry["down"], np.float64)
    up = np.asarray(entry["up"], np.float64) * np.asarray(entry["scale"], np.float64)[:, None]
    flat = down.reshape(-1, down.shape[-1])
    left, inner_left = scipy.linalg.qr(flat, mode="economic")
    right, inner_right = scipy.linalg.qr(up.T, mode="economic")
    u, s, vh = scipy.linalg.svd(inner_left @ inner_right.T, full_matrices=False)
    total = float(np.sum(s**2))
    if rank is None:
        return Truncated(dict(entry), total, total)
    roots = np.sqrt(s[:rank])
    down, up = (left @ u[:, :rank]) * roots, roots[:, None] * (vh[:rank] @ right.T)
    return Truncated(_entry(down, up, entry["down"].shape[:-1]), float(np.sum(s[:rank] ** 2)), total)


def _entry(down: np.ndarray, up: np.ndarray, window: tuple[int, ...]) -> dict[str, Array]:
    return {
        "down": down.reshape(*window, -1).astype(np.float32),
        "up": up.astype(np.float32),
        "scale": np.ones(up.shape[0], np.float32),
    }
