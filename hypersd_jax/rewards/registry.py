"""The rewards by name: the one file to change, besides its own, when a reward is added."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from hypersd_jax.config import nearest
from hypersd_jax.errors import UserError
from hypersd_jax.rewards.aesthetic import load_aesthetic
from hypersd_jax.rewards.clip_score import load_clip, load_hpsv2, load_pickscore
from hypersd_jax.rewards.image_reward import load_image_reward

Reward = Callable[[Any, Sequence[str]], Any]
"""``(images, prompts) -> scores (B,) float32``, the higher the better."""

Loader = Callable[[str | os.PathLike[str]], Reward]
"""A function that reads a reward's weights from a folder or a file."""

REWARDS: dict[str, Loader] = {
    "clip": load_clip,
    "aesthetic": load_aesthetic,
    "pickscore": load_pickscore,
    "hpsv2": load_hpsv2,
    "imagereward": load_image_reward,
}


def register_reward(name: str, loader: Loader) -> None:
    """Add a reward to those that `load` knows.

    Raises:
        ValueError: another reward has that name.
    """
    if name in REWARDS:
        raise ValueError(f"there is a reward named {name!r} already")
    REWARDS[name] = loader


def load(name: str, path: str | os.PathLike[str]) -> Reward:
    """Load the reward of a name, with the weights at a path.

    Args:
        name: a key of `REWARDS`, see its loader: ``clip``, ``aesthetic``, ``pickscore``, ``hpsv2``, ``imagereward``, or
            one that was registered.
        path: folder or file of the weights.

    Returns:
        ``(images, prompts) -> scores (B,)`` on the reward's original scale, `LoadedReward` for those of this package:
        differentiable in the images.

    Raises:
        UserError: no reward has this name, or one line naming what is wrong with the weights.
    """
    if name not in REWARDS:
        raise UserError(f"{name!r} is not a reward{nearest(str(name), REWARDS)}")
    return REWARDS[name](path)
