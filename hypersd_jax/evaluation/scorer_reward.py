"""The scorers of the embedded images as rewards: ``embedded:reward`` to train on, ``embedded:report`` to judge."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import jax

from hypersd_jax.evaluation.lite0 import load_lite0
from hypersd_jax.evaluation.scorer import ScorerName, ScorerSpec, load_scorer, score
from hypersd_jax.rewards import LoadedReward

PREFIX = "embedded:"
EMBEDDED_REWARDS: tuple[str, ...] = tuple(f"{PREFIX}{name}" for name in typing.get_args(ScorerName))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScorerModel:
    """The static part of a scorer (`hypersd_jax.rewards.RewardModel`)."""

    spec: ScorerSpec

    def __call__(self, params: Any, images: jax.Array, ids: jax.Array) -> jax.Array:
        """Compute scores (B,) of images (B, H, W, 3) in 0..1 against tokens (B, L), as `Scorer.score`."""
        return score(self.spec, params["scorer"], params["trunk"], images, ids)


def embedded_reward(name: str) -> LoadedReward:
    """Load the scorer of one of `EMBEDDED_REWARDS` as a reward."""
    scorer = load_scorer(typing.cast(ScorerName, name.removeprefix(PREFIX)))
    params: Any = {"scorer": dict(scorer.params), "trunk": load_lite0()}
    return LoadedReward(model=ScorerModel(spec=scorer.spec), params=params, tokenize=scorer.tokens)
