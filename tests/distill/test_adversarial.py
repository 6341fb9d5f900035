"""Adversarial losses by their formulas, their gradients, R1 by differences, and noising on from a later time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax import distill
from hypersd_jax.diffusion import Schedule
from hypersd_jax.distill import ADVERSARIAL_LOSSES
from hypersd_jax.errors import UserError

# One program each: operation by operation, every one of them would be a program of its own.
accuracy = jax.jit(distill.accuracy)
discriminator_loss = jax.jit(distill.discriminator_loss, static_argnums=0)
finite_difference_r1 = jax.jit(distill.finite_difference_r1)
generator_loss = jax.jit(distill.generator_loss, static_argnums=0)
renoise = jax.jit(distill.renoise, static_argnums=0)

RANDOM = np.random.default_rng(0)
# Two heads of different size: neither the number of places nor a head's share of them may count.
REAL, FAKE = (
    {"a": 2 * RANDOM.standard_normal((3, 4, 5, 1)), "b": 1 + 2 * RANDOM.standard_normal((3, 2, 1, 1))} for _ in range(2)
)
STABLE_DIFFUSION = Schedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def softplus(d: Any) -> Any:
    return np.log1p(np.exp(-np.abs(d))) + np.maximum(d, 0)


# What one logit adds: of real samples, of fake ones, of fake ones to the student.
FORMULAS = {
    "hinge": (lambda d: np.maximum(1 - d, 0), lambda d: np.maximum(1 + d, 0), lambda d: np.maximum(1 - d, 0)),
    "non_saturating": (lambda d: softplus(-d), softplus, lambda d: softplus(-d)),
    "least_squares": (lambda d: (d - 1) ** 2 / 2, lambda d: (d + 1) ** 2 / 2, lambda d: (d - 1) ** 2 / 2),
}


def by_sample(logits: dict[str, np.ndarray], term: Any) -> np.ndarray:
    return np.mean([[term(sample).mean() for sample in head] for head in logits.values()], axis=0)


@pytest.mark.parametrize("kind", ADVERSARIAL_LOSSES)
def test_formulas(kind: str) -> None:
    real, fake, generator = FORMULAS[kind]
    of_discriminator = by_sample(REAL, real) + by_sample(FAKE, fake)
    of_generator = by_sample(FAKE, generator)
    assert discriminator_loss(kind, REAL, FAKE).dtype == jnp.float32
    np.testing.assert_allclose(discriminator_loss(kind, REAL, FAKE), of_discriminator.mean(), rtol=1e-6)
    np.testing.assert_allclose(generator_loss(kind, FAKE), of_generator.mean(), rtol=1e-6)


def test_losses_of_an_undecided_discriminator() -> None:
    nothing = {"a": np.zeros((2, 3, 3, 1))}
    expected = {"hinge": (2.0, 1.0), "non_saturating": (2 * np.log(2), np.log(2)), "least_squares": (1.0, 0.5)}
    assert set(expected) == set(ADVERSARIAL_LOSSES)
    for kind, (of_discriminator, of_generator) in expected.items():
        np.testing.assert_allclose(discriminator_loss(kind, nothing, nothing), of_discriminator, rtol=1e-6)
        np.testing.assert_allclose(generator_loss(kind, nothing), of_generator, rtol=1e-6)


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(UserError, match="adversarial loss: unknown value 'hing'; did you mean 'hinge'"):
        discriminator_loss("hing", REAL, FAKE)
    with pytest.raises(UserError, match="non_saturating"):
        generator_loss("saturating", FAKE)


@pytest.mark.parametrize("kind", ADVERSARIAL_LOSSES)
def test_gradients_are_the_slopes(kind: str) -> None:
    """Against differences of the NumPy formulas in float64."""
    real, fake, generator = FORMULAS[kind]
    step = 1e-6

    def slopes(logits: dict[str, np.ndarray], term: Any) -> dict[str, np.ndarray]:
        """A logit's share: one of its head's places, of two heads, of three samples."""
        return {
            name: (term(head + step) - term(head - step)) / (2 * step) / (head[0].size * 2 * 3)
            for name, head in logits.items()
        }

    logits = jax.tree.map(lambda head: jnp.asarray(head, jnp.float32), (REAL, FAKE))
    found = jax.jit(jax.grad(lambda pair: discriminator_loss(kind, *pair)))(logits)
    student = jax.jit(jax.grad(lambda head: generator_loss(kind, head)))(logits[1])
    wanted = (slopes(REAL, real), slopes(FAKE, fake))
    for ours, theirs in ((found[0], wanted[0]), (found[1], wanted[1]), (student, slopes(FAKE, generator))):
        for name, slope in theirs.items():
            np.testing.assert_allclose(ours[name], slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ADVERSARIAL_LOSSES)
def test_large_logits_stay_finite(kind: str) -> None:
    far = {"a": jnp.array([[1e4], [-1e4]])}
    for loss in (lambda d: discriminator_loss(kind, d, d), lambda d: generator_loss(kind, d)):
        value, gradient = jax.jit(jax.value_and_grad(loss))(far)
        assert np.isfinite(value)
        assert np.isfinite(gradient["a"]).all()
        assert np.any(gradient["a"])


def test_half_precision_logits_are_reduced_in_float32() -> None:
    half = {"a": jnp.full((1, 3000), 1.0, jnp.bfloat16)}
    assert discriminator_loss("least_squares", half, half) == 2.0


def smooth(x: jax.Array) -> dict[str, jax.Array]:
    """Two heads, as a discriminator's logits: (B, 2, 3, 1) to (B, 2, 1, 1) and (B, 1, 3, 1)."""
    return {"a": jnp.sin(jnp.sum(x, axis=2, keepdims=True)), "b": jnp.sum(jnp.square(x), axis=1, keepdims=True)}


