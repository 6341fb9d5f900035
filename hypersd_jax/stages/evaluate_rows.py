"""From pictures to rows of results.json: every figure beside its floor or its zero."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hypersd_jax.evaluation import (
    Estimate,
    Scorer,
    TextMatch,
    derangement,
    diversity,
    feature_distance,
    frechet_distance,
    image_distance,
    kernel_distance,
    mean_estimate,
    text_match,
)
from hypersd_jax.stages.evaluate_drawing import Drawn, Prompted

Row = dict[str, Any]
ClipScorer = Callable[[np.ndarray, Sequence[str]], Any]

LEAST = 3
"""Fewer pictures have no KID with a standard error, and no distance between sets is given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yardsticks:
    """What rows are measured with; None where the evaluation has no such thing.

    ``real``: features (M, 1280) of real pictures; ``scorer``: the reporting one; ``clip``: a CLIP of the user's;
    ``reference``: the many-step pictures, with the list that they were drawn from; ``units`` (N,): which samples are
    of one prompt, see `mean_estimate`.
    """

    real: np.ndarray | None = None
    scorer: Scorer | None = None
    clip: ClipScorer | None = None
    reference: tuple[Sequence[Prompted], Drawn] | None = None
    units: np.ndarray | None = None


def floor_row(first: np.ndarray, second: np.ndarray) -> Row:
    """Real pictures against other real ones, as many: what no model can be expected to go below."""
    return {"model": "real pictures against others", "n": len(first), **_against("train", first, second)}


def picture_row(yardsticks: Yardsticks, items: Sequence[Prompted], drawn: Drawn) -> Row:
    """Everything that can be said of these pictures, one for each item."""
    prompts = [item.prompt for item in items]
    row: Row = {"n": len(items)}
    if yardsticks.real is not None:
        row |= _against("train", drawn.features, yardsticks.real)
    if yardsticks.reference is not None:
        row |= _reference_values(items, drawn, *yardsticks.reference)
    if yardsticks.scorer is not None:
        row |= match_values("clip", text_match(yardsticks.scorer, drawn.seen, prompts), yardsticks.units)
    if yardsticks.clip is not None:
        row |= match_values("clip_real", _clip_match(yardsticks.clip, drawn.images, prompts))
    return row


def diversity_values(first: np.ndarray, others: Sequence[np.ndarray]) -> Row:
    """Of the same M prompts from several seeds, by features: the first M rows of ``first``, and each of ``others``."""
    stacked = np.stack([first[: len(others[0])], *others], axis=1)
    return estimate_values("diversity", mean_estimate(diversity(stacked)))


def match_values(key: str, match: TextMatch | None, units: np.ndarray | None = None) -> Row:
    """``KEY``, ``KEY_shuffled`` and ``KEY_gain`` with their standard errors; nothing where there is no match."""
    if match is None:
        return {}
    return {
        **estimate_values(key, mean_estimate(match.own, units)),
        **estimate_values(f"{key}_shuffled", mean_estimate(match.shuffled, units)),
        **estimate_values(f"{key}_gain", mean_estimate(match.own - match.shuffled, units)),
    }


def _against(key: str, mine: np.ndarray, theirs: np.ndarray) -> Row:
    """``fid_KEY`` and ``kid_KEY`` of two sets of features; the reference's KID is called ``kid`` alone."""
    if min(len(mine), len(theirs)) < LEAST:
        return {}
    kid = "kid" if key == "teacher" else f"kid_{key}"
    return {f"fid_{key}": frechet_distance(mine, theirs), **estimate_values(kid, kernel_distance(mine, theirs))}


def _reference_values(items: Sequence[Prompted], drawn: Drawn, listed: Sequence[Prompted], reference: Drawn) -> Row:
    """Distances to the reference as a set, and picture by picture where both drew the same latents."""
    if drawn.chunks == reference.chunks:
        return {"fid_teacher": 0.0, "distance": 0.0, "feature_distance": 0.0}
    row = _against("teacher", drawn.features, reference.features)
    places = {item: place for place, item in enumerate(listed)}
    if all(item in places for item in items):
        order = [places[item] for item in items]
        row |= estimate_values("distance", mean_estimate(image_distance(drawn.images, reference.images[order])))
        apart = feature_distance(drawn.features, reference.features[order])
        row |= estimate_values("feature_distance", mean_estimate(apart))
    return row


def _clip_match(clip: ClipScorer, images: np.ndarray, prompts: Sequence[str]) -> TextMatch | None:
    order = derangement(prompts)
    if order is None:
        return None
    own, shuffled = (np.asarray(clip(images, texts), np.float64) for texts in (prompts, [prompts[i] for i in order]))
    return TextMatch(own, shuffled)


def estimate_values(key: str, estimate: Estimate) -> Row:
    """``KEY`` and ``KEY_se``."""
    return {key: estimate.mean, f"{key}_se": estimate.standard_error}
