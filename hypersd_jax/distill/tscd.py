"""Trajectory segmented consistency distillation (Hyper-SD, arXiv 2404.13686, section 3.1, Eq. 12, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from hypersd_jax.diffusion.prediction import add_noise, to_x0_eps
from hypersd_jax.diffusion.schedule import Schedule
from hypersd_jax.distill.segments import Segments
from hypersd_jax.distill.target_timesteps import TargetChoice, uniform_integer, uniform_target
from hypersd_jax.errors import UserError

Model = Callable[[jax.Array, jax.Array, Any], jax.Array]
"""(x (B, h, w, C), t (B,) int32, cond) -> raw prediction."""
Teacher = Callable[[jax.Array, jax.Array, Any, Any, jax.Array], tuple[jax.Array, Any]]
"""(x, t, cond, uncond, guidance (B,)) -> guided raw prediction, and anything else that the call gives."""


class Draw(NamedTuple):
    """The random numbers of one step of consistency distillation, for each sample."""

    t_n: jax.Array  # (B,) int32, start on the solver grid
    t_prev: jax.Array  # (B,) int32, one solver step further
    t_end: jax.Array  # (B,) int32 in t_b..t_prev
    guidance: jax.Array  # (B,) float32
    eps: jax.Array  # (B, h, w, C) float32, offset noise included
    t_top: jax.Array  # (B,) int32, the last start of the segment


class Pair(NamedTuple):
    """The two sides of a consistency loss, both at time `draw.t_end` of the trajectory (LCM: both estimates of x_0)."""

    prediction: jax.Array  # (B, h, w, C) float32, the student's; carries the gradient
    target: jax.Array  # (B, h, w, C) float32, the EMA's from the teacher's step; no gradient
    x_t: jax.Array  # (B, h, w, C) float32, the noised latents at draw.t_n
    draw: Draw
    target_calls: jax.Array  # () float32, network calls a sample that the target took
    seen: Any = None  # what the teacher's call at (x_t, t_n) gave besides its prediction


def draw(
    key: jax.Array,
    shape: tuple[int, ...],
    segments: Segments,
    *,
    guidance: tuple[ArrayLike, ArrayLike],
    offset_noise: ArrayLike = 0.0,
    indices: ArrayLike | None = None,
    target: TargetChoice = uniform_target,
) -> Draw:
    """Draw timesteps, guidance scales and noise for a batch; those of a sample depend on (key, its index) alone.

    Args:
        key: the step's key.
        shape: of the latents, (B, h, w, C).
        segments: what `pad_segments` returns.
        guidance: the range that guidance scales are uniform over.
        offset_noise: strength of a normal shift of each channel, added to eps.
        indices: (B,) integers that tell the samples apart; None for 0..B-1. Parts of a larger batch (gradient
            accumulation) pass their batch indices.
        target: how the target timestep t_end is chosen.
    """
    bounds = Segments(*(jnp.asarray(value, jnp.int32) for value in segments))
    low, high, offset = (jnp.asarray(value, jnp.float32) for value in (*guidance, offset_noise))
    pixels, channels = math.prod(shape[1:-1]), shape[-1]

    def one(index: jax.Array) -> Draw:
        times_key, noise_key = jax.random.split(jax.random.fold_in(key, index))
        start, chosen, scale = jax.random.uniform(times_key, (3,))
        n = uniform_integer(start, bounds.size)
        t_b, t_prev = bounds.t_b[n], bounds.t_prev[n]
        noise = jax.random.normal(noise_key, (pixels + 1, channels))  # the last row is the offset noise
        return Draw(
            t_n=bounds.t_n[n],
            t_prev=t_prev,
            t_end=target(chosen, t_b, t_prev),
            guidance=low + (high - low) * scale,
            eps=(noise[:-1] + offset * noise[-1:]).reshape(shape[1:]),
            t_top=bounds.t_top[n],
        )

    indices = jnp.arange(shape[0]) if indices is None else jnp.asarray(indices)
    return jax.vmap(one)(indices)


def alpha_sigma(schedule: Schedule, t: jax.Array, like: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Look up alpha and sigma at timesteps (B,), with axes to multiply ``like`` (B, ...) by."""
    column = (t.shape[0], *[1] * (like.ndim - 1))
    return jnp.asarray(schedule.alpha)[t].reshape(column), jnp.asarray(schedule.sigma)[t].reshape(column)


