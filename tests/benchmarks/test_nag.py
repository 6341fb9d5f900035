"""What benchmarks/nag.py measures: how far an image's corners are from the background that its prompt names."""

from __future__ import annotations

import numpy as np

from benchmarks.guidance import named_backgrounds, nearest_background
from benchmarks.nag import STRENGTHS, distances, page
from hypersd_jax.data import COLOURS


def test_the_distance_is_of_the_corners() -> None:
    items = named_backgrounds(8)
    images = np.stack([np.full((16, 16, 3), COLOURS[item.background], np.uint8) for item in items])
    images[:, 2:-2, 2:-2] = 7  # the subject
    np.testing.assert_array_equal(distances(images, items), 0)
    assert nearest_background(images) == [item.background for item in items]
    images[:, :, :, 0] = np.where(images[:, :, :, 0] > 127, images[:, :, :, 0] - 30, images[:, :, :, 0] + 30)
    np.testing.assert_allclose(distances(images, items), 30 / np.sqrt(3))


def test_the_page_has_a_row_a_strength() -> None:
    numbers = {key: 0.5 for name in ("named", "distance", "match") for key in _keys(name)} | {"clipped": 0.01}
    names = ("nag_scale", "nag_tau", "nag_alpha")
    rows = [{"steps": 1, **dict(zip(names, each, strict=True)), **numbers} for each in STRENGTHS]
    lines = [line for line in page(rows, 64).splitlines() if line.startswith("| 1 |")]
    assert lines[0] == "| 1 | off | 50% | 0.5 ± 0.5 |  | 0.5 ± 0.5 |  | 1.0% |"
    assert lines[1] == "| 1 | 5, 2.5, 0.25 | 50% | 0.5 ± 0.5 | 0.5 ± 0.5 | 0.5 ± 0.5 | 0.5 ± 0.5 | 1.0% |"
    assert len(lines) == len(STRENGTHS)


def _keys(name: str) -> tuple[str, ...]:
    return name, f"{name}_se", f"{name}_change", f"{name}_change_se"
