"""What training asks of image-text data."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np


class Batch(NamedTuple):
    """``images`` (B, H, W, 3) float32 in -1..1 and one caption each."""

    images: np.ndarray
    captions: list[str]


class Source(Protocol):
    """An endless stream of pairs, addressed by position: the same positions always hold the same pairs.

    So the place of a run in its data is one integer, and processes take disjoint slices by taking disjoint positions.
    """

    @property
    def preview_prompts(self) -> list[str]:
        """A few captions of the stream, to draw while training."""
        ...

    def batch(self, positions: np.ndarray) -> Batch:
        """The pairs at these positions of the stream, (B,) int64."""
        ...
