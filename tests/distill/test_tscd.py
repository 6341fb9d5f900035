"""Properties of the TSCD loss (Hyper-SD Eq. 12)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.diffusion import PREDICTION_TYPES, Schedule, add_noise, from_x0_eps, guided, to_x0_eps
from hypersd_jax.distill import Draw, consistency_loss, mse, pad_segments, pseudo_huber, tscd_pair
from hypersd_jax.distill import draw as eager_draw
from hypersd_jax.errors import UserError

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULE = Schedule(**BETAS)
KEY = jax.random.key(7)
DRAWING = {"guidance": (3.0, 9.0), "offset_noise": 0.1}
MEAN = 0.3
SHAPE = (16, 3, 3, 4)
LENGTH = 1000  # of the padded segments; one shape and one length for most tests, since compiling takes their time
draw = jax.jit(eager_draw, static_argnums=1)


def loss_of(student, target, tutor, N=40, k=4, schedule=SCHEDULE):
    """The loss of 16 samples, from draws that all tests compile once."""
    times = draw(KEY, SHAPE, pad_segments(N, k, LENGTH), **DRAWING)
    pair = tscd_pair(student, target, tutor, batch_of(16), times, schedule=schedule)
    return jnp.mean(mse(pair.prediction, pair.target))


def batch_of(size, seed=0):
    latents = MEAN + jax.random.normal(jax.random.key(seed), (16, 3, 3, 4))[:size]
    return {"latents": latents, "cond": jnp.linspace(-1, 1, 16)[:size], "uncond": jnp.zeros(size)}


def at(t, schedule=SCHEDULE):
    return tuple(jnp.asarray(a)[t].reshape(-1, 1, 1, 1) for a in (schedule.alpha, schedule.sigma))


def network(x, t, cond):
    return jnp.tanh(0.7 * x + cond.reshape(-1, 1, 1, 1) + t.astype(jnp.float32).reshape(-1, 1, 1, 1) / 1000)


def teacher(x, t, cond, uncond, guidance):
    return guided(network(x, t, uncond), network(x, t, cond), guidance), None


def gaussian(spread):
    """The exact noise prediction for data N(MEAN, spread^2)."""

    def predict(x, t, cond):
        alpha, sigma = at(t)
        return sigma * (x - alpha * MEAN) / (alpha**2 * spread**2 + sigma**2)

    return predict


def ignoring_guidance(predict):
    return lambda x, t, cond, uncond, guidance: (predict(x, t, cond), None)


def psi(x, output, t, s, schedule=SCHEDULE):
    return add_noise(*to_x0_eps(output, x, *at(t, schedule), schedule.prediction_type), *at(s, schedule))


def drawn(t_n, t_prev, t_end):
    size = len(t_n)
    return Draw(
        *(jnp.asarray(t, jnp.int32) for t in (t_n, t_prev, t_end)),
        jnp.full(size, 5.0),
        jax.random.normal(KEY, (size, 3, 3, 4)),
        jnp.asarray(t_n, jnp.int32),
    )


def test_pair_is_equation_12():
    times = drawn([999, 499, 24], [974, 474, 0], [880, 474, 0])
    batch = batch_of(3)
    pair = tscd_pair(network, lambda x, t, c: 0.9 * network(x, t, c), teacher, batch, times, schedule=SCHEDULE)
    x = add_noise(batch["latents"], times.eps, *at(times.t_n))
    np.testing.assert_array_equal(pair.x_t, x)
    guided_output, _ = teacher(x, times.t_n, batch["cond"], batch["uncond"], times.guidance)
    xhat = psi(x, guided_output, times.t_n, times.t_prev)
    student = psi(x, network(x, times.t_n, batch["cond"]), times.t_n, times.t_end)
    target = psi(xhat, 0.9 * network(xhat, times.t_prev, batch["cond"]), times.t_prev, times.t_end)
    np.testing.assert_allclose(pair.prediction, student, rtol=1e-6)
    np.testing.assert_allclose(pair.target, target, rtol=1e-6)


def test_what_the_teachers_call_gives_beside_is_seen():
    """As it is, whatever it is."""
    times, batch = drawn([999, 24], [974, 0], [880, 0]), batch_of(2)

    def seeing(x, t, cond, uncond, guidance):
        return teacher(x, t, cond, uncond, guidance)[0], {"features": 2 * x, "times": t}

    pair, plain = (tscd_pair(network, network, each, batch, times, schedule=SCHEDULE) for each in (seeing, teacher))
    np.testing.assert_array_equal(pair.seen["features"], 2 * pair.x_t)
    np.testing.assert_array_equal(pair.seen["times"], times.t_n)
    assert plain.seen is None
    jax.tree.map(np.testing.assert_array_equal, pair._replace(seen=None), plain)


def test_end_at_t_prev_makes_the_target_the_teachers_step():
    times = drawn([999, 499, 24], [974, 474, 0], [974, 474, 0])
    batch = batch_of(3)
    pair = tscd_pair(network, network, teacher, batch, times, schedule=SCHEDULE)
    output, _ = teacher(pair.x_t, times.t_n, batch["cond"], batch["uncond"], times.guidance)
    xhat = psi(pair.x_t, output, *times[:2])
    np.testing.assert_allclose(pair.target, xhat, rtol=1e-5, atol=1e-6)
    # One sample with room left is enough for the target network to be asked again, and changes nothing for the others.
    other = tscd_pair(
        network, network, teacher, batch, times._replace(t_end=times.t_end.at[0].set(900)), schedule=SCHEDULE
    )
    np.testing.assert_allclose(other.target[1:], xhat[1:], rtol=1e-5, atol=1e-6)
    assert not np.allclose(other.target[0], xhat[0], atol=1e-2)


def test_one_solver_step_a_segment_runs_no_target_network():
    """The program branches at run time, so that all stages share it; N = k takes the branch without the network."""
    calls = []

    def counted(x, t, cond):
        jax.debug.callback(lambda: calls.append(1))
        return network(x, t, cond)

    for N, expected in ((8, 0), (40, 1)):
        calls.clear()
        times = draw(KEY, SHAPE, pad_segments(N, 8, LENGTH), **DRAWING)
        jax.jit(lambda times: tscd_pair(network, counted, teacher, batch_of(16), times, schedule=SCHEDULE))(times)
        jax.effects_barrier()
        assert len(calls) == expected


def test_one_solver_step_a_segment_ends_on_the_segment_boundary():
    """With N = k every start has t_prev = t_b, which leaves t_end no choice: the PCM case."""
    times = draw(KEY, SHAPE, pad_segments(8, 8, LENGTH), **DRAWING)
    np.testing.assert_array_equal(times.t_end, times.t_prev)
    np.testing.assert_array_equal(times.t_end, np.maximum(np.asarray(times.t_n) - 125, 0))


def test_draws_stay_in_their_segments_and_reach_both_ends():
    segments = pad_segments(40, 4, LENGTH)
    times = jax.tree.map(np.asarray, draw(KEY, (4000, 1, 1, 2), segments, **DRAWING))
    start = np.searchsorted(segments.t_n[:40], times.t_n)
    np.testing.assert_array_equal(segments.t_n[start], times.t_n)
    np.testing.assert_array_equal(segments.t_prev[start], times.t_prev)
    np.testing.assert_array_equal(segments.t_top[start], times.t_top)
    low = segments.t_b[start]
    assert np.all((low <= times.t_end) & (times.t_end <= times.t_prev))
    assert np.unique(start).size == 40
    assert np.bincount(start).std() < 1.5 * np.sqrt(100)
    narrow = times.t_prev - low == 25
    assert set(times.t_end[narrow] - low[narrow]) == set(range(26))
    assert 3 <= times.guidance.min() < 3.1
    assert 8.9 < times.guidance.max() <= 9
    assert times.guidance.mean() == pytest.approx(6, abs=0.1)


def test_offset_noise_is_one_shift_a_channel():
    shape, segments = (2000, 4, 4, 2), pad_segments(8, 1, LENGTH)
    plain = draw(KEY, shape, segments, guidance=(3.0, 9.0)).eps
    shift = np.asarray(draw(KEY, shape, segments, **DRAWING).eps - plain)
    assert float(plain.std()) == pytest.approx(1, abs=0.01)
    assert np.ptp(shift, axis=(1, 2)).max() < 1e-6
    assert shift[:, 0, 0].std() == pytest.approx(0.1, rel=0.05)
    assert abs(np.corrcoef(shift[:, 0, 0].T)[0, 1]) < 0.1


def test_randomness_depends_on_key_and_index_only():
    segments = pad_segments(40, 4, LENGTH)
    whole = draw(KEY, SHAPE, segments, **DRAWING)
    part = draw(KEY, (5, *SHAPE[1:]), segments, **DRAWING, indices=np.arange(3, 8))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[3:8], b), whole, part)
    assert not np.array_equal(whole.eps[0], whole.eps[1])
    assert not np.array_equal(whole.eps, draw(jax.random.key(8), SHAPE, segments, **DRAWING).eps)


def test_only_the_student_is_differentiated():
    def loss(scales):
        names = ("student", "target", "teacher")
        student, target, tutor = (lambda x, t, cond, name=name: scales[name] * network(x, t, cond) for name in names)
        return loss_of(student, target, ignoring_guidance(tutor))

    gradient = jax.grad(loss)({"student": 1.0, "target": 1.0, "teacher": 1.0})
    assert gradient["student"] != 0
    assert gradient["target"] == gradient["teacher"] == 0


@pytest.mark.parametrize("k", [1, 8])
def test_straight_trajectories_have_no_loss(k):
    """Data at one point: the probability-flow ODE is straight in (alpha, sigma), one DDIM step is exact."""
    point = gaussian(0.0)
    assert loss_of(point, point, ignoring_guidance(point), k=k) < 1e-9
    assert loss_of(network, point, ignoring_guidance(point), k=k) > 1e-3


def test_the_exact_solution_of_the_teachers_ode_has_almost_no_loss():
    """A student that jumps exactly along the curved ODE of Gaussian data; the loss is the teacher's solver error."""
    spread = 0.5
    score = gaussian(spread)

    def loss(N):
        times = draw(KEY, SHAPE, pad_segments(N, 1, LENGTH), **DRAWING)

        def jump(x, t, cond):
            # the raw output whose DDIM move to t_end lands on the exact ODE solution: x - alpha MEAN scales with
            # the standard deviation of the marginal
            (alpha, sigma), (alpha_s, sigma_s) = at(t), at(times.t_end)
            scale = jnp.sqrt((alpha_s**2 * spread**2 + sigma_s**2) / (alpha**2 * spread**2 + sigma**2))
            end = alpha_s * MEAN + scale * (x - alpha * MEAN)
            slope = sigma_s - alpha_s * sigma / alpha
            return jnp.where(jnp.abs(slope) > 1e-4, (end - alpha_s / alpha * x) / slope, score(x, t, cond))

        return float(loss_of(jump, jump, ignoring_guidance(score), N=N, k=1))

    coarse, fine, finest = (loss(N) for N in (8, 40, 500))
    assert finest < fine < coarse
    assert finest < 1e-5
    assert finest < 1e-2 * loss_of(score, score, ignoring_guidance(score), N=40, k=1)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES[1:])
