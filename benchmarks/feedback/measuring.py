"""A student's images of the held-out prompts, and what the reward and its judges say of each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from hypersd_jax.bases import load_base
from hypersd_jax.evaluation import generate, make_model
from hypersd_jax.evaluation.generator import Item, further_items, moved
from hypersd_jax.evaluation.metrics import diversity, kernel_distance
from hypersd_jax.evaluation.neighbours import covered_share
from hypersd_jax.evaluation.samples import Samples, image_features
from hypersd_jax.evaluation.scorer_reward import embedded_reward
from hypersd_jax.evaluation.sources import embedded_images, embedded_items, training_images
from hypersd_jax.pipeline import Pipeline

REWARD = "reward"
SCORERS = {REWARD: "embedded:reward", "report": "embedded:report", "pixels": "embedded:pixels"}
TRUTH = "truth"
"""The third judge: minus the distance in features to the real image of the prompt, which no training saw."""
JUDGES = ("report", "pixels", TRUTH)
SETS = ("kid", "recall", "diversity")
BATCH = 32
SHOWN = 8
FIRST_TRY = 5_000_000
"""How far the seeds of further tries lie above the list's."""


class Found(NamedTuple):
    """A student at a number of steps.

    Attributes:
        scores: (N,) by the reward and each judge.
        sets: KID to training images, recall and diversity.
        images: the first ones, uint8.
    """

    scores: Mapping[str, np.ndarray]
    sets: Mapping[str, float]
    images: np.ndarray


class Measuring:
    """The base model, the held-out prompts, and their real images."""

    def __init__(self, model: str, groups: Any, count: int) -> None:
        self.pipe = Pipeline(load_base(model, dtype=jnp.float32))
        self.items = embedded_items(count, groups)
        side = self.pipe.native_size[0]
        self._real = image_features(training_images(count, groups, side).first)
        self.true_images = embedded_images(count, groups, side)
        self._true = image_features(self.true_images)

    @property
    def prompts(self) -> list[str]:
        return [item.prompt for item in self.items]

    def samples(self, lora: Path, steps: int, items: tuple[Item, ...]) -> Samples:
        """Sample a student."""
        self.pipe.load_lora(lora, name="student")
        try:
            model = make_model("student", self.pipe, steps=steps, sampler="tcd", eta=0.0, guidance=0.0)
            return generate(model, items, batch_size=BATCH)
        finally:
            self.pipe.unload_lora("student")

    def measure(self, lora: Path, steps: int) -> Found:
        """Sample the list, and the first prompts from further seeds, and score."""
        found = self.samples(lora, steps, self.items)
        further = [self.samples(lora, steps, items).features for items in further_items(self.items)]
        return self.measured(found.images, found.features, further)

    def best_of(self, lora: Path, steps: int, count: int) -> Found:
        """Sample each prompt ``count`` times and keep the image that the reward likes best."""
        tries = [self.samples(lora, steps, moved(self.items, FIRST_TRY * (n > 0) + n)) for n in range(count)]
        rewards = np.stack([self.scores(each.images, each.features)[REWARD] for each in tries])
        chosen = [tries[n] for n in rewards.argmax(axis=0)]
        images = np.stack([each.images[i] for i, each in enumerate(chosen)])
        return self.measured(images, np.stack([each.features[i] for i, each in enumerate(chosen)]), [])

    def measured(self, images: np.ndarray, features: np.ndarray, further: list[np.ndarray]) -> Found:
        """Score images (N, H, W, 3) of the prompts; diversity is that of the first prompts from further seeds."""
        sets = {
            "kid": kernel_distance(features, self._real).mean,
            "recall": covered_share(self._real, features).mean,
        }
        if further:
            seeds = np.stack([features[: len(further[0])], *further], axis=1)
            sets["diversity"] = float(diversity(seeds).mean())
        return Found(self.scores(images, features), sets, images[:SHOWN])

    def scores(self, images: np.ndarray, features: np.ndarray) -> dict[str, np.ndarray]:
        """Score each image by the reward and every judge."""
        floats = images.astype(np.float32) / 255.0
        found = {key: np.asarray(embedded_reward(name)(floats, self.prompts)) for key, name in SCORERS.items()}
        return {**found, TRUTH: -np.linalg.norm(features - self._true, axis=1)}
