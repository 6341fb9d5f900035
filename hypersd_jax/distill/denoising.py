"""Ordinary training of a diffusion model: predict the noise at every timestep (DDPM, arXiv 2006.11239)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hypersd_jax.diffusion.prediction import add_noise, from_x0_eps
from hypersd_jax.diffusion.schedule import Schedule
from hypersd_jax.distill.distances import mse


class Corruption(NamedTuple):
    """The random numbers of one step of ordinary training, for each sample."""

    t: jax.Array  # (B,) int32, uniform over all training times
    eps: jax.Array  # (B, h, w, C) float32, standard normal
    dropped: jax.Array  # (B,) bool, shown without its caption


def corruption(
    key: jax.Array, shape: tuple[int, ...], indices: jax.Array, *, times: int, prompt_dropout: float
) -> Corruption:
    """Draw timesteps, noise and dropped captions for latents of ``shape`` (B, h, w, C), by (key, batch index) alone.

    Args:
        key: the step's key.
        shape: of the latents.
        indices: (B,) batch indices of the samples.
        times: number of training times T.
        prompt_dropout: probability that a caption is dropped.
    """

    def one(index: jax.Array) -> Corruption:
        time_key, noise_key, drop_key = jax.random.split(jax.random.fold_in(key, index), 3)
        return Corruption(
            t=jax.random.randint(time_key, (), 0, times),
            eps=jax.random.normal(noise_key, shape[1:]),
            dropped=jax.random.uniform(drop_key) < prompt_dropout,
        )

    return jax.vmap(one)(indices)


def denoising_loss(
    model_fn: Callable[[jax.Array, jax.Array, Any], jax.Array],
    latents: jax.Array,
    cond: Any,
    drawn: Corruption,
    *,
    schedule: Schedule,
    snr_gamma: float | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the mean squared error of the prediction, weighted over time, and its metrics.

    Args:
        model_fn: (x (B, h, w, C), t (B,), cond) -> raw prediction, of the schedule's prediction type.
        latents: clean latents times the scaling factor (B, h, w, C).
        cond: the captions' conditioning, those of dropped captions replaced already.
        drawn: from `corruption`.
        schedule: the model's.
        snr_gamma: None weighs all times alike; else the loss in x_0 has weight min(SNR, gamma), SNR = alpha^2/sigma^2
            (min-SNR, arXiv 2303.09556, section 3.4).

    Returns:
        (loss, metrics): float32 scalar, and "mse", unweighted.
    """
    latents = jnp.asarray(latents, jnp.float32)
    column = (latents.shape[0], 1, 1, 1)
    alpha = jnp.asarray(schedule.alpha)[drawn.t]
    sigma = jnp.asarray(schedule.sigma)[drawn.t]
    a, s = alpha.reshape(column), sigma.reshape(column)
    x_t = add_noise(latents, drawn.eps, a, s)
    target = from_x0_eps(latents, drawn.eps, a, s, schedule.prediction_type)
    errors = mse(model_fn(x_t, drawn.t, cond), target)
    weights = jnp.ones_like(alpha)
    if snr_gamma is not None:
        snr = jnp.square(alpha / sigma)
        # An error of epsilon is 1/SNR of one of x_0, one of v is 1/(SNR + 1).
        in_x0 = {"epsilon": 1.0 / snr, "v_prediction": 1.0 / (snr + 1.0), "sample": jnp.ones_like(snr)}
        weights = jnp.minimum(snr, snr_gamma) * in_x0[schedule.prediction_type]
    return jnp.mean(weights * errors), {"mse": jax.lax.stop_gradient(jnp.mean(errors))}
