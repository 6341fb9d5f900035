"""Distribution matching: the surrogate's gradient, the whole term by hand, and what the fake score model learns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.diffusion import Schedule, from_x0_eps
from hypersd_jax.distill import (
    Sample,
    dmd_gradient,
    draw_trajectory,
    fake_loss,
    matching_loss,
    mse,
    noised,
    score_term,
)

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KINDS = ("epsilon", "v_prediction")
SCHEDULES = {kind: Schedule(**BETAS, prediction_type=kind) for kind in KINDS}
SCHEDULE = SCHEDULES["epsilon"]
ABAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
SHAPE = (4, 3, 3, 2)
T = jnp.asarray([30, 300, 620, 970], jnp.int32)
X0, EPS, REAL, FAKE = jax.random.normal(jax.random.key(0), (4, *SHAPE))


def at(t):
    return (np.sqrt(part).reshape(-1, 1, 1, 1) for part in (ABAR[np.asarray(t)], 1 - ABAR[np.asarray(t)]))


ALPHA, SIGMA = at(T)
X_T = jnp.asarray(ALPHA * X0 + SIGMA * EPS, jnp.float32)


def clean(x0):
    return Sample(x0, x0, jnp.float32(1), jnp.float32(0), jnp.int32(20), jnp.int32(979))


def raw(x0, kind):
    """The output of kind that stands for the estimate x0 at X_T."""
    return from_x0_eps(x0, (X_T - ALPHA * x0) / SIGMA, jnp.float32(ALPHA), jnp.float32(SIGMA), kind)


def matching(x0, real, fake, kind="epsilon", x_t=X_T):
    return matching_loss(clean(x0), x_t, T, real, fake, schedule=SCHEDULES[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_dmd(kind):
    """Of estimates mu that are given as outputs; float32 through x_0 at t = 970, divided by alpha = 0.08."""
    real, fake = raw(REAL, kind), raw(FAKE, kind)
    expected = np.asarray(dmd_gradient(X0, REAL, FAKE))
    ours = jax.grad(lambda x0: matching(x0, real, fake, kind)[0])(X0)
    np.testing.assert_allclose(ours, expected / X0.size, rtol=1e-4, atol=1e-6)
    loss, metrics = matching(X0, real, fake, kind)
    assert float(loss) == pytest.approx(0.5 * np.mean(expected**2), rel=1e-4)
    assert set(metrics) == {"score_gap"}
    assert float(metrics["score_gap"]) == pytest.approx(np.mean(np.abs(expected)), rel=1e-4)


def test_only_the_students_estimate_is_differentiated():
    def loss(x_t, real, fake):
        return matching(X0, real, fake, x_t=x_t)[0]

    for gradient in jax.grad(loss, argnums=(0, 1, 2))(X_T, raw(REAL, "epsilon"), raw(FAKE, "epsilon")):
        assert not np.any(gradient)


def test_the_noised_point_of_a_trajectory_is_not_what_is_pulled():
    """The estimate of x_0 is, also where the student's sample is a point that it moves to."""

    def loss(x0, x):
        sample = Sample(x0, x, jnp.float32(0.8), jnp.float32(0.6), jnp.int32(20), jnp.int32(979))
        return matching_loss(sample, X_T, T, raw(REAL, "epsilon"), raw(FAKE, "epsilon"), schedule=SCHEDULE)[0]

    of_x0, of_x = jax.grad(loss, argnums=(0, 1))(X0, 0.8 * X0)
    np.testing.assert_allclose(of_x0, dmd_gradient(X0, REAL, FAKE) / X0.size, rtol=1e-4, atol=1e-6)
    assert not np.any(of_x)


def test_equal_scores_leave_nothing_to_do():
    same = raw(REAL, "epsilon")
    (loss, metrics), gradient = jax.value_and_grad(lambda x0: matching(x0, same, same), has_aux=True)(X0)
    assert (float(loss), float(metrics["score_gap"])) == (0, 0)
    assert not np.any(gradient)


def test_descent_leads_to_the_teachers_distribution():
    """Student N(0.5, s^2), teacher N(-0.3, s^2), both scores exact: x_0 moves down, and by the same way everywhere."""
    spread = 0.7

    def exact(mean):
        return (X_T * ALPHA * spread**2 + SIGMA**2 * mean) / (ALPHA**2 * spread**2 + SIGMA**2)

    gradient = jax.grad(lambda x0: matching(x0, raw(exact(-0.3), "epsilon"), raw(exact(0.5), "epsilon"))[0])(X0)
    assert np.all(gradient > 0)
    assert np.all(np.ptp(gradient, axis=(1, 2, 3)) < 1e-3 * gradient.mean(axis=(1, 2, 3)))


