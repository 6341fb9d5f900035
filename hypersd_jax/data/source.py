"""What training asks of image-text data."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np


class Batch(NamedTuple):
    """Pictures with a caption each, all of one size.

    ``images`` (B, H, W, 3) float32 in -1..1; ``sizes`` (B, 6) float32, SDXL's size ids of each: the picture's own
    (height, width) before anything was done to it, the crop's (top, left) in pixels of the resized picture, and (H, W).
    """

    images: np.ndarray
    captions: list[str]
    sizes: np.ndarray


class Prompts(Protocol):
    """An endless stream of prompts, addressed by position: what stages without pictures read."""

    @property
    def preview_prompts(self) -> list[str]:
        """A few prompts of the stream, to draw while training."""
        ...

    def prompts(self, positions: np.ndarray) -> list[str]:
        """The prompts at these positions of the stream, (B,) int64."""
        ...


class Source(Protocol):
    """An endless stream of pairs, addressed by position: the same positions always hold the same pairs.

    So the place of a run in its data is one integer, and processes take disjoint slices by taking disjoint positions.
    A row's key says which picture stands there and in which variant (ground, ...), so that what was encoded once can be
    found again wherever the stream comes to it.
    """

    @property
    def preview_prompts(self) -> list[str]:
        """A few captions of the stream, to draw while training."""
        ...

    @property
    def identity(self) -> str | None:
        """A name for the set's captions; None where the package's version decides them."""
        ...

    @property
    def contents(self) -> str | None:
        """Changes when one of the set's files does; None where the package's version decides them."""
        ...

    @property
    def uncacheable(self) -> str | None:
        """Why rows cannot be encoded once and kept, naming the key at fault; None where they can."""
        ...

    def batch(self, positions: np.ndarray) -> Batch:
        """The pairs at these positions of the stream, (B,) int64."""
        ...

    def keys(self, positions: np.ndarray) -> np.ndarray:
        """The keys of the rows at these positions, (B,) int64, without making the pictures."""
        ...

    def variants(self) -> np.ndarray:
        """Every key that the stream can come to, (V,) int64, ascending."""
        ...

    def variant_batch(self, keys: np.ndarray) -> Batch:
        """The pairs of these keys, (B,) int64, as `batch` gives them."""
        ...
