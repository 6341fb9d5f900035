"""The embedded scorers as rewards to train on."""

from __future__ import annotations

import numpy as np

from hypersd_jax.evaluation.scorer import load_scorer, seen_by
from hypersd_jax.evaluation.scorer_reward import EMBEDDED_REWARDS, embedded_reward

PROMPTS = ["a red apple on a white background", "a sleeping cat"]


def test_both_read_prompts() -> None:
    assert EMBEDDED_REWARDS == ("embedded:report", "embedded:reward", "embedded:pixels")
    assert all(embedded_reward(name).tokenize(PROMPTS).shape[0] == 2 for name in EMBEDDED_REWARDS)


def test_it_scores_as_the_scorer_does() -> None:
    """As its two towers, which reports call one by one."""
    images, scorer = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8), load_scorer("reward")
    found = embedded_reward("embedded:reward")(images / np.float32(255), PROMPTS)
    expected = 100.0 * np.sum(scorer.images(seen_by(scorer.spec, images)) * scorer.text(PROMPTS), axis=-1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