ON_THE_WAY = 279  # the time at which a student's samples stand that have noise in them
COND = np.asarray([-1.0, -0.3, 0.4, 1.1], np.float32)
DRAWN = draw_trajectory(jax.random.key(3), SHAPE, 1)._replace(
    uniform=jnp.asarray([0.01, 0.31, 0.72, 0.99], jnp.float32)
)


def network(x, t, cond, np=jnp):
    return np.tanh(0.7 * x + cond.reshape(-1, 1, 1, 1) + t.reshape(-1, 1, 1, 1) / 1000)


def sample_at(x0, x, noisy):
    alpha, sigma = (float(part) ** 0.5 for part in (ABAR[ON_THE_WAY], 1 - ABAR[ON_THE_WAY])) if noisy else (1.0, 0.0)
    low, high = (ON_THE_WAY, 640) if noisy else (20, 979)
    return Sample(x0, x, jnp.float32(alpha), jnp.float32(sigma), jnp.int32(low), jnp.int32(high))


def term(sample, kind="epsilon", *, with_features=False, scales=(1.0, 1.0)):
    """The term, its metrics, the features, what else the real score gives, and what the two models were asked."""
    asked = []

    def real(x, t, cond):
        asked.append(("real", x, t, cond))
        return scales[0] * network(x, t, cond), -x

    def fake(x, t, cond):
        asked.append(("fake", x, t, cond))
        return scales[1] * network(x, t, -cond), {"mid": 3.0 * x}

    found = score_term(sample, DRAWN, real, fake, COND, schedule=SCHEDULES[kind], with_features=with_features)
    return *found, asked


def by_hand(sample, kind="epsilon"):
    """x_t, t, the share of the sample in x_t, and DMD's gradient, float64."""
    x0, x, eps = (np.asarray(each, np.float64) for each in (sample.x0, sample.x, DRAWN.eps))
    low, high = int(sample.low), int(sample.high)
    t = low + np.floor(np.asarray(DRAWN.uniform, np.float64) * (high - low + 1)).astype(int)
    alpha, sigma = (float(part) ** 0.5 for part in (ABAR[low], 1 - ABAR[low])) if float(sample.sigma) else (1.0, 0.0)
    alpha_t, sigma_t = at(t)
    share = alpha_t / alpha
    x_t = share * x + np.sqrt(sigma_t**2 - share**2 * sigma**2) * eps

    def estimate(cond):
        output = network(x_t, t, cond.astype(np.float64), np)
        return (x_t - sigma_t * output) / alpha_t if kind == "epsilon" else alpha_t * x_t - sigma_t * output

    real, fake = estimate(COND), estimate(-COND)
    return x_t, t, share, (fake - real) / np.mean(np.abs(x0 - real), axis=(1, 2, 3), keepdims=True)


