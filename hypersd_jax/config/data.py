"""The settings of the dataset."""

from __future__ import annotations

import dataclasses
from typing import Literal

from hypersd_jax.config.building import PathText
from hypersd_jax.paths import expanded


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images with captions (docs/data.md).

    ``white_fraction``, ``groups`` and ``look`` belong to the embedded images, the others but ``source`` and ``split``
    to every other dataset. Columns that are null are found by their usual names.

    Attributes:
        source: ``emoji`` (embedded), a folder, files, or a hub dataset.
        split: of the dataset; of ``emoji`` one of ``train``, ``test``, ``all``.
        resolution: side of the square in pixels; null: the model's own.
        white_fraction: of ``emoji`` alone: the share of white backgrounds.
        groups: of ``emoji`` alone: which groups of images; null: all.
        look: of ``emoji`` alone: a style that no caption names, to train a style LoRA on: ``mosaic``, 16 by 16
            tiles of one colour each, or ``sepia``, brown tones for all colours; null: the images as they are.
        image_column: the column of the images.
        caption_column: the column of the captions.
        crop: where an image that was scaled to cover its size is cropped.
        flip: mirror each image with probability one half.
        bucket_step: aspect buckets: sizes of about that area, in multiples of this; null: squares.
        min_size: leave out images with a shorter side, in pixels.
        cache: a folder that ``hypersd cache`` wrote: examples are read from it, not encoded again.
    """

    source: str = "emoji"
    split: str = "train"
    resolution: int | None = None
    white_fraction: float = 0.5
    groups: tuple[str, ...] | None = None
    look: Literal["mosaic", "sepia"] | None = None
    image_column: str | None = None
    caption_column: str | None = None
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    bucket_step: int | None = None
    min_size: int | None = None
    cache: PathText | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", expanded(self.source))
        if self.cache is not None:
            object.__setattr__(self, "cache", expanded(self.cache))
        if not 0.0 <= self.white_fraction <= 1.0:
            raise ValueError(f"white_fraction must lie in 0..1, not {self.white_fraction}")
        if self.resolution is not None and self.resolution < 8:
            raise ValueError(f"resolution must be at least 8, not {self.resolution}")
        if self.bucket_step is not None and (self.bucket_step < 8 or self.bucket_step % 8):
            raise ValueError(f"bucket_step must be a multiple of 8, not {self.bucket_step}")
        if self.min_size is not None and self.min_size < 1:
            raise ValueError(f"min_size must be at least 1, not {self.min_size}")
        for key in ("source", "split"):
            if not getattr(self, key):
                raise ValueError(f"{key} must not be empty")
