"""Rewards that are reported: loaded from the user's files, each a column, the scores kept between runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from hypersd_jax.errors import UserError
from hypersd_jax.evaluation.columns import COLUMNS, Column, register_column
from hypersd_jax.rewards import Reward, contents_digest, load
from hypersd_jax.weights.tensors import replacing

AT_A_TIME = 64
"""Images whose scores are kept in one file: what a stopped run loses at most."""

HEADINGS = {
    "clip": ("CLIP score (--reward)", 2),
    "aesthetic": ("Aesthetic score", 2),
    "pickscore": ("PickScore", 2),
    "hpsv2": ("HPSv2", 4),
    "imagereward": ("ImageReward", 2),
}
"""Headings and digits of the rewards that the package knows; another one is called by its name."""

NOTE = (
    "Rewards: mean score of the images against their prompts, on the scale of each reward's authors. They compare by "
    "the same weights alone, and say nothing of a model that was trained on them."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportedReward:
    """A reward, and what names it in the protocol and where scores are kept.

    Attributes:
        name: as in `hypersd_jax.rewards.REWARDS`.
        reward: scores images (N, H, W, 3), uint8, against N prompts.
        digest: the hash of its files.
    """

    name: str
    reward: Reward
    digest: str

    def scores(self, images: np.ndarray, prompts: Sequence[str], cache: Path | None) -> np.ndarray:
        """Score images, (N,) float64.

        Args:
            images: uint8 (N, H, W, 3).
            prompts: one for each.
            cache: scores that this folder holds are read, the others computed and kept there; None: none is kept.

        Raises:
            UserError: kept scores are damaged, or cannot be written.
        """
        found = []
        with tqdm(
            total=len(images), unit="image", desc=f"scoring: {self.name}", disable=jax.process_index() != 0
        ) as bar:
            for start in range(0, len(images), AT_A_TIME):
                part = slice(start, start + AT_A_TIME)
                found.append(self._kept_scores(images[part], prompts[part], cache))
                bar.update(len(found[-1]))
        return np.concatenate(found)

    def _kept_scores(self, images: np.ndarray, prompts: Sequence[str], cache: Path | None) -> np.ndarray:
        path = None if cache is None else cache / f"{self._name_of(images, prompts)}.npy"
        if path is not None and path.exists():
            return _read_scores(path, len(images))
        scores = np.asarray(self.reward(images, prompts), np.float64)
        if path is not None:
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, scores, allow_pickle=False)
        return scores

    def _name_of(self, images: np.ndarray, prompts: Sequence[str]) -> str:
        """Name scores by all that they follow from; the images by their content, whatever made them."""
        pixels = hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()
        text = json.dumps([self.name, self.digest, list(prompts), list(images.shape), pixels])
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def load_reported(named: Sequence[tuple[str, Path]]) -> tuple[ReportedReward, ...]:
    """Load rewards by name and path, and give each its column.

    Raises:
        UserError: one line naming a reward that is not known or stands twice, or what is wrong with its weights.
    """
    found: dict[str, ReportedReward] = {}
    for name, path in named:
        if name in found:
            raise UserError(f"--reward {name}: given twice, and has one column")
        try:
            found[name] = ReportedReward(name=name, reward=load(name, path), digest=contents_digest(path))
        except UserError as error:
            raise UserError(f"--reward {name}: {error}") from None
        register_reward_column(name)
    return tuple(found.values())


def reward_key(name: str) -> str:
    """Return the key of a reward's column."""
    return f"reward_{name}"


def register_reward_column(name: str) -> None:
    """Add a reward's column to the tables, once."""
    if reward_key(name) in COLUMNS:
        return
    heading, digits = HEADINGS.get(name, (name, 3))
    register_column(
        Column(
            key=reward_key(name),
            heading=heading,
            digits=digits,
            better="higher",
            note=NOTE,
            measure=lambda found: None if found.rewards is None else found.rewards.get(name),
            needs=("rewards",),
        )
    )


def _read_scores(path: Path, count: int) -> np.ndarray:
    try:
        with path.open("rb") as opened:
            scores: np.ndarray = np.load(opened, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: kept scores are damaged ({error}); delete the file") from None
    if scores.shape != (count,):
        raise UserError(f"{path}: kept scores are damaged (their number differs); delete the file")
    return scores
