"""The settings of the structure term of human feedback."""

from __future__ import annotations

import dataclasses

from hypersd_jax.config.building import PathText
from hypersd_jax.config.fields import OUTSIDE, ROLE, outside
from hypersd_jax.paths import expanded


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructureConfig:
    """The loss of an instance segmentation of what a student makes of real images (Hyper-SD, Eq. 14).

    Attributes:
        path: SOLOv2's weights, a file or folder.
        annotations: COCO's JSON file of the dataset's instances, which names the images' files.
        weight: of the term next to the rewards.
        start: real latents are noised to the first of ``times`` that is no later than this training timestep, and the
            student takes its steps from there on.
        positives: grid cells that an image has room for; of a more crowded one the largest instances are kept.
        instances: instances that an image has room for, likewise.
    """

    path: PathText
    annotations: PathText = dataclasses.field(metadata={ROLE: OUTSIDE})
    weight: float = 1.0
    start: int = outside(499)
    positives: int = outside(256)
    instances: int = outside(32)

    def __post_init__(self) -> None:
        for key in ("path", "annotations"):
            object.__setattr__(self, key, expanded(getattr(self, key)))
        if self.weight <= 0:
            raise ValueError(f"weight must be above 0, not {self.weight}")
        if self.positives < 1 or self.instances < 1:
            raise ValueError("positives and instances must be at least 1")
