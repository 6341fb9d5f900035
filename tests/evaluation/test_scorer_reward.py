"""The embedded scorers as rewards to train on."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from hypersd_jax.evaluation.scorer import load_scorer
from hypersd_jax.evaluation.scorer_reward import EMBEDDED_REWARDS, ScorerReward
from hypersd_jax.rewards.trainable import TrainableReward

PROMPTS = ["a red apple on a white background", "a sleeping cat"]


@pytest.mark.parametrize("name", EMBEDDED_REWARDS)
def test_it_scores_as_the_scorer_does(name: str) -> None:
    reward: TrainableReward = ScorerReward(name)
    images = np.random.default_rng(0).uniform(0.2, 0.8, (2, 16, 16, 3)).astype(np.float32)
    ids = reward.tokenize(PROMPTS)
    assert ids.shape[0] == 2
    found = jax.jit(reward.scores)(reward.params, images, ids)
    expected = load_scorer(name.removeprefix("embedded:")).score(images, PROMPTS)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
