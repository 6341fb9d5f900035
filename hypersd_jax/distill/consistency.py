"""The consistency losses by name: TSCD and what it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from hypersd_jax.diffusion.schedule import Schedule
from hypersd_jax.distill.distances import Distance, batch_mean, mse
from hypersd_jax.distill.ends import End, edge_end, uniform_end
from hypersd_jax.distill.lcm import lcm_pair
from hypersd_jax.distill.tscd import Model, Pair, Teacher, draw, tscd_pair

METHODS: dict[str, tuple[End, Callable[..., Pair]]] = {
    "tscd": (uniform_end, tscd_pair),
    "pcm": (edge_end, tscd_pair),
    "lcm": (edge_end, lcm_pair),
}
"""How a method chooses t_end, and what it compares. TCD (arXiv 2402.19159) is "tscd" with one segment."""


def consistency_loss(
    method: str,
    student_fn: Model,
    target_fn: Model,
    teacher_fn: Teacher,
    batch: Mapping[str, Any],
    key: jax.Array,
    segments: Mapping[str, ArrayLike],
    controls: Mapping[str, ArrayLike],
    *,
    schedule: Schedule,
    distance: Distance = mse,
    weights: ArrayLike | None = None,
    indices: ArrayLike | None = None,
    extra: Callable[[Pair], tuple[jax.Array, dict[str, jax.Array]]] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of one of METHODS, such as Hyper-SD's Eq. 12, and its metrics.

    Args:
        method: one of METHODS; static.
        student_fn: (x (B, h, w, C), t (B,) int32, cond) -> raw prediction; the only one that is differentiated.
        target_fn: the student with its EMA weights, same signature.
        teacher_fn: (x, t, cond, uncond, guidance (B,)) -> guided raw prediction. A later stage whose teacher is the
            previous stage's student passes a function that ignores the last two.
        batch: {"latents": clean latents times the scaling factor (B, h, w, C), "cond": any pytree, "uncond": any
            pytree, or None when the teacher needs none}.
        key: the step's key; sample i's randomness depends on (key, i) alone, whatever the batch size or sharding.
        segments: what `pad_segments` returns; arrays, so that all stages share one compiled step.
        controls: float32 scalars {"guidance_min", "guidance_max", "offset_noise"}: the teacher's guidance_scale is
            uniform over the range; offset noise is the strength of a per-channel normal shift added to eps. With
            ``extra`` also "distance_weight".
        schedule: the base model's; static.
        distance: (prediction, target) -> (B,).
        weights: (B,), 0 for the padded samples of a ragged batch.
        indices: see `draw`.
        extra: (pair) -> (a term of the loss, weighted already, and its metrics), such as the adversarial one.

    Returns:
        (loss, metrics): float32 scalar, and scalars "mse" (mean |prediction - target|^2), "target_variance" (mean
        over the samples of the variance within each target) and "target_calls" (network calls of the target).
    """
    end, make_pair = METHODS[method]
    drawn = draw(key, jnp.shape(batch["latents"]), segments, controls, indices, end)
    pair = make_pair(student_fn, target_fn, teacher_fn, batch, drawn, schedule=schedule)
    loss = batch_mean(distance(pair.prediction, pair.target), weights)
    metrics = {
        "target_calls": pair.target_calls,
        "mse": batch_mean(mse(pair.prediction, pair.target), weights),
        "target_variance": batch_mean(jnp.var(pair.target, axis=tuple(range(1, pair.target.ndim))), weights),
    }
    if extra is not None:
        term, more = extra(pair)
        loss = jnp.asarray(controls["distance_weight"], jnp.float32) * loss + term
        metrics |= more
    return loss, jax.lax.stop_gradient(metrics)
