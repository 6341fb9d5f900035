"""Regression of a one-step student to a many-step model's endpoints (Hyper-SD, section 3.3: the MSE term).

`endpoint` is where the many-step ODE rollout from the same noise ends; a second point of the student's own path, from
which it is to find the same endpoint, makes more steps correct the first.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from hypersd_jax.diffusion.prediction import add_noise
from hypersd_jax.diffusion.schedule import Schedule
from hypersd_jax.distill.distances import mse
from hypersd_jax.distill.target_timesteps import uniform_integer
from hypersd_jax.distill.trajectory import Drawn, Sample, estimate
from hypersd_jax.distill.tscd import Model, alpha_sigma


def endpoint(model_fn: Model, noise: jax.Array, cond: Any, times: jax.Array, *, schedule: Schedule) -> jax.Array:
    """Compute the endpoint x_0 (B, h, w, C) of a model's DDIM rollout from noise through ``times`` (K,), constant."""
    batch_size, count = noise.shape[0], times.shape[0]

    def one_step(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x0, eps = estimate(model_fn, carry[0], times[index], cond, schedule)
        after = jnp.broadcast_to(times[jnp.minimum(index + 1, count - 1)], (batch_size,))
        return add_noise(x0, eps, *alpha_sigma(schedule, after, x0)), x0

    # The last step's noised latents are not used, but it is in the loop too: the model is compiled once.
    _, x0 = jax.lax.fori_loop(0, count, one_step, (noise, noise))
    return jax.lax.stop_gradient(x0)


def second_estimate(
    student_fn: Model,
    sample: Sample,
    noise: jax.Array,
    cond: Any,
    start: jax.Array,
    t: jax.Array,
    *,
    schedule: Schedule,
) -> jax.Array:
    """Compute the student's second estimate of x_0 (B, h, w, C), from its own first step, which has no gradient.

    Args:
        student_fn: (x, t (B,), cond) -> raw prediction.
        sample: of one step, from ``start``.
        noise: where that step began (B, h, w, C).
        cond: conditioning.
        start: () int32, the time of its input.
        t: (B,) int32, the timesteps that the DDIM step goes to.
        schedule: the base model's.
    """
    x0 = jax.lax.stop_gradient(sample.x0)
    alpha, sigma = alpha_sigma(schedule, jnp.broadcast_to(start, t.shape), x0)
    x_t = add_noise(x0, (noise - alpha * x0) / sigma, *alpha_sigma(schedule, t, x0))
    return estimate(student_fn, x_t, t, cond, schedule)[0]


def path_loss(
    student_fn: Model,
    sample: Sample,
    drawn: Drawn,
    endpoint: jax.Array,
    cond: Any,
    start: jax.Array,
    bounds: jax.Array,
    *,
    schedule: Schedule,
) -> jax.Array:
    """Compute the MSE of `second_estimate` to the endpoint, at timesteps uniform over ``bounds`` (2,), inclusive."""
    t = bounds[0] + uniform_integer(drawn.uniform, bounds[1] - bounds[0] + 1)
    x0 = second_estimate(student_fn, sample, drawn.noise, cond, start, t, schedule=schedule)
    return jnp.mean(mse(x0, endpoint))
