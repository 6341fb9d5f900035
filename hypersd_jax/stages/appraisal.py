"""What the comparison's pictures are measured by beside the teacher's: training pictures, their texts, one another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hypersd_jax.data import EvalItem
from hypersd_jax.evaluation import SPECS, features, load_scorer, seen_by
from hypersd_jax.stages.evaluate_drawing import Drawn, Prompted
from hypersd_jax.stages.evaluate_rows import Row, Yardsticks, diversity_values, picture_row
from hypersd_jax.stages.evaluate_sources import training_pictures


class Pictures(NamedTuple):
    """``images`` uint8 (N, H, W, 3) with their ``features`` (N, 1280)."""

    images: np.ndarray
    features: np.ndarray


def look(images: np.ndarray) -> Pictures:
    """Pictures with their features."""
    return Pictures(images, features(images))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Appraiser:
    """The list's prompts, and what its pictures are measured with."""

    items: tuple[Prompted, ...]
    yardsticks: Yardsticks

    def values(self, pictures: Pictures, further: Sequence[np.ndarray] | None) -> Row:
        """Text match, FID and KID to training pictures, and diversity, under their keys of results.json.

        Args:
            pictures: one for each item.
            further: features (M, 1280) of the first M items from each of several other seeds; None: no diversity.
        """
        drawn = Drawn(*pictures, seen=seen_by(SPECS["report"], pictures.images), seconds=0.0, chunks=())
        row = picture_row(self.yardsticks, self.items, drawn)
        return row if further is None else {**row, **diversity_values(pictures.features, further)}


def make_appraiser(items: Sequence[EvalItem], groups: Sequence[str] | None, side: int) -> Appraiser:
    """That of a list of embedded prompts: as many training pictures of ``groups`` at ``side`` px, and our scorer."""
    real = features(training_pictures(len(items), groups, side)[0])
    return Appraiser(
        items=tuple(Prompted(item.prompt, item.seed) for item in items),
        yardsticks=Yardsticks(real=real, scorer=load_scorer("report")),
    )
