"""The student's own samples against the same in NumPy, float64, and where their gradient comes from."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax import distill
from hypersd_jax.diffusion import Schedule
from hypersd_jax.distill import Sample, Trajectory, frozen_sample, student_sample

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULE = Schedule(**BETAS)
ABAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
KEY = jax.random.key(5)
SHAPE = (3, 3, 3, 4)
COND = np.asarray([-1.0, 0.2, 0.9], np.float32)
TIMES = jnp.asarray([999, 640, 279])
BOUNDS = jnp.asarray([20, 979])
ALMOST_ONE = np.nextafter(np.float32(1), np.float32(0))  # the last that `jax.random.uniform` may return
# float32 through x_0 at t = 999, where the prediction's rounding is divided by alpha = 0.068; elsewhere 1e-6 holds
RTOL = ATOL = 1e-4

# One program each: operation by operation, every one of them would be a program of its own.
draw_trajectory = jax.jit(distill.draw_trajectory, static_argnums=(1, 2), static_argnames="last")
noised = jax.jit(distill.noised, static_argnums=2)
standard_normal = jax.jit(lambda key, number: jax.random.normal(jax.random.fold_in(key, number), SHAPE[1:]))

MODES = pytest.mark.parametrize("deterministic", [False, True], ids=["dmd", "tdm"])


def network(x, t, cond, np=jnp):
    return np.tanh(0.7 * x + cond.reshape(-1, 1, 1, 1) + t.reshape(-1, 1, 1, 1) / 1000)


def table(t):
    """alpha and sigma of one timestep, float64."""
    return np.sqrt(ABAR[t]), np.sqrt(1 - ABAR[t])


def estimates(x, t):
    """x_0 and eps of the network at one time, in NumPy."""
    (alpha, sigma), output = table(t), network(x, np.full(len(x), t), COND.astype(np.float64), np)
    return (x - sigma * output) / alpha, output


@functools.cache
def drawn_at(step, steps=3):
    """Draws whose step with gradient is the given one."""
    return draw_trajectory(KEY, SHAPE, steps)._replace(step=jnp.int32(step))


@functools.partial(jax.jit, static_argnames="deterministic")
def sample(drawn, times, deterministic, scales=(1.0, 1.0), bounds=BOUNDS):
    """The sample, and what the student was given; student and the steps before it are scaled apart."""
    given = []

    def student(x, t, cond):
        given.append((x, t))
        return scales[0] * network(x, t, cond), -x

    def still(x, t, cond):
        return scales[1] * network(x, t, cond)

    trajectory = Trajectory(times, bounds, SCHEDULE, deterministic)
    made, extra = student_sample(student, still, jnp.asarray(COND), drawn, trajectory)
    return made, *given, extra


def fresh_noise(drawn, step):
    return np.stack([standard_normal(key, step) for key in drawn.keys]).astype(np.float64)


def input_by_hand(drawn, step, deterministic):
    """Where the student stands before its step."""
    x = np.asarray(drawn.noise, np.float64)
    for index in range(step):
        x0, eps = estimates(x, TIMES[index])
        alpha, sigma = table(TIMES[index + 1])
        x = alpha * x0 + sigma * (eps if deterministic else fresh_noise(drawn, index))
    return x


def close(ours, theirs, rtol=RTOL, atol=ATOL):
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol)


@MODES
@pytest.mark.parametrize("time", [999, 800])
def test_one_step_is_pure_noise_in_and_x0_out(time, deterministic):
    drawn = drawn_at(0, 1)
    made, (x, t), extra = sample(drawn, jnp.asarray([time]), deterministic)
    np.testing.assert_array_equal(x, drawn.noise)  # whatever the time
    np.testing.assert_array_equal(extra, -drawn.noise)
    np.testing.assert_array_equal(t, [time] * 3)
    x0, _ = estimates(np.asarray(drawn.noise, np.float64), time)
    close(made.x0, x0)
    np.testing.assert_array_equal(made.x, made.x0)
    assert (made.alpha, made.sigma) == (1, 0)
    high = min(time, 979) if deterministic else 979
    assert (made.low, made.high) == (20, high)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_dmd2_noises_each_estimate_afresh(step):
    drawn = drawn_at(step)
    made, (x, t), _ = sample(drawn, TIMES, False)
    by_hand = input_by_hand(drawn, step, False)
    close(x, by_hand)
    np.testing.assert_array_equal(t, [TIMES[step]] * 3)
    close(made.x0, estimates(by_hand, TIMES[step])[0])
    np.testing.assert_array_equal(made.x, made.x0)
    assert (made.alpha, made.sigma, made.low, made.high) == (1, 0, 20, 979)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_tdm_follows_the_deterministic_trajectory(step):
    drawn = drawn_at(step)
    made, (x, t), _ = sample(drawn, TIMES, True)
    by_hand = input_by_hand(drawn, step, True)
    close(x, by_hand)
    np.testing.assert_array_equal(t, [TIMES[step]] * 3)
    x0, eps = estimates(by_hand, TIMES[step])
    alpha, sigma = (1.0, 0.0) if step == 2 else table(TIMES[step + 1])
    assert (float(made.alpha), float(made.sigma)) == pytest.approx((alpha, sigma), rel=1e-6)
    close(made.x0, x0)
    close(made.x, alpha * x0 + sigma * eps)
    assert (made.low, made.high) == ((640, 979), (279, 640), (20, 279))[step]
    free, *_ = sample(drawn, TIMES, True, bounds=jnp.asarray([0, 999]))
    assert (free.low, free.high) == ((640, 999), (279, 640), (0, 279))[step]


@MODES
@pytest.mark.parametrize("step", [0, 2])
def test_the_gradient_is_that_of_the_drawn_step_alone(step, deterministic):
    drawn, weigh = drawn_at(step), jax.random.normal(jax.random.key(1), (2, *SHAPE))

    def ours(scales):
        made, *_ = sample(drawn, TIMES, deterministic, scales)
        return jnp.sum(weigh[0] * made.x0) + jnp.sum(weigh[1] * made.x)

    def by_hand(scale, x, xp):
        alpha, sigma = table(TIMES[step])
        eps = scale * network(x, xp.full(3, TIMES[step]), COND, xp)
        x0 = (x - sigma * eps) / alpha
        if not deterministic or step == 2:
            return xp.sum((weigh[0] + weigh[1]) * x0)
        alpha, sigma = table(TIMES[step + 1])
        return xp.sum(weigh[0] * x0) + xp.sum(weigh[1] * (alpha * x0 + sigma * eps))

    x = input_by_hand(drawn, step, deterministic)
    value, (student, still) = jax.value_and_grad(ours)((1.0, 1.0))
    slope = (by_hand(1.5, x, np) - by_hand(0.5, x, np)) / 1.0  # linear in the scale: the difference is exact
    assert float(value) == pytest.approx(float(by_hand(1.0, x, np)), rel=1e-4, abs=1e-2)
    assert float(student) == pytest.approx(float(slope), rel=1e-4, abs=1e-2)
    assert abs(slope) > 1
    assert float(still) == 0
    other = float(ours((1.0, 0.5)))  # not because the steps before were of no matter
    assert (abs(other - float(value)) > 1e-2) == (step > 0)


@MODES
@pytest.mark.parametrize("times", [TIMES, TIMES[:1]], ids=["three", "one"])
def test_the_sample_without_gradient_is_the_same(times, deterministic):
    """For it the network is traced once, whatever the number of steps."""
    traced = []

    def student(x, t, cond):
        traced.append(1)
        return network(x, t, cond)

    trajectory = Trajectory(times, BOUNDS, SCHEDULE, deterministic)
    frozen = jax.jit(lambda drawn: frozen_sample(student, jnp.asarray(COND), drawn, trajectory))
    for step in range(len(times)):
        drawn = drawn_at(step, len(times))
        made, *_ = sample(drawn, times, deterministic)
        jax.tree.map(lambda a, b: close(a, b, 1e-5, 1e-5), frozen(drawn), made)
    assert len(traced) == 1


def test_draws_depend_on_key_and_index_only():
    whole, part = draw_trajectory(KEY, (8, 2, 2, 4), 3), draw_trajectory(KEY, (5, 2, 2, 4), 3, np.arange(3, 8))
    for name in ("noise", "eps", "uniform"):
        np.testing.assert_array_equal(getattr(whole, name)[3:], getattr(part, name))
    np.testing.assert_array_equal(jax.random.key_data(whole.keys)[3:], jax.random.key_data(part.keys))
    assert whole.step == part.step
    values = np.concatenate([np.ravel(each) for each in (whole.noise, whole.eps)])
    assert len(np.unique(values)) == values.size
    assert len(np.unique(whole.uniform)) == len(np.unique(jax.random.key_data(whole.keys), axis=0)) == 8
    other = draw_trajectory(jax.random.key(6), (8, 2, 2, 4), 3)
    for name in ("noise", "eps", "uniform"):
        assert not np.any(getattr(whole, name) == getattr(other, name))


@MODES
def test_a_sample_is_the_same_in_any_part_of_the_batch(deterministic):
    """The noise between the steps included."""

    @jax.jit
    def run(indices):
        drawn = draw_trajectory(KEY, (len(indices), 2, 2, 4), 3, indices)._replace(step=jnp.int32(2))
        trajectory = Trajectory(TIMES, BOUNDS, SCHEDULE, deterministic)
        return frozen_sample(network, jnp.asarray(0.1 * indices), drawn, trajectory).x

    close(run(np.arange(4))[2:], run(np.arange(2, 4)), rtol=1e-5, atol=1e-5)


def test_every_step_is_drawn_alike():
    steps = jax.vmap(lambda key: draw_trajectory(key, (1, 1, 1, 1), 4).step)(jax.random.split(KEY, 2000))
    counts = np.bincount(steps, minlength=4)
    assert len(counts) == 4
    assert np.abs(counts - 500).max() < 80  # four standard deviations
    late = jax.vmap(lambda key: draw_trajectory(key, (1, 1, 1, 1), 4, last=2).step)(jax.random.split(KEY, 100))
    assert set(map(int, late)) == {2, 3}


def made_of(x, alpha, sigma, low, high, x0=None):
    return Sample(x if x0 is None else x0, x, *map(jnp.float32, (alpha, sigma)), *map(jnp.int32, (low, high)))


def drawn_for(size, uniform, shape=(1, 1, 4)):
    return draw_trajectory(KEY, (size, *shape), 1)._replace(uniform=jnp.asarray(uniform, jnp.float32))


def test_times_are_uniform_and_both_ends_are_reached():
    low, high = 279, 640
    size = high - low + 1
    made = made_of(jnp.zeros((size, 1, 1, 4)), *table(low), low, high)
    _, t, _ = noised(made, drawn_for(size, (np.arange(size) + 0.5) / size), SCHEDULE)
    np.testing.assert_array_equal(t, np.arange(low, high + 1))
    assert t.dtype == jnp.int32
    one = made_of(jnp.zeros((2, 1, 1, 4)), *table(low), low, high)
    np.testing.assert_array_equal(noised(one, drawn_for(2, [0.0, ALMOST_ONE]), SCHEDULE)[1], [low, high])
    point = made_of(jnp.zeros((2, 1, 1, 4)), *table(low), low, low)
    np.testing.assert_array_equal(noised(point, drawn_for(2, [0.0, ALMOST_ONE]), SCHEDULE)[1], [low, low])


def test_noising_on_from_a_point_of_the_trajectory():
    x = jax.random.normal(jax.random.key(2), (4, 1, 1, 4))
    drawn = drawn_for(4, [0.0, 0.2, 0.6, ALMOST_ONE])
    x_t, t, b = noised(made_of(x, *table(279), 279, 640), drawn, SCHEDULE)
    (alpha, sigma), (alpha_t, sigma_t) = table(279), table(np.asarray(t))
    a = alpha_t / alpha
    square = sigma_t**2 - a**2 * sigma**2
    assert b.shape == (4, 1, 1, 1)
    close(np.square(b).ravel(), square, rtol=1e-5, atol=3e-7)
    assert b[0, 0, 0, 0] < 1e-3  # at its own time a sample gets no noise
    column = np.asarray(a).reshape(-1, 1, 1, 1)
    expected = column * x + np.sqrt(square).reshape(column.shape) * drawn.eps
    close(x_t[0], expected[0], rtol=0, atol=1e-3)  # 1 - 1 in float32, and its root
    close(x_t[1:], expected[1:], rtol=1e-5, atol=1e-5)


def test_a_noised_point_has_the_schedules_variance():
    """Monte Carlo over 2 x 90000 numbers: the standard error of the variance is 0.5 %."""
    shape, clean = (300, 300, 1), 0.4
    drawn = drawn_for(2, [0.3, 0.9], shape)
    (alpha, sigma) = table(279)
    x_t, t, _ = noised(made_of(alpha * clean + sigma * drawn.noise, alpha, sigma, 279, 640), drawn, SCHEDULE)
    alpha_t, sigma_t = table(np.asarray(t))
    np.testing.assert_allclose(x_t.mean(axis=(1, 2, 3)), alpha_t * clean, atol=0.01)
    np.testing.assert_allclose(x_t.var(axis=(1, 2, 3)), sigma_t**2, rtol=0.02)


def test_noising_a_clean_sample_is_the_forward_process():
    drawn = drawn_for(4, [0.0, 0.3, 0.7, ALMOST_ONE])
    x_t, t, b = noised(made_of(drawn.noise, 1, 0, 0, 999), drawn, SCHEDULE)
    np.testing.assert_array_equal(t, [0, 300, 700, 999])
    alpha, sigma = (each.reshape(-1, 1, 1, 1) for each in table(np.asarray(t)))
    close(b, sigma, rtol=1e-6, atol=0)
    close(x_t, alpha * drawn.noise + sigma * drawn.eps, rtol=1e-6, atol=1e-6)


def test_the_noised_sample_carries_the_gradient():
    drawn = drawn_for(2, [0.1, 0.8])

    def total(x):
        return jnp.sum(noised(made_of(x, *table(279), 279, 640), drawn, SCHEDULE)[0])

    _, t, _ = noised(made_of(drawn.noise, *table(279), 279, 640), drawn, SCHEDULE)
    a = table(np.asarray(t))[0] / table(279)[0]
    close(jax.grad(total)(drawn.noise), np.broadcast_to(a.reshape(-1, 1, 1, 1), (2, 1, 1, 4)), rtol=1e-6, atol=0)