def test_a_wrapped_network_has_the_same_loss(prediction_type):
    def wrapped(x, t, cond):
        return from_x0_eps(*to_x0_eps(network(x, t, cond), x, *at(t), "epsilon"), *at(t), prediction_type)

    def wrapped_teacher(x, t, cond, uncond, guidance):
        return guided(wrapped(x, t, uncond), wrapped(x, t, cond), guidance), None

    other = Schedule(**BETAS, prediction_type=prediction_type)
    expected = loss_of(network, network, teacher)
    np.testing.assert_allclose(loss_of(wrapped, wrapped, wrapped_teacher, schedule=other), expected, rtol=1e-4)


def test_stages_share_one_compiled_step():
    traces = []

    @jax.jit
    def step(batch, segments, guidance, offset_noise):
        traces.append(1)
        options = {"guidance": guidance, "offset_noise": offset_noise, "schedule": SCHEDULE}
        return consistency_loss("tscd", network, network, teacher, batch, KEY, segments, **options)[0]

    losses = [
        float(step(batch_of(16), pad_segments(N, k, LENGTH), np.float32([3, 9 + k]), 0.1 * k))
        for N, k in [(40, 8), (40, 4), (40, 2), (50, 1)]
    ]
    assert len(traces) == 1
    assert len(set(losses)) == 4


