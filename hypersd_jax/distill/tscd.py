"""Trajectory segmented consistency distillation (Hyper-SD, arXiv 2404.13686, section 3.1, Eq. 12, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from hypersd_jax.diffusion.prediction import move, to_x0_eps
from hypersd_jax.diffusion.schedule import Schedule
from hypersd_jax.distill.distances import Distance, batch_mean, mse
from hypersd_jax.errors import UserError

Model = Callable[[jax.Array, jax.Array, Any], jax.Array]
Teacher = Callable[[jax.Array, jax.Array, Any, Any, jax.Array], jax.Array]


class Draw(NamedTuple):
    """What one TSCD step draws for each sample."""

    t_n: jax.Array  # (B,) int32, start on the solver grid
    t_prev: jax.Array  # (B,) int32, one solver step further
    t_end: jax.Array  # (B,) int32, uniform over t_b..t_prev inclusive
    guidance: jax.Array  # (B,) float32
    eps: jax.Array  # (B, h, w, C) float32, offset noise included


class Pair(NamedTuple):
    """The two sides of the TSCD loss, both at time `draw.t_end` of the trajectory; for the adversarial term too."""

    prediction: jax.Array  # (B, h, w, C) float32, the student's; carries the gradient
    target: jax.Array  # (B, h, w, C) float32, the EMA's from the teacher's step; no gradient
    x_t: jax.Array  # (B, h, w, C) float32, the noised latents at draw.t_n
    draw: Draw


def draw(
    key: jax.Array,
    shape: tuple[int, ...],
    segments: Mapping[str, ArrayLike],
    controls: Mapping[str, ArrayLike],
    indices: ArrayLike | None = None,
) -> Draw:
    """Times, guidance scales and noise for a batch; those of a sample depend on (key, its index) alone.

    Args:
        key: the step's key.
        shape: of the latents, (B, h, w, C).
        segments: what `pad_segments` returns.
        controls: as in `tscd_loss`.
        indices: (B,) integers that tell the samples apart; None for 0..B-1. Parts of a larger batch (gradient
            accumulation) pass their places in it.
    """
    bounds = {name: jnp.asarray(value, jnp.int32) for name, value in segments.items()}
    low, high, offset = (
        jnp.asarray(controls[name], jnp.float32) for name in ("guidance_min", "guidance_max", "offset_noise")
    )

    pixels, channels = math.prod(shape[1:-1]), shape[-1]

    def one(index: jax.Array) -> Draw:
        times_key, noise_key = jax.random.split(jax.random.fold_in(key, index))
        start, end, scale = jax.random.uniform(times_key, (3,))
        n = _below(start, bounds["count"])
        t_b, t_prev = bounds["t_b"][n], bounds["t_prev"][n]
        noise = jax.random.normal(noise_key, (pixels + 1, channels))  # the last row is the offset noise
        return Draw(
            t_n=bounds["t_n"][n],
            t_prev=t_prev,
            t_end=t_b + _below(end, t_prev - t_b + 1),
            guidance=low + (high - low) * scale,
            eps=(noise[:-1] + offset * noise[-1:]).reshape(shape[1:]),
        )

    places = jnp.arange(shape[0]) if indices is None else jnp.asarray(indices)
    return jax.vmap(one)(places)


def _below(uniform: jax.Array, count: jax.Array) -> jax.Array:
    """An int32 uniform over 0..count-1 from one in [0, 1); its 2^-23 grid is fine for a thousand values."""
    return jnp.minimum((uniform * count).astype(jnp.int32), count - 1)


def tscd_pair(
    student_fn: Model,
    target_fn: Model,
    teacher_fn: Teacher,
    batch: Mapping[str, Any],
    drawn: Draw,
    *,
    schedule: Schedule,
) -> Pair:
    """Both sides of Eq. 12 for given draws; the arguments are those of `tscd_loss`.

    x_n = alpha_n z_0 + sigma_n eps;  xhat = Psi(x_n, teacher, t_prev)  (Eq. 1)
    prediction = Psi(x_n, student, t_end);  target = sg(Psi(xhat, EMA, t_end))
    """
    if schedule.clip_sample:
        raise UserError("scheduler_config: clip_sample=true cannot be distilled, latents are not bounded")
    alphas, sigmas = jnp.asarray(schedule.alpha), jnp.asarray(schedule.sigma)
    latents = jnp.asarray(batch["latents"], jnp.float32)

    def at(t: jax.Array) -> tuple[jax.Array, jax.Array]:
        column = (t.shape[0], *[1] * (latents.ndim - 1))
        return alphas[t].reshape(column), sigmas[t].reshape(column)

    def psi(x: jax.Array, output: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
        return move(*to_x0_eps(output, x, *at(t), schedule.prediction_type), *at(s))

    t_n, t_prev, t_end, guidance, eps = drawn
    cond, uncond = batch["cond"], batch.get("uncond")
    x_t = move(latents, eps, *at(t_n))
    x_prev = jax.lax.stop_gradient(psi(x_t, teacher_fn(x_t, t_n, cond, uncond, guidance), t_n, t_prev))
    prediction = psi(x_t, student_fn(x_t, t_n, cond), t_n, t_end)

    def target_at_end() -> jax.Array:
        return psi(x_prev, target_fn(x_prev, t_prev, cond), t_prev, t_end)

    # With N = k every segment is one solver step: the target is the teacher's, and the EMA's forward pass is spared.
    target = jax.lax.stop_gradient(jax.lax.cond(jnp.all(t_end == t_prev), lambda: x_prev, target_at_end))
    return Pair(prediction, target, x_t, drawn)


def tscd_loss(
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
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """L_TSCD of Hyper-SD Eq. 12, and its metrics.

    Args:
        student_fn: (x (B, h, w, C), t (B,) int32, cond) -> raw prediction; the only one that is differentiated.
        target_fn: the student with its EMA weights, same signature.
        teacher_fn: (x, t, cond, uncond, guidance (B,)) -> guided raw prediction. A later stage whose teacher is the
            previous stage's student passes a function that ignores the last two.
        batch: {"latents": clean latents times the scaling factor (B, h, w, C), "cond": any pytree, "uncond": any
            pytree, or None when the teacher needs none}.
        key: the step's key; sample i's randomness depends on (key, i) alone, whatever the batch size or sharding.
        segments: what `pad_segments` returns; arrays, so that all stages share one compiled step.
        controls: float32 scalars {"guidance_min", "guidance_max", "offset_noise"}: the teacher's guidance_scale is
            uniform over the range; offset noise is the strength of a per-channel normal shift added to eps.
        schedule: the base model's; static.
        distance: (prediction, target) -> (B,).
        weights: (B,), 0 for the padded samples of a ragged batch.
        indices: see `draw`.

    Returns:
        (loss, metrics): float32 scalar, and scalars "mse" (mean |prediction - target|^2) and "target_variance" (mean
        over the samples of the variance within each target).
    """
    drawn = draw(key, jnp.shape(batch["latents"]), segments, controls, indices)
    pair = tscd_pair(student_fn, target_fn, teacher_fn, batch, drawn, schedule=schedule)
    loss = batch_mean(distance(pair.prediction, pair.target), weights)
    metrics = {
        "mse": batch_mean(mse(pair.prediction, pair.target), weights),
        "target_variance": batch_mean(jnp.var(pair.target, axis=tuple(range(1, pair.target.ndim))), weights),
    }
    return loss, jax.lax.stop_gradient(metrics)
