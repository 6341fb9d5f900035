from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from hypersd_jax import training
from hypersd_jax.errors import UserError


def rate(schedule: str, step: int, warmup: int = 4, updates: int = 12) -> float:
    config = training.OptimizerConfig(learning_rate=2e-4, warmup_steps=warmup, schedule=schedule)
    return float(training.learning_rate_at(training.optimizer_controls(config, updates), step))


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_warm_up_rises_linearly_to_the_rate(schedule):
    rates = [rate(schedule, step) for step in range(4)]
    np.testing.assert_allclose(rates, 2e-4 * np.array([0.25, 0.5, 0.75, 1.0]), rtol=1e-6)
    assert rate(schedule, 0, warmup=0) == pytest.approx(2e-4, rel=1e-6)


def test_decay_to_zero_over_the_stage():
    assert rate("constant", 12) == pytest.approx(2e-4, rel=1e-6)
    assert rate("linear", 8) == pytest.approx(1e-4, rel=1e-6)
    assert rate("cosine", 6) == pytest.approx(2e-4 * 0.5 * (1 + np.cos(np.pi / 4)), rel=1e-6)
    for schedule in ("cosine", "linear"):
        assert rate(schedule, 12) == pytest.approx(0.0, abs=1e-11)
        assert rate(schedule, 13) == pytest.approx(0.0, abs=1e-11)


def test_rate_follows_optax_warm_up_then_cosine():
    reference = optax.cosine_decay_schedule(2e-4, 8)
    for step in range(4, 12):
        assert rate("cosine", step) == pytest.approx(float(reference(step - 4)), rel=1e-5, abs=1e-11)


def test_matches_optax_adamw_with_clipping():
    config = training.OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, clip_norm=0.5, beta2=0.99)
    ours = training.make_optimizer(config)
    reference = optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(1e-2, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.1)
    )
    draw = np.random.default_rng(0)
    params = {"w": draw.standard_normal((3, 2), np.float32)}
    a, b = ours.init(params), reference.init(params)
    for _ in range(4):
        grads = {"w": draw.standard_normal((3, 2), np.float32)}
        up_a, a = ours.update(grads, a, params)
        up_b, b = reference.update(grads, b, params)
        np.testing.assert_allclose(-1e-2 * up_a["w"], up_b["w"], rtol=1e-6)


def test_optimizer_state_is_two_copies_of_the_trainable_and_a_counter():
    params = {"down": np.zeros((64, 8), np.float32), "up": np.zeros((8, 32), np.float32)}
    state = training.init_state(params, training.make_optimizer(training.OptimizerConfig(weight_decay=0.01)))

    def count(tree) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    assert count(state.opt_state) == 2 * count(params) + 4


@pytest.mark.parametrize(
    ("key", "value"), [("learning_rate", -1.0), ("schedule", "step"), ("beta1", 1.0), ("clip_norm", 0.0), ("eps", 0)]
)
def test_bad_values_are_named(key, value):
    with pytest.raises(UserError, match=key):
        training.OptimizerConfig(**{key: value})
