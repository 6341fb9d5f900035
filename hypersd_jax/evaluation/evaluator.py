"""The one evaluator: from a model's samples to its row of results.json."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax.evaluation import generator
from hypersd_jax.evaluation.columns import COLUMNS, Column, Measured
from hypersd_jax.evaluation.generator import Item, Model
from hypersd_jax.evaluation.lite0 import NATIVE, SMALL, load_lite0
from hypersd_jax.evaluation.metrics import Estimate, mean_estimate, units_of
from hypersd_jax.evaluation.patches import patch_features
from hypersd_jax.evaluation.reported_rewards import ReportedReward
from hypersd_jax.evaluation.samples import Samples, image_features
from hypersd_jax.evaluation.scorer import Scorer, load_scorer
from hypersd_jax.evaluation.sources import RealImages
from hypersd_jax.evaluation.text_match import TextMatch, derangement, knows, text_match
from hypersd_jax.weights.fingerprints import fingerprint

Row = dict[str, Any]

CLIP = "--clip"
"""Names the user's CLIP among the rewards, of which one may be called clip as well."""

LEAST = 3
"""Of fewer images there is no KID with a standard error, and no distance between sets is given."""


class Evaluated(NamedTuple):
    """A row of results.json, and what is behind two of its means.

    Attributes:
        row: of the table.
        distances: (N,), float32, where there is a reference.
        match: how well each image fits its own prompt, (N,), float32, where the scorer knows the prompts.
    """

    row: Row
    distances: np.ndarray | None
    match: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Everything that the rows of a table are measured with; None where there is no such thing.

    Attributes:
        items: the list.
        further: its beginning from further seeds, for diversity; (): diversity is that of the seeds in the list itself.
        size: of the images (H, W), in pixels.
        real: features (M, 1280) of real images.
        real_patches: features (M, 1280) of their middles.
        real_name: names those images, as plain data.
        scorer: the reporting one, where it knows the prompts' words.
        clip: a CLIP of the user's.
        rewards: the user's, each a column.
        cache: folder that keeps what both score; None: nothing is kept.
        reference: the teacher's samples at many steps.
        reference_metadata: how those were sampled.
        least: of fewer images no distance between sets is given.
        left_out: keys of metrics that this table does not have.
    """

    items: tuple[Item, ...]
    further: tuple[tuple[Item, ...], ...]
    size: tuple[int, int]
    real: np.ndarray | None = None
    real_patches: np.ndarray | None = None
    real_name: Any = None
    scorer: Scorer | None = None
    clip: ReportedReward | None = None
    rewards: tuple[ReportedReward, ...] = ()
    cache: Path | None = None
    reference: Samples | None = None
    reference_metadata: Any = None
    least: int = LEAST
    left_out: tuple[str, ...] = ()

    @functools.cached_property
    def protocol(self) -> str:
        """Name what rows are measured on and with: rows of one protocol and one N are comparable.

        It covers prompts and seeds, the reference's sampler settings, the real images, the images' size, the networks
        that look at them, and the constants of the metrics; not the model of a row, nor how that samples.
        """
        parts: dict[str, Any] = {
            "items": [list(item) for item in self.items],
            "further": [[list(item) for item in items] for items in self.further],
            "reference": self.reference_metadata,
            "real": self.real_name,
            "size": list(self.size),
            "features": [_digest_of_lite0(), SMALL, NATIVE],
            "scorer": None if self.scorer is None else scorer_digest(self.scorer),
            "constants": {column.key: column.constants for column in COLUMNS.values() if column.constants},
        }
        given = {reward.name: reward.digest for reward in self.rewards}
        given |= {} if self.clip is None else {CLIP: self.clip.digest}
        # A table without the user's networks keeps the name that it had before there were any.
        return digest({**parts, "rewards": given} if given else parts)[:12]

    def with_reference(self, samples: Samples, metadata: Any) -> Evaluator:
        """Return a copy with a reference that was sampled as ``metadata`` say; its features are rounded to float16.

        So are those of a reference that is kept in a file, and the figures are the same by either.
        """
        rounded = samples.features.astype(np.float16).astype(np.float32)
        reference = dataclasses.replace(samples, features=rounded)
        return dataclasses.replace(self, reference=reference, reference_metadata=metadata)

    def with_real(self, images: RealImages) -> Evaluator:
        """Return a copy with the first set of real images."""
        patches = None
        if any("real_patches" in metric.needs for metric in self._metrics()):
            patches = patch_features(images.first)
        real = image_features(images.first)
        return dataclasses.replace(self, real=real, real_patches=patches, real_name=images.name)

    def floor(self, images: np.ndarray) -> Row:
        """Measure other real images (N, H, W, 3) against the real ones: what no model can be expected to go below."""
        row: Row = {"model": "real images against others", "n": len(images)}
        found = Measured(prompts=(), images=images, features=image_features(images), **self._against_real(images))
        for key, value in self._values(found):
            row |= estimate_values(key, mean_estimate(value) if isinstance(value, np.ndarray) else value)
        return {**row, "protocol": self.protocol}

    def evaluate(self, samples: Samples, model: Model | None = None, *, name: str = "") -> Evaluated:
        """Compute every registered metric that there is what it needs for.

        Args:
            samples: of a list.
            model: that generated them; None: they are real.
            name: of the row, where there is no model.
        """
        row: Row = {"model": name}
        if model is not None:
            settings = model.settings
            row = {"model": model.name, "sampler": settings.sampler, "steps": settings.steps}
            row |= {"guidance": settings.guidance, "calls": model.calls}
        row["n"] = len(samples.images)
        prompts = [item.prompt for item in samples.items]
        units = units_of(prompts)
        distances, measured = None, self._measured(samples, prompts)
        for key, value in self._values(measured):
            if key == "distance":
                distances = np.asarray(value, np.float32)
            row |= estimate_values(key, mean_estimate(value, units) if isinstance(value, np.ndarray) else value)
        if samples.seconds is not None:
            row["seconds_per_image"] = samples.seconds
        row["protocol"] = self.protocol
        return Evaluated(row, distances, None if measured.match is None else measured.match.own.astype(np.float32))

    def _metrics(self) -> list[Column]:
        """List the metrics of this table, whether or not there is what they need."""
        return [column for column in COLUMNS.values() if column.measure and column.key not in self.left_out]

    def _values(self, found: Measured) -> Iterator[tuple[str, Any]]:
        for metric in self._metrics():
            if metric.measure and all(getattr(found, need) is not None for need in metric.needs):
                value = metric.measure(found)
                if value is not None:
                    yield metric.key, value

    def _measured(self, samples: Samples, prompts: Sequence[str]) -> Measured:
        reference, enough = self.reference, len(samples.images) >= self.least
        fields = self._against_real(samples.images)
        if reference is not None:
            fields["is_reference"] = np.array_equal(samples.images, reference.images)
            if enough and len(reference.images) >= self.least:
                fields["reference"] = reference.features
            index_of = {item: index for index, item in enumerate(reference.items)}
            if all(item in index_of for item in samples.items):
                order = [index_of[item] for item in samples.items]
                fields["pairs"] = (reference.images[order], reference.features[order])
        if self.scorer is not None:
            fields["match"] = text_match(self.scorer, samples.seen, prompts)
        if self.clip is not None:
            fields["clip_match"] = self._clip_match(self.clip, samples.images, prompts)
        if self.rewards:
            fields["rewards"] = {each.name: each.scores(samples.images, prompts, self.cache) for each in self.rewards}
        seeds = self._seeds(samples, prompts)
        return Measured(
            prompts=prompts, images=samples.images, features=samples.features, seeds=seeds or None, **fields
        )

    def _clip_match(self, clip: ReportedReward, images: np.ndarray, prompts: Sequence[str]) -> TextMatch | None:
        order = derangement(prompts)
        if order is None:
            return None
        others = [prompts[index] for index in order]
        return TextMatch(clip.scores(images, prompts, self.cache), clip.scores(images, others, self.cache))

    def _against_real(self, images: np.ndarray) -> dict[str, Any]:
        """Return the fields of `Measured` that compare with real images; none where either are too few."""
        if self.real is None or min(len(images), len(self.real)) < self.least:
            return {}
        if self.real_patches is None:
            return {"real": self.real}
        return {"real": self.real, "patches": patch_features(images), "real_patches": self.real_patches}

    def _seeds(self, samples: Samples, prompts: Sequence[str]) -> list[np.ndarray]:
        """Features (S, 1280) of each prompt from its S seeds."""
        if not self.further:
            groups = same_prompt(prompts)[: generator.DIVERSE_PROMPTS]
            return [samples.features[group] for group in groups]
        if not samples.further:
            return []
        return list(np.stack([samples.features[: len(samples.further[0])], *samples.further], axis=1))


def same_prompt(prompts: Sequence[str]) -> list[np.ndarray]:
    """Indices of each prompt's images, of the prompts that a list holds several times."""
    found: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        found.setdefault(prompt, []).append(index)
    return [np.asarray(each) for each in found.values() if len(each) > 1]


def known_scorer(items: Sequence[Item]) -> Scorer | None:
    """The reporting scorer, where it knows every word of the prompts."""
    scorer = load_scorer("report")
    return scorer if knows(scorer, [item.prompt for item in items]) else None


def estimate_values(key: str, value: float | Estimate) -> Row:
    """``KEY``, and ``KEY_se`` where a standard error is known."""
    if isinstance(value, Estimate):
        return {key: value.mean, f"{key}_se": value.standard_error}
    return {key: float(value)}


def scorer_digest(scorer: Scorer) -> str:
    """Name a scorer by its weights."""
    return fingerprint(jax.tree.map(jnp.asarray, dict(scorer.params)))


def digest(parts: Any) -> str:
    """Name plain data: the hexadecimal SHA-256 of it as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@functools.cache
def _digest_of_lite0() -> str:
    return fingerprint(jax.tree.map(jnp.asarray, load_lite0()))
