"""Regression of a one-step student to a many-step model's endpoints (Hyper-SD, section 3.3: the MSE term).

`endpoint` is where the many-step ODE rollout from the same noise ends; a second point of the student's own path, from
which it is to find the same endpoint, makes more steps correct the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hypersd_jax.diffusion.prediction import add_noise, to_x0_eps
from hypersd_jax.diffusion.schedule import Schedule
from hypersd_jax.distill.distances import mse
from hypersd_jax.distill.target_timesteps import uniform_integer
from hypersd_jax.distill.trajectory import Drawn, Sample, estimate
from hypersd_jax.distill.tscd import Model, alpha_sigma


def endpoint(model_fn: Model, noise: jax.Array, cond: Any, times: jax.Array, *, schedule: Schedule) -> jax.Array:
    """Compute the endpoint x_0 (B, h, w, C) of a model's DDIM rollout from noise through ``times`` (K,), constant."""
    return endpoint_and_calls(model_fn, noise, cond, times, (), schedule=schedule)[0]


def endpoint_and_calls(
    model_fn: Model,
    noise: jax.Array,
    cond: Any,
    times: jax.Array,
    calls: Sequence[tuple[jax.Array, jax.Array, Any]],
    *,
    schedule: Schedule,
) -> tuple[jax.Array, list[jax.Array]]:
    """Compute `endpoint`, and what the model gives elsewhere, with the model once in the program to compile.

    Args:
        model_fn: (x, t (B,), cond) -> raw prediction.
        noise: where the rollout begins (B, h, w, C).
        cond: conditioning of B samples.
        times: (K,) int32, descending.
        calls: arguments of the other calls, of the same structure and shapes as the rollout's.
        schedule: the model's.

    Returns:
        (endpoint, the raw prediction of each other call), without gradient.
    """
    batch_size, count = noise.shape[0], times.shape[0]

    def one_call(latents: tuple[jax.Array, jax.Array], index: jax.Array) -> tuple[Any, jax.Array]:
        step = jnp.minimum(index, count - 1)
        own = latents[0], jnp.broadcast_to(times[step], (batch_size,)), cond
        which = jnp.maximum(index - count + 1, 0)
        x, t, given = jax.lax.switch(which, [lambda inputs=inputs: inputs for inputs in (own, *calls)])
        output = model_fn(x, t, given)
        x0, eps = to_x0_eps(output, x, *alpha_sigma(schedule, t, x), schedule.prediction_type)
        after = jnp.broadcast_to(times[jnp.minimum(step + 1, count - 1)], (batch_size,))
        # The last step's noised latents are not used, but it is in the loop too: the model is compiled once.
        found = add_noise(x0, eps, *alpha_sigma(schedule, after, x0)), x0
        if calls:
            found = jax.tree.map(lambda new, old: jnp.where(which == 0, new, old), found, latents)
        return found, output

    (_, x0), outputs = jax.lax.scan(one_call, (noise, noise), jnp.arange(count + len(calls)))
    return jax.lax.stop_gradient((x0, [outputs[count + number] for number in range(len(calls))]))


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
