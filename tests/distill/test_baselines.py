"""LCM, TCD and PCM against their formulas in NumPy, float64, written without the package's code but for the draws."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.diffusion import Schedule, solver_table
from hypersd_jax.distill import (
    METHODS,
    Draw,
    boundary_scalings,
    consistency_loss,
    draw,
    lcm_pair,
    pad_segments,
    pseudo_huber,
    segment_boundary,
    segment_bounds,
    uniform_target,
)
from hypersd_jax.errors import UserError

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KEY = jax.random.key(3)
GUIDANCE = (3.0, 9.0)
SIZE, HUBER_C = 12, 0.05
ABAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
RTOL = 2e-4  # float32 through x_0 at t = 999, where the prediction's rounding is divided by alpha = 0.068


def latents():
    return 0.3 + jax.random.normal(jax.random.key(0), (SIZE, 3, 3, 4))


def network(x, t, cond, np=jnp):
    return np.tanh(0.7 * x + cond.reshape(-1, 1, 1, 1) + t.reshape(-1, 1, 1, 1) / 1000)


def averaged(x, t, cond):
    return 0.8 * network(x, t, cond)


def teacher(x, t, cond, uncond, guidance):
    unguided = network(x, t, uncond)
    return unguided + guidance.reshape(-1, 1, 1, 1) * (network(x, t, cond) - unguided), None


class ByHand(NamedTuple):
    """The published formulas, for noise and for v predictions."""

    v: bool

    def estimates(self, x, output, t):
        a, s = (np.sqrt(p).reshape(-1, 1, 1, 1) for p in (ABAR[t], 1 - ABAR[t]))
        return (a * x - s * output, a * output + s * x) if self.v else ((x - s * output) / a, output)

    def move(self, x, output, t, s):
        x0, eps = self.estimates(x, output, t)
        return np.sqrt(ABAR[s]).reshape(-1, 1, 1, 1) * x0 + np.sqrt(1 - ABAR[s]).reshape(-1, 1, 1, 1) * eps

    def sides(self, method, drawn, clean, cond):
        """The student's and the target's side of the loss."""
        t_n, t_prev, guidance = drawn.t_n, drawn.t_prev, drawn.guidance.reshape(-1, 1, 1, 1)
        a, s = (np.sqrt(p).reshape(-1, 1, 1, 1) for p in (ABAR[t_n], 1 - ABAR[t_n]))
        x = a * clean + s * drawn.eps
        student, unguided = network(x, t_n, cond, np), network(x, t_n, 0 * cond, np)
        before = self.move(x, unguided + guidance * (student - unguided), t_n, t_prev)
        after = 0.8 * network(before, t_prev, cond, np)
        if method == "lcm":
            return self.lcm(x, student, t_n), self.lcm(before, after, t_prev)
        return self.move(x, student, t_n, drawn.t_end), self.move(before, after, t_prev, drawn.t_end)

    def lcm(self, x, output, t):
        c_skip = (0.25 / ((10.0 * t) ** 2 + 0.25)).reshape(-1, 1, 1, 1)
        c_out = (10.0 * t / np.sqrt((10.0 * t) ** 2 + 0.25)).reshape(-1, 1, 1, 1)
        return c_skip * x + c_out * self.estimates(x, output, t)[0]


def jitted(method, N, k, prediction_type="epsilon", **options):
    schedule = Schedule(**BETAS, prediction_type=prediction_type)
    batch = {"latents": latents(), "cond": jnp.linspace(-1, 1, SIZE), "uncond": jnp.zeros(SIZE)}
    args = (network, averaged, teacher, batch, KEY, pad_segments(N, k, 50))
    return jax.jit(lambda: consistency_loss(method, *args, guidance=GUIDANCE, schedule=schedule, **options))()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("method", "N", "k"), [("tscd", 50, 1), ("lcm", 50, 1), ("pcm", 40, 4)])
def test_the_loss_is_the_papers(method, N, k, prediction_type):
    loss, metrics = jitted(method, N, k, prediction_type, distance=pseudo_huber(HUBER_C))
    drawn = draw(KEY, (SIZE, 3, 3, 4), pad_segments(N, k, 50), guidance=GUIDANCE, target=METHODS[method][0])
    drawn = Draw(*(np.asarray(leaf, np.float64 if leaf.dtype == jnp.float32 else np.int64) for leaf in drawn))
    hand = ByHand(prediction_type == "v_prediction")
    prediction, target = hand.sides(method, drawn, np.asarray(latents(), np.float64), np.linspace(-1, 1, SIZE))
    difference = prediction - target
    # LCM's and PCM's training code: the mean over all elements of sqrt(d^2 + c^2) - c
    np.testing.assert_allclose(loss, np.mean(np.sqrt(difference**2 + HUBER_C**2) - HUBER_C), rtol=RTOL)
    np.testing.assert_allclose(metrics["mse"], np.mean(difference**2), rtol=RTOL)


def test_tcds_end_is_uniform_over_all_times_below_the_start():
    """One segment: t_b = 0 for every start, so that TCD needs no rule of its own."""
    segments = pad_segments(10, 1, 50)
    times = jax.tree.map(np.asarray, draw(KEY, (4000, 1, 1, 1), segments, guidance=GUIDANCE))
    assert np.all((times.t_end >= 0) & (times.t_end <= times.t_prev))
    share = times.t_end[times.t_prev > 0] / times.t_prev[times.t_prev > 0]
    counts, _ = np.histogram(share, bins=10, range=(0, 1))
    assert counts.std() < 2.5 * np.sqrt(len(share) / 10)
    longest = times.t_end[times.t_prev == 899]
    assert longest.min() < 25
    assert longest.max() > 875


@pytest.mark.parametrize(("N", "k"), [(40, 8), (40, 4), (50, 2), (50, 1)])
def test_pcms_end_is_the_phases_edge(N, k):
    drawn = draw(KEY, (500, 1, 1, 1), pad_segments(N, k, 50), guidance=GUIDANCE, target=segment_boundary)
    t_n, _, t_b = segment_bounds(N, k)
    edges = dict(zip(t_n.tolist(), t_b.tolist(), strict=True))
    assert np.asarray(drawn.t_end).tolist() == [edges[t] for t in np.asarray(drawn.t_n).tolist()]
    assert set(np.unique(drawn.t_end)) == set(t_b.tolist())


def test_both_rules_meet_where_a_segment_is_one_step():
    bounds = [jnp.asarray(a, jnp.int32) for a in segment_bounds(8, 8)]
    for uniform in (0.0, 0.5, 1.0 - 2.0**-23):
        numbers = jnp.full(8, uniform)
        np.testing.assert_array_equal(
            uniform_target(numbers, bounds[2], bounds[1]), segment_boundary(numbers, *bounds[2:0:-1])
        )
    assert jitted("pcm", 8, 8)[0] == jitted("tscd", 8, 8)[0]


def test_the_other_draws_are_the_same_for_all_methods():
    """So that methods are compared on the same starts, noise and guidance."""
    segments = pad_segments(40, 4, 50)
    uniform, edge = (
        draw(KEY, (SIZE, 3, 3, 4), segments, guidance=GUIDANCE, target=end)
        for end in (uniform_target, segment_boundary)
    )
    jax.tree.map(np.testing.assert_array_equal, uniform._replace(t_end=0), edge._replace(t_end=0))
    assert np.any(uniform.t_end != edge.t_end)


def test_boundary_scalings():
    c_skip, c_out = boundary_scalings(jnp.asarray([0, 1, 19, 800, 999]))
    assert (float(c_skip[0]), float(c_out[0])) == (1.0, 0.0)
    np.testing.assert_allclose(c_skip[1:], [0.25 / 100.25, 0.25 / 36100.25, 3.90625e-9, 2.50500e-9], rtol=1e-5)
    np.testing.assert_allclose(c_out[1:], [10 / 100.25**0.5, 190 / 36100.25**0.5, 1, 1], rtol=1e-6)


def test_lcms_consistency_function_is_the_samplers():
    """c_out x_0 + c_skip x is what the lcm sampler returns from its last step, so that training and sampling agree."""
    config = {**BETAS, "original_inference_steps": 50}
    table = solver_table("lcm", 50, scheduler_config=config)
    c_skip, c_out = boundary_scalings(jnp.asarray(table["timesteps"]))
    rescale = np.append(np.sqrt(ABAR[table["timesteps"][1:]]), 1.0)
    np.testing.assert_allclose(table["c_x"], rescale * c_skip, rtol=1e-5)
    np.testing.assert_allclose(table["c_x0"], rescale * c_out, rtol=1e-5)


def test_at_the_trajectorys_end_lcms_target_is_the_teachers_step():
    times = (jnp.asarray([t], jnp.int32) for t in (19, 0, 0))
    drawn = Draw(*times, jnp.ones(1), jnp.ones((1, 3, 3, 4)), jnp.asarray([19]))
    batch = {"latents": latents()[:1], "cond": jnp.ones(1)}

    def silent(x, t, cond):
        return 1e3 * jnp.ones_like(x)

    def tutor(x, t, cond, _uncond, _guidance):
        return network(x, t, cond), t

    pair = lcm_pair(network, silent, tutor, batch, drawn, schedule=Schedule(**BETAS))
    assert pair.seen.tolist() == [19]
    hand = ByHand(v=False)
    x = np.asarray(pair.x_t, np.float64)
    step = hand.move(x, network(x, np.asarray([19]), np.ones(1), np), np.asarray([19]), np.asarray([0]))
    np.testing.assert_allclose(pair.target, step, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["lcm", "pcm"])
def test_only_the_student_is_differentiated(method):
    batch = {"latents": latents(), "cond": jnp.linspace(-1, 1, SIZE)}

    def loss(scales):
        student, target = (lambda x, t, cond, n=name: scales[n] * network(x, t, cond) for name in ("student", "target"))

        def tutor(x, t, cond, _uncond, _guidance):
            return scales["teacher"] * network(x, t, cond), None

        args = (student, target, tutor, batch, KEY, pad_segments(40, 1, 50))
        return consistency_loss(method, *args, guidance=GUIDANCE, schedule=Schedule(**BETAS))[0]

    gradient = jax.jit(jax.grad(loss))({"student": 1.0, "target": 1.0, "teacher": 1.0})
    assert gradient["student"] != 0
    assert gradient["target"] == gradient["teacher"] == 0


def test_clipping_is_refused():
    drawn = draw(KEY, (SIZE, 3, 3, 4), pad_segments(10, 1, 10), guidance=GUIDANCE)
    with pytest.raises(UserError, match="clip_sample"):
        lcm_pair(
            network,
            averaged,
            teacher,
            {"latents": latents(), "cond": jnp.ones(SIZE)},
            drawn,
            schedule=Schedule(**BETAS, clip_sample=True),
        )
