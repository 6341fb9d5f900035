"""The protocols of image-text data that training reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np


class Batch(NamedTuple):
    """A batch of images with a caption each, all of one size.

    ``images`` (B, H, W, 3) uint8, see `signed`; ``sizes`` (B, 6) float32, SDXL's size
    ids of each: the image's own (height, width) before anything was done to it, the crop's (top, left) in pixels of the
    resized image, and (H, W). Of sources with image files, also the examples' ``keys`` (B,) int64, and whether each is
    ``mirrored``, (B,) bool.
    """

    images: np.ndarray
    captions: list[str]
    sizes: np.ndarray
    keys: np.ndarray | None = None
    mirrored: np.ndarray | None = None


def signed(images: Any) -> Any:
    """Convert images from bytes, uint8, to float32 in -1..1, as an autoencoder reads them; of NumPy or on a device.

    TypeError for images of another type, which would come out as something else.
    """
    if images.dtype != np.uint8:
        raise TypeError(f"images of a batch are uint8, not {images.dtype}")
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1.0)


class Prompts(Protocol):
    """An endless stream of prompts, addressed by position: what stages without images read."""

    @property
    def preview_prompts(self) -> list[str]:
        """A few prompts of the stream, to sample while training."""
        ...

    def prompts(self, positions: np.ndarray) -> list[str]:
        """Read the prompts at these positions of the stream, (B,) int64."""
        ...


class Source(Protocol):
    """An endless stream of captioned images, addressed by position: a position always holds the same example.

    So the position of a run in its data is one integer, and processes take disjoint slices by disjoint positions.
    An example's key says which image it is and in which variant (background, ...), so that what was encoded once can be
    found wherever it is in the stream.
    """

    @property
    def preview_prompts(self) -> list[str]:
        """A few captions of the stream, to sample while training."""
        ...

    @property
    def identity(self) -> str | None:
        """A digest of the dataset's captions; None where the package's version decides them."""
        ...

    @property
    def contents(self) -> str | None:
        """A digest that changes when one of the dataset's files does; None where the package's version decides them."""
        ...

    @property
    def uncacheable(self) -> str | None:
        """Why examples cannot be encoded once and kept, naming the key at fault; None where they can."""
        ...

    @property
    def files(self) -> Mapping[int, str] | None:
        """The name of each image's file, by the example's key; None where images are no files of their own."""
        ...

    def batch(self, positions: np.ndarray) -> Batch:
        """Read the examples at these positions of the stream, (B,) int64."""
        ...

    def keys(self, positions: np.ndarray) -> np.ndarray:
        """Find the keys of the examples at these positions, (B,) int64, without making the images."""
        ...

    def captions(self, keys: np.ndarray) -> list[str]:
        """Read the captions of these keys, (B,) int64, without making the images."""
        ...

    def variants(self) -> np.ndarray:
        """List every key that the stream can come to, (V,) int64, ascending."""
        ...

    def variant_batch(self, keys: np.ndarray) -> Batch:
        """Read the examples of these keys, (B,) int64, as `batch` gives them."""
        ...
