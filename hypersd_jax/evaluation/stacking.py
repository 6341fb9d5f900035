"""Style LoRAs on a few-step LoRA: how much of the style, and of the few-step LoRA's quality, both together keep.

All images of a prompt start from the same noise. With b, s, f and t the images of the base at many guided steps, of the
base with the styles there, of the few-step LoRA at n steps, and of both at n steps, and phi the features of
`evaluation.lite0`:

    style    <phi(t) - phi(f), d> / <phi(s) - phi(b), d>, where d is the mean of phi(s) - phi(b)
    match    (match(t) / match(f)) / (match(s) / match(b)), match being the text match above chance
    nearness |phi(f) - phi(b)| / |phi(t) - phi(s)|

each of means over the prompts. `style` is how far few steps move along the style's direction, against many; the
direction of one half of the prompts is used for the other, so that noise in it counts for nothing. `match` is the share
of the text match that the styles leave at few steps, against the share that they leave at many, and `nearness` compares
how far few steps end from many without and with the styles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from hypersd_jax.evaluation.metrics import Estimate, feature_distance
from hypersd_jax.evaluation.samples import Samples
from hypersd_jax.evaluation.scorer import Scorer
from hypersd_jax.evaluation.text_match import text_match

# The jackknife leaves out one of so many parts of the prompts at a time.
PARTS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retention:
    """What both together keep; 1 is all.

    Attributes:
        style: of the style.
        match: of the text match; None where the scorer does not know the prompts' words.
        nearness: of the nearness to many steps.
    """

    style: Estimate
    match: Estimate | None
    nearness: Estimate

    @property
    def quality(self) -> Estimate:
        """Of the few-step LoRA's quality: its text match, or where that is not known its nearness."""
        return self.match or self.nearness

    @property
    def least(self) -> float:
        """The smaller of both, of which more than all counts as all."""
        return min(self.style.mean, self.quality.mean, 1.0)


def retention(base: Samples, styled: Samples, fast: Samples, both: Samples, scorer: Scorer | None) -> Retention:
    """Measure what is kept, with standard errors by the jackknife over prompts; the samples are of the same list."""
    offset, moved = styled.features - base.features, both.features - fast.features
    parts = np.arange(len(offset)) % 2
    along = np.empty((2, len(offset)))
    for half in (0, 1):
        direction = offset[parts != half].mean(axis=0)
        direction = direction / max(float(np.linalg.norm(direction)), 1e-12)
        along[:, parts == half] = moved[parts == half] @ direction, offset[parts == half] @ direction
    near = np.stack([feature_distance(fast.features, base.features), feature_distance(both.features, styled.features)])
    gains = None if scorer is None else _gains(scorer, (both, fast, styled, base))
    return Retention(
        style=ratio(along),
        match=None if gains is None else ratio(np.stack([gains[0], gains[1], gains[3], gains[2]]), pairs=2),
        nearness=ratio(near),
    )


def ratio(values: np.ndarray, *, pairs: int = 1) -> Estimate:
    """Estimate a quotient of means, or the product of such quotients.

    Args:
        values: (2 * pairs, N), numerator and denominator of each quotient by turns.
        pairs: number of quotients.

    Returns:
        the product of the quotients of means over N, with the jackknife's standard error.
    """

    def of(chosen: np.ndarray) -> float:
        means = chosen.mean(axis=1)
        return float(np.prod([means[2 * i] / means[2 * i + 1] for i in range(pairs)]))

    part = np.arange(values.shape[1]) % PARTS
    left = np.asarray([of(values[:, part != each]) for each in np.unique(part) if (part != each).any()])
    count = len(left)
    error = np.sqrt((count - 1) / count * np.sum((left - left.mean()) ** 2)) if count > 1 else np.nan
    return Estimate(of(values), float(error))


def best(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Choose the row that keeps most of style and quality, whichever is less; of equal ones that of lowest scales."""
    return max(rows, key=lambda row: (round(row["least"], 4), -row["style_scale"], -row["fast_scale"]))


def _gains(scorer: Scorer, samples: Sequence[Samples]) -> list[np.ndarray] | None:
    """Text match above chance (N,) of each; None where the prompts cannot be shuffled."""
    found = [text_match(scorer, each.seen, [item.prompt for item in each.items]) for each in samples]
    return None if any(match is None for match in found) else [match.gains for match in found if match is not None]
