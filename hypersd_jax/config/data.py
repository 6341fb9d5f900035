"""Where image-text pairs come from."""

from __future__ import annotations

import dataclasses
from typing import Literal

from hypersd_jax.config.building import PathText
from hypersd_jax.paths import expanded


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Image-text pairs: ``emoji`` (ships with the package), or a folder, files or a hub data set (docs/data.md).

    ``split`` is the data set's, or ``train``, ``test`` or ``all`` of the embedded pictures. ``white_fraction`` and
    ``groups`` are of the embedded pictures alone; the rest are of all others. Null columns are found by their usual
    names. Pictures are scaled to cover ``resolution`` squared and cropped, or with ``bucket_step`` the nearest of the
    sizes of that area whose sides are multiples of it; those with a side below ``min_size`` are left out.
    ``cache`` is a folder that `hypersd cache` wrote: rows are read from it, not encoded.
    """

    source: str = "emoji"
    split: str = "train"
    resolution: int | None = None
    white_fraction: float = 0.5
    groups: tuple[str, ...] | None = None
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
