"""What every kind of stage is told."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What every kind of stage has: its length, AdamW's settings, and the moving average of the weights.

    ``ema`` is the average's decay mu (0: the average is the weights themselves); ``export`` chooses which of the two
    the stage hands on. ``batch_size`` counts pictures an update, of which one part in
    ``accumulate`` is in memory at a time. ``skip`` leaves the stage out.
    """

    name: str
    updates: int
    batch_size: int
    accumulate: int = 1
    learning_rate: float = 1e-6
    warmup: int = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema: float = 0.95
    export: Literal["ema", "raw"] = "ema"
    skip: bool = False

    def __post_init__(self) -> None:
        for key in ("updates", "batch_size", "accumulate"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, not {getattr(self, key)}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, not {self.learning_rate}")
        if self.warmup < 0 or self.weight_decay < 0:
            raise ValueError("warmup and weight_decay must not be negative")
        if self.clip_norm <= 0:
            raise ValueError(f"clip_norm must be above 0, not {self.clip_norm}")
        if not (0.0 <= self.ema < 1.0 and 0.0 <= self.beta1 < 1.0 and 0.0 <= self.beta2 < 1.0):
            raise ValueError("ema, beta1 and beta2 must lie in [0, 1)")
        if self.name in ("", ".", "..") or set(self.name) & set("/\\ "):
            raise ValueError(f"name {self.name!r} must be a plain file name")
