"""A further term of the consistency loss, such as the adversarial one, added to the weighted distance."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.diffusion import Schedule
from hypersd_jax.distill import METHODS, consistency_loss, draw, pad_segments

SCHEDULE = Schedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
GUIDANCE = (3.0, 9.0)
SHAPE = (6, 3, 3, 4)
BATCH = {"latents": jax.random.normal(jax.random.key(0), SHAPE), "cond": jnp.linspace(-1, 1, 6), "uncond": None}
KEY, SEGMENTS = jax.random.key(1), pad_segments(40, 4, 50)


def network(x, t, cond):
    return jnp.tanh(0.7 * x + cond.reshape(-1, 1, 1, 1) + t.astype(jnp.float32).reshape(-1, 1, 1, 1) / 1000)


def run(method="tscd", extra=None, scale=1.0, **options):
    def student(x, t, cond):
        return scale * network(x, t, cond)

    def teacher(x, t, cond, uncond, guidance):
        return network(x, t, cond) * guidance.reshape(-1, 1, 1, 1) / 5, {"doubled": 2 * x}

    args = (method, student, network, teacher, BATCH, KEY, SEGMENTS)
    return consistency_loss(*args, guidance=GUIDANCE, schedule=SCHEDULE, extra=extra, **options)


def term(pair):
    """One whose value and slope are known: sums of the prediction."""
    return 0.01 * jnp.sum(pair.prediction), {"extra": jnp.sum(pair.prediction), "top": pair.draw.t_top[0]}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_the_distance_is_weighted_and_the_term_is_added_as_it_is(method, weight):
    plain, metrics = run(method)
    loss, more = run(method, term, distance_weight=weight)
    assert float(plain) > 1e-3
    assert float(loss) == pytest.approx(weight * float(plain) + 0.01 * float(more["extra"]), rel=1e-5, abs=1e-6)
    assert loss.dtype == jnp.float32
    assert set(more) == {*metrics, "extra", "top"}
    for name, value in metrics.items():  # as they were, without the weight
        np.testing.assert_allclose(more[name], value, rtol=1e-5)


def test_the_gradient_is_the_sum_of_both():
    def slope(extra, **options):
        return float(jax.grad(lambda scale: run("tscd", extra, scale, **options)[0])(1.3))

    distance, alone = slope(None), slope(term, distance_weight=0.0)
    assert min(abs(distance), abs(alone)) > 1e-2
    both = slope(term, distance_weight=0.25)
    assert both == pytest.approx(0.25 * distance + alone, rel=1e-4)


def test_the_metrics_of_the_term_have_no_gradient():
    gradient = jax.grad(lambda scale: run("tscd", term, scale, distance_weight=1.0)[1]["extra"])(1.3)
    assert gradient == 0


def test_the_term_sees_the_pair_that_the_distance_compares():
    seen = []

    def watch(pair):
        seen.append(pair)
        return jnp.float32(0), {}

    loss, _ = run("tscd", watch, distance_weight=1.0)
    (pair,) = seen
    assert float(loss) == pytest.approx(float(jnp.mean(jnp.square(pair.prediction - pair.target))), rel=1e-5)
    np.testing.assert_array_equal(pair.seen["doubled"], 2 * pair.x_t)
    expected = draw(KEY, SHAPE, SEGMENTS, guidance=GUIDANCE)
    for name, ours in pair.draw._asdict().items():
        np.testing.assert_array_equal(ours, getattr(expected, name), err_msg=name)
    starts = np.searchsorted(SEGMENTS.t_n[:40], expected.t_n)
    np.testing.assert_array_equal(pair.draw.t_top, np.asarray([249, 499, 749, 999])[starts // 10])