def test_finite_difference_r1_tends_to_the_gradients_norm() -> None:
    x = jax.random.normal(jax.random.key(0), (3, 2, 3, 1))

    def mean_logit(sample: jax.Array) -> jax.Array:
        return sum(jnp.mean(head) for head in smooth(sample[None]).values()) / 2

    norms = jnp.sum(jnp.square(jax.vmap(jax.grad(mean_logit))(x)), axis=(1, 2, 3))
    sigma, draws = 0.01, 100_000
    noise = jax.random.normal(jax.random.key(1), (draws, *x.shape))

    @jax.jit
    def expectation(x: jax.Array, noise: jax.Array) -> jax.Array:
        once = jax.vmap(lambda n: finite_difference_r1(smooth(x), smooth(x + sigma * n), sigma))
        return jnp.mean(once(noise))

    # The standard error of the mean of (n . g)^2 is sqrt(2 / draws) = 0.45 % of it.
    np.testing.assert_allclose(expectation(x, noise), jnp.mean(norms), rtol=0.015)
    for i in range(3):
        np.testing.assert_allclose(expectation(x[i : i + 1], noise[:, i : i + 1]), norms[i], rtol=0.015)


def test_finite_difference_r1_along_one_direction() -> None:
    """Of a linear D the value is exact: ((n . g))^2, and the gradient in D's own parameter is 2 (n . g) n."""
    x, n, g = (jax.random.normal(key, (1, 6)) for key in jax.random.split(jax.random.key(2), 3))

    def penalty(g: jax.Array, sigma: float) -> jax.Array:
        return finite_difference_r1({"a": jnp.sum(g * x, 1)}, {"a": jnp.sum(g * (x + sigma * n), 1)}, sigma)

    along = jnp.sum(g * n)
    for sigma in (0.5, 2.0):
        np.testing.assert_allclose(penalty(g, sigma), along**2, rtol=1e-5)
        np.testing.assert_allclose(jax.grad(penalty)(g, sigma), 2 * along * n, rtol=1e-4)


