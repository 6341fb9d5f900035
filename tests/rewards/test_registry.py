"""A reward that is registered from outside is loaded by its name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import hypersd_jax as hs
from hypersd_jax.errors import UserError
from hypersd_jax.rewards import REWARDS, Reward, register_reward


def load_brightness(path: str | os.PathLike[str]) -> Reward:
    """The mean of an image times the factor in a file."""
    factor = float(Path(path).read_text())

    def brightness(images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        return np.float32(factor) * np.asarray(images, np.float32).mean((1, 2, 3))

    return brightness


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REWARDS, "brightness", load_brightness)  # so that it is taken out again
    del REWARDS["brightness"]
    register_reward("brightness", load_brightness)


def test_it_scores(registered: None, tmp_path: Path) -> None:
    (tmp_path / "factor").write_text("2")
    images = np.stack([np.full((4, 4, 3), value) for value in (0.25, 0.5)])
    scores = hs.rewards.load("brightness", tmp_path / "factor")(images, ["dark", "grey"])
    np.testing.assert_allclose(scores, [0.5, 1.0])


def test_its_name_is_offered(registered: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean brightness"):
        hs.rewards.load("britness", tmp_path)
    with pytest.raises(ValueError, match="'brightness'"):
        register_reward("brightness", load_brightness)


def test_unregistered_it_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'brightness' is not a reward"):
        hs.rewards.load("brightness", tmp_path)
