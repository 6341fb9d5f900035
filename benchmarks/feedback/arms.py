"""What is compared: ways to raise a reward, each under the same number of UNet calls a seed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

MARGIN = 70.0
"""Above the mean reward of the teacher's images of the training captions, 52, so that nearly all images are raised."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One stage on the distilled student.

    Attributes:
        title: in the table.
        settings: of the stage, without name, updates, batch size and learning rate.
        calls: UNet calls an update, on average.
    """

    title: str
    settings: dict[str, Any]
    calls: float

    def stage(self, name: str, calls: float, batch_size: int, learning_rate: float) -> dict[str, Any]:
        """Return the stage as a recipe has it, for a budget of UNet calls."""
        return {
            "name": name,
            "updates": round(calls / self.calls),
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "warmup": 5,
            "guidance": 4.0,
            "ema": 0.9,
            "steps": [1, 4],
            **self.settings,
        }


def _feedback(*, guards: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"rewards": [{"name": "embedded:reward", "margin": MARGIN}], "guards": guards}


GUARDS = {"every": 15, "images": 64, "prompts": str(Path(__file__).with_name("prompts.txt"))}
"""Held-out prompts that no table uses."""

ONE_STEP: dict[str, Any] = {"kind": "feedback", "rank": 16, "times": [999]}
FOUR_STEPS = {**ONE_STEP, "times": [999, 749, 499, 249], "anchor": None, "feedback": _feedback()}

ARMS = {
    # Student 1, and the regulariser's student, teacher and target. The teacher is the student as it was: the base would
    # pull it away from what its distillation has reached, which no reward at this rate makes good.
    "feedback": Arm(
        title="feedback stage (one step, distillation loss on, guarded)",
        settings={
            **ONE_STEP,
            "anchor": {"weight": 0.03, "solver_steps": 8, "teacher": "previous"},
            "feedback": _feedback(guards=GUARDS),
        },
        calls=4.0,
    ),
    "refl": Arm(
        title="ReFL: reward at a random one of four steps",
        settings={**FOUR_STEPS, "late_steps": 4},
        calls=2.5,
    ),
    "draft-1": Arm(
        title="DRaFT-1: reward after four steps, gradient through the last",
        settings={**FOUR_STEPS, "late_steps": 1},
        calls=4.0,
    ),
    "draft-lv": Arm(
        title="DRaFT-LV: the same, the last step from two further noises",
        settings={**FOUR_STEPS, "late_steps": 1, "redraws": 2},
        calls=6.0,
    ),
    "unguarded": Arm(
        title="one step, reward alone, no guard",
        settings={**ONE_STEP, "anchor": None, "feedback": _feedback()},
        calls=1.0,
    ),
    "guarded": Arm(
        title="one step, reward alone, guarded",
        settings={**ONE_STEP, "anchor": None, "feedback": _feedback(guards=GUARDS)},
        calls=1.0,
    ),
    # Student 1, real score 2, fake score 1, and the fake model's update 2.
    "dmd": Arm(
        title="DMD with the reward as a term",
        settings={
            "kind": "dmd",
            "times": [999],
            "weight": 0.1,
            "fake_updates": 1,
            "fake_learning_rate": 2.0e-3,
            "feedback": _feedback(),
        },
        calls=6.0,
    ),
}
