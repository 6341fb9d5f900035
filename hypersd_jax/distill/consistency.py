"""The consistency losses by name: TSCD and what it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from hypersd_jax.diffusion.schedule import Schedule
from hypersd_jax.distill.distances import Distance, mse
from hypersd_jax.distill.lcm import lcm_pair
from hypersd_jax.distill.segments import Segments
from hypersd_jax.distill.target_timesteps import TargetChoice, segment_boundary, uniform_target
from hypersd_jax.distill.tscd import Model, Pair, Teacher, draw, tscd_pair

METHODS: dict[str, tuple[TargetChoice, Callable[..., Pair]]] = {
    "tscd": (uniform_target, tscd_pair),
    "pcm": (segment_boundary, tscd_pair),
    "lcm": (segment_boundary, lcm_pair),
}
"""The choice of t_end and the two sides of each method. TCD (arXiv 2402.19159) is "tscd" with one segment."""


def consistency_loss(
    method: str,
    student_fn: Model,
    target_fn: Model,
    teacher_fn: Teacher,
    batch: Mapping[str, Any],
    key: jax.Array,
    segments: Segments,
    *,
    guidance: tuple[ArrayLike, ArrayLike],
    schedule: Schedule,
    offset_noise: ArrayLike = 0.0,
    distance: Distance = mse,
    distance_weight: ArrayLike = 1.0,
    indices: ArrayLike | None = None,
    extra: Callable[[Pair], tuple[jax.Array, dict[str, jax.Array]]] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the loss of one of METHODS, such as Hyper-SD's Eq. 12, and its metrics.

    Args:
        method: one of METHODS; static.
        student_fn: (x (B, h, w, C), t (B,) int32, cond) -> raw prediction; the only one that is differentiated.
        target_fn: the student with its EMA weights, same signature.
        teacher_fn: (x, t, cond, uncond, guidance (B,)) -> (guided raw prediction, anything else, which ends up in
            `Pair.seen`). A later stage whose teacher is the previous stage's student ignores the last two arguments.
        batch: {"latents": clean latents times the scaling factor (B, h, w, C), "cond": any pytree, "uncond": any
            pytree, or None when the teacher needs none}.
        key: the step's key; sample i's randomness depends on (key, i) alone, whatever the batch size or sharding.
        segments: what `pad_segments` returns; arrays, so that all stages share one compiled step.
        guidance: (low, high), the range over which the teacher's guidance_scale is uniform.
        schedule: the base model's; static.
        offset_noise: strength of a per-channel normal shift added to eps.
        distance: (prediction, target) -> (B,).
        distance_weight: of the distance.
        indices: see `draw`.
        extra: (pair) -> (a term of the loss, weighted already, and its metrics), such as the adversarial one.

    Returns:
        (loss, metrics): float32 scalar, and scalars "mse" (mean |prediction - target|^2), "target_variance" (mean
        over the samples of the variance within each target) and "target_calls" (network calls of the target).
    """
    target, make_pair = METHODS[method]
    settings: dict[str, Any] = {"guidance": guidance, "offset_noise": offset_noise, "indices": indices}
    drawn = draw(key, jnp.shape(batch["latents"]), segments, target=target, **settings)
    pair = make_pair(student_fn, target_fn, teacher_fn, batch, drawn, schedule=schedule)
    loss = jnp.asarray(distance_weight, jnp.float32) * jnp.mean(distance(pair.prediction, pair.target))
    metrics = {
        "target_calls": pair.target_calls,
        "mse": jnp.mean(mse(pair.prediction, pair.target)),
        "target_variance": jnp.mean(jnp.var(pair.target, axis=tuple(range(1, pair.target.ndim)))),
    }
    if extra is not None:
        term, more = extra(pair)
        loss = loss + term
        metrics |= more
    return loss, jax.lax.stop_gradient(metrics)
