"""Where many steps lead, and the student's second estimate of it, against the same in NumPy, float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.diffusion import Schedule, solver_table
from hypersd_jax.distill import Sample, draw_trajectory, endpoint, endpoint_and_calls, path_loss, second_estimate

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULES = {kind: Schedule(**BETAS, prediction_type=kind) for kind in ("epsilon", "v_prediction")}
SCHEDULE = SCHEDULES["epsilon"]
ABAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
SHAPE = (3, 3, 3, 4)
COND = np.asarray([-1.0, 0.2, 0.9], np.float32)
TIMES = jnp.asarray([999, 640, 279])
ALMOST_ONE = np.nextafter(np.float32(1), np.float32(0))  # the last that `jax.random.uniform` may return
DRAWN = draw_trajectory(jax.random.key(5), SHAPE, 1)
# float32 through x_0 at t = 999, where the prediction's rounding is divided by alpha = 0.068; elsewhere 1e-6 holds
RTOL = ATOL = 1e-4

KINDS = pytest.mark.parametrize("kind", SCHEDULES)


def network(x, t, cond, np=jnp):
    return np.tanh(0.7 * x + cond.reshape(-1, 1, 1, 1) + t.reshape(-1, 1, 1, 1) / 1000)


def table(t):
    """alpha and sigma of timesteps (B,), to multiply latents by, float64."""
    return (np.sqrt(part).reshape(-1, 1, 1, 1) for part in (ABAR[np.asarray(t)], 1 - ABAR[np.asarray(t)]))


def estimates(x, t, kind="epsilon", scale=1.0):
    """x_0 and eps of the network at times (B,), in NumPy."""
    (alpha, sigma), output = table(t), scale * network(x, np.asarray(t), COND.astype(np.float64), np)
    if kind == "epsilon":
        return (x - sigma * output) / alpha, output
    return alpha * x - sigma * output, alpha * output + sigma * x


def close(ours, theirs, rtol=RTOL, atol=ATOL):
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol)


@KINDS
@pytest.mark.parametrize("steps", [1, 4])
def test_the_end_of_a_trajectory_is_that_of_ddim(kind, steps):
    times = solver_table("ddim", steps, eta=0.0, scheduler_config=BETAS)["timesteps"]
    noise = np.asarray(DRAWN.noise)
    run = jax.jit(lambda noise, times: endpoint(network, noise, jnp.asarray(COND), times, schedule=SCHEDULES[kind]))
    ours = run(noise, np.asarray(times, np.int32))
    x = noise.astype(np.float64)
    for index, time in enumerate(times):
        x0, eps = estimates(x, [time] * 3, kind)
        if index < steps - 1:
            alpha, sigma = table([times[index + 1]] * 3)
            x = alpha * x0 + sigma * eps
    close(ours, x0)


def test_the_end_of_a_trajectory_takes_one_call_a_step():
    calls = []

    def counted(x, t, cond):
        jax.debug.callback(lambda t: calls.append(int(t)), t[0])
        return network(x, t, cond)

    jax.block_until_ready(endpoint(counted, DRAWN.noise, jnp.asarray(COND), TIMES, schedule=SCHEDULE))
    jax.effects_barrier()
    assert sorted(calls, reverse=True) == TIMES.tolist()


@pytest.mark.parametrize("count", [1, 2])
def test_other_calls_share_the_rollouts_program(count):
    """The endpoint is the same, and so is what the model gives elsewhere."""
    traced = []

    def counted(x, t, cond):
        traced.append(x.shape)
        return network(x, t, cond)

    keys = jax.random.split(jax.random.key(8), count)
    others = [
        (jax.random.normal(key, SHAPE), jnp.asarray([7, 500, 999]), jnp.asarray(COND) + i) for i, key in enumerate(keys)
    ]

    @jax.jit
    def run(noise, others):
        return endpoint_and_calls(counted, noise, jnp.asarray(COND), TIMES, others, schedule=SCHEDULE)

    end, outputs = run(DRAWN.noise, others)
    assert len(traced) == 1
    close(
        end, jax.jit(lambda noise: endpoint(network, noise, jnp.asarray(COND), TIMES, schedule=SCHEDULE))(DRAWN.noise)
    )
    assert len(outputs) == count
    for output, (x, t, cond) in zip(outputs, others, strict=True):
        close(output, network(*map(np.asarray, (x, t, cond)), np), rtol=1e-6, atol=1e-6)


def test_the_end_of_a_trajectory_has_no_gradient():
    def total(scale, noise):
        def model(x, t, cond):
            return scale * network(x, t, cond)

        return jnp.sum(endpoint(model, noise, jnp.asarray(COND), TIMES, schedule=SCHEDULE))

    gradient = jax.grad(total, argnums=(0, 1))(1.0, DRAWN.noise)
    assert gradient[0] == 0
    assert not np.any(gradient[1])


START, BOUNDS = 999, (100, 899)
UNIFORM = (0.0, 0.37, ALMOST_ONE)
SECOND = (100, 396, 899)  # 100 + floor(0.37 * 800); both ends of the bounds are reached
END = jax.random.normal(jax.random.key(6), SHAPE)
X0 = 0.5 * jax.random.normal(jax.random.key(7), SHAPE)  # of no step of the network: the path is to be the sample's


def sample_of(x0):
    return Sample(x0, x0, jnp.float32(1), jnp.float32(0), jnp.int32(20), jnp.int32(979))


def path(scale=1.0, x0=X0, end=END, kind="epsilon", model=network):
    """The loss of a student that is scaled, and the times that it was asked at."""
    asked = []

    def student(x, t, cond):
        asked.append(t)
        return scale * model(x, t, cond)

    drawn = DRAWN._replace(uniform=jnp.asarray(UNIFORM, jnp.float32))
    points = (jnp.int32(START), jnp.asarray(BOUNDS, jnp.int32))
    loss = path_loss(student, sample_of(x0), drawn, end, jnp.asarray(COND), *points, schedule=SCHEDULES[kind])
    return loss, asked


def second_by_hand(kind="epsilon", scale=1.0):
    """The points that the first step leads to, and the estimates from there."""
    x0, noise = np.asarray(X0, np.float64), np.asarray(DRAWN.noise, np.float64)
    (alpha, sigma), (alpha_t, sigma_t) = table([START] * 3), table(SECOND)
    x_t = alpha_t * x0 + sigma_t * (noise - alpha * x0) / sigma
    return x_t, estimates(x_t, SECOND, kind, scale)[0]


@KINDS
def test_the_second_estimate_is_from_where_the_first_step_leads(kind):
    points = (jnp.int32(START), jnp.asarray(SECOND, jnp.int32))
    ours = second_estimate(network, sample_of(X0), DRAWN.noise, jnp.asarray(COND), *points, schedule=SCHEDULES[kind])
    close(ours, second_by_hand(kind)[1], rtol=1e-5, atol=1e-5)


@KINDS
def test_the_path_loss_is_the_second_estimates_distance_to_the_end(kind):
    loss, (asked,) = path(kind=kind)
    assert (asked.tolist(), asked.dtype) == (list(SECOND), jnp.int32)
    difference = second_by_hand(kind)[1] - np.asarray(END, np.float64)
    assert float(loss) == pytest.approx(np.mean(difference**2), rel=1e-5)
    assert (loss.shape, loss.dtype) == ((), jnp.float32)


def test_the_gradient_of_the_path_loss_is_that_of_the_second_call_alone():
    """The first step is not pulled."""
    scale = 1.3
    gradient, of_x0 = jax.grad(lambda scale, x0: path(scale, x0)[0], argnums=(0, 1))(scale, X0)
    x_t, x0 = second_by_hand(scale=scale)
    alpha, sigma = table(SECOND)
    slope = -sigma / alpha * network(x_t, np.asarray(SECOND), COND.astype(np.float64), np)
    expected = np.mean(2 * (x0 - np.asarray(END, np.float64)) * slope)
    assert abs(expected) > 0.1
    assert float(gradient) == pytest.approx(expected, rel=1e-4)
    assert not np.any(of_x0)


def test_a_student_whose_path_is_straight_finds_its_end_again():
    """Data at one point: wherever the first step leads, the second estimate is the first."""
    point = 0.3

    def exact(x, t, cond):
        alpha, sigma = (jnp.asarray(part)[t].reshape(-1, 1, 1, 1) for part in (SCHEDULE.alpha, SCHEDULE.sigma))
        return (x - alpha * point) / sigma

    end = jnp.full(SHAPE, point)
    assert float(path(x0=end, end=end, model=exact)[0]) < 1e-9
    assert float(path(x0=end, end=end)[0]) > 1e-2
