"""The guard of a stage with feedback: the same images again and again, for rewards, their sharpness and judges."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable

import numpy as np

from hypersd_jax.config import FeedbackConfig, GeneratorStage, GuardConfig
from hypersd_jax.config.feedback import suffix
from hypersd_jax.evaluation.metrics import diversity, kernel_distance
from hypersd_jax.evaluation.neighbours import FEWEST, covered_share
from hypersd_jax.evaluation.samples import image_features
from hypersd_jax.stages.context import Run
from hypersd_jax.stages.kinds import exported_weights
from hypersd_jax.stages.rewards import fixed_prompts, repeated, score_images, teacher_figures, to_bytes
from hypersd_jax.training import Measured, TrainState, Watch

Sampled = Callable[..., np.ndarray]
"""(run, stage, student, prompts, images of each) -> the student's images (N, H, W, 3) in 0..1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedbackWatch:
    """Measure the student that a stage would export (`hypersd_jax.training.Watch`)."""

    run: Run
    stage: GeneratorStage
    rewards: FeedbackConfig
    guards: GuardConfig
    sample: Sampled

    @property
    def every(self) -> int:
        """Training steps from one measurement to the next."""
        return self.guards.every

    @property
    def tolerance(self) -> float:
        """Standard errors by which a judge may fall."""
        return self.guards.tolerance

    @property
    def least(self) -> float:
        """Standard deviations that it must have fallen by, too."""
        return self.guards.least

    @functools.cached_property
    def _fixed(self) -> tuple[list[str], int]:
        """The prompts, read once, and how many images of each."""
        return fixed_prompts(self.run, self.guards)

    @functools.cached_property
    def _teacher(self) -> np.ndarray:
        """Features of the teacher's images of these."""
        return teacher_figures(self.run, self.stage, self.rewards).features

    def __call__(self, state: TrainState) -> Measured:
        """Sample the fixed prompts and measure the images; sharpness is the mean change of a reward under noise."""
        prompts, count = self._fixed
        images = self.sample(self.run, self.stage, exported_weights(self.stage, state), prompts, count)
        if bad := int(np.sum(~np.isfinite(images).all(axis=(1, 2, 3)))):
            where = f"stages.{self.stage.name}"
            warnings.warn(
                f"{where}: {bad} of {len(images)} watched images are not finite: nothing is judged", stacklevel=2
            )
            return Measured({}, {})
        noise = self.guards.perturbation * np.random.default_rng(0).standard_normal(images.shape, np.float32)
        perturbed = np.clip(images + noise, 0.0, 1.0)
        texts = repeated(prompts, count)
        metrics = {}
        for index, reward in enumerate(self.rewards.rewards):
            found = score_images(reward.name, reward.path, images, texts)
            changed = score_images(reward.name, reward.path, perturbed, texts)
            metrics[f"fixed_reward{suffix(index)}"] = float(found.mean())
            metrics[f"sharpness{suffix(index)}"] = float(np.abs(changed - found).mean())
        judged = {}
        for index, judge in enumerate(self.guards.judges):
            scores = score_images(judge.name, judge.path, images, texts)
            metrics[f"judge{suffix(index)}"] = float(scores.mean())
            judged[f"{judge.name}{suffix(index)}" if judge.name in judged else judge.name] = scores
        return Measured({**metrics, **self._variety(images, len(prompts), count)}, judged)

    def _variety(self, images: np.ndarray, prompts: int, count: int) -> dict[str, float]:
        """How different the images of a prompt are, and how much of the teacher's images they stand for."""
        seen, teacher = image_features(to_bytes(images)), self._teacher
        found = {}
        if count > 1:
            found["diversity"] = float(diversity(seen.reshape(prompts, count, -1)).mean())
        if min(len(seen), len(teacher)) >= FEWEST:
            found["kid"] = kernel_distance(seen, teacher).mean
            found["recall"] = covered_share(teacher, seen).mean
        return found


def make_watch(run: Run, stage: GeneratorStage, config: FeedbackConfig | None, sample: Sampled) -> Watch | None:
    """Make the watch of a stage; None where it has no feedback or no guards."""
    if config is None or config.guards is None:
        return None
    return FeedbackWatch(run=run, stage=stage, rewards=config, guards=config.guards, sample=sample)
