"""Regression of a one-step student to where a many-step model leads (Hyper-SD, section 3.3: the MSE beside the score).

The many-step end of the same noise is `endpoint`; a second point of the student's own path, from which it is to find
the same end, makes more steps correct the first.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from hypersd_jax.diffusion.prediction import add_noise
from hypersd_jax.diffusion.schedule import Schedule
from hypersd_jax.distill.distances import mse
from hypersd_jax.distill.ends import below
from hypersd_jax.distill.trajectory import Drawn, Sample, estimate
from hypersd_jax.distill.tscd import Model, columns


def endpoint(model_fn: Model, noise: jax.Array, cond: Any, times: jax.Array, *, schedule: Schedule) -> jax.Array:
    """Where a model's own DDIM trajectory through ``times`` (K,) leads from noise: x_0 (B, h, w, C), no gradient."""
    rows, count = noise.shape[0], times.shape[0]

    def one_step(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x0, eps = estimate(model_fn, carry[0], times[index], cond, schedule)
        after = jnp.broadcast_to(times[jnp.minimum(index + 1, count - 1)], (rows,))
        return add_noise(x0, eps, *columns(schedule, after, x0)), x0

    # The last step leads nowhere, but stands in the loop too: the model is compiled once.
    _, x0 = jax.lax.fori_loop(0, count, one_step, (noise, noise))
    return jax.lax.stop_gradient(x0)


def again(
    student_fn: Model,
    sample: Sample,
    noise: jax.Array,
    cond: Any,
    start: jax.Array,
    t: jax.Array,
    *,
    schedule: Schedule,
) -> jax.Array:
    """The student's second estimate of x_0 (B, h, w, C): from where its own first step leads, which has no gradient.

    Args:
        student_fn: (x, t (B,), cond) -> raw prediction.
        sample: of one step, from ``start``.
        noise: where that step began (B, h, w, C).
        cond: conditioning.
        start: () int32, the time of its input.
        t: (B,) int32, the times that the DDIM move leads to.
        schedule: the base model's.
    """
    x0 = jax.lax.stop_gradient(sample.x0)
    alpha, sigma = columns(schedule, jnp.broadcast_to(start, t.shape), x0)
    x_t = add_noise(x0, (noise - alpha * x0) / sigma, *columns(schedule, t, x0))
    return estimate(student_fn, x_t, t, cond, schedule)[0]


def path_loss(
    student_fn: Model,
    sample: Sample,
    drawn: Drawn,
    end: jax.Array,
    cond: Any,
    start: jax.Array,
    bounds: jax.Array,
    *,
    schedule: Schedule,
) -> jax.Array:
    """The MSE to ``end`` of the student's estimate `again`, at times uniform over ``bounds`` (2,), both inclusive."""
    t = bounds[0] + below(drawn.uniform, bounds[1] - bounds[0] + 1)
    x0 = again(student_fn, sample, drawn.noise, cond, start, t, schedule=schedule)
    return jnp.mean(mse(x0, end))
