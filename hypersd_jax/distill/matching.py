"""Matching the student's distribution to the teacher's by the difference of two scores (Hyper-SD, section 3.3, Eq. 8).

The real score is the guided base model's, the fake one's that of a model which is trained on the student's samples
too (`fake_loss`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from hypersd_jax.diffusion.prediction import to_x0_eps
from hypersd_jax.diffusion.schedule import Schedule
from hypersd_jax.distill.distances import mse
from hypersd_jax.distill.score import dmd_gradient, surrogate_loss
from hypersd_jax.distill.trajectory import Drawn, ModelWithExtra, Sample, noised
from hypersd_jax.distill.tscd import alpha_sigma


def matching_loss(
    sample: Sample,
    x_t: jax.Array,
    t: jax.Array,
    real: ArrayLike,
    fake: ArrayLike,
    *,
    schedule: Schedule,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the surrogate whose gradient in the student's estimate of x_0 is `dmd_gradient`, and its metrics.

    Args:
        sample: from `student_sample`.
        x_t: the sample noised to t (`noised`).
        t: (B,) int32.
        real: raw prediction of the real score model at (x_t, t), guidance applied.
        fake: that of the fake score model, without guidance.
        schedule: the base model's.

    Returns:
        (loss, metrics): scalar, and "score_gap", the mean absolute gradient, which falls as the two scores agree.
    """
    at = alpha_sigma(schedule, t, x_t)
    mu_real, _ = to_x0_eps(real, x_t, *at, schedule.prediction_type)
    mu_fake, _ = to_x0_eps(fake, x_t, *at, schedule.prediction_type)
    gradient = dmd_gradient(sample.x0, mu_real, mu_fake)
    gap = jnp.mean(jnp.mean(jnp.abs(gradient), axis=tuple(range(1, gradient.ndim))))
    return surrogate_loss(sample.x0, gradient), {"score_gap": gap}


def score_term(
    sample: Sample,
    drawn: Drawn,
    real_fn: ModelWithExtra,
    fake_fn: ModelWithExtra,
    cond: Any,
    *,
    schedule: Schedule,
    with_features: bool,
) -> tuple[jax.Array, dict[str, jax.Array], Any, Any]:
    """DMD's term of the student's loss: both scores of its sample, noised, and their difference (`matching_loss`).

    Args:
        sample: from `student_sample`.
        drawn: from `draw_trajectory`.
        real_fn: (x, t, cond) -> (the real-score model's raw prediction, guidance applied, and anything else).
        fake_fn: (x, t, cond) -> (the fake-score model's raw prediction, features for a discriminator).
        cond: conditioning.
        schedule: the base model's.
        with_features: whether a discriminator reads the features, which then carry the student's gradient; the score
            does not.

    Returns:
        (loss, metrics, features, what the real-score model's call gave beside its prediction).
    """
    x_t, t, _ = noised(sample, drawn, schedule)
    constant = jax.lax.stop_gradient(x_t)
    real, others = real_fn(constant, t, cond)
    output, features = fake_fn(x_t if with_features else constant, t, cond)
    loss, metrics = matching_loss(sample, x_t, t, real, output, schedule=schedule)
    return loss, metrics, features, others


def fake_loss(
    output: ArrayLike,
    x_t: jax.Array,
    t: jax.Array,
    b: jax.Array,
    eps: jax.Array,
    *,
    schedule: Schedule,
) -> jax.Array:
    """Compute the denoising score matching loss of the fake score model on the student's samples, scalar.

    With x_t = a x + b eps the score to be learnt is -eps / b, and the model's is -eps_hat / sigma_t; weighted by b^2
    the loss is |(b / sigma_t) eps_hat - eps|^2, ordinary denoising where x is clean (b = sigma_t).

    Args:
        output: the model's raw prediction at (x_t, t).
        x_t: noised samples (B, h, w, C).
        t: (B,) int32.
        b: from `noised`.
        eps: the noise that was added.
        schedule: the base model's.
    """
    alpha, sigma = alpha_sigma(schedule, t, x_t)
    _, estimate = to_x0_eps(output, x_t, alpha, sigma, schedule.prediction_type)
    return jnp.mean(mse(b / sigma * estimate, eps))
