"""Order and randomness from integers alone: the same on every machine, Python and NumPy version."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np


def mix(*parts: Any) -> np.ndarray:
    """Hash integers or integer arrays, broadcast against each other, to uint64 (SplitMix64's finaliser, chained)."""
    state = np.zeros((1,), np.uint64)
    for part in parts:
        state = state + np.atleast_1d(np.asarray(part)).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def fraction(hashed: np.ndarray) -> np.ndarray:
    """uint64 -> float64 in [0, 1), from the upper 53 bits."""
    return (hashed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def text_fraction(text: str) -> float:
    """Hash a text to a fixed number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2.0**64


def shuffled(positions: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Find which of ``count`` items are at these positions (B,) of an endless stream, int64 (B,).

    Position p is offset p mod count into epoch p div count; each epoch holds every item once, in an order of its own.
    """
    return Shuffle(count, seed)(positions)


class Shuffle:
    """`shuffled`, with the order of the last epoch kept, which takes a while to make where there are millions."""

    def __init__(self, count: int, seed: int) -> None:
        self._count = count
        self._seed = seed
        self._last = (-1, np.empty(0, np.int64))

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Find the items at these positions (B,), int64 (B,)."""
        positions = np.asarray(positions, np.int64)
        epochs, offsets = positions // self._count, positions % self._count
        items = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            items[here] = self._order(int(epoch))[offsets[here]]
        return items

    def _order(self, epoch: int) -> np.ndarray:
        kept, order = self._last
        if kept != epoch:
            order = np.argsort(mix(self._seed, epoch, np.arange(self._count)), kind="stable")
            self._last = (epoch, order)  # one assignment, since several threads may ask
        return order
