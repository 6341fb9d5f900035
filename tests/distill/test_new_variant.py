"""A consistency variant of one's own: an entry of `METHODS`, here with the target in the middle of what is left."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.diffusion import Schedule
from hypersd_jax.distill import METHODS, consistency_loss, draw, pad_segments, tscd_pair

SCHEDULE = Schedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
KEY, SEGMENTS, SHAPE = jax.random.key(1), pad_segments(40, 4, 50), (6, 3, 3, 4)


def middle(_uniform: jax.Array, t_b: jax.Array, t_prev: jax.Array) -> jax.Array:
    return (t_b + t_prev) // 2


def network(x: jax.Array, t: jax.Array, cond: jax.Array, *_rest: jax.Array) -> jax.Array:
    return jnp.tanh(0.7 * x + cond.reshape(-1, 1, 1, 1) + t.astype(jnp.float32).reshape(-1, 1, 1, 1) / 1000)


def test_a_target_timestep_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "middle", (middle, tscd_pair))
    batch = {"latents": jax.random.normal(jax.random.key(0), SHAPE), "cond": jnp.linspace(-1, 1, 6), "uncond": None}
    seen = []

    def look(pair):  # the term of a loss sees the pair
        seen.append(pair)
        return jnp.float32(0.0), {}

    def student(x, t, cond):
        return 0.9 * network(x, t, cond)

    def teacher(*args):
        return network(*args), None

    given = (student, network, teacher, batch, KEY, SEGMENTS)
    loss, _ = consistency_loss("middle", *given, guidance=(3.0, 9.0), schedule=SCHEDULE, extra=look)
    drawn, expected = seen[0].draw, draw(KEY, SHAPE, SEGMENTS, guidance=(3.0, 9.0))
    np.testing.assert_array_equal(drawn.t_n, expected.t_n)
    start = np.searchsorted(SEGMENTS.t_n[:40], drawn.t_n)
    np.testing.assert_array_equal(drawn.t_end, (SEGMENTS.t_b[start] + SEGMENTS.t_prev[start]) // 2)
    prediction, target = (np.asarray(each, np.float64) for each in (seen[0].prediction, seen[0].target))
    by_hand = float(np.mean((prediction - target) ** 2))
    assert float(loss) == pytest.approx(by_hand, rel=1e-5)
    assert by_hand > 1e-4
