"""What the comparison's samples are measured by beside the teacher's: training images, their texts, one another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hypersd_jax.data import EvalItem
from hypersd_jax.evaluation import SPECS, diversity, features, knows, load_scorer, mean_estimate, seen_by
from hypersd_jax.stages.evaluate_drawing import Drawn, Prompted
from hypersd_jax.stages.evaluate_rows import Row, Yardsticks, diversity_values, estimate_values, picture_row
from hypersd_jax.stages.evaluate_sources import training_pictures

SETS_LEAST = 128
"""Of fewer samples of a dataset's own captions no FID or KID is given: chance would decide them."""

Item = EvalItem | Prompted


class Pictures(NamedTuple):
    """``images`` uint8 (N, H, W, 3) with their ``features`` (N, 1280)."""

    images: np.ndarray
    features: np.ndarray


def look(images: np.ndarray) -> Pictures:
    """Pictures with their features."""
    return Pictures(images, features(images))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Appraiser:
    """The list's prompts, and what its samples are measured with.

    ``own``: the prompts are a few captions of the user's dataset, each from several seeds.
    """

    items: tuple[Prompted, ...]
    yardsticks: Yardsticks
    own: bool = False

    @property
    def measures_sets(self) -> bool:
        """Whether FID and KID to the teacher's samples are given."""
        return not self.own or len(self.items) >= SETS_LEAST

    @property
    def units(self) -> np.ndarray | None:
        """What is independent of one another, see `mean_estimate`: the prompts, where several have several seeds."""
        return self.yardsticks.units

    def values(self, pictures: Pictures, further: Sequence[np.ndarray] | None) -> Row:
        """Text match, FID and KID to training pictures, and diversity, under their keys of results.json.

        Args:
            pictures: one for each item.
            further: features (M, 1280) of the first M items from each of several other seeds; None: no diversity but
                that of the seeds of the list itself.
        """
        images = pictures.images
        seen = seen_by(SPECS["report"], images) if self.yardsticks.scorer else np.empty((len(images), 0))
        row = picture_row(self.yardsticks, self.items, Drawn(*pictures, seen=seen, seconds=0.0, chunks=()))
        if self.own:
            return {**row, **self._own_diversity(pictures.features)}
        return row if further is None else {**row, **diversity_values(pictures.features, further)}

    def same_prompt(self) -> list[np.ndarray]:
        """The places of each prompt's samples in the list, of prompts that have several."""
        places: dict[str, list[int]] = {}
        for place, item in enumerate(self.items):
            places.setdefault(item.prompt, []).append(place)
        return [np.asarray(each) for each in places.values() if len(each) > 1]

    def _own_diversity(self, seen: np.ndarray) -> Row:
        values = [diversity(seen[places][None])[0] for places in self.same_prompt()]
        return estimate_values("diversity", mean_estimate(np.asarray(values))) if values else {}


def make_appraiser(items: Sequence[EvalItem], groups: Sequence[str] | None, side: int) -> Appraiser:
    """That of a list of embedded prompts: as many training pictures of ``groups`` at ``side`` px, and our scorer."""
    real = features(training_pictures(len(items), groups, side)[0])
    return Appraiser(
        items=tuple(Prompted(item.prompt, item.seed) for item in items),
        yardsticks=Yardsticks(real=real, scorer=load_scorer("report")),
    )


def own_appraiser(prompts: Sequence[str], samples: int) -> Appraiser:
    """That of a dataset's own captions: so many samples, dealt out to them in turn, sample i from seed i.

    Text match is given where our scorer knows all their words.
    """
    texts = list(dict.fromkeys(prompts))
    items = tuple(Prompted(texts[seed % len(texts)], seed) for seed in range(samples))
    scorer = load_scorer("report")
    yardsticks = Yardsticks(
        scorer=scorer if knows(scorer, texts) else None,
        units=np.arange(samples) % len(texts) if len(texts) > 1 else None,
    )
    return Appraiser(items=items, yardsticks=yardsticks, own=True)
