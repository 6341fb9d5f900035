"""What training needs of a reward: a pure function of parameters, images and tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from hypersd_jax.errors import UserError
from hypersd_jax.rewards.clip_score import ClipScore, clip_scores
from hypersd_jax.rewards.registry import load


@runtime_checkable
class TrainableReward(Protocol):
    """A reward that a compiled training step computes and differentiates in the images."""

    @property
    def params(self) -> Any:
        """Parameters, a tree of arrays: an argument of the compiled step."""

    def tokenize(self, prompts: Sequence[str]) -> Any:
        """Tokenize prompts on the host: an array, or a tree of arrays, of shapes (B, ...)."""

    def scores(self, params: Any, images: jax.Array, ids: Any) -> jax.Array:
        """Score images (B, H, W, 3) in 0..1 against tokens (B, ...): (B,) float32, each of its own image alone."""


class TrainableClip:
    """The CLIP score as a `TrainableReward`."""

    def __init__(self, clip: ClipScore) -> None:
        """Wrap a loaded CLIP."""
        self._clip = clip
        self.params = dict(clip.params)

    def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        """Tokenize prompts to ids (B, S) int32."""
        return self._clip.tokenize(prompts)

    def scores(self, params: Any, images: jax.Array, ids: Any) -> jax.Array:
        """Compute CLIP scores (B,), as `clip_scores`."""
        return clip_scores(self._clip.model, params, images, ids)


def load_trainable(name: str, path: str | os.PathLike[str]) -> TrainableReward:
    """Load a reward of `REWARDS` to train on.

    Raises:
        UserError: no reward has this name, its weights are at fault, or it only scores.
    """
    reward: Any = load(name, path)
    if isinstance(reward, ClipScore):
        return TrainableClip(reward)
    if isinstance(reward, TrainableReward):
        return reward
    raise UserError(f"{name!r} scores images but cannot be trained on: it lacks params, tokenize or scores")
