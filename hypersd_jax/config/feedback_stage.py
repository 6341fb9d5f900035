"""The settings of the feedback stage: a LoRA of its own on a distilled student, trained on rewards."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from hypersd_jax.config.feedback import FeedbackConfig
from hypersd_jax.config.fields import derived, outside, static
from hypersd_jax.config.generator import GeneratorStage, RegulariserConfig
from hypersd_jax.config.structure import StructureConfig

REGULARISER = RegulariserConfig(weight=0.1, teacher="previous")
"""The consistency regulariser where a recipe names none. Its teacher is the student as it was: the base would pull a
student that more than TSCD has trained back to what TSCD alone reaches."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedbackStage(GeneratorStage):
    """Human feedback (arXiv 2404.13686, section 3.2): a second LoRA on the student that the stages before have made.

    The student before stays as it is. What is exported, and starts the next stage, is both LoRAs as one of the summed
    rank; the second one is also written alone.

    Attributes:
        kind: ``feedback``.
        feedback: the rewards, and the guards.
        rank: of the second LoRA; null: ``lora.rank``.
        merge_weight: scale of the second LoRA in the exported student.
        anchor: the consistency regulariser, here on, at the weight 0.1, with the student as it was for its teacher;
            null: none.
        late_steps: the gradient runs through one of this many last steps of ``times``, chosen at random; 1: the last.
        redraws: how often the sample is noised to the last of ``times`` again and predicted from there, with gradient:
            the low-variance estimate of DRaFT-LV (arXiv 2309.17400).
        structure: the structure term; null: none.
    """

    kind: Literal["feedback"]
    feedback: FeedbackConfig
    rank: int | None = outside(None)
    merge_weight: float = outside(1.0)
    late_steps: int = static(1)
    redraws: int = static(0)
    structure: StructureConfig | None = None
    anchor: RegulariserConfig | None = REGULARISER

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.student != "lora":
            raise ValueError("student must be lora with kind=feedback")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        if self.merge_weight <= 0:
            raise ValueError(f"merge_weight must be above 0, not {self.merge_weight}")
        if not 1 <= self.late_steps <= len(self.times):
            raise ValueError(f"late_steps must lie in 1..{len(self.times)}, not {self.late_steps}")
        if self.redraws < 0 or (self.redraws and self.late_steps > 1):
            raise ValueError("redraws must not be negative, and go with late_steps=1")
        if self.eta:
            raise ValueError("eta must be 0 with kind=feedback: the student is trained without fresh noise")
        if self.structure and self.data_free:
            raise ValueError("data_free: the structure term needs images")
        if self.structure and not self.structure_steps:
            raise ValueError(f"structure.start={self.structure.start}: below all of times {list(self.times)}")

    @property
    def noises_afresh(self) -> bool:
        """No fresh noise, unless the sampler adds it."""
        return False

    @property
    def guarded(self) -> Mapping[str, str]:
        """Those of its feedback."""
        return self.feedback.guarded

    @derived
    def deterministic(self) -> bool:
        """Whether the steps are the deterministic ones of its sampler."""
        return self.sampler != "lcm"

    @derived
    def gradient_steps(self) -> int:
        """The last steps, one of which carries the gradient."""
        return self.late_steps

    @derived
    def structure_steps(self) -> int:
        """How many of the last steps the structure term takes."""
        return sum(time <= self.structure.start for time in self.times) if self.structure else 0
