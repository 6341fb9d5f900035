"""The columns of all tables: how each is shown and, where it is a metric, what computes it and from what."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from hypersd_jax.evaluation.metrics import (
    Estimate,
    diversity,
    feature_distance,
    frechet_distance,
    image_distance,
    kernel_distance,
    mean_estimate,
)
from hypersd_jax.evaluation.neighbours import FEWEST, NEIGHBOURS, covered_share
from hypersd_jax.evaluation.patches import PATCH
from hypersd_jax.evaluation.text_match import TextMatch

Value = float | Estimate | np.ndarray | None
"""A number, one with its standard error, one of each image (N,), or nothing to say."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """A model's N images of a list, and what they are measured against; None where there is no such thing.

    Attributes:
        prompts: of the images.
        images: uint8 (N, H, W, 3).
        features: (N, 1280).
        patches: features (N, 1280) of their middles.
        seeds: features (S, 1280) of each prompt that has several seeds.
        real: features (M, 1280) of real images.
        real_patches: features (M, 1280) of their middles.
        reference: features (M, 1280) of the reference's images, as a set.
        pairs: the reference's images (N, H, W, 3) and features (N, 1280), of the same prompts from the same latents.
        is_reference: these images are the reference's own.
        match: text match by the reporting scorer.
        clip_match: the same by a CLIP of the user's.
        rewards: scores (N,) by the user's rewards, by name.
    """

    prompts: Sequence[str]
    images: np.ndarray
    features: np.ndarray
    patches: np.ndarray | None = None
    seeds: Sequence[np.ndarray] | None = None
    real: np.ndarray | None = None
    real_patches: np.ndarray | None = None
    reference: np.ndarray | None = None
    pairs: tuple[np.ndarray, np.ndarray] | None = None
    is_reference: bool = False
    match: TextMatch | None = None
    clip_match: TextMatch | None = None
    rewards: Mapping[str, np.ndarray] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """A key of results.json: how tables and pages show it and, where it is a metric, how it is computed.

    Attributes:
        key: the row's key; ``KEY_se`` beside it is a standard error.
        heading: above the column; "" shows no column.
        digits: after the point.
        better: which way; None where neither is.
        note: what a reader must know about it.
        plot: its title where it is plotted against steps and calls.
        measure: computes a metric; values of each image (N,) are averaged, with a standard error over prompts.
        needs: fields of `Measured` that must be there, else the row has no such key.
        constants: numbers of its definition, part of the protocol's hash.
    """

    key: str
    heading: str
    digits: int = 0
    better: Literal["lower", "higher"] | None = None
    note: str = ""
    plot: str = ""
    measure: Callable[[Measured], Value] | None = None
    needs: tuple[str, ...] = ()
    constants: tuple[float, ...] = ()


COLUMNS: dict[str, Column] = {}
"""By key, in the order of the tables."""


def register_column(column: Column) -> None:
    """Add a column, or a metric, to all rows and tables.

    Raises:
        ValueError: another column has that key.
    """
    if column.key in COLUMNS:
        raise ValueError(f"there is a column {column.key!r} already")
    COLUMNS[column.key] = column


def column_notes(keys: Sequence[str]) -> list[str]:
    """Collect the notes on the columns of these keys, each note once."""
    return list(dict.fromkeys(column.note for key, column in COLUMNS.items() if key in keys and column.note))


def _distance(found: Measured) -> Value:
    assert found.pairs is not None
    return image_distance(found.images, found.pairs[0])


def _feature_distance(found: Measured) -> Value:
    assert found.pairs is not None
    return feature_distance(found.features, found.pairs[1])


def _kid(found: Measured) -> Value:
    assert found.reference is not None
    return None if found.is_reference else kernel_distance(found.features, found.reference)


def _fid_teacher(found: Measured) -> Value:
    assert found.reference is not None
    return 0.0 if found.is_reference else frechet_distance(found.features, found.reference)


def _fid_train(found: Measured) -> Value:
    assert found.real is not None
    return frechet_distance(found.features, found.real)


def _kid_train(found: Measured) -> Value:
    assert found.real is not None
    return kernel_distance(found.features, found.real)


def _patch_kid_train(found: Measured) -> Value:
    assert found.patches is not None
    assert found.real_patches is not None
    return kernel_distance(found.patches, found.real_patches)


def _precision(found: Measured) -> Value:
    assert found.real is not None
    return _covered(found.features, found.real)


def _recall(found: Measured) -> Value:
    assert found.real is not None
    return _covered(found.real, found.features)


def _covered(points: np.ndarray, support: np.ndarray) -> Value:
    return covered_share(points, support) if min(len(points), len(support)) >= FEWEST else None


def _diversity(found: Measured) -> Value:
    assert found.seeds is not None
    return mean_estimate(np.concatenate([diversity(seeds[None]) for seeds in found.seeds]))


def _text(part: Literal["own", "shuffled", "gains"], of: Literal["match", "clip_match"] = "match") -> dict[str, Any]:
    """Format a column's text about a part of a text match."""
    return {"measure": lambda found: getattr(getattr(found, of), part), "needs": (of,), "digits": 2}


