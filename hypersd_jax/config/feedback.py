"""The settings of human feedback, in any stage that has it: rewards to raise, and guards against hacking them."""

from __future__ import annotations

import dataclasses

from hypersd_jax.config.building import PathText
from hypersd_jax.config.fields import OUTSIDE, ROLE, outside
from hypersd_jax.paths import expanded

EMBEDDED_JUDGE = "embedded:report"
EMBEDDED_REWARD = "embedded:reward"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """A reward to raise, relu(margin - reward) (Hyper-SD, arXiv 2404.13686, Eq. 13).

    Attributes:
        name: of the reward: ``embedded:reward``, the scorer of the embedded images, or one of
            `hypersd_jax.rewards.REWARDS`.
        path: its weights, a file or folder; the embedded scorer has its own.
        margin: the reward up to which it is raised; null: the mean reward of the teacher's images, measured before the
            stage.
        weight: of its term next to the others.
    """

    name: str
    path: PathText | None = None
    margin: float | None = outside(None)
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.path is not None:
            object.__setattr__(self, "path", expanded(self.path))
        if self.weight <= 0:
            raise ValueError(f"weight must be above 0, not {self.weight}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """A held-out reward, which judges the student and is not trained on.

    Attributes:
        name: as of a reward.
        path: likewise.
    """

    name: str
    path: PathText | None = None

    def __post_init__(self) -> None:
        if self.path is not None:
            object.__setattr__(self, "path", expanded(self.path))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What watches that a stage improves images, and not the reward alone.

    The same images (prompts and noise) are sampled again and again; rewards, their sharpness and the judge are logged.
    The stage ends when the judge has fallen, and exports the student that it liked best.

    Attributes:
        every: training steps from one measurement to the next.
        images: how many images, at least; as many of each preview prompt.
        judge: scores them too; null: ``embedded:report`` beside ``embedded:reward``, else none, and nothing stops the
            stage.
        tolerance: standard errors by which the judge may fall below its best before the stage ends.
        perturbation: deviation of the noise that sharpness is measured with, on images in 0..1.
    """

    every: int = 20
    images: int = 32
    judge: JudgeConfig | None = None
    tolerance: float = 2.0
    perturbation: float = 0.02

    def __post_init__(self) -> None:
        if self.every < 1 or self.images < 2:
            raise ValueError("every must be at least 1 and images at least 2")
        if self.tolerance <= 0 or self.perturbation <= 0:
            raise ValueError("tolerance and perturbation must be above 0")


GUARDS = GuardConfig()
"""The guards where a recipe names none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedbackConfig:
    """Rewards that a student's images are to reach.

    Attributes:
        rewards: one or several.
        balanced: scale each reward's gradient in each image to one norm, so that its weight alone says how much it
            counts; false: Eq. 13 as it stands, in the rewards' own units.
        guards: what watches the stage, on as its defaults say; null: nothing does.
    """

    rewards: tuple[RewardConfig, ...]
    balanced: bool = True
    guards: GuardConfig | None = dataclasses.field(default=GUARDS, metadata={ROLE: OUTSIDE})

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ValueError("rewards must name at least one reward")
        names = {reward.name for reward in self.rewards}
        if self.guards and self.guards.judge is None and EMBEDDED_REWARD in names:
            judge = JudgeConfig(name=EMBEDDED_JUDGE)  # settled here, so that the run's record says which
            object.__setattr__(self, "guards", dataclasses.replace(self.guards, judge=judge))
        if self.guards and self.guards.judge:
            judged = (self.guards.judge.name, self.guards.judge.path)
            if judged in {(reward.name, reward.path) for reward in self.rewards}:
                raise ValueError("guards.judge: it is trained on, so it cannot judge")
