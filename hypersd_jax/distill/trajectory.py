"""The student's own samples for score distillation: from noise, through steps without gradient, to one with.

DMD (arXiv 2311.18828) has one step; DMD2 (arXiv 2405.14867, section 4.5, "backward simulation") several, with fresh
noise between them; TDM (arXiv 2503.06674) several along the student's deterministic trajectory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from hypersd_jax.diffusion.prediction import add_noise, to_x0_eps
from hypersd_jax.diffusion.schedule import Schedule
from hypersd_jax.distill.target_timesteps import uniform_integer
from hypersd_jax.distill.tscd import Model, alpha_sigma

ModelWithExtra = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
"""(x (B, h, w, C), t (B,) int32, cond) -> (raw prediction, anything else that the call gives)."""


class Drawn(NamedTuple):
    """The random numbers of one loss of score distillation; a sample's depend on (key, its index) alone."""

    step: jax.Array  # () int32, which of the student's steps carries the gradient; the same for the whole batch
    noise: jax.Array  # (B, h, w, C) float32, where the student starts
    eps: jax.Array  # (B, h, w, C) float32, what its sample is noised with
    uniform: jax.Array  # (B,) float32 in [0, 1), the time to which
    keys: jax.Array  # (B,) keys of the noise between the steps


class Sample(NamedTuple):
    """The student's sample at one of its steps."""

    x0: jax.Array  # (B, h, w, C) float32, its estimate of the clean latents; carries the gradient
    x: jax.Array  # (B, h, w, C) float32, alpha x0 + sigma eps, the trajectory after the step
    alpha: jax.Array  # () float32
    sigma: jax.Array  # () float32, 0 where x is x0
    low: jax.Array  # () int32, the first time that x may be noised to,
    high: jax.Array  # () int32, and the last


def draw_trajectory(
    key: jax.Array, shape: tuple[int, ...], steps: int, indices: ArrayLike | None = None, *, last: int | None = None
) -> Drawn:
    """Draw for latents of ``shape`` (B, h, w, C) and a student of ``steps`` steps; ``indices`` as in `tscd.draw`.

    The step with the gradient is one of the ``last``; None: of all.
    """
    step_key, samples_key = jax.random.split(key)

    def one(index: jax.Array) -> tuple[jax.Array, ...]:
        keys = jax.random.split(jax.random.fold_in(samples_key, index), 4)
        noise, eps = (jax.random.normal(each, shape[1:]) for each in keys[:2])
        return noise, eps, jax.random.uniform(keys[2]), keys[3]

    first = 0 if last is None else steps - last
    indices = jnp.arange(shape[0]) if indices is None else jnp.asarray(indices)
    noise, eps, uniform, keys = jax.vmap(one)(indices)
    return Drawn(jax.random.randint(step_key, (), first, steps), noise, eps, uniform, keys)


class Trajectory(NamedTuple):
    """How a student steps, and where its samples are scored.

    Attributes:
        times: (K,) int32, the student's steps, descending; K is static.
        bounds: (2,) int32, the range of times that samples are noised to.
        schedule: the base model's.
        deterministic: False (DMD, DMD2): each step's estimate of x_0 is noised afresh to the next time, and x_0 itself
            is scored, at any time of ``bounds``. True (TDM): DDIM steps, and the point that the step leads to is
            scored, at the times from there back to where the step began.
    """

    times: jax.Array
    bounds: jax.Array
    schedule: Schedule
    deterministic: bool


def student_sample(
    student_fn: ModelWithExtra, no_gradient_fn: Model, cond: Any, drawn: Drawn, trajectory: Trajectory
) -> tuple[Sample, Any]:
    """Run the student's steps up to the drawn one, and that one with gradient.

    The first step's input is noise alone, whatever its time: at t = 999 a Stable Diffusion schedule would keep 7 % of
    the image, which there is none of (DMD2, section 4.5; Hyper-SD, section 3.3, enters at 999 or 800).

    Args:
        student_fn: (x, t (B,), cond) -> (raw prediction, anything else).
        no_gradient_fn: the student without gradient, for the steps before; it returns the prediction alone.
        cond: conditioning of B samples.
        drawn: from `draw_trajectory`.
        trajectory: the student's.

    Returns:
        (sample, what the student's last call gave beside its prediction).
    """
    times = trajectory.times
    x = _follow(no_gradient_fn, cond, drawn, trajectory, drawn.step)[0] if times.shape[0] > 1 else drawn.noise
    x, t = jax.lax.stop_gradient(x), jnp.broadcast_to(times[drawn.step], (x.shape[0],))
    output, extra = student_fn(x, t, cond)
    return _sample(x, output, drawn, trajectory), extra


