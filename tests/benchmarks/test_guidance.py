"""What benchmarks/guidance.py measures: the background that a prompt names, by the images' corners."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.guidance import background_share, named_backgrounds, sampled
from hypersd_jax.data import COLOURS
from hypersd_jax.pipeline import Pipeline
from tests.helpers.tiny_model import tiny_model


def test_prompts_name_their_ground() -> None:
    items = named_backgrounds(40)
    assert len(items) == 40
    assert all(item.prompt.endswith(f", {item.background} background") for item in items)
    assert named_backgrounds(5) == items[:5]


def test_the_ground_is_the_nearest_to_the_corners() -> None:
    items = named_backgrounds(6)
    images = np.zeros((6, 8, 8, 3), np.uint8)
    images[:] = np.asarray([COLOURS[item.background] for item in items], np.uint8)[:, None, None]
    images[:, 2:6, 2:6] = 255  # what is in the middle does not count
    assert background_share(images, items) == 1.0
    images[:3] = np.asarray(COLOURS["white"], np.uint8)
    assert background_share(images, items) == 0.5


def test_the_negative_prompt_is_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items, pipe = named_backgrounds(3), Pipeline.from_pretrained(tiny_model(tmp_path / "model"))
    asked: list[tuple[Any, ...]] = []

    def recorded(self: Pipeline, prompt: list[str], negative: list[str] | None, **settings: Any) -> np.ndarray:
        asked.append((prompt, negative, settings))
        return np.full((len(prompt), 4, 4, 3), 0.5, np.float32)

    monkeypatch.setattr(Pipeline, "__call__", recorded)
    images = sampled(pipe, 8, 5.0, items, True)
    assert images.dtype == np.uint8
    assert np.all(images == 128)
    prompts, negatives, settings = asked[0]
    assert prompts == [item.prompt for item in items]
    assert negatives == [f"{item.background} background" for item in items]
    assert (settings["steps"], settings["guidance"]) == (8, 5.0)
    sampled(pipe, 8, 5.0, items, False)
    assert asked[1][1] is None
    np.testing.assert_array_equal(asked[0][2]["latents"], asked[1][2]["latents"])
