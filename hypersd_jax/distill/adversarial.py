"""Adversarial losses on a discriminator's logits, one map for each head, and the noise that its inputs get.

A logit says how real a sample looks at one position; 0 is undecided in all the losses. Each loss is the mean over a
map's positions, then over the heads, then over the samples, so that neither the number of heads nor the resolution
weighs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from hypersd_jax.diffusion.prediction import add_noise
from hypersd_jax.diffusion.schedule import Schedule, require_name

Logits = Mapping[str, ArrayLike]
Term = Callable[[jax.Array], jax.Array]


class _Terms(NamedTuple):
    """The contributions of one logit to the losses."""

    real: Term  # the discriminator's
    fake: Term
    generator: Term


_TERMS = {
    "hinge": _Terms(
        real=lambda d: jax.nn.relu(1 - d), fake=lambda d: jax.nn.relu(1 + d), generator=lambda d: jax.nn.relu(1 - d)
    ),
    "non_saturating": _Terms(
        real=lambda d: jax.nn.softplus(-d), fake=jax.nn.softplus, generator=lambda d: jax.nn.softplus(-d)
    ),
    "least_squares": _Terms(
        real=lambda d: 0.5 * jnp.square(d - 1),
        fake=lambda d: 0.5 * jnp.square(d + 1),
        generator=lambda d: 0.5 * jnp.square(d - 1),
    ),
}

ADVERSARIAL_LOSSES = tuple(_TERMS)
"""The losses by name: see `discriminator_loss`."""


def _by_sample(logits: Logits, term: Term = lambda d: d) -> jax.Array:
    """The mean of `term` over positions, then heads: (B,) float32."""
    maps = [jnp.asarray(head, jnp.float32) for head in logits.values()]
    return sum(jnp.mean(term(d).reshape(d.shape[0], -1), axis=1) for d in maps) / jnp.float32(len(maps))


def discriminator_loss(kind: str, real: Logits, fake: Logits) -> jax.Array:
    """Compute the loss of the discriminator D, a float32 scalar.

    hinge:          relu(1 - D(real)) + relu(1 + D(fake))               (arXiv 1705.02894; PCM, arXiv 2405.18407)
    non_saturating: softplus(-D(real)) + softplus(D(fake))              (arXiv 1406.2661; SDXL-Lightning, DMD2)
    least_squares:  (D(real) - 1)^2 / 2 + (D(fake) + 1)^2 / 2           (arXiv 1611.04076, with b = c = 1, a = -1)

    The targets of the last are the paper's 1 and 0 shifted to +1 and -1, so that there too 0 is undecided and a new
    head, whose logits are small, is on neither side.

    Args:
        kind: one of ADVERSARIAL_LOSSES; static.
        real: logits (B, ...) by head.
        fake: likewise.

    Raises:
        UserError: an unknown kind.
    """
    terms = _TERMS[require_name("adversarial loss", kind, ADVERSARIAL_LOSSES)]
    return jnp.mean(_by_sample(real, terms.real) + _by_sample(fake, terms.fake))


def generator_loss(kind: str, fake: Logits) -> jax.Array:
    """Compute the adversarial loss of the student, a float32 scalar; the arguments are those of `discriminator_loss`.

    hinge:          relu(1 - D(fake)), which lets a sample go once it passes for real, as PCM has it
    non_saturating: softplus(-D(fake))
    least_squares:  (D(fake) - 1)^2 / 2
    """
    terms = _TERMS[require_name("adversarial loss", kind, ADVERSARIAL_LOSSES)]
    return jnp.mean(_by_sample(fake, terms.generator))


def finite_difference_r1(logits: Logits, perturbed: Logits, sigma: ArrayLike) -> jax.Array:
    """((D(x + sigma n) - D(x)) / sigma)^2: the R1 penalty (arXiv 1801.04406) without a second derivative.

    D is the mean over positions and heads. Over n ~ N(0, I) the expectation tends to |grad_x D(x)|^2 as sigma -> 0.
    The approximated R1 of APT (arXiv 2501.08316) is sigma^2 times this: multiply its weight by sigma^2.

    Args:
        logits: D(x) at real samples x, (B, ...) by head.
        perturbed: D(x + sigma n) by the caller's n, likewise.
        sigma: the noise's scale, above 0; the logits' rounding errors are divided by it.
    """
    slope = (_by_sample(perturbed) - _by_sample(logits)) / jnp.asarray(sigma, jnp.float32)
    return jnp.mean(jnp.square(slope))


def accuracy(real: Logits, fake: Logits) -> jax.Array:
    """Compute the share of samples that the discriminator puts on the right side of 0, over real and fake ones alike.

    A sample's logit is the mean over positions and heads; one of exactly 0 is on neither side.
    """
    right = jnp.stack([_by_sample(real) > 0, _by_sample(fake) < 0])
    return jnp.mean(jnp.mean(right.astype(jnp.float32), axis=0))


def renoise(schedule: Schedule, x: ArrayLike, s: ArrayLike, t: ArrayLike, noise: ArrayLike) -> jax.Array:
    """Add noise from timestep s on: sqrt(abar_t / abar_s) x + sqrt(1 - abar_t / abar_s) noise.

    What is distributed as the data noised to s becomes the data noised to t, for the discriminator
    (PCM, arXiv 2405.18407; SDXL-Lightning, arXiv 2402.13929). With t = s it is the identity, bit for bit.

    Args:
        schedule: the base model's.
        x: samples at time s (B, h, w, C).
        s: (B,) integers.
        t: (B,) integers, each at least its s; NaN where it is less.
        noise: standard normal, like x.

    Returns:
        float32 (B, h, w, C).
    """
    # Differences of -log abar keep their digits at both ends of the schedule, 1 - abar_t / abar_s does not.
    table = -np.log(np.maximum(schedule.alphas_cumprod, np.finfo(np.float32).tiny))
    levels = jnp.asarray(table, jnp.float32)
    gap = (levels[jnp.asarray(t)] - levels[jnp.asarray(s)]).reshape(-1, *[1] * (jnp.ndim(x) - 1))
    return add_noise(x, noise, jnp.exp(-gap / 2), jnp.sqrt(-jnp.expm1(-gap)))