@pytest.mark.parametrize("with_features", [False, True], ids=["alone", "with_features"])
@pytest.mark.parametrize("noisy", [False, True], ids=["clean", "on-the-trajectory"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_score_term_is_the_one_by_hand(kind, noisy, with_features):
    sample = sample_at(X0, 0.8 * X0 + 0.1 * EPS if noisy else X0, noisy)
    loss, metrics, features, extra, asked = term(sample, kind, with_features=with_features)
    np.testing.assert_array_equal(extra, -asked[0][1])
    x_t, t, _, gradient = by_hand(sample, kind)
    assert [who for who, *_ in asked] == ["real", "fake"]
    for _, x, times, cond in asked:
        np.testing.assert_allclose(x, x_t, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(times, t)
        assert cond is COND
    assert float(loss) == pytest.approx(0.5 * np.mean(gradient**2), rel=1e-4)
    assert set(metrics) == {"score_gap"}
    assert float(metrics["score_gap"]) == pytest.approx(np.mean(np.abs(gradient)), rel=1e-4)
    np.testing.assert_allclose(features["mid"], 3 * x_t, rtol=1e-5, atol=3e-5)
    assert (loss.shape, loss.dtype) == ((), jnp.float32)


@pytest.mark.parametrize("with_features", [False, True], ids=["alone", "with_features"])
def test_the_score_term_pulls_the_estimate_of_x0_alone(with_features):
    """Not the point that is noised, nor either model, also where features carry a gradient."""
    start = 0.8 * X0 + 0.1 * EPS

    def loss(x0, x, scales):
        return term(sample_at(x0, x, True), with_features=with_features, scales=scales)[0]

    of_x0, of_x, of_models = jax.grad(loss, argnums=(0, 1, 2))(X0, start, (1.0, 1.0))
    gradient = by_hand(sample_at(X0, start, True))[-1]
    np.testing.assert_allclose(of_x0, gradient / X0.size, rtol=1e-3, atol=1e-6)
    assert not np.any(of_x)
    assert of_models == (0, 0)


@pytest.mark.parametrize("with_features", [False, True], ids=["alone", "with_features"])
def test_features_carry_the_students_gradient_where_a_discriminator_reads_them(with_features):
    def total(x):
        return jnp.sum(term(sample_at(X0, x, True), with_features=with_features)[2]["mid"])

    start = 0.8 * X0 + 0.1 * EPS
    share = by_hand(sample_at(X0, start, True))[2]
    expected = 3 * share * np.ones(SHAPE) if with_features else np.zeros(SHAPE)
    np.testing.assert_allclose(jax.grad(total)(start), expected, rtol=1e-5)


def test_on_clean_samples_the_fake_model_learns_to_denoise():
    drawn = draw_trajectory(jax.random.key(1), SHAPE, 1)
    x_t, t, b = noised(clean(X0), drawn, SCHEDULE)
    loss = fake_loss(FAKE, x_t, t, b, drawn.eps, schedule=SCHEDULE)
    assert float(loss) == pytest.approx(float(jnp.mean(mse(FAKE, drawn.eps))), rel=1e-6)


def test_both_prediction_types_have_the_same_losses():
    b = jnp.float32(0.8 * SIGMA)
    outputs = {kind: (raw(REAL, kind), raw(FAKE, kind)) for kind in KINDS}
    values = []
    for kind, (real, fake) in outputs.items():
        learnt = fake_loss(fake, X_T, T, b, EPS, schedule=SCHEDULES[kind])
        values.append([float(learnt), float(matching(X0, real, fake, kind)[0])])
    np.testing.assert_allclose(values[0], values[1], rtol=1e-4)
    by_hand = np.mean(np.square(0.8 * outputs["epsilon"][1] * np.ones(SHAPE) - EPS))
    assert values[0][0] == pytest.approx(by_hand, rel=1e-5)


MEAN, SPREAD = 0.4, 0.6


@pytest.mark.parametrize("noisy", [False, True], ids=["clean", "on-the-trajectory"])
def test_the_expected_gradient_vanishes_at_the_true_score(noisy):
    """Students' samples N(alpha MEAN, alpha^2 SPREAD^2 + sigma^2): the score of x_t is known.

    Monte Carlo over 64 times and 262144 numbers, each derivative of standard deviation at most 2: the standard error
    is below 0.004, of which 0.02 are five.
    """
    shape = (64, 64, 64, 1)
    drawn = draw_trajectory(jax.random.key(2), shape, 1)
    alpha, sigma = (float(part) ** 0.5 for part in (ABAR[ON_THE_WAY], 1 - ABAR[ON_THE_WAY])) if noisy else (1.0, 0.0)
    width = (alpha**2 * SPREAD**2 + sigma**2) ** 0.5
    x = alpha * MEAN + width * drawn.noise
    low, high = (ON_THE_WAY, 640) if noisy else (20, 979)
    sample = Sample(x, x, jnp.float32(alpha), jnp.float32(sigma), jnp.int32(low), jnp.int32(high))
    x_t, t, b = noised(sample, drawn, SCHEDULE)
    alpha_t, sigma_t = at(t)
    a = alpha_t / alpha
    variance = a**2 * width**2 + sigma_t**2 - a**2 * sigma**2
    best = jnp.asarray(sigma_t * (x_t - alpha_t * MEAN) / variance, jnp.float32)  # -sigma_t times the score

    def loss(scale, shift):
        return fake_loss(scale * best + shift, x_t, t, b, drawn.eps, schedule=SCHEDULE)

    slope = jax.grad(loss, argnums=(0, 1))
    np.testing.assert_allclose(slope(1.0, 0.0), [0.0, 0.0], atol=0.02)
    assert slope(1.2, 0.0)[0] > 0.05
    assert slope(0.8, 0.0)[0] < -0.05
    assert slope(1.0, 0.2)[1] > 0.05
    plain = jax.grad(lambda scale: jnp.mean(mse(scale * best, drawn.eps)))(1.0)
    assert (abs(float(plain)) > 0.05) == noisy  # ordinary denoising would learn another score from noisy samples
