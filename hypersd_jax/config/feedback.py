"""The settings of human feedback, in any stage that has it: rewards to raise, and guards against hacking them."""

from __future__ import annotations

import dataclasses

from hypersd_jax.config.building import PathText
from hypersd_jax.config.fields import OUTSIDE, ROLE, outside
from hypersd_jax.paths import expanded

EMBEDDED_JUDGES = ("embedded:report", "embedded:pixels")
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

    The same images (prompts and noise) are sampled again and again. Logged are rewards, their sharpness, the judges,
    the images' diversity, and their KID and recall against the teacher's of the same prompts. The stage ends when a
    judge has fallen, and exports the student that the judges together liked best.

    Attributes:
        every: training steps from one measurement to the next.
        images: how many images, at least; as many of each prompt.
        prompts: a file of prompts, one a line, or a .tsv or .jsonl as ``--prompts-file`` takes it; null: the run's
            preview prompts.
        judges: score them too; empty: ``embedded:report`` and ``embedded:pixels`` beside ``embedded:reward``, else
            none, and nothing stops the stage.
        tolerance: standard errors by which a judge may fall below its highest before the stage ends.
        least: standard deviations over the images, of the first measurement, by which it must have fallen, too: early
            on a change may be certain and of no account.
        perturbation: deviation of the noise that sharpness is measured with, on images in 0..1.
    """

    every: int = 20
    images: int = 32
    prompts: PathText | None = None
    judges: tuple[JudgeConfig, ...] = ()
    tolerance: float = 2.0
    least: float = 0.1
    perturbation: float = 0.02

    def __post_init__(self) -> None:
        if self.prompts is not None:
            object.__setattr__(self, "prompts", expanded(self.prompts))
        if self.every < 1 or self.images < 2:
            raise ValueError("every must be at least 1 and images at least 2")
        if self.tolerance <= 0 or self.perturbation <= 0 or self.least < 0:
            raise ValueError("tolerance and perturbation must be above 0, and least not below")


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
        trained = {(reward.name, reward.path) for reward in self.rewards}
        if self.guards and not self.guards.judges and (EMBEDDED_REWARD, None) in trained:
            judges = tuple(JudgeConfig(name=name) for name in EMBEDDED_JUDGES if (name, None) not in trained)
            # Settled here, so that the run's record says which.
            object.__setattr__(self, "guards", dataclasses.replace(self.guards, judges=judges))
        for index, judge in enumerate(self.guards.judges if self.guards else ()):
            if (judge.name, judge.path) in trained:
                raise ValueError(f"guards.judges.{index}: {judge.name} is trained on, so it cannot judge")

    @property
    def guarded(self) -> dict[str, str]:
        """What the measurements of the guards are called, by key of metrics.jsonl."""
        if self.guards is None:
            return {}
        rewards = {f"fixed_reward{suffix(i)}": f"reward {each.name}" for i, each in enumerate(self.rewards)}
        judges = {f"judge{suffix(i)}": f"judge {each.name}" for i, each in enumerate(self.guards.judges)}
        return {**rewards, **judges}


def suffix(index: int) -> str:
    """Name the metrics of several rewards or judges: the first one's have no suffix, then come ``_2``, ``_3``, ..."""
    return f"_{index + 1}" if index else ""
