"""What benchmarks/guidance.py measures: the ground that a prompt names, by the pictures' corners."""

from __future__ import annotations

import numpy as np

from benchmarks.guidance import draw, ground_share, named_grounds
from hypersd_jax.data import COLOURS


def test_prompts_name_their_ground() -> None:
    items = named_grounds(40)
    assert len(items) == 40
    assert all(item.prompt.endswith(f", {item.background} background") for item in items)
    assert named_grounds(5) == items[:5]


def test_the_ground_is_the_nearest_to_the_corners() -> None:
    items = named_grounds(6)
    images = np.zeros((6, 8, 8, 3), np.uint8)
    images[:] = np.asarray([COLOURS[item.background] for item in items], np.uint8)[:, None, None]
    images[:, 2:6, 2:6] = 255  # what is drawn in the middle does not count
    assert ground_share(images, items) == 1.0
    images[:3] = np.asarray(COLOURS["white"], np.uint8)
    assert ground_share(images, items) == 0.5


class Recorder:
    """A pipeline that draws grey, and keeps what it was asked for."""

    def __call__(self, prompt: list[str], negative_prompt: list[str] | None, **settings: object) -> np.ndarray:
        self.asked = (prompt, negative_prompt, settings)
        return np.full((len(prompt), 4, 4, 3), 0.5, np.float32)


def test_the_negative_prompt_is_the_ground() -> None:
    items, pipe = named_grounds(3), Recorder()
    images = draw(pipe, 8, 5.0, items, True)  # type: ignore[arg-type]
    assert images.dtype == np.uint8
    assert np.all(images == 128)
    prompts, negatives, settings = pipe.asked
    assert prompts == [item.prompt for item in items]
    assert negatives == [f"{item.background} background" for item in items]
    assert (settings["steps"], settings["guidance"], settings["seed"]) == (8, 5.0, 0)
    draw(pipe, 8, 5.0, items, False)  # type: ignore[arg-type]
    assert pipe.asked[1] is None