_SETS = (
    "FID and KID: EfficientNet-Lite0 features; they compare with no Inception figure, and only at the same number of "
    "images. Those to training images are against as many real ones. A row of real images, or of the teacher from "
    "other latents, is their floor."
)
_COVERED = (
    "Precision: share of the images that lie among training images in EfficientNet-Lite0 features, no further from one "
    "than its third nearest neighbour. Recall: share of the training images that lie among these images. They compare "
    "only at the same number of images."
)
_MATCH = (
    "Text match: 100 times the cosine between image and prompt, by a scorer trained on the embedded images, which is "
    "no CLIP. Shuffled: the same images with one another's prompts. Gain: the difference, zero for an image that says "
    "nothing of its prompt."
)
for _column in (
    Column(key="model", heading="Model"),
    Column(key="source", heading="Source"),
    Column(key="type", heading="Type"),
    Column(key="steps", heading="Steps"),
    Column(key="guidance", heading="Guidance", digits=1),
    Column(key="calls", heading="Calls", note="Calls: UNet calls an image; guidance doubles them."),
    Column(
        key="distance",
        heading="Distance to reference",
        digits=3,
        better="lower",
        plot="Distance to the reference's images",
        note="Distance: root mean squared pixel difference (0..1) to the reference's image (the teacher's at many "
        "steps) of the same prompt from the same latents. Its error is that of a mean over prompts.",
        measure=_distance,
        needs=("pairs",),
    ),
    Column(
        key="feature_distance",
        heading="Feature distance to reference",
        digits=2,
        better="lower",
        note="Feature distance: the same in features.",
        measure=_feature_distance,
        needs=("pairs",),
    ),
    Column(
        key="margin",
        heading="Margin",
        digits=4,
        better="higher",
        note="Margin: how much nearer a student is than the teacher at as many calls, in distance, mean over prompts "
        "of the paired difference; the nearest such teacher counts, with or without guidance.",
    ),
    Column(key="kid", heading="KID", digits=3, better="lower", note=_SETS, measure=_kid, needs=("reference",)),
    Column(key="kid_margin", heading="Margin in KID", digits=3, better="higher"),
    Column(
        key="clip_gain",
        heading="Gain in text match",
        better="higher",
        note=_MATCH,
        plot="Gain in text match",
        **_text("gains"),
    ),
    Column(
        key="fid_train",
        heading="FID to training images",
        digits=1,
        better="lower",
        note=_SETS,
        measure=_fid_train,
        needs=("real",),
    ),
    Column(
        key="fid_teacher",
        heading="FID to reference",
        digits=1,
        better="lower",
        measure=_fid_teacher,
        needs=("reference",),
    ),
    Column(
        key="kid_train",
        heading="KID to training images",
        digits=3,
        better="lower",
        measure=_kid_train,
        needs=("real",),
    ),
    Column(
        key="patch_kid_train",
        heading="Patch KID to training images",
        digits=3,
        better="lower",
        note="Patch KID: KID of the images' middle quarters, enlarged to the images' size: how sharp they are.",
        measure=_patch_kid_train,
        needs=("patches", "real_patches"),
        constants=(PATCH,),
    ),
    Column(
        key="precision",
        heading="Precision",
        digits=3,
        better="higher",
        note=_COVERED,
        measure=_precision,
        needs=("real",),
        constants=(NEIGHBOURS,),
    ),
    Column(
        key="recall",
        heading="Recall",
        digits=3,
        better="higher",
        note=_COVERED,
        measure=_recall,
        needs=("real",),
        constants=(NEIGHBOURS,),
    ),
    Column(key="clip", heading="Text match", better="higher", **_text("own")),
    Column(key="clip_shuffled", heading="Text match, shuffled prompts", **_text("shuffled")),
    Column(key="clip_real", heading="CLIP score", better="higher", **_text("own", "clip_match")),
    Column(key="clip_real_shuffled", heading="CLIP score, shuffled prompts", **_text("shuffled", "clip_match")),
    Column(key="clip_real_gain", heading="Gain in CLIP score", better="higher", **_text("gains", "clip_match")),
    Column(
        key="diversity",
        heading="Diversity",
        digits=2,
        better="higher",
        note="Diversity: mean distance in features between images of one prompt from different seeds, mean over "
        "prompts; zero where every seed gives one image. What is to be kept is the teacher's at many steps.",
        measure=_diversity,
        needs=("seeds",),
    ),
    Column(key="clip_score", heading="CLIP score", digits=2, better="higher"),
    Column(key="aesthetic_score", heading="Aesthetic score", digits=2, better="higher"),
    Column(key="image_reward", heading="ImageReward", digits=2, better="higher"),
    Column(key="pickscore_100", heading="PickScore/100", digits=3, better="higher"),
    Column(key="seconds_per_image", heading="Seconds per image", digits=3, better="lower"),
    Column(key="baseline", heading="Nearest teacher"),
    Column(key="sampler", heading="Sampler"),
    Column(key="n", heading="Images"),
    Column(key="protocol", heading=""),
):
    register_column(_column)
