"""Latent consistency distillation (LCM, arXiv 2310.04378): the student's and the target's estimates of x_0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hypersd_jax.diffusion.prediction import to_x0_eps
from hypersd_jax.diffusion.schedule import Schedule
from hypersd_jax.distill.tscd import Draw, Model, Pair, Teacher, alpha_sigma, solver_end, solver_start

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0


def boundary_scalings(t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute c_skip and c_out, float32 like ``t`` in shape; 1 and 0 at t = 0.

    With u = 10 t and sigma_data = 0.5: c_skip = sigma_data^2 / (u^2 + sigma_data^2), c_out = u / sqrt(u^2 +
    sigma_data^2), the paper's choice in the scaled time of its code. From t = 1 on they are 0.0025 and 0.999 or nearer
    to 0 and 1; at t = 0, where the trajectory ends, they make the consistency function the identity.
    """
    scaled = TIMESTEP_SCALING * jnp.asarray(t, jnp.float32)
    square = jnp.square(scaled) + SIGMA_DATA**2
    return SIGMA_DATA**2 / square, scaled / jnp.sqrt(square)


def lcm_pair(
    student_fn: Model,
    target_fn: Model,
    teacher_fn: Teacher,
    batch: Mapping[str, Any],
    drawn: Draw,
    *,
    schedule: Schedule,
) -> Pair:
    """Compute both sides of LCM's loss; the arguments are those of `consistency_loss`, and draw.t_end is not used.

    prediction = f(x_n, t_n; student);  target = sg(f(xhat, t_prev; EMA));  f(x, t) = c_skip(t) x + c_out(t) x_0
    """
    x_t = solver_start(batch["latents"], drawn, schedule)
    output, seen = teacher_fn(x_t, drawn.t_n, batch["cond"], batch.get("uncond"), drawn.guidance)
    x_prev = solver_end(x_t, output, drawn, schedule)

    def consistency(model: Model, x: jax.Array, t: jax.Array) -> jax.Array:
        x0, _ = to_x0_eps(model(x, t, batch["cond"]), x, *alpha_sigma(schedule, t, x), schedule.prediction_type)
        c_skip, c_out = (scale.reshape(-1, *[1] * (x.ndim - 1)) for scale in boundary_scalings(t))
        return c_skip * jnp.asarray(x, jnp.float32) + c_out * x0

    target = jax.lax.stop_gradient(consistency(target_fn, x_prev, drawn.t_prev))
    return Pair(consistency(student_fn, x_t, drawn.t_n), target, x_t, drawn, jnp.float32(1.0), seen)
