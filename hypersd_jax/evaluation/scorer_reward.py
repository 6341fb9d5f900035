"""The scorers of the embedded images as rewards: ``embedded:reward`` to train on, ``embedded:report`` to judge."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from hypersd_jax.evaluation.lite0 import load_lite0
from hypersd_jax.evaluation.scorer import ScorerName, load_scorer, score

PREFIX = "embedded:"
EMBEDDED_REWARDS: tuple[str, ...] = tuple(f"{PREFIX}{name}" for name in typing.get_args(ScorerName))


class ScorerReward:
    """A scorer as a `rewards.trainable.TrainableReward`."""

    def __init__(self, name: str) -> None:
        """Load the scorer of one of `EMBEDDED_REWARDS`."""
        self._scorer = load_scorer(typing.cast(ScorerName, name.removeprefix(PREFIX)))
        self.params = {"scorer": dict(self._scorer.params), "trunk": dict(load_lite0())}

    def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        """Tokenize prompts to int32 (B, L)."""
        return self._scorer.tokens(prompts)

    def scores(self, params: Any, images: jax.Array, ids: Any) -> jax.Array:
        """Compute scores (B,) of images (B, H, W, 3) in 0..1, as `Scorer.score`."""
        return score(self._scorer.spec, params["scorer"], params["trunk"], images, ids)