def frozen_sample(no_gradient_fn: Model, cond: Any, drawn: Drawn, trajectory: Trajectory) -> Sample:
    """Compute the sample of `student_sample` without gradient; all its steps are one program to compile."""
    _, x, output = _follow(no_gradient_fn, cond, drawn, trajectory, drawn.step + 1)
    return _sample(x, output, drawn, trajectory)


def _follow(
    no_gradient_fn: Model, cond: Any, drawn: Drawn, trajectory: Trajectory, steps: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Take the student's first ``steps`` (): where they lead, where the last began, and its raw prediction there."""
    times, _, schedule, deterministic = trajectory
    count, batch_size = times.shape[0], drawn.noise.shape[0]

    def one_step(index: jax.Array, found: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        x, t = found[0], jnp.broadcast_to(times[index], (batch_size,))
        output = no_gradient_fn(x, t, cond).astype(jnp.float32)
        x0, eps = to_x0_eps(output, x, *alpha_sigma(schedule, t, x), schedule.prediction_type)
        if not deterministic:
            keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(drawn.keys, index)
            eps = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)
        after = times[jnp.minimum(index + 1, count - 1)]  # the last step leads nowhere, and nobody asks where
        return add_noise(x0, eps, *alpha_sigma(schedule, jnp.broadcast_to(after, (batch_size,)), x)), x, output

    start = (drawn.noise,) * 3
    return one_step(jnp.int32(0), start) if count == 1 else jax.lax.fori_loop(0, steps, one_step, start)


def _sample(x: jax.Array, output: jax.Array, drawn: Drawn, trajectory: Trajectory) -> Sample:
    """Compute the drawn step's sample from its start x (B, h, w, C) and the student's raw prediction there."""
    times, bounds, schedule, deterministic = trajectory
    count = times.shape[0]
    t = jnp.broadcast_to(times[drawn.step], (x.shape[0],))
    x0, eps = to_x0_eps(output, x, *alpha_sigma(schedule, t, x), schedule.prediction_type)
    if not deterministic:
        return Sample(x0, x0, jnp.float32(1.0), jnp.float32(0.0), bounds[0], bounds[1])
    last = drawn.step == count - 1
    after = jnp.where(last, 0, times[jnp.minimum(drawn.step + 1, count - 1)])
    alpha = jnp.where(last, 1.0, jnp.asarray(schedule.alpha)[after])
    sigma = jnp.where(last, 0.0, jnp.asarray(schedule.sigma)[after])
    low, high = jnp.clip(jnp.stack([after, times[drawn.step]]), bounds[0], bounds[1])
    return Sample(x0, add_noise(x0, eps, alpha, sigma), alpha, sigma, low, high)


def noised(sample: Sample, drawn: Drawn, schedule: Schedule) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Noise the sample forward to a timestep t uniform over its range: (x_t, t (B,) int32, b (B, 1, 1, 1)).

    x_t = a x + b eps with a = alpha_t / alpha and b^2 = sigma_t^2 - a^2 sigma^2, so that b is sigma_t for clean x.
    """
    t = sample.low + uniform_integer(drawn.uniform, sample.high - sample.low + 1)
    alpha_t, sigma_t = alpha_sigma(schedule, t, sample.x)
    a = alpha_t / sample.alpha
    b = jnp.sqrt(jnp.maximum(jnp.square(sigma_t) - jnp.square(a * sample.sigma), 0.0))
    return a * sample.x + b * drawn.eps, t, b


def estimate(model: Model, x: jax.Array, t: jax.Array, cond: Any, schedule: Schedule) -> tuple[jax.Array, jax.Array]:
    """Compute the clean-latent and noise estimates of a model at x (B, h, w, C) and timesteps t, (B,) or ()."""
    at = jnp.broadcast_to(t, (x.shape[0],))
    return to_x0_eps(model(x, at, cond), x, *alpha_sigma(schedule, at, x), schedule.prediction_type)
