"""The learning rate of every update, and AdamW against optax's own."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest

from hypersd_jax import training
from hypersd_jax.config import ConsistencyStage, build
from hypersd_jax.errors import UserError
from tests.helpers import toy_training as toy


def rate(schedule: str, step: int, warmup: int = 4, updates: int = 12) -> float:
    settings = dataclasses.replace(toy.SETTINGS, warmup=warmup, schedule=schedule, updates=updates)
    return float(training.learning_rate_at(settings, 2e-4, step))


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


def test_a_warm_up_as_long_as_the_stage_reaches_the_rate():
    """Nothing is left to decay over, and nothing is divided by."""
    for schedule in ("cosine", "linear"):
        assert rate(schedule, 11, warmup=12) == pytest.approx(2e-4, rel=1e-6)
        assert rate(schedule, 11, warmup=24) == pytest.approx(1e-4, rel=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_matches_optax_adamw_with_clipping(weight_decay):
    ours = training.make_optimizer(
        dataclasses.replace(toy.SETTINGS, weight_decay=weight_decay, clip_norm=0.5, beta1=0.8, beta2=0.99)
    )
    reference = optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(1e-2, b1=0.8, b2=0.99, eps=1e-8, weight_decay=weight_decay)
    )
    draw = np.random.default_rng(0)
    params = {"w": draw.standard_normal((3, 2), np.float32)}
    a, b = ours.init(params), reference.init(params)
    for _ in range(4):
        grads = {"w": draw.standard_normal((3, 2), np.float32)}
        up_a, a = ours.update(grads, a, params)
        up_b, b = reference.update(grads, b, params)
        np.testing.assert_allclose(-1e-2 * up_a["w"], up_b["w"], rtol=1e-6)


def test_the_constant_beside_the_second_moment_is_adams():
    """1e-8, where it is all that counts: a gradient of that size takes half a step."""
    optimizer = training.make_optimizer(dataclasses.replace(toy.SETTINGS, weight_decay=0.0))
    params = {"w": np.zeros(1, np.float32)}
    direction, _ = optimizer.update({"w": np.full(1, 1e-8, np.float32)}, optimizer.init(params), params)
    np.testing.assert_allclose(direction["w"], [0.5], rtol=1e-3)


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_optimizer_state_is_two_copies_of_the_trainable_and_a_counter(weight_decay):
    params = {"down": np.zeros((64, 8), np.float32), "up": np.zeros((8, 32), np.float32)}
    settings = dataclasses.replace(toy.SETTINGS, weight_decay=weight_decay)
    state = training.init_state({"lora": params}, settings, averaged=())

    def count(tree) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    assert count(state.opt_state) == 2 * count(params) + 4


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", -1.0),
        ("learning_rate", 0.0),
        ("warmup", -1),
        ("schedule", "step"),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("weight_decay", -0.1),
        ("clip_norm", 0.0),
    ],
)
def test_bad_values_are_named(key, value):
    """By the stage whose settings they are."""
    with pytest.raises(UserError, match=key):
        build(ConsistencyStage, {"name": "a", "k": 1, "updates": 1, "batch_size": 1, key: value})
