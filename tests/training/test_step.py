"""A step of one phase with one model on one device: arithmetic, accumulation, randomness, the guard, donation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hypersd_jax import training
from hypersd_jax.training import Phase
from tests.helpers import toy_training as toy

MESH = training.make_mesh(1, 1)


def test_three_steps_equal_the_same_written_by_hand():
    run = toy.Run()
    history = run.go(3)

    params = ema = toy.trainable()
    reference = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.add_decayed_weights(1e-2))
    opt_state = reference.init(params)
    differentiate = jax.jit(jax.value_and_grad(toy.make_loss(run.settings), has_aux=True))
    for step in range(3):
        key = jax.random.fold_in(run.key, step)
        rows = jax.tree.map(lambda leaf: leaf[0], toy.batch(step))
        (value, metrics), grads = differentiate(params, ema, toy.frozen(), rows, key)
        updates, opt_state = reference.update(grads, opt_state, params)
        lr = float(training.learning_rate_at(run.settings, 1e-2, step))
        updates = jax.tree.map(lambda leaf: -lr * leaf, updates)  # noqa: B023
        params = optax.apply_updates(params, updates)
        ema = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, ema, params)
        by_hand = metrics | {
            "loss": value,
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(params),
            "lr": lr,
            "skipped": 0,
        }
        assert history[step] == pytest.approx({name: float(number) for name, number in by_hand.items()}, rel=1e-5)
    for ours, theirs in ((run.state.trainable, params), (run.state.ema, ema)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), ours, theirs)
    assert int(run.state.step) == 3
    assert int(run.state.opt_state["student"][1].count) == 3


def test_training_lowers_the_loss():
    steady = {"learning_rate": 3e-2, "warmup": 0, "schedule": "constant", "weight_decay": 0.0}
    history = toy.Run(rows=64, jitter=0.0, **steady).go(60)
    assert history[-1]["error"] < 0.6 * history[0]["error"]


def test_accumulated_gradient_equals_the_big_batch():
    """Noise included: samples are distinguished by their batch index."""
    whole, pieces = (toy.Run(rows=16, accumulate=n) for n in (1, 4))
    for big, small in zip(whole.go(3), pieces.go(3), strict=True):
        assert big == pytest.approx(small, rel=1e-4, abs=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), whole.state.trainable, pieces.state.trainable
    )


def test_ema_with_decay_zero_is_the_model():
    run = toy.Run(ema=0.0)
    run.go(2)
    toy.assert_same(run.state.ema, run.state.trainable)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_non_finite_step_changes_only_the_counters(poison):
    run = toy.Run()
    run.go(2)
    before = jax.device_get(run.state)
    (metrics,) = run.go(1, jitter=poison)
    after = jax.device_get(run.state)
    for part in ("trainable", "opt_state", "ema"):
        toy.assert_same(getattr(before, part), getattr(after, part))
    assert (int(after.step), int(after.skipped)) == (3, 1)
    assert metrics["skipped"] == 1
    assert metrics["update_norm"] == 0

    (metrics,) = run.go(1)
    assert np.isfinite(metrics["loss"])
    assert (int(run.state.step), int(run.state.skipped)) == (4, 1)


def one_step(loss, weights, *, averaged=("a",), seed=0, repeats=1):
    """One step of a model "a" on a loss of its own."""
    state = training.init_state({"a": weights}, toy.SETTINGS, averaged=averaged)
    step = training.make_step(lambda settings: [Phase(models={"a": 1.0}, loss=loss, repeats=repeats)], mesh=MESH)
    return step(state, {}, {"x": np.zeros((1, 2), np.float32)}, jax.random.key(seed), toy.SETTINGS)


def test_a_non_finite_gradient_under_a_finite_loss_is_skipped_too():
    def loss(models, ema, frozen, rows, key):
        return jnp.sum(jnp.sqrt(models["a"])), {}  # value 0, slope infinite

    state, metrics = one_step(loss, jnp.zeros(3))
    assert float(metrics["loss"]) == 0
    assert int(state.skipped) == 1
    np.testing.assert_array_equal(state.trainable["a"], np.zeros(3))


@pytest.mark.parametrize("repeats", [1, 3])
def test_the_only_phase_of_one_model_draws_from_the_steps_key(repeats):
    """Taken once, from that itself; repeated, each time from a key of its own."""

    def loss(models, ema, frozen, rows, key):
        return jnp.sum(models["a"]), {"random": jax.random.uniform(key)}

    _, metrics = one_step(loss, jnp.zeros(3), seed=5, repeats=repeats)
    key = jax.random.fold_in(jax.random.key(5), 0)  # state.step is 0
    if repeats == 3:
        key = jax.random.fold_in(jax.random.fold_in(key, 0), 2)
    assert float(metrics["random"]) == float(jax.random.uniform(key))


def test_the_state_is_donated_and_the_callers_arrays_are_not():
    mine = jax.tree.map(jnp.asarray, toy.trainable())
    run = toy.Run()
    old = training.init_state(mine, run.settings, averaged=("student",), mesh=run.mesh)
    run.step(old, run.frozen, toy.batch(0), run.key, run.settings)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((mine, run.frozen)))
    toy.assert_same(mine, toy.trainable())


@pytest.mark.parametrize("name", ["loss", "grad_norm", "update_norm", "param_norm", "lr", "skipped"])
def test_own_metrics_cannot_be_overwritten(name):
    def loss(models, ema, frozen, rows, key):
        return jnp.sum(models["a"]), {name: jnp.float32(0)}

    with pytest.raises(ValueError, match=name):
        one_step(loss, jnp.zeros(3))


def test_master_weights_must_be_float32():
    with pytest.raises(ValueError, match=r"\['a'\]\['b'\].*bfloat16"):
        training.init_state({"a": {"b": jnp.zeros(3, jnp.bfloat16)}}, toy.SETTINGS, averaged=())
