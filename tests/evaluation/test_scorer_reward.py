"""The embedded scorers as rewards to train on."""

from __future__ import annotations

import jax
import numpy as np

from hypersd_jax.evaluation.scorer import load_scorer, seen_by
from hypersd_jax.evaluation.scorer_reward import EMBEDDED_REWARDS, ScorerReward
from hypersd_jax.rewards.trainable import TrainableReward

PROMPTS = ["a red apple on a white background", "a sleeping cat"]


def test_both_read_prompts() -> None:
    assert EMBEDDED_REWARDS == ("embedded:report", "embedded:reward")
    assert all(ScorerReward(name).tokenize(PROMPTS).shape[0] == 2 for name in EMBEDDED_REWARDS)


def test_it_scores_as_the_scorer_does() -> None:
    """As its two towers, which reports call one by one."""
    reward: TrainableReward = ScorerReward("embedded:reward")
    images, scorer = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8), load_scorer("reward")
    found = jax.jit(reward.scores)(reward.params, images / np.float32(255), reward.tokenize(PROMPTS))
    expected = 100.0 * np.sum(scorer.images(seen_by(scorer.spec, images)) * scorer.text(PROMPTS), axis=-1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
