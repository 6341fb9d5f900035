"""Discriminators: heads on the frozen base's features, and the adversarial term of a consistency stage.

The student's gradient runs through the frozen features and the heads; the heads' own gradient stops at the features,
which are computed with gradient all the same: without, whole runs have been left without an adversarial signal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hypersd_jax.bases import HALF, Base, Features, Networks
from hypersd_jax.config import AdversarialConfig
from hypersd_jax.distill import (
    Pair,
    accuracy,
    discriminator_loss,
    finite_difference_r1,
    generator_loss,
    renoise,
    uniform_integer,
)
from hypersd_jax.models.functional import Network
from hypersd_jax.stages.streams import Draw, drawn_from


@dataclasses.dataclass(frozen=True, kw_only=True)
class Discriminator:
    """A stage's settings, the blocks whose features are read, and the heads on them."""

    config: AdversarialConfig
    taps: tuple[str, ...]
    heads: Network
    cost: float

    def logits(self, params: Any, features: Features) -> dict[str, jax.Array]:
        """Compute the heads' logits (B, h', w', 1) by tap, of features (B, h, w, C) by tap."""
        found: dict[str, jax.Array] = self.heads(params, features)
        return found

    def student_term(self, params: Any, features: Features) -> jax.Array:
        """Compute the student's generator loss, unweighted; its gradient runs through the features alone."""
        return generator_loss(self.config.loss, self.logits(params, features))

    def loss(
        self, params: Any, real: Features, fake: Features, perturbed: Features | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Compute the discriminator's loss on features without gradient, and its metrics.

        ``perturbed``: the features of the perturbed real side (`finite_difference_r1`), where there is an R1 penalty.
        """
        real, fake, perturbed = jax.lax.stop_gradient((real, fake, perturbed))
        real_logits, fake_logits = self.logits(params, real), self.logits(params, fake)
        loss = discriminator_loss(self.config.loss, real_logits, fake_logits)
        metrics = {"discriminator": loss, "accuracy": accuracy(real_logits, fake_logits)}
        if perturbed is not None:
            slope = finite_difference_r1(real_logits, self.logits(params, perturbed), self.config.r1_sigma)
            loss = loss + self.config.r1_weight * slope
            metrics["r1"] = slope
        return loss, metrics


def make_discriminator(base: Base, config: AdversarialConfig | None) -> Discriminator | None:
    """Make a stage's discriminator, or None where it has none; UserError where the base has no such features."""
    if config is None:
        return None
    taps, heads = base.discriminator(config.features)
    return Discriminator(config=config, taps=taps, heads=heads, cost=HALF if base.is_partial(taps) else 1.0)


def pair_term(
    discriminator: Discriminator,
    nets: Networks,
    params: Any,
    cond: Any,
    key: jax.Array,
    indices: jax.Array,
    *,
    alone: bool,
) -> Callable[[Pair], tuple[jax.Array, dict[str, jax.Array]]]:
    """Make the adversarial term of a consistency pair: the student's prediction is fake, the target real.

    Both are noised further, to one timestep t' uniform over t_end..t_top, which lies inside the segment (PCM).

    Args:
        discriminator: from `make_discriminator`.
        nets: the base.
        params: of the discriminator heads.
        cond: conditioning of the B samples.
        key: the step's key.
        indices: (B,) batch indices.
        alone: compute only the discriminator's loss, for a phase that does not train the student.

    Returns:
        pair -> (term, metrics): the student's weighted loss plus the discriminator's own.
    """
    config = discriminator.config

    def term(pair: Pair) -> tuple[jax.Array, dict[str, jax.Array]]:
        t_end, t_top = pair.draw.t_end, pair.draw.t_top
        uniform, noises = _draw(drawn_from(key, Draw.DISCRIMINATOR), indices, pair.prediction.shape[1:])
        t = t_end + uniform_integer(uniform, t_top - t_end + 1)
        fake = renoise(nets.base.schedule, pair.prediction, t_end, t, noises[0])
        real = renoise(nets.base.schedule, pair.target, t_end, t, noises[1])
        start: Features = {}
        if config.features == "pair":
            start = pair.seen or nets.tapped(pair.x_t, pair.draw.t_n, cond, discriminator.taps)[1]

        def features(x: jax.Array) -> Features:
            return _with_start(nets.tapped(x, t, cond, discriminator.taps)[1], start)

        fake_features, real_features = features(fake), features(real)
        perturbed = features(real + config.r1_sigma * noises[2]) if config.r1 else None
        own, metrics = discriminator.loss(params, real_features, fake_features, perturbed)
        if alone:
            return own, metrics
        student = discriminator.student_term(jax.lax.stop_gradient(params), fake_features)
        return config.weight * student + own, {**metrics, "generator": student}

    return term


def pair_calls(discriminator: Discriminator, *, start_is_known: bool) -> float:
    """Count the base's calls in `pair_term`, per sample; ``start_is_known``: by the teacher's own call."""
    sides = 3 if discriminator.config.r1 else 2
    start = discriminator.config.features == "pair" and not start_is_known
    return discriminator.cost * (sides + start)


def _with_start(features: Features, start: Features) -> Features:
    """Concatenate features and those of the step's start, where there are any, along the channels."""
    return {tap: jnp.concatenate([value, start[tap]], axis=-1) if start else value for tap, value in features.items()}


def _draw(key: jax.Array, indices: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Draw a number in [0, 1) for each sample (B,), and three noises (3, B, h, w, C), by (key, batch index) alone."""

    def one(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        time_key, noise_key = jax.random.split(jax.random.fold_in(key, index))
        return jax.random.uniform(time_key), jax.random.normal(noise_key, (3, *shape))

    uniform, noises = jax.vmap(one)(indices)
    return uniform, jnp.moveaxis(noises, 1, 0)
