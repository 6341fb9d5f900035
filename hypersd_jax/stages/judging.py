"""Discriminators: heads on the frozen UNet's features, and the adversarial term of a consistency stage.

The student's gradient runs through the frozen features and the heads; the heads' own gradient stops at the features
(recipes: features computed without gradient have left whole runs without an adversarial signal).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hypersd_jax.conditioning import Conditioning
from hypersd_jax.config import AdversarialConfig
from hypersd_jax.diffusion import Schedule
from hypersd_jax.distill import (
    Pair,
    accuracy,
    below,
    discriminator_loss,
    finite_difference_r1,
    generator_loss,
    renoise,
)
from hypersd_jax.errors import UserError
from hypersd_jax.models.functional import Network
from hypersd_jax.models.heads import all_taps, encoder_taps, patch_heads, pooled_heads, tap_channels
from hypersd_jax.stages.networks import Features, Networks
from hypersd_jax.training import Controls, batch_sharding
from hypersd_jax.weights.components import Components

MIDDLE = "mid_block"
# What the step's key is folded with for the judges' noise: no sample's index comes near it.
JUDGE_STREAM = 2**32 - 1
# Features are halved until their side is this, as DMD2's heads do before their last convolution.
POOLED_SIDE = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeKind:
    """What is compiled of a discriminator."""

    loss: str
    features: str
    updates: int
    r1: bool


def judge_kind(config: AdversarialConfig | None) -> JudgeKind | None:
    """The compiled part of a stage's adversarial settings."""
    if config is None:
        return None
    return JudgeKind(loss=config.loss, features=config.features, updates=config.updates, r1=config.r1_weight > 0)


def judge_controls(config: AdversarialConfig) -> Controls:
    """The arrays that steer it."""
    return {
        "adversarial_weight": np.asarray(config.weight, np.float32),
        "r1_weight": np.asarray(config.r1_weight, np.float32),
        "r1_sigma": np.asarray(config.r1_sigma, np.float32),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge:
    """The blocks whose features are read, and the heads on them."""

    kind: JudgeKind
    taps: tuple[str, ...]
    heads: Network

    def logits(self, params: Any, features: Features) -> dict[str, jax.Array]:
        """What the heads say of features (B, h, w, C) by tap: (B, h', w', 1) by tap."""
        found: dict[str, jax.Array] = self.heads(params, features)
        return found


def make_judge(
    components: Components, kind: JudgeKind, latent_shape: tuple[int, ...], mesh: Mesh, *, dtype: Any, remat: bool
) -> Judge:
    """Heads for the features of this UNet on latents of this shape (h, w, C).

    Raises:
        UserError: the UNet has no middle block, and the features are its.
    """
    config = components.unet_config
    sharding = batch_sharding(mesh)
    if kind.features in ("encoder", "all"):
        taps = encoder_taps(config) if kind.features == "encoder" else all_taps(config)
        size = 1 if kind.features == "encoder" else 3
        heads = patch_heads(tap_channels(config, taps), size=size, dtype=dtype, remat=remat, batch_sharding=sharding)
        return Judge(kind=kind, taps=taps, heads=heads)
    if not config.mid_block_type:
        raise UserError(f"adversarial.features={kind.features}: this model's UNet has no middle block")
    width = tap_channels(config, [MIDDLE])[MIDDLE] * (2 if kind.features == "pair" else 1)
    side = min(latent_shape[:2]) >> (len(config.channels) - 1)
    halvings = max(0, (side // POOLED_SIDE).bit_length() - 1)
    heads = pooled_heads({MIDDLE: width}, downsamples=halvings, dtype=dtype, remat=remat, batch_sharding=sharding)
    return Judge(kind=kind, taps=(MIDDLE,), heads=heads)


def consistency_judgement(
    judge: Judge,
    nets: Networks,
    heads: Any,
    cond: Conditioning,
    key: jax.Array,
    places: jax.Array,
    controls: Controls,
    schedule: Schedule,
    *,
    heads_alone: bool,
) -> Callable[[Pair], tuple[jax.Array, dict[str, jax.Array]]]:
    """The adversarial term of a pair: the student's prediction is the fake side, the target the real one.

    Both are noised on, each to the same time t' uniform over t_end..t_top, which lies inside the segment (PCM).

    Args:
        judge: from `make_judge`.
        nets: the base; its guided call on x_n has kept what a pair's head reads of it, if there was one.
        heads: the heads' parameters.
        cond: the captions'.
        key: the step's key.
        places: the rows' indices.
        controls: `judge_controls` among them.
        schedule: the base model's.
        heads_alone: only the heads' loss, for a turn in which the student stands still.

    Returns:
        pair -> (term, metrics): the student's weighted loss plus the heads' own.
    """

    def term(pair: Pair) -> tuple[jax.Array, dict[str, jax.Array]]:
        t_end, t_top = pair.draw.t_end, pair.draw.t_top
        uniform, noises = _draw(jax.random.fold_in(key, JUDGE_STREAM), places, pair.prediction.shape[1:])
        t = t_end + below(uniform, t_top - t_end + 1)
        fake = renoise(schedule, pair.prediction, t_end, t, noises[0])
        real = renoise(schedule, pair.target, t_end, t, noises[1])
        start = {}
        if judge.kind.features == "pair":
            start = nets.kept or nets.features(pair.x_t, pair.draw.t_n, cond, judge.taps)

        def seen(x: jax.Array) -> Features:
            return _beside(nets.features(x, t, cond, judge.taps), start)

        seen_fake, seen_real = seen(fake), seen(real)
        bumped = seen(real + controls["r1_sigma"] * noises[2]) if judge.kind.r1 else None
        own, metrics = heads_loss(judge, heads, seen_real, seen_fake, bumped, controls)
        if heads_alone:
            return own, metrics
        student = generator_loss(judge.kind.loss, judge.logits(jax.lax.stop_gradient(heads), seen_fake))
        return controls["adversarial_weight"] * student + own, {**metrics, "generator": student}

    return term


def heads_loss(
    judge: Judge, heads: Any, real: Features, fake: Features, bumped: Features | None, controls: Controls
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The heads' own loss on features that are taken as given, and its metrics; ``bumped``: `finite_difference_r1`."""
    real, fake, bumped = jax.lax.stop_gradient((real, fake, bumped))
    of_real, of_fake = judge.logits(heads, real), judge.logits(heads, fake)
    loss = discriminator_loss(judge.kind.loss, of_real, of_fake)
    metrics = {"discriminator": loss, "accuracy": accuracy(of_real, of_fake)}
    if bumped is not None:
        slope = finite_difference_r1(of_real, judge.logits(heads, bumped), controls["r1_sigma"])
        loss = loss + controls["r1_weight"] * slope
        metrics["r1"] = slope
    return loss, metrics


def _beside(features: Features, start: Features) -> Features:
    """Features with those of the step's start beside them on the channels, where there are any."""
    return {tap: jnp.concatenate([value, start[tap]], axis=-1) if start else value for tap, value in features.items()}


def _draw(key: jax.Array, places: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """A number in [0, 1) for each row (B,), and three latents of noise (3, B, h, w, C); by (key, place) alone."""

    def one(place: jax.Array) -> tuple[jax.Array, jax.Array]:
        time_key, noise_key = jax.random.split(jax.random.fold_in(key, place))
        return jax.random.uniform(time_key), jax.random.normal(noise_key, (3, *shape))

    uniform, noises = jax.vmap(one)(places)
    return uniform, jnp.moveaxis(noises, 1, 0)