def test_accuracy() -> None:
    real = {"a": jnp.array([[3.0, -1], [-2, 1], [0, 0], [5, 5]]), "b": jnp.array([[-0.5], [-1.0], [0], [5]])}
    fake = {"a": jnp.array([[-3.0, 1], [-2, 1], [-9, 9], [5, 5]]), "b": jnp.array([[-0.5], [-1.0], [-1], [5]])}
    assert accuracy(real, fake) == (2 + 3) / 8
    assert accuracy(jax.tree.map(lambda head: head[:2], real), jax.tree.map(lambda head: head[:2], fake)) == 3 / 4


TIMES = [(0, 0), (0, 1), (19, 19), (19, 999), (259, 499), (499, 739), (998, 999), (999, 999)]


def test_renoise_against_numpy() -> None:
    s, t = np.array(TIMES).T
    x, noise = (RANDOM.standard_normal((len(s), 2, 3, 4)).astype(np.float32) for _ in range(2))
    ratio = (STABLE_DIFFUSION.alphas_cumprod[t] / STABLE_DIFFUSION.alphas_cumprod[s])[:, None, None, None]
    moved = renoise(STABLE_DIFFUSION, x, s, t, noise)
    assert moved.dtype == jnp.float32
    np.testing.assert_allclose(moved, np.sqrt(ratio) * x + np.sqrt(1 - ratio) * noise, rtol=1e-5, atol=1e-5)
    same = s == t
    assert same.sum() == 3
    assert np.array_equal(np.asarray(moved)[same], x[same])
    assert renoise(STABLE_DIFFUSION, jnp.asarray(x, jnp.bfloat16), s, t, noise).dtype == jnp.float32


def scales(schedule: Schedule, s: Any, t: Any) -> tuple[np.ndarray, np.ndarray]:
    """What `renoise` multiplies the sample and the noise by, (B,) each."""
    one, zero = np.ones((len(s), 1)), np.zeros((len(s), 1))
    return tuple(
        np.asarray(renoise(schedule, *parts), np.float64)[:, 0] for parts in ((one, s, t, zero), (zero, s, t, one))
    )


def test_renoise_keeps_the_process() -> None:
    """Variance is kept, data noised to s becomes data noised to t, and two moves are one."""
    s, u = np.array(TIMES).T
    t = (s + u) // 2
    kept, added = scales(STABLE_DIFFUSION, s, u)
    np.testing.assert_allclose(kept**2 + added**2, 1, rtol=1e-6)
    alpha, sigma = STABLE_DIFFUSION.alpha.astype(np.float64), STABLE_DIFFUSION.sigma.astype(np.float64)
    np.testing.assert_allclose(kept * alpha[s], alpha[u], rtol=2e-6)
    np.testing.assert_allclose(np.hypot(kept * sigma[s], added), sigma[u], rtol=2e-6)
    (first, first_noise), (second, second_noise) = scales(STABLE_DIFFUSION, s, t), scales(STABLE_DIFFUSION, t, u)
    np.testing.assert_allclose(first * second, kept, rtol=2e-6)
    np.testing.assert_allclose(np.hypot(second * first_noise, second_noise), added, rtol=2e-5)


def test_renoise_ends_in_pure_noise_where_the_schedule_does() -> None:
    schedule = Schedule(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
    )
    kept, added = scales(schedule, np.array([0, 998, 999]), np.array([999, 999, 999]))
    np.testing.assert_allclose(kept, [0, 0, 1], atol=1e-12)
    np.testing.assert_array_equal(added, [1, 1, 0])


def test_renoise_differentiates_in_the_sample() -> None:
    s, t = np.array([19, 499]), np.array([19, 739])
    gradient = jax.grad(lambda x: jnp.sum(renoise(STABLE_DIFFUSION, x, s, t, jnp.ones((2, 3)))))(jnp.zeros((2, 3)))
    np.testing.assert_allclose(gradient, scales(STABLE_DIFFUSION, s, t)[0][:, None] * np.ones((1, 3)), rtol=1e-6)
