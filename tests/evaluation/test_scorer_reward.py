"""The embedded scorers as rewards to train on."""

from __future__ import annotations

import jax
import numpy as np

from hypersd_jax.evaluation.scorer import load_scorer
from hypersd_jax.evaluation.scorer_reward import EMBEDDED_REWARDS, ScorerReward
from hypersd_jax.rewards.trainable import TrainableReward

PROMPTS = ["a red apple on a white background", "a sleeping cat"]


def test_both_read_prompts() -> None:
    assert EMBEDDED_REWARDS == ("embedded:report", "embedded:reward")
    assert all(ScorerReward(name).tokenize(PROMPTS).shape[0] == 2 for name in EMBEDDED_REWARDS)


def test_it_scores_as_the_scorer_does() -> None:
    reward: TrainableReward = ScorerReward("embedded:reward")
    images = np.random.default_rng(0).uniform(0.2, 0.8, (2, 16, 16, 3)).astype(np.float32)
    ids = reward.tokenize(PROMPTS)
    found = jax.jit(reward.scores)(reward.params, images, ids)
    expected = load_scorer("reward").score(images, PROMPTS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