def test_distance_and_metrics():
    args = (network, network, teacher, batch_of(16), KEY, pad_segments(40, 4, LENGTH))
    options = {**DRAWING, "schedule": SCHEDULE, "distance": pseudo_huber(1e-3)}
    loss, metrics = jax.jit(lambda: consistency_loss("tscd", *args, **options))()
    times = draw(KEY, SHAPE, args[5], **DRAWING)
    pair = tscd_pair(*args[:4], times, schedule=SCHEDULE)
    difference, target = np.asarray(pair.prediction - pair.target, np.float64), np.asarray(pair.target)
    np.testing.assert_allclose(loss, np.mean(np.sqrt(difference**2 + 1e-6) - 1e-3), rtol=1e-5)
    np.testing.assert_allclose(metrics["mse"], np.mean(difference**2), rtol=1e-5)
    np.testing.assert_allclose(metrics["target_variance"], np.mean(target.var(axis=(1, 2, 3))), rtol=1e-5)
    assert loss.dtype == jnp.float32


def test_clipping_is_refused():
    clipped = Schedule(**BETAS, clip_sample=True)
    with pytest.raises(UserError, match="clip_sample"):
        tscd_pair(network, network, teacher, batch_of(2), drawn([999, 24], [974, 0], [880, 0]), schedule=clipped)
