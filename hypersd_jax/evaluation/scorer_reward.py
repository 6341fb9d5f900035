"""The embedded images' rewards: ``embedded:reward`` to train on, ``embedded:report``, ``embedded:pixels`` to judge."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import jax

from hypersd_jax.evaluation.lite0 import load_lite0
from hypersd_jax.evaluation.pixel_judge import PixelJudge, classes_of, load_pixel_judge
from hypersd_jax.evaluation.scorer import ScorerName, ScorerSpec, load_scorer, score
from hypersd_jax.rewards import LoadedReward

PREFIX = "embedded:"
PIXELS = f"{PREFIX}pixels"
EMBEDDED_REWARDS: tuple[str, ...] = (*(f"{PREFIX}{name}" for name in typing.get_args(ScorerName)), PIXELS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScorerModel:
    """The static part of a scorer (`hypersd_jax.rewards.RewardModel`)."""

    spec: ScorerSpec

    def __call__(self, params: Any, images: jax.Array, ids: jax.Array) -> jax.Array:
        """Compute scores (B,) of images (B, H, W, 3) in 0..1 against tokens (B, L), as `Scorer.score`."""
        return score(self.spec, params["scorer"], params["trunk"], images, ids)


def embedded_reward(name: str) -> LoadedReward:
    """Load one of `EMBEDDED_REWARDS`."""
    if name == PIXELS:
        judge: Any = load_pixel_judge()
        return LoadedReward(model=PixelJudge(), params=judge, tokenize=classes_of)
    scorer = load_scorer(typing.cast(ScorerName, name.removeprefix(PREFIX)))
    parts: Any = {"scorer": dict(scorer.params), "trunk": load_lite0()}
    return LoadedReward(model=ScorerModel(spec=scorer.spec), params=parts, tokenize=scorer.tokens)