def solver_start(latents: jax.Array, drawn: Draw, schedule: Schedule) -> jax.Array:
    """Noise clean latents (B, h, w, C) to where the teacher's solver step begins: x_n = alpha_n z_0 + sigma_n eps.

    Raises:
        UserError: a schedule that clips.
    """
    if schedule.clip_sample:
        raise UserError("scheduler_config: clip_sample=true cannot be distilled, latents are not bounded")
    return add_noise(latents, drawn.eps, *alpha_sigma(schedule, drawn.t_n, drawn.eps))


def solver_end(x_t: jax.Array, output: jax.Array, drawn: Draw, schedule: Schedule) -> jax.Array:
    """Take the solver step from x_n along the teacher's raw prediction: xhat = Psi(x_n, teacher, t_prev) (Eq. 1).

    All are (B, h, w, C); xhat is float32, without gradient.
    """
    return jax.lax.stop_gradient(ddim_step(schedule, x_t, output, drawn.t_n, drawn.t_prev))


def ddim_step(schedule: Schedule, x: jax.Array, output: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
    """Psi(x, output, t -> s): one DDIM move of x (B, h, w, C) along a raw prediction, between timesteps (B,)."""
    return add_noise(
        *to_x0_eps(output, x, *alpha_sigma(schedule, t, x), schedule.prediction_type), *alpha_sigma(schedule, s, x)
    )


def tscd_pair(
    student_fn: Model,
    target_fn: Model,
    teacher_fn: Teacher,
    batch: Mapping[str, Any],
    drawn: Draw,
    *,
    schedule: Schedule,
) -> Pair:
    """Compute both sides of Eq. 12 for given draws; the arguments are those of `consistency_loss`.

    x_n = alpha_n z_0 + sigma_n eps;  xhat = Psi(x_n, teacher, t_prev)  (Eq. 1)
    prediction = Psi(x_n, student, t_end);  target = sg(Psi(xhat, EMA, t_end))
    """
    x_t, cond = solver_start(batch["latents"], drawn, schedule), batch["cond"]
    output, seen = teacher_fn(x_t, drawn.t_n, cond, batch.get("uncond"), drawn.guidance)
    student = student_fn(x_t, drawn.t_n, cond)
    return tscd_pair_from(student, output, target_fn, cond, x_t, drawn, schedule=schedule)._replace(seen=seen)


def tscd_pair_from(
    student: jax.Array,
    teacher: jax.Array,
    target_fn: Model,
    cond: Any,
    x_t: jax.Array,
    drawn: Draw,
    *,
    schedule: Schedule,
) -> Pair:
    """Both sides of Eq. 12, given what student and teacher predict where the solver step begins.

    Args:
        student: the student's raw prediction at (x_n, t_n), (B, h, w, C), with its gradient.
        teacher: the teacher's, guidance applied.
        target_fn: as in `tscd_pair`.
        cond: conditioning of the B samples.
        x_t: x_n, from `solver_start`.
        drawn: from `draw`.
        schedule: the base model's.
    """
    t_prev, t_end = drawn.t_prev, drawn.t_end
    x_prev = solver_end(x_t, teacher, drawn, schedule)
    prediction = ddim_step(schedule, x_t, student, drawn.t_n, t_end)

    def target_at_end() -> jax.Array:
        return ddim_step(schedule, x_prev, target_fn(x_prev, t_prev, cond), t_prev, t_end)

    # With N = k every segment is one solver step: the target is the teacher's, and the EMA's forward pass is spared.
    spared = jnp.all(t_end == t_prev)
    target = jax.lax.stop_gradient(jax.lax.cond(spared, lambda: x_prev, target_at_end))
    return Pair(prediction, target, x_t, drawn, jnp.where(spared, 0.0, 1.0))
