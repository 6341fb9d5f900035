"""The one evaluator: from a model's samples to its row of results.json."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax.evaluation import generator
from hypersd_jax.evaluation.columns import COLUMNS, Measured
from hypersd_jax.evaluation.generator import Item, Model
from hypersd_jax.evaluation.lite0 import NATIVE, SMALL, load_lite0
from hypersd_jax.evaluation.metrics import Estimate, frechet_distance, kernel_distance, mean_estimate, units_of
from hypersd_jax.evaluation.samples import Samples, image_features
from hypersd_jax.evaluation.scorer import Scorer, load_scorer
from hypersd_jax.evaluation.sources import RealImages
from hypersd_jax.evaluation.text_match import TextMatch, derangement, knows, text_match
from hypersd_jax.weights.diffusers.component import fingerprint

Row = dict[str, Any]
ClipScorer = Callable[[np.ndarray, Sequence[str]], Any]

LEAST = 3
"""Of fewer images there is no KID with a standard error, and no distance between sets is given."""


class Evaluated(NamedTuple):
    """A row of results.json, and the distances (N,), float32, behind its mean, where there is a reference."""

    row: Row
    distances: np.ndarray | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Everything that the rows of a table are measured with; None where there is no such thing.

    Attributes:
        items: the list.
        further: its beginning from further seeds, for diversity; (): diversity is that of the seeds in the list itself.
        size: of the images (H, W), in pixels.
        real: features (M, 1280) of real images.
        real_name: names those images, as plain data.
        scorer: the reporting one, where it knows the prompts' words.
        clip: a CLIP of the user's.
        reference: the teacher's samples at many steps.
        reference_metadata: how those were sampled.
        least: of fewer images no distance between sets is given.
        left_out: keys of metrics that this table does not have.
    """

    items: tuple[Item, ...]
    further: tuple[tuple[Item, ...], ...]
    size: tuple[int, int]
    real: np.ndarray | None = None
    real_name: Any = None
    scorer: Scorer | None = None
    clip: ClipScorer | None = None
    reference: Samples | None = None
    reference_metadata: Any = None
    least: int = LEAST
    left_out: tuple[str, ...] = ()

    @functools.cached_property
    def protocol(self) -> str:
        """Name what rows are measured on and with: rows of one protocol and one N are comparable.

        It covers prompts and seeds, the reference's sampler settings, the real images, the images' size, and the
        networks that look at them; not the model of a row, nor how that samples.
        """
        parts = {
            "items": [list(item) for item in self.items],
            "further": [[list(item) for item in items] for items in self.further],
            "reference": self.reference_metadata,
            "real": self.real_name,
            "size": list(self.size),
            "features": [_digest_of_lite0(), SMALL, NATIVE],
            "scorer": None if self.scorer is None else scorer_digest(self.scorer),
        }
        return digest(parts)[:12]

    def with_reference(self, samples: Samples, metadata: Any) -> Evaluator:
        """Return a copy with a reference that was sampled as ``metadata`` say."""
        return dataclasses.replace(self, reference=samples, reference_metadata=metadata)

    def with_real(self, images: RealImages) -> Evaluator:
        """Return a copy with the first set of real images."""
        return dataclasses.replace(self, real=image_features(images.first), real_name=images.name)

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
        distances = None
        for key, value in self._values(samples, prompts):
            if key == "distance":
                distances = np.asarray(value, np.float32)
            row |= estimate_values(key, mean_estimate(value, units) if isinstance(value, np.ndarray) else value)
        if samples.seconds is not None:
            row["seconds_per_image"] = samples.seconds
        row["protocol"] = self.protocol
        return Evaluated(row, distances)

    def _values(self, samples: Samples, prompts: Sequence[str]) -> Iterator[tuple[str, Any]]:
        found = self._measured(samples, prompts)
        for metric in list(COLUMNS.values()):
            if metric.measure is None or metric.key in self.left_out:
                continue
            if all(getattr(found, need) is not None for need in metric.needs):
                value = metric.measure(found)
                if value is not None:
                    yield metric.key, value

    def _measured(self, samples: Samples, prompts: Sequence[str]) -> Measured:
        reference, enough = self.reference, len(samples.images) >= self.least
        fields: dict[str, Any] = {}
        if self.real is not None and enough and len(self.real) >= self.least:
            fields["real"] = self.real
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
            fields["clip_match"] = _clip_match(self.clip, samples.images, prompts)
        seeds = self._seeds(samples, prompts)
        return Measured(
            prompts=prompts, images=samples.images, features=samples.features, seeds=seeds or None, **fields
        )

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


def real_floor(first: np.ndarray, second: np.ndarray, protocol: str) -> Row:
    """Real images against other real ones, as many, by features: what no model can be expected to go below."""
    row: Row = {"model": "real images against others", "n": len(first)}
    if min(len(first), len(second)) >= LEAST:
        row["fid_train"] = frechet_distance(first, second)
        row |= estimate_values("kid_train", kernel_distance(first, second))
    return {**row, "protocol": protocol}


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


def _clip_match(clip: ClipScorer, images: np.ndarray, prompts: Sequence[str]) -> TextMatch | None:
    order = derangement(prompts)
    if order is None:
        return None
    own, shuffled = (np.asarray(clip(images, texts), np.float64) for texts in (prompts, [prompts[i] for i in order]))
    return TextMatch(own, shuffled)
