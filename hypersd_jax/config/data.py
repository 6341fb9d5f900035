"""Where image-text pairs come from."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Image-text pairs: ``emoji`` (ships with the package) or a folder of pictures with captions."""

    source: str = "emoji"
    resolution: int | None = None
    white_fraction: float = 0.5
    groups: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.white_fraction <= 1.0:
            raise ValueError(f"white_fraction must lie in 0..1, not {self.white_fraction}")
        if self.resolution is not None and self.resolution < 8:
            raise ValueError(f"resolution must be at least 8, not {self.resolution}")
