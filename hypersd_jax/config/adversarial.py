"""The settings of a discriminator, in any stage that has one."""

from __future__ import annotations

import dataclasses
from typing import Literal

from hypersd_jax.config.fields import derived, static


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """Discriminator heads on the features of a frozen UNet (in score distillation: the fake score model's).

    Attributes:
        weight: of the student's adversarial term.
        loss: the discriminator's loss, and the student's adversarial term with it.
        features: ``encoder``: a head on each down block and the middle one (PCM for SDXL); ``all``: on the up blocks
            too (PCM for SD 1.5); ``mid``: one on the middle block (DMD2); ``pair``: one on the middle blocks of the
            latents in question and of those that the step started from, concatenated (SDXL-Lightning, arXiv
            2402.13929).
        learning_rate: the discriminator heads' learning rate.
        updates: steps of the discriminator for one of the student.
        r1_weight: of the penalty on the discriminator's slope at the real side.
        r1_sigma: the step over which that slope is taken.
    """

    weight: float = 0.1
    loss: Literal["hinge", "non_saturating", "least_squares"] = "hinge"
    features: Literal["encoder", "all", "mid", "pair"] = "encoder"
    learning_rate: float = 1e-5
    updates: int = static(1)
    r1_weight: float = 0.0
    r1_sigma: float = 0.01

    def __post_init__(self) -> None:
        if self.weight < 0 or self.r1_weight < 0:
            raise ValueError("weight and r1_weight must not be negative")
        if self.learning_rate <= 0 or self.r1_sigma <= 0:
            raise ValueError("learning_rate and r1_sigma must be above 0")
        if self.r1_sigma != type(self).r1_sigma and not self.r1_weight:
            raise ValueError("r1_sigma is read only with an r1_weight above 0")
        if self.updates < 1:
            raise ValueError(f"updates must be at least 1, not {self.updates}")

    @derived
    def r1(self) -> bool:
        """Whether there is an R1 penalty."""
        return self.r1_weight > 0
