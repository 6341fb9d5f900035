"""The guard of a stage with feedback: the same images again and again, for rewards, their sharpness and a judge."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from hypersd_jax.config import FeedbackConfig, GeneratorStage, GuardConfig
from hypersd_jax.stages.context import Run
from hypersd_jax.stages.kinds import exported_weights
from hypersd_jax.stages.rewards import fixed_prompts, repeated, score_images, suffix
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
        """Standard errors by which the judge may fall."""
        return self.guards.tolerance

    def __call__(self, state: TrainState) -> Measured:
        """Sample the fixed prompts and score the images; sharpness is the mean change of a reward under noise."""
        prompts, count = fixed_prompts(self.run, self.guards.images)
        images = self.sample(self.run, self.stage, exported_weights(self.stage, state), prompts, count)
        noise = self.guards.perturbation * np.random.default_rng(0).standard_normal(images.shape, np.float32)
        perturbed = np.clip(images + noise, 0.0, 1.0)
        texts = repeated(prompts, count)

        def scores(scorer: Any, images: np.ndarray) -> np.ndarray:
            return score_images(scorer.name, scorer.path, images, texts)

        metrics = {}
        for index, reward in enumerate(self.rewards.rewards):
            found = scores(reward, images)
            metrics[f"fixed_reward{suffix(index)}"] = float(found.mean())
            metrics[f"sharpness{suffix(index)}"] = float(np.abs(scores(reward, perturbed) - found).mean())
        if self.guards.judge is None:
            return Measured(metrics, None)
        judged = scores(self.guards.judge, images)
        return Measured({**metrics, "judge": float(judged.mean())}, judged)


def make_watch(run: Run, stage: GeneratorStage, config: FeedbackConfig | None, sample: Sampled) -> Watch | None:
    """Make the watch of a stage; None where it has no feedback or no guards."""
    if config is None or config.guards is None:
        return None
    return FeedbackWatch(run=run, stage=stage, rewards=config, guards=config.guards, sample=sample)
