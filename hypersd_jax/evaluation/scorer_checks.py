"""Measure what a scorer can distinguish, on images that it was not trained on: the figures of its card."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def retrieval(images: np.ndarray, texts: np.ndarray, truth: np.ndarray, ranks: Sequence[int] = (1, 5)) -> list[float]:
    """R@k: how often the true text is among the k best of all, for unit vectors (N, D) and (M, D), ``truth`` (N,)."""
    scores = images @ texts.T
    own = scores[np.arange(len(truth)), truth]
    above = np.sum(scores > own[:, None], axis=1)
    return [float(np.mean(above < rank)) for rank in ranks]


def auc(matched: np.ndarray, mismatched: np.ndarray) -> float:
    """The chance that a matching pair's score (N,) is above a mismatched pair's (M,); 0.5 is no better than a coin."""
    everything = np.concatenate([matched, mismatched])
    order = np.argsort(everything, kind="stable")
    ranks = np.empty(len(everything))
    ranks[order] = np.arange(1, len(everything) + 1)
    values, index, counts = np.unique(everything, return_inverse=True, return_counts=True)
    sums = np.bincount(index, ranks, len(values))
    ranks = (sums / counts)[index]  # ties share their mean rank
    wins = ranks[: len(matched)].sum() - len(matched) * (len(matched) + 1) / 2
    return float(wins / (len(matched) * len(mismatched)))


def chosen_rate(matched: np.ndarray, swapped: np.ndarray) -> float:
    """Compute how often an image scores higher with its own text than with one part of it swapped; both (N,)."""
    return float(np.mean((matched > swapped) + 0.5 * (matched == swapped)))
